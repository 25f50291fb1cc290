// Errors that a caller can act on. A message names the op and the argument, and says what was
// expected, what came and what to do. The stable ABI can only carry a RuntimeError, so a tag at the
// end of the message names the class that Python should raise; torchext/_dispatch/errors.py removes
// the tag.
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
