"""The declarations of the ops: each op that csrc/ops.cpp defines has exactly one."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from torchext import ops
from torchext._dispatch.declaration import DECLARATIONS, declare

NOTHING: dict[str, Any] = {
    "fake": lambda x: x,
    "flops": None,
    "batching": lambda *_: (None, None),
    "sharding": lambda *_: [],
}


def of_cpp():
    """Names of the overloads that csrc/ops.cpp defines; those from Python have no CPU kernel."""
    names = {
        name for name in torch._C._dispatch_get_all_op_names() if name.startswith("torchext::")
    }
    return {
        name.removeprefix("torchext::")
        for name in names
        if torch._C._dispatch_has_kernel_for_dispatch_key(name, "CPU")
    }


def test_every_op_has_one_declaration():
    declared = [name for op in DECLARATIONS.values() for name in op.overloads]
    assert sorted(declared) == sorted(of_cpp())


def test_public_declarations_are_the_public_ops():
    public = {name for name in DECLARATIONS if not name.startswith("_")}
    assert public == set(ops.OPS) == set(ops.__all__) - {"restore_layout"}


def test_an_op_declared_twice_is_an_error():
    with pytest.raises(RuntimeError, match="quantize_1x128 must have one declaration"):
        declare("quantize_1x128", **NOTHING)


def test_an_op_that_cpp_lacks_is_an_error():
    with pytest.raises(AttributeError, match="no_such_op"):
        declare("no_such_op", **NOTHING)
    assert "no_such_op" not in DECLARATIONS


def multiplies(name):
    """Whether an op is a GEMM, which its second operand's name shows. A norm, which has `eps` or
    `rstd`, has a vector for a weight."""
    arguments = {a.name for a in getattr(torch.ops.torchext, name).default._schema.arguments}
    if {"eps", "rstd"} & arguments:
        return False
    return bool({"b", "weight", "gate"} & arguments) or {"dy", "input"} <= arguments


@pytest.mark.parametrize("name", DECLARATIONS)
def test_ops_that_multiply_have_flops(name):
    assert DECLARATIONS[name].multiplies == multiplies(name)


@pytest.mark.parametrize("name", DECLARATIONS)
def test_handles_are_the_overloads(name):
    packet, (op, alias, write) = getattr(torch.ops.torchext, name), DECLARATIONS[name].handles
    assert op is packet.default
    assert (write is not None) == ("out" in packet.overloads())
    if alias is not None:
        assert alias is getattr(torch.ops.torchext, f"_{name}").default
        assert len(alias._schema.arguments) == len(op._schema.arguments)
