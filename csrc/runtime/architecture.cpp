// Hands the table of GPUs to Python, as JSON.
#include "architecture.h"

#include <string>
#include <type_traits>

namespace torchext {
namespace {

const char* name_of(Path path) {
  for (const PathRow& row : kPaths)
    if (row.path == path) return row.name;
  return "";
}

template <class T>
std::string json(T value) {
  if constexpr (std::is_same_v<T, bool>) {
    return value ? "true" : "false";
  } else if constexpr (std::is_same_v<T, Path>) {
    return json(name_of(value));
  } else if constexpr (std::is_same_v<T, const char*>) {
    return '"' + std::string(value) + '"';  // no text in the table needs escapes
  } else {
    return std::to_string(value);
  }
}

template <class T>
void append(std::string& object, const char* name, T value) {
  if (object.back() != '{') object += ", ";
  object += json(name) + ": " + json(value);
}

std::string architectures() {
  std::string paths = "{", values = "{", rows = "[";
  for (const PathRow& row : kPaths) append(paths, row.name, int(row.path));
#define TORCHEXT_LIMIT(name, value) append(values, #name, limits::name);
#include "architectures.inc"
  for (const Architecture& a : kArchitectures) {
    rows += rows.back() == '[' ? "{" : ", {";
#define TORCHEXT_COLUMN(type, name) append(rows, #name, a.name);
#include "architectures.inc"
    rows += '}';
  }
  return "{\"paths\": " + paths + "}, \"limits\": " + values + "}, \"architectures\": " + rows +
         "]}";
}

}  // namespace
}  // namespace torchext

int32_t torchext_path_of_capability(int32_t capability) {
  using namespace torchext;
  return capability < kOldestCapability ? 0 : int32_t(path_of_capability(capability));
}

const char* torchext_architectures() {
  static const std::string text = torchext::architectures();
  return text.c_str();
}
