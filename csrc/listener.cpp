#include "listener.h"

#include <algorithm>
#include <map>
#include <vector>

#include "awaited.h"

namespace searchr1::python {
namespace {

struct Settled {
  std::shared_ptr<Ticket> ticket;
  PyObject* search;  // owned
};

// Results of one k, stacked: (searches, ends, scores [R, k], ids [R, k]). Takes ownership of the searches.
py::tuple stacked(const std::vector<Settled>& settled, int32_t k) {
  py::list searches(settled.size()), ends(settled.size());
  int64_t end = 0;
  for (size_t index = 0; index < settled.size(); ++index) {
    end += settled[index].ticket->num_queries();
    PyList_SET_ITEM(searches.ptr(), static_cast<Py_ssize_t>(index), settled[index].search);
    ends[index] = end;
  }
  py::array_t<float> scores({end, static_cast<int64_t>(k)});
  py::array_t<int64_t> ids({end, static_cast<int64_t>(k)});
  float* score = scores.mutable_data();
  int64_t* id = ids.mutable_data();
  for (const auto& [ticket, search] : settled) {
    score = std::copy(ticket->scores().begin(), ticket->scores().end(), score);
    id = std::copy(ticket->ids().begin(), ticket->ids().end(), id);
  }
  return py::make_tuple(searches, ends, scores, ids);
}

}  // namespace

py::object Listener::search(const py::object& self, const py::object& loop, const py::sequence& queries, int64_t k,
                            std::optional<double> timeout) {
  auto& listener = self.cast<Listener&>();
  // The GIL is kept: the batcher's mutex is held for microseconds.
  const Clock::time_point now = Clock::now();
  auto ticket = listener.batcher_->submit(texts_of(queries), k, now, deadline_of(timeout, now), listener.channel_);
  if (ticket->outcome() != Outcome::pending) return py::cast(std::move(ticket));
  const uint64_t number = ticket->id();
  PyObject* search = new_awaited_search(loop.ptr(), self.ptr(), &listener, number);
  if (search == nullptr) throw py::error_already_set();
  auto awaited = py::reinterpret_steal<py::object>(search);
  listener.pending_.emplace(number, Pending{std::move(ticket), search});
  awaited.inc_ref();
  return awaited;
}

void Listener::cancel(uint64_t number) {
  auto node = pending_.extract(number);
  if (!node.empty()) Py_DECREF(node.mapped().search);  // dropping the ticket cancels it
}

py::tuple Listener::drain() {
  std::map<int32_t, std::vector<Settled>> done;
  py::list found, others;
  for (uint64_t number : channel_->drain()) {
    auto node = pending_.extract(number);
    if (node.empty()) continue;  // cancelled here
    auto& [ticket, search] = node.mapped();
    if (ticket->outcome() == Outcome::done) {
      done[ticket->k()].push_back({std::move(ticket), search});
    } else {
      others.append(py::make_tuple(py::reinterpret_steal<py::object>(search), std::move(ticket)));
    }
  }
  for (const auto& [k, settled] : done) found.append(stacked(settled, k));
  return py::make_tuple(found, others);
}

int Listener::visit(visitproc visit, void* arg) const {
  for (const auto& [number, pending] : pending_) Py_VISIT(pending.search);
  return 0;
}

void Listener::forget() {
  auto pending = std::move(pending_);
  pending_.clear();
  for (auto& [number, one] : pending) Py_DECREF(one.search);
}

void set_up_listener_type(PyHeapTypeObject* heap_type) {
  PyTypeObject* type = &heap_type->ht_type;
  type->tp_flags |= Py_TPFLAGS_HAVE_GC;
  type->tp_traverse = [](PyObject* self, visitproc visit, void* arg) {
    Py_VISIT(Py_TYPE(self));
    if (!py::detail::is_holder_constructed(self)) return 0;
    return py::cast<Listener&>(py::handle(self)).visit(visit, arg);
  };
  type->tp_clear = [](PyObject* self) {
    if (py::detail::is_holder_constructed(self)) py::cast<Listener&>(py::handle(self)).forget();
    return 0;
  };
}

}  // namespace searchr1::python
