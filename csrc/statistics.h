// Counters of a batcher, and a histogram that gives percentiles in constant memory.
#pragma once

#include <array>
#include <cstdint>

namespace searchr1 {

// 16 buckets per octave: a percentile is at most 1/16 above the true one, never below it.
class Histogram {
 public:
  void add(uint64_t value, int64_t count = 1) {
    counts_[bucket(value)] += count;
    total_ += count;
    sum_ += static_cast<double>(value) * static_cast<double>(count);
    if (value > largest_) largest_ = value;
  }

  int64_t count() const { return total_; }
  double mean() const { return total_ ? sum_ / static_cast<double>(total_) : 0.0; }
  uint64_t largest() const { return largest_; }

  // The value that a share of at least `percent`/100 of all values does not exceed; 0 if there are none.
  uint64_t percentile(double percent) const {
    const double wanted = percent / 100.0 * static_cast<double>(total_);
    int64_t seen = 0;
    for (size_t index = 0; index < counts_.size(); ++index) {
      seen += counts_[index];
      if (seen > 0 && static_cast<double>(seen) >= wanted) {
        const uint64_t edge = upper_edge(index);
        return edge < largest_ ? edge : largest_;
      }
    }
    return largest_;
  }

 private:
  static constexpr int kBits = 4;

  // Values below 16 have a bucket each; above, the four bits after the leading one choose within the octave.
  static size_t bucket(uint64_t value) {
    if (value < (1u << kBits)) return value;
    const int octave = 63 - __builtin_clzll(value);
    return (static_cast<size_t>(octave - kBits + 1) << kBits) + ((value >> (octave - kBits)) & ((1u << kBits) - 1));
  }

  static uint64_t upper_edge(size_t index) {
    if (index < (1u << kBits)) return index;
    const int shift = static_cast<int>(index >> kBits) - 1;
    const uint64_t low = ((1ull << kBits) + (index & ((1u << kBits) - 1))) << shift;
    return low + ((1ull << shift) - 1);
  }

  std::array<int64_t, (64 - kBits + 1) << kBits> counts_{};
  int64_t total_ = 0;
  double sum_ = 0.0;
  uint64_t largest_ = 0;
};

// Counts since the start, or since they were last reset. A query that was asked twice counts twice.
struct Statistics {
  int64_t num_searches = 0;   // tickets
  int64_t num_queries = 0;    // asked, once they were admitted
  int64_t num_unique = 0;     // had to be searched
  int64_t num_coalesced = 0;  // joined an equal one in flight
  int64_t num_cache_hits = 0;
  int64_t num_batches = 0;
  int64_t num_failed = 0;     // tickets that ended this way
  int64_t num_expired = 0;
  int64_t num_cancelled = 0;
  int64_t num_blocked = 0;    // tickets that had to wait for room
  Histogram batch_rows;
  Histogram batch_nanoseconds;    // from take to complete: the backend's time
  Histogram latency_nanoseconds;  // from submit to result, of every query that got one
};

}  // namespace searchr1
