// Special registers by name (PTX ISA "Special Registers").
#pragma once

#include <optional>
#include <string>

#include "ir.h"

namespace torchext::sim {

// The register of that name, such as "%tid.x"; nullopt if the simulator has none.
std::optional<Special> special_register(const std::string& name);

}  // namespace torchext::sim
