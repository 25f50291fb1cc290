"""The table of what is measured: ops, models, layers and numbers of rows, with their priorities.

A `Case` is one op on one shape; every contender runs it on the same data. `select` sorts cases by
priority, so that a run that is cut short has measured the most important ones.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace

SUITES = (
    "quantize",
    "activation",
    "norm",
    "moe",
    "gemm",
    "grouped",
    "fused",
    "linear",
    "training",
)
SUBJECT = "torchext"  # the contender that the others are compared with


@dataclass(frozen=True)
class Layer:
    """A weight of n x k, as `nn.Linear(k, n)` holds it."""

    model: str
    name: str
    n: int
    k: int


# deepseek-v3: the six (N, K) that DeepGEMM publishes. Llama 3 70B: hidden 8192, MLP 28672, 64 query
# and 8 key-value heads of 128. Qwen3 32B: hidden 5120, MLP 25600, 64 and 8 heads of 128.
LAYERS = (
    Layer("deepseek-v3", "qkv_a_proj", 2112, 7168),
    Layer("deepseek-v3", "q_b_proj", 24576, 1536),
    Layer("deepseek-v3", "kv_b_proj", 32768, 512),
    Layer("deepseek-v3", "o_proj", 7168, 16384),
    Layer("deepseek-v3", "gate_up_proj", 4096, 7168),
    Layer("deepseek-v3", "down_proj", 7168, 2048),
    Layer("llama-3-70b", "qkv_proj", 10240, 8192),
    Layer("llama-3-70b", "o_proj", 8192, 8192),
    Layer("llama-3-70b", "gate_up_proj", 57344, 8192),
    Layer("llama-3-70b", "down_proj", 8192, 28672),
    Layer("qwen3-32b", "qkv_proj", 10240, 5120),
    Layer("qwen3-32b", "o_proj", 5120, 8192),
    Layer("qwen3-32b", "gate_up_proj", 51200, 5120),
    Layer("qwen3-32b", "down_proj", 5120, 25600),
)
MODELS = tuple(dict.fromkeys(layer.model for layer in LAYERS))

QUANTIZERS = (
    "quantize_1x128",
    "quantize_1x128_t",
    "quantize_1x128_dual",
    "quantize_1x128_dual_bias_grad",
    "quantize_128x128",
    "quantize_128x128_dual",
    "quantize_rowwise",
    "quantize_tensorwise",
    "dequantize",
)

# Activations fused with quantization, and their gradients; shape (rows, columns of the activation).
ACTIVATIONS = (
    *(
        f"{family}_quantize_1x128{ending}"
        for family in ("silu_mul", "gelu_mul", "gelu", "relu2")
        for ending in ("", "_t", "_dual")
    ),
    *(
        f"{family}_backward_quantize_1x128_dual"
        for family in ("silu_mul", "gelu_mul", "gelu", "relu2")
    ),
)

# Norms with a residual, fused with quantization, and their gradients; shape (rows, columns).
NORMS = (
    *(
        f"{norm}_quantize_1x128{ending}"
        for norm in ("rms_norm", "layer_norm")
        for ending in ("", "_dual")
    ),
    *(
        f"{norm}_backward{ending}"
        for norm in ("rms_norm", "layer_norm")
        for ending in ("", "_quantize_1x128_dual")
    ),
)

# Rows for experts, 8 for each token; shape (tokens, columns).
MOE = (
    "moe_route",
    "moe_permute_quantize_1x128",
    "moe_permute",
    "moe_combine",
    "moe_pack_1x128",
    "moe_unpack_1x128",
)
# torchext.nn.MoE, forward and backward, on a CPU; shape (tokens, hidden, intermediate, experts,
# choices).
MOE_LAYER = "layer_forward_backward"

# GEMMs of a layer: m rows of input, a weight [n, k]. fprop: Y[m, n], scales 1x128 by 128x128.
# wgrad: dW[n, k], scales 1x128 by 1x128, stored in BF16 or added to FP32. dgrad has no case: it is
# fprop with n and k exchanged.
FPROP, FPROP_ROWWISE, FPROP_TENSORWISE = "fprop", "fprop_rowwise", "fprop_tensorwise"
WGRAD, WGRAD_ACCUMULATE = "wgrad", "wgrad_accumulate"
# fprop of BF16 rows, whose quantization is part of the time. The contender `torchext_w8a16`
# multiplies the same rows, not quantized, by the same FP8 weight.
FPROP_BF16 = "fprop_bf16"
GEMMS = (FPROP, FPROP_ROWWISE, FPROP_TENSORWISE, WGRAD, WGRAD_ACCUMULATE)

# GEMMs of experts; shape (groups, m, n, k). contiguous, masked: each of `groups` weights [n, k] has
# about m rows of input. contiguous: groups lie one after another, with lengths that are multiples
# of 128, as DeepGEMM requires. masked: each group fills the first rows of a longer buffer. along_k:
# the wgrad [m, n] of each expert, from about k tokens, added to FP32. ragged: contiguous, with
# lengths from 1 to 2m.
CONTIGUOUS, MASKED, ALONG_K, RAGGED = "contiguous", "masked", "along_k", "ragged"
GROUPED = (CONTIGUOUS, MASKED, ALONG_K)

# GEMMs whose epilogue applies an activation and quantizes 1x128; shape (m, n, k), scales 1x128 by
# 128x128. swiglu halves the n columns of its output.
SWIGLU, GELU, RELU2 = "swiglu", "gelu", "relu2"
FUSED = (SWIGLU, GELU, RELU2)

# forward: no gradient; the weight was quantized before. forward_backward: the layer's part of a
# training step; the weight is quantized again.
FORWARD, FORWARD_BACKWARD = "forward", "forward_backward"
LINEARS = (FORWARD, FORWARD_BACKWARD)

# A training step of torchext.demo's transformer, optimizer included; shape (batch, length, width).
STEP = "step"

WITHOUT_FP8 = ("bf16", "fp32")
BY_NAME = ("copy", "torchext_w8a16")  # contenders only of the cases that name them

# Number of rows m -> priority of a DeepSeek-V3 fprop with m rows.
ROWS = {
    **{m: 0 for m in (64, 4096)},
    **{m: 1 for m in (1, 16, 128, 512, 2048, 8192)},
    **{m: 2 for m in (8, 32, 256, 1024)},
}


# (m, layer) whose energy is measured, which takes a second for each contender: all layers in
# training, and two in decoding.
ENERGY = {
    *((4096, layer.name) for layer in LAYERS if layer.model == "deepseek-v3"),
    (64, "gate_up_proj"),
    (64, "down_proj"),
}

# The experts of DeepSeek-V3: model width 7168, an expert's width 2048.
EXPERTS = (("experts_gate_up", 4096, 7168), ("experts_down", 7168, 2048))
# (groups, rows in a group) -> priority. Prefill has many rows, decoding few.
CONTIGUOUS_GROUPS = {(8, 4096): 0, (4, 8192): 1, (32, 256): 1}
MASKED_GROUPS = {(32, 16): 0, (8, 128): 1, (4, 256): 1, (2, 512): 2, (1, 1024): 2}
ALONG_K_GROUPS = {(8, 4096): 0, (4, 8192): 1}


@dataclass(frozen=True)
class Case:
    """One op on one shape; `shape` is (rows, columns) for quantizers, (groups, m, n, k) for grouped
    GEMMs, (batch, length, width) for training, else (m, n, k)."""

    suite: str
    op: str
    model: str
    layer: str
    shape: tuple[int, ...]
    priority: int = 1
    host: bool = False  # also measure the host time of a call
    energy: bool = False  # also measure energy, if the GPU has a counter
    threads: int = 0  # of the CPU; 0: all
    dtype: str = ""  # before quantization; default: bfloat16 on a GPU, float32 on a CPU
    peers: tuple[str, ...] = ()  # the only contenders beside torchext; (): all that can run

    @property
    def name(self) -> str:
        shape = "x".join(map(str, self.shape))
        threads = {0: "", 1: "1 thread"}.get(self.threads, f"{self.threads} threads")
        parts = (self.suite, self.op, self.model, self.layer, self.dtype, threads, shape)
        return "/".join(filter(None, parts))

    def has(self, contender: str) -> bool:
        """Whether `contender` takes part."""
        if contender == SUBJECT:
            return True
        return contender in self.peers if self.peers else contender not in BY_NAME

    def as_dict(self) -> dict:
        return asdict(self)

    @staticmethod
    def from_dict(values: dict) -> Case:
        """The case of `as_dict`, also of results that older versions wrote, with fewer fields."""
        lists = {key: tuple(values.get(key, ())) for key in ("shape", "peers")}
        return Case(**{**values, **lists})


def cuda_cases() -> list[Case]:
    cases = [
        Case("quantize", op, "activation", "host overhead", (128, 1024), 0, host=True)
        for op in ("quantize_1x128", "quantize_1x128_dual")
    ]
    small = (128, 1024, 1024)
    cases += [
        Case("gemm", FPROP, "small", "host overhead", small, 0, host=True),
        Case("grouped", CONTIGUOUS, "small", "host overhead", (2, 128, 1024, 1024), 0, host=True),
        Case("grouped", MASKED, "small", "host overhead", (2, 64, 1024, 1024), 0, host=True),
        Case("linear", FORWARD, "small", "host overhead", small, 0, host=True),
    ]
    for rows, columns, priority in ((4096, 7168, 0), (8192, 2048, 1), (16384, 16384, 2)):
        cases += [
            Case("quantize", op, "activation", "", (rows, columns), priority) for op in QUANTIZERS
        ]
    for rows, columns, priority in ((4096, 2048, 1), (8192, 14336, 2)):
        cases += [
            Case("activation", op, "mlp", "", (rows, columns), priority) for op in ACTIVATIONS
        ]
    for rows, columns, priority in ((4096, 7168, 1), (8192, 4096, 2)):
        cases += [Case("norm", op, "block", "", (rows, columns), priority) for op in NORMS]
    cases += [Case("moe", op, "deepseek-v3", "", (4096, 7168), 1) for op in MOE]
    for layer in LAYERS:
        where = (layer.model, layer.name)
        shape = {m: (m, layer.n, layer.k) for m in ROWS}
        if layer.model != "deepseek-v3":
            cases += [Case("gemm", FPROP, *where, shape[m], 2) for m in (64, 4096)]
            continue
        cases += [
            Case("gemm", FPROP, *where, shape[m], priority, energy=(m, layer.name) in ENERGY)
            for m, priority in ROWS.items()
        ]
        cases += [Case("gemm", op, *where, shape[4096], 1) for op in (WGRAD, WGRAD_ACCUMULATE)]
        cases += [
            Case("gemm", op, *where, shape[m], 2)
            for op in (FPROP_ROWWISE, FPROP_TENSORWISE)
            for m in (64, 4096)
        ]
        cases += [
            Case("linear", FORWARD_BACKWARD, *where, shape[4096], 0),
            Case("linear", FORWARD_BACKWARD, *where, shape[8192], 1),
            Case("linear", FORWARD, *where, shape[64], 2),
            Case("linear", FORWARD, *where, shape[4096], 2),
        ]
        if layer.name == "gate_up_proj":
            cases += [Case("fused", op, *where, shape[m], 1) for op in FUSED for m in (64, 4096)]
            cases += [bf16_rows(*where, shape[m], 2, fp32=False) for m in (1, 16)]
    for name, n, k in EXPERTS:
        where = ("deepseek-v3", name)
        for op, groups in ((CONTIGUOUS, CONTIGUOUS_GROUPS), (MASKED, MASKED_GROUPS)):
            cases += [
                Case("grouped", op, *where, (*of, n, k), priority)
                for of, priority in groups.items()
            ]
        cases += [
            Case("grouped", ALONG_K, *where, (groups, n, k, tokens), priority)
            for (groups, tokens), priority in ALONG_K_GROUPS.items()
        ]
    return cases


def bf16_rows(
    model: str, layer: str, shape: tuple[int, ...], priority: int = 1, *, fp32: bool = True
) -> Case:
    peers = ("torchext_w8a16", *WITHOUT_FP8) if fp32 else ("torchext_w8a16", "bf16")
    return Case("gemm", FPROP_BF16, model, layer, shape, priority, dtype="bfloat16", peers=peers)


# (n, k) of the plot of time against m, and its m. The FP8 weight alone exceeds most L2 caches.
SWEEP = (4096, 4096)
SWEEP_ROWS = tuple(2**i for i in range(13))
FEW_ROWS, MANY_ROWS = (1, 4, 16), 256
# Weights [n, k] beside the sweep's, and fprops with many rows.
WEIGHTS = ((4096, 7168), (7168, 2048), (2048, 2048))
LARGE = (
    (512, 4096, 7168), (256, 2048, 2048), (256, 4096, 7168), (1024, 7168, 2048), (2048, 4096, 4096),
)  # fmt: skip
STEPS = ((1024, 1024, 1024), (2048, 4096, 4096))  # of a layer: forward and backward


def cpu_cases() -> list[Case]:
    cube = ("cube", "", (1024, 1024, 1024))
    small = ("small", "host overhead", (16, 16, 128), 0)
    return [
        *goal_cases(),
        *(replace(case, threads=1, priority=max(1, case.priority)) for case in goal_cases()),
        Case("gemm", FPROP, *small, host=True, threads=1, peers=WITHOUT_FP8),
        Case("linear", FORWARD, *small, host=True, threads=1, peers=WITHOUT_FP8),
        *(
            Case("quantize", op, "activation", "against plain PyTorch", (1024, 7168), 2)
            for op in QUANTIZERS
        ),
        *(
            Case("activation", op, "mlp", "", (1024, 2048), 2, peers=("copy",))
            for op in ACTIVATIONS
        ),
        *(Case("norm", op, "block", "", (4096, 7168), 2, peers=("copy",)) for op in NORMS),
        *(Case("moe", op, "cube", "", (1024, 2048), 2, peers=("copy",)) for op in MOE),
        *(Case("gemm", op, *cube, 2) for op in GEMMS),
        *(Case("grouped", op, "cube", "", (4, 256, 512, 1024), 2) for op in GROUPED),
        *(Case("fused", op, *cube, 2) for op in FUSED),
        *(Case("linear", op, *cube, 2) for op in LINEARS),
    ]


def goal_cases() -> list[Case]:
    """Returns the cases of the CPU's goals (goals.py) and the sweep over m, on all threads."""
    rows = [(m, *weight) for weight in WEIGHTS for m in FEW_ROWS]
    dtypes = (("float32", "fp32"), ("bfloat16", "bf16"))
    return [
        *(
            Case(
                "quantize", op, "activation", "", (4096, 7168), int(op != "quantize_1x128"),
                peers=("copy",),
            )
            for op in QUANTIZERS
        ),
        *(
            Case("gemm", FPROP, "weight", "", shape, int(shape != LARGE[0]), peers=WITHOUT_FP8)
            for shape in LARGE
        ),
        *(bf16_rows("weight", "", shape, int(shape[1:] != WEIGHTS[0])) for shape in rows),
        bf16_rows("weight", "", (1, 1024, 1024), 0),
        *(bf16_rows("sweep", "", (m, *SWEEP), 2 if m > MANY_ROWS else 1) for m in SWEEP_ROWS),
        Case("grouped", RAGGED, "experts", "", (64, 32, 512, 2048), 0, peers=("bf16",)),
        *(
            Case(
                "linear", FORWARD_BACKWARD, "layer", "", shape, int(shape != STEPS[0]), dtype=dtype,
                peers=(peer,),
            )
            for shape in STEPS
            for dtype, peer in dtypes
        ),
        Case("training", STEP, "demo", "", (16, 128, 256), 0, peers=("fp32",)),
        Case("moe", MOE[1], "experts", "", (1024, 7168), 1, peers=("copy",)),
        Case("moe", MOE_LAYER, "experts", "", (128, 512, 512, 8, 2), 1, peers=WITHOUT_FP8),
    ]  # fmt: skip


def explicit_cases(m: int, n: int, k: int) -> list[Case]:
    """Every op, for one shape from the command line."""
    return [
        *(Case("quantize", op, "given", "", (m, k)) for op in QUANTIZERS),
        *(Case("activation", op, "given", "", (m, k)) for op in ACTIVATIONS),
        *(Case("norm", op, "given", "", (m, k)) for op in NORMS),
        *(Case("moe", op, "given", "", (m, k), peers=("copy",)) for op in MOE),
        *(Case("gemm", op, "given", "", (m, n, k)) for op in GEMMS),
        bf16_rows("given", "", (m, n, k)),
        *(Case("grouped", op, "given", "", (2, m, n, k)) for op in GROUPED),
        *(Case("fused", op, "given", "", (m, n, k)) for op in FUSED if op != SWIGLU or n % 2 == 0),
        *(Case("linear", op, "given", "", (m, n, k)) for op in LINEARS),
    ]


def select(
    device: str, suites: Iterable[str], shapes: Sequence[str] = (), quick: bool = False
) -> list[Case]:
    """The cases to run, most important first.

    shapes: names of models, which select cases of the device's table, or shapes `MxNxK`, for which
    every op is run. quick: only cases of priority 0, unless a shape is given. Raises ValueError for
    an unknown name.
    """
    given = [re.fullmatch(r"(\d+)x(\d+)x(\d+)", shape) for shape in shapes]
    table = cuda_cases() if device == "cuda" else cpu_cases()
    known = dict.fromkeys(case.model for case in table)
    for shape, match in zip(shapes, given, strict=True):
        if not match and shape not in known:
            raise ValueError(
                f"benchmarks: --shapes must be MxNxK or, on {device}, one of {', '.join(known)}"
                f" (got {shape!r})"
            )
    if shapes:
        table = [case for case in table if case.model in shapes]
        for match in filter(None, given):
            m, n, k = map(int, match.groups())
            table += explicit_cases(m, n, k)
    chosen = list(dict.fromkeys(case for case in table if case.suite in suites))
    if quick and not any(given):
        chosen = [case for case in chosen if case.priority == 0]
    return sorted(chosen, key=lambda case: case.priority)
