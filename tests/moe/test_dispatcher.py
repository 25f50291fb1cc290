"""Dispatch and combine on gloo with two, four and eight ranks against one process.

Eight processes are started once (tests/support/moe_ranks.py). Together they run one check; four of
them, and pairs of these, run all others. The tests here compare what they have found.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

import torchext
from support import moe_ranks
from support.linear_testing import sqnr
from support.moe_ranks import (
    CHOICES,
    EXPERTS,
    HIDDEN,
    IN_DETAIL,
    PROBLEMS,
    RECIPES,
    TOKENS,
    Problem,
)
from support.ranks import rank_context
from torchext import Recipe, ops
from torchext.moe import Dispatcher, Work
from torchext.ops.experts_function import ExpertsFunction
from torchext.ops.moe_messages import MessageLayout

pytestmark = pytest.mark.slow  # starts processes, each of which loads torch

RANKS, MOST = len(TOKENS), 8
EXACT = ("y", "dx", "dweights", "dresidual")


def _run(rank: int, folder: str) -> None:
    moe_ranks.main(rank, MOST, folder)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("dispatcher")


@pytest.fixture(scope="module")
def found(folder) -> list[Any]:
    """The results of each rank."""
    context = rank_context()
    ranks = [context.Process(target=_run, args=(rank, str(folder))) for rank in range(MOST)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join(240)
        rank.kill()
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(MOST)]


@pytest.fixture(scope="module")
def ended(found, folder) -> list[Any]:
    return [
        torch.load(folder / f"{rank}.ended.pt", weights_only=False) for rank in range(RANKS - 1)
    ]


def one_process(name: str, recipe: Recipe = RECIPES[""], **options: Any) -> dict[str, Any]:
    dispatcher = Dispatcher(EXPERTS, recipe=recipe)
    assert dispatcher.transport == "local"
    return moe_ranks.layer(dispatcher, Problem(name), slice(None), **options)


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    bits = [t.clone(memory_format=torch.contiguous_format).flatten() for t in (a, b)]
    return (a.dtype, a.shape) == (b.dtype, b.shape) and torch.equal(
        *(t.view(torch.uint8) for t in bits)
    )


def assert_same(found: list[Any], size: int, key: Any, expected: dict[str, Any]) -> None:
    for rank in range(RANKS):
        tokens = Problem("any").of_rank(rank % size, size)
        for name in EXACT:
            assert same_bits(found[rank][size][key][name], expected[name][tokens]), (rank, name)


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize(
    "name, recipe",
    [*((name, "") for name in PROBLEMS), *((name, "powers of two") for name in IN_DETAIL)],
)
def test_the_number_of_ranks_changes_no_bit(found, name, recipe, size):
    assert_same(found, size, (name, recipe), one_process(name, RECIPES[recipe]))


def test_eight_ranks_change_no_bit(found):
    expected, problem = one_process("special numbers"), Problem("special numbers")
    for rank in range(MOST):
        for name in EXACT:
            wanted = expected[name][problem.of_rank(rank, MOST)]
            assert same_bits(found[rank][8]["special numbers", ""][name], wanted), (rank, name)


@pytest.mark.parametrize("size", [2, 4])
def test_experts_of_any_kind_get_the_same_bits(found, size):
    problem = Problem("any")
    expected = moe_ranks.of_any_function(Dispatcher(EXPERTS), problem, slice(None))
    for rank in range(RANKS):
        for name, value in found[rank][size]["any function"].items():
            wanted = expected[name][problem.of_rank(rank % size, size)]
            assert same_bits(value, wanted), (rank, name)


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("name", IN_DETAIL)
def test_fixed_messages_change_no_bit(found, name, size):
    assert_same(found, size, (name, "capacity"), one_process(name))


@pytest.mark.parametrize("size", [2, 4])
def test_recomputation_uses_the_same_routing(found, size):
    assert_same(found, size, "recomputed", one_process("any"))


@pytest.mark.parametrize("size", [2, 4])
def test_the_layer_with_a_shared_expert(found, size):
    expected = moe_ranks.module(None, Problem("any"), slice(None))
    for rank in range(RANKS):
        tokens = Problem("any").of_rank(rank % size, size)
        for name, value in found[rank][size]["module"].items():
            assert same_bits(value, expected[name][tokens]), (rank, name)


def test_compiled(found):
    for rank in range(2):
        eager, compiled = found[rank][2]["any", ""], found[rank][2]["compiled"]
        assert all(same_bits(compiled[name], eager[name]) for name in eager)


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize(
    "name, key",
    [
        ("any", ""),
        ("any", "not exact"),
        ("any", "capacity, not exact"),
        ("all choose one", ""),
        ("empty experts", ""),
    ],
)
def test_gradients_of_parameters_and_sums_by_rank_are_close(found, name, key, size):
    expected, here = one_process(name), EXPERTS // size
    for rank in range(RANKS):
        result, at = found[rank][size][name, key], rank % size
        tokens = Problem(name).of_rank(at, size)
        for grad in ("dup", "ddown"):
            wanted = expected[grad][at * here : (at + 1) * here]
            assert torch.equal(result[grad].flatten(1).any(1), wanted.flatten(1).any(1))
            if wanted.any():
                assert sqnr(wanted.double(), result[grad].double()) > 25
        if at in (0, 2):  # they have tokens
            for part in ("y", "dx"):
                assert sqnr(expected[part][tokens].double(), result[part].double()) > 40


@pytest.mark.parametrize("name", PROBLEMS)
@pytest.mark.parametrize("size", [2, 4])
def test_rows_are_those_of_one_process(found, name, size):
    """Data, scales, weights and order of an expert's rows."""
    problem, here = Problem(name), EXPERTS // size
    all_rows = moe_ranks.rows_of_rank(Dispatcher(EXPERTS), problem, slice(None))
    ends = [0, *all_rows["offsets"].tolist()]
    for rank in range(RANKS):
        at = rank % size
        rows = found[rank][size][name, "rows"]
        of_rank = slice(ends[at * here], ends[(at + 1) * here])
        for part in ("data", "scale", "weight"):
            assert same_bits(rows[part], all_rows[part][of_rank]), (rank, part)
        assert (rows["offsets"] + of_rank.start).tolist() == ends[
            at * here + 1 : (at + 1) * here + 1
        ]
        tokens = problem.of_rank(at, size)
        assert same_bits(rows["sum"], all_rows["sum"][tokens])
        assert len(rows["data"]) == sum(
            found[other][size][name, "rows"]["needed"][at]
            for other in range(rank - at, rank - at + size)
        )


def test_every_choice_gets_the_value_of_its_row(found):
    """The number of each choice's row, on the rank that holds its expert."""
    problem = Problem("any")
    _, offsets = ops.moe_route(problem.ids, EXPERTS)
    for size in (2, 4):
        here = EXPERTS // size
        slots = ops.moe_route(problem.ids, EXPERTS)[0]
        home = (problem.ids // here).clamp(0, size - 1)
        starts = torch.tensor([0, *offsets.tolist()])[home * here]
        exists = (problem.ids >= 0) & (problem.ids < EXPERTS)
        expected = torch.where(exists, slots - starts, 0).float()
        for rank in range(RANKS):
            tokens = problem.of_rank(rank % size, size)
            returned = found[rank][size]["any", "rows"]["returned"]
            assert torch.equal(returned, expected[tokens])


@pytest.mark.parametrize("size", [2, 4])
def test_a_lack_of_capacity_is_an_error_on_all_ranks(found, size):
    for rank in range(RANKS):
        (kind, message), enough = found[rank][size]["too many"]
        guilty = 1 if size == 4 else rank // 2 * 2 + 1
        assert kind == "RuntimeError"
        assert "capacity must be at least 9 (got 8; " in message
        assert f"rank {guilty} sends 9 rows to one rank" in message
        assert enough == ("", "")


@pytest.mark.parametrize("size", [2, 4])
def test_bytes(found, size):
    """A token goes once to each rank that holds an expert of its choice, and never to its own."""
    problem, here = Problem("any"), EXPERTS // size
    layout = MessageLayout.of(HIDDEN, CHOICES)
    without_header = MessageLayout.of(HIDDEN, 0)
    for rank in range(RANKS):
        at = rank % size
        ids = problem.ids[problem.of_rank(at, size)]
        home = torch.where((ids >= 0) & (ids < EXPERTS), ids // here, at)
        messages = sum(len(set(row) - {at}) for row in home.tolist())
        everything = torch.cat(
            [problem.ids[problem.of_rank(r, size)] for r in range(size) if r != at]
        )
        rows = int((everything // here == at).logical_and(everything < EXPERTS).sum())
        sent = messages * (layout.pitch + 2 * without_header.pitch) + rows * (2 * HIDDEN + 4)
        assert found[rank][size]["bytes"] == (
            sent,
            max(17 * (min(size, CHOICES) + size) * layout.pitch, 17 * 3 * (1 + size) * 2 * HIDDEN),
        )


def test_a_late_rank_is_named(found):
    for rank in (0, 2):
        message, ranks = found[rank]["late"]
        assert ranks == (rank + 1,)
        assert f"missing: {rank + 1})" in message and "the exchange of counts" in message


def test_a_rank_that_ended_is_named(ended):
    for rank in range(RANKS - 1):
        message, ranks = ended[rank]
        assert ranks == (RANKS - 1,)
        assert f"missing: {RANKS - 1})" in message and "the dispatch of tokens" in message


# ---- one process ----


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
@pytest.mark.parametrize("name", PROBLEMS)
def test_one_process_has_the_bits_of_experts(name, recipe):
    """Converted experts, whose rows are the tokens themselves, give the same bits."""
    problem, result = Problem(name), one_process(name, recipe)
    leaves = (problem.x, problem.weights, problem.up, problem.down, problem.residual)
    x, weights, up, down, residual = (t.clone().requires_grad_() for t in leaves)
    config = moe_ranks.config_of(recipe)
    y = ExpertsFunction.apply(x, problem.ids, weights, config, [None, None], up, down, residual)
    y.backward(problem.grad)
    found = {"y": y.detach(), "dx": x.grad, "dweights": weights.grad, "dresidual": residual.grad}
    for part, value in found.items():
        assert same_bits(result[part], value), part


def test_a_copied_layer_shares_the_dispatcher():
    layer = torchext.nn.MoE(256, 128, 8, dispatcher=Dispatcher(8))
    assert copy.deepcopy(layer).dispatcher is layer.dispatcher
    assert "num_experts=8 on 1 ranks" in repr(layer)


def test_work_and_closing():
    problem, dispatcher = Problem("any"), Dispatcher(EXPERTS)
    routing = dispatcher.create_routing(problem.ids, problem.weights)
    work = dispatcher.dispatch(problem.x, routing, async_op=True)
    assert isinstance(work, Work) and work.is_completed()
    y = ops.dequantize(*work.wait()[:2], out_dtype=torch.bfloat16)
    assert isinstance(dispatcher.combine(y, routing, async_op=True), Work)
    assert (dispatcher.num_ranks, dispatcher.bytes_sent) == (1, 0)
    assert dispatcher.buffer_bytes(4096, 7168, 8) == 0
    dispatcher.close()


def failing(problem: Problem, **changes: Any) -> None:
    dispatcher = Dispatcher(EXPERTS)
    routing = dispatcher.create_routing(
        changes.get("ids", problem.ids), changes.get("weights", problem.weights)
    )
    dispatcher.dispatch(changes.get("x", problem.x), routing)
    dispatcher.combine(changes.get("y", problem.x), routing)


P = Problem("any")
UNKNOWN: Any = "nvshmem"


@pytest.mark.parametrize(
    "call, error, message",
    [
        (lambda: Dispatcher(8, transport="symmetric"), NotImplementedError, "does not exist yet"),
        (lambda: Dispatcher(8, transport=UNKNOWN), ValueError, "must be one of auto, local"),
        (lambda: Dispatcher(8, transport="all_to_all"), ValueError, "needs torch.distributed"),
        (lambda: Dispatcher(0), ValueError, "multiple of the group's 1 ranks"),
        (lambda: Dispatcher(8, recipe=Recipe.rowwise()), ValueError, "must be blockwise"),
        (lambda: Dispatcher(8, capacity=0), ValueError, "capacity must be a positive"),
        (lambda: Dispatcher(8, timeout=-1), ValueError, "timeout must be positive"),
        (lambda: failing(P, ids=P.ids[:, 0]), ValueError, r"must have one shape \[T, k\]"),
        (lambda: failing(P, ids=P.ids[:, :0], weights=P.weights[:, :0]), ValueError, "k > 0"),
        (lambda: failing(P, x=P.x[1:]), ValueError, "x must have shape .* T = 31"),
        (lambda: failing(P, y=P.x), ValueError, "one row for each of the 93"),
        (
            lambda: torchext.nn.MoE(256, 128, 4, dispatcher=Dispatcher(8)),
            ValueError,
            r"num_experts must be the dispatcher's, 8 \(got 4\)",
        ),
        (
            lambda: torchext.nn.MoE(
                256, 128, 8, dispatcher=Dispatcher(8), recipe=Recipe(pow2_scale=True)
            ),
            ValueError,
            "recipe must be the dispatcher's",
        ),
    ],
)
def test_errors(call, error, message):
    assert not dist.is_initialized()
    with pytest.raises(error, match=message):
        call()
