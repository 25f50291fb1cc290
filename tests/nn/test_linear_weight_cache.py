"""The FP8 weight that torchext.nn.Linear keeps is never stale, however the parameter changes."""

from __future__ import annotations

import copy
import ctypes
import threading
from collections.abc import Callable
from typing import Literal

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from support.linear_testing import (
    QUANTIZE_WEIGHT,
    OpCounter,
    assert_quantized_afresh,
    gradient,
    halve,
    main_recipes,
    normal,
    normal_linear,
    train_step,
)
from support.weight_changes import RECORDED, UNRECORDED, copies_of, kept, name_of, square_linear
from torchext import fixed_weights
from torchext.nn import Linear

pytestmark = pytest.mark.large  # keeping weights does not depend on the kernels


# ---- reuse ----


@main_recipes
def test_weight_is_quantized_once_for_all_micro_steps(device, recipe):
    linear = normal_linear(device, recipe=recipe)
    x = normal(8, 200, device=device, grad=True)
    first = train_step(linear, x)
    weight = linear._quantized_weight(linear.weight, x)
    for _ in range(3):
        assert torch.equal(train_step(linear, x), first)
    with torch.no_grad():
        linear(x)
    gradient(linear.weight).zero_()
    if device.type == "cpu":
        assert linear._quantized_weight(linear.weight, x) is weight
    else:
        assert weight is None and len(linear._weight_cache) == 0


def test_gradient_accumulation_adds_up(device):
    accumulated, single = normal_linear(device), normal_linear(device)
    x = normal(2, 8, 200, device=device)
    for half in x:
        accumulated(half).sum().backward()
    gradients = []
    for half in x:
        single.zero_grad()
        single(half).sum().backward()
        gradients.append(gradient(single.weight).clone())
    assert torch.equal(gradient(accumulated.weight), gradients[0] + gradients[1])


def test_equal_bytes_are_the_same_weight(device):
    linear = square_linear(device)
    x = normal(8, 160, device=device)
    linear(x)
    linear.load_state_dict({name: t.clone() for name, t in linear.state_dict().items()})
    assert_quantized_afresh(linear, x, times=kept(device))
    linear.weight = torch.nn.Parameter(linear.weight.detach().clone())
    assert_quantized_afresh(linear, x, times=kept(device))


def test_weight_made_without_gradients_gets_what_dgrad_needs(device):
    linear = normal_linear(device).eval()
    x = normal(8, 200, device=device)
    with torch.no_grad():
        linear(x)
    x.requires_grad_()
    linear(x).sum().backward()
    other = normal_linear(device)
    dx, x.grad = x.grad, None
    other(x).sum().backward()
    assert torch.equal(dx, x.grad)


# ---- changes of the parameter ----


@pytest.mark.parametrize("change", [*RECORDED, *UNRECORDED], ids=name_of)
def test_weight_is_quantized_anew_after(device, change):
    linear = square_linear(device)
    x = normal(8, 160, device=device, grad=True)
    train_step(linear, x)
    assert_quantized_afresh(linear, x, times=kept(device))
    change(linear)
    assert_quantized_afresh(linear, x)


def test_writes_by_numpy_and_by_foreign_code_are_seen():
    linear = square_linear(torch.device("cpu"))
    x = normal(8, 160, device=torch.device("cpu"))
    linear(x)
    linear.weight.detach().numpy()[5] = 3.0
    assert_quantized_afresh(linear, x)
    ctypes.memset(linear.weight.data_ptr() + 4 * 160 * 159, 0, 4 * 160)  # the last row
    assert_quantized_afresh(linear, x)


def test_storage_freed_and_used_again_is_noticed(device):
    # `.data =` does not change the version counter, and an allocator may reuse the old address.
    linear = square_linear(device)
    x = normal(8, 160, device=device)
    for scale in (0.5, 2.0, 4.0, 8.0):
        linear(x)
        values = linear.weight.detach() * scale
        linear.weight.data = torch.empty(0, device=device)
        linear.weight.data = values
        assert_quantized_afresh(linear, x)


@pytest.mark.parametrize("swap", [False, True])
def test_tied_layers_can_be_converted(device, swap):
    model = torch.nn.Sequential(square_linear(device), square_linear(device))
    model[1].weight = model[0].weight
    x = normal(8, 160, device=device)
    model(x)
    torch.__future__.set_swap_module_params_on_conversion(swap)
    try:
        model.to(torch.bfloat16)
        model(x)
        model.load_state_dict({name: t * 0.5 for name, t in model.state_dict().items()})
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)
    for layer in model:
        assert isinstance(layer, Linear) and layer.weight.dtype == torch.bfloat16
        assert_quantized_afresh(layer, x)


@pytest.mark.parametrize(
    "view",
    [
        lambda w: w.t().contiguous().t(),
        lambda w: torch.nn.functional.pad(w, (3, 5))[:, 3:-5],  # a row pitch, and misaligned rows
        lambda w: torch.cat([w, w.flip(0)])[160:],  # part of a fused weight
        lambda w: w[:1].expand(160, 160),
        lambda w: w.repeat_interleave(4, 1)[:, ::4],  # so sparse that a hash would not pay
    ],
    ids=["transposed", "pitched", "offset", "expanded", "sparse"],
)
def test_strided_weights(device, view):
    linear = square_linear(device)
    linear.weight.data = view(linear.weight.data)
    x = normal(8, 160, device=device)
    linear(x)
    linear.weight.data[0].mul_(-0.5)
    assert_quantized_afresh(linear, x)
    linear.weight.data[0, 159].fill_(7)
    assert_quantized_afresh(linear, x)


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
@pytest.mark.parametrize("k, n", [(0, 8), (8, 0), (0, 0)])
def test_weights_without_elements(device, k, n):
    linear = Linear(k, n, device=device)
    x = torch.ones(3, k, device=device)
    for _ in range(2):
        assert torch.equal(linear(x), linear.bias.expand(3, n))
    assert len(linear._weight_cache) == 0


def test_weights_made_in_inference_mode(device):
    with torch.inference_mode():
        linear = normal_linear(device)
        x = normal(8, 200, device=device)
        before = linear(x)
        assert_quantized_afresh(linear, x, times=kept(device))
        linear.weight.mul_(0.5)
        linear.bias.mul_(0.5)
        assert torch.equal(linear(x), before * 0.5)


def test_inference_mode_then_training(device):
    linear = normal_linear(device)
    x = normal(8, 200, device=device)
    with torch.inference_mode():
        y = linear(x)
    assert torch.equal(train_step(linear, x.requires_grad_()), y)


def test_threads_share_a_layer(device):
    linear = normal_linear(device)
    x = normal(8, 200, device=device)
    expected, wrong = linear(x), []

    def forward() -> None:
        for i in range(20):
            linear.refresh_weight()
            if not torch.equal(linear(x.requires_grad_(i % 2 == 0)), expected):
                wrong.append(i)

    threads = [threading.Thread(target=forward) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def _receive_and_share(rank: int, where: str, shared: Linear, queue) -> None:
    """Receives a weight in each way and reports changes that were not noticed; writes `shared`."""
    torch.set_num_threads(1)
    dist = torch.distributed
    dist.init_process_group("gloo", init_method=f"file://{where}", rank=rank, world_size=2)
    torch.manual_seed(rank)
    linear, x = Linear(200, 72), torch.ones(5, 200)
    weight = linear.weight
    ways = {
        "broadcast": lambda: dist.broadcast(weight, 0),
        "all_reduce": lambda: dist.all_reduce(weight),
        "scatter": lambda: dist.scatter(weight, [weight * 3, weight * 5] if rank == 0 else None),
        "recv": lambda: dist.recv(weight, 0) if rank == 1 else dist.send(weight * 2, 1),
        "asynchronous": lambda: dist.broadcast(weight, 1, async_op=True).wait(),
    }
    missed = []
    with torch.no_grad():
        for name, way in ways.items():
            weight.data.normal_()
            linear(x)
            way()
            if not torch.equal(linear(x), copy.deepcopy(linear)(x)):
                missed.append(name)
        if rank == 0:
            shared.weight[7] = 7.0
    queue.put(missed)
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.slow
def test_weights_from_other_processes_are_used(tmp_path):
    shared = normal_linear(torch.device("cpu")).share_memory()
    x = normal(8, 200, device=torch.device("cpu"))
    shared(x)
    context = torch.multiprocessing.get_context("spawn")
    queue = context.Queue()
    workers = [
        context.Process(
            target=_receive_and_share, args=(rank, str(tmp_path / "init"), shared, queue)
        )
        for rank in range(2)
    ]
    for worker in workers:
        worker.start()
    try:
        assert [queue.get(timeout=120) for _ in workers] == [[], []]
    finally:
        for worker in workers:
            worker.join(60)
            worker.kill()
    assert shared.weight[7, 0] == 7
    assert_quantized_afresh(shared, x)


def test_the_format_of_the_bytes_counts(device):
    linear = normal_linear(device, dtype=torch.bfloat16)
    x = normal(8, 200, device=device)
    linear(x)
    linear.weight.data = linear.weight.data.view(torch.float16)
    assert_quantized_afresh(linear, x)


# ---- memory ----


def test_switch_of_mode_frees_what_is_kept(device):
    linear = normal_linear(device)
    x = normal(8, 200, device=device)
    linear(x)
    linear.train()  # no change of mode: some trainers call this before every micro-step
    assert len(linear._weight_cache) == 1 - kept(device)
    linear.eval()
    assert len(linear._weight_cache) == 0
    linear(x)
    torch.nn.Sequential(linear).train()
    assert len(linear._weight_cache) == 0


@pytest.mark.parametrize("end", ["die", "refresh", "convert"])
def test_what_is_kept_is_freed(device, end):
    linear = normal_linear(device)
    x = normal(8, 200, device=device)
    with fixed_weights(linear):
        linear(x)
        operand = linear._quantized_weight(linear.weight, x)
        assert operand is not None and operand.data is not None
        data = operand.data
        reference = torch.multiprocessing.reductions.StorageWeakRef(data.untyped_storage())
        del operand, data
        assert not reference.expired()
        if end == "refresh":
            linear.refresh_weight()
        elif end == "convert":
            linear.to(torch.bfloat16)
    if end == "die":
        del linear
    assert reference.expired()


def test_what_is_kept_is_not_copied_pickled_or_saved(device):
    linear = normal_linear(device)
    x = normal(8, 200, device=device)
    y = linear(x)
    for clone in copies_of(linear)[1:]:
        assert type(clone) is Linear and clone.recipe == linear.recipe
        assert len(clone._weight_cache) == 0
        assert torch.equal(clone(x), y)
        halve(clone)
        assert_quantized_afresh(clone, x)
    assert set(linear.state_dict()) == {"weight", "bias"}
    assert not list(linear.buffers())
    assert_quantized_afresh(linear, x, times=kept(device))


# ---- modes and tracers that intercept ops ----


class Halves(TorchDispatchMode):
    """A user's mode that changes results: it halves the scale of 128x128 quantization."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if "quantize_128x128" in str(func):
            result = (result[0], result[1] * 0.5, *result[2:])
        return result


@pytest.mark.parametrize("fixed", [False, True])
def test_what_a_mode_made_does_not_outlive_it(device, fixed):
    linear = normal_linear(device)
    linear.bias.data.zero_()
    x = normal(8, 200, device=device)
    with fixed_weights(linear if fixed else torch.nn.Identity()):
        y = linear(x)
        linear.refresh_weight()
        with Halves(), OpCounter() as counter:
            for _ in range(3):
                assert torch.equal(linear(x), y / 2)
        assert counter.of(*QUANTIZE_WEIGHT) == 3
        assert torch.equal(linear(x), y)


def _fake(linear: Linear, x: torch.Tensor) -> None:
    from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

    with FakeTensorMode(allow_non_fake_inputs=True):
        assert isinstance(linear(torch.empty(8, 200)), FakeTensor)


def _traced(linear: Linear, x: torch.Tensor) -> None:
    traced = torch.jit.trace(linear, (x,), check_trace=False)
    # The trace has the parameter, not FP8 data.
    assert "torchext::_linear" in str(traced.inlined_graph)


def _made_by_fx(
    mode: Literal["real", "fake", "symbolic"], pre_dispatch: bool = False
) -> Callable[[Linear, torch.Tensor], None]:
    from torch.fx.experimental.proxy_tensor import make_fx

    def make(linear: Linear, x: torch.Tensor) -> None:
        tracer = make_fx(
            linear, tracing_mode=mode, pre_dispatch=pre_dispatch, _allow_non_fake_inputs=True
        )
        assert ("torchext._linear" if pre_dispatch else "quantize_128x128") in tracer(x).code

    return make


INTERPRETERS = {
    "fake": _fake,
    "jit.trace": _traced,
    "make_fx": _made_by_fx("real"),
    "make_fx, fake": _made_by_fx("fake"),
    "make_fx above autograd": _made_by_fx("real", pre_dispatch=True),
}


@pytest.mark.filterwarnings("ignore:.torch.jit.trace. is deprecated")
@pytest.mark.parametrize("first", [False, True], ids=["new", "used"])
@pytest.mark.parametrize("fixed", [False, True], ids=["plain", "fixed"])
@pytest.mark.parametrize("interpreter", INTERPRETERS)
def test_interpreters_see_the_parameter_and_leave_no_trace(interpreter, fixed, first):
    device = torch.device("cpu")
    linear = normal_linear(device)
    x = normal(8, 200, device=device)
    expected = copy.deepcopy(linear)(x)
    with fixed_weights(linear if fixed else torch.nn.Identity()), torch.no_grad():
        if first:
            linear(x)
        before = dict(linear._weight_cache._kept)
        INTERPRETERS[interpreter](linear, x)
        assert linear._weight_cache._kept == before
        assert type(linear(x)) is torch.Tensor
        assert torch.equal(linear(x), expected)
