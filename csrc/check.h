// Errors of the C++ part, in one place: mistakes of the caller, and failures at run time.
//
// The bindings turn InvalidInput into ValueError and every other exception here into RuntimeError. A search that fails,
// expires or is cancelled throws nothing: that is an Outcome of its ticket, for the caller that waits for it.
#pragma once

#include <stdexcept>
#include <string>
#include <type_traits>

namespace searchr1 {

// The caller's mistake: what, where, what to do.
struct InvalidInput : std::invalid_argument {
  using std::invalid_argument::invalid_argument;
};

// The object was made before a fork and is used after it, where its threads do not exist.
struct UsedAfterFork : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// Joins strings and whole numbers. No part of the extension uses a stream: where another library in the process brings
// its own C++ library (seen with torch 2.11 for CUDA 13 and its neighbours, Python 3.12), writing to a
// std::ostringstream ended in a segmentation fault.
template <typename... Parts>
std::string message(const Parts&... parts) {
  const auto text = [](const auto& part) {
    if constexpr (std::is_integral_v<std::decay_t<decltype(part)>>) return std::to_string(part);
    else return std::string(part);
  };
  return (std::string() + ... + text(parts));
}

}  // namespace searchr1

// CHECK_INPUT(k > 0, "k must be at least 1, not ", k)
#define CHECK_INPUT(condition, ...)                                            \
  do {                                                                         \
    if (!(condition)) throw ::searchr1::InvalidInput(::searchr1::message(__VA_ARGS__)); \
  } while (false)
