#include "python_glue.h"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <string_view>
#include <utility>

#include "check.h"

namespace searchr1::python {
namespace {

constexpr std::chrono::milliseconds kSlice{100};

void check_signals() {
  if (PyErr_CheckSignals() != 0) throw py::error_already_set();
}

// Calls `wait(slice)` until it returns true, without the GIL except at first: to get the GIL back may take 5 ms.
template <typename Wait>
void wait_in_slices(const Wait& wait) {
  if (wait(Clock::duration::zero())) return;
  while (true) {
    {
      py::gil_scoped_release release;
      if (wait(kSlice)) return;
    }
    check_signals();
  }
}

std::string utf8(const py::handle& text) {
  if (!PyUnicode_Check(text.ptr())) throw py::type_error("a query must be a str");
  Py_ssize_t size = 0;
  const char* data = PyUnicode_AsUTF8AndSize(text.ptr(), &size);
  if (data == nullptr) throw py::error_already_set();
  return {data, static_cast<size_t>(size)};
}

py::str decoded(std::string_view text) {
  PyObject* object = PyUnicode_DecodeUTF8(text.data(), static_cast<Py_ssize_t>(text.size()), nullptr);
  if (object == nullptr) throw py::error_already_set();
  return py::reinterpret_steal<py::str>(object);
}

template <typename Number>
py::array_t<Number> matrix(const std::vector<Number>& numbers, int64_t rows, int64_t columns) {
  return py::array_t<Number>({rows, columns}, numbers.data());
}

template <typename Array>
void check_matrix(const Array& array, const char* name) {
  CHECK_INPUT(array.ndim() == 2, name, " must be [queries, k], not of ", array.ndim(), " dimensions");
}

py::dict summary(const Histogram& histogram, double unit) {
  py::dict result;
  result["count"] = histogram.count();
  result["mean"] = histogram.mean() * unit;
  result["p50"] = static_cast<double>(histogram.percentile(50)) * unit;
  result["p90"] = static_cast<double>(histogram.percentile(90)) * unit;
  result["p99"] = static_cast<double>(histogram.percentile(99)) * unit;
  result["max"] = static_cast<double>(histogram.largest()) * unit;
  return result;
}

}  // namespace

// ---- arguments --------------------------------------------------------------------------------------------------

Clock::time_point deadline_of(std::optional<double> timeout, Clock::time_point now) {
  if (!timeout) return Clock::time_point::max();
  CHECK_INPUT(!std::isnan(*timeout), "the timeout is NaN");
  if (*timeout <= 0.0) return Clock::time_point::min();
  const double largest = std::chrono::duration<double>(Clock::time_point::max() - now).count();
  if (*timeout >= largest) return Clock::time_point::max();
  return now + std::chrono::duration_cast<Clock::duration>(std::chrono::duration<double>(*timeout));
}

std::vector<std::string> texts_of(const py::sequence& queries) {
  if (PyUnicode_Check(queries.ptr())) throw py::type_error("queries must be a list of texts, not one text");
  const auto items = py::reinterpret_steal<py::object>(PySequence_Fast(queries.ptr(), "queries must be a list"));
  if (!items) throw py::error_already_set();
  const Py_ssize_t num_queries = PySequence_Fast_GET_SIZE(items.ptr());
  std::vector<std::string> texts;
  texts.reserve(static_cast<size_t>(num_queries));
  for (Py_ssize_t row = 0; row < num_queries; ++row) texts.push_back(utf8(PySequence_Fast_GET_ITEM(items.ptr(), row)));
  return texts;
}

// ---- batcher ----------------------------------------------------------------------------------------------------

std::shared_ptr<Batcher> make_batcher(int64_t max_batch_rows, int64_t max_batch_bytes, int64_t max_pending_bytes,
                                      int64_t max_cache_bytes, int32_t min_depth, int32_t max_batches_in_flight,
                                      std::string identity) {
  BatcherOptions options;
  options.max_batch_rows = max_batch_rows;
  options.max_batch_bytes = max_batch_bytes;
  options.max_pending_bytes = max_pending_bytes;
  options.max_cache_bytes = max_cache_bytes;
  options.min_depth = min_depth;
  options.max_batches_in_flight = max_batches_in_flight;
  options.identity = std::move(identity);
  return std::make_shared<Batcher>(std::move(options));
}

std::shared_ptr<Ticket> submit_queries(Batcher& batcher, const py::sequence& queries, int64_t k,
                                       std::optional<double> timeout) {
  const Clock::time_point now = Clock::now();
  auto ticket = batcher.submit(texts_of(queries), k, now, deadline_of(timeout, now));
  wait_in_slices([&](Clock::duration slice) { return ticket->wait_admitted(slice); });
  return ticket;
}

Outcome wait_for_ticket(const Ticket& ticket) {
  wait_in_slices([&](Clock::duration slice) { return ticket.wait_settled(slice); });
  return ticket.outcome();
}

py::tuple ticket_result(const Ticket& ticket) {
  return py::make_tuple(matrix(ticket.scores(), ticket.num_queries(), ticket.k()),
                        matrix(ticket.ids(), ticket.num_queries(), ticket.k()));
}

// ---- batches ----------------------------------------------------------------------------------------------------

std::shared_ptr<Batch> take_batch(Batcher& batcher) {
  std::shared_ptr<Batch> batch;
  wait_in_slices([&](Clock::duration slice) {
    batch = batcher.take(slice);
    return batch != nullptr || batcher.is_finished();
  });
  return batch;
}

py::list batch_queries(const Batch& batch) {
  py::list queries(batch.size());
  for (int64_t row = 0; row < batch.size(); ++row) queries[static_cast<size_t>(row)] = decoded(batch.query(row));
  return queries;
}

void complete_batch(Batch& batch, const Scores& scores, const Ids& ids) {
  check_matrix(scores, "scores");
  check_matrix(ids, "ids");
  const bool is_same = scores.shape(0) == ids.shape(0) && scores.shape(1) == ids.shape(1);
  CHECK_INPUT(is_same && scores.shape(0) == batch.size(), "the backend gave scores [", scores.shape(0), ", ",
              scores.shape(1), "] and ids [", ids.shape(0), ", ", ids.shape(1), "] for ", batch.size(), " queries");
  const float* score_data = scores.data();
  const int64_t* id_data = ids.data();
  const int64_t width = scores.shape(1);
  py::gil_scoped_release release;
  batch.complete(score_data, id_data, width);
}

py::dict batcher_statistics(Batcher& batcher, bool reset) {
  const Statistics statistics = batcher.statistics(reset);
  const Gauges gauges = batcher.gauges();
  py::dict result;
  result["num_searches"] = statistics.num_searches;
  result["num_queries"] = statistics.num_queries;
  result["num_unique"] = statistics.num_unique;
  result["num_coalesced"] = statistics.num_coalesced;
  result["num_cache_hits"] = statistics.num_cache_hits;
  result["num_batches"] = statistics.num_batches;
  result["num_failed"] = statistics.num_failed;
  result["num_expired"] = statistics.num_expired;
  result["num_cancelled"] = statistics.num_cancelled;
  result["num_blocked"] = statistics.num_blocked;
  result["batch_rows"] = summary(statistics.batch_rows, 1.0);
  result["batch_seconds"] = summary(statistics.batch_nanoseconds, 1e-9);
  result["latency_seconds"] = summary(statistics.latency_nanoseconds, 1e-9);
  result["queued"] = gauges.queued;
  result["blocked"] = gauges.blocked;
  result["pending_bytes"] = gauges.pending_bytes;
  result["batches_in_flight"] = gauges.batches_in_flight;
  result["cache_entries"] = gauges.cache_entries;
  result["cache_bytes"] = gauges.cache_bytes;
  result["cache_evicted"] = gauges.cache_evicted;
  return result;
}

// ---- records and merge ------------------------------------------------------------------------------------------

PassageStore open_passages(const std::string& contents, const std::string& contents_offsets,
                           const std::optional<std::string>& ids, const std::optional<std::string>& ids_offsets) {
  CHECK_INPUT(ids.has_value() == ids_offsets.has_value(), "give both files of the ids, or neither");
  std::optional<RecordFile> id_column;
  if (ids) id_column.emplace(*ids, *ids_offsets);
  return {RecordFile(contents, contents_offsets), std::move(id_column)};
}

py::list gather_passages(const PassageStore& store, const Ids& rows) {
  CHECK_INPUT(rows.ndim() == 1, "rows must be of one dimension, not ", rows.ndim());
  const int64_t* row_data = rows.data();
  PassageStore::Gathered gathered;
  {
    py::gil_scoped_release release;  // reading may wait for the disk
    gathered = store.gather(row_data, rows.size());
  }
  py::list passages(rows.size());
  for (size_t index = 0; index < gathered.contents.ends.size(); ++index) {
    const PassageText passage = parse_contents(gathered.contents[index]);
    const std::string id = gathered.ids ? std::string((*gathered.ids)[index]) : std::to_string(row_data[index]);
    passages[index] = py::make_tuple(decoded(id), decoded(passage.title), decoded(passage.text));
  }
  return passages;
}

py::tuple merge_shards(const std::vector<Scores>& scores, const std::vector<Ids>& ids, int64_t k) {
  CHECK_INPUT(!scores.empty() && scores.size() == ids.size(),
              "give as many arrays of ids as of scores, and at least one");
  CHECK_INPUT(k >= 1, "k must be at least 1, not ", k);
  std::vector<ShardHits> shards;
  for (size_t index = 0; index < scores.size(); ++index) {
    check_matrix(scores[index], "scores");
    check_matrix(ids[index], "ids");
    const Scores& own = scores[index];
    const bool is_same = own.shape(0) == ids[index].shape(0) && own.shape(1) == ids[index].shape(1);
    CHECK_INPUT(is_same && own.shape(0) == scores[0].shape(0), "shard ", index,
                " has scores and ids of different shapes, or another number of queries than shard 0");
    shards.push_back({scores[index].data(), ids[index].data(), scores[index].shape(1)});
  }
  const int64_t num_queries = scores[0].shape(0);
  Scores merged_scores({num_queries, k});
  Ids merged_ids({num_queries, k});
  float* score_data = merged_scores.mutable_data();
  int64_t* id_data = merged_ids.mutable_data();
  {
    py::gil_scoped_release release;
    merge_topk(shards, num_queries, k, score_data, id_data);
  }
  return py::make_tuple(merged_scores, merged_ids);
}

}  // namespace searchr1::python
