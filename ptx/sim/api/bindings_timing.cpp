// Python bindings of the timing model: predictions, GPUs, constants.
#include "bindings_timing.h"

#include <pybind11/stl.h>

#include "bindings.h"

namespace py = pybind11;

namespace torchext::sim {

namespace {

py::tuple place(const SourceMap& map, std::uint32_t ptx_line) {
  py::list frames;
  for (const SourceFrame& frame : map.frames(ptx_line))
    frames.append(py::make_tuple(frame.file, frame.line));
  return py::make_tuple(map.place(ptx_line).second, py::tuple(frames));
}

}  // namespace

py::object timing_to_python(const timing::Prediction& p, const SourceMap& map) {
  py::list waits, remarks, intervals;
  for (const auto& w : p.waits)
    waits.append(py::make_tuple(w.role, w.reason, w.share, place(map, w.ptx_line)));
  for (const auto& r : p.remarks)
    remarks.append(py::make_tuple(r.kind, r.text, r.cycles, place(map, r.ptx_line)));
  for (const auto& i : p.intervals)
    intervals.append(py::make_tuple(i.track, i.name, i.begin, i.end));
  py::dict d;
  d["gpu"] = p.gpu;
  d["cycles"] = p.cycles;
  d["microseconds"] = p.microseconds;
  d["launch_microseconds"] = p.launch_microseconds;
  d["error"] = p.error;
  d["mhz"] = p.mhz;
  d["sms"] = p.sms;
  d["ctas_per_sm"] = p.ctas_per_sm;
  d["traced_ctas"] = p.traced_ctas;
  d["waves"] = p.waves;
  d["tail"] = p.tail;
  d["dram_bytes"] = p.dram_bytes;
  d["l2_bytes"] = p.l2_bytes;
  d["utilization"] = p.utilization;
  d["waits"] = waits;
  d["remarks"] = remarks;
  d["tracks"] = p.tracks;
  d["names"] = p.names;
  d["intervals"] = intervals;
  return d;
}

void bind_timing(py::module_& module) {
  module.def("timing_gpus", [] {
    py::list rows;
    for (const timing::Gpu& g : timing::gpus()) {
      py::dict d;
      d["name"] = g.name;
      d["capability"] = g.capability;
      d["sms"] = g.sms;
      d["gigabytes_per_second"] = g.gigabytes_per_second;
      d["l2_megabytes"] = g.l2_megabytes;
      d["fp8_mhz"] = g.fp8_mhz;
      d["tensor_mhz"] = g.tensor_mhz;
      d["other_mhz"] = g.other_mhz;
      d["source"] = g.source;
      rows.append(d);
    }
    return rows;
  });
  module.def("timing_constants", [] {
    py::list rows;
    for (const timing::ConstantRow& r : timing::constant_rows()) {
      rows.append(
          py::make_tuple(r.name, r.value, r.unit, r.fitted, std::string(1, r.grade), r.source));
    }
    return rows;
  });
}

}  // namespace torchext::sim
