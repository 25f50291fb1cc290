"""The FP8 weight of torchext.nn.Linear: never stale, whoever wrote the parameter and however."""

from __future__ import annotations

import copy
import ctypes
import io
import pickle
import threading
from collections.abc import Callable

import pytest
import torch
from linear_testing import (
    QUANTIZE_WEIGHT,
    OpCounter,
    assert_quantised_afresh,
    halve,
    main_recipes,
    normal,
    normal_linear,
    train_step,
)
from torch.utils._python_dispatch import TorchDispatchMode

from torchext import Recipe, fixed_weights
from torchext.nn import Linear
from torchext.nn.weight_cache import _content_hash


def square_linear(device: torch.device) -> Linear:
    return normal_linear(device, 160, 160)


def kept(device: torch.device) -> int:
    """How often a weight that did not change is quantised by a forward: on CUDA nobody looks."""
    return 1 if device.type == "cuda" else 0


# ---- reuse ----


@main_recipes
def test_weight_is_quantised_once_for_all_micro_steps(device, recipe):
    linear = normal_linear(device, recipe=recipe)
    x = normal(8, 200, device=device, grad=True)
    first = train_step(linear, x)
    weight = linear._quantized_weight(linear.weight, x)
    for _ in range(3):
        assert torch.equal(train_step(linear, x), first)
    with torch.no_grad():
        linear(x)
    linear.weight.grad.zero_()
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
        gradients.append(single.weight.grad.clone())
    assert torch.equal(accumulated.weight.grad, gradients[0] + gradients[1])


def test_equal_bytes_are_the_same_weight(device):
    linear = square_linear(device)
    x = normal(8, 160, device=device)
    linear(x)
    linear.load_state_dict({name: t.clone() for name, t in linear.state_dict().items()})
    assert_quantised_afresh(linear, x, times=kept(device))
    linear.weight = torch.nn.Parameter(linear.weight.detach().clone())
    assert_quantised_afresh(linear, x, times=kept(device))


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


class WritesThroughData(torch.optim.Optimizer):
    """An optimiser in the old style: autograd's version counter does not see it."""

    def __init__(self, params):
        super().__init__(params, {})

    def step(self, closure=None):
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.data.mul_(0.5)


def _swap_data(linear: Linear) -> None:
    linear.weight.data = linear.weight.data * 0.5


def _transpose_data(linear: Linear) -> None:
    linear.weight.data = linear.weight.data.t()


def _negate_lazily(linear: Linear) -> None:
    linear.weight.data = torch._neg_view(linear.weight.data)


def _other_shape_of_the_same_bytes(linear: Linear) -> None:
    linear.weight.data = linear.weight.data.as_strided((160, 160), (1, 160))


def _load(linear: Linear) -> None:
    linear.load_state_dict({name: t * 0.5 for name, t in linear.state_dict().items()})


def _load_assign(linear: Linear) -> None:
    state = {name: t * 0.5 for name, t in linear.state_dict().items()}
    linear.load_state_dict(state, assign=True)


def _replace(linear: Linear) -> None:
    linear.weight = torch.nn.Parameter(linear.weight.detach() * 0.5)


def _swap_tensors(linear: Linear) -> None:
    torch.utils.swap_tensors(linear.weight, torch.nn.Parameter(linear.weight.detach() * 0.5))


def _reset(linear: Linear) -> None:
    linear.reset_parameters()


def _sgd(linear: Linear) -> None:
    torch.optim.SGD(linear.parameters(), lr=0.5).step()


def _adamw(linear: Linear) -> None:
    torch.optim.AdamW(linear.parameters(), lr=0.5, fused=True).step()


def _old_optimizer(linear: Linear) -> None:
    WritesThroughData(linear.parameters()).step()


def _bfloat16(linear: Linear) -> None:
    linear.to(torch.bfloat16)


def _recipe(linear: Linear) -> None:
    linear.recipe = Recipe.deepseek_v3(pow2_scale=True)


# What PyTorch tells of, in one way or another. A fused step leaves the version counter alone.
RECORDED = [
    halve,
    _swap_data,
    _transpose_data,
    _load,
    _load_assign,
    _replace,
    _swap_tensors,
    _reset,
    _sgd,
    _adamw,
    _old_optimizer,
    _bfloat16,
    _recipe,
    _negate_lazily,
    _other_shape_of_the_same_bytes,
]


def _merge_lora(linear: Linear) -> None:
    a, b = torch.ones(4, 160).to(linear.weight), torch.ones(160, 4).to(linear.weight)
    linear.weight.data += b @ a


def _copy_ema(linear: Linear) -> None:
    torch._foreach_lerp_([linear.weight.data], [torch.zeros_like(linear.weight)], 0.5)


def _through_detach(linear: Linear) -> None:
    torch.nn.init.normal_(linear.weight.data)


def _through_the_storage(linear: Linear) -> None:
    storage = linear.weight.untyped_storage()
    storage.copy_((linear.weight.detach() * 0.5).untyped_storage())


def _one_sign(linear: Linear) -> None:
    linear.weight.data[-1, -1] *= -1


def _all_signs(linear: Linear) -> None:
    linear.weight.data.neg_()


def _exchanged_rows(linear: Linear) -> None:
    linear.weight.data[[3, 100]] = linear.weight.data[[100, 3]]


def _exchanged_neighbours(linear: Linear) -> None:
    linear.weight.data[:, [6, 7]] = linear.weight.data[:, [7, 6]]


def _transposed_in_place(linear: Linear) -> None:
    linear.weight.data.copy_(linear.weight.data.t().clone())


def _opposite_deltas(linear: Linear) -> None:
    linear.weight.data[0, 0] += 100
    linear.weight.data[0, 1] -= 100


# What leaves no trace: not on the version counter, the address or the optimiser.
UNRECORDED = [
    _merge_lora,
    _copy_ema,
    _through_detach,
    _through_the_storage,
    _one_sign,
    _all_signs,
    _exchanged_rows,
    _exchanged_neighbours,
    _transposed_in_place,
    _opposite_deltas,
]


def _name(change: Callable[[Linear], None]) -> str:
    return change.__name__.removeprefix("_")


@pytest.mark.parametrize("change", [*RECORDED, *UNRECORDED], ids=_name)
def test_weight_is_quantised_anew_after(device, change):
    linear = square_linear(device)
    x = normal(8, 160, device=device, grad=True)
    train_step(linear, x)
    assert_quantised_afresh(linear, x, times=kept(device))
    change(linear)
    assert_quantised_afresh(linear, x)


def test_writes_by_numpy_and_by_foreign_code_are_seen():
    linear = square_linear(torch.device("cpu"))
    x = normal(8, 160, device=torch.device("cpu"))
    linear(x)
    linear.weight.detach().numpy()[5] = 3.0
    assert_quantised_afresh(linear, x)
    ctypes.memset(linear.weight.data_ptr() + 4 * 160 * 159, 0, 4 * 160)  # the last row
    assert_quantised_afresh(linear, x)


def test_storage_freed_and_used_again_is_noticed(device):
    # `.data =` leaves the version counter alone, and an allocator may hand the old address out
    # again.
    linear = square_linear(device)
    x = normal(8, 160, device=device)
    for scale in (0.5, 2.0, 4.0, 8.0):
        linear(x)
        values = linear.weight.detach() * scale
        linear.weight.data = torch.empty(0, device=device)
        linear.weight.data = values
        assert_quantised_afresh(linear, x)


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
        assert layer.weight.dtype == torch.bfloat16
        assert_quantised_afresh(layer, x)


@pytest.mark.parametrize(
    "view",
    [
        lambda w: w.t().contiguous().t(),
        lambda w: torch.nn.functional.pad(w, (3, 5))[:, 3:-5],  # rows apart, and misaligned
        lambda w: torch.cat([w, w.flip(0)])[160:],  # part of a fused weight
        lambda w: w[:1].expand(160, 160),
        lambda w: w.repeat_interleave(4, 1)[:, ::4],  # too far apart for looking to pay
    ],
    ids=["transposed", "pitched", "offset", "expanded", "sparse"],
)
def test_strided_weights(device, view):
    linear = square_linear(device)
    linear.weight.data = view(linear.weight.data)
    x = normal(8, 160, device=device)
    linear(x)
    linear.weight.data[0].mul_(-0.5)
    assert_quantised_afresh(linear, x)
    linear.weight.data[0, 159].fill_(7)
    assert_quantised_afresh(linear, x)


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
        assert_quantised_afresh(linear, x, times=kept(device))
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
    """Receives a weight in each way, and reports those that went unseen; writes `shared`."""
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
    assert_quantised_afresh(shared, x)


def test_the_format_of_the_bytes_counts(device):
    linear = normal_linear(device, dtype=torch.bfloat16)
    x = normal(8, 200, device=device)
    linear(x)
    linear.weight.data = linear.weight.data.view(torch.float16)
    assert_quantised_afresh(linear, x)


# ---- memory ----


def test_switch_of_mode_frees_what_is_kept(device):
    linear = normal_linear(device)
    x = normal(8, 200, device=device)
    linear(x)
    linear.train()  # as it was: some trainers say so before every micro-step
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
        data = linear._quantized_weight(linear.weight, x).data
        reference = torch.multiprocessing.reductions.StorageWeakRef(data.untyped_storage())
        del data
        assert not reference.expired()
        if end == "refresh":
            linear.refresh_weight()
        elif end == "convert":
            linear.to(torch.bfloat16)
    if end == "die":
        del linear
    assert reference.expired()


def copies_of(linear: Linear) -> list[Linear]:
    saved = io.BytesIO()
    torch.save(linear, saved)
    saved.seek(0)
    return [
        copy.copy(linear),
        copy.deepcopy(linear),
        pickle.loads(pickle.dumps(linear)),
        torch.load(saved, weights_only=False),
    ]


def test_what_is_kept_is_not_copied_pickled_or_saved(device):
    linear = normal_linear(device)
    x = normal(8, 200, device=device)
    y = linear(x)
    for clone in copies_of(linear)[1:]:
        assert type(clone) is Linear and clone.recipe == linear.recipe
        assert len(clone._weight_cache) == 0
        assert torch.equal(clone(x), y)
        halve(clone)
        assert_quantised_afresh(clone, x)
    assert set(linear.state_dict()) == {"weight", "bias"}
    assert not list(linear.buffers())
    assert_quantised_afresh(linear, x, times=kept(device))


# ---- fixed_weights ----


@main_recipes
def test_fixed_weights_are_quantised_once(device, recipe):
    linear = normal_linear(device, recipe=recipe)
    x = normal(8, 200, device=device, grad=True)
    with OpCounter() as alone:
        y = train_step(linear, x)
    gradients = [p.grad for p in linear.parameters()]
    linear.zero_grad()
    linear.refresh_weight()
    with fixed_weights(linear), OpCounter() as counter:
        for _ in range(3):
            linear.zero_grad()
            assert torch.equal(train_step(linear, x), y)
        with torch.no_grad():
            assert torch.equal(linear.eval()(x), y)
            linear.train()
    assert all(torch.equal(p.grad, g) for p, g in zip(linear.parameters(), gradients, strict=True))
    of_x_and_dy = {name: 3 * n for name, n in alone.calls.items() if name not in QUANTIZE_WEIGHT}
    if recipe.granularity == "blockwise":  # by whose op a weight is told from an activation
        assert alone.of(*QUANTIZE_WEIGHT) == counter.of(*QUANTIZE_WEIGHT) == 1
        assert counter.calls["quantize_1x128_dual"] == of_x_and_dy["quantize_1x128_dual"]


def test_fixed_weights_are_not_looked_at(device):
    linear = normal_linear(device)
    x = normal(8, 200, device=device)
    with fixed_weights(linear):
        y = linear(x)
        linear.weight.data.mul_(0.5)  # unseen, as documented
        assert torch.equal(linear(x), y)
        linear.refresh_weight()
        assert not torch.equal(linear(x), y)
        assert_quantised_afresh(linear, x, times=0)
    assert_quantised_afresh(linear, x)


@pytest.mark.parametrize("change", RECORDED, ids=_name)
def test_recorded_changes_of_fixed_weights_are_seen(device, change):
    linear = square_linear(device)
    x = normal(8, 160, device=device, grad=True)
    with fixed_weights(torch.nn.Sequential(linear)):
        train_step(linear, x)
        linear(x)
        change(linear)
        assert_quantised_afresh(linear, x)
        assert_quantised_afresh(linear, x, times=0)


def test_fixed_weights_nest_and_end_with_the_last(device):
    model = torch.nn.Sequential(square_linear(device), square_linear(device))
    model.append(model[0])  # shared
    x = normal(8, 160, device=device, grad=True)
    with fixed_weights(model):
        with fixed_weights(model[1]), OpCounter() as counter:
            model(x)
        model(x)
        with pytest.raises(KeyError), fixed_weights(model):
            raise KeyError
        for layer in model:
            assert_quantised_afresh(layer, x, times=0)
        assert counter.of(*QUANTIZE_WEIGHT) == 2
    assert all(len(layer._weight_cache) == layer._weight_cache.fixed == 0 for layer in model)
    for layer in model:
        layer.weight.data.mul_(0.5)
        assert_quantised_afresh(layer, x)


def test_copies_of_fixed_layers_are_not_fixed(device):
    linear = square_linear(device)
    x = normal(8, 160, device=device)
    with fixed_weights(linear):
        linear(x)
        shallow, *copies = copies_of(linear)
        for clone in copies:
            clone.weight.data.mul_(0.5)
            assert_quantised_afresh(clone, x)
            clone.weight.data.mul_(0.5)
            assert_quantised_afresh(clone, x)
        shallow.weight = torch.nn.Parameter(shallow.weight.detach() * 0.5)
        assert_quantised_afresh(shallow, x)
    for clone in (shallow, *copies):
        clone.weight.data.mul_(0.5)
        assert_quantised_afresh(clone, x)


def test_fixed_weights_of_several_recipes(device):
    linear = normal_linear(device)
    x = normal(8, 200, device=device)
    recipes = (Recipe.deepseek_v3(), Recipe.rowwise(), Recipe.deepseek_v3(pow2_scale=True))
    with fixed_weights(linear):
        for times in (1, 0, 0):
            for recipe in recipes:
                linear.recipe = recipe
                if recipe.granularity == "blockwise":
                    assert_quantised_afresh(linear, x, times=times)
        assert len(linear._weight_cache) == 2


def test_fixed_weights_wants_a_module():
    with (
        pytest.raises(
            TypeError, match=r"fixed_weights: model: expected a torch\.nn\.Module; got list"
        ),
        fixed_weights([Linear(8, 8)]),
    ):
        pass
    with fixed_weights(torch.nn.ReLU()):  # nothing to hold
        pass


def test_captured_graph_sees_the_parameter(device):
    if device.type != "cuda":
        pytest.skip("CUDA graphs: runs with --device cuda")
    linear = normal_linear(device)
    x = normal(8, 200, device=device)
    with torch.no_grad(), fixed_weights(linear):
        linear(x)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = linear(x)
        linear.weight.mul_(0.5)
        linear.bias.mul_(0.5)
        graph.replay()
        assert torch.equal(y, linear(x))


# ---- whoever else interprets ops ----


class Halves(TorchDispatchMode):
    """A user's mode that changes results: of 128x128 quantisation, the scale."""

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
    assert "torchext::_linear" in str(traced.inlined_graph)  # of the parameter, not of FP8 data


def _made_by_fx(mode: str, pre_dispatch: bool = False) -> Callable[[Linear, torch.Tensor], None]:
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


# ---- the hash ----


def hash_of(tensor: torch.Tensor) -> int:
    return _content_hash(tensor.data_ptr(), tensor.nbytes)


@pytest.mark.parametrize("size", [1, 7, 8, 4095, 4096, 4097, 20_000])
def test_each_bit_counts(size):
    data = torch.randint(256, (size,), dtype=torch.uint8)
    seen = {hash_of(data)}
    places = range(size) if size <= 8 else torch.randint(size, (40,)).tolist()
    flips = [(place, bit) for place in {*places, 0, size - 1} for bit in range(8)]
    for place, bit in flips:
        data[place] ^= 1 << bit
        seen.add(hash_of(data))
        data[place] ^= 1 << bit
    assert len(seen) == 1 + len(flips)
    assert hash_of(data) in seen


def test_lengths_and_zeros_count():
    zeros = torch.zeros(20_000, dtype=torch.uint8)
    lengths = [1, 2, 8, 16, 4095, 4096, 4097, 8192, 20_000]
    assert len({hash_of(zeros[:length]) for length in lengths}) == len(lengths)


@pytest.mark.parametrize("value", [0.0, 1.0], ids=str)
def test_order_and_sign_count_where_values_are_few(value):
    # A hash that is linear in positions takes +d, -2d, +d, or xyyx for yxxy, for no change.
    seen, n = set(), 0
    for pattern in ((1, -1), (1, -2, 1), (1, -1, -1, 1), (1, -3, 3, -1)):
        for step in (1, 2, 4, 512, 1024, 2048):
            for sign in (1, -1):
                for start in range(0, 64, 3):
                    x = torch.full((16_384,), value)
                    bits = x.view(torch.int32)
                    for i, factor in enumerate(pattern):
                        bits[start + i * step] += sign * factor
                    seen.add(hash_of(x))
                    n += 1
    assert len(seen) == n


def test_hash_does_not_depend_on_threads():
    data = torch.randint(256, ((3 << 20) + 5,), dtype=torch.uint8)
    threads = torch.get_num_threads()
    seen = set()
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        seen.add(hash_of(data))
    torch.set_num_threads(threads)
    assert len(seen) == 1
    data[1 << 20], data[2 << 20] = data[2 << 20] + 1, data[1 << 20]
    assert hash_of(data) not in seen
