"""Which of the Hopper GEMM's configurations a product runs in: all there are, what its cost model
expects of each, one at random, or one that is forced."""

from __future__ import annotations

import random
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
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
    """What a choice of configuration depends on. granularity: "1d2d", "1d1d" or "rowwise"."""

    m: int
    n: int
    k: int
    granularity: str
    a_dtype: torch.dtype
    b_dtype: torch.dtype
    num_sms: int


class Selection:
    """By torchext.gemm_selection. Everywhere but on Hopper's kernels there is nothing to choose."""

    def __init__(self, sm_count: int):
        import torchext
        from torchext import gemm_selection

        self._torchext: Any = torchext
        self._selection: Any = gemm_selection
        self._sm_count = sm_count

    def expected_cycles(self, product: Product) -> dict[Configuration, float]:
        """Of every configuration that can compute `product`, as the cost model sees it."""
        p = product
        names = self._selection.configurations(p.granularity, p.a_dtype, p.b_dtype)
        explained = self._torchext.explain_gemm(
            p.m,
            p.n,
            p.k,
            granularity=p.granularity,
            num_sms=p.num_sms,
            sm_count=self._sm_count,
        )
        return {
            Configuration(c.name, c.split_k, c.cluster): c.cycles
            for c in explained.candidates
            if c.name in names
        }

    def candidates(self, product: Product) -> list[Configuration]:
        """Those that can compute `product`, the plainest first."""
        return sorted(
            self.expected_cycles(product),
            key=lambda c: (c.split_k, c.cluster, "swap" in c.name, c.name),
        )

    def draw(
        self, product: Product, rng: random.Random
    ) -> tuple[Configuration | None, Configuration | None]:
        """A configuration at random, and the one whose bits it must have: the plainest that adds up
        K in the same order, that is, in as many splits."""
        candidates = self.candidates(product)
        if not candidates:
            return None, None
        chosen = rng.choice(candidates)
        alike = [c for c in candidates if c.split_k == chosen.split_k]
        return chosen, alike[0]

    def forced(self, configuration: Configuration | None) -> AbstractContextManager:
        if configuration is None:
            return nullcontext()
        c = configuration
        return self._selection.forced(c.name, split_k=c.split_k, cluster=c.cluster)


class NoSelection(Selection):
    def __init__(self) -> None:
        pass

    def expected_cycles(self, product: Product) -> dict[Configuration, float]:
        return {}
