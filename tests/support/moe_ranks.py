"""What each rank does in tests/moe/test_dispatcher.py: every check, in one process a rank."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from torchext import Recipe, ops
from torchext.moe import Dispatcher, MissingRanksError, experts, transport
from torchext.moe.wide_rows import combine_rows, dispatch_rows
from torchext.nn import MoE
from torchext.ops.mlp_function import MLP

EXPERTS, CHOICES, HIDDEN, INNER = 8, 3, 256, 128
TOKENS = (5, 0, 17, 9)  # of each rank of four; ranks of two have those of two of them
EIGHTHS = (3, 2, 0, 0, 8, 9, 9, 0)  # of each rank of eight
RECIPES = {"": Recipe(), "powers of two": Recipe(pow2_scale=True, grad_dtype=torch.float8_e5m2)}
Found = dict[Any, Any]


def config_of(recipe: Recipe) -> MLP:
    return MLP("silu_mul", None, recipe, torch.bfloat16, "bf16")


class Problem:
    """Tokens of all ranks with a gradient and their choices, and the weights of all experts."""

    def __init__(self, name: str) -> None:
        generator = torch.Generator().manual_seed(sum(map(ord, name)))
        normal = partial(torch.randn, generator=generator)
        tokens = sum(TOKENS)
        self.x, self.grad = (normal(tokens, HIDDEN).bfloat16() for _ in range(2))
        self.up = (normal(EXPERTS, 2 * INNER, HIDDEN) / HIDDEN**0.5).bfloat16()
        self.down = (normal(EXPERTS, HIDDEN, INNER) / INNER**0.5).bfloat16()
        self.weights = torch.rand(tokens, CHOICES, generator=generator)
        self.residual = normal(tokens, HIDDEN).bfloat16()
        # Some ids are -1, some beyond the experts, and some tokens choose an expert twice.
        self.ids = torch.randint(-1, EXPERTS + 1, (tokens, CHOICES), generator=generator)
        if name == "all choose one":
            self.ids.fill_(EXPERTS - 1)
        elif name == "none chooses":
            self.ids.fill_(-1)
        elif name == "special numbers":
            self.x[1, 3], self.x[7, 200], self.grad[20, 5] = torch.nan, torch.inf, torch.nan
        elif name == "empty experts":
            self.ids = torch.where(self.ids % 2 == 0, self.ids, -1).int()

    def of_rank(self, rank: int, size: int) -> slice:
        """The tokens of a rank of `size`."""
        starts = [0, *torch.tensor(EIGHTHS).cumsum(0).tolist()]
        each = len(EIGHTHS) // size
        return slice(starts[rank * each], starts[(rank + 1) * each])


PROBLEMS = ("any", "all choose one", "none chooses", "special numbers", "empty experts")
IN_DETAIL = ("any", "special numbers")  # these run in every way, the others in the usual one


def layer(dispatcher: Dispatcher, problem: Problem, tokens: slice, **options: Any) -> Found:
    """y and the gradients of the experts of this rank, for some of the tokens."""
    here = dispatcher.num_local_experts
    rank = 0 if dispatcher.num_ranks == 1 else tokens_rank(dispatcher)
    parameters = (p[rank * here : (rank + 1) * here] for p in (problem.up, problem.down))
    leaves = [problem.x[tokens], problem.weights[tokens], *parameters, problem.residual[tokens]]
    leaves = [leaf.clone().requires_grad_() for leaf in leaves]
    x, weights, up, down, residual = leaves
    routing = dispatcher.create_routing(problem.ids[tokens], weights)

    def run(x: Tensor) -> Tensor:
        return experts(
            x,
            weights,
            up,
            down,
            dispatcher=dispatcher,
            routing=routing,
            config=config_of(dispatcher.recipe),
            residual=residual,
            **options,
        )

    recomputes = options.pop("recomputes", False)
    y = checkpoint(run, x, use_reentrant=False) if recomputes else run(x)
    grads = torch.autograd.grad(y, leaves, problem.grad[tokens])
    names = ("dx", "dweights", "dup", "ddown", "dresidual")
    return {"y": y.detach(), **dict(zip(names, grads, strict=True))}


def tokens_rank(dispatcher: Dispatcher) -> int:
    assert dispatcher._exchange is not None
    return dispatcher._exchange.rank


def module(dispatcher: Dispatcher | None, problem: Problem, tokens: slice) -> Found:
    """torchext.nn.MoE with a shared expert: y, and the gradient of x."""
    torch.manual_seed(0)
    options: dict[str, Any] = {"dispatcher": dispatcher, "dtype": torch.bfloat16}
    layer = MoE(HIDDEN, INNER, EXPERTS, shared_intermediate_size=INNER, **options)
    with torch.no_grad():
        pairs: Any = (layer.gate_up_proj, problem.up), (layer.down_proj, problem.down)
        for own, all_experts in pairs:
            first = 0 if dispatcher is None else tokens_rank(dispatcher) * len(own)
            own.copy_(all_experts[first : first + len(own)])
        shared: Any = layer.shared_experts
        for number, parameter in enumerate(shared.parameters()):
            generator = torch.Generator().manual_seed(number)
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / HIDDEN**0.5)
    x = problem.x[tokens].clone().requires_grad_()
    arguments = problem.ids[tokens], problem.weights[tokens]
    y = layer(x, *arguments)
    y.backward(problem.grad[tokens])
    with torch.no_grad():
        assert torch.equal(layer(x, *arguments), y)
    return {"y": y.detach(), "dx": x.grad}


def of_any_function(dispatcher: Dispatcher, problem: Problem, tokens: slice) -> Found:
    """The sum of the rows' tanh, and gradients: experts that are no torchext layer."""
    leaves = [t[tokens].clone().requires_grad_() for t in (problem.x, problem.weights)]
    x, weights = leaves
    routing = dispatcher.create_routing(problem.ids[tokens], weights)
    rows, _, weight = dispatch_rows(x, dispatcher, routing)
    y = combine_rows(rows.tanh(), weight, weights, dispatcher, routing)
    dx, dweights = torch.autograd.grad(y, leaves, problem.grad[tokens])
    return {"y": y.detach(), "dx": dx, "dweights": dweights}


def rows_of_rank(dispatcher: Dispatcher, problem: Problem, tokens: slice) -> Found:
    """The rows that a rank gets, from two works that run at the same time."""
    routing = dispatcher.create_routing(problem.ids[tokens], problem.weights[tokens])
    first = dispatcher.dispatch(problem.x[tokens], routing, async_op=True)
    rows = first.wait()
    assert first.wait() is rows and first.is_completed()
    works = [dispatcher.dispatch(problem.grad[tokens], routing, async_op=True) for _ in range(2)]
    again = [work.wait() for work in reversed(works)]
    assert all(torch.equal(a.weight, rows.weight) for a in again)
    assert torch.equal(again[0].data.view(torch.uint8), again[1].data.view(torch.uint8))
    y = ops.dequantize(rows.data, rows.scale, out_dtype=torch.bfloat16)
    work = dispatcher.combine(y, routing, async_op=True)
    values = torch.arange(len(y), dtype=torch.float32)
    returned = dispatcher.to_choices(values, routing).wait()
    return {
        "data": rows.data.view(torch.uint8).clone(),
        "scale": rows.scale.clone(),
        "offsets": rows.offsets,
        "weight": rows.weight,
        "sum": work.wait(),
        "returned": returned,
        "needed": routing.sent.choices if routing.sent else None,
    }


def error_of(call: Callable[[], Any]) -> tuple[str, str]:
    try:
        call()
    except Exception as error:
        return type(error).__name__, str(error)
    return "", ""


def too_many(group: Any, problem: Problem, tokens: slice) -> Any:
    """One rank sends more than the capacity allows; then all choose so that it suffices."""
    dispatcher = Dispatcher(EXPERTS, group=group, capacity=8)
    ids = problem.ids[tokens].fill_(-1)
    ids[:3] = 0 if dist.get_rank(group) == 1 else -1  # rank 1 sends nine choices to rank 0
    routing = dispatcher.create_routing(ids, problem.weights[tokens])
    lost = error_of(lambda: dispatcher.dispatch(problem.x[tokens], routing))
    ids[0, 0] = -1
    routing = dispatcher.create_routing(ids, problem.weights[tokens])
    return lost, error_of(lambda: dispatcher.dispatch(problem.x[tokens], routing))


def compiled(dispatcher: Dispatcher, problem: Problem, tokens: slice) -> Found:
    torch._dynamo.reset()
    return torch.compile(partial(layer, dispatcher), backend="eager")(problem, tokens)


def checks_of(group: Any) -> Found:
    """Every check that needs no rank to fail."""
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    found: Found = {}
    for name in PROBLEMS:
        problem = Problem(name)
        tokens = problem.of_rank(rank, size)
        dispatcher = Dispatcher(EXPERTS, group=group)
        found[name, ""] = layer(dispatcher, problem, tokens)
        found[name, "rows"] = rows_of_rank(dispatcher, problem, tokens)
        if name not in IN_DETAIL:
            continue
        other = Dispatcher(EXPERTS, group=group, recipe=RECIPES["powers of two"])
        found[name, "powers of two"] = layer(other, problem, tokens)
        found[name, "not exact"] = layer(dispatcher, problem, tokens, exact=False)
        fixed = Dispatcher(EXPERTS, group=group, capacity=CHOICES * sum(TOKENS))
        found[name, "capacity"] = layer(fixed, problem, tokens)
        found[name, "capacity, not exact"] = layer(fixed, problem, tokens, exact=False)
    problem = Problem("any")
    tokens = problem.of_rank(rank, size)
    dispatcher = Dispatcher(EXPERTS, group=group)
    found["recomputed"] = layer(dispatcher, problem, tokens, recomputes=True)
    found["module"] = module(dispatcher, problem, tokens)
    found["any function"] = of_any_function(dispatcher, problem, tokens)
    found["too many"] = too_many(group, Problem("any"), problem.of_rank(size - 1, size))
    before = dispatcher.bytes_sent
    rows_of_rank(dispatcher, problem, tokens)
    found["bytes"] = dispatcher.bytes_sent - before, dispatcher.buffer_bytes(17, HIDDEN, CHOICES)
    if size == 2 and dist.get_rank() < 2:  # one pair is enough: importing Dynamo takes seconds
        found["compiled"] = compiled(dispatcher, problem, tokens)
    return found


def checks_of_eight() -> Found:
    problem = Problem("special numbers")
    tokens = problem.of_rank(dist.get_rank(), 8)
    return {("special numbers", ""): layer(Dispatcher(EXPERTS), problem, tokens)}


def late(group: Any) -> Any:
    """A rank does not come within the timeout."""
    problem = Problem("any")
    tokens = problem.of_rank(1, 2)
    dispatcher = Dispatcher(EXPERTS, group=group, timeout=3)  # its group must connect, too
    if dist.get_rank(group) == 1:
        return None
    try:
        dispatcher.create_routing(problem.ids[tokens], problem.weights[tokens])
    except MissingRanksError as error:
        return str(error), error.ranks
    return None


def ended(group: Any) -> Any:
    """The last rank ends between a routing and its dispatch."""
    problem = Problem("any")
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    tokens = problem.of_rank(rank, size)
    dispatcher = Dispatcher(EXPERTS, group=group, timeout=20)
    routing = dispatcher.create_routing(problem.ids[tokens], problem.weights[tokens])
    if rank == size - 1:
        os._exit(0)
    try:
        dispatcher.dispatch(problem.x[tokens], routing)
    except MissingRanksError as error:
        return str(error), error.ranks
    return None


def main(rank: int, size: int, folder: str) -> None:
    """Saves what this rank has found in `folder`."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/init", rank=rank, world_size=size)
    found: Found = {8: checks_of_eight()}
    four = dist.new_group(range(4))
    pairs = [dist.new_group([first, first + 1]) for first in (0, 2)]
    if rank >= 4:
        torch.save(found, Path(folder) / f"{rank}.pt")
        os._exit(0)
    found[4] = checks_of(four)
    found[2] = checks_of(pairs[rank // 2])
    transport._SECONDS_TO_REPORT = 1.0
    found["late"] = late(pairs[rank // 2])
    torch.save(found, Path(folder) / f"{rank}.pt")
    dist.barrier(four)
    torch.save(ended(four), Path(folder) / f"{rank}.ended.pt")
    os._exit(0)  # destroying a group whose ranks have ended may wait for them
