// Merges the best hits of several shards in total order: score descending, then id ascending. The order leaves no ties,
// so the result does not depend on how the corpus was cut.
#pragma once

#include <cstdint>
#include <vector>

namespace searchr1 {

// What one shard found: [num_queries, width], in any order; id -1 fills rows that have fewer hits.
struct ShardHits {
  const float* scores;
  const int64_t* ids;
  int64_t width;
};

// scores, ids: [num_queries, k]; where all shards together have fewer hits, the rest is -inf and -1. Throws
// InvalidInput for a NaN, which has no place in an order.
void merge_topk(const std::vector<ShardHits>& shards, int64_t num_queries, int64_t k, float* scores, int64_t* ids);

}  // namespace searchr1
