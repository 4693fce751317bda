// As much of CUDA as csrc/*.cu uses, on a CPU: a block is as many threads, its barrier is a barrier, its shared memory is
// memory. Blocks run one after the other. So a kernel's own source runs where there is no GPU, and under ThreadSanitizer
// a barrier that is missing is a data race that is reported.
#pragma once

#include <condition_variable>
#include <cstring>
#include <mutex>
#include <thread>
#include <vector>

struct Index {
  unsigned x = 0;
};

inline thread_local Index threadIdx;
inline thread_local Index blockIdx;
inline thread_local Index blockDim;

class Barrier {
 public:
  explicit Barrier(unsigned count) : count_(count) {}
  void arrive_and_wait() {
    std::unique_lock lock(mutex_);
    const unsigned turn = turn_;
    if (++arrived_ == count_) {
      arrived_ = 0;
      ++turn_;
      wake_.notify_all();
    } else {
      wake_.wait(lock, [&] { return turn_ != turn; });
    }
  }

 private:
  std::mutex mutex_;
  std::condition_variable wake_;
  unsigned count_;
  unsigned arrived_ = 0;
  unsigned turn_ = 0;
};

inline Barrier* barrier = nullptr;
alignas(16) inline unsigned char shared[48 * 1024];

#define __global__
#define __device__
#define __shared__
#define __align__(bytes) __attribute__((aligned(bytes)))
#define __launch_bounds__(threads)
inline void __syncthreads() { barrier->arrive_and_wait(); }
inline float __int_as_float(int bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

template <typename Kernel, typename... Arguments>
void launch(unsigned num_blocks, unsigned num_threads, const Kernel& kernel, const Arguments&... arguments) {
  for (unsigned block = 0; block < num_blocks; ++block) {
    std::memset(shared, 0xA5, sizeof shared);  // what a block finds there is nothing that it may rely on
    Barrier own(num_threads);
    barrier = &own;
    std::vector<std::thread> threads;
    for (unsigned thread = 0; thread < num_threads; ++thread) {
      threads.emplace_back([&, thread] {
        threadIdx.x = thread;
        blockIdx.x = block;
        blockDim.x = num_threads;
        kernel(arguments...);
      });
    }
    for (std::thread& thread : threads) thread.join();
  }
}
