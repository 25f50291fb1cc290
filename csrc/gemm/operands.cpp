// Implements operands.h.
#include "operands.h"

#include <algorithm>

#include "../runtime/check.h"
#include "built.h"

namespace torchext {
namespace {

uintptr_t address(const void* data) {
  return reinterpret_cast<uintptr_t>(data);
}

FoldedRows folded(const char* op, const char* name, const Tensor& tensor) {
  const auto rows = fold_rows(tensor);
  TORCHEXT_CHECK_VALUE(rows.has_value(), op, ": the leading dimensions of ", name,
                       " must fold into one row stride (got shape ", shape_string(tensor),
                       ", strides ", stride_string(tensor),
                       "); make it contiguous, or fold it with reshape before quantizing it");
  return *rows;
}

}  // namespace

void check_operand(const char* op, const char* name, const Tensor& tensor, const FoldedRows& rows) {
  const int64_t k = tensor.size(tensor.dim() - 1);
  TORCHEXT_CHECK_TYPE(is_fp8(tensor.scalar_type()), op, ": ", name,
                      " must be torch.float8_e4m3fn or torch.float8_e5m2 (got ",
                      dtype_name(tensor.scalar_type()),
                      "); quantize it first, for example with torchext.ops.quantize_1x128");
  const bool contiguous = k <= 1 || tensor.stride(tensor.dim() - 1) == 1;
  const bool pitched = rows.count <= 1 || rows.stride % 16 == 0;
  const bool aligned = address(tensor.data_ptr()) % 16 == 0;
  if (tensor.numel() == 0 || (contiguous && pitched && aligned)) return;
  // The CPU kernels read rows of any pitch at any address, as files of weights hold them.
  TORCHEXT_CHECK_VALUE(
      contiguous && device_for(tensor, op) == nullptr, op, ": ", name,
      " must have contiguous rows and, on a GPU, start each at a multiple of 16 bytes, as "
      "torchext's quantizers lay them out: stride(-1) == 1, stride(-2) % 16 == 0, data_ptr() % 16 "
      "== 0 (got shape ",
      shape_string(tensor), ", strides ", stride_string(tensor),
      ", data_ptr() % 16 == ", address(tensor.data_ptr()) % 16,
      "); torchext.ops.restore_layout(data, scale) copies into rows of stride round_up(K, 16)");
}

namespace {

void check_shapes(const GemmCall& call, Grouping grouping) {
  const Tensor &a = call.a, &b = call.b;
  const auto check_dims = [&](const char* name, const Tensor& tensor, int64_t dims,
                              const char* shape) {
    TORCHEXT_CHECK_VALUE(tensor.dim() == dims, call.op, ": ", name, " must have shape ", shape,
                         " (got ", shape_string(tensor), ")");
  };
  switch (grouping) {
    case Grouping::kNone:
      TORCHEXT_CHECK_VALUE(a.dim() >= 1, call.op,
                           ": a must have shape [..., K] (got 0 dimensions)");
      check_dims("b", b, 2, "[N, K]");
      break;
    case Grouping::kAlongK:
      check_dims("a", a, 2, "[M, K]");
      check_dims("b", b, 2, "[N, K]");
      break;
    case Grouping::kCounts:
      check_dims("a", a, 3, "[G, M, K]");
      check_dims("b", b, 3, "[G, N, K]");
      TORCHEXT_CHECK_VALUE(a.size(0) == b.size(0), call.op,
                           ": a and b must agree in G, their first dimension (got a ",
                           shape_string(a), " and b ", shape_string(b), ")");
      break;
    default:
      check_dims("a", a, 2, "[M, K]");
      check_dims("b", b, 3, "[G, N, K]");
  }
  TORCHEXT_CHECK_VALUE(b.size(b.dim() - 1) == a.size(a.dim() - 1), call.op,
                       ": a and b must agree in K, their last dimension (got a ", shape_string(a),
                       " and b ", shape_string(b), "); b is [", b.dim() == 3 ? "G, " : "",
                       "N, K], not [", b.dim() == 3 ? "G, " : "", "K, N]");
}

void check_scale_tensor(const char* op, const char* name, const Tensor& scale) {
  TORCHEXT_CHECK_TYPE(scale.scalar_type() == ScalarType::Float, op, ": ", name,
                      " must be torch.float32 (got ", dtype_name(scale.scalar_type()),
                      "); convert it with .float(). torchext.ops converts torch.bfloat16 and "
                      "torch.float8_e8m0fnu itself, unless a compiled graph calls the op");
}

}  // namespace

Scale check_scale(const char* op, const char* name, const Tensor& scale) {
  check_scale_tensor(op, name, scale);
  if (scale.dim() == 0) return {static_cast<const float*>(scale.data_ptr()), 1, 1, 1, 0, 0, 0};
  const FoldedRows rows = folded(op, name, scale);
  const int64_t groups = scale.size(scale.dim() - 1);
  return {static_cast<const float*>(scale.data_ptr()),
          1,
          rows.count,
          groups,
          0,
          rows.count == 1 ? 0 : rows.stride,
          groups == 1 ? 0 : scale.stride(scale.dim() - 1)};
}

namespace {

// b_scale of M-grouped GEMMs: [G, rows, scale groups], or one scale for everything.
Scale check_batched_scale(const char* op, const char* name, const Tensor& scale) {
  check_scale_tensor(op, name, scale);
  const auto* data = static_cast<const float*>(scale.data_ptr());
  if (scale.numel() == 1) return {data, 1, 1, 1, 0, 0, 0};
  TORCHEXT_CHECK_VALUE(scale.dim() == 3, op, ": ", name,
                       " must have the three dimensions of b, [G, ..., ...], or be one scale in "
                       "all (got shape ",
                       shape_string(scale), ")");
  const auto stride = [&](int64_t dim) { return scale.size(dim) == 1 ? 0 : scale.stride(dim); };
  return {data, scale.size(0), scale.size(1), scale.size(2), stride(0), stride(1), stride(2)};
}

}  // namespace

// TMA loads 1x128 scales a column of a tile's rows at a time, whichever group the rows belong to.
void check_m_major(const char* op, const char* name, const Tensor& tensor, const Scale& scale) {
  const bool column = scale.rows <= 1 || scale.row_stride == 1;
  const bool folds = scale.batches <= 1 || scale.batch_stride == scale.rows;
  const bool pitch = scale.groups <= 1 || scale.group_stride % 4 == 0;
  const bool aligned = address(scale.data) % 16 == 0;
  TORCHEXT_CHECK_VALUE(tensor.numel() == 0 || (column && folds && pitch && aligned), op, ": ", name,
                       " with one scale for each row and 128 of K must be M-major, as torchext's "
                       "quantizers lay it out: strides (1, round_up(rows, 4)), leading dimensions "
                       "folded into rows, 16-byte aligned (got shape ",
                       shape_string(tensor), ", strides ", stride_string(tensor),
                       ", data_ptr() % 16 == ", address(scale.data) % 16,
                       "); torchext.ops.restore_layout(data, scale) copies it so");
}

namespace {

// The shapes that the scales may have, for errors.
std::string granularities(const GemmProblem& p) {
  const int64_t groups = ceil_div(p.k, kScaleGroup), blocks = ceil_div(p.n, kScaleGroup);
  std::ostringstream text;
  if (p.grouping == Grouping::kAlongK) {
    text << "a_scale [M, " << groups << "] with b_scale [N, " << groups << "] (1x128 with 1x128)";
  } else if (p.grouping == Grouping::kNone) {
    text << "a_scale [M, " << groups << "] with b_scale [" << blocks << ", " << groups
         << "] (1x128 with 128x128) or [N, " << groups
         << "] (1x128 with 1x128), or [M, 1] or [1, 1] with [N, 1] or [1, 1] (row-wise, "
            "tensor-wise)";
  } else {
    const char* rows = p.grouping == Grouping::kCounts ? "[G, M, " : "[M, ";
    text << "a_scale " << rows << groups << "] with b_scale [G, " << blocks << ", " << groups
         << "] (1x128 with 128x128) or [G, N, " << groups << "] (1x128 with 1x128), or " << rows
         << "1] or [1, 1] with [G, N, 1], [G, 1, 1] or [1, 1, 1] (row-wise, tensor-wise)";
  }
  return text.str();
}

void check_scales(const GemmCall& call, GemmProblem& p) {
  const bool batched = p.grouping != Grouping::kNone && p.grouping != Grouping::kAlongK;
  const Scale sa = check_scale(call.op, "a_scale", call.a_scale);
  const Scale sb = (batched ? check_batched_scale : check_scale)(call.op, "b_scale", call.b_scale);
  const int64_t groups = ceil_div(p.k, kScaleGroup);
  const bool each_batch = !batched || sb.batches == p.groups;
  const bool one_in_all = sb.batches == 1 && sb.rows == 1;
  const bool a_grouped = sa.rows == p.m && sa.groups == groups;
  const bool a_rowwise = (sa.rows == p.m || sa.rows == 1) && sa.groups == 1;
  const bool b_grouped = each_batch && sb.groups == groups;
  const bool b_rowwise =
      sb.groups == 1 && (one_in_all || (each_batch && (sb.rows == p.n || sb.rows == 1)));
  const bool along_k = p.grouping == Grouping::kAlongK;
  if (a_grouped && b_grouped && sb.rows == ceil_div(p.n, kScaleGroup) && !along_k) {
    p.granularity = Granularity::k1D2D;
    check_m_major(call.op, "a_scale", call.a_scale, sa);
  } else if (a_grouped && b_grouped && sb.rows == p.n) {
    p.granularity = Granularity::k1D1D;
    check_m_major(call.op, "a_scale", call.a_scale, sa);
    check_m_major(call.op, "b_scale", call.b_scale, sb);
  } else if (a_rowwise && b_rowwise && !along_k) {
    p.granularity = Granularity::kRowwise;
  } else {
    std::ostringstream sizes;
    if (batched) sizes << "G=" << p.groups << ", ";
    sizes << "M=" << (p.grouping == Grouping::kCounts ? p.group_rows : p.m);
    fail("ValueError", call.op, ": a_scale and b_scale fit no granularity for ", sizes.str(),
         ", N=", p.n, ", K=", p.k, ": expected ", granularities(p), "; got a_scale ",
         shape_string(call.a_scale), " and b_scale ", shape_string(call.b_scale));
  }
  p.a_scale = sa.data;
  p.a_scale_row = sa.row_stride;
  p.a_scale_k_block = sa.group_stride;
  p.b_scale = sb.data;
  p.b_scale_row = sb.row_stride;
  p.b_scale_k_block = sb.group_stride;
  p.b_scale_group = sb.batch_stride;
}

}  // namespace

void check_bias(const GemmCall& call, GemmProblem& p) {
  const Tensor& bias = *call.bias;
  TORCHEXT_CHECK_TYPE(is_wide(bias.scalar_type()), call.op,
                      ": bias must be bfloat16, float16 or float32 (got ",
                      dtype_name(bias.scalar_type()), ")");
  const int64_t last = bias.dim() - 1;
  bool fits = bias.dim() == call.b.dim() - 1 && bias.size(last) == p.n &&
              (p.n <= 1 || bias.stride(last) == 1);
  const char *shape = "[N] = [", *groups = "";
  std::string count;
  if (call.b.dim() == 3) {
    fits = fits && bias.size(0) == p.groups && (p.groups <= 1 || bias.stride(0) == p.n);
    shape = "[G, N] = [";
    count = std::to_string(p.groups);
    groups = ", ";
  }
  TORCHEXT_CHECK_VALUE(fits, call.op, ": bias must be contiguous of shape ", shape, count, groups,
                       p.n, "] (got ", shape_string(bias), ", strides ", stride_string(bias), ")");
  p.bias = bias.data_ptr();
  p.bias_dtype = bias.scalar_type();
}

void check_num_sms(const GemmCall& call, GemmProblem& p) {
  TORCHEXT_CHECK_VALUE(call.num_sms >= 0 && call.num_sms <= (1 << 16), call.op,
                       ": num_sms must be 0 (all SMs) or the number of SMs to use (got ",
                       call.num_sms, ")");
  p.num_sms = int(call.num_sms);
}

bool same_device(const Tensor& x, const Tensor& y) {
  return x.is_cpu() == y.is_cpu() && x.get_device_index() == y.get_device_index();
}

GemmProblem check_operands(const GemmCall& call, Grouping grouping) {
  const Tensor &a = call.a, &b = call.b;
  check_shapes(call, grouping);
  const FoldedRows a_rows = folded(call.op, "a", a), b_rows = folded(call.op, "b", b);
  GemmProblem p = {};
  p.op = call.op;
  p.grouping = grouping;
  p.m = a_rows.count;
  p.n = b.size(b.dim() - 2);
  p.k = a.size(a.dim() - 1);
  p.groups = b.dim() == 3 ? b.size(0) : 1;
  if (grouping == Grouping::kCounts) p.group_rows = a.size(1);
  check_operand(call.op, "a", a, a_rows);
  check_operand(call.op, "b", b, b_rows);
  constexpr int64_t kMost = (int64_t(1) << 31) - 256;  // TMA coordinates are int32
  TORCHEXT_CHECK_VALUE(p.m <= kMost && b_rows.count <= kMost && p.k <= kMost, call.op, ": ",
                       b.dim() == 3 ? "the rows of a, the rows of b in all" : "M, N",
                       " and K must each be below 2^31 - 256 (got ", p.m, ", ", b_rows.count, ", ",
                       p.k, "); split the product");
  check_scales(call, p);

  const std::pair<const char*, const Tensor*> others[] = {{"a_scale", &call.a_scale},
                                                          {"b", &b},
                                                          {"b_scale", &call.b_scale},
                                                          {"bias", call.bias ? &*call.bias : &a}};
  for (const auto& [name, tensor] : others)
    TORCHEXT_CHECK_VALUE(same_device(*tensor, a), call.op, ": ", name,
                         " must be on the device of a; move it there with .to(a.device)");
  if (call.bias) check_bias(call, p);
  check_num_sms(call, p);
  p.a_dtype = a.scalar_type();
  p.b_dtype = b.scalar_type();
  p.a = a.data_ptr();
  p.a_stride = a_rows.count > 1 ? a_rows.stride : round_up(p.k, 16);
  p.b = b.data_ptr();
  p.b_stride = b_rows.count > 1 ? b_rows.stride : round_up(p.k, 16);
  return p;
}

void check_group_index(const GemmCall& call, GemmProblem& p, const char* name, const Tensor& index,
                       int64_t length) {
  TORCHEXT_CHECK_TYPE(index.scalar_type() == ScalarType::Int, call.op, ": ", name,
                      " must be torch.int32 (got ", dtype_name(index.scalar_type()),
                      "); convert it with .int()");
  TORCHEXT_CHECK_VALUE(
      index.dim() == 1 && index.size(0) == length && (length <= 1 || index.stride(0) == 1), call.op,
      ": ", name, " must be contiguous of shape [", length, "] (got shape ", shape_string(index),
      ", strides ", stride_string(index), ")");
  TORCHEXT_CHECK_VALUE(same_device(index, call.a), call.op, ": ", name,
                       " must be on the device of a; move it there with .to(a.device)");
  p.group_index = static_cast<const int32_t*>(index.data_ptr());
}

ScalarType check_out_dtype(const GemmCall& call, std::optional<ScalarType> out_dtype) {
  const ScalarType dtype = out_dtype.value_or(ScalarType::BFloat16);
  TORCHEXT_CHECK_TYPE(is_wide(dtype), call.op,
                      ": out_dtype must be torch.bfloat16, torch.float16 or torch.float32 (got ",
                      dtype_name(dtype), ")");
  return dtype;
}

void check_out(const GemmCall& call, GemmProblem& p, const Tensor& out, bool accumulate,
               const std::vector<int64_t>& sizes, const std::string& shape) {
  TORCHEXT_CHECK_TYPE(is_wide(out.scalar_type()), call.op,
                      ": out must be bfloat16, float16 or float32 (got ",
                      dtype_name(out.scalar_type()), ")");
  TORCHEXT_CHECK_VALUE(same_device(out, call.a), call.op, ": out must be on the device of a");
  const int64_t last = int64_t(sizes.size()) - 1;
  bool fits = out.dim() == int64_t(sizes.size());
  for (int64_t i = 0; fits && i <= last; ++i) fits = out.size(i) == sizes[i];
  fits = fits && (p.n <= 1 || out.stride(last) == 1);
  if (fits && p.grouping == Grouping::kAlongK) {
    // A stack of matrices of rows: either of the two strides may be the smaller.
    const std::pair<int64_t, int64_t> rows{p.m > 1 ? out.stride(1) : p.n, p.m};
    const std::pair<int64_t, int64_t> matrices{
        p.groups > 1 ? out.stride(0) : std::max<int64_t>(p.m, 1) * rows.first, p.groups};
    const auto& inner = std::min(rows, matrices);
    const auto& outer = std::max(rows, matrices);
    fits = out.numel() == 0 ||
           (inner.first >= p.n && outer.first >= (inner.second - 1) * inner.first + p.n);
    p.out_stride = rows.first;
    p.out_group_stride = matrices.first;
  } else if (fits) {
    const auto rows = fold_rows(out);
    fits = rows.has_value() && (rows->count <= 1 || rows->stride >= p.n);
    if (fits) p.out_stride = rows->count > 1 ? rows->stride : p.n;
  }
  TORCHEXT_CHECK_VALUE(fits, call.op, ": out must have ", shape,
                       ", and contiguous rows that do not overlap (got shape ", shape_string(out),
                       ", strides ", stride_string(out), ")");
  p.out = out.data_ptr();
  p.out_dtype = out.scalar_type();
  p.accumulate = accumulate;
}

Tensor empty_out(const GemmCall& call, GemmProblem& p, const std::vector<int64_t>& sizes,
                 ScalarType dtype) {
  std::vector<int64_t> strides(sizes.size(), 1);
  for (size_t i = sizes.size() - 1; i-- > 0;)
    strides[i] = strides[i + 1] * std::max<int64_t>(sizes[i + 1], 1);
  Tensor out = empty_strided(sizes, strides, dtype, call.a);
  p.out = out.data_ptr();
  p.out_dtype = dtype;
  p.out_stride = p.n;
  p.out_group_stride = p.m * p.n;
  return out;
}

void run(const GemmCall& call, const GemmProblem& p, const Tensor& out, const Tensor* index,
         const Tensor* out_scale) {
  if (p.m == 0 || p.n == 0 || p.groups == 0) return;
  Device* device = device_for(call.a, call.op);
  if (device == nullptr) return fp8_gemm_cpu(p);
  if constexpr (kBuiltWithCuda) {
    const Buffer a = reads(call.a, "a");
    const Buffer written = p.accumulate ? updates(out, "out") : writes(out, "out");
    const std::initializer_list<Buffer> buffers = {
        a,
        reads(call.a_scale, "a_scale"),
        reads(call.b, "b"),
        reads(call.b_scale, "b_scale"),
        call.bias ? reads(*call.bias, "bias") : a,
        index ? reads(*index, "group_index") : a,
        written,
        out_scale ? writes(*out_scale, "out_scale") : written};
    const Path path = path_of(device->properties(), call.op);
    require_built(path, call.op);
    if (path == Path::sm90 && is_fp8(p.a_dtype))
      fp8_gemm_nt_sm90(*device, p, buffers);
    else
      fp8_gemm_nt_mma(*device, path, p, buffers);
  }
}

}  // namespace torchext
