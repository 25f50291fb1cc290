"""Configurations of the Hopper GEMM: lists them with the cost model's cycles, draws one at random,
and forces one."""

from __future__ import annotations

import random
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch


@dataclass(frozen=True)
class Configuration:
    name: str
    split_k: int = 1
    cluster: int = 1

    def __str__(self) -> str:
        return f"{self.name} split_k={self.split_k} cluster={self.cluster}"


@dataclass(frozen=True)
class Product:
    """What the choice of a configuration depends on: the arguments of torchext.explain_gemm."""

    m: int
    n: int
    k: int
    granularity: str
    a_dtype: torch.dtype = torch.float8_e4m3fn
    b_dtype: torch.dtype = torch.float8_e4m3fn
    num_sms: int = 0
    out_dtype: torch.dtype = torch.bfloat16
    accumulate: bool = False
    grouping: str = "none"
    groups: int = 1
    expected_m: int = 0


class Selection:
    """Uses torchext.gemm_selection, for a GPU of `sm_count` SMs whose memory is rated at `memory`
    GB/s; None: the memory of the current GPU or, without one, of an H100."""

    def __init__(self, sm_count: int, memory: int | None = None):
        from torchext import gemm_selection

        self._selection: Any = gemm_selection
        self._gpu = {"sm_count": sm_count, "memory_gigabytes_per_second": memory}

    def _explain(self, product: Product) -> Any:
        options = {name: getattr(product, name) for name in product.__dataclass_fields__}
        sizes = [options.pop(name) for name in ("m", "n", "k")]
        return self._selection.explain_gemm(*sizes, **options, **self._gpu)

    def expected_cycles(self, product: Product) -> dict[Configuration, float]:
        """Every configuration that can compute `product` -> cycles by the cost model."""
        return {
            Configuration(c.name, c.split_k, c.cluster): c.cycles
            for c in self._explain(product).candidates
        }

    def splits(self, product: Product) -> int:
        """The number of parts into which K is split if no configuration is forced."""
        return self._explain(product).chosen.split_k

    def plainest(self, product: Product, split_k: int = 1) -> Configuration | None:
        """The simplest configuration that splits K into `split_k` parts: the smallest cluster, then
        operands that are not swapped, then the first name. None if there is none."""
        alike = [c for c in self.expected_cycles(product) if c.split_k == split_k]
        return min(alike, key=lambda c: (c.cluster, "swap" in c.name, c.name), default=None)

    def draw(
        self, product: Product, rng: random.Random
    ) -> tuple[Configuration | None, Configuration | None]:
        """A random configuration, or None for the library's choice; and the simplest configuration
        in which a GEMM of a part of the rows gives the same bits."""
        chosen, split_k = None, self.splits(product)
        if rng.random() < 0.75:
            chosen = rng.choice(sorted(self.expected_cycles(product), key=str))
            split_k = chosen.split_k
        alone = replace(product, num_sms=0, grouping="none", groups=1, expected_m=0)
        return chosen, self.plainest(alone, split_k)

    def forced(self, configuration: Configuration | None) -> AbstractContextManager:
        if configuration is None:
            return nullcontext()
        c = configuration
        return self._selection.forced(c.name, split_k=c.split_k, cluster=c.cluster)


class NoSelection(Selection):
    """For devices other than Hopper, whose GEMM has no configurations to choose from."""

    def __init__(self) -> None:
        pass

    def expected_cycles(self, product: Product) -> dict[Configuration, float]:
        return {}

    def draw(
        self, product: Product, rng: random.Random
    ) -> tuple[Configuration | None, Configuration | None]:
        return None, None
