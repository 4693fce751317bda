// Records of varying length, end to end in one file, and where each begins in another. Both files are mapped, so a
// corpus of any size costs only the memory of the pages that are read.
//
//   data     num_bytes bytes
//   offsets  num_records + 1 little-endian uint64: 0 first, num_bytes last, never decreasing
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "mapped_file.h"

namespace searchr1 {

class RecordFile {
 public:
  RecordFile(std::string data_path, std::string offsets_path);

  int64_t size() const { return num_records_; }

  // Copies of the records of these rows, end to end; `ends[i]` is where record i ends.
  struct Gathered {
    std::string bytes;
    std::vector<int64_t> ends;
    std::string_view operator[](size_t index) const;
  };
  Gathered gather(const int64_t* rows, int64_t num_rows) const;

  const std::string& path() const { return data_.path(); }

 private:
  std::string_view record(int64_t row) const;

  MappedFile data_;
  MappedFile offsets_;
  int64_t num_records_;
};

}  // namespace searchr1
