// One search as a coroutine awaits it: what asyncio's tasks take for a future, at a part of a future's cost.
//
// A future schedules whoever awaits it (a handle, a turn of the loop's queue, its bytecode), and a dictionary must lead
// from the search to it. This object is what the listener keeps for a search, and when the search is settled the task
// that awaits it is stepped there and then: the loop's reader calls it, so no other task is at work. As with a future,
// whatever settled together runs in one turn of the loop, in the order in which it settled.
//
// It is Python's own C API, where the rest of the bindings is pybind11: seven calls of it are made for each search, and
// a call through pybind11 takes longer than what any of them does. All of it holds the GIL.
#pragma once

#include <Python.h>

#include <cstdint>

namespace searchr1::python {

class Listener;

struct AwaitedSearch {
  enum State : char { pending, done, failed, cancelled };

  PyObject_HEAD
  PyObject* loop;      // that the coroutine runs on
  PyObject* owner;     // the Python object of `listener`; null once it is settled
  Listener* listener;  // who cancels it
  uint64_t number;     // what the listener knows it by
  PyObject* wake;      // of the task that awaits it, and the context to call it in; null before and after
  PyObject* context;
  PyObject* found;     // once it is done: what it found; once it failed: the exception; cancelled: the message, or null
  State state;
  char is_blocking;    // _asyncio_future_blocking: it is a future that `await` gave out, not `yield`
};

// The type, made once; a borrowed reference. Throws pybind11's error_already_set.
PyTypeObject* awaited_search_type();

// A new reference to one that is pending, or null with an exception.
PyObject* new_awaited_search(PyObject* loop, PyObject* owner, Listener* listener, uint64_t number);

// deliver(searches, ends, found): each search that is still pending is done, with rows ends[i-1] to ends[i] of `found`,
// or of each part of it where it is a tuple; and its task goes on. Where one of these ends with an exception that tasks
// do not keep (KeyboardInterrupt, SystemExit), the others go on in the loop's next turn, and it is raised.
extern PyMethodDef deliver_method;

}  // namespace searchr1::python
