// torchext._sim: the PTX simulator's Python extension module. torchext.sim is its public face.
#include "bindings.h"

PYBIND11_MODULE(_sim, module) {
  module.doc() = "PTX simulator: kernels, tensor-core arithmetic, tensor maps (see torchext.sim)";
  torchext::sim::bind_numerics(module);
  torchext::sim::bind_launch(module);
  torchext::sim::bind_timing(module);
}
