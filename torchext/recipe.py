"""`Recipe`: how a layer that trains in FP8 quantizes the operands of its three GEMMs.

A linear layer y = x @ w.T runs three GEMMs: fprop (y from x and w), dgrad (dx from dy and w) and
wgrad (dw from dy and x). A recipe gives the granularity of the scales, the FP8 format of x, w and
dy, and the GEMMs that do not run in FP8.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from typing import Any, Literal, NoReturn, get_args

import torch

Granularity = Literal["blockwise", "rowwise", "tensorwise"]
Precision = Literal["fp8", "wide"]

# Ops take the index in this tuple: csrc/linear/linear.h.
GRANULARITIES: tuple[Granularity, ...] = get_args(Granularity)
GEMMS = ("fprop", "dgrad", "wgrad")
_FP8_DTYPES = (torch.float8_e4m3fn, torch.float8_e5m2)
_OPERANDS = ("input", "weight", "grad")
_FORMATS = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}
_PRECISIONS: dict[str, Precision] = {"fp8": "fp8", "wide": "wide", "bf16": "wide"}


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How a layer trains in FP8. Immutable and hashable; one recipe serves any number of layers.

    Args:
        granularity: how many elements share a scale.
            "blockwise": 1x128 groups of inputs and gradients, along the dimension that the GEMM
            sums over, and 128x128 blocks of weights. Sums are promoted to FP32 every 128 elements
            of K (DeepSeek-V3, arXiv:2412.19437, section 3.3).
            "rowwise": one scale for each row of each operand, that is, for all elements along the
            dimension that the GEMM sums over.
            "tensorwise": one scale for the whole tensor.
        input_dtype, weight_dtype, grad_dtype: the formats of x, w and dy: torch.float8_e4m3fn (4
            exponent bits, 3 mantissa bits, largest value 448) or torch.float8_e5m2 (5 and 2 bits,
            57344).
        pow2_scale: round every scale up to a power of two, which UE8M0 can store.
        fprop, dgrad, wgrad: "fp8", or "wide" for a GEMM that runs as in torch.nn.Linear: in the
            dtype of the layer's output (the input's or, under torch.autocast, autocast's), on
            operands that are not quantized. A wide wgrad needs the input itself: backward then
            keeps two bytes for each element of a BF16 input, not one.

    Raises:
        ValueError: granularity, fprop, dgrad or wgrad is none of these.
        TypeError: a dtype is neither of the two, or pow2_scale is not a bool.
    """

    granularity: Granularity = "blockwise"
    input_dtype: torch.dtype = torch.float8_e4m3fn
    weight_dtype: torch.dtype = torch.float8_e4m3fn
    grad_dtype: torch.dtype = torch.float8_e4m3fn
    pow2_scale: bool = False
    fprop: Precision = "fp8"
    dgrad: Precision = "fp8"
    wgrad: Precision = "fp8"

    def __post_init__(self) -> None:
        if self.granularity not in GRANULARITIES:
            raise ValueError(
                f"Recipe: granularity must be one of {', '.join(GRANULARITIES)} (got "
                f"{self.granularity!r}); Recipe.deepseek_v3() is a good first choice"
            )
        for name in ("input_dtype", "weight_dtype", "grad_dtype"):
            dtype = getattr(self, name)
            if dtype not in _FP8_DTYPES:
                raise TypeError(
                    f"Recipe: {name} must be torch.float8_e4m3fn or torch.float8_e5m2 (got "
                    f"{dtype!r}); FP32, FP16 and BF16 are not FP8 formats: to set the dtype of a "
                    "layer's output, convert its input or use torch.autocast"
                )
        if not isinstance(self.pow2_scale, bool):
            raise TypeError(
                f"Recipe: pow2_scale must be True or False (got {self.pow2_scale!r}); pass "
                "bool(pow2_scale)"
            )
        for gemm in GEMMS:
            if getattr(self, gemm) not in ("fp8", "wide"):
                raise ValueError(
                    f'Recipe: {gemm} must be "fp8" or "wide" (got {getattr(self, gemm)!r}); "wide" '
                    "means the dtype of the layer's output"
                )

    @classmethod
    def deepseek_v3(cls, *, pow2_scale: bool = False) -> Recipe:
        """1x128 groups, 128x128 blocks of weights and e4m3: the default, and the most accurate."""
        return cls("blockwise", pow2_scale=pow2_scale)

    @classmethod
    def rowwise(cls, *, pow2_scale: bool = False) -> Recipe:
        """One scale for each row of each operand, and e4m3 for all of them."""
        return cls("rowwise", pow2_scale=pow2_scale)

    @classmethod
    def tensorwise(cls, *, pow2_scale: bool = False) -> Recipe:
        """One scale for each tensor, computed from its current values; e4m3 for x and w, and e5m2
        for gradients, whose range is larger."""
        return cls("tensorwise", grad_dtype=torch.float8_e5m2, pow2_scale=pow2_scale)

    @property
    def wide_gemms(self) -> tuple[str, ...]:
        """Those of "fprop", "dgrad" and "wgrad" that do not run in FP8."""
        return tuple(gemm for gemm in GEMMS if getattr(self, gemm) == "wide")

    def __str__(self) -> str:
        """The granularity, and what differs from Recipe(granularity). `parse` reads it back."""
        words: list[str] = [self.granularity]
        for role in _OPERANDS:
            if getattr(self, f"{role}_dtype") is torch.float8_e5m2:
                words.append(f"{role} e5m2")
        if self.pow2_scale:
            words.append("pow2 scales")
        words += [f"{gemm} wide" for gemm in self.wide_gemms]
        return " + ".join(words)

    @classmethod
    def parse(cls, text: str) -> Recipe:
        """The recipe that `text` describes: Recipe.parse(str(recipe)) == recipe.

        Args:
            text: a granularity and, after plus signs, what differs from Recipe(granularity):
                "grad=e5m2" ("input", "weight" or "grad"; "e4m3" or "e5m2"), "pow2 scales" or
                "pow2", "wgrad=wide" ("fprop", "dgrad" or "wgrad"; "fp8", "wide", or "bf16", which
                also means "wide"). A space may stand for the equals sign. For example
                "blockwise+wgrad=bf16".

        Raises:
            TypeError: text is not a string.
            ValueError: text describes no recipe, or says something twice.
        """
        if not isinstance(text, str):
            raise TypeError(
                f"Recipe.parse: text must be a string (got {text!r}); pass, for example, "
                '"blockwise+wgrad=bf16"'
            )
        granularity, *words = (" ".join(word.replace("=", " ").split()) for word in text.split("+"))
        if granularity not in GRANULARITIES:
            _refuse_text(text, f"begin with one of {', '.join(GRANULARITIES)}", granularity)
        options: dict[str, Any] = {}
        for word in words:
            name, _, value = word.partition(" ")
            if word in ("pow2", "pow2 scales"):
                option: tuple[str, Any] = "pow2_scale", True
            elif name in _OPERANDS and value in _FORMATS:
                option = f"{name}_dtype", _FORMATS[value]
            elif name in GEMMS and value in _PRECISIONS:
                option = name, _PRECISIONS[value]
            else:
                _refuse_text(text, "consist of words such as grad=e5m2, pow2 and wgrad=bf16", word)
            if option[0] in options:
                _refuse_text(text, "say everything once", word)
            options.update([option])
        return cls(granularity, **options)

    def to_dict(self) -> dict[str, Any]:
        """Every field, as strings and a bool; dtypes as "float8_e4m3fn" or "float8_e5m2"."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {
            name: str(value).removeprefix("torch.") if isinstance(value, torch.dtype) else value
            for name, value in fields.items()
        }

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> Recipe:
        """The recipe that `to_dict` described. Fields that are missing have their defaults.

        Raises:
            TypeError: fields is not a mapping.
            ValueError: a field is unknown, or has an impossible value.
        """
        if not isinstance(fields, Mapping):
            raise TypeError(
                f"Recipe.from_dict: fields must be a mapping (got {fields!r}); pass the result of "
                "to_dict"
            )
        known = [field.name for field in dataclasses.fields(cls)]
        unknown = [name for name in fields if name not in known]
        if unknown:
            raise ValueError(
                f"Recipe.from_dict: fields must be some of {', '.join(known)} (got "
                f"{', '.join(map(repr, unknown))}); remove the others"
            )
        dtypes = {str(dtype).removeprefix("torch."): dtype for dtype in _FP8_DTYPES}
        options = dict(fields)
        for name, value in fields.items():
            if name.endswith("_dtype"):
                if value not in dtypes:
                    raise ValueError(
                        f"Recipe.from_dict: {name} must be one of {', '.join(dtypes)} (got "
                        f"{value!r}); FP32, FP16 and BF16 are not FP8 formats"
                    )
                options[name] = dtypes[value]
        return cls(**options)

    def to_json(self) -> str:
        """`to_dict()` as JSON."""
        return json.dumps(self.to_dict())

    @classmethod
    def from_json(cls, text: str) -> Recipe:
        """The recipe that `to_json` described; raises as `from_dict`, and for text that is no JSON
        json.JSONDecodeError, a ValueError."""
        return cls.from_dict(json.loads(text))


def _refuse_text(text: str, expected: str, got: str) -> NoReturn:
    raise ValueError(
        f"Recipe.parse: text must {expected} (got {got!r} in {text!r}); str(recipe) shows how a "
        "recipe is written"
    )
