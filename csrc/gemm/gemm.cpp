// Host entry of the FP8 GEMM ops: checks the operands, reads the granularity off their scales,
// allocates the output, and runs the CPU or the CUDA kernel.
#include "gemm.h"

#include "../runtime/check.h"

namespace torchext {
namespace {

constexpr const char* kOp = "fp8_gemm_nt";

void check_operand(const char* name, const Tensor& tensor, const FoldedRows& rows) {
  const int64_t k = tensor.size(tensor.dim() - 1);
  TORCHEXT_CHECK_TYPE(is_fp8(tensor.scalar_type()), kOp, ": ", name,
                      " must be torch.float8_e4m3fn or torch.float8_e5m2 (got ",
                      dtype_name(tensor.scalar_type()),
                      "); quantise it first, with torchext.ops.quantize_1x128, say");
  const bool contiguous = k <= 1 || tensor.stride(tensor.dim() - 1) == 1;
  const bool pitched = rows.count <= 1 || rows.stride % 16 == 0;
  const bool aligned = reinterpret_cast<uintptr_t>(tensor.data_ptr()) % 16 == 0;
  TORCHEXT_CHECK_VALUE(
      tensor.numel() == 0 || (contiguous && pitched && aligned), kOp, ": ", name,
      " must have contiguous rows, each starting at a multiple of 16 bytes, as torchext's "
      "quantisers "
      "lay them out: stride(-1) == 1, stride(-2) % 16 == 0, data_ptr() % 16 == 0 (got shape ",
      shape_string(tensor), ", strides ", stride_string(tensor),
      ", data_ptr() % 16 == ", reinterpret_cast<uintptr_t>(tensor.data_ptr()) % 16,
      "); pad K to a multiple of 16, or copy into rows of stride round_up(K, 16)");
}

FoldedRows folded(const char* name, const Tensor& tensor) {
  const auto rows = fold_rows(tensor);
  TORCHEXT_CHECK_VALUE(rows.has_value(), kOp, ": the leading dimensions of ", name,
                       " must fold into one row stride (got shape ", shape_string(tensor),
                       ", strides ", stride_string(tensor),
                       "); make it contiguous, or fold it with "
                       "reshape before quantising it");
  return *rows;
}

struct Scale {
  const float* data;
  int64_t rows, groups;
  int64_t row_stride, group_stride;  // 0 where there is one to repeat
};

Scale check_scale(const char* name, const Tensor& scale) {
  TORCHEXT_CHECK_TYPE(scale.scalar_type() == ScalarType::Float, kOp, ": ", name,
                      " must be torch.float32 (got ", dtype_name(scale.scalar_type()), ")");
  TORCHEXT_CHECK_VALUE(scale.dim() >= 1, kOp, ": ", name,
                       " must have a dimension for groups of K; a "
                       "tensor-wise scale has shape [1, 1] (got a 0-dimensional tensor)");
  const FoldedRows rows = folded(name, scale);
  const int64_t groups = scale.size(scale.dim() - 1);
  return {static_cast<const float*>(scale.data_ptr()), rows.count, groups,
          rows.count == 1 ? 0 : rows.stride, groups == 1 ? 0 : scale.stride(scale.dim() - 1)};
}

// 1x128 scales are loaded by TMA, a column of 128 rows at a time.
void check_m_major(const char* name, const Tensor& tensor, const Scale& scale) {
  const bool column = scale.rows <= 1 || scale.row_stride == 1;
  const bool pitch = scale.groups <= 1 || scale.group_stride % 4 == 0;
  const bool aligned = reinterpret_cast<uintptr_t>(scale.data) % 16 == 0;
  TORCHEXT_CHECK_VALUE(tensor.numel() == 0 || (column && pitch && aligned), kOp, ": ", name,
                       " with one scale for each row and 128 of K must be M-major, as torchext's "
                       "quantisers lay it out: "
                       "strides (1, round_up(rows, 4)), 16-byte aligned (got shape ",
                       shape_string(tensor), ", strides ", stride_string(tensor),
                       ", data_ptr() % 16 == ", reinterpret_cast<uintptr_t>(scale.data) % 16, ")");
}

bool same_device(const Tensor& x, const Tensor& y) {
  return x.is_cpu() == y.is_cpu() && x.get_device_index() == y.get_device_index();
}

// Everything of the problem but its output.
GemmProblem check_inputs(const Tensor& a, const Tensor& a_scale, const Tensor& b,
                         const Tensor& b_scale, const std::optional<Tensor>& bias,
                         int64_t num_sms) {
  TORCHEXT_CHECK_VALUE(a.dim() >= 1, kOp, ": a must have shape [..., K] (got 0 dimensions)");
  TORCHEXT_CHECK_VALUE(b.dim() == 2, kOp, ": b must have shape [N, K] (got ", shape_string(b), ")");
  const FoldedRows a_rows = folded("a", a), b_rows = folded("b", b);
  GemmProblem p = {};
  p.m = a_rows.count;
  p.n = b.size(0);
  p.k = a.size(a.dim() - 1);
  TORCHEXT_CHECK_VALUE(b.size(1) == p.k, kOp,
                       ": a and b must agree in K, their last dimension (got a ", shape_string(a),
                       " and b ", shape_string(b), "); b is [N, K], not [K, N]");
  check_operand("a", a, a_rows);
  check_operand("b", b, b_rows);
  constexpr int64_t kMost = (int64_t(1) << 31) - 256;  // TMA coordinates are int32
  TORCHEXT_CHECK_VALUE(p.m <= kMost && p.n <= kMost && p.k <= kMost, kOp,
                       ": M, N and K must each be below 2^31 - 256 (got ", p.m, ", ", p.n, ", ",
                       p.k, "); split the product");

  const Scale sa = check_scale("a_scale", a_scale), sb = check_scale("b_scale", b_scale);
  const int64_t groups = ceil_div(p.k, kGroup);
  const bool a_grouped = sa.rows == p.m && sa.groups == groups;
  const bool a_rowwise = (sa.rows == p.m || sa.rows == 1) && sa.groups == 1;
  const bool b_rowwise = (sb.rows == p.n || sb.rows == 1) && sb.groups == 1;
  if (a_grouped && sb.rows == ceil_div(p.n, kGroup) && sb.groups == groups) {
    p.granularity = Granularity::k1D2D;
    check_m_major("a_scale", a_scale, sa);
  } else if (a_grouped && sb.rows == p.n && sb.groups == groups) {
    p.granularity = Granularity::k1D1D;
    check_m_major("a_scale", a_scale, sa);
    check_m_major("b_scale", b_scale, sb);
  } else if (a_rowwise && b_rowwise) {
    p.granularity = Granularity::kRowwise;
  } else {
    fail("ValueError", kOp, ": a_scale and b_scale fit no granularity for M=", p.m, ", N=", p.n,
         ", K=", p.k, ": expected a_scale [M, ", groups, "] with b_scale [", ceil_div(p.n, kGroup),
         ", ", groups, "] (1x128 with 128x128) or [N, ", groups,
         "] (1x128 with 1x128), or [M, 1] or [1, 1] with [N, 1] or [1, 1] (row-wise, tensor-wise); "
         "got a_scale ",
         shape_string(a_scale), " and b_scale ", shape_string(b_scale));
  }

  const std::pair<const char*, const Tensor*> others[] = {
      {"a_scale", &a_scale}, {"b", &b}, {"b_scale", &b_scale}, {"bias", bias ? &*bias : &a}};
  for (const auto& [name, tensor] : others)
    TORCHEXT_CHECK_VALUE(same_device(*tensor, a), kOp, ": ", name,
                         " must be on the device of a; move it there with .to(a.device)");
  if (bias) {
    TORCHEXT_CHECK_TYPE(is_wide(bias->scalar_type()), kOp,
                        ": bias must be bfloat16, float16 or float32 (got ",
                        dtype_name(bias->scalar_type()), ")");
    TORCHEXT_CHECK_VALUE(
        bias->dim() == 1 && bias->size(0) == p.n && (p.n <= 1 || bias->stride(0) == 1), kOp,
        ": bias must be contiguous of shape [N] = [", p.n, "] (got ", shape_string(*bias),
        ", strides ", stride_string(*bias), ")");
    p.bias = bias->data_ptr();
    p.bias_dtype = bias->scalar_type();
  }
  TORCHEXT_CHECK_VALUE(num_sms >= 0 && num_sms <= (1 << 16), kOp,
                       ": num_sms must be 0 (all SMs) or the number of SMs to use (got ", num_sms,
                       ")");
  p.num_sms = int(num_sms);
  p.a_dtype = a.scalar_type();
  p.b_dtype = b.scalar_type();
  p.a = a.data_ptr();
  p.a_stride = a_rows.count > 1 ? a_rows.stride : round_up(p.k, 16);
  p.b = b.data_ptr();
  p.b_stride = b_rows.count > 1 ? b_rows.stride : round_up(p.k, 16);
  p.a_scale = sa.data;
  p.a_scale_row = sa.row_stride;
  p.a_scale_group = sa.group_stride;
  p.b_scale = sb.data;
  p.b_scale_row = sb.row_stride;
  p.b_scale_group = sb.group_stride;
  return p;
}

void run(GemmProblem& p, const Tensor& a, const Tensor& a_scale, const Tensor& b,
         const Tensor& b_scale, const std::optional<Tensor>& bias, const Tensor& out) {
  p.out = out.data_ptr();
  p.out_dtype = out.scalar_type();
  if (p.m == 0 || p.n == 0) return;
  Device* device = device_for(a, kOp);
  if (device == nullptr) return fp8_gemm_nt_cpu(p, a);
  if constexpr (kBuiltWithCuda) {
    fp8_gemm_nt_sm90(*device, p,
                     {reads(a, "a"), reads(a_scale, "a_scale"), reads(b, "b"),
                      reads(b_scale, "b_scale"), reads(bias ? *bias : a, bias ? "bias" : "a"),
                      p.accumulate ? updates(out, "out") : writes(out, "out")});
  }
}

}  // namespace

Tensor fp8_gemm_nt(const Tensor& a, const Tensor& a_scale, const Tensor& b, const Tensor& b_scale,
                   std::optional<Tensor> bias, std::optional<ScalarType> out_dtype,
                   int64_t num_sms) {
  GemmProblem p = check_inputs(a, a_scale, b, b_scale, bias, num_sms);
  const ScalarType dtype = out_dtype.value_or(ScalarType::BFloat16);
  TORCHEXT_CHECK_TYPE(is_wide(dtype), kOp,
                      ": out_dtype must be torch.bfloat16, torch.float16 or torch.float32 (got ",
                      dtype_name(dtype), ")");
  std::vector<int64_t> sizes(a.sizes().begin(), a.sizes().end());
  sizes.back() = p.n;
  std::vector<int64_t> strides(sizes.size(), 1);
  for (size_t i = sizes.size() - 1; i-- > 0;)
    strides[i] = strides[i + 1] * std::max<int64_t>(sizes[i + 1], 1);
  Tensor out = empty_strided(sizes, strides, dtype, a);
  p.out_stride = p.n;
  run(p, a, a_scale, b, b_scale, bias, out);
  return out;
}

void fp8_gemm_nt_out(const Tensor& a, const Tensor& a_scale, const Tensor& b, const Tensor& b_scale,
                     Tensor out, bool accumulate, std::optional<Tensor> bias, int64_t num_sms) {
  GemmProblem p = check_inputs(a, a_scale, b, b_scale, bias, num_sms);
  TORCHEXT_CHECK_TYPE(is_wide(out.scalar_type()), kOp,
                      ": out must be bfloat16, float16 or float32 (got ",
                      dtype_name(out.scalar_type()), ")");
  TORCHEXT_CHECK_VALUE(same_device(out, a), kOp, ": out must be on the device of a");
  bool fits = out.dim() == a.dim() && out.size(out.dim() - 1) == p.n;
  for (int64_t i = 0; fits && i + 1 < a.dim(); ++i) fits = out.size(i) == a.size(i);
  const auto rows = fits ? fold_rows(out) : std::nullopt;
  TORCHEXT_CHECK_VALUE(rows.has_value() && (p.n <= 1 || out.stride(out.dim() - 1) == 1) &&
                           (rows->count <= 1 || rows->stride >= p.n),
                       kOp, ": out must have a's shape ", shape_string(a), " with N = ", p.n,
                       " in place of K, and contiguous rows that do not overlap (got shape ",
                       shape_string(out), ", strides ", stride_string(out), ")");
  p.out_stride = rows->count > 1 ? rows->stride : p.n;
  p.accumulate = accumulate;
  run(p, a, a_scale, b, b_scale, bias, out);
}

}  // namespace torchext
