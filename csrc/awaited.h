// A search that a coroutine awaits. asyncio's tasks take it for a future, at a fraction of a future's cost.
//
// A future schedules the task that awaits it (a handle, a turn of the loop's queue, its bytecode), and a dictionary has
// to lead to it from the search. This object is itself what the listener keeps for a search, and when the search
// settles, the task that awaits it is stepped there and then: the loop's reader makes the call, so no other task is
// running. As with futures, searches that settled together run in one turn of the loop, in the order they settled.
//
// It uses Python's own C API, where the other bindings use pybind11: each search makes seven calls here, and a call
// through pybind11 takes longer than what any of them does. All of it holds the GIL.
#pragma once

#include <Python.h>

#include <cstdint>

namespace searchr1::python {

class Listener;

struct AwaitedSearch {
  enum State : char { pending, done, failed, cancelled };

  PyObject_HEAD
  PyObject* loop;      // the coroutine's
  PyObject* owner;     // the Python object of `listener`; null once settled
  Listener* listener;  // cancels it
  uint64_t number;     // its key in the listener
  PyObject* wake;      // callback of the task that awaits it, and the context to call it in; null before and after
  PyObject* context;
  PyObject* found;     // done: the result; failed: the exception; cancelled: the message, or null
  State state;
  char is_blocking;    // _asyncio_future_blocking: a future handed out by `await`, not by `yield`
};

// The type, made once; a borrowed reference. Throws pybind11's error_already_set.
PyTypeObject* awaited_search_type();

// A new reference to a pending search, or null with an exception.
PyObject* new_awaited_search(PyObject* loop, PyObject* owner, Listener* listener, uint64_t number);

// deliver(searches, ends, found) completes each search that is still pending with rows ends[i-1] to ends[i] of `found`,
// or of each of its parts if it is a tuple, and resumes its task. If a task ends with an exception that tasks do not
// keep (KeyboardInterrupt, SystemExit), the others resume in the loop's next turn, and the exception is raised.
extern PyMethodDef deliver_method;

}  // namespace searchr1::python
