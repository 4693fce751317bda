// csrc/merge.cu on a CPU: a library for Python's test, and, with main(), a check of its own for sanitizers.
#include "cuda_on_cpu.h"

#include "merge.cu"

#include <algorithm>
#include <cstdio>
#include <random>

extern "C" void launch_merge(unsigned num_blocks, unsigned num_threads, const unsigned char* hits, long long stride,
                             const int* widths, int num_parts, int num_queries, int k, long long* ids, float* scores) {
  launch(num_blocks, num_threads, merge_hits, hits, stride, widths, num_parts, num_queries, k, ids, scores);
}

#ifdef WITH_MAIN
int main() {
  constexpr int kQueries = 2, kTop = 7, kStride = 256;
  const std::vector<int> widths = {5, 0, 7, 1};
  std::mt19937 random(0);
  for (int trial = 0; trial < 20; ++trial) {
    std::vector<unsigned char> hits(widths.size() * kStride);
    std::vector<std::vector<std::pair<float, long long>>> all(kQueries);
    for (size_t part = 0; part < widths.size(); ++part) {
      for (int query = 0; query < kQueries; ++query) {
        std::vector<std::pair<float, long long>> own;
        for (int i = 0; i < widths[part]; ++i) own.emplace_back(-static_cast<float>(random() % 4), 100 * part + i);
        std::sort(own.begin(), own.end());
        for (int i = 0; i < widths[part]; ++i) {
          const int at = query * widths[part] + i;
          const float score = -own[i].first;
          std::memcpy(&hits[part * kStride + 8 * at], &own[i].second, 8);
          std::memcpy(&hits[part * kStride + 8 * kQueries * widths[part] + 4 * at], &score, 4);
          all[query].push_back(own[i]);
        }
      }
    }
    std::vector<long long> ids(kQueries * kTop);
    std::vector<float> scores(kQueries * kTop);
    launch_merge(kQueries, 8, hits.data(), kStride, widths.data(), static_cast<int>(widths.size()), kQueries, kTop,
                 ids.data(), scores.data());
    for (int query = 0; query < kQueries; ++query) {
      std::sort(all[query].begin(), all[query].end());
      for (int i = 0; i < kTop; ++i) {
        if (ids[query * kTop + i] == all[query][i].second && scores[query * kTop + i] == -all[query][i].first) continue;
        std::printf("trial %d, query %d, place %d: id %lld\n", trial, query, i, ids[query * kTop + i]);
        return 1;
      }
    }
  }
  std::puts("merged");
}
#endif
