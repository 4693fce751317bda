#include "mapped_file.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <utility>

#include "check.h"

namespace searchr1 {
namespace {

int64_t modified_at(const struct stat& status) {
#if defined(__APPLE__)
  const timespec& time = status.st_mtimespec;
#else
  const timespec& time = status.st_mtim;
#endif
  return static_cast<int64_t>(time.tv_sec) * 1'000'000'000 + time.tv_nsec;
}

}  // namespace

MappedFile::MappedFile(std::string path) : path_(std::move(path)) {
  descriptor_ = open(path_.c_str(), O_RDONLY | O_CLOEXEC);
  CHECK_INPUT(descriptor_ >= 0, "cannot open ", path_, ": ", std::strerror(errno));
  struct stat status;
  const bool is_regular = fstat(descriptor_, &status) == 0 && S_ISREG(status.st_mode);
  if (!is_regular) close(descriptor_);
  CHECK_INPUT(is_regular, path_, " is not a file");
  size_ = static_cast<size_t>(status.st_size);
  modified_at_ = modified_at(status);
  if (size_ == 0) return;  // there is nothing to map
  void* mapped = mmap(nullptr, size_, PROT_READ, MAP_SHARED, descriptor_, 0);
  if (mapped == MAP_FAILED) {
    const int reason = errno;
    close(descriptor_);
    throw std::runtime_error(message("cannot map ", path_, ": ", std::strerror(reason)));
  }
  data_ = static_cast<const char*>(mapped);
}

MappedFile::~MappedFile() {
  if (data_ != nullptr) munmap(const_cast<char*>(data_), size_);
  if (descriptor_ >= 0) close(descriptor_);
}

MappedFile::MappedFile(MappedFile&& other) noexcept { *this = std::move(other); }

MappedFile& MappedFile::operator=(MappedFile&& other) noexcept {
  std::swap(path_, other.path_);
  std::swap(descriptor_, other.descriptor_);
  std::swap(data_, other.data_);
  std::swap(size_, other.size_);
  std::swap(modified_at_, other.modified_at_);
  return *this;
}

void MappedFile::check_unchanged() const {
  struct stat status;
  const bool is_whole = fstat(descriptor_, &status) == 0 && static_cast<size_t>(status.st_size) >= size_;
  CHECK_INPUT(is_whole, path_, " was cut short while it was open; it had ", size_, " bytes");
  CHECK_INPUT(modified_at(status) == modified_at_, path_, " was written to while it was open");
}

}  // namespace searchr1
