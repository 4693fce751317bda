// The saved form, little-endian: magic, checksum of all that follows, identity, number of entries, entries.
#include "cache.h"

#include <cstring>
#include <new>
#include <utility>

#include "check.h"

namespace searchr1 {
namespace {

constexpr char kMagic[8] = {'s', 'r', '1', 'c', 'a', 'c', 'h', '1'};
// With libstdc++ and glibc: list node 96, hash node 64, its bucket 16, the headers of query and hits 32.
constexpr int64_t kEntryOverhead = 208;

uint64_t fnv1a(std::string_view bytes) {
  uint64_t hash = 0xCBF29CE484222325ull;
  for (unsigned char byte : bytes) hash = (hash ^ byte) * 0x100000001B3ull;
  return hash;
}

template <typename Number>
void append(std::string& bytes, Number number) {
  bytes.append(reinterpret_cast<const char*>(&number), sizeof number);
}

// Reads what `append` wrote; the first read past the end is an error that names the file.
class Reader {
 public:
  Reader(std::string_view bytes, const std::string& where) : bytes_(bytes), where_(where) {}

  template <typename Number>
  Number number() {
    Number value;
    std::memcpy(&value, text(sizeof value).data(), sizeof value);
    return value;
  }

  std::string_view text(size_t length) {
    CHECK_INPUT(length <= bytes_.size(), where_, " is cut short; without it the cache fills itself again");
    std::string_view taken = bytes_.substr(0, length);
    bytes_.remove_prefix(length);
    return taken;
  }

  std::string_view rest() const { return bytes_; }

 private:
  std::string_view bytes_;
  const std::string& where_;
};

}  // namespace

int64_t ResultCache::cost(const Key& key, const Hits& hits) {
  return kEntryOverhead + static_cast<int64_t>(key.query.size() + hits.size() * sizeof(Hit));
}

const Hits* ResultCache::find(const Key& key) {
  auto found = places_.find(key);
  if (found == places_.end()) return nullptr;
  entries_.splice(entries_.begin(), entries_, found->second);
  return &found->second->hits;
}

void ResultCache::insert(const Key& key, Hits hits) noexcept {
  const int64_t bytes = cost(key, hits);
  if (bytes > max_bytes_) return;
  try {
    hits.shrink_to_fit();
    std::list<Entry> one;
    one.push_front({std::string(key.query), key.depth, std::move(hits)});
    if (!places_.emplace(Key{one.front().query, key.depth}, one.begin()).second) return;  // loaded meanwhile
    entries_.splice(entries_.begin(), one);
  } catch (const std::bad_alloc&) {  // the cache is what can best be done without
    num_evicted_ += size() + 1;
    places_.clear();
    entries_.clear();
    num_bytes_ = 0;
    return;
  }
  num_bytes_ += bytes;
  while (num_bytes_ > max_bytes_) {
    const Entry& oldest = entries_.back();
    const Key oldest_key{oldest.query, oldest.depth};
    num_bytes_ -= cost(oldest_key, oldest.hits);
    places_.erase(oldest_key);
    entries_.pop_back();
    ++num_evicted_;
  }
}

std::string ResultCache::serialize(const std::string& identity) const {
  std::string body;
  append<uint32_t>(body, static_cast<uint32_t>(identity.size()));
  body += identity;
  append<uint64_t>(body, entries_.size());
  for (auto entry = entries_.rbegin(); entry != entries_.rend(); ++entry) {
    append<uint32_t>(body, static_cast<uint32_t>(entry->query.size()));
    body += entry->query;
    append<int32_t>(body, entry->depth);
    append<uint32_t>(body, static_cast<uint32_t>(entry->hits.size()));
    for (const Hit& hit : entry->hits) {
      append(body, hit.score);
      append(body, hit.id);
    }
  }
  std::string bytes(kMagic, sizeof kMagic);
  append(bytes, fnv1a(body));
  return bytes + body;
}

std::vector<ResultCache::Entry> ResultCache::deserialize(const std::string& bytes, const std::string& identity,
                                                         const std::string& where) {
  Reader reader(bytes, where);
  CHECK_INPUT(reader.text(sizeof kMagic) == std::string_view(kMagic, sizeof kMagic), where,
              " is not a saved cache of searches");
  const auto checksum = reader.number<uint64_t>();
  CHECK_INPUT(checksum == fnv1a(reader.rest()), where,
              " was altered or cut short: its checksum is wrong; without it the cache fills itself again");
  const std::string saved(reader.text(reader.number<uint32_t>()));
  CHECK_INPUT(saved == identity, where, " was saved from other searches (", saved, ", here ", identity, ")");
  std::vector<Entry> entries(reader.number<uint64_t>());
  for (Entry& entry : entries) {
    entry.query = reader.text(reader.number<uint32_t>());
    entry.depth = reader.number<int32_t>();
    entry.hits.resize(reader.number<uint32_t>());
    for (Hit& hit : entry.hits) {
      hit.score = reader.number<float>();
      hit.id = reader.number<int64_t>();
    }
  }
  return entries;
}

}  // namespace searchr1
