// Itanium C++ ABI names, by the compiler's own demangler.
#include "demangle.h"

#include <cxxabi.h>

#include <cstdlib>
#include <memory>

namespace torchext::sim {

std::string demangled(const std::string& symbol) {
  if (symbol.rfind("_Z", 0) != 0) return symbol;
  int status = 0;
  const std::unique_ptr<char, void (*)(void*)> name(
      abi::__cxa_demangle(symbol.c_str(), nullptr, nullptr, &status), std::free);
  return status == 0 ? name.get() : symbol;
}

std::string short_name(const std::string& symbol) {
  const std::string name = demangled(symbol);
  static const std::string kAnonymous = "(anonymous namespace)";
  std::size_t begin = 0;  // after the result type, which templates have
  int depth = 0;
  for (std::size_t at = 0; at < name.size(); ++at) {
    if (name.compare(at, kAnonymous.size(), kAnonymous) == 0) {
      at += kAnonymous.size() - 1;
      continue;
    }
    const char c = name[at];
    if (depth == 0 && c == '(') return name.substr(begin, at - begin);
    if (depth == 0 && c == ' ') begin = at + 1;
    if (c == '<' || c == '(' || c == '[') ++depth;
    if (c == '>' || c == ')' || c == ']') --depth;
  }
  return name;
}

}  // namespace torchext::sim
