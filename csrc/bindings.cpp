// searchr1_fast._C, a table of contents: what Python sees, and how it is called (python_glue.h).
#include <pybind11/native_enum.h>

#include "batcher.h"
#include "awaited.h"
#include "check.h"
#include "listener.h"
#include "python_glue.h"

PYBIND11_MODULE(_C, m) {
  using namespace searchr1;
  using namespace searchr1::python;
  using namespace py::literals;
  m.doc() = "The C++ part of searchr1_fast: the search batcher, files of records, the merge of shards.";
  py::register_exception<UsedAfterFork>(m, "UsedAfterFork", PyExc_RuntimeError);

  py::native_enum<Outcome>(m, "Outcome", "enum.Enum")
      .value("PENDING", Outcome::pending)
      .value("DONE", Outcome::done)
      .value("FAILED", Outcome::failed)
      .value("EXPIRED", Outcome::expired)
      .value("CANCELLED", Outcome::cancelled)
      .finalize();

  py::class_<Ticket, std::shared_ptr<Ticket>>(m, "Ticket")
      .def_property_readonly("id", &Ticket::id)
      .def_property_readonly("k", &Ticket::k)
      .def_property_readonly("outcome", &Ticket::outcome)
      .def_property_readonly("is_pending", [](const Ticket& ticket) { return ticket.outcome() == Outcome::pending; })
      .def_property_readonly("is_done", [](const Ticket& ticket) { return ticket.outcome() == Outcome::done; })
      .def_property_readonly("error", &Ticket::error)
      .def("__len__", &Ticket::num_queries)
      .def("wait", &wait_for_ticket)
      .def("cancel", &Ticket::cancel)
      .def("result", &ticket_result);

  py::class_<Batch, std::shared_ptr<Batch>>(m, "Batch")
      .def_property_readonly("depth", &Batch::depth)
      .def_property_readonly("queries", &batch_queries)
      .def("__len__", &Batch::size)
      .def("complete", &complete_batch, "scores"_a.noconvert(), "ids"_a.noconvert());

  py::class_<Batcher, std::shared_ptr<Batcher>>(m, "Batcher")
      .def(py::init(&make_batcher), py::kw_only(), "max_batch_rows"_a, "max_batch_bytes"_a, "max_pending_bytes"_a,
           "max_cache_bytes"_a, "min_depth"_a, "max_batches_in_flight"_a, "identity"_a)
      .def("submit", &submit_queries, "queries"_a, "k"_a, "timeout"_a = py::none())
      .def("take", &take_batch)
      .def("fail", &Batcher::fail, "error"_a, py::call_guard<py::gil_scoped_release>())
      .def("close", &Batcher::close, py::call_guard<py::gil_scoped_release>())
      .def("statistics", &batcher_statistics, "reset"_a = false)
      .def("save_cache", &Batcher::save_cache, "path"_a, py::call_guard<py::gil_scoped_release>())
      .def("load_cache", &Batcher::load_cache, "path"_a, py::call_guard<py::gil_scoped_release>());

  py::class_<Listener>(m, "Listener", py::custom_type_setup(set_up_listener_type))
      .def(py::init<std::shared_ptr<Batcher>>(), "batcher"_a)
      .def("fileno", &Listener::descriptor)
      .def("search", &Listener::search, "loop"_a, "queries"_a, "k"_a, "timeout"_a = py::none())
      .def("drain", &Listener::drain);

  m.add_object("AwaitedSearch", reinterpret_cast<PyObject*>(awaited_search_type()));
  m.add_object("deliver", PyCFunction_New(&deliver_method, nullptr));

  py::class_<PassageStore>(m, "PassageStore")
      .def(py::init(&open_passages), "contents"_a, "contents_offsets"_a, "ids"_a = py::none(),
           "ids_offsets"_a = py::none())
      .def("__len__", &PassageStore::size)
      .def("gather", &gather_passages, "rows"_a);

  m.def("merge_topk", &merge_shards, "scores"_a, "ids"_a, "k"_a);
}
