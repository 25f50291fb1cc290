"""Tests of every op on the samples of its catalog entry. A new op needs no line here."""

from __future__ import annotations

import dataclasses
import inspect
import math
import random
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
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map_only, tree_unflatten
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.selection import NoSelection
from support.op_samples import assert_same, metadata, opcheck, overload
from tests.hardware.gpu_check import op_calls
from tests.hardware.gpu_check.op_calls import check
from tests.hardware.soak import __main__ as soak
from tests.hardware.soak import jobs
from tests.hardware.soak.operands import Lab
from torchext import ops
from torchext._catalog import CATALOG

Tensor = torch.Tensor
SAMPLES = [(name, label) for name, entry in CATALOG.items() for label in entry.samples]
FIRST = [(name, next(iter(entry.samples))) for name, entry in CATALOG.items()]
# On older GPUs' PTX only the first sample of each op is run, to save time.
ON_EVERY_ARCHITECTURE = [
    pytest.param(*case, marks=[pytest.mark.every_architecture] if case in FIRST else [])
    for case in SAMPLES
]
every_sample = pytest.mark.parametrize("name, label", SAMPLES)
every_op = pytest.mark.parametrize("name, label", FIRST, ids=CATALOG)


def op(name, sample):
    """The overload that the sample calls."""
    return overload(name, "out" if "out" in sample.kwargs else "default")


def tensors(sample):
    return [x for x in tree_leaves((sample.args, sample.kwargs)) if isinstance(x, Tensor)]


def keeps_strides(sample):
    """Whether clones of the sample's tensors keep their strides; clones have no row padding."""
    return all(t.clone().stride() == t.stride() for t in tensors(sample))


# For each overload a sample whose clones keep their strides, since opcheck clones its arguments.
CHECKED = FIRST + [
    (name, "accumulate")
    for name, label in SAMPLES
    if label == "accumulate" and keeps_strides(CATALOG[name].sample(label))
]


def test_every_op_has_an_entry():
    assert set(CATALOG) == set(ops.OPS)
    for name, entry in CATALOG.items():
        assert entry.name == name and callable(entry.reference)


@pytest.fixture
def new_op(monkeypatch):
    """Adds an entry for an op that no program names."""
    entry = dataclasses.replace(CATALOG["quantize_1x128"], name="new_op")
    monkeypatch.setitem(CATALOG, "new_op", entry)


def test_gpu_check_calls_a_new_op(new_op):
    labels = CATALOG["new_op"].samples
    assert [call for call in op_calls.every_call() if "new_op" in call] == [
        f"new_op {label}" for label in labels
    ]


def test_the_soak_draws_a_new_op(new_op, monkeypatch):
    monkeypatch.setattr(ops, "new_op", ops.quantize_1x128, raising=False)
    monkeypatch.setattr(jobs, "MAKERS", ())
    monkeypatch.setattr(jobs, "ops_without_a_maker", lambda: ["new_op"])
    job = jobs.draw(Lab("cpu", NoSelection()), random.Random(0))
    assert job.name.startswith("new_op ")
    outputs = job.call()
    with pytest.raises(AttributeError, match="new_op"):  # torchext.reference has none
        job.bound(outputs)


def test_the_soak_refuses_an_op_without_a_job(monkeypatch, capsys):
    monkeypatch.setattr(ops, "OPS", (*ops.OPS, "new_op"))
    assert soak.main(["--device", "cpu", "--minutes", "0"]) == 2
    assert "soak: every op" in (said := capsys.readouterr().err) and "(none draws new_op)" in said


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


@every_sample
def test_fakes_equal_the_kernels(name, label, device):
    """Fakes, and quantizers' references, have the kernels' shapes, dtypes, devices and strides."""
    given, function = CATALOG[name].sample(label, device), getattr(ops, name)
    real = function(*given.args, **given.kwargs)
    with FakeTensorMode() as mode:
        args, kwargs = tree_map_only(Tensor, mode.from_tensor, (given.args, given.kwargs))
        fake = function(*args, **kwargs)
    assert metadata(fake) == metadata(real)
    if isinstance(real, tuple):
        assert [m[:3] for m in metadata(CATALOG[name].expected(label))] == [
            m[:3] for m in metadata(real)
        ]


@every_op
def test_fakes_keep_sizes_symbolic(name, label, device):
    given = CATALOG[name].sample(label, device)

    def symbolic(tensor):
        dynamic: Any = StatelessSymbolicContext(dynamic_sizes=[DimDynamic.DYNAMIC] * tensor.dim())
        return mode.from_tensor(tensor, symbolic_context=dynamic)

    with FakeTensorMode(shape_env=ShapeEnv()) as mode:
        args, kwargs = tree_map_only(Tensor, symbolic, (given.args, given.kwargs))
        fake = tree_leaves(overload(name)(*args, **kwargs))
        assert all(isinstance(t.shape[-2], torch.SymInt) for t in fake if t.shape != (1, 1))
        found = [(tuple(map(int, t.shape)), tuple(map(int, t.stride())), t.dtype) for t in fake]
    real = overload(name)(*given.args, **given.kwargs)
    assert found == [m[:3] for m in metadata(real)]


@pytest.mark.parametrize("name, label", CHECKED)
def test_opcheck(name, label, device):
    given = CATALOG[name].sample(label, device)
    opcheck(op(name, given), given.args, given.kwargs)


@every_op
def test_compile_to_one_graph(name, label, device):
    torch._dynamo.reset()
    function, given = getattr(ops, name), CATALOG[name].sample(label, device)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(function, fullgraph=True, backend=counter)
    assert_same(compiled(*given.args, **given.kwargs), function(*given.args, **given.kwargs))
    assert counter.frame_count == 1
    torch._dynamo.reset()


@pytest.mark.large  # batches do not depend on the kernels
@every_op
def test_vmap(name, label, device):
    function, given = getattr(ops, name), CATALOG[name].sample(label, device)
    leaves, spec = tree_flatten((given.args, given.kwargs))
    places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]

    def call(*batch):
        values = list(leaves)
        for place, tensor in zip(places, batch, strict=True):
            values[place] = tensor
        args, kwargs = tree_unflatten(values, spec)
        return function(*args, **kwargs)

    one = tree_leaves(call(*(leaves[i] for i in places)))
    two = tree_leaves(vmap(call)(*(torch.stack((leaves[i], leaves[i])) for i in places)))
    for batched, single in zip(two, one, strict=True):
        for element in batched:
            torch.testing.assert_close(element.float(), single.float(), rtol=1e-5, atol=1e-4)


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
    with pytest.raises(TypeError, match=rf"^{name}: (x|a|data) must be .*torch\.float64"):
        getattr(ops, name)(wrong, *given.args[1:], **given.kwargs)
