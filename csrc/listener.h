// The searches of one event loop: one descriptor that wakes it, and what settled since it last looked.
#pragma once

#include <memory>
#include <optional>
#include <unordered_map>

#include "python_glue.h"

namespace searchr1::python {

// Nothing here blocks. A search costs Python one call and its share of a drain: tickets stay in C++, and the results of
// all that settled come as two arrays.
class Listener {
 public:
  explicit Listener(std::shared_ptr<Batcher> batcher) : batcher_(std::move(batcher)) {}
  ~Listener() { forget(); }

  int descriptor() const { return channel_->descriptor(); }

  // The ticket if it is settled already, else an AwaitedSearch. The listener holds that until `drain` hands it out: a
  // task that only its search refers to must not be collected.
  static py::object search(const py::object& self, const py::object& loop, const py::sequence& queries, int64_t k,
                           std::optional<double> timeout);
  void cancel(uint64_t number);

  // (found, others): found is a list of (searches, ends, scores [R, k], ids [R, k]), one for each k, where the rows of
  // searches[i] end at ends[i]; others is a list of (search, ticket) of those that have no result.
  py::tuple drain();

  // For the garbage collector, as there are cycles: tasks wait for searches, and coroutines hold what holds this.
  int visit(visitproc visit, void* arg) const;
  void forget();

 private:
  struct Pending {
    std::shared_ptr<Ticket> ticket;
    PyObject* search;  // owned
  };
  const std::shared_ptr<Batcher> batcher_;
  const std::shared_ptr<Channel> channel_ = std::make_shared<Channel>();
  std::unordered_map<uint64_t, Pending> pending_;  // by the ticket's number; guarded by the GIL
};

// Lets the garbage collector traverse a listener.
void set_up_listener_type(PyHeapTypeObject* type);

}  // namespace searchr1::python
