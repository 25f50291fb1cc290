// Tensor maps: a replacement for cuTensorMapEncodeTiled, and the addresses that TMA computes.
//
// The driver's CUtensorMap is opaque, so this one has its own layout in the same 128 bytes, with a
// magic word. encode_tensor_map checks every rule that the CUDA driver API documents
// for Hopper and names the argument and the rule that it breaks.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <stdexcept>
#include <string>

namespace torchext::sim {

constexpr int kMaxTensorMapRank = 5;

// The values of CUtensorMapDataType, CUtensorMapInterleave, CUtensorMapSwizzle,
// CUtensorMapL2promotion and CUtensorMapFloatOOBfill, so that a caller may pass those.
enum class TensorMapDataType : std::uint8_t {
  uint8,
  uint16,
  uint32,
  int32,
  uint64,
  int64,
  float16,
  float32,
  float64,
  bfloat16,
  float32_ftz,
  tfloat32,
  tfloat32_ftz,
};
enum class TensorMapInterleave : std::uint8_t { none, bytes_16, bytes_32 };
enum class TensorMapSwizzle : std::uint8_t { none, span_32, span_64, span_128 };
enum class TensorMapL2Promotion : std::uint8_t { none, bytes_64, bytes_128, bytes_256 };
enum class TensorMapOobFill : std::uint8_t { zero, nan };

int size_in_bytes(TensorMapDataType type);
bool is_floating_point(TensorMapDataType type);

// What a tensor map holds. Dimension 0 is the innermost, as in the driver API.
struct TensorMapFields {
  TensorMapDataType data_type = TensorMapDataType::uint8;
  std::uint32_t rank = 0;
  std::uint64_t global_address = 0;
  std::uint64_t global_dim[kMaxTensorMapRank] = {};          // elements
  std::uint64_t global_strides[kMaxTensorMapRank - 1] = {};  // bytes, of dimensions 1 to rank - 1
  std::uint32_t box_dim[kMaxTensorMapRank] = {};
  std::uint32_t element_strides[kMaxTensorMapRank] = {};
  TensorMapInterleave interleave = TensorMapInterleave::none;
  TensorMapSwizzle swizzle = TensorMapSwizzle::none;
  TensorMapL2Promotion l2_promotion = TensorMapL2Promotion::none;
  TensorMapOobFill oob_fill = TensorMapOobFill::zero;
};

constexpr std::uint32_t kTensorMapBytes = 128, kTensorMapAlignment = 64;
struct alignas(kTensorMapAlignment) TensorMap {
  std::uint8_t bytes[kTensorMapBytes];
};

class TensorMapError : public std::invalid_argument {
 public:
  using std::invalid_argument::invalid_argument;
};

// cuTensorMapEncodeTiled's argument list. `tensor_map` must be aligned to 64 bytes. Throws
// TensorMapError: argument, rule, value.
void encode_tensor_map(void* tensor_map, int data_type, std::uint32_t rank,
                       std::uint64_t global_address, const std::uint64_t* global_dim,
                       const std::uint64_t* global_strides, const std::uint32_t* box_dim,
                       const std::uint32_t* element_strides, int interleave, int swizzle,
                       int l2_promotion, int oob_fill);

// Throws TensorMapError if the 128 bytes are not such a tensor map or, after
// replace_tensor_map_field, break one of the rules.
TensorMapFields decode_tensor_map(const void* tensor_map);

// The fields that PTX `tensormap.replace.tile` can write. `value` has PTX's encoding: rank is the
// rank minus 1, and elemtype has the numbers of the PTX ISA, not of CUtensorMapDataType. 128 zero
// bytes count as a map without any field set. Throws TensorMapError.
enum class TensorMapField {
  global_address,
  rank,
  box_dim,
  global_dim,
  global_stride,
  element_stride,
  elemtype,
  interleave_layout,
  swizzle_mode,
  fill_mode,
};
// Fields by the names that PTX gives them.
const std::map<std::string, TensorMapField>& tensor_map_field_names();
void replace_tensor_map_field(void* tensor_map, TensorMapField field, std::uint32_t ordinal,
                              std::uint64_t value);

// Elements that one box moves along dimension d: ceil(box_dim / element_stride).
std::uint32_t box_elements(const TensorMapFields& fields, int dimension);
// Bytes that one box moves, out-of-bounds elements included: what complete_tx counts.
std::uint64_t box_bytes(const TensorMapFields& fields);
// Bytes of shared memory that one box spans: more than box_bytes only where a swizzle pads the
// rows. Check it against the memory at hand first: a legal box may span 2^43 bytes.
std::uint64_t box_span_bytes(const TensorMapFields& fields);

// XORs address bits 4.. with bits 7..: 16-byte chunks permuted within the swizzle span.
inline std::uint32_t swizzle_address(TensorMapSwizzle swizzle, std::uint32_t address) {
  const std::uint32_t mask = (1u << static_cast<std::uint32_t>(swizzle)) - 1;  // 0, 1, 3, 7
  return address ^ (((address >> 7) & mask) << 4);
}

// Bytes that are contiguous in shared and global memory, and all in bounds or all out of bounds.
struct BoxRun {
  std::uint32_t shared_address;  // swizzled
  std::uint32_t bytes;
  std::uint64_t global_address;  // 0 where out of bounds
  bool in_bounds;                // if not, a load fills (oob_fill_bytes) and a store skips
};

// Calls visit(const BoxRun&) for every run of the box whose first element is at `coordinates`
// (`rank` of them, dimension 0 first, signed) and whose shared-memory image starts at
// `shared_address`. A run is a whole row without swizzle, a 16-byte chunk with one, cut where the
// tensor ends.
template <class Visitor>
void for_each_run(const TensorMapFields& fields, const std::int32_t* coordinates,
                  std::uint32_t shared_address, Visitor&& visit);

// Writes the fill value of out-of-bounds elements. `bytes` is a multiple of the element size.
void oob_fill_bytes(const TensorMapFields& fields, void* destination, std::uint32_t bytes);

// -------------------------------------------------------------------------------------------------

template <class Visitor>
void for_each_run(const TensorMapFields& fields, const std::int32_t* coordinates,
                  std::uint32_t shared_address, Visitor&& visit) {
  const std::int64_t element = size_in_bytes(fields.data_type);
  const bool swizzled = fields.swizzle != TensorMapSwizzle::none;
  const std::uint32_t row_bytes = fields.box_dim[0] * static_cast<std::uint32_t>(element);
  const std::uint32_t row_pitch =
      swizzled ? 16u << static_cast<std::uint32_t>(fields.swizzle) : row_bytes;

  // [begin, end): the bytes of every row that the tensor's innermost dimension covers.
  const auto clamp = [&](std::int64_t x) {
    return static_cast<std::uint32_t>(x < 0 ? 0 : x > row_bytes ? row_bytes : x);
  };
  const std::uint32_t begin = clamp(-static_cast<std::int64_t>(coordinates[0]) * element);
  const std::uint32_t end =
      clamp((static_cast<std::int64_t>(fields.global_dim[0]) - coordinates[0]) * element);

  std::uint32_t counts[kMaxTensorMapRank] = {1, 1, 1, 1, 1};
  for (std::uint32_t d = 1; d < fields.rank; ++d) counts[d] = box_elements(fields, int(d));

  std::uint32_t index[kMaxTensorMapRank] = {};
  std::uint32_t row_address = shared_address;
  for (;;) {
    bool row_in_bounds = begin < end;
    std::uint64_t row_global =
        fields.global_address + static_cast<std::uint64_t>(coordinates[0] * element);
    for (std::uint32_t d = 1; d < fields.rank; ++d) {
      const std::int64_t at = std::int64_t{coordinates[d]} +
                              std::int64_t{index[d]} * std::int64_t{fields.element_strides[d]};
      row_in_bounds &= at >= 0 && static_cast<std::uint64_t>(at) < fields.global_dim[d];
      row_global += static_cast<std::uint64_t>(at) * fields.global_strides[d - 1];
    }

    const auto emit = [&](std::uint32_t from, std::uint32_t to, bool in_bounds) {
      if (from == to) return;
      const std::uint32_t address = row_address + from;
      visit(BoxRun{swizzled ? swizzle_address(fields.swizzle, address) : address, to - from,
                   in_bounds ? row_global + from : 0, in_bounds});
    };
    const std::uint32_t row_begin = row_in_bounds ? begin : row_bytes;
    const std::uint32_t row_end = row_in_bounds ? end : row_bytes;
    const std::uint32_t step = swizzled ? 16 : row_bytes;
    for (std::uint32_t chunk = 0; chunk < row_bytes; chunk += step) {
      const auto within = [&](std::uint32_t x) {
        return x < chunk ? chunk : x > chunk + step ? chunk + step : x;
      };
      emit(chunk, within(row_begin), false);
      emit(within(row_begin), within(row_end), true);
      emit(within(row_end), chunk + step, false);
    }

    row_address += row_pitch;
    std::uint32_t d = 1;
    while (d < fields.rank && ++index[d] == counts[d]) index[d++] = 0;
    if (d >= fields.rank) return;
  }
}

}  // namespace torchext::sim
