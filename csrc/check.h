// Errors of the C++ part, in one place: what a caller did wrong, and what went wrong at run time.
//
// The bindings turn InvalidInput into ValueError and every other exception here into RuntimeError. A search that fails,
// expires or is cancelled is no exception but an Outcome of its ticket: it belongs to whoever waits for it.
#pragma once

#include <sstream>
#include <stdexcept>
#include <string>

namespace searchr1 {

// The caller's mistake: what, where, what to do.
struct InvalidInput : std::invalid_argument {
  using std::invalid_argument::invalid_argument;
};

// The object was made before a fork and is used after it, where its threads do not exist.
struct UsedAfterFork : std::runtime_error {
  using std::runtime_error::runtime_error;
};

template <typename... Parts>
std::string message(const Parts&... parts) {
  std::ostringstream stream;
  (stream << ... << parts);
  return stream.str();
}

}  // namespace searchr1

// CHECK_INPUT(k > 0, "k must be at least 1, not ", k)
#define CHECK_INPUT(condition, ...)                                            \
  do {                                                                         \
    if (!(condition)) throw ::searchr1::InvalidInput(::searchr1::message(__VA_ARGS__)); \
  } while (false)
