// Errors that a caller can act on: which op, which argument, what was expected, what came, what to
// do. The stable ABI can only carry a RuntimeError, so the class that Python should raise travels
// as a tag at the end of the message; torchext/_dispatch/errors.py takes it off again.
#pragma once

#include <sstream>
#include <stdexcept>

namespace torchext {

template <class... Parts>
[[noreturn]] void fail(const char* python_class, const Parts&... parts) {
  std::ostringstream message;
  (message << ... << parts);
  if (python_class[0] != '\0') message << " [" << python_class << "]";
  throw std::runtime_error(message.str());
}

}  // namespace torchext

#define TORCHEXT_CHECK_VALUE(condition, ...)                       \
  do {                                                             \
    if (!(condition)) ::torchext::fail("ValueError", __VA_ARGS__); \
  } while (0)

#define TORCHEXT_CHECK_TYPE(condition, ...)                       \
  do {                                                            \
    if (!(condition)) ::torchext::fail("TypeError", __VA_ARGS__); \
  } while (0)

#define TORCHEXT_CHECK(condition, ...)                   \
  do {                                                   \
    if (!(condition)) ::torchext::fail("", __VA_ARGS__); \
  } while (0)
