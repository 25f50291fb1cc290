// The rules of cuTensorMapEncodeTiled, and the 128 bytes that represent a CUtensorMap.
#include "tensor_map.h"

#include <cstring>
#include <iterator>
#include <string>

namespace torchext::sim {
namespace {

constexpr std::uint64_t kMagic = 0x70616d5478657478;  // "xtexTmap"

struct Packed {
  std::uint64_t magic;
  std::uint64_t global_address;
  std::uint64_t global_strides[kMaxTensorMapRank - 1];
  std::uint32_t last_index[kMaxTensorMapRank];  // global_dim - 1: a dimension may be 2^32
  std::uint32_t box_dim[kMaxTensorMapRank];
  std::uint8_t element_strides[kMaxTensorMapRank];
  std::uint8_t rank, data_type, interleave, swizzle, l2_promotion, oob_fill;
};
static_assert(sizeof(Packed) <= sizeof(TensorMap));

[[noreturn]] void fail(const std::string& argument, const std::string& rule,
                       const std::string& got) {
  throw TensorMapError("tensor map: " + argument + " " + rule + " (got " + got + ")");
}

void require(bool holds, const std::string& argument, const std::string& rule, std::uint64_t got) {
  if (!holds) fail(argument, rule, std::to_string(got));
}

std::string at(const char* argument, std::uint32_t index) {
  return std::string(argument) + "[" + std::to_string(index) + "]";
}

template <class Enum>
Enum enumerator(int value, Enum last, const char* argument, const char* rule) {
  if (value < 0 || value > static_cast<int>(last)) fail(argument, rule, std::to_string(value));
  return static_cast<Enum>(value);
}

std::uint32_t swizzle_span(TensorMapSwizzle swizzle) {
  return 16u << static_cast<std::uint32_t>(swizzle);
}

void check(const TensorMapFields& f) {
  require(f.rank >= 1 && f.rank <= kMaxTensorMapRank, "tensorRank", "must be 1 to 5", f.rank);
  if (f.interleave != TensorMapInterleave::none) {
    fail("interleave", "must be NONE (0): the simulator has no interleaved layouts",
         std::to_string(static_cast<int>(f.interleave)));
  }
  require(f.global_address % 16 == 0, "globalAddress", "must be aligned to 16 bytes",
          f.global_address);
  if (f.oob_fill == TensorMapOobFill::nan && !is_floating_point(f.data_type)) {
    fail("tensorDataType", "must be floating-point for oobFill NAN_REQUEST_ZERO_FMA",
         std::to_string(static_cast<int>(f.data_type)));
  }
  for (std::uint32_t d = 0; d < f.rank; ++d) {
    require(f.global_dim[d] >= 1 && f.global_dim[d] <= std::uint64_t{1} << 32, at("globalDim", d),
            "must be 1 to 2^32", f.global_dim[d]);
    require(f.box_dim[d] >= 1 && f.box_dim[d] <= 256, at("boxDim", d), "must be 1 to 256",
            f.box_dim[d]);
    require(f.element_strides[d] >= 1 && f.element_strides[d] <= 8, at("elementStrides", d),
            "must be 1 to 8", f.element_strides[d]);
  }
  const std::uint64_t element = static_cast<std::uint64_t>(size_in_bytes(f.data_type));
  for (std::uint32_t d = 0; d + 1 < f.rank; ++d) {
    const std::uint64_t stride = f.global_strides[d];
    require(stride % 16 == 0, at("globalStrides", d), "must be a multiple of 16 bytes", stride);
    require(stride < std::uint64_t{1} << 40, at("globalStrides", d), "must be less than 2^40 bytes",
            stride);
  }
  const std::uint64_t inner = f.box_dim[0] * element;
  require(inner % 16 == 0, "boxDim[0]", "times the element size must be a multiple of 16 bytes",
          inner);
  if (f.swizzle != TensorMapSwizzle::none) {
    const std::uint32_t span = swizzle_span(f.swizzle);
    require(inner <= span, "boxDim[0]",
            "times the element size must not exceed the swizzle span of " + std::to_string(span) +
                " bytes",
            inner);
  }
}

Packed pack(const TensorMapFields& f) {
  Packed packed{};
  packed.magic = kMagic;
  packed.global_address = f.global_address;
  std::memcpy(packed.global_strides, f.global_strides, sizeof f.global_strides);
  std::memcpy(packed.box_dim, f.box_dim, sizeof f.box_dim);
  for (std::uint32_t d = 0; d < f.rank; ++d) {
    packed.last_index[d] = static_cast<std::uint32_t>(f.global_dim[d] - 1);
    packed.element_strides[d] = static_cast<std::uint8_t>(f.element_strides[d]);
  }
  packed.rank = static_cast<std::uint8_t>(f.rank);
  packed.data_type = static_cast<std::uint8_t>(f.data_type);
  packed.interleave = static_cast<std::uint8_t>(f.interleave);
  packed.swizzle = static_cast<std::uint8_t>(f.swizzle);
  packed.l2_promotion = static_cast<std::uint8_t>(f.l2_promotion);
  packed.oob_fill = static_cast<std::uint8_t>(f.oob_fill);
  return packed;
}

TensorMapFields unpack(const Packed& packed) {
  TensorMapFields f;
  f.global_address = packed.global_address;
  std::memcpy(f.global_strides, packed.global_strides, sizeof f.global_strides);
  std::memcpy(f.box_dim, packed.box_dim, sizeof f.box_dim);
  f.rank = packed.rank;
  for (std::uint32_t d = 0; d < kMaxTensorMapRank; ++d) {
    f.global_dim[d] = d < f.rank ? std::uint64_t{packed.last_index[d]} + 1 : 0;
    f.element_strides[d] = packed.element_strides[d];
  }
  f.data_type = static_cast<TensorMapDataType>(packed.data_type);
  f.interleave = static_cast<TensorMapInterleave>(packed.interleave);
  f.swizzle = static_cast<TensorMapSwizzle>(packed.swizzle);
  f.l2_promotion = static_cast<TensorMapL2Promotion>(packed.l2_promotion);
  f.oob_fill = static_cast<TensorMapOobFill>(packed.oob_fill);
  return f;
}

Packed load(const void* tensor_map) {
  Packed packed;
  std::memcpy(&packed, tensor_map, sizeof packed);
  if (packed.magic == kMagic) return packed;
  throw TensorMapError(
      "tensor map: its 128 bytes must be those of an encoded map; pass what "
      "torchext.sim.tensor_map "
      "or the simulated cuTensorMapEncodeTiled made, as a __grid_constant__ const parameter or "
      "from "
      "memory aligned to 64 bytes");
}

void store(void* tensor_map, const Packed& packed) {
  std::memset(tensor_map, 0, sizeof(TensorMap));
  std::memcpy(tensor_map, &packed, sizeof packed);
}

}  // namespace

int size_in_bytes(TensorMapDataType type) {
  switch (type) {
    case TensorMapDataType::uint8:
      return 1;
    case TensorMapDataType::uint16:
    case TensorMapDataType::float16:
    case TensorMapDataType::bfloat16:
      return 2;
    case TensorMapDataType::uint64:
    case TensorMapDataType::int64:
    case TensorMapDataType::float64:
      return 8;
    default:
      return 4;
  }
}

bool is_floating_point(TensorMapDataType type) {
  return type >= TensorMapDataType::float16;
}

TensorMapFields decode_tensor_map(const void* tensor_map) {
  const TensorMapFields f = unpack(load(tensor_map));
  check(f);
  return f;
}

const std::map<std::string, TensorMapField>& tensor_map_field_names() {
  static const std::map<std::string, TensorMapField> names = {
      {"global_address", TensorMapField::global_address},
      {"rank", TensorMapField::rank},
      {"box_dim", TensorMapField::box_dim},
      {"global_dim", TensorMapField::global_dim},
      {"global_stride", TensorMapField::global_stride},
      {"element_stride", TensorMapField::element_stride},
      {"elemtype", TensorMapField::elemtype},
      {"interleave_layout", TensorMapField::interleave_layout},
      {"swizzle_mode", TensorMapField::swizzle_mode},
      {"fill_mode", TensorMapField::fill_mode},
  };
  return names;
}

void replace_tensor_map_field(void* tensor_map, TensorMapField field, std::uint32_t ordinal,
                              std::uint64_t value) {
  static constexpr std::uint8_t kZero[sizeof(TensorMap)] = {};
  Packed packed{};
  packed.magic = kMagic;
  if (std::memcmp(tensor_map, kZero, sizeof kZero) != 0) packed = load(tensor_map);

  const std::uint32_t ordinals = field == TensorMapField::box_dim ||
                                         field == TensorMapField::global_dim ||
                                         field == TensorMapField::element_stride
                                     ? kMaxTensorMapRank
                                 : field == TensorMapField::global_stride ? kMaxTensorMapRank - 1
                                                                          : 1;
  require(ordinal < ordinals, "the ordinal of tensormap.replace",
          "must be less than " + std::to_string(ordinals), ordinal);
  const auto below = [&](std::uint64_t limit, const char* argument) {
    require(value < limit, argument, "must be less than " + std::to_string(limit), value);
    return static_cast<std::uint8_t>(value);
  };
  switch (field) {
    case TensorMapField::global_address:
      packed.global_address = value;
      break;
    case TensorMapField::rank:
      packed.rank = below(kMaxTensorMapRank, "tensorRank - 1") + 1;
      break;
    case TensorMapField::box_dim:
      packed.box_dim[ordinal] = static_cast<std::uint32_t>(value);
      break;
    case TensorMapField::global_dim:
      require(value >= 1, at("globalDim", ordinal), "must be 1 to 2^32", value);
      packed.last_index[ordinal] = static_cast<std::uint32_t>(value - 1);
      break;
    case TensorMapField::global_stride:
      packed.global_strides[ordinal] = value;
      break;
    case TensorMapField::element_stride:
      packed.element_strides[ordinal] = below(256, "elementStrides");
      break;
    case TensorMapField::elemtype: {
      using T = TensorMapDataType;
      static constexpr T kTypes[] = {T::uint8,       T::uint16,  T::uint32,   T::int32,
                                     T::uint64,      T::int64,   T::float16,  T::float32,
                                     T::float32_ftz, T::float64, T::bfloat16, T::tfloat32,
                                     T::tfloat32_ftz};
      packed.data_type = static_cast<std::uint8_t>(kTypes[below(std::size(kTypes), "elemtype")]);
      break;
    }
    case TensorMapField::interleave_layout:
      packed.interleave = below(3, "interleave");
      break;
    case TensorMapField::swizzle_mode:
      packed.swizzle = below(4, "swizzle");
      break;
    case TensorMapField::fill_mode:
      packed.oob_fill = below(2, "oobFill");
      break;
  }
  store(tensor_map, packed);
}

void encode_tensor_map(void* tensor_map, int data_type, std::uint32_t rank,
                       std::uint64_t global_address, const std::uint64_t* global_dim,
                       const std::uint64_t* global_strides, const std::uint32_t* box_dim,
                       const std::uint32_t* element_strides, int interleave, int swizzle,
                       int l2_promotion, int oob_fill) {
  const auto place = reinterpret_cast<std::uintptr_t>(tensor_map);
  require(tensor_map != nullptr, "tensorMap", "must not be null", 0);
  require(place % alignof(TensorMap) == 0, "tensorMap", "must be aligned to 64 bytes", place);
  require(rank >= 1 && rank <= kMaxTensorMapRank, "tensorRank", "must be 1 to 5", rank);
  require(global_dim != nullptr, "globalDim", "must not be null", 0);
  require(rank == 1 || global_strides != nullptr, "globalStrides", "must not be null", 0);
  require(box_dim != nullptr, "boxDim", "must not be null", 0);
  require(element_strides != nullptr, "elementStrides", "must not be null", 0);

  TensorMapFields f;
  f.data_type = enumerator(data_type, TensorMapDataType::tfloat32_ftz, "tensorDataType",
                           "must be 0 to 12 (the packed 4- and 6-bit types need sm_100)");
  f.rank = rank;
  f.global_address = global_address;
  for (std::uint32_t d = 0; d < rank; ++d) {
    f.global_dim[d] = global_dim[d];
    f.box_dim[d] = box_dim[d];
    f.element_strides[d] = element_strides[d];
    if (d + 1 < rank) f.global_strides[d] = global_strides[d];
  }
  f.interleave = enumerator(interleave, TensorMapInterleave::bytes_32, "interleave",
                            "must be a CUtensorMapInterleave, 0 to 2");
  f.swizzle = enumerator(swizzle, TensorMapSwizzle::span_128, "swizzle",
                         "must be 0 to 3 (swizzles with atoms of 32 and 64 bytes need sm_100)");
  f.l2_promotion = enumerator(l2_promotion, TensorMapL2Promotion::bytes_256, "l2Promotion",
                              "must be a CUtensorMapL2promotion, 0 to 3");
  f.oob_fill = enumerator(oob_fill, TensorMapOobFill::nan, "oobFill",
                          "must be a CUtensorMapFloatOOBfill, 0 or 1");
  check(f);
  store(tensor_map, pack(f));
}

std::uint32_t box_elements(const TensorMapFields& f, int dimension) {
  // The driver ignores the element stride of dimension 0 if there is no interleave.
  const std::uint32_t stride = dimension == 0 ? 1 : f.element_strides[dimension];
  return (f.box_dim[dimension] + stride - 1) / stride;
}

std::uint64_t box_bytes(const TensorMapFields& f) {
  std::uint64_t bytes = static_cast<std::uint64_t>(size_in_bytes(f.data_type));
  for (std::uint32_t d = 0; d < f.rank; ++d) bytes *= box_elements(f, static_cast<int>(d));
  return bytes;
}

std::uint64_t box_span_bytes(const TensorMapFields& f) {
  const std::uint32_t row = f.box_dim[0] * static_cast<std::uint32_t>(size_in_bytes(f.data_type));
  const std::uint32_t pitch = f.swizzle == TensorMapSwizzle::none ? row : swizzle_span(f.swizzle);
  return box_bytes(f) / row * pitch;
}

void oob_fill_bytes(const TensorMapFields& f, void* destination, std::uint32_t bytes) {
  std::memset(destination, 0, bytes);
  if (f.oob_fill == TensorMapOobFill::zero) return;
  // A quiet NaN with all fraction bits set, in any of the floating-point types: 0x7f then 0xff's.
  const std::uint32_t element = static_cast<std::uint32_t>(size_in_bytes(f.data_type));
  std::memset(destination, 0xff, bytes);
  for (std::uint32_t last = element - 1; last < bytes; last += element) {
    static_cast<std::uint8_t*>(destination)[last] = 0x7f;
  }
}

}  // namespace torchext::sim
