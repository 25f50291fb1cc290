"""Bytes between the ranks of a group, and the names of those that do not take part."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Sequence
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor
from torch.profiler import record_function

from . import overlap

_SECONDS_TO_REPORT = 5.0  # that ranks have to say that they are alive, once one has failed
_number = itertools.count()  # of this process's transports; the same on all ranks of a group


class MissingRanksError(RuntimeError):
    """A rank did not take part in an exchange: it ended, hangs or is late.

    Attributes:
        ranks: the global ranks that did not report; empty if all did, or if none can be asked.
    """

    def __init__(self, message: str, ranks: Sequence[int]) -> None:
        super().__init__(message)
        self.ranks = tuple(ranks)


class Transport:
    """All-to-alls of bytes in a group, by torch.distributed.

    Attributes:
        rank, size: of this process in the group, and of the group.
        sent: bytes that this process has sent to other ranks; counts of rows are not counted.
    """

    def __init__(self, group: dist.ProcessGroup | None, timeout: float | None) -> None:
        self._owned: dist.ProcessGroup | None = None
        self.global_ranks = dist.get_process_group_ranks(group)
        if timeout is not None:
            # The group's own timeout holds for all of its collectives, so this needs another group.
            backend = None if group is None else dist.get_backend(group)
            group = self._owned = dist.new_group(
                self.global_ranks,
                timeout=timedelta(seconds=timeout),
                backend=backend,
                use_local_synchronization=True,
            )
        self._group = group
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        self.sent = 0
        self._steps = itertools.count()
        self._name = f"torchext.moe/{next(_number)}"

    def counts(self, counts: Tensor) -> Tensor:
        """counts [R, n]: row r goes to rank r. Returns [R, n], whose row r came from rank r."""
        received = torch.empty_like(counts)
        self._start(received, counts, None, None, "the exchange of counts").wait()  # soon here
        return received

    def rows(
        self, rows: Tensor, sent: Sequence[int], received: Sequence[int], purpose: str
    ) -> tuple[Callable[[], Tensor], Callable[[], bool]]:
        """Sends rows [N, ...], the first sent[0] of them to rank 0 and so on.

        received: how many rows come from each rank.

        Returns a function that waits and returns these rows, and one that says whether that would
        take no time.
        """
        out = rows.new_empty((sum(received), *rows.shape[1:]))
        row_bytes = rows[:1].numel() * rows.element_size()
        self.sent += (sum(sent) - sent[self.rank]) * row_bytes
        wait = self._start(_as_bytes(out), _as_bytes(rows), received, sent, purpose)

        def arrived() -> Tensor:
            wait()
            return out

        return arrived, wait.is_completed

    def _start(
        self,
        out: Tensor,
        given: Tensor,
        received: Sequence[int] | None,
        sent: Sequence[int] | None,
        purpose: str,
    ) -> _Wait:
        step = next(self._steps)
        try:
            with record_function(f"torchext.moe: starts {purpose}"):
                work = dist.all_to_all_single(
                    out,
                    given.contiguous(),
                    None if received is None else list(received),
                    None if sent is None else list(sent),
                    group=self._group,
                    async_op=True,
                )
        except RuntimeError as error:
            raise self.explained(error, step, purpose) from error
        assert work is not None
        return _Wait(self, work, step, purpose)

    def explained(self, error: RuntimeError, step: int, purpose: str) -> RuntimeError:
        """The error to raise when exchange `step` has failed: who is missing?

        Every rank that fails here says so in the store of torch.distributed. A rank that does not
        within a few seconds is missing.
        """
        head = f"torchext.moe.Dispatcher: every rank must take part in {purpose} (rank "
        mine, first_line = self.global_ranks[self.rank], str(error).splitlines()[0]
        key = f"{self._name}/{step}"
        try:
            store = dist.distributed_c10d._get_default_store()
            store.set(f"{key}/{mine}", "failed")
            until = time.monotonic() + _SECONDS_TO_REPORT
            missing = [rank for rank in self.global_ranks if rank != mine]
            while missing and time.monotonic() < until:
                missing = [rank for rank in missing if not store.check([f"{key}/{rank}"])]
                time.sleep(0.02)
        except (RuntimeError, ValueError) as lost:
            message = (
                f"{head}{mine} failed, and the store that could name the missing ranks does not "
                f"answer: {str(lost).splitlines()[0]}); restart the job. torch.distributed said: "
                f"{first_line}"
            )
            return MissingRanksError(message, ())
        if missing:
            names = ", ".join(map(str, missing))
            message = (
                f"{head}{mine} did; missing: {names}); see whether these processes hang or have "
                f"ended, and restart the job. torch.distributed said: {first_line}"
            )
        else:
            message = (
                f"{head}{mine} did, and so did all others, in vain); restart the job. "
                f"torch.distributed said: {first_line}"
            )
        return MissingRanksError(message, missing)

    def close(self) -> None:
        if self._owned is not None:
            group, self._owned = self._owned, None
            dist.destroy_process_group(group)


class _Wait:
    """Waits for one exchange."""

    def __init__(self, transport: Transport, work: dist.Work, step: int, purpose: str) -> None:
        self._transport, self._work = transport, work
        self._step, self._purpose = step, purpose
        self._turns_given = overlap.turns_given()

    def is_completed(self) -> bool:
        return self._work.is_completed()

    def __call__(self) -> None:
        overlap.before_waiting(self._turns_given)
        self.wait()

    def wait(self) -> None:
        try:
            with record_function(f"torchext.moe: waits for {self._purpose}"):
                self._work.wait()
        except RuntimeError as error:
            raise self._transport.explained(error, self._step, self._purpose) from error


def _as_bytes(rows: Tensor) -> Tensor:
    """[N, ...] as [N, bytes], the same memory. Gloo sends no FP8, and NCCL no FP8 scales."""
    if rows.dtype == torch.uint8:
        return rows
    if rows.numel() == 0:
        return rows.new_empty((rows.shape[0], 0), dtype=torch.uint8)
    return rows.view(rows.shape[0], -1).view(torch.uint8)
