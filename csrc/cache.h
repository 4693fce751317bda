// A cache of results: (query, depth) -> hits, bounded in bytes; the least recently used are evicted first.
//
// An entry never goes stale: corpus and encoder are frozen, and `identity` says which they are. Ids are kept, not
// texts: 16 bytes a hit, 12 when saved. There is no lock here; the batcher's is held around every call.
#pragma once

#include <cstdint>
#include <list>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

namespace searchr1 {

struct Hit {
  float score;
  int64_t id;
};

// The hits of one query, best first; fewer than the depth where there were no more.
using Hits = std::vector<Hit>;

// What makes two searches one: the text, and how deep to search. `query` is borrowed.
struct Key {
  std::string_view query;
  int32_t depth;
  bool operator==(const Key& other) const { return depth == other.depth && query == other.query; }
};

struct KeyHash {
  size_t operator()(const Key& key) const {
    return std::hash<std::string_view>{}(key.query) ^ (static_cast<size_t>(key.depth) * 0x9E3779B97F4A7C15ull);
  }
};

class ResultCache {
 public:
  // `max_bytes` 0: nothing is kept.
  explicit ResultCache(int64_t max_bytes) : max_bytes_(max_bytes) {}

  // Null if absent; valid until the next call.
  const Hits* find(const Key& key);
  void insert(const Key& key, Hits hits) noexcept;  // empties the cache if there is no memory

  int64_t size() const { return static_cast<int64_t>(entries_.size()); }
  int64_t num_bytes() const { return num_bytes_; }
  int64_t num_evicted() const { return num_evicted_; }

  // The whole cache as one string, least recently used first, and back. `deserialize` is static, so that a file is read
  // and checked without the lock.
  struct Entry {
    std::string query;
    int32_t depth;
    Hits hits;
  };
  std::string serialize(const std::string& identity) const;
  static std::vector<Entry> deserialize(const std::string& bytes, const std::string& identity,
                                        const std::string& where);

 private:
  static int64_t cost(const Key& key, const Hits& hits);

  std::list<Entry> entries_;  // most recently used first
  std::unordered_map<Key, std::list<Entry>::iterator, KeyHash> places_;  // keys borrow from entries_
  const int64_t max_bytes_;
  int64_t num_bytes_ = 0;
  int64_t num_evicted_ = 0;
};

}  // namespace searchr1
