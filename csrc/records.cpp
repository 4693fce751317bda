#include "records.h"

#include <cstring>
#include <utility>

#include "check.h"

namespace searchr1 {
namespace {

uint64_t offset_at(const MappedFile& offsets, int64_t index) {
  uint64_t offset;
  std::memcpy(&offset, offsets.data() + static_cast<size_t>(index) * sizeof offset, sizeof offset);
  return offset;
}

}  // namespace

RecordFile::RecordFile(std::string data_path, std::string offsets_path)
    : data_(std::move(data_path)), offsets_(std::move(offsets_path)) {
  const bool is_whole = offsets_.size() >= sizeof(uint64_t) && offsets_.size() % sizeof(uint64_t) == 0;
  CHECK_INPUT(is_whole, offsets_.path(), " has ", offsets_.size(),
              " bytes; it must hold 8 for every record and 8 more");
  num_records_ = static_cast<int64_t>(offsets_.size() / sizeof(uint64_t)) - 1;
  const uint64_t num_bytes = offset_at(offsets_, num_records_);
  CHECK_INPUT(offset_at(offsets_, 0) == 0 && num_bytes == data_.size(), data_.path(), " has ", data_.size(),
              " bytes, but ", offsets_.path(), " ends at ", num_bytes,
              "; one of them is cut short or belongs to another index");
}

std::string_view RecordFile::record(int64_t row) const {
  CHECK_INPUT(row >= 0 && row < num_records_, "row ", row, " of ", data_.path(), ", which has ", num_records_,
              " records");
  const uint64_t begin = offset_at(offsets_, row);
  const uint64_t end = offset_at(offsets_, row + 1);
  CHECK_INPUT(begin <= end && end <= data_.size(), offsets_.path(), " is damaged: record ", row, " would be bytes ",
              begin, " to ", end, " of ", data_.size());
  return {data_.data() + begin, static_cast<size_t>(end - begin)};
}

std::string_view RecordFile::Gathered::operator[](size_t index) const {
  const auto begin = static_cast<size_t>(index == 0 ? 0 : ends[index - 1]);
  return std::string_view(bytes).substr(begin, static_cast<size_t>(ends[index]) - begin);
}

RecordFile::Gathered RecordFile::gather(const int64_t* rows, int64_t num_rows) const {
  data_.check_unchanged();
  offsets_.check_unchanged();
  Gathered gathered;
  gathered.ends.reserve(static_cast<size_t>(num_rows));
  for (int64_t index = 0; index < num_rows; ++index) {
    gathered.bytes += record(rows[index]);
    gathered.ends.push_back(static_cast<int64_t>(gathered.bytes.size()));
  }
  return gathered;
}

}  // namespace searchr1
