#include "channel.h"

#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <system_error>

#if defined(__linux__) && !defined(SEARCHR1_USE_PIPE)  // the sanitizer runs build the pipe too
#include <sys/eventfd.h>
#else
#include <fcntl.h>
#endif

namespace searchr1 {

Channel::Channel() {
#if defined(__linux__) && !defined(SEARCHR1_USE_PIPE)
  read_end_ = write_end_ = eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC);
  if (read_end_ < 0) throw std::system_error(errno, std::generic_category(), "eventfd");
#else
  int ends[2];
  if (pipe(ends) != 0) throw std::system_error(errno, std::generic_category(), "pipe");
  for (int end : ends) {
    fcntl(end, F_SETFL, O_NONBLOCK);
    fcntl(end, F_SETFD, FD_CLOEXEC);
  }
  read_end_ = ends[0];
  write_end_ = ends[1];
#endif
}

Channel::~Channel() {
  close(read_end_);
  if (write_end_ != read_end_) close(write_end_);
}

void Channel::expect() {
  std::lock_guard lock(mutex_);
  const size_t needed = settled_.size() + num_expected_ + 1;
  if (needed > settled_.capacity()) settled_.reserve(std::max(needed, 2 * settled_.capacity()));
  ++num_expected_;
}

void Channel::expect_no_longer() {
  std::lock_guard lock(mutex_);
  --num_expected_;
}

size_t Channel::num_expected() {
  std::lock_guard lock(mutex_);
  return num_expected_;
}

void Channel::push(uint64_t ticket_id) noexcept {
  std::lock_guard lock(mutex_);
  settled_.push_back(ticket_id);
  --num_expected_;
  if (settled_.size() > 1) return;  // it is readable already
  const uint64_t one = 1;
  // At most one wake-up is pending at a time, so neither a counter nor a pipe can be full.
  while (write(write_end_, &one, sizeof one) < 0 && errno == EINTR) {
  }
}

std::vector<uint64_t> Channel::drain() {
  std::lock_guard lock(mutex_);
  std::vector<uint64_t> settled;
  settled.reserve(num_expected_);
  uint64_t count;
  while (read(read_end_, &count, sizeof count) < 0 && errno == EINTR) {
  }
  settled.swap(settled_);
  return settled;
}

}  // namespace searchr1
