// Python values of the timing model, for the bindings of launches.
#pragma once

#include <pybind11/pybind11.h>

#include "../frontend/source_map.h"
#include "../timing/replay.h"

namespace torchext::sim {

pybind11::object timing_to_python(const timing::Prediction& prediction, const SourceMap& map);

}  // namespace torchext::sim
