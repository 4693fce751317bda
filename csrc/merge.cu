// Merges the best hits of several parts into the best k on a GPU, in total order: score descending, then id ascending
// (merge.h's twin).
//
// The hits arrive over sockets in pinned host memory, and the result is wanted there. A kernel may read and write such
// memory in place, which a library's sort may not. So this is one launch instead of copies to the device, a sort by two
// keys, a gather and copies back, each of which costs more to start than the work it does.
//
// Every part is sorted already. So the place of a hit in the result is its place in its own part plus, for each other
// part, the number of better hits there, which a binary search finds. There is no sort, and threads meet only at two
// barriers. The result does not depend on which thread came first, because no two hits have the same place.
//
// Q queries, one block for each; S parts of W hits each, W by part; n hits of a query in all.

__device__ inline bool is_better(float score, long long id, float other_score, long long other_id) {
  return score != other_score ? score > other_score : id < other_id;
}

// hits      part p begins at p * stride: ids [Q, W_p] int64, then scores [Q, W_p] fp32. In order; ids differ, are >= 0.
// widths    [S] W of each part
// ids, scores  [Q, k]; where there are fewer hits, the rest is -1 and -inf
// shared    12 bytes for each of the n hits, 4 for each of k: `merge_shared_bytes` of hit_merge.py
extern "C" __global__ void __launch_bounds__(128)
merge_hits(const unsigned char* hits, long long stride, const int* widths, int num_parts, int num_queries, int k,
           long long* ids, float* scores) {
  extern __shared__ __align__(16) unsigned char shared[];
  int num_hits = 0;
  for (int part = 0; part < num_parts; ++part) num_hits += widths[part];
  long long* const own_ids = reinterpret_cast<long long*>(shared);
  float* const own_scores = reinterpret_cast<float*>(own_ids + num_hits);
  int* const order = reinterpret_cast<int*>(own_scores + num_hits);  // [k] which hit is the i-th best
  const long long query = blockIdx.x;

  // Read once, consecutively: host memory is far away, and a binary search in it would go there at every step.
  int begin = 0;
  for (int part = 0; part < num_parts; ++part) {
    const int width = widths[part];
    const long long* const part_ids = reinterpret_cast<const long long*>(hits + part * stride);
    const auto num_ids = static_cast<long long>(num_queries) * width;
    const float* const part_scores = reinterpret_cast<const float*>(part_ids + num_ids);
    for (int i = threadIdx.x; i < width; i += blockDim.x) {
      own_ids[begin + i] = part_ids[query * width + i];
      own_scores[begin + i] = part_scores[query * width + i];
    }
    begin += width;
  }
  for (int i = threadIdx.x; i < k; i += blockDim.x) order[i] = -1;
  __syncthreads();

  begin = 0;
  for (int part = 0; part < num_parts; ++part) {
    const int width = widths[part];
    for (int i = threadIdx.x; i < width && i < k; i += blockDim.x) {
      const float score = own_scores[begin + i];
      const long long id = own_ids[begin + i];
      int place = i;
      int other_begin = 0;
      for (int other = 0; other < num_parts && place < k; ++other) {
        int low = 0;
        int high = other == part ? 0 : widths[other];  // `place` counts its own part already
        while (low < high) {
          const int middle = (low + high) / 2;
          const int at = other_begin + middle;
          if (is_better(own_scores[at], own_ids[at], score, id)) low = middle + 1;
          else high = middle;
        }
        place += low;
        other_begin += widths[other];
      }
      if (place < k) order[place] = begin + i;
    }
    begin += width;
  }
  __syncthreads();

  for (int i = threadIdx.x; i < k; i += blockDim.x) {
    const int hit = order[i];
    ids[query * k + i] = hit < 0 ? -1 : own_ids[hit];
    scores[query * k + i] = hit < 0 ? -__int_as_float(0x7f800000) : own_scores[hit];
  }
}
