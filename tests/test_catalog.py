"""Tests of every op on the samples of its catalog entry. A new op needs no line here."""

from __future__ import annotations

import inspect
import math
from functools import partial
from typing import Any

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import vmap
from torch.fx.experimental.symbolic_shapes import (
    DimDynamic,
    ShapeEnv,
    StatelessSymbolicContext,
)
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_map_only, tree_unflatten
from torch.utils.flop_counter import FlopCounterMode

from support.op_testing import assert_same, metadata, opcheck, overload
from tests.hardware.gpu_check.op_calls import check
from torchext import ops
from torchext._catalog import BITS, CATALOG, Sample
from torchext._catalog.entry import E5M2
from torchext._dispatch.layout import GROUP, ceil_div

Tensor = torch.Tensor
SAMPLES = [(name, label) for name, entry in CATALOG.items() for label in entry.samples]
SIZED = [(name, label) for name, entry in CATALOG.items() for label in entry.sized]
FIRST = [(name, next(iter(entry.samples))) for name, entry in CATALOG.items()]
# On older GPUs' PTX only the first sample of each op is run, to save time.
ON_EVERY_ARCHITECTURE = [
    pytest.param(*case, marks=[pytest.mark.every_architecture] if case in FIRST else [])
    for case in SAMPLES
]
every_sample = pytest.mark.parametrize("name, label", SAMPLES)
every_op = pytest.mark.parametrize("name, label", FIRST, ids=CATALOG)


def parameters(name):
    return inspect.signature(getattr(ops, name)).parameters


OUT = [(name, label) for name, label in SIZED if "out" in parameters(name)]


def op(name, sample):
    """The overload that the sample calls."""
    return overload(name, "out" if "out" in sample.kwargs else "default")


def tensors(sample):
    return [x for x in tree_leaves((sample.args, sample.kwargs)) if isinstance(x, Tensor)]


def keeps_strides(sample):
    """Whether clones of the sample's tensors keep their strides; clones have no row padding."""
    return all(t.clone().stride() == t.stride() for t in tensors(sample))


def in_every_dtype(name, sample):
    """The sample, and copies of it that ask for another dtype of the result."""
    yield sample
    others: list[dict[str, Any]] = [{"dtype": E5M2, "pow2_scale": True}]
    others += [{"out_dtype": t} for t in (torch.bfloat16, torch.float16, torch.float32)]
    for options in others if "out" not in sample.kwargs else []:
        if options.keys() <= parameters(name).keys():
            yield Sample(sample.args, {**sample.kwargs, **options})


def with_bias(name, sample):
    """A copy with a bias, or the sample if the op has none."""
    if "bias" not in parameters(name):
        return sample
    given = inspect.signature(getattr(ops, name)).bind(*sample.args, **sample.kwargs).arguments
    if "bias" in given:
        return sample
    matrix = given["b" if "b" in given else "weight"]  # [N, K] or [G, N, K]
    bias = torch.randn(matrix.shape[:-1], device=matrix.device)
    return Sample(sample.args, {**sample.kwargs, "bias": bias})


def on_meta(tensor):
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")


def with_gradients(sample):
    """The sample with wide tensors that require gradients, which no call with `out` may have."""

    def leaf(tensor):
        wide = tensor.dtype.is_floating_point and tensor.element_size() > 1
        return tensor.detach().requires_grad_() if wide else tensor

    if "out" in sample.kwargs:
        return sample
    return Sample(*tree_map_only(Tensor, leaf, (sample.args, sample.kwargs)))


def defined(name, label, result):
    """The result of a sample, with zeros where the op leaves it undefined."""
    if CATALOG[name].bound is BITS or isinstance(result, tuple):
        return result
    return result.masked_fill(CATALOG[name].expected(label).isnan().to(result.device), 0)


def sized(name, label, m, n, k, *, device):
    """A call of a case of `Entry.sized`; quantizers get m rows and k columns."""
    make = CATALOG[name].sized[label]
    sizes = (m, k) if len(inspect.signature(make).parameters) == 2 else (m, n, k)
    return make(*sizes).to(device)


def test_every_op_has_an_entry():
    assert set(CATALOG) == set(ops.OPS)
    for name, entry in CATALOG.items():
        assert entry.name == name and callable(entry.reference)
        assert entry.samples and entry.sized


@every_op
def test_the_first_sample_is_ordinary(name, label):
    sample = CATALOG[name].sample(label)
    assert keeps_strides(sample) and "out" not in sample.kwargs
    assert all(t.numel() for t in tensors(sample))


@pytest.mark.parametrize("name, label", ON_EVERY_ARCHITECTURE)
def test_kernels_equal_the_reference(name, label, device):
    """Results are bit-equal or within the entry's bound."""
    entry = CATALOG[name]
    given = entry.sample(label, device)
    check(entry, getattr(ops, name)(*given.args, **given.kwargs), entry.expected(label))


@every_sample
def test_samples_are_the_same_on_every_device(name, label, device):
    entry = CATALOG[name]
    made, moved = tensors(entry.samples[label]()), tensors(entry.sample(label, device))
    for x, y in zip(made, moved, strict=True):
        assert x.stride() == y.stride() and x.storage_offset() == y.storage_offset()
        torch.testing.assert_close(x.float(), y.cpu().float(), rtol=0, atol=0, equal_nan=True)


# ---- fake kernels ----


@every_sample
def test_fakes_equal_the_kernels(name, label, device):
    """Fakes have the kernels' shapes, strides, dtypes and devices, and kernels of quantizers their
    references'; other results are contiguous."""
    entry, function = CATALOG[name], getattr(ops, name)
    for given in in_every_dtype(name, entry.sample(label, device)):
        args, kwargs = given.args, given.kwargs
        real = function(*args, **kwargs)
        with FakeTensorMode() as mode:
            fakes = tree_map_only(Tensor, mode.from_tensor, (args, kwargs))
            fake = function(*fakes[0], **fakes[1])
        assert metadata(fake) == metadata(real)
        metas = tree_map_only(Tensor, on_meta, (args, kwargs))
        meta = function(*metas[0], **metas[1])
        assert [m[:3] for m in metadata(meta)] == [m[:3] for m in metadata(real)]
        if isinstance(real, tuple):
            kwargs = {option: value for option, value in kwargs.items() if option != "num_sms"}
            assert metadata(entry.reference(*args, **kwargs)) == metadata(real)
        else:
            assert real.is_contiguous() or "out" in kwargs


@pytest.mark.large  # tracing does not depend on the kernels
@every_sample
def test_fakes_keep_sizes_symbolic(name, label, device):
    """No size becomes a constant, and for the sample's sizes the strides equal the kernels'."""
    given = CATALOG[name].sample(label, device)
    if "out" in given.kwargs:
        return  # the fake returns nothing

    def symbolic(tensor):
        dynamic: Any = StatelessSymbolicContext(dynamic_sizes=[DimDynamic.DYNAMIC] * tensor.dim())
        return mode.from_tensor(tensor, symbolic_context=dynamic)

    shape_env = ShapeEnv()
    with FakeTensorMode(shape_env=shape_env) as mode:
        args, kwargs = tree_map_only(Tensor, symbolic, (given.args, given.kwargs))
        fake = tree_leaves(overload(name)(*args, **kwargs))
        # torch itself makes constants of sizes 0 and 1; an argument may be a size.
        constants = {0, 1}
        for size in (*given.args, *given.kwargs.values()):
            if isinstance(size, int):
                constants |= {size, ceil_div(size, GROUP)}  # and its number of scales
        sizes = [size for t in fake for size in t.shape]
        assert all(isinstance(size, torch.SymInt) or size in constants for size in sizes)
        if all(size > 1 for t in tensors(given) for size in t.shape):
            assert not shape_env.guards
        found = [(tuple(map(int, t.shape)), tuple(map(int, t.stride())), t.dtype) for t in fake]
    real = overload(name)(*given.args, **given.kwargs)
    assert found == [m[:3] for m in metadata(real)]


# ---- opcheck ----


def is_checked(name, label):
    """opcheck compares without equal NaNs. It clones its arguments, and GEMMs need the strides that
    clones may lose."""
    sample = CATALOG[name].sample(label)
    numbers = all(t.numel() and t.float().isfinite().all() for t in tensors(sample))
    return numbers and (CATALOG[name].bound is BITS or keeps_strides(sample))


CHECKED = [
    pytest.param(*case, marks=[] if case in FIRST else [pytest.mark.large, pytest.mark.slow])
    for case in SAMPLES
    if is_checked(*case)
]


@pytest.mark.large  # tracing does not depend on the kernels
@pytest.mark.parametrize("name, label", CHECKED)
def test_opcheck(name, label, device):
    given = CATALOG[name].sample(label, device)
    for checked in (given, with_gradients(given)):
        opcheck(op(name, given), checked.args, checked.kwargs)


@pytest.mark.large
@pytest.mark.slow
@pytest.mark.parametrize("name, label", SIZED)
def test_opcheck_of_each_case(name, label, device):
    given = sized(name, label, 20, 40, 208, device=device)
    for checked in (*in_every_dtype(name, given), with_gradients(with_bias(name, given))):
        opcheck(overload(name), checked.args, checked.kwargs)


@pytest.mark.large
@pytest.mark.slow
@pytest.mark.parametrize("accumulate", [False, True])
@pytest.mark.parametrize("name, label", OUT)
def test_opcheck_into_out(name, label, accumulate, device):
    given = sized(name, label, 20, 40, 208, device=device)
    out = torch.randn_like(getattr(ops, name)(*given.args, **given.kwargs))
    opcheck(
        overload(name, "out"), given.args, {**given.kwargs, "out": out, "accumulate": accumulate}
    )


# ---- torch.compile ----


@pytest.fixture
def compiled():
    """Compiles a function to one graph, with AOTAutograd but without code generation."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")

    def compile(function, dynamic=False):
        return torch.compile(function, fullgraph=True, dynamic=dynamic, backend=counter), counter

    yield compile
    torch._dynamo.reset()


def is_compiled(kwargs):
    """torch.compile refuses an `out` that is not contiguous."""
    return {"bias", "dtype"} & kwargs.keys() or ("out" in kwargs and kwargs["out"].is_contiguous())


COMPILED = [
    (name, label)
    for name, label in SAMPLES
    if (name, label) in FIRST or is_compiled(CATALOG[name].sample(label).kwargs)
]


def outcome(name, label, call, device):
    """The results of a call, its gradients and what it wrote to `out`."""
    given = with_gradients(CATALOG[name].sample(label, device))
    results = call(given.args, given.kwargs)
    gradients: Any = ()
    if isinstance(results[0], Tensor) and results[0].requires_grad:
        leaves = [t for t in tensors(given) if t.requires_grad]
        of_leaves = torch.autograd.grad(results[1].square().sum(), leaves, allow_unused=True)
        gradients = [g for g in of_leaves if g is not None]
        assert gradients
    results = [defined(name, label, tree_map_only(Tensor, Tensor.detach, r)) for r in results]
    return results, gradients, given.kwargs.get("out", ())


@pytest.mark.large  # tracing does not depend on the kernels
@pytest.mark.parametrize("name, label", COMPILED)
def test_compile_to_one_graph(name, label, compiled, device):
    def call(args, kwargs):
        results = getattr(ops, name)(*args, **kwargs)
        return results, tree_map_only(Tensor, lambda t: t.float() * 2, results)

    graph, counter = compiled(call)
    assert_same(outcome(name, label, graph, device), outcome(name, label, call, device))
    assert counter.frame_count == 1


ONE_GRAPH = [
    pytest.param(*case, marks=[pytest.mark.slow] if "grouped" in case[0] else []) for case in SIZED
]


# Otherwise Dynamo traces a function with a float argument (the eps of norms) twice, to learn that
# the float does not become a tensor.
@torch._dynamo.config.patch(specialize_float=True)
@pytest.mark.large  # tracing does not depend on the kernels
@pytest.mark.parametrize("name, label", ONE_GRAPH)
def test_one_graph_serves_all_sizes(name, label, compiled, device):
    """One graph serves all sizes that torch's guards do not distinguish. They ask which outputs are
    contiguous, which depends on sizes <= 1, sizes of one group and multiples of 16."""
    function, counter = compiled(getattr(ops, name), dynamic=True)
    # The sizes of the first call must all differ.
    for m, n, k in [(150, 201, 515), (133, 157, 299), (303, 257, 459)]:
        given = sized(name, label, m, n, k, device=device)
        expected = getattr(ops, name)(*given.args, **given.kwargs)
        assert_same(function(*given.args, **given.kwargs), expected)
    assert counter.frame_count == 1


# ---- vmap ----


def other_element(sample):
    """Another element for a batch: each tensor has its numbers in reverse order; indices stay."""
    other = sample.to(tensors(sample)[0].device)
    for tensor in tensors(other):
        if tensor.dtype.is_floating_point:
            bits = tensor.view(torch.uint8) if tensor.element_size() == 1 else tensor
            bits.copy_(bits.flip(tuple(range(bits.dim()))))
    return other


def batch_of(name, given):
    """The tensors of two elements of a batch, and a function that calls the op with one."""
    leaves, spec = tree_flatten((given.args, given.kwargs))
    places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]

    def call(*element):
        values = list(leaves)
        for place, tensor in zip(places, element, strict=True):
            values[place] = tensor
        args, kwargs = tree_unflatten(values, spec)
        return getattr(ops, name)(*args, **kwargs)

    return tensors(given), tensors(other_element(given)), call


def assert_elements(name, batched, expected, hide=lambda result: result):
    """Asserts that a batch's elements along dimension 0 equal the results of separate calls."""
    rtol, atol = (0, 0) if CATALOG[name].bound is BITS else (1e-5, 1e-4)
    for i, result in enumerate(expected):
        element = tree_map(lambda t, i=i: t[i].float(), batched)
        want = tree_map(Tensor.float, result)
        torch.testing.assert_close(hide(element), hide(want), rtol=rtol, atol=atol, equal_nan=True)


@pytest.mark.large  # batches do not depend on the kernels
@every_sample
def test_vmap(name, label, device):
    first, second, call = batch_of(name, CATALOG[name].sample(label, device))
    pairs = list(zip(first, second, strict=True))
    batched = vmap(call)(*map(torch.stack, pairs))
    twice = vmap(vmap(call))(*(torch.stack((x, y, y, x)).unflatten(0, (2, 2)) for x, y in pairs))
    x, y = call(*first), call(*second)
    hide = partial(defined, name, label)
    assert_elements(name, batched, [x, y], hide)
    flat = tree_map_only(Tensor, lambda t: t.float().flatten(0, 1), twice)
    assert_elements(name, flat, [x, y, y, x], hide)


@pytest.mark.large
@pytest.mark.parametrize("dim", [0, 1, -1])
@pytest.mark.parametrize("name, label", SIZED)
def test_vmap_over_each_dimension(name, label, dim, device):
    first, second, call = batch_of(name, sized(name, label, 37, 40, 200, device=device))
    batch = [torch.stack(pair, dim) for pair in zip(first, second, strict=True)]
    expected = [call(*first), call(*second)]
    assert_elements(name, vmap(call, in_dims=dim)(*batch), expected)


@pytest.mark.large
@pytest.mark.parametrize("name, label", SIZED)
def test_vmap_over_some_tensors(name, label, device):
    """Over each tensor alone, and over the data and the scale of the first operand."""
    first, second, call = batch_of(name, sized(name, label, 37, 40, 200, device=device))
    for batched in [{place} for place in range(len(first))] + [{0, 1}] * (len(first) > 1):
        mixed = [second[i] if i in batched else x for i, x in enumerate(first)]
        pairs = zip(first, mixed, strict=True)
        batch = [torch.stack(pair) if i in batched else pair[0] for i, pair in enumerate(pairs)]
        in_dims = tuple(0 if i in batched else None for i in range(len(first)))
        expected = [call(*first), call(*mixed)]
        assert_elements(name, vmap(call, in_dims=in_dims)(*batch), expected)


# ---- out= ----


@pytest.mark.parametrize("name, label", OUT)
def test_out(name, label, device):
    """`out` is returned and written, which autograd sees, and gradients are refused."""
    given, function = sized(name, label, 20, 40, 300, device=device), getattr(ops, name)
    expected = function(*given.args, **given.kwargs)
    out = torch.full_like(expected, torch.nan)
    x = torch.ones_like(out).requires_grad_()
    loss = (x * out).sum()  # saves out
    version = out._version
    assert function(*given.args, **given.kwargs, out=out) is out
    assert_same(out, expected)
    assert out._version == version + 1
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    refused = {"out": out, **with_bias(name, given).kwargs}
    for argument in {"out", "bias"} & refused.keys():
        arguments = {"out": out, **given.kwargs}
        arguments[argument] = refused[argument].clone().requires_grad_()
        with pytest.raises(RuntimeError, match=f"{argument} must not require a gradient"):
            function(*given.args, **arguments)
        with torch.no_grad():
            function(*given.args, **arguments)


@pytest.mark.parametrize("name, label", OUT)
def test_out_under_inference_mode(name, label, device):
    function = getattr(ops, name)
    with torch.inference_mode():
        given = sized(name, label, 20, 40, 300, device=device)
        out = torch.full_like(function(*given.args, **given.kwargs), torch.nan)
        function(*given.args, **given.kwargs, out=out)
    assert_same(function(*given.args, **given.kwargs), out)


# ---- numbers of a call ----


@pytest.mark.large  # counts do not depend on the kernels
@every_sample
def test_flops(name, label, device):
    """FlopCounterMode counts two FLOP for each multiplication of a GEMM, also in rows of no group:
    by function and op, if the bias needs a gradient, and for a result in `out`."""
    entry, function = CATALOG[name], getattr(ops, name)
    given = entry.sample(label, device)
    args, kwargs = given.args, given.kwargs

    def count(called, **changes):
        with FlopCounterMode(display=False) as counter:
            results.append(called(*args, **{**kwargs, **changes}))
        return counter.get_total_flops()

    results: list[Any] = []
    counts = [count(function), count(getattr(torch.ops.torchext, name))]
    if "bias" in kwargs:
        counts.append(count(function, bias=kwargs["bias"].clone().requires_grad_()))
    if "out" in inspect.signature(function).parameters:
        counts.append(count(function, out=torch.empty_like(results[0])))
    assert set(counts) == {entry.flops(*entry.shape(*args, **kwargs))}


@every_op
def test_least_traffic(name, label):
    """The entry's formula is for aligned sizes; these tensors are a little larger."""
    entry = CATALOG[name]
    given = entry.sample(label)
    outputs = tree_leaves(getattr(ops, name)(*given.args, **given.kwargs))
    moved = sum(t.numel() * t.element_size() for t in (*tensors(given), *outputs))
    expected = entry.bytes(*entry.shape(*given.args, **given.kwargs))
    assert math.isclose(moved, expected, rel_tol=0.05) and moved >= 0.99 * expected


@every_op
def test_errors_name_op_and_argument(name, label, device):
    """Passes a dtype that no op takes; tests/test_errors.py has the other errors."""
    given = CATALOG[name].sample(label, device)
    wrong = given.args[0].double()
    named = next(iter(parameters(name)))
    with pytest.raises(TypeError, match=rf"^{name}: {named} must be .*torch\.float64"):
        getattr(ops, name)(wrong, *given.args[1:], **given.kwargs)
