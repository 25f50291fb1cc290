// Names of C++ kernels as their authors wrote them.
#pragma once

#include <string>

namespace torchext::sim {

// "void scale<128>(float*)" of "_Z5scaleILi128EEvPf"; other names unchanged.
std::string demangled(const std::string& symbol);

// Without result type and parameters: "scale<128>".
std::string short_name(const std::string& symbol);

}  // namespace torchext::sim
