// Host entry of fp8_linear, the weights-only product. To the kernels, x is the operand a of a GEMM:
// it has a wide dtype and no scale (a_scale == nullptr).
#include "weights_only.h"

#include "../runtime/check.h"
#include "../runtime/layout.h"
#include "operands.h"

namespace torchext {
namespace {

constexpr const char* kOp = "fp8_linear";

void check_tensors(const GemmCall& call) {
  const Tensor &x = call.a, &weight = call.b;
  TORCHEXT_CHECK_TYPE(is_wide(x.scalar_type()), kOp,
                      ": x must be torch.bfloat16, torch.float16 or torch.float32 (got ",
                      dtype_name(x.scalar_type()),
                      "); convert it with .to(), or multiply FP8 operands with fp8_gemm_nt");
  TORCHEXT_CHECK_VALUE(x.dim() >= 1, kOp,
                       ": x must have shape [..., K] (got 0 dimensions); reshape it to [1]");
  TORCHEXT_CHECK_VALUE(weight.dim() == 2, kOp, ": weight must have shape [N, K] (got ",
                       shape_string(weight), "); call the op once for each matrix");
  TORCHEXT_CHECK_VALUE(weight.size(1) == x.size(x.dim() - 1), kOp,
                       ": x and weight must agree in K, their last dimension (got x ",
                       shape_string(x), " and weight ", shape_string(weight),
                       "); weight is [N, K], not [K, N]");
  const std::pair<const char*, const Tensor*> others[] = {
      {"weight", &weight}, {"weight_scale", &call.b_scale}, {"bias", call.bias ? &*call.bias : &x}};
  for (const auto& [name, tensor] : others)
    TORCHEXT_CHECK_VALUE(same_device(*tensor, x), kOp, ": ", name,
                         " must be on the device of x; move it there with .to(x.device)");
}

void set_scale(const GemmCall& call, GemmProblem& p) {
  const Scale scale = check_scale(kOp, "weight_scale", call.b_scale);
  const int64_t groups = ceil_div(p.k, kScaleGroup), blocks = ceil_div(p.n, kScaleGroup);
  if (scale.groups == 1 && (scale.rows == p.n || scale.rows == 1)) {
    p.granularity = Granularity::kRowwise;
  } else if (scale.groups == groups && scale.rows == blocks) {
    p.granularity = Granularity::k1D2D;
  } else if (scale.groups == groups && scale.rows == p.n) {
    p.granularity = Granularity::k1D1D;
    check_m_major(kOp, "weight_scale", call.b_scale, scale);
  } else {
    fail("ValueError", kOp, ": weight_scale must be [", blocks, ", ", groups,
         "] (128x128 blocks), [", p.n, ", ", groups, "] (1x128), [", p.n,
         ", 1] (row-wise) or [1, 1] (tensor-wise) for weight ", shape_string(call.b), " (got ",
         shape_string(call.b_scale), "); pass the scale that the weight's quantizer returned");
  }
  p.b_scale = scale.data;
  p.b_scale_row = scale.row_stride;
  p.b_scale_k_block = scale.group_stride;
}

// Rows of x as kernels read them: contiguous, one stride apart and, for CUDA kernels, each at a
// multiple of 16 bytes. An x that is not laid out so is copied.
Tensor readable(const Tensor& x) {
  const int64_t k = x.size(x.dim() - 1), size = element_size(x.scalar_type());
  const auto rows = fold_rows(x);
  const bool contiguous = rows && (k <= 1 || x.stride(x.dim() - 1) == 1);
  const bool aligned = reinterpret_cast<uintptr_t>(x.data_ptr()) % 16 == 0 &&
                       (!rows || rows->count <= 1 || rows->stride * size % 16 == 0);
  if (contiguous && (aligned || device_for(x, kOp) == nullptr)) return x;
  const std::vector<int64_t> sizes = sizes_of(x);
  Tensor copy =
      empty_strided(sizes, folded_strides(sizes, round_up(k, 16 / size), 1), x.scalar_type(), x);
  torch::stable::copy_(copy, x);
  return copy;
}

}  // namespace

Tensor fp8_linear(const Tensor& x, const Tensor& weight, const Tensor& weight_scale,
                  std::optional<Tensor> bias, int64_t num_sms) {
  check_tensors({kOp, x, weight_scale, weight, weight_scale, bias, num_sms});
  const Tensor input = readable(x);
  const GemmCall call{kOp, input, weight_scale, weight, weight_scale, bias, num_sms};
  const FoldedRows rows = *fold_rows(input), weight_rows = *fold_rows(weight);
  check_operand(kOp, "weight", weight, weight_rows);

  GemmProblem p = {};
  p.op = kOp;
  p.grouping = Grouping::kNone;
  p.m = rows.count;
  p.n = weight.size(0);
  p.k = weight.size(1);
  p.groups = 1;
  constexpr int64_t kMost = (int64_t(1) << 31) - 256;  // kernels count rows and columns in 32 bits
  TORCHEXT_CHECK_VALUE(p.m <= kMost && p.n <= kMost && p.k <= kMost, kOp,
                       ": M, N and K must each be below 2^31 - 256 (got ", p.m, ", ", p.n, ", ",
                       p.k, "); split the product");
  set_scale(call, p);
  if (bias) check_bias(call, p);
  check_num_sms(call, p);
  p.a_dtype = input.scalar_type();
  p.b_dtype = weight.scalar_type();
  p.a = input.data_ptr();
  p.a_stride = rows.count > 1 ? rows.stride : round_up(p.k, 16);
  p.b = weight.data_ptr();
  p.b_stride = weight_rows.count > 1 ? weight_rows.stride : round_up(p.k, 16);

  std::vector<int64_t> sizes = sizes_of(x);
  sizes.back() = p.n;
  const Tensor out = empty_out(call, p, sizes, p.a_dtype);
  run(call, p, out);
  return out;
}

}  // namespace torchext
