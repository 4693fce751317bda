#include "awaited.h"

#include <structmember.h>

#include <cstddef>
#include <optional>

#include "listener.h"

namespace searchr1::python {
namespace {

using State = AwaitedSearch::State;

AwaitedSearch* as_search(PyObject* object) { return reinterpret_cast<AwaitedSearch*>(object); }

PyObject* none() { return Py_NewRef(Py_None); }

// ---- a task and what it awaits ----------------------------------------------------------------------------------

// False if it was settled before. Takes ownership of `found` either way.
bool settle(AwaitedSearch* self, State state, PyObject* found) {
  if (self->state != State::pending) {
    Py_XDECREF(found);
    return false;
  }
  self->state = state;
  self->found = found;
  Py_CLEAR(self->owner);
  return true;
}

// Step the task that awaits it. False if that raised, with an exception that tasks do not keep.
bool wake_now(AwaitedSearch* self) {
  PyObject* wake = self->wake;
  PyObject* context = self->context;
  if (wake == nullptr) return true;
  self->wake = self->context = nullptr;
  PyObject* result = nullptr;
  if (PyContext_Enter(context) == 0) {
    result = PyObject_CallOneArg(wake, reinterpret_cast<PyObject*>(self));
    if (PyContext_Exit(context) != 0) Py_CLEAR(result);
  }
  Py_DECREF(wake);
  Py_DECREF(context);
  Py_XDECREF(result);
  return result != nullptr;
}

// Have the loop step the task in its next turn, as a future would.
bool wake_soon(AwaitedSearch* self) {
  if (self->wake == nullptr) return true;
  PyObject* call_soon = PyObject_GetAttrString(self->loop, "call_soon");
  PyObject* arguments = PyTuple_Pack(2, self->wake, reinterpret_cast<PyObject*>(self));
  PyObject* keywords = PyDict_New();
  PyObject* handle = nullptr;
  if (call_soon && arguments && keywords && PyDict_SetItemString(keywords, "context", self->context) == 0) {
    handle = PyObject_Call(call_soon, arguments, keywords);
  }
  Py_XDECREF(call_soon);
  Py_XDECREF(arguments);
  Py_XDECREF(keywords);
  Py_CLEAR(self->wake);
  Py_CLEAR(self->context);
  Py_XDECREF(handle);
  return handle != nullptr;
}

// Raise the search's exception; returns null.
PyObject* raise(AwaitedSearch* self) {
  PyObject* exceptions = PyImport_ImportModule("asyncio.exceptions");
  if (exceptions == nullptr) return nullptr;
  if (self->state == State::failed) {
    PyErr_SetObject(reinterpret_cast<PyObject*>(Py_TYPE(self->found)), self->found);
  } else {
    const char* name = self->state == State::cancelled ? "CancelledError" : "InvalidStateError";
    PyObject* type = PyObject_GetAttrString(exceptions, name);
    PyObject* error = nullptr;
    if (type && self->state == State::pending) error = PyObject_CallFunction(type, "s", "the search is not settled");
    else if (type) error = self->found ? PyObject_CallOneArg(type, self->found) : PyObject_CallNoArgs(type);
    if (error) PyErr_SetObject(type, error);
    Py_XDECREF(error);
    Py_XDECREF(type);
  }
  Py_DECREF(exceptions);
  return nullptr;
}

PySendResult send(PyObject* object, PyObject*, PyObject** result) {
  AwaitedSearch* self = as_search(object);
  if (self->state == State::done) {
    *result = Py_NewRef(self->found);
    return PYGEN_RETURN;
  }
  if (self->state == State::pending && self->wake == nullptr) {
    self->is_blocking = 1;
    *result = Py_NewRef(object);
    return PYGEN_NEXT;
  }
  *result = raise(self);  // pending, and a task waits for it: a second one awaits it, or the first was stepped too early
  return PYGEN_ERROR;
}

PyObject* next(PyObject* object) {  // used where a tracer or a debugger keeps `await` from calling `send`
  PyObject* result = nullptr;
  if (send(object, Py_None, &result) != PYGEN_RETURN) return result;
  PyObject* stop = PyObject_CallOneArg(PyExc_StopIteration, result);  // set as it is, a tuple would become arguments
  Py_DECREF(result);
  if (stop) PyErr_SetObject(PyExc_StopIteration, stop);
  Py_XDECREF(stop);
  return nullptr;
}

// ---- what tasks call --------------------------------------------------------------------------------------------

PyObject* get_loop(PyObject* self, PyObject*) { return Py_NewRef(as_search(self)->loop); }

PyObject* add_done_callback(PyObject* object, PyObject* const* arguments, Py_ssize_t num_arguments, PyObject* names) {
  AwaitedSearch* self = as_search(object);
  const Py_ssize_t num_names = names == nullptr ? 0 : PyTuple_GET_SIZE(names);
  const bool has_context = num_names == 1 && PyUnicode_CompareWithASCIIString(PyTuple_GET_ITEM(names, 0), "context") == 0;
  if (num_arguments != 1 || (num_names && !has_context)) {
    PyErr_SetString(PyExc_TypeError, "add_done_callback(callback, *, context)");
    return nullptr;
  }
  if (self->wake) {
    PyErr_SetString(PyExc_RuntimeError, "a search is awaited by one task only");
    return nullptr;
  }
  PyObject* context = has_context && arguments[1] != Py_None ? Py_NewRef(arguments[1]) : PyContext_CopyCurrent();
  if (context == nullptr) return nullptr;
  self->wake = Py_NewRef(arguments[0]);
  self->context = context;
  if (self->state != State::pending && !wake_soon(self)) return nullptr;
  return none();
}

PyObject* result_of(PyObject* object, PyObject*) {
  AwaitedSearch* self = as_search(object);
  return self->state == State::done ? Py_NewRef(self->found) : raise(self);
}

PyObject* cancel(PyObject* object, PyObject* arguments, PyObject* keywords) {
  static const char* names[] = {"msg", nullptr};
  AwaitedSearch* self = as_search(object);
  PyObject* text = Py_None;
  if (!PyArg_ParseTupleAndKeywords(arguments, keywords, "|O", const_cast<char**>(names), &text)) return nullptr;
  if (self->state != State::pending) return Py_NewRef(Py_False);
  Listener* listener = self->listener;
  PyObject* owner = Py_NewRef(self->owner);
  settle(self, State::cancelled, text == Py_None ? nullptr : Py_NewRef(text));
  listener->cancel(self->number);
  Py_DECREF(owner);
  return wake_soon(self) ? Py_NewRef(Py_True) : nullptr;
}

PyObject* is_done(PyObject* self, PyObject*) { return PyBool_FromLong(as_search(self)->state != State::pending); }

PyObject* is_cancelled(PyObject* self, PyObject*) { return PyBool_FromLong(as_search(self)->state == State::cancelled); }

PyObject* set_exception(PyObject* self, PyObject* error) {
  if (!PyExceptionInstance_Check(error)) {
    PyErr_SetString(PyExc_TypeError, "set_exception wants an exception");
    return nullptr;
  }
  if (settle(as_search(self), State::failed, Py_NewRef(error)) && !wake_soon(as_search(self))) return nullptr;
  return none();
}

// ---- the type ---------------------------------------------------------------------------------------------------

int traverse(PyObject* object, visitproc visit, void* arg) {
  AwaitedSearch* self = as_search(object);
  Py_VISIT(Py_TYPE(object));
  Py_VISIT(self->loop);
  Py_VISIT(self->owner);
  Py_VISIT(self->wake);
  Py_VISIT(self->context);
  Py_VISIT(self->found);
  return 0;
}

int clear(PyObject* object) {
  AwaitedSearch* self = as_search(object);
  Py_CLEAR(self->owner);
  Py_CLEAR(self->wake);
  Py_CLEAR(self->context);
  Py_CLEAR(self->found);
  if (self->state == State::pending || self->state == State::failed) self->state = State::cancelled;
  if (self->state == State::done) self->found = none();
  return 0;
}

void deallocate(PyObject* object) {
  PyTypeObject* type = Py_TYPE(object);
  PyObject_GC_UnTrack(object);
  AwaitedSearch* self = as_search(object);
  Py_XDECREF(self->loop);
  Py_XDECREF(self->owner);
  Py_XDECREF(self->wake);
  Py_XDECREF(self->context);
  Py_XDECREF(self->found);
  PyObject_GC_Del(object);
  Py_DECREF(type);
}

template <typename Function>
PyCFunction as_function(Function function) {
  return reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(function));
}

PyMethodDef methods[] = {
    {"get_loop", get_loop, METH_NOARGS, nullptr},
    {"add_done_callback", as_function(add_done_callback), METH_FASTCALL | METH_KEYWORDS, nullptr},
    {"result", result_of, METH_NOARGS, nullptr},
    {"cancel", as_function(cancel), METH_VARARGS | METH_KEYWORDS, nullptr},
    {"done", is_done, METH_NOARGS, nullptr},
    {"cancelled", is_cancelled, METH_NOARGS, nullptr},
    {"set_exception", set_exception, METH_O, nullptr},
    {nullptr, nullptr, 0, nullptr},
};

PyMemberDef members[] = {
    {"_asyncio_future_blocking", T_BOOL, offsetof(AwaitedSearch, is_blocking), 0, nullptr},
    {nullptr, 0, 0, 0, nullptr},
};

template <typename Function>
void* as_slot(Function function) {
  return reinterpret_cast<void*>(function);
}

PyTypeObject* make_type() {
  PyType_Slot slots[] = {
      {Py_tp_doc, const_cast<char*>("A search that a coroutine awaits.")},
      {Py_tp_dealloc, as_slot(deallocate)},
      {Py_tp_traverse, as_slot(traverse)},
      {Py_tp_clear, as_slot(clear)},
      {Py_tp_methods, methods},
      {Py_tp_members, members},
      {Py_tp_iter, as_slot(PyObject_SelfIter)},
      {Py_tp_iternext, as_slot(next)},
      {Py_am_await, as_slot(PyObject_SelfIter)},
      {Py_am_send, as_slot(send)},
      {0, nullptr},
  };
  PyType_Spec spec{"searchr1_fast._C.AwaitedSearch", sizeof(AwaitedSearch), 0,
                   Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC | Py_TPFLAGS_DISALLOW_INSTANTIATION, slots};
  PyObject* type = PyType_FromSpec(&spec);
  if (type == nullptr) throw py::error_already_set();
  return reinterpret_cast<PyTypeObject*>(type);
}

// Rows begin to end of one sequence, or of each in a tuple: a new reference.
PyObject* part_of(PyObject* found, Py_ssize_t begin, Py_ssize_t end) {
  if (!PyTuple_CheckExact(found)) return PySequence_GetSlice(found, begin, end);
  const Py_ssize_t size = PyTuple_GET_SIZE(found);
  PyObject* parts = PyTuple_New(size);
  for (Py_ssize_t index = 0; parts != nullptr && index < size; ++index) {
    PyObject* part = PySequence_GetSlice(PyTuple_GET_ITEM(found, index), begin, end);
    if (part == nullptr) {
      Py_CLEAR(parts);
    } else {
      PyTuple_SET_ITEM(parts, index, part);
    }
  }
  return parts;
}

PyObject* deliver(PyObject*, PyObject* const* arguments, Py_ssize_t num_arguments) {
  const bool is_whole = num_arguments == 3 && PyList_CheckExact(arguments[0]) && PyList_CheckExact(arguments[1]) &&
                        PyList_GET_SIZE(arguments[0]) == PyList_GET_SIZE(arguments[1]);
  if (!is_whole) {
    PyErr_SetString(PyExc_TypeError, "deliver(searches, ends, found): lists of one length, and what was found");
    return nullptr;
  }
  PyObject* searches = arguments[0];
  std::optional<py::error_already_set> raised;  // an exception that a task does not keep
  Py_ssize_t begin = 0;
  for (Py_ssize_t index = 0; index < PyList_GET_SIZE(searches); ++index) {
    const Py_ssize_t end = PyLong_AsSsize_t(PyList_GET_ITEM(arguments[1], index));
    PyObject* object = Py_NewRef(PyList_GET_ITEM(searches, index));
    AwaitedSearch* self = as_search(object);
    if (Py_TYPE(object) == awaited_search_type() && self->state == State::pending) {
      PyObject* part = part_of(arguments[2], begin, end);
      if (part != nullptr) {
        settle(self, State::done, part);
      } else {  // no memory, or an end that is no number
        const py::error_already_set error;
        settle(self, State::failed, Py_NewRef(error.value().ptr()));
      }
      if (!raised) {
        if (!wake_now(self)) raised.emplace();
      } else if (!wake_soon(self)) {
        PyErr_Clear();  // the loop is closed: there is nobody to tell
      }
    }
    Py_DECREF(object);
    begin = end;
  }
  if (!raised) return none();
  raised->restore();
  return nullptr;
}

}  // namespace

PyMethodDef deliver_method{"deliver", as_function(deliver), METH_FASTCALL, nullptr};

PyTypeObject* awaited_search_type() {
  static PyTypeObject* const type = make_type();
  return type;
}

PyObject* new_awaited_search(PyObject* loop, PyObject* owner, Listener* listener, uint64_t number) {
  PyObject* object = PyType_GenericAlloc(awaited_search_type(), 0);  // zeros: pending
  if (object == nullptr) return nullptr;
  AwaitedSearch* self = as_search(object);
  self->loop = Py_NewRef(loop);
  self->owner = Py_NewRef(owner);
  self->listener = listener;
  self->number = number;
  return object;
}

}  // namespace searchr1::python
