"""Rates the library's choice of tiles, by the simulator's clock and by timings on an H200."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from . import cases
from .cases import Case
from .predictions import OutOfTimeError, Prediction, Predictor, configuration_of
from .report import table

if TYPE_CHECKING:
    from torchext.gemm_selection import GemmExplanation

MEASURED = Path(__file__).parent / "results" / "2026-11-26-h200"
SELECTION_ROWS = (16, 64, 128, 512, 4096)  # M, for each layer of DeepSeek-V3
# Up to MOST candidates of a shape are predicted: those whose cycles, by the cost model, are at most
# CLOSE times the fewest.
CLOSE, MOST = 1.3, 5


def selection_shapes() -> list[tuple[int, int, int]]:
    layers = [layer for layer in cases.LAYERS if layer.model == "deepseek-v3"]
    shapes = [(m, layer.n, layer.k) for m in SELECTION_ROWS for layer in layers]
    return sorted(shapes, key=math.prod)


def explained(case: Case, gpu: str) -> GemmExplanation:
    from torchext import explain_gemm
    from torchext.sim.ops import rated_memory

    return explain_gemm(*case.shape, memory_gigabytes_per_second=rated_memory(gpu))


def candidates(case: Case, gpu: str) -> tuple[str, list[str]]:
    """The configuration that the library chooses for an fprop, and those worth a prediction."""
    answer = explained(case, gpu)
    least = answer.candidates[0].cycles
    hopeful = [c for c in answer.candidates if c.cycles <= CLOSE * least][:MOST]
    texts = [configuration_of(candidate) for candidate in (answer.chosen, *hopeful)]
    return texts[0], list(dict.fromkeys(texts))


@dataclass(frozen=True)
class Regret:
    case: Case
    chosen: Prediction
    best: Prediction

    @property
    def share(self) -> float:
        return self.chosen.microseconds / self.best.microseconds - 1


def regrets(predictor: Predictor, gpu: str) -> list[Regret]:
    """The chosen tile and the best one of each shape, by the clock."""
    found = []
    for shape in selection_shapes():
        case = Case("gemm", cases.FPROP, "deepseek-v3", "", shape)
        choice, texts = candidates(case, gpu)
        try:
            times = {text: predictor.ours(case, gpu, text) for text in texts}
        except OutOfTimeError:
            continue
        best = min(times.values(), key=lambda prediction: prediction.microseconds)
        found.append(Regret(case, times[choice], best))
    return found


def selection_table(found: Sequence[Regret]) -> str:
    rows = [["M x N x K", "chosen", "best by the clock", "chosen, predicted us",
             "best, predicted us", "regret, predicted"]]  # fmt: skip
    for regret in sorted(found, key=lambda r: -r.share):
        if regret.share > 0.02:
            rows.append([
                "x".join(map(str, regret.case.shape)),
                short(regret.chosen.key.configuration),
                short(regret.best.key.configuration),
                f"{regret.chosen.microseconds:.1f}",
                f"{regret.best.microseconds:.1f}",
                f"{regret.share:.1%}",
            ])  # fmt: skip
    return table(rows[0], rows[1:], 3)


def measured_regrets(predictor: Predictor) -> str:
    """A table of the regrets of tiles that the clock picks, and of tiles that the cost model picks.
    Regrets come from times measured on an H200, to which the cost model was fitted."""
    timings = json.loads((MEASURED / "timings.json").read_text())
    by_shape = {
        (row["m"], row["n"], row["k"]): row["microseconds"]
        for row in timings
        if row["granularity"] == "1d2d"
    }
    by_clock, by_model, errors = [], [], []
    for shape in selection_shapes():
        case, times = Case("gemm", cases.FPROP, "", "", shape), by_shape[shape]
        _, texts = candidates(case, "h200")
        texts = [text for text in texts if text in times]
        try:
            predicted = {text: predictor.ours(case, "h200", text).microseconds for text in texts}
        except OutOfTimeError:
            continue
        best = min(times.values())
        by_clock.append(times[min(texts, key=lambda text: predicted[text])] / best - 1)
        by_model.append(times[first_by_model(case, texts)] / best - 1)
        errors += [predicted[text] / times[text] - 1 for text in texts]
    if not errors:
        return ""
    rows = [["tile picked by", "shapes", "regret, mean, measured", "worst"]]
    for who, regret in (("the clock", by_clock), ("the cost model", by_model)):
        share = f"{statistics.mean(regret):.1%}"
        rows.append([who, str(len(regret)), share, f"{max(regret):.1%}"])
    middle = statistics.median(abs(error) for error in errors)
    bias = statistics.median(errors)
    text = (
        f"Over {len(errors)} pairs of shape and tile, the clock's times differ from the measured "
        f"ones by {middle:.0%} (median; bias {bias:+.0%})."
    )
    return f"{table(rows[0], rows[1:])}\n\n{text}"


def first_by_model(case: Case, texts: Sequence[str]) -> str:
    ranked = [configuration_of(candidate) for candidate in explained(case, "h200").candidates]
    return min(texts, key=ranked.index)


def short(configuration: str) -> str:
    return configuration.replace(" split_k=1", "").replace(" cluster=1", "")
