// The parts of the Python extension module torchext._sim.
#pragma once

#include <pybind11/pybind11.h>

namespace torchext::sim {

void bind_numerics(pybind11::module_& module);
void bind_launch(pybind11::module_& module);
void bind_timing(pybind11::module_& module);

}  // namespace torchext::sim
