"""Problems: the data of a case, its float64 reference, and its numbers of FLOP and bytes.

Data is random, never all zeros: zeros hide unwritten outputs and run faster. torchext.reference
quantizes each operand once, so that all contenders multiply the same FP8 numbers. Functions import
torchext when they need it, so that the linear suite can measure peers without it. All problems
are in one file because they share its helpers, checks and bounds.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import cases
from .cases import Case

if TYPE_CHECKING:
    from torchext._catalog import Entry

GROUP = 128


def round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


def quantize(op: str, x: Tensor) -> Any:
    from torchext import reference

    return getattr(reference, op)(x)


def dequantize(data: Tensor, scale: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Dequantized data: exact if `dtype` is float64, else rounded from FP32 to `dtype`."""
    from torchext import reference

    wide = scale.double() if dtype == torch.float64 else scale
    return reference.dequantize(data, wide, out_dtype=dtype)


def entry(op: str) -> Entry:
    """The op's catalog entry, which has its least traffic and error bound."""
    from torchext._catalog import CATALOG

    return CATALOG[op]


class UnsupportedError(Exception):
    """A contender cannot run this case; the message says why."""


class WrongResultError(Exception):
    """A contender's result differs too much from the reference; `error` has the figures."""

    def __init__(self, message: str, error: dict):
        super().__init__(message)
        self.error = error


@dataclass
class Run:
    """One contender on one case.

    call: the timed work. check: takes the result of `call` and returns its error, or raises
    WrongResultError. before: runs before every call, untimed. bytes: least memory traffic, if it
    differs from the problem's.
    """

    call: Callable[[], object]
    check: Callable[[object], dict]
    before: Callable[[], object] | None = None
    bytes: float | None = None


def difference(result: Tensor, expected: Tensor) -> dict:
    """{"relative", "worst"}: the error of `result`.

    relative: |result - expected| / |expected|, Frobenius norms; shows a loss of accuracy in all
    elements. worst: the maximum over the elements of |result - expected| / (rms(expected) +
    |expected|); shows a single wrong element, and tolerates the rounding of large elements.
    """
    if result.shape != expected.shape:
        raise WrongResultError(
            f"result: expected shape {tuple(expected.shape)}, got {tuple(result.shape)}", {}
        )
    expected = expected.double()
    gap = result.double() - expected
    rms = expected.square().mean().sqrt()
    return {
        "relative": (gap.square().mean().sqrt() / rms).item(),
        "worst": (gap.abs() / (rms + expected.abs())).max().item(),
    }


def require(error: dict, relative: float, worst: float = math.inf, what: str = "result") -> dict:
    """Returns `error`; raises WrongResultError if it exceeds a bound or is NaN."""
    if not (error["relative"] <= relative and error["worst"] <= worst):
        raise WrongResultError(
            f"{what}: relative error {error['relative']:.2e} (bound {relative:.0e}), worst element"
            f" {error['worst']:.2e} (bound {worst:.0e})",
            error,
        )
    return error


def random_matrix(rows: int, columns: int, device: str, dtype: torch.dtype) -> Tensor:
    """N(0, 1) times powers of two that differ between rows and between groups of 128 columns."""
    x = torch.randn(rows, columns, device=device)
    row = torch.randint(-2, 3, (rows, 1), device=device)
    group = torch.randint(-2, 3, (1, -(-columns // GROUP)), device=device)
    exponent = row + group.repeat_interleave(GROUP, 1)[:, :columns]
    return (x * torch.exp2(exponent)).to(dtype)


class Problem:
    """Base class: case, device, and the FLOP and least bytes of a call (None: not counted)."""

    def __init__(self, case: Case, device: str):
        self.case = case
        self.device = device
        default = "bfloat16" if device == "cuda" else "float32"
        self.dtype: torch.dtype = getattr(torch, case.dtype or default)

    flops: float | None = None
    bytes: float | None = None


class BitsProblem(Problem):
    """An op whose result is specified to the bit."""

    expected: tuple[Tensor, ...]

    def __init__(self, case: Case, device: str):
        super().__init__(case, device)
        self.bytes: float = entry(case.op).bytes(*case.shape)

    def check_bits(self, result: object) -> dict:
        """Every bit equals torchext.reference."""
        outputs = result if isinstance(result, tuple) else (result,)
        if len(outputs) != len(self.expected):
            raise WrongResultError(f"expected {len(self.expected)} outputs, got {len(outputs)}", {})
        differing = {}
        for i, (got, want) in enumerate(zip(outputs, self.expected, strict=True)):
            if got.shape != want.shape or got.dtype != want.dtype:
                raise WrongResultError(
                    f"output {i}: expected {want.dtype} {tuple(want.shape)},"
                    f" got {got.dtype} {tuple(got.shape)}",
                    {},
                )
            unequal = (_bits(got) != _bits(want)).sum().item()
            if unequal:
                differing[f"output_{i}_elements"] = unequal
        if differing:
            raise WrongResultError(f"bits differ from torchext.reference: {differing}", differing)
        return {"relative": 0.0, "worst": 0.0}


class ActivationProblem(BitsProblem):
    """Operands of an activation, a norm or an op for experts' rows of [rows, columns], in BF16; for
    backward also its gradient."""

    def __init__(self, case: Case, device: str):
        super().__init__(case, device)
        make = next(iter(entry(case.op).sized.values()))
        given = make(*case.shape).to(device)
        self.args, self.kwargs = given.args, given.kwargs

    @cached_property
    def expected(self) -> tuple[Tensor, ...]:  # type: ignore[override]
        outputs = entry(self.case.op).reference(*self.args, **self.kwargs)
        return outputs if isinstance(outputs, tuple) else (outputs,)


class QuantizeProblem(BitsProblem):
    """Input of a quantizer: x [rows, columns] in BF16. Input of dequantize: x quantized 1x128."""

    def __init__(self, case: Case, device: str):
        super().__init__(case, device)
        rows, columns = case.shape
        self.x = random_matrix(rows, columns, device, torch.bfloat16)

    @cached_property
    def quantized(self) -> tuple[Tensor, Tensor]:
        return quantize("quantize_1x128", self.x)

    @cached_property
    def expected(self) -> tuple[Tensor, ...]:  # type: ignore[override]
        if self.case.op == "dequantize":
            return (dequantize(*self.quantized, torch.bfloat16),)
        return quantize(self.case.op, self.x)

    def check_close(self, data: Tensor, scale: Tensor, transposed: bool = False) -> dict:
        """The dequantized result is within 4 % of x; rounding to e4m3 costs 2.6 % RMS."""
        back = dequantize(data, scale)
        return require(difference(back, self.x.t() if transposed else self.x), 0.04)


def _bits(x: Tensor) -> Tensor:
    return x.contiguous().view({1: torch.uint8, 2: torch.int16, 4: torch.int32}[x.element_size()])


def product_tolerance(op: str = "fp8_gemm_nt") -> tuple[float, float]:
    bound: Any = entry(op).bound
    return bound.relative, bound.worst


class GemmProblem(Problem):
    """left [rows, inner] @ right [cols, inner].T; operands with and without quantization."""

    # Without promotion to FP32, the tensor core keeps only 14 bits of the sum over K.
    UNPROMOTED_TOLERANCE = (5e-2, 5e-1)

    def __init__(self, case: Case, device: str):
        super().__init__(case, device)
        m, n, k = case.shape
        wgrad = case.op in (cases.WGRAD, cases.WGRAD_ACCUMULATE)
        self.rows, self.cols, self.inner = (n, k, m) if wgrad else (m, n, k)
        self.flops = 2.0 * m * n * k
        self.bytes = self.traffic(operand=1)
        self.left = random_matrix(self.rows, self.inner, device, self.dtype)
        self.right = random_matrix(self.cols, self.inner, device, self.dtype)

    def traffic(self, operand: int) -> float:
        """Least bytes: operands read once, output written once, and read once if it accumulates.

        operand: bytes of an operand's element. The left operand of fprop_bf16 always has two.
        """
        out = 8 if self.case.op == cases.WGRAD_ACCUMULATE else 2
        shape = (self.rows, self.cols, self.inner)
        wider = (2 - operand) * self.rows * self.inner if self.case.op == cases.FPROP_BF16 else 0
        return entry("fp8_gemm_nt").bytes(*shape, operand=operand, out=out) + wider

    @cached_property
    def left_fp8(self) -> tuple[Tensor, Tensor]:
        return quantize(self._left_quantizer, self.left)

    @cached_property
    def right_fp8(self) -> tuple[Tensor, Tensor]:
        return quantize(self._right_quantizer, self.right)

    @property
    def _left_quantizer(self) -> str:
        return {
            cases.FPROP_ROWWISE: "quantize_rowwise",
            cases.FPROP_TENSORWISE: "quantize_tensorwise",
        }.get(self.case.op, "quantize_1x128")

    @property
    def _right_quantizer(self) -> str:
        blocks = self.case.op in (cases.FPROP, cases.FPROP_BF16)
        return "quantize_128x128" if blocks else self._left_quantizer

    @cached_property
    def expected_fp8(self) -> Tensor:
        """The product of the dequantized operands, in float64."""
        left, right = (dequantize(*pair, torch.float64) for pair in (self.left_fp8, self.right_fp8))
        return left @ right.t()

    @cached_property
    def expected_w8a16(self) -> Tensor:
        """The product of the unquantized left operand and the dequantized right one, in float64."""
        return self.left.double() @ dequantize(*self.right_fp8, torch.float64).t()

    @cached_property
    def expected(self) -> Tensor:
        """The product of the unquantized operands, in float64."""
        return self.left.double() @ self.right.double().t()

    def check_w8a16(self, result: object) -> dict:
        assert isinstance(result, Tensor)
        return require(difference(result, self.expected_w8a16), *product_tolerance("fp8_linear"))

    def check_fp8(self, result: object, promoted: bool = True) -> dict:
        assert isinstance(result, Tensor)
        tolerance = product_tolerance() if promoted else self.UNPROMOTED_TOLERANCE
        return require(difference(result, self.expected_fp8), *tolerance)

    def check_unquantized(self, result: object) -> dict:
        assert isinstance(result, Tensor)
        return require(difference(result, self.expected), *product_tolerance())


class GroupedProblem(Problem):
    """Grouped GEMMs of experts.

    Groups of rows (contiguous, masked): a [rows, k] times b[g] [n, k], scales 1x128 by 128x128,
    output in BF16. Along K: a [m, tokens] times b [n, tokens], scales 1x128, added to FP32.

    lengths: rows, or tokens, of each group: random, up to 30 % above or below the case's length,
    and multiples of 128 if groups lie one after another; ragged: from 1 to twice the case's length.
    room: the rows of a masked group's slice, 1.5 times the case's length, rounded up to 128.
    """

    def __init__(self, case: Case, device: str):
        super().__init__(case, device)
        self.groups, m, self.n, k = case.shape
        self.along_k, self.masked = case.op == cases.ALONG_K, case.op == cases.MASKED
        self.expected = k if self.along_k else m  # length of a group
        step = 1 if case.op == cases.MASKED else GROUP
        self.lengths = [
            max(step, round(self.expected * (0.7 + 0.6 * x) / step) * step)
            for x in torch.rand(self.groups).tolist()
        ]
        if case.op == cases.RAGGED:
            self.lengths = torch.randint(1, 2 * m + 1, (self.groups,)).tolist()
        total = sum(self.lengths)
        self.room = round_up(self.expected * 3 // 2, GROUP)  # masked
        self.rows: int = m if self.along_k else total
        self.k: int = total if self.along_k else k
        if self.masked:
            self.rows = self.groups * self.room
        weights = self.n if self.along_k else self.groups * self.n
        self.flops = 2.0 * total * self.n * (m if self.along_k else k)
        if self.along_k:
            shape = (m, self.n, total, self.groups)
            self.bytes = entry("k_grouped_fp8_gemm_nt").bytes(*shape, out=8)
        else:
            op = f"m_grouped_fp8_gemm_nt_{cases.MASKED if self.masked else cases.CONTIGUOUS}"
            self.bytes = entry(op).bytes(total, self.n, k, self.groups)
        self.left = random_matrix(self.rows, self.k, device, self.dtype)
        self.right = random_matrix(weights, self.k, device, self.dtype)

    @property
    def parts(self) -> list[slice]:
        """The columns of each group if grouped along K, else its rows."""
        if self.masked:
            return [slice(g * self.room, g * self.room + n) for g, n in enumerate(self.lengths)]
        ends = [sum(self.lengths[: g + 1]) for g in range(self.groups)]
        return [slice(end - n, end) for end, n in zip(ends, self.lengths, strict=True)]

    def index(self, values: list[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.int32, device=self.device)

    @property
    def offsets(self) -> Tensor:
        """The column, or row, after the last one of each group."""
        return self.index([part.stop for part in self.parts])

    @property
    def counts(self) -> Tensor:
        return self.index(self.lengths)

    @property
    def row_groups(self) -> Tensor:
        """The group of every row."""
        return self.index([g for g, length in enumerate(self.lengths) for _ in range(length)])

    @cached_property
    def left_fp8(self) -> tuple[Tensor, Tensor]:
        """(data, scales) of a. Masked: [groups, room, k] and [groups, room, k / 128]."""
        data, scale = quantize("quantize_1x128", self.left)
        if not self.masked:
            return data, scale
        size = (self.groups, self.room)
        return data.unflatten(0, size), scale.unflatten(0, size)

    @cached_property
    def right_fp8(self) -> tuple[Tensor, Tensor]:
        """(data, scales) of b. Groups of rows: [groups, n, k] and [groups, n / 128, k / 128]."""
        if self.along_k:
            return quantize("quantize_1x128", self.right)
        return quantize("quantize_128x128", self.right.unflatten(0, (self.groups, self.n)))

    def product(self, left: Tensor, right: Tensor) -> list[Tensor]:
        """The product of each group's part of two matrices."""
        if self.along_k:
            return [left[:, part] @ right[:, part].t() for part in self.parts]
        of_group = right.split(self.n)
        return [left[part] @ of_group[g].t() for g, part in enumerate(self.parts)]

    def results(self, result: object) -> list[Tensor]:
        """Each group's part of a contender's result, which may be the list of them."""
        if isinstance(result, list):
            return result
        assert isinstance(result, Tensor)
        if self.along_k:
            return list(result)
        flat = result.reshape(-1, self.n)
        return [flat[part] for part in self.parts]

    def dequantized(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        left, scale = self.left_fp8
        a = dequantize(left.reshape(-1, self.k), scale.reshape(self.rows, -1), dtype)
        right, scale = self.right_fp8
        if self.along_k:
            return a, dequantize(right, scale, dtype)
        b = [dequantize(right[g], scale[g], dtype) for g in range(self.groups)]
        return a, torch.cat(b)

    @cached_property
    def expected_fp8(self) -> list[Tensor]:
        return self.product(*self.dequantized(torch.float64))

    def check_fp8(self, result: object) -> dict:
        return self._check(result, self.expected_fp8)

    def check_unquantized(self, result: object) -> dict:
        return self._check(result, self.product(self.left.double(), self.right.double()))

    def _check(self, result: object, expected: list[Tensor]) -> dict:
        errors = [
            require(difference(got, want), *product_tolerance(), what=f"group {g}")
            for g, (got, want) in enumerate(zip(self.results(result), expected, strict=True))
        ]
        return max(errors, key=lambda error: error["relative"])


class FusedProblem(Problem):
    """activation(left [m, k] @ right [n, k].T), quantized 1x128.

    swiglu: the first n / 2 rows of right are the gate's.
    """

    UNQUANTIZED_TOLERANCE = 1e-2
    # The product is rounded to BF16 first: more values fall to the next FP8 number, 1/16 away.
    UNFUSED_TOLERANCE = 4e-2

    def __init__(self, case: Case, device: str):
        super().__init__(case, device)
        m, n, k = case.shape
        self.op = f"fp8_gemm_nt_{case.op}_quantize"
        self.columns = n // 2 if case.op == cases.SWIGLU else n  # of the result
        self.flops = 2.0 * m * n * k
        self.bytes = entry(self.op).bytes(m, n, k)
        self.left = random_matrix(m, k, device, self.dtype)
        # Divided by sqrt(k), so that activations see numbers of their interesting range.
        self.right = random_matrix(n, k, device, self.dtype) / math.sqrt(k)

    @cached_property
    def operands(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """a, a_scale, b, b_scale: scales 1x128 by 128x128."""
        return (*quantize("quantize_1x128", self.left), *quantize("quantize_128x128", self.right))

    def activate(self, product: Tensor) -> Tensor:
        if self.case.op == cases.SWIGLU:
            gate, up = product.chunk(2, dim=-1)
            return F.silu(gate) * up
        return F.gelu(product) if self.case.op == cases.GELU else product.relu().square()

    @cached_property
    def expected_fp8(self) -> Tensor:
        """The reference's result, dequantized, in float64."""
        data, scale = entry(self.op).reference(*self.operands)
        return dequantize(data, scale, torch.float64)

    def check_fp8(self, result: object) -> dict:
        bound: Any = entry(self.op).bound
        return require(self._difference(result), bound.relative, bound.worst)

    def check_unfused(self, result: object) -> dict:
        return require(self._difference(result), self.UNFUSED_TOLERANCE)

    def _difference(self, result: object) -> dict:
        assert isinstance(result, tuple)
        data, scale = result
        return difference(dequantize(data, scale, torch.float64), self.expected_fp8)

    def check_unquantized(self, result: object) -> dict:
        assert isinstance(result, Tensor)
        expected = self.activate(self.left.double() @ self.right.double().t())
        return require(difference(result, expected), self.UNQUANTIZED_TOLERANCE)


class LinearProblem(Problem):
    """A linear layer: x [m, k], weight [n, k], gradient [m, n]."""

    FP8_TOLERANCE = 10 ** (-25 / 20)  # an SQNR of 25 dB
    E5M2_TOLERANCE = 0.12  # for gradients in e5m2, and for one scale per row or tensor
    UNQUANTIZED_TOLERANCE = 1e-2

    def __init__(self, case: Case, device: str):
        super().__init__(case, device)
        m, n, k = case.shape
        self.backward = case.op == cases.FORWARD_BACKWARD
        self.flops = (6.0 if self.backward else 2.0) * m * n * k
        self.x = torch.randn(m, k, device=device, dtype=self.dtype)
        self.weight = torch.randn(n, k, device=device, dtype=self.dtype) / math.sqrt(k)
        self.grad = torch.randn(m, n, device=device, dtype=self.dtype)

    @cached_property
    def expected(self) -> tuple[Tensor, ...]:
        """The output and, with backward, the gradients of x and of the weight, in float64."""
        x, weight = self.x.double(), self.weight.double()
        output = x @ weight.t()
        if not self.backward:
            return (output,)
        grad = self.grad.double()
        return output, grad @ weight, grad.t() @ x

    def run(self, model: Callable[[Tensor], Tensor], weight: Tensor, tolerance: float) -> Run:
        """A Run that calls `model`, whose parameter is `weight`, on data of the weight's dtype.

        Before every forward_backward, the weight is written with equal values. This counts as an
        optimizer's change, so that a layer that caches the quantized weight quantizes it again.
        """
        x = self.x.to(weight.dtype, copy=True).requires_grad_(self.backward)
        grad = self.grad.to(weight.dtype)

        def forward() -> tuple[Tensor, ...]:
            with torch.no_grad():
                return (model(x),)

        def forward_backward() -> tuple[Tensor | None, ...]:
            output = model(x)
            output.backward(grad)
            return output, x.grad, weight.grad

        def new_step() -> None:
            x.grad = weight.grad = None
            with torch.no_grad():
                weight.add_(0)

        def check(result: object) -> dict:
            assert isinstance(result, tuple)
            names = ("output", "gradient of x", "gradient of the weight")
            errors = {}
            for what, got, want in zip(names, result, self.expected, strict=False):
                if got is None:
                    raise WrongResultError(f"{what}: none was computed", {})
                errors[what] = require(difference(got, want), tolerance, what=what)
            return max(errors.values(), key=lambda error: error["relative"])

        if self.backward:
            return Run(forward_backward, check, before=new_step)
        return Run(forward, check)


class TrainingProblem(Problem):
    """A step of torchext.demo: transformer, cross-entropy, backward and AdamW."""

    LOSS_TOLERANCE = 1e-2

    def __init__(self, case: Case, device: str):
        from torchext.demo.model import ByteTransformer

        super().__init__(case, device)
        batch, length, width = case.shape
        self.model = ByteTransformer(width).to(device)
        self.tokens = torch.randint(256, (batch, length + 1), device=device)

    @cached_property
    def expected(self) -> float:
        """The loss before the first step."""
        logits = self.model(self.tokens[:, :-1])
        return F.cross_entropy(logits.flatten(0, 1), self.tokens[:, 1:].flatten()).item()

    def run(self, model: torch.nn.Module) -> Run:
        """Trains `model`, a copy of the problem's, on the same tokens from the same start."""
        from torchext.demo.train import new_optimizer, training_step

        optimizer, start = new_optimizer(model), copy.deepcopy(model.state_dict())
        return Run(
            lambda: training_step(model, optimizer, self.tokens),
            self.check,
            before=lambda: model.load_state_dict(start),
        )

    def check(self, result: object) -> dict:
        """The loss is the unquantized model's."""
        assert isinstance(result, Tensor)
        error = abs(result.item() / self.expected - 1)
        return require({"relative": error, "worst": error}, self.LOSS_TOLERANCE, what="loss")


def _moe(case: Case, device: str) -> Problem:
    from .moe_layer import MoELayerProblem

    return (MoELayerProblem if case.op == cases.MOE_LAYER else ActivationProblem)(case, device)


PROBLEMS: dict[str, Callable[[Case, str], Problem]] = {
    "quantize": QuantizeProblem,
    "activation": ActivationProblem,
    "norm": ActivationProblem,
    "moe": _moe,
    "gemm": GemmProblem,
    "grouped": GroupedProblem,
    "fused": FusedProblem,
    "linear": LinearProblem,
    "training": TrainingProblem,
}
