"""shard_fp8: FSDP2's fully_shard with weights that are gathered in FP8."""

from __future__ import annotations

import logging
from typing import Any, Literal

import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn import Parameter

from ..nn.experts import ExpertsInFP8, FP8SortedExperts, trains_in_fp8
from .weight import Fp8ShardedWeight, Group

_log = logging.getLogger("torchext.distributed")


def shard_fp8(
    module: torch.nn.Module,
    mesh: DeviceMesh,
    *,
    gather: Literal["fp8", "bfloat16"] = "fp8",
    **fsdp: Any,
) -> Any:
    """torch.distributed.fsdp.fully_shard(module), whose all-gathers send weights in FP8.

    Convert the model first (`torchext.convert_to_fp8_training`). Then shard its blocks, and at last
    the model, as with fully_shard:

        for block in model.layers:
            shard_fp8(block, mesh)
        shard_fp8(model, mesh)

    A rank quantizes its rows of a weight (cast to the policy's param_dtype) and sends FP8 values
    and the scales of 128x128 blocks: 1 byte and 4/16,384 for each element, instead of 2. Layers
    multiply what arrives and do not quantize it again; backward transposes it. Outputs and
    gradients have the bits of gather="bfloat16", where each rank gathers the weight and quantizes
    it. A rank may have any number of rows. If the number is no multiple of 128, an all-reduce (max)
    of 4 bytes for each block that ranks share, one for all weights of the module, makes its scale
    that of the whole block.

    Sent in FP8 are the weights of torchext's linear layers, and of experts in 3-D parameters
    (torchext.nn.MoE and those of transformers, not those of torchtitan), with a blockwise recipe
    whose fprop and dgrad are FP8. All other parameters are sent in param_dtype; `gathered_dtypes`
    tells which. Parameters, their gradients, the optimizer's states, state_dicts and checkpoints
    are those of fully_shard: DTensors of the parameters' own dtype.

    Args:
        module: as for fully_shard.
        mesh: a mesh with one dimension (FSDP) or with two (HSDP), as for fully_shard.
        gather: "fp8", or "bfloat16" for fully_shard as it is.
        **fsdp: other arguments of fully_shard. mp_policy is by default
            MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32).

    Returns:
        What fully_shard returns: the module.

    Raises:
        TypeError: module is not a torch.nn.Module.
        ValueError: gather is another string; it is "bfloat16" and mp_policy has another
            param_dtype; or it is "fp8" and reshard_after_forward is a number of ranks, which FSDP2
            does not support for tensor subclasses.
    """
    if not isinstance(module, torch.nn.Module):
        raise TypeError(
            f"torchext.distributed.shard_fp8: module must be a torch.nn.Module (got "
            f"{type(module).__name__}); pass one module, and call it for each block"
        )
    if gather not in ("fp8", "bfloat16"):
        raise ValueError(
            f"torchext.distributed.shard_fp8: gather must be 'fp8' or 'bfloat16' (got {gather!r}); "
            "omit it for 'fp8'"
        )
    policy = fsdp.setdefault(
        "mp_policy",
        MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32),
    )
    if gather == "bfloat16":
        if policy.param_dtype is not torch.bfloat16:
            raise ValueError(
                "torchext.distributed.shard_fp8: mp_policy must have param_dtype=torch.bfloat16 "
                f"for gather='bfloat16' (got {policy.param_dtype}); for another dtype, call "
                "fully_shard"
            )
        return fully_shard(module, mesh=mesh, **fsdp)
    reshard = fsdp.get("reshard_after_forward")
    if reshard is not None and not isinstance(reshard, bool):
        raise ValueError(
            "torchext.distributed.shard_fp8: reshard_after_forward must be a bool for "
            f"gather='fp8' (got {reshard!r}, but FSDP2 cannot reshard a tensor subclass to fewer "
            "ranks); pass True, False or gather='bfloat16'"
        )
    _mark(module, mesh, policy.param_dtype, fsdp)
    return fully_shard(module, mesh=mesh, **fsdp)


def gathered_dtypes(module: torch.nn.Module) -> dict[str, torch.dtype]:
    """{name: dtype in which it travels} of all parameters of a module that is or will be sharded.

    A parameter that FSDP2 casts (mp_policy's param_dtype) is listed with its own dtype.
    """
    found = {}
    for name, parameter in module.named_parameters():
        local: Any = parameter._local_tensor if isinstance(parameter, DTensor) else parameter
        is_sent = isinstance(local, Fp8ShardedWeight)
        found[name] = local._options[0] if is_sent else parameter.dtype
    return found


def _mark(
    module: torch.nn.Module, mesh: DeviceMesh, dtype: torch.dtype | None, fsdp: dict[str, Any]
) -> None:
    """Makes Fp8ShardedWeights of the weights that fully_shard will shard and send in FP8."""
    ignored = {id(p) for p in fsdp.get("ignored_params") or ()}
    uses: dict[int, int] = {}
    for part in module.modules():
        for parameter in part._parameters.values():
            if parameter is not None:
                uses[id(parameter)] = uses.get(id(parameter), 0) + 1
    group = Group(dtype)
    for path, part in module.named_modules():
        if not trains_in_fp8(part):
            continue
        names = part.fused_roles.parameters if isinstance(part, ExpertsInFP8) else ("weight",)
        for name in names:
            parameter = part._parameters.get(name)
            if parameter is None or _is_sharded(parameter, mesh) or id(parameter) in ignored:
                continue  # computed, sharded before, or left alone
            reason = _reason(part, parameter, uses[id(parameter)], fsdp)
            if reason is not None:
                _log.info("%s.%s is not gathered in FP8: %s", path, name, reason)
                continue
            recipe: Any = part.recipe
            new: Any = parameter.detach()
            local = new._local_tensor if isinstance(new, DTensor) else new
            sharded: Any = Fp8ShardedWeight(
                local,
                group,
                len(group.places),
                tuple(local.shape),
                (recipe.weight_dtype, recipe.pow2_scale),
            )
            group.places.append((part, name))
            if isinstance(new, DTensor):  # of tensor parallelism
                new._local_tensor = sharded
                sharded = new
            new = Parameter(sharded, parameter.requires_grad)
            for attribute, value in vars(parameter).items():
                setattr(new, attribute, value)
            part._parameters[name] = new


def _is_sharded(parameter: Any, mesh: DeviceMesh) -> bool:
    """Whether FSDP2 has sharded it on the mesh, as opposed to tensor parallelism on another."""
    if not isinstance(parameter, DTensor):
        return False
    return {*(mesh.mesh_dim_names or ())} <= {*(parameter.device_mesh.mesh_dim_names or ())}


def _reason(part: Any, parameter: Any, uses: int, fsdp: dict[str, Any]) -> str | None:
    """Why a layer's weight cannot be gathered in FP8; None if it can."""
    recipe = part.recipe
    if recipe.granularity != "blockwise":
        return f"scales of the recipe {recipe} are no 128x128 blocks"
    if recipe.fprop != "fp8" or recipe.dgrad != "fp8":
        return "a wide GEMM of the recipe multiplies the weight itself"
    if isinstance(part, FP8SortedExperts):
        return "these experts copy gate and up side by side in every forward"
    if isinstance(parameter, DTensor) and "_parallel_style" not in vars(part):
        return "DTensor's tensor parallelism multiplies it; use Fp8ColwiseParallel"
    if type(parameter) is not Parameter and not isinstance(parameter, DTensor):
        return f"it is a {type(parameter).__name__}"
    if uses > 1:
        return "other modules share it"
    place = fsdp.get("shard_placement_fn")
    chosen = None if place is None else place(parameter)
    if chosen is not None and getattr(chosen, "dim", None) != 0:
        return f"it is sharded as {chosen}, not along its first dimension"
    return None
