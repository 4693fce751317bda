// How an event loop learns that tickets settled: one file descriptor that becomes readable, and a list to drain.
//
// The descriptor is an eventfd on Linux and a pipe elsewhere. It is written only when the list stops being empty, so a
// batch that settles a thousand tickets costs one system call and wakes the loop once.
#pragma once

#include <cstdint>
#include <mutex>
#include <vector>

namespace searchr1 {

class Channel {
 public:
  Channel();
  ~Channel();
  Channel(const Channel&) = delete;
  Channel& operator=(const Channel&) = delete;

  // Readable while `drain` would return something. Owned by the channel: watch it, do not close it.
  int descriptor() const { return read_end_; }

  // Called by the batcher, from any thread. A ticket is expected before it is submitted, and then either pushed once or
  // no longer expected. Room for it is made in the submitting thread, where that may fail, so that `push` cannot.
  void expect();
  void expect_no_longer();
  void push(uint64_t ticket_id) noexcept;

  // Tickets in flight, for which `push` has room. For tests.
  size_t num_expected();

  // The tickets that settled since the last call, in the order in which they settled.
  std::vector<uint64_t> drain();

 private:
  std::mutex mutex_;
  std::vector<uint64_t> settled_;  // has room for all that are expected
  size_t num_expected_ = 0;        // submitted, and not in settled_ yet
  int read_end_ = -1;
  int write_end_ = -1;  // equals read_end_ for an eventfd
};

}  // namespace searchr1
