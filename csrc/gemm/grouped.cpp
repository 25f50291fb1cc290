// Host entries of the grouped GEMM ops. Only kernels read where groups begin, so nothing here waits
// for the device.
#include "../runtime/check.h"
#include "operands.h"

namespace torchext {
namespace {

const std::optional<Tensor> kNoBias;

std::string sizes_string(const char* names, const std::vector<int64_t>& sizes) {
  std::string text = std::string("shape ") + names + " = [";
  for (size_t i = 0; i < sizes.size(); ++i) text += (i ? ", " : "") + std::to_string(sizes[i]);
  return text + "]";
}

// The op whose groups are runs of rows of a, or whose rows each name their group.
struct Contiguous {
  static constexpr const char* kOp = "m_grouped_fp8_gemm_nt_contiguous";
  GemmCall call;
  const Tensor* index = nullptr;
  GemmProblem p;

  Contiguous(const Tensor& a, const Tensor& a_scale, const Tensor& b, const Tensor& b_scale,
             const std::optional<Tensor>& offsets, const std::optional<Tensor>& group_ids,
             const std::optional<Tensor>& bias, int64_t num_sms)
      : call{kOp, a, a_scale, b, b_scale, bias, num_sms} {
    TORCHEXT_CHECK_VALUE(offsets.has_value() != group_ids.has_value(), kOp,
                         ": pass either offsets (where groups end) or group_ids (the group of each "
                         "row) (got ",
                         offsets ? "both" : "neither", ")");
    p = check_operands(call, offsets ? Grouping::kOffsets : Grouping::kRowIds);
    index = offsets ? &*offsets : &*group_ids;
    check_group_index(call, p, offsets ? "offsets" : "group_ids", *index, offsets ? p.groups : p.m);
  }
};

// The op whose groups are the first rows of each matrix of a.
struct Masked {
  static constexpr const char* kOp = "m_grouped_fp8_gemm_nt_masked";
  GemmCall call;
  const Tensor& index;
  GemmProblem p;

  Masked(const Tensor& a, const Tensor& a_scale, const Tensor& b, const Tensor& b_scale,
         const Tensor& masked_m, int64_t expected_m, const std::optional<Tensor>& bias,
         int64_t num_sms)
      : call{kOp, a, a_scale, b, b_scale, bias, num_sms}, index(masked_m) {
    p = check_operands(call, Grouping::kCounts);
    check_group_index(call, p, "masked_m", masked_m, p.groups);
    TORCHEXT_CHECK_VALUE(expected_m >= 0, kOp,
                         ": expected_m must be 0 (unknown) or the number of rows that a group is "
                         "expected to have (got ",
                         expected_m, ")");
    p.expected_rows = expected_m;
  }
  std::vector<int64_t> out_sizes() const { return {p.groups, p.group_rows, p.n}; }
};

// The op whose groups are runs of columns of a and b.
struct AlongK {
  static constexpr const char* kOp = "k_grouped_fp8_gemm_nt";
  GemmCall call;
  const Tensor& index;
  GemmProblem p;

  AlongK(const Tensor& a, const Tensor& a_scale, const Tensor& b, const Tensor& b_scale,
         const Tensor& offsets, int64_t num_sms)
      : call{kOp, a, a_scale, b, b_scale, kNoBias, num_sms}, index(offsets) {
    p = check_operands(call, Grouping::kAlongK);
    TORCHEXT_CHECK_VALUE(offsets.dim() == 1, kOp, ": offsets must have shape [G] (got ",
                         shape_string(offsets), ")");
    p.groups = offsets.size(0);
    check_group_index(call, p, "offsets", offsets, p.groups);
  }
  std::vector<int64_t> out_sizes() const { return {p.groups, p.m, p.n}; }
};

}  // namespace

Tensor m_grouped_fp8_gemm_nt_contiguous(const Tensor& a, const Tensor& a_scale, const Tensor& b,
                                        const Tensor& b_scale, std::optional<Tensor> offsets,
                                        std::optional<Tensor> group_ids, std::optional<Tensor> bias,
                                        std::optional<ScalarType> out_dtype, int64_t num_sms) {
  Contiguous op(a, a_scale, b, b_scale, offsets, group_ids, bias, num_sms);
  const ScalarType dtype = check_out_dtype(op.call, out_dtype);
  const Tensor out = empty_out(op.call, op.p, {op.p.m, op.p.n}, dtype);
  run(op.call, op.p, out, op.index);
  return out;
}

void m_grouped_fp8_gemm_nt_contiguous_out(const Tensor& a, const Tensor& a_scale, const Tensor& b,
                                          const Tensor& b_scale, std::optional<Tensor> offsets,
                                          std::optional<Tensor> group_ids, Tensor out,
                                          bool accumulate, std::optional<Tensor> bias,
                                          int64_t num_sms) {
  Contiguous op(a, a_scale, b, b_scale, offsets, group_ids, bias, num_sms);
  const std::vector<int64_t> sizes{op.p.m, op.p.n};
  check_out(op.call, op.p, out, accumulate, sizes, sizes_string("[M, N]", sizes));
  run(op.call, op.p, out, op.index);
}

Tensor m_grouped_fp8_gemm_nt_masked(const Tensor& a, const Tensor& a_scale, const Tensor& b,
                                    const Tensor& b_scale, const Tensor& masked_m,
                                    int64_t expected_m, std::optional<Tensor> bias,
                                    std::optional<ScalarType> out_dtype, int64_t num_sms) {
  Masked op(a, a_scale, b, b_scale, masked_m, expected_m, bias, num_sms);
  const ScalarType dtype = check_out_dtype(op.call, out_dtype);
  const Tensor out = empty_out(op.call, op.p, op.out_sizes(), dtype);
  run(op.call, op.p, out, &op.index);
  return out;
}

void m_grouped_fp8_gemm_nt_masked_out(const Tensor& a, const Tensor& a_scale, const Tensor& b,
                                      const Tensor& b_scale, const Tensor& masked_m,
                                      int64_t expected_m, Tensor out, bool accumulate,
                                      std::optional<Tensor> bias, int64_t num_sms) {
  Masked op(a, a_scale, b, b_scale, masked_m, expected_m, bias, num_sms);
  check_out(op.call, op.p, out, accumulate, op.out_sizes(),
            sizes_string("[G, M, N]", op.out_sizes()));
  run(op.call, op.p, out, &op.index);
}

Tensor k_grouped_fp8_gemm_nt(const Tensor& a, const Tensor& a_scale, const Tensor& b,
                             const Tensor& b_scale, const Tensor& offsets,
                             std::optional<ScalarType> out_dtype, int64_t num_sms) {
  AlongK op(a, a_scale, b, b_scale, offsets, num_sms);
  const ScalarType dtype = check_out_dtype(op.call, out_dtype);
  const Tensor out = empty_out(op.call, op.p, op.out_sizes(), dtype);
  run(op.call, op.p, out, &op.index);
  return out;
}

void k_grouped_fp8_gemm_nt_out(const Tensor& a, const Tensor& a_scale, const Tensor& b,
                               const Tensor& b_scale, const Tensor& offsets, Tensor out,
                               bool accumulate, int64_t num_sms) {
  AlongK op(a, a_scale, b, b_scale, offsets, num_sms);
  check_out(op.call, op.p, out, accumulate, op.out_sizes(),
            sizes_string("[G, M, N]", op.out_sizes()));
  run(op.call, op.p, out, &op.index);
}

}  // namespace torchext
