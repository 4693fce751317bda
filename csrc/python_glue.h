// Glue between Python objects and the C++ of this folder: arguments, results, and when the GIL is held.
//
// A call that may block releases the GIL, and takes it ten times a second to see whether a signal (Ctrl-C) has arrived.
#pragma once

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "batcher.h"
#include "merge.h"
#include "passages.h"

namespace searchr1::python {

namespace py = pybind11;

using Scores = py::array_t<float, py::array::c_style>;   // [Q, k]
using Ids = py::array_t<int64_t, py::array::c_style>;    // [Q, k] or [R]

std::shared_ptr<Batcher> make_batcher(int64_t max_batch_rows, int64_t max_batch_bytes, int64_t max_pending_bytes,
                                      int64_t max_cache_bytes, int32_t min_depth, int32_t max_batches_in_flight,
                                      std::string identity);

std::vector<std::string> texts_of(const py::sequence& queries);

// Counted from `now`, not a time of Python's clock, which differs from this one if the machine has slept (macOS).
Clock::time_point deadline_of(std::optional<double> timeout, Clock::time_point now);

// Blocks until there is room. `timeout`: seconds from now.
std::shared_ptr<Ticket> submit_queries(Batcher& batcher, const py::sequence& queries, int64_t k,
                                       std::optional<double> timeout);
Outcome wait_for_ticket(const Ticket& ticket);
py::tuple ticket_result(const Ticket& ticket);  // scores [Q, k] fp32, ids [Q, k] int64

std::shared_ptr<Batch> take_batch(Batcher& batcher);  // None: there will be no more
py::list batch_queries(const Batch& batch);
void complete_batch(Batch& batch, const Scores& scores, const Ids& ids);
py::dict batcher_statistics(Batcher& batcher, bool reset);

PassageStore open_passages(const std::string& contents, const std::string& contents_offsets,
                           const std::optional<std::string>& ids, const std::optional<std::string>& ids_offsets);
py::list gather_passages(const PassageStore& store, const Ids& rows);  // [(id, title, text)]

py::tuple merge_shards(const std::vector<Scores>& scores, const std::vector<Ids>& ids, int64_t k);

}  // namespace searchr1::python
