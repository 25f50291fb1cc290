"""The ops as typed functions: quantization to FP8; FP8 matrix products, dense, grouped and fused.

Each is the function of the same name under `torch.ops.torchext`, with its errors as ValueError and
TypeError (the op itself, and so a compiled graph, can only raise a RuntimeError, which names that
class at its end). They run on CPU and CUDA tensors, under `torch.compile(fullgraph=True)` and CUDA
graphs, and are deterministic; CPU and CUDA give the same bits for every quantizer and for
`dequantize`.

Quantized tensors. `(data, scale)` stands for `data.float() * scale`: data are FP8, scale is the
FP32 multiplier that dequantizes. FP8 is `torch.float8_e4m3fn` (largest value 448) unless
`dtype=torch.float8_e5m2` (57344) is asked for. For every group of elements that share a scale

    scale = amax / largest          amax = max |x| over the group; FP32, rounded to nearest even
    data  = fp8(x / scale)          round to nearest even, saturating

- A group of zeros has scale 1; a scale is never below the smallest normal FP32, 2**-126.
- With `pow2_scale=True` a scale is rounded up to a power of two.
- NaN or Inf anywhere in a group makes its scale NaN, so that whatever is computed from the group is
  NaN and a training loop's overflow check sees it.

Layout. "Rows" below are all leading dimensions, folded: M = x.shape[:-1].numel(). Rows of data lie
P = round_up(K, 16) bytes apart, which is what TMA asks for; so 2-D data have strides (P, 1), and
data are contiguous only where K is a multiple of 16. Scales of 1x128 groups are M-major: 2-D
strides (1, round_up(M, 4)). A 1-D x is one row. Empty inputs give empty outputs. Inputs are read in
place, whatever their strides, if their rows fold: all rows lie one stride apart, as in a 2-D x, or
wherever `x.view(-1, K)` works. Others are refused, since they would have to be copied.

Copies. `clone`, `contiguous`, `cpu`, pickle, safetensors and the like keep a quantized tensor's
values, and in general lose its layout: the products refuse the copy. `restore_layout` gives it its
layout back.

Gradients. Outputs of the quantizers require none: the gradient stops there, as at a cast to
integers. (`torchext.nn.Linear` carries gradients around them.)
"""

from __future__ import annotations

from .._dispatch.declaration import DECLARATIONS
from .fused import (
    fp8_gemm_nt_gelu_quantize,
    fp8_gemm_nt_relu2_quantize,
    fp8_gemm_nt_swiglu_quantize,
)
from .gemm import fp8_gemm_nt
from .grouped import (
    k_grouped_fp8_gemm_nt,
    m_grouped_fp8_gemm_nt_contiguous,
    m_grouped_fp8_gemm_nt_masked,
)
from .quantize import (
    dequantize,
    quantize_1x128,
    quantize_1x128_dual,
    quantize_1x128_t,
    quantize_128x128,
    quantize_128x128_dual,
    quantize_rowwise,
    quantize_tensorwise,
    restore_layout,
)

__all__ = [
    "dequantize",
    "fp8_gemm_nt",
    "fp8_gemm_nt_gelu_quantize",
    "fp8_gemm_nt_relu2_quantize",
    "fp8_gemm_nt_swiglu_quantize",
    "k_grouped_fp8_gemm_nt",
    "m_grouped_fp8_gemm_nt_contiguous",
    "m_grouped_fp8_gemm_nt_masked",
    "quantize_1x128",
    "quantize_1x128_dual",
    "quantize_1x128_t",
    "quantize_128x128",
    "quantize_128x128_dual",
    "quantize_rowwise",
    "quantize_tensorwise",
    "restore_layout",
]

# The public ops: each is registered as torch.ops.torchext.NAME, too.
OPS = tuple(name for name in __all__ if name in DECLARATIONS)
