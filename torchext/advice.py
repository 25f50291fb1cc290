"""`torchext.advise`: which layers of a model FP8 makes faster, before any of them is converted."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from typing import Any, Literal, get_args

import torch

from . import _conversion_rules as rules
from ._advice_rates import Product, Rates, cpu_rates, gpu_rates, name_of_gpu
from ._conversion_result import ReadOnlyDict, experts_of_a_token, indented
from ._experts import find_experts

Use = Literal["training", "w8a8", "w8a16"]
_WIDE_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclasses.dataclass(frozen=True)
class LayerAdvice:
    """The predicted effect of FP8 on a linear layer, or on a module of experts.

    Attributes:
        name: the layer's fully qualified name.
        shapes: the shapes of its weights: [N, K], or [E, N, K] with a matrix for each of E experts.
        rows: the number of rows of its inputs: tokens, times the experts that each token chooses.
        flops: the operations of all its products, two for each multiplication.
        wide_bytes, fp8_bytes: the fewest bytes that its products and quantizers can move, wide and
            in FP8.
        wide_microseconds, fp8_microseconds: the predicted time of these products and quantizers.
        reason: why the layer should not be converted; None if it should be.
    """

    name: str
    shapes: tuple[tuple[int, ...], ...]
    rows: int
    flops: int
    wide_bytes: int
    fp8_bytes: int
    wide_microseconds: float
    fp8_microseconds: float
    reason: str | None

    @property
    def gain(self) -> float:
        """The wide time over the FP8 time: above 1, FP8 is faster."""
        return self.wide_microseconds / self.fp8_microseconds


@dataclasses.dataclass(frozen=True, repr=False)
class Advice:
    """The result of `advise`; `print` it for a table.

    Pass `module_filter_fn=advice.module_filter_fn` to convert_to_fp8_training or
    quantize_for_inference; they then convert what is advised, and nothing else.

    Attributes:
        device: a GPU's name, or "cpu".
        use: "training", "w8a8" or "w8a16".
        tokens: the number of tokens in a forward.
        source: where the times come from. They are predicted in any case.
        layers: every linear layer and every module of experts, in the model's order.
    """

    device: str
    use: str
    tokens: int
    source: str
    layers: tuple[LayerAdvice, ...]

    @property
    def convert(self) -> tuple[str, ...]:
        """Names of the layers that FP8 makes faster."""
        return tuple(layer.name for layer in self.layers if layer.reason is None)

    @property
    def skip(self) -> Mapping[str, str]:
        """{name of every other layer: the reason}. quantize_for_inference also takes it as
        `skip`."""
        return ReadOnlyDict(
            {layer.name: layer.reason for layer in self.layers if layer.reason is not None}
        )

    def module_filter_fn(self, module: torch.nn.Module, name: str) -> bool:
        """Whether the layer of this name should be converted."""
        return name in self.convert

    @property
    def gain(self) -> float:
        """How many times as fast all of these layers together are, if those in `convert` are
        converted; 1 if there are none."""
        wide = sum(layer.wide_microseconds for layer in self.layers)
        advised = sum(
            layer.wide_microseconds if layer.reason else layer.fp8_microseconds
            for layer in self.layers
        )
        return wide / advised if advised else 1.0

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain lists, dicts, strings and numbers."""
        plain = dataclasses.asdict(self)
        plain["layers"] = [
            {
                **dataclasses.asdict(layer),
                "shapes": [list(shape) for shape in layer.shapes],
                "gain": layer.gain,
            }
            for layer in self.layers
        ]
        return {"predicted": True, **plain, "gain": self.gain, "convert": list(self.convert)}

    def to_json(self, indent: int | None = None) -> str:
        """`to_dict()` as JSON; `indent` as in json.dumps."""
        return json.dumps(self.to_dict(), indent=indent)

    def __repr__(self) -> str:
        return f"<Advice: {self._headline()}; print() shows all>"

    def __str__(self) -> str:
        alike: dict[tuple[Any, ...], list[LayerAdvice]] = {}
        for layer in self.layers:
            key = (layer.shapes, layer.rows, layer.reason)
            alike.setdefault(key, []).append(layer)
        rows = [("layer", "weights", "rows", "GFLOP", "MB", "in FP8", "us", "in FP8", "gain", "")]
        for layers in alike.values():
            first = layers[0]
            figures = (
                " ".join("x".join(map(str, shape)) for shape in first.shapes),
                f"{first.rows:,}",
                _short(first.flops / 1e9),
                _short(first.wide_bytes / 1e6),
                _short(first.fp8_bytes / 1e6),
                _short(first.wide_microseconds),
                _short(first.fp8_microseconds),
                f"{first.gain:.2f}",
                "convert" if first.reason is None else f"skip: {first.reason}",
            )
            names = indented(layer.name for layer in layers)
            rows += [(name.strip(), *figures) for name in names]
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
        lines = [
            "  ".join(
                cell.ljust(width) if i in (0, 1, len(row) - 1) else cell.rjust(width)
                for i, (cell, width) in enumerate(zip(row, widths, strict=True))
            ).rstrip()
            for row in rows
        ]
        return "\n".join([self._headline(), *lines, f"Times are {self.source}."])

    def _headline(self) -> str:
        return (
            f"{len(self.convert)} of {len(self.layers)} linear layers gain by FP8 ({self.use}, "
            f"{self.tokens:,} tokens, {self.device}); all together {self.gain:.2f} times as fast, "
            "predicted"
        )


def advise(
    model: torch.nn.Module,
    *,
    tokens: int,
    device: str | None = None,
    use: Use = "training",
    least_gain: float = 1.05,
) -> Advice:
    """Predicts which linear layers of `model` FP8 makes faster, and changes nothing.

    For each layer it adds up the times of its products and, in FP8, of the quantizers of their
    operands. FP8 halves the bytes of weights and, on a GPU, doubles the rate of products, but adds
    quantizers and launches. So small layers lose, and the number of tokens matters.

    Every figure is predicted. On a GPU, FP8 products come from the cost model of
    torchext.explain_gemm, and BF16 products and quantizers from rooflines (docs/advice.md says how
    far they were off). On a CPU they come from rates that a few small products and quantizers reach
    when `advise` is first called, which takes about 0.1 s.

    Args:
        model: any module; it may be on the meta device.
        tokens: the number of tokens in a forward on one device: batch times sequence length, or the
            number of sequences in decoding.
        device: "cpu" for this CPU, or a GPU of docs/timing.md: "h100", "h200", "h800" or
            "h800_pcie". None: the GPU that holds the model, else "cpu".
        use: "training" (fprop, dgrad, wgrad of convert_to_fp8_training), or a mode of
            quantize_for_inference: "w8a8" or "w8a16".
        least_gain: layers that gain less are advised against.

    Returns:
        An Advice.

    Raises:
        TypeError: model is no module.
        ValueError: tokens or least_gain is not positive; device or use is another string.
        ImportError: device is a GPU, and this build has no simulator.
        RuntimeError: device is a GPU, and this build has no CUDA kernels.
    """
    _check_arguments(model, tokens, use, least_gain)
    experts = find_experts(model)
    layers = rules.linear_layers(model, experts)
    modules = dict(model.named_modules())
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, torch.nn.Embedding)}
    device = device or _device_of(model)
    rates: dict[torch.dtype, Rates] = {}
    gpu = None if device == "cpu" else gpu_rates(device)
    found = []
    for name, layer in layers.items():
        weights = rules.weights_of(layer)
        dtype = weights[0].dtype if weights[0].dtype in _WIDE_DTYPES else torch.bfloat16
        if dtype not in rates:
            rates[dtype] = gpu or cpu_rates(dtype)
        reason = rules.why_impossible(layer)
        reason = reason or rules.why_not_worthwhile(layer, name, embeddings)
        shapes = tuple(tuple(weight.shape) for weight in weights)
        choices = 1
        if weights[0].dim() == 3:
            choices = experts_of_a_token(name, weights[0], modules)
        matrices = _matrices(layer, shapes)
        advice = _layer_advice(
            name, shapes, matrices, rows=tokens * choices, use=use, rates=rates[dtype]
        )
        if reason is None and advice.gain < least_gain:
            reason = f"predicted {advice.gain:.2f} times as fast, less than {least_gain:g}"
        found.append(dataclasses.replace(advice, reason=reason))
    if gpu is not None:
        source = gpu.source
    else:
        source = "; ".join(rate.source for rate in rates.values()) or "none"
    return Advice(device, use, tokens, source, tuple(found))


def _short(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _matrices(
    layer: torch.nn.Module, shapes: tuple[tuple[int, ...], ...]
) -> list[tuple[int, int, int]]:
    """(E, N, K) of each product of a forward. The order of N and K matters little."""
    found = []
    for shape in shapes:
        n, k = shape[-2:]
        if len(shape) == 2 and not isinstance(layer, torch.nn.Linear):
            n, k = k, n  # a layer that holds the transpose
        found.append((math.prod(shape[:-2]), n, k))
    return found


def _layer_advice(
    name: str,
    shapes: tuple[tuple[int, ...], ...],
    matrices: list[tuple[int, int, int]],
    *,
    rows: int,
    use: Use,
    rates: Rates,
) -> LayerAdvice:
    b = rates.wide_bytes
    flops, wide_bytes, fp8_bytes, wide_time, fp8_time = 0, 0.0, 0.0, 0.0, 0.0
    for groups, n, k in matrices:
        products = [Product(rows, n, k, groups)]
        quantized: list[int] = []  # elements of each operand that is quantized
        both = use == "training"
        if use == "training":
            products += [
                Product(rows, k, n, groups),
                Product(n, k, rows, groups, along_k=True),
            ]
            quantized = [rows * k, groups * n * k, rows * n]
        elif use == "w8a8":
            quantized = [rows * k]
        of_a = b if use == "w8a16" else 1
        multiply = rates.weights_only if use == "w8a16" else rates.fp8
        for product in products:
            flops += product.flops
            wide_bytes += product.bytes(b, b, b)
            fp8_bytes += product.bytes(of_a, 1, b)
            wide_time += rates.wide(product)
            fp8_time += multiply(product)
        for elements in quantized:
            fp8_bytes += elements * (b + 1 + both)
            fp8_time += rates.quantize(elements, both=both)
    return LayerAdvice(
        name, shapes, rows, flops, round(wide_bytes), round(fp8_bytes), wide_time, fp8_time, None
    )


def _device_of(model: torch.nn.Module) -> str:
    parameter = next(model.parameters(), None)
    if parameter is None or not parameter.is_cuda:
        return "cpu"
    return name_of_gpu(torch.cuda.get_device_name(parameter.device))


def _check_arguments(model: object, tokens: object, use: object, least_gain: object) -> None:
    if not isinstance(model, torch.nn.Module):
        raise TypeError(
            f"advise: model must be a torch.nn.Module (got {model!r}); pass the model to look at"
        )
    for name, value, kind in (("tokens", tokens, int), ("least_gain", least_gain, (int, float))):
        if not isinstance(value, kind) or isinstance(value, bool) or value <= 0:  # type: ignore
            raise ValueError(
                f"advise: {name} must be a positive number (got {value!r}); tokens are batch times "
                "sequence length, and a gain of 1.05 is the default"
            )
    if use not in get_args(Use):
        raise ValueError(
            f"advise: use must be one of {', '.join(map(repr, get_args(Use)))} (got {use!r}); omit "
            "it for training"
        )
