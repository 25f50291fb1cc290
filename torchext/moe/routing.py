"""`Routing`: which rank gets which tokens, and which row of an expert each choice gets there."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from ..ops.moe import moe_route


class Rows(NamedTuple):
    """Rows of this rank's experts, as `m_grouped_fp8_gemm_nt_contiguous` reads them.

    Within an expert, rows are in the order of the source ranks, then of the tokens, then of a
    token's choices: that of one process with the tokens of all ranks.

    Attributes:
        data: [S, K], FP8.
        scale: [S, ceil(K / 128)], float32, M-major.
        offsets: [E / R], int32: where the rows of each of this rank's experts end. Rows from
            offsets[-1] on belong to no expert.
        weight: [S], float32: the weight of each row's choice.
    """

    data: Tensor
    scale: Tensor
    offsets: Tensor
    weight: Tensor


@dataclass(frozen=True)
class Counts:
    """Numbers of rows for each rank of the group, for one direction.

    tokens: of messages, a token once for each rank.
    choices: of experts' rows.
    """

    tokens: tuple[int, ...]
    choices: tuple[int, ...]


@dataclass(frozen=True)
class Received:
    """What a rank knows once the first messages have come.

    Attributes:
        slots: [M, k], int32: the expert's row of each choice of each message; -1 for none here.
        offsets: [E / R], int32: where the rows of each expert end.
        back: [S, 1], int32: the place of each row among those that return; -1 for none.
        weight: [S], float32.
    """

    slots: Tensor
    offsets: Tensor
    back: Tensor
    weight: Tensor


@dataclass(frozen=True)
class Routing:
    """Who sends which token where. `Dispatcher.create_routing` makes one.

    Its tensors do not change: dispatch, combine, their backward and a recomputed forward all use
    the same one. It holds no tokens.

    Attributes:
        ids: [T, k]: the experts' ids, of all ranks.
        weights: [T, k], float32.
        slots: [T, k], int32: where each choice's row returns; -1 for no expert. In one process:
            the row of each choice.
        rank_slots: [T, R], int32: the message's row of each token for each rank; -1 for a rank that
            holds none of its experts. In one process: None.
        sent, expected: how many rows go to each rank and come from it.
        needed: [1], int32: the most choices that this rank sends to one rank; None without a
            capacity.
        offsets: in one process, [E], int32: where the rows of each expert end.
    """

    ids: Tensor
    weights: Tensor
    slots: Tensor
    rank_slots: Tensor | None = None
    sent: Counts | None = None
    expected: Counts | None = None
    needed: Tensor | None = None
    offsets: Tensor | None = None
    _received: list[Received] = field(default_factory=list, repr=False, compare=False)

    @property
    def received(self) -> Received:
        """Raises RuntimeError before the first dispatch."""
        if not self._received:
            raise RuntimeError(
                "torchext.moe.Routing: tokens must have been dispatched before rows are combined; "
                "call Dispatcher.dispatch with this routing, and wait for it"
            )
        return self._received[0]

    @property
    def is_received(self) -> bool:
        return bool(self._received)

    def receive(self, received: Received) -> None:
        """Keeps what the first dispatch has found; later ones find the same."""
        if not self._received:
            self._received.append(received)


def kept_slots(slots: Tensor, exists: Tensor) -> Tensor:
    """Slots of choices that exist, and -1 for the others."""
    return torch.where(exists, slots, -1)


def route_to_ranks(ids: Tensor, experts: int, ranks: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Where tokens and choices stand among all that this rank sends, in the order of the ranks.

    Returns:
        slots: [T, k], int32: of each choice; -1 for ids that are no expert's.
        rank_slots: [T, R], int32: of each token for each rank; -1 for none.
        ends: [R, 2], int32: where tokens and choices of each rank end.
        starts: [R, 2], int32: where they start.
    """
    per_rank = experts // ranks
    exists = (ids >= 0) & (ids < experts)
    home = torch.where(exists, ids // per_rank, -1).int()
    slots, choice_ends = moe_route(home, ranks)
    each_rank = torch.arange(ranks, dtype=torch.int32, device=ids.device)
    goes = (home[:, :, None] == each_rank).any(1)
    rank_slots, token_ends = moe_route(torch.where(goes, each_rank, -1), ranks)
    ends = torch.stack((token_ends, choice_ends), 1)
    starts = torch.nn.functional.pad(ends[:-1], (0, 0, 1, 0))
    return kept_slots(slots, exists), kept_slots(rank_slots, goes), ends, starts
