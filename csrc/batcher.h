// The batcher turns many concurrent searches into few calls of a backend that is fast in batches.
//
//   caller   submit(queries, k, deadline) -> Ticket: wait for it, or be told through a Channel
//   worker   take() -> Batch; search; complete(scores, ids) or fail(error)
//
// A query with a cached result is answered at once; one in flight is joined, not searched again; the others queue.
// Dispatch is continuous: no timer, no waiting for a full batch. Whatever queued while the last batch ran is the next
// one, up to a budget, so batches grow with the load by themselves. One batch more than is being searched may be taken,
// so that a backend of two stages prepares one while it searches the other.
//
// Every ticket settles exactly once: done, failed, expired or cancelled. An error of the backend is final: it fails all
// tickets, pending and future ones, with the first message. Deadlines are absolute, and a thread of their own enforces
// them whatever the backend does. Pending work is bounded in bytes: a submission that does not fit waits in line (and
// its caller with it, unless it has a channel), and is never rejected.
//
// Locking: one mutex guards everything (core.h); a channel's own mutex is taken inside it. There are no callbacks, and
// no thread of this library ever touches Python. After a fork, calls throw UsedAfterFork: the child lacks the threads.
#pragma once

#include <chrono>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "cache.h"
#include "channel.h"
#include "statistics.h"

namespace searchr1 {

using Clock = std::chrono::steady_clock;

struct BatcherOptions {
  int64_t max_batch_rows = 256;           // an exact scan costs the same up to about 140 queries on an H200
  int64_t max_batch_bytes = 1 << 16;      // of text: about 16k tokens of English; a longer query goes alone
  int64_t max_pending_bytes = 64 << 20;   // texts and results of tickets that are admitted and not settled
  int64_t max_cache_bytes = 64 << 20;
  int32_t min_depth = 16;                 // hits to search for; doubled until it covers k
  int32_t max_batches_in_flight = 2;      // one being searched and one being prepared
  std::string identity;                   // of corpus and encoder; a saved cache must have the same
};

enum class Outcome { pending, done, failed, expired, cancelled };

struct Core;

// One caller's search. Dropping it unsettled cancels it.
class Ticket {
 public:
  Ticket(std::shared_ptr<Core> core, std::vector<std::string> queries, int32_t k, Clock::time_point now,
         Clock::time_point deadline, std::shared_ptr<Channel> channel);
  ~Ticket();
  Ticket(const Ticket&) = delete;
  Ticket& operator=(const Ticket&) = delete;

  uint64_t id() const;
  int64_t num_queries() const;
  int32_t k() const;
  Outcome outcome() const;
  std::string error() const;  // why it failed

  // False if the time ran out first. Admitted includes settled.
  bool wait_admitted(Clock::duration patience) const;
  bool wait_settled(Clock::duration patience) const;

  // Does nothing if it is settled. Other tickets that wait for an equal query are not affected.
  void cancel();

  // The results once done, [num_queries, k]: best first; where there were fewer hits, the rest is -inf and -1.
  const std::vector<float>& scores() const;
  const std::vector<int64_t>& ids() const;

 private:
  friend struct Core;
  friend class Batcher;
  struct Parts;
  std::shared_ptr<Core> core_;
  std::unique_ptr<Parts> parts_;
};

// Distinct queries to search together, all to one depth. Dropping it unanswered fails everything, as an error does.
class Batch {
 public:
  Batch(std::shared_ptr<Core> core, std::vector<std::shared_ptr<struct Flight>> flights, int32_t depth);
  ~Batch();
  Batch(const Batch&) = delete;
  Batch& operator=(const Batch&) = delete;

  int64_t size() const { return static_cast<int64_t>(flights_.size()); }
  int32_t depth() const { return depth_; }
  const std::string& query(int64_t row) const;

  // scores, ids: [size, width], 1 <= width <= depth, best first; id -1 fills rows that have fewer hits. Throws
  // InvalidInput for a row out of order, with a NaN, or with hits after its end; the batch must then still be answered.
  void complete(const float* scores, const int64_t* ids, int64_t width);

 private:
  std::shared_ptr<Core> core_;
  std::vector<std::shared_ptr<struct Flight>> flights_;
  const int32_t depth_;
  const Clock::time_point taken_at_;
  bool is_answered_ = false;
};

// What is in flight at this moment.
struct Gauges {
  int64_t queued = 0;   // distinct queries
  int64_t blocked = 0;  // tickets in line for room
  int64_t pending_bytes = 0;
  int64_t batches_in_flight = 0;
  int64_t cache_entries = 0;
  int64_t cache_bytes = 0;
  int64_t cache_evicted = 0;
};

class Batcher {
 public:
  explicit Batcher(BatcherOptions options);
  ~Batcher();  // closes
  Batcher(const Batcher&) = delete;
  Batcher& operator=(const Batcher&) = delete;

  // Never blocks: see Ticket::wait_admitted. Clock::time_point::max() is no deadline. The caller, having read the clock
  // for the deadline, passes `now`: reading it took 0.4 us on one virtual machine (AMD EPYC, 2026-11-25).
  std::shared_ptr<Ticket> submit(std::vector<std::string> queries, int64_t k, Clock::time_point now,
                                 Clock::time_point deadline, std::shared_ptr<Channel> channel = nullptr);

  // Null if there was nothing to do in that time, or never will be (`is_finished`).
  std::shared_ptr<Batch> take(Clock::duration patience);
  bool is_finished() const;  // closed, or the backend failed

  // Fails everything pending and later with the backend's error. Does nothing once closed or failed.
  void fail(const std::string& error);

  // Fails everything pending and later. Does nothing the second time.
  void close();

  Statistics statistics(bool reset = false);
  Gauges gauges() const;

  // Saves whole or not at all, by renaming a temporary file. Loading adds to what is there, and returns how many.
  void save_cache(const std::string& path) const;
  int64_t load_cache(const std::string& path);

 private:
  std::shared_ptr<Core> core_;
};

}  // namespace searchr1
