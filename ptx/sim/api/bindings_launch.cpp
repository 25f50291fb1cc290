// Python bindings of modules, launches and simulated ops.
#include <pybind11/functional.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <map>
#include <memory>
#include <string>
#include <tuple>
#include <vector>

#include "../check/rendering.h"
#include "../frontend/decode.h"
#include "../frontend/demangle.h"
#include "../frontend/ir.h"
#include "../frontend/source_map.h"
#include "../frontend/targets.h"
#include "../machine/launch.h"
#include "bindings.h"
#include "bindings_timing.h"
#include "op_simulator.h"

namespace py = pybind11;

namespace torchext::sim {
namespace {

struct PythonModule {
  std::vector<SourceText> texts;
  std::shared_ptr<Module> module;
};

Dim3 dim3_of(const std::array<std::uint32_t, 3>& d) {
  return Dim3{d[0], d[1], d[2]};
}

// torchext/sim/options.py has checked the names.
LaunchOptions options_of(const py::dict& d) {
  LaunchOptions options;
  options.seed = d["seed"].cast<std::uint64_t>();
  const auto completion = d["completion"].cast<std::string>();
  options.completion = completion == "eager"  ? LaunchOptions::Eager
                       : completion == "late" ? LaunchOptions::Late
                                              : LaunchOptions::Random;
  options.lane_order = d["lane_order"].cast<std::string>() == "strict" ? LaunchOptions::strict
                                                                       : LaunchOptions::converged;
  options.checks = d["checks"].cast<bool>();
  options.num_threads = d["num_threads"].cast<unsigned>();
  options.num_sms = d["num_sms"].cast<std::uint32_t>();
  options.non_portable_cluster =
      d.contains("non_portable_cluster") && d["non_portable_cluster"].cast<bool>();
  options.max_instructions = d["max_instructions"].cast<std::uint64_t>();
  return options;
}

// What the options ask of the clock: nothing, if they name no GPU.
timing::Request request_of(const py::dict& d) {
  timing::Request request;
  request.gpu = d["timing"].cast<std::string>();
  request.only = d["timing_only"].cast<bool>();
  return request;
}

py::tuple frames_of(const SourceMap& map, std::uint32_t ptx_line) {
  py::list frames;
  for (const SourceFrame& frame : map.frames(ptx_line)) {
    frames.append(py::make_tuple(frame.file, frame.line));
  }
  return py::tuple(frames);
}

using Maps = std::vector<std::shared_ptr<const SourceMap>>;  // of the grids of a group

py::object device_of(int device) {
  return device < 0 ? py::object(py::none()) : py::int_(device);
}

py::dict to_python(const Finding& f, const SourceMap& map, const SourceMap& other_map) {
  py::list lanes;
  for (int lane = 0; lane < 32; ++lane) {
    if (f.lanes >> lane & 1) lanes.append(lane);
  }
  py::dict d;
  std::string module;
  std::uint32_t line = 0;
  d["kind"] = row_of(f.kind).name;
  d["grade"] = name_of(f.grade());
  d["message"] = f.message;
  d["kernel"] = f.kernel;
  std::tie(module, line) = map.place(f.ptx_line);
  d["module"] = module;
  d["ptx_line"] = line;
  d["opcode"] = f.opcode;
  d["source"] = frames_of(map, f.ptx_line);
  d["device"] = device_of(f.device);
  d["cta"] = py::make_tuple(f.cta[0], f.cta[1], f.cta[2]);
  d["warp"] = f.warp;
  d["lanes"] = py::tuple(lanes);
  d["address"] = f.address;
  d["other"] = f.other.what;
  std::tie(module, line) = other_map.place(f.other.ptx_line);
  d["other_module"] = f.other.ptx_line == 0 ? "" : module;
  d["other_ptx_line"] = line;
  d["other_source"] = frames_of(other_map, f.other.ptx_line);
  d["other_device"] = device_of(f.other.device);
  d["other_cta"] = py::none();
  if (f.other.cta)
    d["other_cta"] = py::make_tuple((*f.other.cta)[0], (*f.other.cta)[1], (*f.other.cta)[2]);
  d["other_warp"] = f.other.warp < 0 ? py::object(py::none()) : py::int_(f.other.warp);
  d["other_lane"] = f.other.lane < 0 ? py::object(py::none()) : py::int_(f.other.lane);
  d["remedy"] = f.remedy;
  d["seed"] = f.seed;
  return d;
}

py::dict to_python(const std::string& kernel, const Report& report, const std::string& text,
                   const Maps& maps, std::size_t gpu) {
  py::list findings, unwritten;
  for (const Finding& f : report.findings)
    findings.append(to_python(f, *maps[gpu], *maps[f.other.what.empty() ? gpu : f.other.gpu]));
  for (const auto& u : report.unwritten) {
    unwritten.append(py::make_tuple(u.buffer, u.bytes, u.first_offset));
  }
  py::dict d;
  d["kernel"] = kernel;
  d["findings"] = findings;
  d["findings_truncated"] = report.findings_truncated;
  d["instructions"] = report.instructions;
  d["warp_instructions"] = report.warp_instructions;
  d["seconds"] = report.seconds;
  d["output"] = report.output;
  d["unwritten"] = unwritten;
  d["text"] = text;
  d["timing"] = py::none();
  return d;
}

py::dict to_python(const std::string& kernel, const Report& report, const std::string& text,
                   const std::vector<SourceText>& ptx,
                   const std::shared_ptr<const timing::Prediction>& timing) {
  py::dict d = to_python(kernel, report, text, {map_of(report, ptx)}, 0);
  if (timing) d["timing"] = timing_to_python(*timing, SourceMap(ptx));
  return d;
}

py::list kernels(const PythonModule& self) {
  const auto triple = [](const std::uint32_t (&x)[3]) { return py::make_tuple(x[0], x[1], x[2]); };
  py::list list;
  for (const Kernel& kernel : self.module->kernels()) {
    py::list parameters;
    for (const Parameter& p : kernel.params) {
      parameters.append(py::make_tuple(p.name, p.size, p.align, p.type, p.is_array, p.is_pointer));
    }
    py::dict d;
    d["name"] = kernel.name;
    d["parameters"] = parameters;
    d["max_threads"] = triple(kernel.max_threads);
    d["required_threads"] = triple(kernel.required_threads);
    d["cluster"] = triple(kernel.cluster);
    d["line"] = kernel.line;
    list.append(d);
  }
  return list;
}

py::list variables(const PythonModule& self) {
  py::list list;
  for (const auto& entry : self.module->variables().entries) {
    const Variable& v = *entry->variable;
    if (v.name[0] == '{') continue;  // declared in a function's body, unknown outside it
    py::list shape;
    for (const std::uint64_t n : v.dimensions) shape.append(n);
    if (v.lanes > 1) shape.append(v.lanes);
    py::dict d;
    d["name"] = v.name;
    d["space"] = entry->constant ? "const" : "global";
    d["type"] = name_of(v.type);
    d["shape"] = py::tuple(shape);
    d["size"] = v.bytes;
    d["alignment"] = v.align;
    d["address"] = reinterpret_cast<std::uintptr_t>(entry->data);
    list.append(d);
  }
  return list;
}

// The opcode table, for the README and the tests.
py::list opcodes() {
  std::vector<const OpcodeTable::value_type*> rows;
  for (const auto& row : opcode_table()) rows.push_back(&row);
  std::sort(rows.begin(), rows.end(), [](auto* a, auto* b) { return a->first < b->first; });
  py::list list;
  for (const auto* row : rows) {
    py::list classes, units;
    for (const OpClass op_class : row->second.classes) {
      classes.append(name_of(op_class));
      if (const char* unit = name_of(unit_of(op_class)); !units.contains(unit)) units.append(unit);
    }
    py::dict d;
    d["opcode"] = row->first;
    d["file"] = row->second.file;
    d["classes"] = classes;
    d["units"] = units;
    d["target"] = least_target(row->first);
    list.append(d);
  }
  return list;
}

// The classes of instructions, in the order of traits.inc.
py::list op_classes() {
  py::list list;
  const auto add = [&](OpClass op_class, const char* text) {
    py::dict d;
    d["class"] = name_of(op_class);
    d["unit"] = name_of(unit_of(op_class));
    d["text"] = text;
    list.append(d);
  };
#define CLASS(name, unit, text) add(OpClass::name, text);
#include "../frontend/traits.inc"
#undef CLASS
  return list;
}

// The traits of a kernel's instructions, in the order of the program.
py::list traits(const PythonModule& self, const std::string& kernel) {
  const auto program = self.module->program(kernel);
  py::list list;
  for (const Instruction& i : program->code) {
    const Traits& t = i.traits;
    py::dict d;
    d["opcode"] = program->opcodes[i.opcode];
    d["class"] = name_of(t.op_class);
    d["unit"] = name_of(unit_of(t.op_class));
    d["flow"] = name_of(t.flow);
    d["wait"] = name_of(t.wait);
    d["times_out"] = t.times_out;
    d["completion"] = name_of(t.completion);
    d["aligned"] = i.aligned;
    d["reads"] = t.memory.reads ? py::object(py::str(name_of(t.memory.from))) : py::none();
    d["writes"] = t.memory.writes ? py::object(py::str(name_of(t.memory.to))) : py::none();
    d["proxy"] = name_of(t.memory.proxy);
    d["bytes"] = t.memory.bytes;
    list.append(d);
  }
  return list;
}

using PythonBuffer = std::tuple<std::uint64_t, std::uint64_t, std::string, std::string>;
using Triple = std::array<std::uint32_t, 3>;

LaunchOptions shaped(LaunchOptions options, const Triple& grid, const Triple& block,
                     const Triple& cluster, std::uint32_t smem) {
  options.grid = dim3_of(grid);
  options.block = dim3_of(block);
  options.cluster = dim3_of(cluster);
  options.dynamic_smem = smem;
  return options;
}

std::vector<ParamBytes> bytes_of(const std::vector<py::bytes>& params) {
  std::vector<ParamBytes> bytes;
  for (const std::string param : params) bytes.emplace_back(param.begin(), param.end());
  return bytes;
}

Buffer buffer_of(const PythonBuffer& buffer) {
  static const std::map<std::string, Buffer::Access> kAccess = {
      {"read", Buffer::Read}, {"write", Buffer::Write}, {"read_write", Buffer::ReadWrite}};
  const auto& [address, size, access, name] = buffer;
  return {reinterpret_cast<void*>(address), std::size_t(size), kAccess.at(access), name};
}

py::dict launch_module(const PythonModule& self, const std::string& kernel,
                       const std::array<std::uint32_t, 3>& grid,
                       const std::array<std::uint32_t, 3>& block,
                       const std::array<std::uint32_t, 3>& cluster, std::uint32_t smem,
                       const py::dict& shared_options, const std::vector<py::bytes>& params,
                       const std::vector<PythonBuffer>& buffers) {
  const LaunchOptions options = shaped(options_of(shared_options), grid, block, cluster, smem);
  const std::vector<ParamBytes> bytes = bytes_of(params);
  std::vector<Buffer> ranges;
  for (const PythonBuffer& buffer : buffers) ranges.push_back(buffer_of(buffer));
  Report report;
  std::string text;
  timing::Request request = request_of(shared_options);
  {
    const py::gil_scoped_release unlocked;
    const timing::Asking asking(request.gpu.empty() ? nullptr : &request);
    report = launch(*self.module, kernel, options, bytes, ranges);
    text = render(report, kernel, options, self.texts);
  }
  return to_python(kernel, report, text, self.texts, request.result);
}

// A launch of a group: module, kernel, grid, block, cluster, smem, non-portable cluster, params,
// device.
using PythonLaunch = std::tuple<const PythonModule*, std::string, Triple, Triple, Triple,
                                std::uint32_t, bool, std::vector<py::bytes>, int>;

py::list launch_modules(const std::vector<PythonLaunch>& launches, const py::dict& shared_options,
                        const std::vector<std::pair<PythonBuffer, int>>& buffers) {
  std::vector<GroupMember> members;
  for (const auto& [module, kernel, grid, block, cluster, smem, large, params, device] : launches) {
    LaunchOptions options = shaped(options_of(shared_options), grid, block, cluster, smem);
    options.non_portable_cluster = large;
    members.push_back({module->module.get(), kernel, options, bytes_of(params), device});
  }
  std::vector<Buffer> ranges;
  for (const auto& [buffer, device] : buffers) {
    ranges.push_back(buffer_of(buffer));
    ranges.back().device = device;
  }
  std::vector<Report> reports;
  std::vector<std::string> texts;
  Maps maps;
  {
    const py::gil_scoped_release unlocked;
    reports = launch_group(members, ranges);
    const bool any = std::any_of(reports.begin(), reports.end(),
                                 [](const Report& report) { return !report.findings.empty(); });
    for (const PythonLaunch& launch : launches)
      maps.push_back(std::make_shared<const SourceMap>(any ? std::get<0>(launch)->texts
                                                           : std::vector<SourceText>()));
    for (std::size_t gpu = 0; gpu < reports.size(); ++gpu)
      texts.push_back(render(reports[gpu], members[gpu].kernel, members[gpu].options, maps, gpu,
                             members[gpu].device));
  }
  py::list list;
  for (std::size_t gpu = 0; gpu < reports.size(); ++gpu)
    list.append(to_python(members[gpu].kernel, reports[gpu], texts[gpu], maps, gpu));
  return list;
}

}  // namespace

void bind_launch(py::module_& module) {
  py::register_exception<PtxError>(module, "PtxError", PyExc_ValueError);

  module.def("demangle", &demangled);
  module.def("short_name", &short_name);
  module.def("finding_kinds", [] {
    py::list rows;
    for (const KindRow& row : finding_kinds()) {
      rows.append(py::make_tuple(row.name, name_of(row.grade), row.remedy, row.example));
    }
    return rows;
  });

  module.def("opcodes", &opcodes);
  module.def("op_classes", &op_classes);

  py::class_<PythonModule>(module, "Module")
      .def(py::init([](const std::vector<std::pair<std::string, std::string>>& named_texts) {
             PythonModule m;
             for (const auto& [name, text] : named_texts) m.texts.push_back({name, text});
             m.module = Module::parse(m.texts);
             return m;
           }),
           py::arg("named_texts"))
      .def_property_readonly("target",
                             [](const PythonModule& self) { return self.module->target(); })
      .def("kernels", &kernels)
      .def("variables", &variables)
      .def("reset_variables", [](const PythonModule& self) { self.module->variables().reset(); })
      .def("decode", [](const PythonModule& self,
                        const std::string& kernel) { self.module->program(kernel); })
      .def("traits", &traits)
      .def("launch", &launch_module);
  module.def("launch_group", &launch_modules);

  py::class_<OpSimulator>(module, "OpSimulator")
      .def(py::init([](const std::vector<std::string>& files, const OpSimulator::ReadPtx& read_ptx,
                       const py::dict& options, int compute_capability) {
             return std::make_unique<OpSimulator>(files, read_ptx, options_of(options),
                                                  compute_capability, request_of(options));
           }),
           py::arg("ptx_files"), py::arg("read_ptx"), py::arg("options"),
           py::arg("compute_capability"))
      .def_property_readonly("interface",
                             [](const OpSimulator& self) {
                               return reinterpret_cast<std::uintptr_t>(self.interface());
                             })
      .def("launches", [](const OpSimulator& self) {
        py::list reports;
        for (const auto& launch : self.launches()) {
          reports.append(
              to_python(launch.kernel, launch.report, launch.text, *launch.ptx, launch.timing));
        }
        return reports;
      });
}

}  // namespace torchext::sim
