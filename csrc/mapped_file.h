// A file mapped read-only, with an error instead of a crash if it has changed.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

namespace searchr1 {

class MappedFile {
 public:
  MappedFile() = default;
  explicit MappedFile(std::string path);
  ~MappedFile();
  MappedFile(MappedFile&& other) noexcept;
  MappedFile& operator=(MappedFile&& other) noexcept;

  const char* data() const { return data_; }
  size_t size() const { return size_; }
  const std::string& path() const { return path_; }

  // Throws if the file was cut short or written to while it was open: reading past its new end would kill the process
  // (SIGBUS), and other bytes would be other passages.
  void check_unchanged() const;

 private:
  std::string path_;
  int descriptor_ = -1;
  const char* data_ = nullptr;
  size_t size_ = 0;
  int64_t modified_at_ = 0;  // nanoseconds
};

}  // namespace searchr1
