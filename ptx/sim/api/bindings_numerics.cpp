// Python bindings of number formats, tensor-core arithmetic and tensor maps: the part of
// torchext._sim that needs no kernel.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <map>
#include <string>
#include <vector>

#include "../numerics/number_formats.h"
#include "../numerics/tensor_core.h"
#include "../numerics/tensor_map.h"
#include "bindings.h"

namespace py = pybind11;

namespace torchext::sim {
namespace {

template <class Value>
Value lookup(const std::map<std::string, Value>& table, const char* what, const std::string& name) {
  const auto found = table.find(name);
  if (found != table.end()) return found->second;
  std::string known;
  for (const auto& entry : table) known += (known.empty() ? "" : ", ") + entry.first;
  throw py::value_error(std::string(what) + " must be one of " + known + " (got '" + name + "')");
}

NumberFormat format_named(const std::string& name) {
  static const std::map<std::string, NumberFormat> table = {
      {"f32", NumberFormat::f32},   {"tf32", NumberFormat::tf32}, {"f16", NumberFormat::f16},
      {"bf16", NumberFormat::bf16}, {"e4m3", NumberFormat::e4m3}, {"e5m2", NumberFormat::e5m2}};
  return lookup(table, "format", name);
}

CvtModifiers modifiers_named(const std::string& rounding, bool satfinite, bool relu) {
  static const std::map<std::string, Rounding> table = {{"rn", Rounding::nearest_even},
                                                        {"rz", Rounding::toward_zero},
                                                        {"rm", Rounding::downward},
                                                        {"rp", Rounding::upward},
                                                        {"rna", Rounding::nearest_away}};
  return CvtModifiers{lookup(table, "rounding", rounding), satfinite, relu};
}

py::array_t<std::uint32_t> encode(const std::string& format,
                                  const py::array_t<double, py::array::c_style>& values,
                                  const std::string& rounding, bool satfinite, bool relu) {
  using Encoder = std::uint32_t (*)(double, CvtModifiers);
  static const std::map<std::string, Encoder> encoders = {
      {"f32", encode_f32},
      {"tf32", encode_tf32},
      {"f16", [](double x, CvtModifiers m) { return std::uint32_t{encode_f16(x, m)}; }},
      {"bf16", [](double x, CvtModifiers m) { return std::uint32_t{encode_bf16(x, m)}; }},
      {"e4m3", [](double x, CvtModifiers m) { return std::uint32_t{encode_e4m3(x, m)}; }},
      {"e5m2", [](double x, CvtModifiers m) { return std::uint32_t{encode_e5m2(x, m)}; }},
      {"ue8m0", [](double x, CvtModifiers m) { return std::uint32_t{encode_ue8m0(x, m)}; }},
  };
  const Encoder encoder = lookup(encoders, "format", format);
  const CvtModifiers modifiers = modifiers_named(rounding, satfinite, relu);
  py::array_t<std::uint32_t> codes(values.size());
  for (py::ssize_t i = 0; i < values.size(); ++i) {
    codes.mutable_data()[i] = encoder(values.data()[i], modifiers);
  }
  return codes;
}

py::array_t<float> decode(const std::string& format,
                          const py::array_t<std::uint32_t, py::array::c_style>& codes) {
  using Decoder = float (*)(std::uint32_t);
  static const std::map<std::string, Decoder> decoders = {
      {"f32", float_from_bits},
      {"tf32", float_from_bits},
      {"f16", [](std::uint32_t code) { return f16_to_float(std::uint16_t(code)); }},
      {"bf16", [](std::uint32_t code) { return bf16_to_float(std::uint16_t(code)); }},
      {"e4m3", [](std::uint32_t code) { return e4m3_to_float(std::uint8_t(code)); }},
      {"e5m2", [](std::uint32_t code) { return e5m2_to_float(std::uint8_t(code)); }},
      {"ue8m0", [](std::uint32_t code) { return ue8m0_to_float(std::uint8_t(code)); }},
  };
  const Decoder decoder = lookup(decoders, "format", format);
  py::array_t<float> values(codes.size());
  for (py::ssize_t i = 0; i < codes.size(); ++i) {
    values.mutable_data()[i] = decoder(codes.data()[i]);
  }
  return values;
}

using Bytes = py::array_t<std::uint8_t, py::array::c_style>;

// D = A * B^T + C as a chain of instructions, each of which takes k_per_instruction elements of k.
py::array_t<float> mma(const std::string& instruction, int target, const std::string& accumulator,
                       const Bytes& a, const std::string& a_format, const Bytes& b,
                       const std::string& b_format, const py::array_t<float, py::array::c_style>& c,
                       int k_per_instruction, bool one_by_one) {
  const NumberFormat fa = format_named(a_format), fb = format_named(b_format);
  const MmaModel model = instruction == "wgmma"
                             ? wgmma_model(fa, format_named(accumulator))
                             : mma_sync_model(target, fa, format_named(accumulator));
  const int size = size_in_bytes(fa);
  if (size != size_in_bytes(fb) || a.ndim() != 2 || b.ndim() != 2 || c.ndim() != 2 ||
      a.shape(1) != b.shape(1) || c.shape(0) != a.shape(0) || c.shape(1) != b.shape(0) ||
      k_per_instruction < 1 || a.shape(1) % (size * k_per_instruction) != 0) {
    throw py::value_error(
        "mma: a and b must be the bytes of [M, K] and [N, K] in formats of one size, c must be "
        "[M, N], and K a multiple of k_per_instruction");
  }
  const int rows = int(a.shape(0)), columns = int(b.shape(0)), pitch = int(a.shape(1));
  py::array_t<float> d({rows, columns});
  std::copy(c.data(), c.data() + c.size(), d.mutable_data());
  const int step = size * k_per_instruction;
  float* out = d.mutable_data();
  const std::uint8_t* a_bytes = a.data();
  const std::uint8_t* b_bytes = b.data();
  py::gil_scoped_release unlocked;
  const bool widened = model.fp8_widened_to_f16;
  MmaOperand x, y;
  for (int k = 0; k < pitch; k += step) {
    decode_operand(x, fa, a_bytes + k, rows, k_per_instruction, pitch, size, false, widened);
    decode_operand(y, fb, b_bytes + k, columns, k_per_instruction, pitch, size, false, widened);
    if (!one_by_one) {
      multiply_accumulate(model, x, y, out, columns);
      continue;
    }
    for (int m = 0; m < rows; ++m) {
      for (int n = 0; n < columns; ++n) {
        float& element = out[std::size_t(m) * columns + n];
        element = multiply_accumulate_element(model, x, m, y, n, element);
      }
    }
  }
  return d;
}

py::bytes encode_map(int data_type, std::uint64_t global_address,
                     const std::vector<std::uint64_t>& global_dim,
                     const std::vector<std::uint64_t>& global_strides,
                     const std::vector<std::uint32_t>& box_dim,
                     const std::vector<std::uint32_t>& element_strides, int interleave, int swizzle,
                     int l2_promotion, int oob_fill) {
  const std::size_t rank = global_dim.size();
  if (box_dim.size() != rank || element_strides.size() != rank ||
      global_strides.size() != (rank == 0 ? 0 : rank - 1)) {
    throw py::value_error(
        "tensor map: global_dim, box_dim and element_strides must have one entry for each "
        "dimension, and global_strides one fewer (got " +
        std::to_string(rank) + ", " + std::to_string(box_dim.size()) + ", " +
        std::to_string(element_strides.size()) + " and " + std::to_string(global_strides.size()) +
        ")");
  }
  TensorMap map;
  encode_tensor_map(&map, data_type, std::uint32_t(rank), global_address, global_dim.data(),
                    global_strides.data(), box_dim.data(), element_strides.data(), interleave,
                    swizzle, l2_promotion, oob_fill);
  return py::bytes(reinterpret_cast<const char*>(map.bytes), sizeof map.bytes);
}

void require_map_size(const std::string& map) {
  if (map.size() == sizeof(TensorMap)) return;
  throw py::value_error("tensor map: it must have 128 bytes (got " + std::to_string(map.size()) +
                        ")");
}

TensorMapFields fields_of(const std::string& map) {
  require_map_size(map);
  return decode_tensor_map(map.data());
}

py::dict decode_map(const std::string& map) {
  const TensorMapFields f = fields_of(map);
  const auto list = [](const auto* values, std::size_t count) {
    return std::vector<std::uint64_t>(values, values + count);
  };
  py::dict d;
  d["data_type"] = int(f.data_type);
  d["global_address"] = f.global_address;
  d["global_dim"] = list(f.global_dim, f.rank);
  d["global_strides"] = list(f.global_strides, f.rank - 1);
  d["box_dim"] = list(f.box_dim, f.rank);
  d["element_strides"] = list(f.element_strides, f.rank);
  d["interleave"] = int(f.interleave);
  d["swizzle"] = int(f.swizzle);
  d["l2_promotion"] = int(f.l2_promotion);
  d["oob_fill"] = int(f.oob_fill);
  d["box_bytes"] = box_bytes(f);
  d["box_span_bytes"] = box_span_bytes(f);
  return d;
}

py::bytes replace_field(std::string map, const std::string& field, std::uint32_t ordinal,
                        std::uint64_t value) {
  require_map_size(map);
  replace_tensor_map_field(map.data(), lookup(tensor_map_field_names(), "field", field), ordinal,
                           value);
  return py::bytes(map);
}

// [(shared address, bytes, global address or None)]
py::list box_runs(const std::string& map, const std::vector<std::int32_t>& coordinates,
                  std::uint32_t shared_address) {
  const TensorMapFields f = fields_of(map);
  if (coordinates.size() != f.rank) {
    throw py::value_error("box_runs: coordinates must have one entry for each of the map's " +
                          std::to_string(f.rank) + " dimensions (got " +
                          std::to_string(coordinates.size()) + ")");
  }
  if (box_span_bytes(f) > 1 << 20) {
    throw py::value_error("box_runs: the box must have at most 2^20 bytes (got " +
                          std::to_string(box_span_bytes(f)) + ")");
  }
  py::list runs;
  for_each_run(f, coordinates.data(), shared_address, [&](const BoxRun& run) {
    runs.append(py::make_tuple(
        run.shared_address, run.bytes,
        run.in_bounds ? py::object(py::int_(run.global_address)) : py::object(py::none())));
  });
  return runs;
}

py::bytes oob_fill(const std::string& map, std::uint32_t bytes) {
  std::string filled(bytes, '\0');
  oob_fill_bytes(fields_of(map), filled.data(), bytes);
  return py::bytes(filled);
}

}  // namespace

void bind_numerics(py::module_& module) {
  py::register_exception<TensorMapError>(module, "TensorMapError", PyExc_ValueError);
  module.def("encode", &encode, py::arg("format"), py::arg("values"), py::arg("rounding") = "rn",
             py::arg("satfinite") = false, py::arg("relu") = false);
  module.def("decode", &decode, py::arg("format"), py::arg("codes"));
  module.def("mma", &mma, py::arg("instruction"), py::arg("target"), py::arg("accumulator"),
             py::arg("a"), py::arg("a_format"), py::arg("b"), py::arg("b_format"), py::arg("c"),
             py::arg("k_per_instruction"), py::arg("one_by_one") = false);
  module.def("encode_tensor_map", &encode_map, py::arg("data_type"), py::arg("global_address"),
             py::arg("global_dim"), py::arg("global_strides"), py::arg("box_dim"),
             py::arg("element_strides"), py::arg("interleave") = 0, py::arg("swizzle") = 0,
             py::arg("l2_promotion") = 0, py::arg("oob_fill") = 0);
  module.def("decode_tensor_map", &decode_map, py::arg("map"));
  module.def("replace_tensor_map_field", &replace_field, py::arg("map"), py::arg("field"),
             py::arg("ordinal"), py::arg("value"));
  module.def("box_runs", &box_runs, py::arg("map"), py::arg("coordinates"),
             py::arg("shared_address"));
  module.def("oob_fill", &oob_fill, py::arg("map"), py::arg("bytes"));
}

}  // namespace torchext::sim
