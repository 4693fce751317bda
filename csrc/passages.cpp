#include "passages.h"

#include <utility>

#include "check.h"

namespace searchr1 {

PassageText parse_contents(std::string_view contents) {
  const size_t newline = contents.find('\n');
  std::string_view title = contents.substr(0, newline);
  const std::string_view text = newline == contents.npos ? std::string_view() : contents.substr(newline + 1);
  if (title.size() >= 2 && title.front() == '"' && title.back() == '"') {
    title = title.substr(1, title.size() - 2);  // one pair only: a song's title has quotes of its own
  }
  return {title, text};
}

PassageStore::PassageStore(RecordFile contents, std::optional<RecordFile> ids)
    : contents_(std::move(contents)), ids_(std::move(ids)) {
  CHECK_INPUT(!ids_ || ids_->size() == contents_.size(), ids_->path(), " has ", ids_->size(), " ids, but ",
              contents_.path(), " has ", contents_.size(), " passages; one of them belongs to another index");
}

PassageStore::Gathered PassageStore::gather(const int64_t* rows, int64_t num_rows) const {
  Gathered gathered;
  gathered.contents = contents_.gather(rows, num_rows);
  if (ids_) gathered.ids = ids_->gather(rows, num_rows);
  return gathered;
}

}  // namespace searchr1
