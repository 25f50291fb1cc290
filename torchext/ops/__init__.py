"""The ops as typed functions: quantization to FP8, also fused with norms, activations and their
gradients, FP8 GEMMs (dense, grouped and fused), the product of an input that is not quantized with
an FP8 weight, and rows for the experts of a mixture.

Each function calls the op of the same name under `torch.ops.torchext`. The function raises
ValueError and TypeError; the op itself, and so a compiled graph, can only raise a RuntimeError,
whose message ends with the name of that class. The ops run on CPU and CUDA tensors, under
`torch.compile(fullgraph=True)` and in CUDA graphs, and are deterministic. CPU and CUDA give the
same bits for every quantizer, fused or not, and for `dequantize`.

Quantized tensors. The pair `(data, scale)` represents `data.float() * scale`: data are FP8, scale
is the FP32 multiplier that dequantizes. FP8 is `torch.float8_e4m3fn` (largest value 448) unless the
caller passes `dtype=torch.float8_e5m2` (57344). For all elements that share a scale:

    scale = amax / largest          amax = max |x| over these elements; FP32, round to nearest even
    data  = fp8(x / scale)          round to nearest even, saturating

- If all of these elements are zero, scale is 1. A scale is never below 2**-126, the smallest normal
  FP32 number.
- With `pow2_scale=True`, a scale is rounded up to a power of two.
- A NaN or Inf among these elements makes their scale NaN. So everything computed from them is NaN,
  and a training loop's overflow check sees it.

Layout. "Rows" below are all leading dimensions, folded: M = x.shape[:-1].numel(). Rows of data lie
P = round_up(K, 16) bytes apart, because TMA requires a multiple of 16 bytes. So 2-D data have
strides (P, 1), and are contiguous only if K is a multiple of 16. Scales of 1x128 groups are
M-major: 2-D scales have strides (1, round_up(M, 4)). A 1-D x is one row. Empty inputs give empty
outputs. Inputs may have any strides, and are read in place, if their rows fold: if one stride
separates all rows, as in every 2-D x, and wherever `x.view(-1, K)` works. Other inputs raise a
ValueError, since they would have to be copied.

Copies. `clone`, `contiguous`, `cpu`, pickle, safetensors and the like keep a quantized tensor's
values but in general lose its layout, and the GEMMs refuse such a copy. `restore_layout` restores
the layout.

Gradients. Outputs of the quantizers never require a gradient, like those of a cast to integers.
`torchext.nn.Linear` computes its gradients itself.
"""

from __future__ import annotations

from .._dispatch.declaration import DECLARATIONS
from .activation import (
    gelu_mul_quantize_1x128,
    gelu_mul_quantize_1x128_dual,
    gelu_mul_quantize_1x128_t,
    gelu_quantize_1x128,
    gelu_quantize_1x128_dual,
    gelu_quantize_1x128_t,
    relu2_quantize_1x128,
    relu2_quantize_1x128_dual,
    relu2_quantize_1x128_t,
    silu_mul_quantize_1x128,
    silu_mul_quantize_1x128_dual,
    silu_mul_quantize_1x128_t,
)
from .activation_gradient import (
    gelu_backward_quantize_1x128_dual,
    gelu_mul_backward_quantize_1x128_dual,
    relu2_backward_quantize_1x128_dual,
    silu_mul_backward_quantize_1x128_dual,
)
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
from .moe import moe_combine, moe_permute, moe_permute_quantize_1x128, moe_route
from .moe_messages import moe_pack_1x128, moe_unpack_1x128
from .norm import (
    layer_norm_quantize_1x128,
    layer_norm_quantize_1x128_dual,
    rms_norm_quantize_1x128,
    rms_norm_quantize_1x128_dual,
)
from .norm_backward import (
    layer_norm_backward,
    layer_norm_backward_quantize_1x128_dual,
    rms_norm_backward,
    rms_norm_backward_quantize_1x128_dual,
)
from .quantize import (
    dequantize,
    quantize_1x128,
    quantize_1x128_dual,
    quantize_1x128_dual_bias_grad,
    quantize_1x128_t,
    quantize_128x128,
    quantize_128x128_dual,
    quantize_rowwise,
    quantize_tensorwise,
    restore_layout,
)
from .weights_only import fp8_linear

__all__ = [
    "dequantize",
    "fp8_gemm_nt",
    "fp8_gemm_nt_gelu_quantize",
    "fp8_gemm_nt_relu2_quantize",
    "fp8_gemm_nt_swiglu_quantize",
    "fp8_linear",
    "gelu_backward_quantize_1x128_dual",
    "gelu_mul_backward_quantize_1x128_dual",
    "gelu_mul_quantize_1x128",
    "gelu_mul_quantize_1x128_dual",
    "gelu_mul_quantize_1x128_t",
    "gelu_quantize_1x128",
    "gelu_quantize_1x128_dual",
    "gelu_quantize_1x128_t",
    "k_grouped_fp8_gemm_nt",
    "layer_norm_backward",
    "layer_norm_backward_quantize_1x128_dual",
    "layer_norm_quantize_1x128",
    "layer_norm_quantize_1x128_dual",
    "m_grouped_fp8_gemm_nt_contiguous",
    "m_grouped_fp8_gemm_nt_masked",
    "moe_combine",
    "moe_pack_1x128",
    "moe_permute",
    "moe_permute_quantize_1x128",
    "moe_route",
    "moe_unpack_1x128",
    "quantize_1x128",
    "quantize_1x128_dual",
    "quantize_1x128_dual_bias_grad",
    "quantize_1x128_t",
    "quantize_128x128",
    "quantize_128x128_dual",
    "quantize_rowwise",
    "quantize_tensorwise",
    "relu2_backward_quantize_1x128_dual",
    "relu2_quantize_1x128",
    "relu2_quantize_1x128_dual",
    "relu2_quantize_1x128_t",
    "restore_layout",
    "rms_norm_backward",
    "rms_norm_backward_quantize_1x128_dual",
    "rms_norm_quantize_1x128",
    "rms_norm_quantize_1x128_dual",
    "silu_mul_backward_quantize_1x128_dual",
    "silu_mul_quantize_1x128",
    "silu_mul_quantize_1x128_dual",
    "silu_mul_quantize_1x128_t",
]

# The public ops: each is also registered as torch.ops.torchext.NAME.
OPS = tuple(name for name in __all__ if name in DECLARATIONS)
