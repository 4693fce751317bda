#include "merge.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "cache.h"
#include "check.h"

namespace searchr1 {

void merge_topk(const std::vector<ShardHits>& shards, int64_t num_queries, int64_t k, float* scores, int64_t* ids) {
  CHECK_INPUT(k >= 1, "k must be at least 1, not ", k);
  const auto is_better = [](const Hit& a, const Hit& b) {
    return a.score != b.score ? a.score > b.score : a.id < b.id;
  };
  Hits hits;
  for (int64_t query = 0; query < num_queries; ++query) {
    hits.clear();
    for (const ShardHits& shard : shards) {
      for (int64_t place = query * shard.width; place < (query + 1) * shard.width; ++place) {
        if (shard.ids[place] < 0) continue;
        CHECK_INPUT(!std::isnan(shard.scores[place]), "a shard gave a score that is NaN for query ", query, ", row ",
                    shard.ids[place]);
        hits.push_back({shard.scores[place], shard.ids[place]});
      }
    }
    const auto count = std::min(static_cast<int64_t>(hits.size()), k);
    std::partial_sort(hits.begin(), hits.begin() + count, hits.end(), is_better);
    hits.resize(static_cast<size_t>(count));
    hits.resize(static_cast<size_t>(k), Hit{-std::numeric_limits<float>::infinity(), -1});
    for (int64_t rank = 0; rank < k; ++rank) {
      scores[query * k + rank] = hits[static_cast<size_t>(rank)].score;
      ids[query * k + rank] = hits[static_cast<size_t>(rank)].id;
    }
  }
}

}  // namespace searchr1
