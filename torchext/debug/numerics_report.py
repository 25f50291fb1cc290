"""The report of `torchext.debug.numerics`, by layer, GEMM and operand: text, CSV, JSON, a plot."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import math
from pathlib import Path
from typing import Any


@dataclasses.dataclass
class OperandNumerics:
    """One operand of a GEMM, over all samples. All but `amax` and the shares of values that are not
    finite are None for an operand that is not quantized.

    Attributes:
        amax: the largest magnitude of a finite value.
        scale_min, scale_max: the smallest and the largest scale that is finite.
        underflow: the share of elements that are not zero but become zero in FP8.
        saturation: the share of elements whose magnitude exceeds what FP8 can represent with their
            scale. It is 0 for finite values, because scales are computed from current values.
        nonfinite: the share of elements that are NaN or infinite.
    """

    amax: float = 0.0
    scale_min: float | None = None
    scale_max: float | None = None
    underflow: float | None = None
    saturation: float | None = None
    nonfinite: float = 0.0
    _elements: int = dataclasses.field(default=0, repr=False)

    def add(self, elements: int, amax: float, nonfinite: float) -> None:
        """Adds a sample of `elements` values, `nonfinite` of which are NaN or infinite."""
        self.amax = max(self.amax, amax)
        self.nonfinite = self._mean(self.nonfinite, nonfinite, elements)
        self._elements += elements

    def add_quantized(
        self, elements: int, scales: tuple[float, float], underflow: float, saturation: float
    ) -> None:
        """Adds to it, before `add`, what quantization did: smallest and largest scale, and numbers
        of elements."""
        smallest, largest = scales
        if math.isfinite(smallest):
            self.scale_min = min(smallest, math.inf if self.scale_min is None else self.scale_min)
            self.scale_max = max(largest, 0.0 if self.scale_max is None else self.scale_max)
        self.underflow = self._mean(self.underflow or 0.0, underflow, elements)
        self.saturation = self._mean(self.saturation or 0.0, saturation, elements)

    def _mean(self, share: float, count: float, elements: int) -> float:
        total = self._elements + elements
        return (share * self._elements + count) / total if total else 0.0


@dataclasses.dataclass
class GemmNumerics:
    """One GEMM of one layer, over all samples.

    Attributes:
        layer: the layer's fully qualified name.
        gemm: "fprop", "dgrad" or "wgrad".
        fp8: whether it runs in FP8; its recipe may call it wide.
        samples: how many times it was observed.
        operands: "input", "weight" or "grad" -> OperandNumerics, in the product's order.
    """

    layer: str
    gemm: str
    fp8: bool
    samples: int = 0
    operands: dict[str, OperandNumerics] = dataclasses.field(default_factory=dict)
    _signal: float = dataclasses.field(default=0.0, repr=False)
    _noise: float = dataclasses.field(default=0.0, repr=False)

    @property
    def sqnr(self) -> float | None:
        """The signal-to-quantization-noise ratio of the result in dB, against the FP32 product of
        the operands before quantization. None without a sample in which both are finite; infinite
        if they are equal."""
        if not self._signal:
            return None
        return 10 * math.log10(self._signal / self._noise) if self._noise else math.inf

    def add(self, signal: float, noise: float, *, counts: bool = True) -> None:
        """Adds a sample: sums of squares of the FP32 product and of the difference from it.

        counts: false if another part of the sample was added and counted before.
        """
        self.samples += counts
        if math.isfinite(signal) and math.isfinite(noise):
            self._signal += signal
            self._noise += noise


@dataclasses.dataclass(frozen=True)
class NonFinite:
    """The first NaN or infinite value that was observed.

    Attributes:
        layer, gemm: where.
        operand: "input", "weight", "grad", or "bias"; or "output", if the operands were finite and
            the result is not.
        value: "nan", or "inf" if no element is NaN.
        sample: the number of the layer's forward, from 1.
        after: the layer whose finite result was observed last; None if there was none.
    """

    layer: str
    gemm: str
    operand: str
    value: str
    sample: int
    after: str | None

    def __str__(self) -> str:
        where = f"{self.gemm} of {self.layer or 'the model itself'}"
        after = "" if self.after is None else f"; the last finite result was that of {self.after}"
        return f"first {self.value}: {self.operand}, {where}, forward {self.sample}{after}"


class NumericsReport:
    """What `torchext.debug.numerics` observed; `print` it for a table.

    Attributes:
        every: the first forward of each layer and then every `every`-th was observed.
        first_nonfinite: the first NaN or infinite value, or None.
    """

    def __init__(self, layers: list[str], every: int) -> None:
        self.every = every
        self.first_nonfinite: NonFinite | None = None
        self._layers = layers
        self._gemms: dict[tuple[str, str], GemmNumerics] = {}
        self._last_finite: str | None = None

    @property
    def gemms(self) -> tuple[GemmNumerics, ...]:
        """What was observed of each GEMM, in the order of layers in the model."""
        order = {name: index for index, name in enumerate(self._layers)}
        gemms = ("fprop", "dgrad", "wgrad")
        return tuple(
            sorted(self._gemms.values(), key=lambda g: (order[g.layer], gemms.index(g.gemm)))
        )

    @property
    def unobserved(self) -> tuple[str, ...]:
        """FP8 layers of which nothing was observed: they did not run, or only in compiled code,
        under a transform, with a tensor subclass, or with tokens from other ranks."""
        seen = {layer for layer, _ in self._gemms}
        return tuple(name for name in self._layers if name not in seen)

    def gemm(self, layer: str, gemm: str, fp8: bool) -> GemmNumerics:
        """The entry of a GEMM, made if there is none."""
        return self._gemms.setdefault((layer, gemm), GemmNumerics(layer, gemm, fp8))

    def note_finite(self, layer: str, gemm: str) -> None:
        self._last_finite = f"{layer or 'the model itself'} ({gemm})"

    def note_nonfinite(self, layer: str, gemm: str, operand: str, nan: bool, sample: int) -> None:
        if self.first_nonfinite is None:
            value = "nan" if nan else "inf"
            self.first_nonfinite = NonFinite(layer, gemm, operand, value, sample, self._last_finite)

    def rows(self) -> list[dict[str, Any]]:
        """A dict for each operand of each GEMM, as in the CSV."""
        return [
            {
                "layer": gemm.layer,
                "gemm": gemm.gemm,
                "operand": name,
                "fp8": gemm.fp8,
                "samples": gemm.samples,
                "sqnr": gemm.sqnr,
                **_fields(operand),
            }
            for gemm in self.gemms
            for name, operand in gemm.operands.items()
        ]

    def to_csv(self) -> str:
        """A line for each operand of each GEMM; `sqnr` is that of the GEMM's result."""
        text = io.StringIO()
        names = ["layer", "gemm", "operand", "fp8", "samples", "sqnr", *_fields(OperandNumerics())]
        writer = csv.DictWriter(text, names, lineterminator="\n")
        writer.writeheader()
        writer.writerows(self.rows())
        return text.getvalue()

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain lists, dicts, strings and numbers."""
        return {
            "every": self.every,
            "gemms": [
                {
                    "layer": gemm.layer,
                    "gemm": gemm.gemm,
                    "fp8": gemm.fp8,
                    "samples": gemm.samples,
                    "sqnr": gemm.sqnr,
                    "operands": {name: _fields(o) for name, o in gemm.operands.items()},
                }
                for gemm in self.gemms
            ],
            "first_nonfinite": (
                None if self.first_nonfinite is None else dataclasses.asdict(self.first_nonfinite)
            ),
            "unobserved": list(self.unobserved),
        }

    def to_json(self, indent: int | None = None) -> str:
        """`to_dict()` as JSON, with null for an infinite SQNR; `indent` as in json.dumps."""
        plain = self.to_dict()
        for gemm in plain["gemms"]:
            if gemm["sqnr"] == math.inf:
                gemm["sqnr"] = None
        return json.dumps(plain, indent=indent, allow_nan=False)

    def plot(self, path: str | Path) -> None:
        """Draws the SQNR and the largest underflow share of each GEMM over the layers.

        Writes the format that the ending of `path` names: PNG, SVG, PDF, ...

        Raises:
            ModuleNotFoundError: matplotlib is not installed.
        """
        try:
            from matplotlib.figure import Figure  # not pyplot: no display is needed
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(
                "NumericsReport.plot: matplotlib must be installed (got no such package); run "
                "`pip install matplotlib`, or plot the numbers of to_csv()"
            ) from error
        observed = {gemm.layer for gemm in self.gemms}
        layers = [name for name in self._layers if name in observed]
        figure = Figure(figsize=(max(6.0, 0.25 * len(layers)), 6.5), layout="constrained")
        sqnr, underflow = figure.subplots(2, sharex=True)
        for name, marker in (("fprop", "o"), ("dgrad", "s"), ("wgrad", "^")):
            gemms = [gemm for gemm in self.gemms if gemm.gemm == name]
            positions = [layers.index(gemm.layer) for gemm in gemms]
            heights = [math.nan if g.sqnr in (None, math.inf) else g.sqnr for g in gemms]
            sqnr.plot(positions, heights, marker, label=name)  # type: ignore[arg-type]
            shares = [
                100 * max((o.underflow or 0.0 for o in g.operands.values()), default=0.0)
                for g in gemms
            ]
            underflow.plot(positions, shares, marker, label=name)
        sqnr.set_ylabel("SQNR of the product (dB)")
        underflow.set_ylabel("underflow (% of an operand)")
        underflow.set_xticks(range(len(layers)), layers, rotation=90, fontsize=7)
        sqnr.legend()
        figure.savefig(path, dpi=130)

    def __str__(self) -> str:
        lines = [("layer", "GEMM", "operand", "amax", "scales", "underflow", "saturated", "SQNR")]
        for gemm in self.gemms:
            for index, (name, operand) in enumerate(gemm.operands.items()):
                scales = "not in FP8"
                if operand.scale_min is not None and operand.scale_max is not None:
                    scales = f"{operand.scale_min:.2g} to {operand.scale_max:.2g}"
                lines.append(
                    (
                        (gemm.layer or "the model itself") if index == 0 else "",
                        gemm.gemm if index == 0 else "",
                        name,
                        f"{operand.amax:.3g}",
                        scales,
                        _percent(operand.underflow),
                        _percent(operand.saturation),
                        _decibels(gemm.sqnr) if index == 0 else "",
                    )
                )
        widths = [max(len(line[column]) for line in lines) for column in range(8)]
        text = [
            "  ".join(
                cell.ljust(width) if column in (0, 1, 2, 4) else cell.rjust(width)
                for column, (cell, width) in enumerate(zip(line, widths, strict=True))
            ).rstrip()
            for line in lines
        ]
        text.append(str(self.first_nonfinite or "every observed value is finite"))
        if self.unobserved:
            text.append(f"not observed: {', '.join(self.unobserved)}")
        return "\n".join(text)

    def __repr__(self) -> str:
        return (
            f"<NumericsReport: {len(self._gemms)} GEMMs, {self.first_nonfinite or 'all finite'}; "
            "print() shows all>"
        )


def _fields(operand: OperandNumerics) -> dict[str, Any]:
    return {
        field.name: getattr(operand, field.name)
        for field in dataclasses.fields(operand)
        if not field.name.startswith("_")
    }


def _percent(share: float | None) -> str:
    if share is None:
        return "-"
    return "<0.01%" if 0 < share < 1e-4 else f"{share:.2%}"


def _decibels(sqnr: float | None) -> str:
    if sqnr is None:
        return "-"
    return "exact" if sqnr == math.inf else f"{sqnr:.1f} dB"
