// Host entry of the quantization ops: checks the input, lays out the outputs, and runs the CPU or
// the CUDA kernel. Layouts: torchext/ops/__init__.py.
#include "quantize.h"

#include "../runtime/check.h"
#include "../runtime/quantized_output.h"

namespace torchext {
namespace {

QuantizeOptions check_options(const char* op, const Tensor& x, OptionalDtype dtype,
                              bool pow2_scale) {
  TORCHEXT_CHECK_TYPE(is_wide(x.scalar_type()), op,
                      ": x must be torch.bfloat16, torch.float16 or torch.float32 (got ",
                      dtype_name(x.scalar_type()), "); convert it with .to() first");
  return {check_fp8_dtype(op, dtype) == ScalarType::Float8_e5m2, pow2_scale};
}

// A view of x as a matrix.
MatrixView check_input(const char* op, const Tensor& x) {
  TORCHEXT_CHECK_VALUE(x.dim() >= 1, op,
                       ": x must have shape [..., K] (got a 0-dimensional tensor); give it a "
                       "dimension with x.reshape(1)");
  const auto rows = fold_rows(x);
  TORCHEXT_CHECK_VALUE(rows.has_value(), op,
                       ": the leading dimensions of x must fold into one row stride (got shape ",
                       shape_string(x), ", strides ", stride_string(x), "); pass x.contiguous()");
  const int64_t last = x.dim() - 1;
  return {x.data_ptr(), x.scalar_type(), rows->count, x.size(last), rows->stride, x.stride(last)};
}

void check_matrices(const char* op, const Tensor& x) {
  TORCHEXT_CHECK_VALUE(x.dim() >= 2, op, ": x must have shape [..., N, K] (got ", shape_string(x),
                       "); give it a dimension with x[None]");
}

ScalarType fp8_dtype(const QuantizeOptions& options) {
  return options.e5m2 ? ScalarType::Float8_e5m2 : ScalarType::Float8_e4m3fn;
}

using Output = QuantizedOutput;

Output output(const Tensor& data, const Tensor& scale, int64_t scale_row_stride,
              int64_t scale_col_stride) {
  return {data,
          scale,
          {data.data_ptr(), round_up(data.size(data.dim() - 1), 16),
           static_cast<float*>(scale.data_ptr()), scale_row_stride, scale_col_stride}};
}

// An output for the transpose.
Output empty_groups_t(const MatrixView& view, const QuantizeOptions& options, const Tensor& like) {
  return empty_quantized_groups({view.cols, view.rows}, view.cols, options, like);
}

Output empty_blocks(const Tensor& x, const QuantizeOptions& options) {
  std::vector<int64_t> sizes = sizes_of(x);
  const Tensor data = empty_data(sizes, fp8_dtype(options), x);
  for (size_t i = sizes.size() - 2; i < sizes.size(); ++i)
    sizes[i] = ceil_div(sizes[i], kScaleGroup);
  const int64_t groups = sizes.back();
  return output(data, empty_strided(sizes, folded_strides(sizes, groups, 1), ScalarType::Float, x),
                groups, 1);
}

// Quantizes x, its transpose, or both with 1x128 scales.
void quantize_groups(const char* op, const Tensor& x, const MatrixView& view,
                     const QuantizeOptions& options, const Output* row, const Output* transposed) {
  if (view.rows == 0 || view.cols == 0) return;
  const QuantizedView* row_view = row ? &row->view : nullptr;
  const QuantizedView* transposed_view = transposed ? &transposed->view : nullptr;
  Device* device = device_for(x, op);
  if (device == nullptr) return quantize_groups_cpu(view, options, row_view, transposed_view);
  if constexpr (kBuiltWithCuda) {
    const Output& first = row ? *row : *transposed;
    const Output& last = transposed ? *transposed : *row;
    quantize_groups_cuda(*device, view, options, row_view, transposed_view,
                         {reads(x, "x"), writes(first.data, "data"), writes(first.scale, "scale"),
                          writes(last.data, "data_t"), writes(last.scale, "scale_t")});
  }
}

// The memory from the first to the last element of an array of rows and columns.
Buffer range(const void* data, int64_t rows, int64_t cols, int64_t row_stride, int64_t col_stride,
             ScalarType dtype, Access access, const char* name) {
  const int64_t last = (rows - 1) * row_stride + (cols - 1) * col_stride;
  return {data, size_t((last + 1) * element_size(dtype)), access, name};
}

// Quantizes the blocks of one matrix; `transposed` may be nullptr.
void quantize_blocks(Device* device, const MatrixView& x, const QuantizeOptions& options,
                     const QuantizedView& out, uint8_t* transposed, int64_t transposed_stride) {
  if (device == nullptr) return quantize_blocks_cpu(x, options, out, transposed, transposed_stride);
  if constexpr (kBuiltWithCuda) {
    constexpr ScalarType kByte = ScalarType::Float8_e4m3fn;
    const Buffer data =
        range(out.data, x.rows, x.cols, out.data_stride, 1, kByte, Access::write, "data");
    quantize_blocks_cuda(
        *device, x, options, out, transposed, transposed_stride,
        {range(x.data, x.rows, x.cols, x.row_stride, x.col_stride, x.dtype, Access::read, "x"),
         data,
         range(out.scale, ceil_div(x.rows, kScaleGroup), ceil_div(x.cols, kScaleGroup),
               out.scale_row_stride, out.scale_col_stride, ScalarType::Float, Access::write,
               "scale"),
         transposed ? range(transposed, x.cols, x.rows, transposed_stride, 1, kByte, Access::write,
                            "data_t")
                    : data});
  }
}

// Quantizes the blocks of each matrix of x. Blocks do not straddle matrices. So matrices that
// follow each other in memory and consist of whole blocks count as one matrix, unless they are to
// be transposed.
void quantize_blocks(const char* op, const Tensor& x, const QuantizeOptions& options,
                     const Output& out, const Tensor* data_t) {
  if (x.numel() == 0) return;
  Device* device = device_for(x, op);
  const int64_t last = x.dim() - 1, rows = x.size(last - 1), cols = x.size(last);
  const int64_t transposed_stride = round_up(rows, 16);
  auto* transposed = data_t ? static_cast<uint8_t*>(data_t->data_ptr()) : nullptr;
  const auto folded = fold_rows(x);
  if (folded && (folded->count == rows || (!data_t && rows % kScaleGroup == 0))) {
    const MatrixView all{x.data_ptr(), x.scalar_type(), folded->count,
                         cols,         folded->stride,  x.stride(last)};
    return quantize_blocks(device, all, options, out.view, transposed, transposed_stride);
  }
  const int64_t matrices = x.numel() / (rows * cols);
  for (int64_t i = 0; i < matrices; ++i) {
    int64_t rest = i, offset = 0;
    for (int64_t dim = last - 2; dim >= 0; --dim) {
      offset += rest % x.size(dim) * x.stride(dim);
      rest /= x.size(dim);
    }
    const MatrixView matrix{
        static_cast<const char*>(x.data_ptr()) + offset * element_size(x.scalar_type()),
        x.scalar_type(),
        rows,
        cols,
        x.stride(last - 1),
        x.stride(last)};
    QuantizedView view = out.view;
    view.data = static_cast<uint8_t*>(view.data) + i * rows * view.data_stride;
    view.scale += i * ceil_div(rows, kScaleGroup) * view.scale_row_stride;
    quantize_blocks(device, matrix, options, view,
                    transposed ? transposed + i * cols * transposed_stride : nullptr,
                    transposed_stride);
  }
}

void fill_with_one(const Tensor& scale) {
  torch::stable::fill_(const_cast<Tensor&>(scale), 1.0);
}

}  // namespace

std::tuple<Tensor, Tensor> quantize_1x128(const Tensor& x, OptionalDtype dtype, bool pow2_scale) {
  constexpr const char* kOp = "quantize_1x128";
  const QuantizeOptions options = check_options(kOp, x, dtype, pow2_scale);
  const MatrixView view = check_input(kOp, x);
  const Output row = empty_quantized_groups(sizes_of(x), view.rows, options, x);
  quantize_groups(kOp, x, view, options, &row, nullptr);
  return {row.data, row.scale};
}

std::tuple<Tensor, Tensor> quantize_1x128_t(const Tensor& x, OptionalDtype dtype, bool pow2_scale) {
  constexpr const char* kOp = "quantize_1x128_t";
  const QuantizeOptions options = check_options(kOp, x, dtype, pow2_scale);
  const MatrixView view = check_input(kOp, x);
  const Output transposed = empty_groups_t(view, options, x);
  quantize_groups(kOp, x, view, options, nullptr, &transposed);
  return {transposed.data, transposed.scale};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> quantize_1x128_dual(const Tensor& x, OptionalDtype dtype,
                                                               bool pow2_scale) {
  constexpr const char* kOp = "quantize_1x128_dual";
  const QuantizeOptions options = check_options(kOp, x, dtype, pow2_scale);
  const MatrixView view = check_input(kOp, x);
  const Output row = empty_quantized_groups(sizes_of(x), view.rows, options, x);
  const Output transposed = empty_groups_t(view, options, x);
  quantize_groups(kOp, x, view, options, &row, &transposed);
  return {row.data, row.scale, transposed.data, transposed.scale};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> quantize_1x128_dual_bias_grad(
    const Tensor& x, OptionalDtype dtype, bool pow2_scale) {
  constexpr const char* kOp = "quantize_1x128_dual_bias_grad";
  const QuantizeOptions options = check_options(kOp, x, dtype, pow2_scale);
  const MatrixView view = check_input(kOp, x);
  const Output row = empty_quantized_groups(sizes_of(x), view.rows, options, x);
  const Output transposed = empty_groups_t(view, options, x);
  const Tensor sums = empty_strided({view.cols}, {1}, ScalarType::Float, x);
  if (view.rows == 0 || view.cols == 0) {
    torch::stable::fill_(const_cast<Tensor&>(sums), 0.0);
    return {row.data, row.scale, transposed.data, transposed.scale, sums};
  }
  auto* bias_grad = static_cast<float*>(sums.data_ptr());
  Device* device = device_for(x, kOp);
  if (device == nullptr) {
    quantize_groups_bias_grad_cpu(view, options, row.view, transposed.view, bias_grad);
  } else if constexpr (kBuiltWithCuda) {
    const Tensor partial_sums = empty_strided({ceil_div(view.rows, kScaleGroup), view.cols},
                                              {view.cols, 1}, ScalarType::Float, x);
    quantize_groups_bias_grad_cuda(
        *device, view, options, row.view, transposed.view, bias_grad,
        static_cast<float*>(partial_sums.data_ptr()),
        {reads(x, "x"), writes(row.data, "data"), writes(row.scale, "scale"),
         writes(transposed.data, "data_t"), writes(transposed.scale, "scale_t"),
         writes(sums, "bias_grad"), writes(partial_sums, "partial sums")});
  }
  return {row.data, row.scale, transposed.data, transposed.scale, sums};
}

std::tuple<Tensor, Tensor> quantize_128x128(const Tensor& x, OptionalDtype dtype, bool pow2_scale) {
  constexpr const char* kOp = "quantize_128x128";
  const QuantizeOptions options = check_options(kOp, x, dtype, pow2_scale);
  check_matrices(kOp, x);
  const Output out = empty_blocks(x, options);
  quantize_blocks(kOp, x, options, out, nullptr);
  return {out.data, out.scale};
}

std::tuple<Tensor, Tensor, Tensor> quantize_128x128_dual(const Tensor& x, OptionalDtype dtype,
                                                         bool pow2_scale) {
  constexpr const char* kOp = "quantize_128x128_dual";
  const QuantizeOptions options = check_options(kOp, x, dtype, pow2_scale);
  check_matrices(kOp, x);
  const Output out = empty_blocks(x, options);
  std::vector<int64_t> transposed = sizes_of(x);
  std::swap(transposed[transposed.size() - 2], transposed.back());
  const Tensor data_t = empty_data(transposed, fp8_dtype(options), x);
  quantize_blocks(kOp, x, options, out, &data_t);
  return {out.data, out.scale, data_t};
}

std::tuple<Tensor, Tensor> quantize_rowwise(const Tensor& x, OptionalDtype dtype, bool pow2_scale) {
  constexpr const char* kOp = "quantize_rowwise";
  const QuantizeOptions options = check_options(kOp, x, dtype, pow2_scale);
  const MatrixView view = check_input(kOp, x);
  std::vector<int64_t> sizes = sizes_of(x);
  const Tensor data = empty_data(sizes, fp8_dtype(options), x);
  sizes.back() = 1;
  const Tensor scale = empty_strided(sizes, folded_strides(sizes, 1, 1), ScalarType::Float, x);
  const Output out = output(data, scale, 1, 1);
  if (view.cols == 0) {
    fill_with_one(scale);
  } else if (view.rows > 0) {
    Device* device = device_for(x, kOp);
    if (device == nullptr) {
      quantize_rowwise_cpu(view, options, out.view);
    } else if constexpr (kBuiltWithCuda) {
      quantize_rowwise_cuda(*device, view, options, out.view,
                            {reads(x, "x"), writes(out.data, "data"), writes(scale, "scale")});
    }
  }
  return {out.data, scale};
}

std::tuple<Tensor, Tensor> quantize_tensorwise(const Tensor& x, OptionalDtype dtype,
                                               bool pow2_scale) {
  constexpr const char* kOp = "quantize_tensorwise";
  const QuantizeOptions options = check_options(kOp, x, dtype, pow2_scale);
  const MatrixView view = check_input(kOp, x);
  const Tensor scale = empty_strided({1, 1}, {1, 1}, ScalarType::Float, x);
  const Output out = output(empty_data(sizes_of(x), fp8_dtype(options), x), scale, 1, 1);
  if (view.rows == 0 || view.cols == 0) {
    fill_with_one(scale);
  } else {
    Device* device = device_for(x, kOp);
    if (device == nullptr) {
      quantize_tensorwise_cpu(view, options, out.view);
    } else if constexpr (kBuiltWithCuda) {
      const Tensor amax = empty_strided({1}, {1}, ScalarType::Int, x);
      quantize_tensorwise_cuda(
          *device, view, options, out.view, static_cast<uint32_t*>(amax.data_ptr()),
          {reads(x, "x"), writes(out.data, "data"), writes(scale, "scale"), updates(amax, "amax")});
    }
  }
  return {out.data, scale};
}

Tensor dequantize(const Tensor& data, const Tensor& scale, ScalarType out_dtype) {
  constexpr const char* kOp = "dequantize";
  TORCHEXT_CHECK_TYPE(is_fp8(data.scalar_type()), kOp,
                      ": data must be torch.float8_e4m3fn or torch.float8_e5m2 (got ",
                      dtype_name(data.scalar_type()), ")");
  TORCHEXT_CHECK_TYPE(scale.scalar_type() == ScalarType::Float, kOp,
                      ": scale must be torch.float32 (got ", dtype_name(scale.scalar_type()),
                      "); convert it with .float()");
  TORCHEXT_CHECK_TYPE(is_wide(out_dtype), kOp,
                      ": out_dtype must be torch.bfloat16, torch.float16 or torch.float32 (got ",
                      dtype_name(out_dtype), ")");
  TORCHEXT_CHECK_VALUE(data.dim() >= 1, kOp, ": data must have at least one dimension (got data ",
                       shape_string(data), " and scale ", shape_string(scale), ")");
  TORCHEXT_CHECK_VALUE(
      data.is_cpu() == scale.is_cpu() && data.get_device_index() == scale.get_device_index(), kOp,
      ": scale must be on the device of data; move it there with .to(data.device)");
  const bool scalar = scale.dim() == 0;
  const auto rows = fold_rows(data);
  const auto scale_rows = scalar ? FoldedRows{1, 0} : fold_rows(scale);
  TORCHEXT_CHECK_VALUE(rows.has_value() && scale_rows.has_value(), kOp,
                       ": the leading dimensions of data and of scale must each fold into one row "
                       "stride (got data ",
                       shape_string(data), ", strides ", stride_string(data), ", and scale ",
                       shape_string(scale), ", strides ", stride_string(scale),
                       "); pass data.contiguous()");
  const int64_t columns = data.size(data.dim() - 1);
  const int64_t scale_columns = scalar ? 1 : scale.size(scale.dim() - 1);
  const bool each_row = scale_rows->count == rows->count;
  const bool row_blocks = scale_rows->count == ceil_div(rows->count, kScaleGroup);
  const bool column_groups = scale_columns == ceil_div(columns, kScaleGroup);
  TORCHEXT_CHECK_VALUE((column_groups && (each_row || row_blocks)) ||
                           (scale_columns == 1 && (each_row || scale_rows->count == 1)),
                       kOp, ": scale must have, for data of ", rows->count, " rows and ", columns,
                       " columns, shape [", rows->count, ", ", ceil_div(columns, kScaleGroup),
                       "] (1x128), [", ceil_div(rows->count, kScaleGroup), ", ",
                       ceil_div(columns, kScaleGroup), "] (128x128), [", rows->count,
                       ", 1] (row-wise) or [1, 1] (tensor-wise) (got ", shape_string(scale), ")");

  const std::vector<int64_t> sizes = sizes_of(data);
  Tensor y = empty_strided(sizes, folded_strides(sizes, columns, 1), out_dtype, data);
  DequantizeView view;
  view.data = data.data_ptr();
  view.data_row_stride = rows->stride;
  view.data_col_stride = data.stride(data.dim() - 1);
  view.e5m2 = data.scalar_type() == ScalarType::Float8_e5m2;
  view.scale = static_cast<const float*>(scale.data_ptr());
  view.scale_row_stride = scale_rows->stride;
  view.scale_col_stride = scalar ? 0 : scale.stride(scale.dim() - 1);
  view.rows = rows->count;
  view.cols = columns;
  view.row_group = each_row                 ? 1
                   : scale_rows->count == 1 ? std::max<int64_t>(view.rows, 1)
                                            : kScaleGroup;
  view.col_group = column_groups ? kScaleGroup : std::max<int64_t>(columns, 1);
  view.y = y.data_ptr();
  view.y_dtype = out_dtype;
  view.y_stride = columns;
  if (view.rows == 0 || view.cols == 0) return y;
  Device* device = device_for(data, kOp);
  if (device == nullptr) {
    dequantize_cpu(view);
  } else if constexpr (kBuiltWithCuda) {
    dequantize_cuda(*device, view, {reads(data, "data"), reads(scale, "scale"), writes(y, "y")});
  }
  return y;
}

}  // namespace torchext
