"""torchext.nn.FP8Linear: a linear layer that holds its weight in FP8, one byte for each element."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor
from torch.nn import Parameter

from .._dispatch.layout import GROUP, ceil_div, pitched
from .._dispatch.scales import float32_scale
from ..ops.frozen import frozen_product
from ..ops.quantize import dequantize, quantize_128x128, quantize_rowwise, quantize_tensorwise
from ..ops.weights_only import fp8_linear
from .frozen_weights import E4M3, FrozenWeights
from .linear import output_dtype

Mode = Literal["w8a8", "w8a16"]


class MergeError(NamedTuple):
    """What rounding added when a layer's weight was changed; norms are Frobenius norms.

    Attributes:
        of_weight: the norm of the rounding error over that of the new weight.
        of_delta: the norm of the rounding error over that of the change. At 1 and above, most of
            the change is lost. Zero if nothing changed.
    """

    of_weight: float
    of_delta: float


class FP8Linear(FrozenWeights, torch.nn.Linear):
    """y = x @ weight.T + bias from a weight in FP8 that does not train.

    `weight` is e4m3 [N, K] and `weight_scale_inv` its scales, FP32 [ceil(N / 128), ceil(K / 128)]
    multipliers. Both are parameters without gradients, contiguous, and what FP8 checkpoints have on
    disk, so `state_dict` has their bits. `bias` [N] is as in torch.nn.Linear. No wide copy of the
    weight is kept. x and the bias get gradients (LoRA trains on top of the layer): backward
    transposes the weight while it runs, and keeps one byte for each element only until then.

    `.to(dtype)`, `.half()` and the like cast the bias only. The layer can be copied, pickled,
    compiled with fullgraph=True, and sharded by fully_shard, but not with a
    MixedPrecisionPolicy(param_dtype=...), which would cast the weight.

    Attributes:
        mode: "w8a8" multiplies in FP8: x is quantized for each row and 128 of K. "w8a16" leaves x
            as it is (torchext.ops.fp8_linear), for few tokens, or where FP8 inputs cost too much
            quality.
    """

    weight_scale_inv: Tensor
    mode: Mode

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        mode: Mode = "w8a8",
    ) -> None:
        """Initializes as torch.nn.Linear does, and quantizes the weight.

        Args:
            in_features: K.
            out_features: N.
            bias: whether the layer has a bias, [N].
            device: of the parameters; torch's default if None.
            dtype: of the bias, and of what `dequantize_` makes: FP32, BF16 or FP16; torch's
                default if None.
            mode: "w8a8" or "w8a16".

        Raises:
            ValueError: mode is another string.
            TypeError, RuntimeError: as torch.nn.Linear.
        """
        check_mode("torchext.nn.FP8Linear", mode)
        super().__init__(in_features, out_features, bias, device, dtype)
        self.mode = mode
        self.quantize_in_place(pow2_scale=False)

    @classmethod
    def from_linear(
        cls, linear: torch.nn.Linear, mode: Mode = "w8a8", *, pow2_scale: bool = False
    ) -> FP8Linear:
        """A new layer with the quantized weight of `linear`, and its bias, which both share.

        Args:
            linear: a layer with a plain FP32, BF16 or FP16 weight; its class does not matter.
            mode: "w8a8" or "w8a16".
            pow2_scale: round scales up to powers of two.

        Raises:
            TypeError: linear or its weight is of another kind.
            ValueError: mode is another string.
        """
        check_mode("FP8Linear.from_linear", mode)
        weight: Any = getattr(linear, "weight", None)
        if not isinstance(linear, torch.nn.Linear) or not isinstance(weight, Tensor):
            raise TypeError(
                "FP8Linear.from_linear: linear must be a torch.nn.Linear (got "
                f"{type(linear).__name__}); pass FP8 tensors to FP8Linear.from_tensors"
            )
        new = cls._empty(weight.shape, linear.bias, mode)
        new.train(linear.training)
        new.weight = weight
        new.quantize_in_place(pow2_scale=pow2_scale)
        return new

    @classmethod
    def from_tensors(
        cls,
        weight: Tensor,
        weight_scale_inv: Tensor,
        bias: Tensor | None = None,
        *,
        mode: Mode = "w8a8",
        dtype: torch.dtype = torch.bfloat16,
    ) -> FP8Linear:
        """A layer that holds FP8 tensors, such as a checkpoint's; it does not copy the weight.

        Args:
            weight: e4m3 [N, K], contiguous, at any address.
            weight_scale_inv: [ceil(N / 128), ceil(K / 128)], [N, 1] or one element, in FP32, BF16
                or torch.float8_e8m0fnu. The layer has it in FP32, with two dimensions.
            bias: [N] or None.
            mode: "w8a8" or "w8a16".
            dtype: of what `dequantize_` makes.

        Raises:
            TypeError: weight or weight_scale_inv has another dtype.
            ValueError: their shapes do not fit; mode is another string.
        """
        check_mode("FP8Linear.from_tensors", mode)
        if weight.dtype is not E4M3 or weight.dim() != 2:
            raise TypeError(
                "FP8Linear.from_tensors: weight must be torch.float8_e4m3fn [N, K] (got "
                f"{weight.dtype} {list(weight.shape)}); pass a wide layer to FP8Linear.from_linear"
            )
        scale = _checked_scale("FP8Linear.from_tensors", weight_scale_inv, weight.shape)
        new = cls._empty(weight.shape, bias, mode)
        new.hold("weight", weight.detach().contiguous(), scale)
        new.wide_dtype = dtype
        return new

    def forward(self, input: Tensor) -> Tensor:
        """Returns input @ weight.T + bias, [..., N], in the input's dtype or autocast's.

        Args:
            input: [..., K], FP32, BF16 or FP16, of any strides.

        Raises:
            TypeError: the input has another dtype, or something cast the weight or its scales.
            ValueError: the input's shape or device does not fit.
            RuntimeError: the weight requires a gradient.
        """
        weight, scale = self.frozen_pair("weight")
        bias = self.bias
        dtype = output_dtype(input)
        if self.in_features % 16:
            weight = pitched(weight)  # a GPU reads rows at multiples of 16 bytes
        if self.mode == "w8a16":
            x = input if input.dtype is dtype else input.to(dtype)
            return fp8_linear(x, weight, scale, bias)
        return frozen_product(input, weight, scale, bias, out_dtype=dtype)

    @torch.no_grad()
    def merge(self, delta: Tensor) -> MergeError:
        """Adds `delta` to the weight in place: dequantizes, adds in FP32, and quantizes again.

        New scales have the shape of the old ones, and are powers of two if all of those are.

        Args:
            delta: [N, K], FP32, BF16 or FP16, on the weight's device, such as the product of a
                LoRA's matrices.

        Returns:
            The error that rounding to FP8 added. Reading it waits for a GPU.

        Raises:
            ValueError: delta has another shape.
        """
        if delta.shape != self.weight.shape:
            raise ValueError(
                f"FP8Linear.merge: delta must have shape {list(self.weight.shape)} (got "
                f"{list(delta.shape)}); pass lora_B @ lora_A times its scaling"
            )
        data, scale, error = merged(self.weight, self.weight_scale_inv, delta)
        self.weight.copy_(data)
        self.weight_scale_inv.copy_(scale)
        return error

    def dequantize_(self, dtype: torch.dtype | None = None) -> torch.nn.Linear:
        """Turns this layer into a torch.nn.Linear in place, and returns it.

        Its weight is a new parameter, which requires a gradient. The layer stays the same object
        with the same bias, hooks and mode.

        Args:
            dtype: of the weight: FP32, BF16 or FP16; if None, that which it had before it was
                quantized, or what the layer was made with.
        """
        self.dequantize_in_place(dtype)
        del self.mode
        self.__class__ = torch.nn.Linear  # type: ignore[assignment]
        return self

    def reset_parameters(self) -> None:
        """Initializes as torch.nn.Linear does, and quantizes the weight if it was in FP8."""
        if self.weight.dtype is not E4M3:
            return super().reset_parameters()
        wide = torch.nn.Linear(
            self.in_features, self.out_features, self.bias is not None, device=self.weight.device
        )
        with torch.no_grad():
            data, scale = quantize_128x128(wide.weight)
            self.weight.copy_(data)
            self.weight_scale_inv.copy_(scale)
            if self.bias is not None:
                self.bias.copy_(wide.bias)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, mode={self.mode!r}"

    def frozen_names(self) -> tuple[str, ...]:
        return ("weight",)

    @classmethod
    def _empty(cls, shape: torch.Size, bias: Tensor | None, mode: Mode) -> FP8Linear:
        new = cls.__new__(cls)
        torch.nn.Module.__init__(new)
        new.out_features, new.in_features = shape
        new.mode = mode
        new.register_parameter("weight", None)
        own = bias if bias is None or isinstance(bias, Parameter) else Parameter(bias)
        new.register_parameter("bias", own)
        return new


def merged(weight: Tensor, scale: Tensor, delta: Tensor) -> tuple[Tensor, Tensor, MergeError]:
    """FP8 data and scales of the dequantized weight plus `delta`, of the shapes and dtypes given.

    weight [N, K] may have the scales that FP8Linear.from_tensors takes.
    """
    old_scale = float32_scale(scale)
    old = dequantize(weight, old_scale, out_dtype=torch.float32)
    new = old + delta.to(old)
    quantize = quantize_128x128
    if scale.numel() == 1 and max(weight.shape) > GROUP:
        quantize = quantize_tensorwise
    elif tuple(scale.shape) == (weight.shape[0], 1) and weight.shape[0] > 1:
        quantize = quantize_rowwise
    pow2_scale = bool((torch.frexp(old_scale)[0] == 0.5).all())
    data, new_scale = quantize(new, pow2_scale=pow2_scale)
    rounding = (dequantize(data, new_scale, out_dtype=torch.float32) - new).norm()
    norms = new.norm(), delta.float().norm()
    error = MergeError(*(float(rounding / norm) if norm else 0.0 for norm in norms))
    return data.contiguous(), new_scale.view(scale.shape).to(scale.dtype), error


def quantize_linear_(linear: torch.nn.Linear, mode: Mode, *, pow2_scale: bool) -> FP8Linear:
    """Turns a plain torch.nn.Linear into an FP8Linear in place; `dequantize_` undoes it."""
    linear.__class__ = FP8Linear
    assert isinstance(linear, FP8Linear)
    linear.mode = mode
    linear.quantize_in_place(pow2_scale=pow2_scale)
    return linear


def check_mode(name: str, mode: str) -> None:
    if mode not in get_args(Mode):
        options = " or ".join(map(repr, get_args(Mode)))
        raise ValueError(f"{name}: mode must be {options} (got {mode!r}); omit it for 'w8a8'")


def _checked_scale(name: str, scale: Tensor, shape: torch.Size) -> Tensor:
    """Scales [.., ..] in FP32 that fit a weight [N, K]."""
    n, k = shape
    found = float32_scale(scale.detach())
    if found.dtype is not torch.float32:
        raise TypeError(
            f"{name}: weight_scale_inv must be torch.float32, torch.bfloat16 or "
            f"torch.float8_e8m0fnu (got {scale.dtype}); convert it with .float()"
        )
    blocks = (ceil_div(n, GROUP), ceil_div(k, GROUP))
    if found.numel() == 1:
        return found.view(1, 1)
    if tuple(found.shape) not in (blocks, (n, 1)):
        raise ValueError(
            f"{name}: weight_scale_inv must be {list(blocks)} (128x128 blocks), [{n}, 1] or one "
            f"element for a weight [{n}, {k}] (got {list(scale.shape)}); requantize the weight "
            "with torchext.ops.quantize_128x128"
        )
    return found.contiguous()
