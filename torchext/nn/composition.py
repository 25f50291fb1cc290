"""Decides when a layer calls its op (../ops/linear.py) instead of its own path.

It does so under tracers, transforms and tensor subclasses, which cannot look into an autograd
function and must not see a cached weight. docs/composition.md lists what works and what is refused.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.fx import Proxy

from .._dispatch.dtensor import is_distributed
from ..ops import linear_mixed  # noqa: F401  (declares the op that linear_op calls)
from ..ops.linear import linear_op

if TYPE_CHECKING:
    from .linear import Linear


def composed(layer: Linear, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor | None:
    """The layer's output if it must call its op; None if it takes its own path."""
    if isinstance(input, Proxy):
        return _traced_symbolically(layer, input, weight, bias)
    compiling = torch.compiler.is_compiling()
    through_op = is_composed_in_graph() if compiling else is_composed()
    if not compiling:
        through_op = through_op or _overrides_functions(input) or _overrides_functions(weight)
    if through_op or is_distributed(input) or is_distributed(weight):
        return linear_op(input, weight, bias, layer.recipe)
    return None


# Resolved once, because every eager forward calls them.
_are_transforms_active = torch._C._are_functorch_transforms_active
_is_jit_tracing = torch._C._is_tracing
_len_function_modes = torch._C._len_torch_function_stack


def is_composed() -> bool:
    """Whether a transform or tracer requires the op, whatever the classes of the tensors."""
    return (
        _are_transforms_active()
        or _is_jit_tracing()
        or forward_ad._current_level >= 0
        # make_fx and torch.export may trace above autograd, with a __torch_function__ mode.
        or (_len_function_modes() > 0 and torch._ops._len_torch_dispatch_stack_pre_dispatch() > 0)
    )


def is_composed_in_graph() -> bool:
    """`is_composed` while Dynamo traces.

    Exported graphs contain the op, which has a gradient. Otherwise torch.compile inlines the layer.
    """
    return torch.compiler.is_exporting() or torch._C._are_functorch_transforms_active()


# Does what torch.compiler.assume_constant_result does, which would import Dynamo.
is_composed_in_graph._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _overrides_functions(tensor: Tensor) -> bool:
    """Whether its class has a __torch_function__, which torch.nn.functional.linear would call."""
    override = getattr(type(tensor), "__torch_function__", None)
    own = override not in (None, torch._C._disabled_torch_function_impl)
    return own and type(tensor) not in (Tensor, torch.nn.Parameter)


# ---- torch.fx ----


def _traced_symbolically(layer: Linear, input: Any, weight: Tensor, bias: Tensor | None) -> Any:
    """Adds one call to torch.fx's graph: of the layer, as for a torch.nn.Linear, or of its op."""
    from .linear import Linear

    if type(layer).forward is Linear.forward:
        call = traced_call(layer, input)
        if call is not None:
            return call
    if type(weight) is Tensor:
        raise RuntimeError(
            "torchext.nn.Linear: weight must be a parameter under torch.fx (got one computed by a "
            "parametrization or torch.nn.utils.weight_norm, which the graph would store as a "
            "constant); trace with a torch.fx.Tracer whose is_leaf_module is true for this layer"
        )
    return linear_op(input, weight, bias, layer.recipe)


def traced_call(layer: torch.nn.Module, input: Any) -> Any:
    """A call of the layer in torch.fx's graph, of which `input` is a value.

    None if the graph already contains what surrounds the layer's own forward (hooks, or a forward
    that replaces it), which the call would execute again, or if the graph has no such module.
    """
    tracer = input.tracer
    hooked = (
        layer._forward_hooks
        or layer._forward_pre_hooks
        or torch.nn.modules.module._global_forward_hooks
        or torch.nn.modules.module._global_forward_pre_hooks
    )
    if hooked or "forward" in vars(layer) or layer is getattr(tracer, "root", layer):
        return None
    try:
        path = tracer.path_of_module(layer)
    except NameError:  # the layer is no submodule of the traced module
        return None
    return tracer.create_proxy("call_module", path, (input,), {})
