// Names of C++ kernels as their authors wrote them.
#pragma once

#include <string>

namespace torchext::sim {

// "_Z5scaleILi128EEvPf" gives "void scale<128>(float*)". Other names are returned unchanged.
std::string demangled(const std::string& symbol);

// The same without result type and parameters: "scale<128>".
std::string short_name(const std::string& symbol);

}  // namespace torchext::sim
