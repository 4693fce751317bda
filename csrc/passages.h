// The passages of an index folder: columns of text, mapped. Row i of the corpus is record i of each column.
#pragma once

#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "records.h"

namespace searchr1 {

// The `contents` of a passage: its title in double quotes, a newline, its text. Views into what was gathered.
struct PassageText {
  std::string_view title;
  std::string_view text;
};
PassageText parse_contents(std::string_view contents);

class PassageStore {
 public:
  // Without a column of ids, the id of a passage is the number of its row.
  PassageStore(RecordFile contents, std::optional<RecordFile> ids);

  int64_t size() const { return contents_.size(); }

  struct Gathered {
    RecordFile::Gathered contents;
    std::optional<RecordFile::Gathered> ids;
  };
  Gathered gather(const int64_t* rows, int64_t num_rows) const;

 private:
  RecordFile contents_;
  std::optional<RecordFile> ids_;
};

}  // namespace searchr1
