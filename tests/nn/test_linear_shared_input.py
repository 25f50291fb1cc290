"""FP8 layers that read one tensor quantize and save it once, and notice when it has changed."""

from __future__ import annotations

import contextlib
import copy
import gc
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from support.linear_testing import (
    RECIPES,
    OpCounter,
    every_recipe,
    gradient,
    main_recipes,
    normal,
    normal_linear,
    saved_tensors,
)
from torchext import Recipe
from torchext.nn import Linear, RMSNorm, SwiGLU
from torchext.ops.linear_function import quantize_activation
from torchext.ops.shared_input import Form, Readers, offer

pytestmark = pytest.mark.large  # which quantization is used does not depend on the kernels

ACTIVATION_QUANTIZERS = (
    "quantize_1x128",
    "quantize_1x128_t",
    "quantize_1x128_dual",
    "quantize_rowwise",
    "quantize_tensorwise",
)


def siblings(device: torch.device, *recipes: Recipe | None) -> list[Linear]:
    return [normal_linear(device, recipe=recipe) for recipe in recipes]


def hidden(device: torch.device, rows: int = 9) -> Tensor:
    """An input that the model computed."""
    return normal(rows, 200, device=device, grad=True) * 2


def quantizations(layers: list[Linear], inputs: list[Tensor]) -> int:
    with OpCounter() as counter:
        for layer, x in zip(layers, inputs, strict=True):
            layer(x)
    return counter.of(*ACTIVATION_QUANTIZERS)


@every_recipe
def test_q_k_and_v_quantize_their_input_once(device, recipe):
    layers = siblings(device, recipe, recipe, recipe)
    x = hidden(device)
    own = [x.clone() for _ in layers]
    quantizations(layers, own)  # weights that are kept are quantized here
    operands = 1 if recipe.granularity == "blockwise" else 2  # calls for one input
    assert quantizations(layers, own) - quantizations(layers, [x] * 3) == 2 * operands


@main_recipes
def test_bits_are_those_of_layers_that_share_nothing(device, recipe):
    layers = siblings(device, recipe, recipe, recipe)

    def gradients(share: bool) -> list[Tensor]:
        leaf = normal(33, 200, device=device).requires_grad_()
        x = leaf * 2
        ys = [layer(x if share else x.clone()) for layer in layers]
        for layer in layers:
            layer.zero_grad()
        torch.stack(ys).square().sum().backward()
        return [*ys, gradient(leaf), *(gradient(layer.weight) for layer in layers)]

    torch.manual_seed(1)
    shared = gradients(share=True)
    torch.manual_seed(1)
    assert all(map(torch.equal, shared, gradients(share=False)))


@main_recipes
def test_autograd_saves_the_input_once(device, recipe):
    layers = siblings(device, recipe, recipe, recipe)
    x = hidden(device)
    with saved_tensors() as saved:
        ys = [layer(x) for layer in layers]
    inputs = [y.grad_fn.saved_tensors[2] for y in ys]
    assert {t.data_ptr() for t in inputs} == {inputs[0].data_ptr()}
    assert len(saved) == 4 * len(layers)


def test_layers_that_quantize_differently_do_not_share(device):
    names = ("deepseek_v3", "deepseek_v3_pow2", "rowwise", "tensorwise", "mixed")
    layers = siblings(device, *(RECIPES[name] for name in names))
    x = hidden(device)
    for layer, y in zip(layers, [layer(x) for layer in layers], strict=True):
        assert torch.equal(y, layer(x.clone()))


def test_trained_layer_after_a_frozen_one_gets_what_wgrad_needs(device):
    frozen, trained = siblings(device, None, None)
    frozen.requires_grad_(False)
    x = hidden(device)
    frozen(x)
    y = trained(x)
    y.sum().backward()
    expected = Linear.from_linear(torch.nn.Linear(1, 1))
    expected.weight = torch.nn.Parameter(trained.weight.detach().clone())
    expected.bias = torch.nn.Parameter(trained.bias.detach().clone())
    expected(x.detach()).sum().backward()
    assert torch.equal(gradient(trained.weight), gradient(expected.weight))


@pytest.mark.parametrize("shape", [(9,), (2, 3)], ids=str)
def test_an_mlp_and_a_layer_share_their_input(device, shape):
    (layer,) = siblings(device, None)
    mlp = SwiGLU(200, 128, device=device, dtype=torch.float32)
    x = normal(*shape, 200, device=device, grad=True) * 2
    own = [layer(x.clone()), mlp(x.clone())]
    with OpCounter() as counter:
        ys = [layer(x), mlp(x)]
    assert counter.of(*ACTIVATION_QUANTIZERS) == 1 + 1  # x, and what save="fp8" keeps
    with OpCounter() as counter:
        ys += [mlp(y := x * 1), layer(y)]
    assert counter.of(*ACTIVATION_QUANTIZERS) == 1 + 1
    assert all(map(torch.equal, ys, [*own, *own[::-1]]))


# ---- offers ----

E4M3 = Form(torch.float8_e4m3fn, pow2_scale=False, transposed=True)


def offered(readers: Readers, x: Tensor) -> Form:
    """Does what a norm does with its result x; returns how it quantized x."""
    form = readers.wanted()
    assert form is not None
    recipe = Recipe(input_dtype=form.dtype, pow2_scale=form.pow2_scale)
    with torch.no_grad():
        operand = quantize_activation(x, form.dtype, recipe, plain=True, transposed=form.transposed)
    offer(x, readers, form, operand)
    return form


def test_layers_take_what_was_offered(device):
    layers, readers = siblings(device, None, None), Readers(E4M3)
    for layer in layers:
        layer(hidden(device))  # weights that are kept are quantized here
    with OpCounter() as counter:
        x = hidden(device)
        offered(readers, x)
        ys = [layer(x) for layer in layers]
    assert counter.of(*ACTIVATION_QUANTIZERS) == 1
    assert all(map(torch.equal, ys, [layer(x.clone()) for layer in layers]))
    offered(readers, x)
    _add(x)
    assert torch.equal(layers[0](x), layers[0](x.clone()))


def test_an_offer_is_taken_without_gradients_too(device):
    (layer,), readers = siblings(device, None), Readers(E4M3._replace(transposed=False))
    x = normal(9, 200, device=device)
    with torch.no_grad():
        layer(x)  # a weight that is kept is quantized here
        with OpCounter() as counter:
            offered(readers, x)
            y = layer(x)
        assert counter.of(*ACTIVATION_QUANTIZERS) == 1
        assert torch.equal(y, layer(x.clone()))
        offered(readers, x)
        x.add_(1)
        assert torch.equal(layer(x), layer(x.clone()))
    with torch.inference_mode():
        assert torch.equal(layer(x * 1), layer(x.clone()))


def test_what_readers_need_is_learned():
    device = torch.device("cpu")
    pow2 = Recipe.deepseek_v3(pow2_scale=True)
    frozen, trained = siblings(device, pow2, pow2)
    frozen.requires_grad_(False)
    readers = Readers(E4M3)

    def forward(*layers: Linear) -> Form:
        """The form of the next offer."""
        x = hidden(device)
        offered(readers, x)
        for layer in layers:
            layer(x)
        return offered(copy.deepcopy(readers), x)

    wgrad = E4M3._replace(pow2_scale=True)
    no_wgrad = wgrad._replace(transposed=False)
    assert forward(frozen) == no_wgrad
    assert forward(frozen, trained) == wgrad
    assert forward() == wgrad  # the next forward may be a repetition
    assert forward() == no_wgrad
    assert forward(trained) == wgrad
    assert forward(*siblings(device, Recipe.rowwise())) == wgrad
    assert forward(*siblings(device, Recipe.rowwise())) == no_wgrad


def test_nobody_reads_the_first_offer():
    readers = Readers(E4M3)
    forms = [offered(readers, hidden(torch.device("cpu"))) for _ in range(3)]
    assert [form.transposed for form in forms] == [True, False, False]


# ---- the input changes in between ----


def _add(x: Tensor) -> None:
    with torch.no_grad():
        x.add_(1)


def _through_view(x: Tensor) -> None:
    with torch.no_grad():
        x[1:].view(-1)[::2].mul_(-3)


def _set_data(x: Tensor) -> None:
    x.data = x.detach() + 1


CHANGES = {"in place": _add, "through a view": _through_view, "new data": _set_data}


@main_recipes
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_changed_input_is_quantized_again(device, recipe, change: Callable[[Tensor], None]):
    first, second = siblings(device, recipe, recipe)
    x = hidden(device)
    before = first(x)
    change(x)
    after = second(x)
    assert torch.equal(after, second(x.clone()))
    assert not torch.equal(first(x), before)


def test_buffer_that_the_user_fills_is_never_shared():
    first, second = siblings(torch.device("cpu"), None, None)
    x = normal(9, 200, device=torch.device("cpu"), dtype=torch.float32)
    for buffer in (x, x.requires_grad_()):
        array = buffer.detach().numpy()  # writes through it leave no trace
        first(buffer)
        array += 1
        assert torch.equal(second(buffer), second(buffer.detach().clone()))


def test_hooks_that_replace_the_input(device):
    first, second = siblings(device, None, None)
    second.register_forward_pre_hook(lambda module, args: (args[0] * 3,))
    x = hidden(device)
    first(x)
    y = second(x)
    second._forward_pre_hooks.clear()
    assert torch.equal(y, second((x * 3).clone()))


def test_mode_that_changes_results(device):
    """A tensor that was quantized under a mode is quantized again outside of it."""

    class Zero(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            if "quantize_1x128" in func._schema.name:
                for tensor in result:
                    tensor.zero_()
            return result

    (second,) = siblings(device, None)
    x = hidden(device)
    for _ in range(2):
        with Zero():
            assert torch.equal(second(x), second.bias.expand(9, -1).to(second(x).dtype))
        assert torch.equal(second(x), second(x.clone()))


# ---- lifetime ----


def test_nothing_outlives_the_input(device):
    first, second = siblings(device, None, None)
    x = hidden(device)
    y = first(x)
    kept = [weakref.ref(t.untyped_storage()) for t in y.grad_fn.saved_tensors[2:]]
    dead = weakref.ref(x)
    z = second(x)
    assert z.grad_fn.saved_tensors[2].data_ptr() == y.grad_fn.saved_tensors[2].data_ptr()
    del x, y, z
    gc.collect()
    assert dead() is None
    assert all(storage() is None for storage in kept)


def test_many_threads_may_read_one_tensor(device):
    layers = siblings(device, None, None, None, None)
    x = hidden(device, rows=65)
    expected = [layer(x.clone()) for layer in layers]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(5):
            ys = list(pool.map(lambda layer: layer(x), layers))
            assert all(map(torch.equal, ys, expected))


# ---- with what surrounds layers ----


class Projections(torch.nn.Module):
    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleList(siblings(device, None, None, None))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(x)
        return torch.stack([layer(x) for layer in self.layers]).sin().sum(0)


def _offloaded() -> contextlib.AbstractContextManager:
    return torch.autograd.graph.save_on_cpu()


def _copied() -> contextlib.AbstractContextManager:
    return torch.autograd.graph.saved_tensors_hooks(torch.clone, torch.clone)


@pytest.mark.parametrize("context", [_offloaded, _copied])
def test_saved_tensor_hooks(device, context):
    module = Projections(device)
    leaf = normal(40, 200, device=device, grad=True)
    module(leaf).sum().backward()
    expected = [gradient(leaf), *map(gradient, module.parameters())]
    leaf.grad = None
    module.zero_grad()
    with context():
        y = module(leaf)
    y.sum().backward()
    assert all(map(torch.equal, [gradient(leaf), *map(gradient, module.parameters())], expected))


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing(device, use_reentrant):
    module = Projections(device)
    leaf = normal(40, 200, device=device, grad=True)
    module(leaf * 1).sum().backward()
    expected = [gradient(leaf), *map(gradient, module.parameters())]
    leaf.grad = None
    module.zero_grad()
    y = checkpoint(module, leaf * 1, use_reentrant=use_reentrant)
    y.sum().backward()
    assert all(map(torch.equal, [gradient(leaf), *map(gradient, module.parameters())], expected))


def test_selective_checkpointing(device):
    """Its modes replay ops in order: forward and recomputation quantize equally often."""
    from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

    def policy(ctx, op, *args, **kwargs):
        quantizes = "quantize_1x128" in str(op)
        return CheckpointPolicy.MUST_SAVE if quantizes else CheckpointPolicy.PREFER_RECOMPUTE

    module = Projections(device)
    leaf = normal(40, 200, device=device, grad=True)
    module(leaf * 1).sum().backward()
    expected = [gradient(leaf), *map(gradient, module.parameters())]
    leaf.grad = None
    module.zero_grad()
    y = checkpoint(
        module,
        leaf * 1,
        use_reentrant=False,
        context_fn=lambda: create_selective_checkpoint_contexts(policy),
    )
    y.sum().backward()
    assert all(map(torch.equal, [gradient(leaf), *map(gradient, module.parameters())], expected))


class Attended(Projections):
    """As a block of a transformer: what q, k and v read is the result of a norm."""

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self.norm = RMSNorm(200, device=device)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.norm(x))


@pytest.mark.parametrize("make", [Projections, Attended])
@pytest.mark.parametrize("kind", ["DDP", "FSDP2", "FSDP2 of layers"])
def test_data_parallel(make, kind, mesh):
    """Layers quantize as often as without it, and to the same bits.

    FSDP2 passes its own view of the input to a layer that it shards by itself.
    """
    device = torch.device("cpu")
    module = make(device)
    leaf = normal(40, 200, device=device, grad=True)

    def step(module: torch.nn.Module) -> tuple[list[Tensor], int]:
        leaf.grad = None
        module.zero_grad()
        with OpCounter() as counter:
            module(leaf * 1).sum().backward()
        grads = [gradient(leaf), *map(gradient, module.parameters())]
        grads = [g.full_tensor() if isinstance(g, DTensor) else g for g in grads]
        return grads, counter.of(*ACTIVATION_QUANTIZERS)

    step(module)  # the norm learns what its readers need, and weights are quantized
    expected, count = step(module)
    parallel: torch.nn.Module = module
    if kind == "DDP":
        parallel = DistributedDataParallel(module)
    else:
        for part in (*(module.layers if kind == "FSDP2 of layers" else ()), module):
            fully_shard(part, mesh=mesh)
    for _ in range(2):
        got, again = step(parallel)
        assert all(map(torch.equal, got, expected))
        assert again == count or (kind == "FSDP2 of layers" and again > count)
