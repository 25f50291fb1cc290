"""`Dispatcher`: tokens to the ranks that hold their experts, and the experts' rows back.

A token goes once to each rank that holds an expert of its choice, as one row of a message: FP8
data, scales, ids and weights (torchext/ops/moe_messages.py). The rank gives each choice a row of
its expert. Results return in BF16.

    dispatch   tokens [T, K] -> message -> all-to-all -> rows by expert [S, K]
    combine    rows [S, K] -> by source rank, token, choice -> all-to-all -> sums [T, K]

Rows never depend on the number of ranks: a token is quantized once, before it is copied, and an
expert's rows stand in the order of one process with the tokens of all ranks. With exact=True each
row returns by itself, and sums are FP32 in the order of the choices, as in one process.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from ..ops.linear_function import quantizer_options
from ..ops.moe import moe_combine, moe_permute, moe_permute_quantize_1x128, moe_route
from ..ops.moe_messages import MessageLayout, moe_pack_1x128, moe_unpack_1x128
from ..recipe import Recipe
from .routing import Counts, Received, Routing, Rows, kept_slots, route_to_ranks
from .transport import Transport
from .work import Work

TransportName = Literal["auto", "local", "all_to_all", "symmetric"]
_TRANSPORTS = ("auto", "local", "all_to_all", "symmetric")


def _now() -> bool:
    return True


def _is_initialized() -> bool:
    return dist.is_available() and dist.is_initialized()


class Dispatcher:
    """Sends tokens to experts on other ranks and sums what comes back.

    All ranks of the group construct it, and call each method, in the same order.

    Args:
        num_experts: of all ranks. Rank r of R holds those from r * num_experts / R on.
        group: the process group; None for torch.distributed's default, or for one process if
            torch.distributed is not initialized.
        transport: "local": one process, no message. "all_to_all": torch.distributed's all-to-all
            of bytes, by gloo, NCCL or another backend. "auto": "local" for one rank, else
            "all_to_all". "symmetric" (NVLink) does not exist yet and raises.
        recipe: the FP8 formats and scales; blockwise. None: torchext.Recipe().
        capacity: the most rows (choices of an expert) that a rank sends to one rank. Then each call
            sends messages of a fixed size, which takes neither an exchange of counts nor a wait
            for the device. None: as many as there are; counts are exchanged first.
        timeout: seconds that a rank waits for the others. The dispatcher then has a process group
            of its own. None: the timeout of the group.

    Raises:
        ValueError: num_experts is no multiple of the ranks, or an argument is out of range.
        NotImplementedError: transport is "symmetric".
    """

    def __init__(
        self,
        num_experts: int,
        *,
        group: Any = None,
        transport: TransportName = "auto",
        recipe: Recipe | None = None,
        capacity: int | None = None,
        timeout: float | None = None,
    ) -> None:
        self.recipe = Recipe() if recipe is None else recipe
        ranks = dist.get_world_size(group) if _is_initialized() else 1
        _check_experts(num_experts, 1 if transport == "local" else ranks, transport)
        _check_options(self.recipe, capacity, timeout)
        self.num_experts = num_experts
        self.capacity = capacity
        self.transport = "local" if transport == "auto" and ranks == 1 else transport
        if self.transport == "auto":
            self.transport = "all_to_all"
        self._exchange = None
        if self.transport == "all_to_all":
            if not _is_initialized():
                raise ValueError(
                    'torchext.moe.Dispatcher: transport "all_to_all" needs torch.distributed (it '
                    'is not initialized); call init_process_group first, or pass "local"'
                )
            self._exchange = Transport(group, timeout)
        self._overflow: tuple[Tensor, Any] | None = None  # needed of each rank, and its event

    def __deepcopy__(self, memo: dict[int, Any]) -> Dispatcher:
        """Itself: copies of a layer share their ranks."""
        return self

    # ---- facts ----

    @property
    def num_ranks(self) -> int:
        return 1 if self._exchange is None else self._exchange.size

    @property
    def num_local_experts(self) -> int:
        return self.num_experts // self.num_ranks

    @property
    def bytes_sent(self) -> int:
        """Bytes that this process has sent to other ranks so far, without counts of rows."""
        return 0 if self._exchange is None else self._exchange.sent

    def buffer_bytes(self, tokens: int, hidden: int, topk: int) -> int:
        """The most bytes that messages of a dispatch or of an exact combine take at a time, to send
        and to receive.

        Args:
            tokens: the most that any rank has.
            hidden: elements of a token; rows return in BF16.
            topk: choices of a token.

        Without a capacity, that is if every token of every rank goes here. With one, messages have
        that size whatever the tokens choose. "local" needs none.
        """
        if self._exchange is None:
            return 0
        ranks, pitch = self._exchange.size, MessageLayout.of(hidden, topk).pitch
        if self.capacity is not None:
            messages, rows = ranks * (self.capacity + 1), ranks * self.capacity
            return 2 * max(messages * pitch, rows * 2 * hidden)
        messages = tokens * (min(ranks, topk) + ranks)
        rows = tokens * topk * (1 + ranks)
        return max(messages * pitch, rows * 2 * hidden)

    # ---- routing ----

    @torch._disable_dynamo
    def create_routing(self, topk_idx: Tensor, topk_weights: Tensor) -> Routing:
        """Decides where tokens go. Without a capacity, ranks exchange counts, and the host waits.

        Args:
            topk_idx: [T, k], int64 or int32: the experts that each token chose, ids of all ranks.
                An id outside 0 to num_experts - 1, such as -1, is no expert. A token may choose an
                expert twice. T may be 0 and differ between ranks; k is the same on all.
            topk_weights: [T, k], a floating-point dtype; used in FP32.

        Raises:
            ValueError: the shapes do not fit.
            MissingRanksError: a rank did not take part.
            RuntimeError: on a GPU with a capacity: a rank sent too many rows in an earlier call.
        """
        self._report_overflow()
        if topk_idx.dim() != 2 or topk_idx.shape != topk_weights.shape or topk_idx.shape[1] == 0:
            raise ValueError(
                "torchext.moe.Dispatcher: topk_idx and topk_weights must have one shape [T, k] "
                f"with k > 0 (got {list(topk_idx.shape)} and {list(topk_weights.shape)}); pass the "
                "experts and weights that each token chose"
            )
        weights = topk_weights.detach().float()
        ids = topk_idx.detach()
        if self._exchange is None:
            slots, offsets = moe_route(ids, self.num_experts)
            return Routing(ids, weights, slots, offsets=offsets)
        ranks = self._exchange.size
        slots, rank_slots, ends, starts = route_to_ranks(ids, self.num_experts, ranks)
        if self.capacity is not None:
            return self._fixed_routing(Routing(ids, weights, slots, rank_slots), ends, starts)
        sent = (ends - starts).long()
        both = torch.stack((sent, self._exchange.counts(sent))).tolist()
        here, there = (Counts(*map(tuple, zip(*rows, strict=True))) for rows in both)
        return Routing(ids, weights, slots, rank_slots, here, there)

    def _fixed_routing(self, routing: Routing, ends: Tensor, starts: Tensor) -> Routing:
        """For messages of `capacity` rows to each rank, and one more that says how many are needed.
        Choices beyond the capacity are left out; `_check_needed` then raises on all ranks."""
        assert self._exchange is not None and self.capacity is not None
        assert routing.rank_slots is not None
        ranks, capacity = self._exchange.size, self.capacity
        each_rank = torch.arange(ranks, dtype=torch.int32, device=ends.device)
        home = torch.where(routing.slots >= 0, routing.ids // self.num_local_experts, 0)
        slots = _in_blocks(routing.slots, starts[:, 1][home], home.int(), (capacity, capacity))
        rank_slots = _in_blocks(
            routing.rank_slots, starts[:, 0], each_rank, (capacity, capacity + 1)
        )
        needed = (ends - starts)[:, 1].max().reshape(1)
        counts = Counts((capacity + 1,) * ranks, (capacity,) * ranks)
        return Routing(routing.ids, routing.weights, slots, rank_slots, counts, counts, needed)

    # ---- dispatch ----

    def dispatch(
        self,
        x: Tensor,
        routing: Routing,
        *,
        dtype: torch.dtype | None = None,
        async_op: bool = False,
    ) -> Any:
        """Tokens as FP8 rows of the experts that chose them. Also the backward of `combine`, with
        the gradient for x. It has no gradient itself: `experts` is the autograd function.

        Args:
            x: [T, K], bfloat16, float16 or float32.
            routing: from create_routing, for these tokens.
            dtype: the FP8 format; None for the recipe's input_dtype.
            async_op: return a Work, whose `wait` returns the rows.

        Returns:
            Rows, or a Work with them.

        Raises:
            ValueError: x does not have the routing's tokens.
            MissingRanksError: a rank did not take part.
            RuntimeError: a rank sends more than `capacity` rows to one; the message names it and
                the capacity that is needed. All ranks raise it: on CPUs from this call (or wait),
                on GPUs, where weights become NaN at once, from the next create_routing or close.
        """
        work = self._dispatch(x, routing, dtype or self.recipe.input_dtype)
        return work if async_op else work.wait()

    @torch._disable_dynamo
    def _dispatch(self, x: Tensor, routing: Routing, dtype: torch.dtype) -> Work[Rows]:
        _check_tokens(x, routing)
        options = quantizer_options(dtype, self.recipe)
        if self._exchange is None:
            assert routing.offsets is not None
            data, scale = moe_permute_quantize_1x128(x, routing.slots, **options)
            weight = torch.empty(data.shape[0], dtype=torch.float32, device=x.device)
            weight.index_copy_(0, routing.slots.flatten().long(), routing.weights.flatten())
            rows = Rows(data, scale, routing.offsets, weight)
            return Work(lambda: rows, _now)
        assert routing.sent is not None and routing.expected is not None
        assert routing.rank_slots is not None
        header = not routing.is_received
        ids, weights = (routing.ids, routing.weights) if header else (None, None)
        count = sum(routing.sent.tokens)
        message = moe_pack_1x128(x, routing.rank_slots, ids, weights, count, **options)
        if header and routing.needed is not None:
            _control_rows(message, self.num_ranks).copy_(routing.needed)
        purpose = "the dispatch of tokens"
        arrived, is_completed = self._exchange.rows(
            message, routing.sent.tokens, routing.expected.tokens, purpose
        )
        columns = x.shape[1]
        return Work(
            lambda: self._unpacked(arrived(), routing, columns, dtype, header), is_completed
        )

    def _unpacked(
        self, message: Tensor, routing: Routing, columns: int, dtype: torch.dtype, header: bool
    ) -> Rows:
        assert routing.expected is not None
        options: dict[str, Any] = {} if dtype is torch.float8_e4m3fn else {"dtype": dtype}
        count = sum(routing.expected.choices)
        if not header:
            known = routing.received
            data, scale, _ = moe_unpack_1x128(
                message, known.slots, known.offsets, columns, count, header=False, **options
            )
            return Rows(data, scale, known.offsets, known.weight)
        lost = None
        if routing.needed is not None:
            lost = self._check_needed(_control_rows(message, self.num_ranks).flatten())
        slots, offsets, back = self._rows_of(message, routing, columns)
        data, scale, weight = moe_unpack_1x128(message, slots, offsets, columns, count, **options)
        if lost is not None:
            weight = torch.where(lost, torch.nan, weight)
        routing.receive(Received(slots, offsets, back, weight))
        return Rows(data, scale, offsets, weight)

    def _rows_of(
        self, message: Tensor, routing: Routing, columns: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """slots, offsets and back of `Received`, from the ids in a message's headers."""
        assert self._exchange is not None and routing.expected is not None
        choices, here = routing.ids.shape[1], self.num_local_experts
        layout = MessageLayout.of(columns, choices)
        ids = message[:, layout.ids : layout.weights].view(torch.int32)
        local = ids - self._exchange.rank * here
        exists = (ids >= 0) & (local >= 0) & (local < here)
        every_slot, offsets = moe_route(torch.where(exists, local, -1), here)
        if self.capacity is None:
            place = exists.flatten().cumsum(0, dtype=torch.int32) - 1
        else:
            of_rank = exists.view(self.num_ranks, -1).cumsum(1, dtype=torch.int32) - 1
            starts = torch.arange(self.num_ranks, dtype=torch.int32, device=ids.device)
            place = (of_rank + starts[:, None] * self.capacity).flatten()
        back = torch.empty_like(place)
        back[every_slot.flatten().long()] = torch.where(exists.flatten(), place, -1)
        count = sum(routing.expected.choices)
        return kept_slots(every_slot, exists), offsets, back[:count, None]

    # ---- combine ----

    def combine(
        self,
        y: Tensor,
        routing: Routing,
        *,
        residual: Tensor | None = None,
        exact: bool = True,
        out_dtype: torch.dtype | None = None,
        async_op: bool = False,
    ) -> Any:
        """The sum of each token's rows. Also the backward of `dispatch`, with the rows' gradients
        for y. It has no gradient itself.

        Args:
            y: [S, K], bfloat16, float16 or float32, the same dtype on all ranks: one row for each
                row that dispatch returned. Apply the rows' weights before (`experts` does).
            routing: the one that was dispatched.
            residual: [T, K], of y's dtype: added before the sum is rounded.
            exact: True: every row returns, and sums are FP32 in the order of the choices, the same
                bits for any number of ranks. False: each rank sums a token's rows first and rounds
                the sum, which sends less and depends on where experts are.
            out_dtype: of the result; y's if None.
            async_op: return a Work, whose `wait` returns the sums.

        Returns:
            [T, K], contiguous, or a Work with it.

        Raises:
            ValueError: y does not have the routing's rows.
            RuntimeError: nothing was dispatched with this routing.
            MissingRanksError: a rank did not take part.
        """
        work = self._combine(y, routing, residual, exact, out_dtype)
        return work if async_op else work.wait()

    @torch._disable_dynamo
    def _combine(
        self,
        y: Tensor,
        routing: Routing,
        residual: Tensor | None,
        exact: bool,
        out_dtype: torch.dtype | None,
    ) -> Work[Tensor]:
        _check_rows(y, routing)

        def total(rows: Tensor, slots: Tensor) -> Tensor:
            return moe_combine(rows, slots, residual=residual, out_dtype=out_dtype)

        if self._exchange is None:
            exists = (routing.ids >= 0) & (routing.ids < self.num_experts)
            out = total(y, kept_slots(routing.slots, exists))
            return Work(lambda: out, _now)
        assert routing.sent is not None and routing.expected is not None
        assert routing.rank_slots is not None
        known = routing.received
        if exact:
            rows = moe_permute(y, known.back, rows=sum(routing.expected.choices))
            counts = routing.expected.choices, routing.sent.choices
            slots = routing.slots
        else:
            rows = moe_combine(y, known.slots)
            counts = routing.expected.tokens, routing.sent.tokens
            slots = routing.rank_slots
        arrived, is_completed = self._exchange.rows(rows, *counts, "the return of rows")
        return Work(lambda: total(arrived(), slots), is_completed)

    @torch._disable_dynamo
    def to_choices(self, values: Tensor, routing: Routing) -> Work[Tensor]:
        """The value of each choice's row: values [S] as [T, k], zeros for choices of no expert.
        Backward needs it for the gradient of the weights.

        Raises the errors of `combine`.
        """
        _check_rows(values, routing)
        if self._exchange is None:
            exists = (routing.ids >= 0) & (routing.ids < self.num_experts)
            of_choices = torch.where(exists, values[routing.slots.long()], 0)
            return Work(lambda: of_choices, _now)
        assert routing.sent is not None and routing.expected is not None
        back = routing.received.back[:, 0]
        count = sum(routing.expected.choices)
        rows = values.new_zeros(count + 1)
        rows[torch.where(back >= 0, back, count).long()] = values
        arrived, is_completed = self._exchange.rows(
            rows[:count, None],
            routing.expected.choices,
            routing.sent.choices,
            "the return of the weights' gradients",
        )

        def of_slots() -> Tensor:
            returned = torch.cat((arrived()[:, 0], values.new_zeros(1)))
            return returned[routing.slots.long()]  # -1 is the zero

        return Work(of_slots, is_completed)

    # ---- capacity ----

    def _check_needed(self, needed: Tensor) -> Tensor | None:
        """needed: [R], the most rows that each rank sends to one. On a GPU, returns whether rows
        are lost, which `_report_overflow` tells the host later."""
        if not needed.is_cuda:
            self._raise_if_lost(needed.tolist())
            return None
        assert self.capacity is not None
        if not torch.cuda.is_current_stream_capturing():
            copy = torch.empty(needed.shape, dtype=needed.dtype, pin_memory=True)
            copy.copy_(needed, non_blocking=True)
            event = torch.cuda.Event()
            event.record()
            self._report_overflow()
            self._overflow = copy, event
        return (needed > self.capacity).any()

    def _report_overflow(self) -> None:
        if self._overflow is not None:
            (needed, event), self._overflow = self._overflow, None
            event.synchronize()  # of an earlier dispatch
            self._raise_if_lost(needed.tolist())

    def _raise_if_lost(self, needed: list[int]) -> None:
        assert self._exchange is not None and self.capacity is not None
        over = {
            rank: rows
            for rank, rows in zip(self._exchange.global_ranks, needed, strict=True)
            if rows > self.capacity
        }
        if over:
            names = ", ".join(f"rank {rank} sends {rows} rows" for rank, rows in over.items())
            raise RuntimeError(
                f"torchext.moe.Dispatcher: capacity must be at least {max(over.values())} (got "
                f"{self.capacity}; {names} to one rank); raise it, or pass capacity=None"
            )

    def close(self) -> None:
        """Gives up the process group that `timeout` made. Collective calls must have ended.

        Raises RuntimeError if, on a GPU, the last dispatch lost rows.
        """
        if self._exchange is not None:
            self._exchange.close()
        self._report_overflow()


_NAME = "torchext.moe.Dispatcher"


def _check_experts(num_experts: int, ranks: int, transport: str) -> None:
    if transport == "symmetric":
        raise NotImplementedError(
            f'{_NAME}: transport "symmetric" does not exist yet; pass "all_to_all" or "auto"'
        )
    if transport not in _TRANSPORTS:
        raise ValueError(
            f"{_NAME}: transport must be one of {', '.join(_TRANSPORTS)} (got {transport!r}); "
            '"auto" is a good first choice'
        )
    if num_experts < 1 or num_experts % ranks:
        raise ValueError(
            f"{_NAME}: num_experts must be a multiple of the group's {ranks} ranks (got "
            f"{num_experts}); each rank holds equally many"
        )


def _check_options(recipe: Recipe, capacity: int | None, timeout: float | None) -> None:
    if recipe.granularity != "blockwise":
        raise ValueError(
            f"{_NAME}: recipe must be blockwise (got {recipe}); rows of a message have 1x128 scales"
        )
    if capacity is not None and capacity < 1:
        raise ValueError(
            f"{_NAME}: capacity must be a positive number of rows, or None (got {capacity})"
        )
    if timeout is not None and timeout <= 0:
        raise ValueError(f"{_NAME}: timeout must be positive seconds, or None (got {timeout})")


def _check_tokens(x: Tensor, routing: Routing) -> None:
    if x.dim() != 2 or x.shape[0] != routing.ids.shape[0]:
        raise ValueError(
            f"torchext.moe.Dispatcher: x must have shape [T, K] with T = {routing.ids.shape[0]}, "
            f"the tokens of the routing (got {list(x.shape)}); pass the tokens that were routed"
        )


def _check_rows(y: Tensor, routing: Routing) -> None:
    count = routing.ids.numel() if routing.expected is None else sum(routing.expected.choices)
    if y.dim() == 0 or y.shape[0] != count:
        raise ValueError(
            f"torchext.moe.Dispatcher: there must be one row for each of the {count} that dispatch "
            f"returned (got {list(y.shape)}); pass the experts' result for all of them"
        )


def _in_blocks(slots: Tensor, starts: Tensor, rank: Tensor, sizes: tuple[int, int]) -> Tensor:
    """Slots that count on from rank to rank, as slots in a block of rows for each rank, and -1 for
    those beyond the capacity. sizes: the capacity, and the rows of a block."""
    capacity, pitch = sizes
    index = slots - starts
    return torch.where((slots >= 0) & (index < capacity), rank * pitch + index, -1).int()


def _control_rows(message: Tensor, ranks: int) -> Tensor:
    """[R, 1], int32: the start of the last row of each rank's block, which no token has."""
    return message.view(ranks, -1, message.shape[1])[:, -1, :4].view(torch.int32)
