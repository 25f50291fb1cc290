"""Stand-ins for the classes of torchtitan that torchext.integrations.torchtitan uses.

Linear's config is that of version 0.3.0. Names, signatures and configs of experts and dispatchers
are those of torchtitan/models/common/token_dispatcher.py and moe.py at commit b5bcd76c66d0, and of
0.3.0; what they compute is written here.
"""

# ruff: noqa: N803 (arguments have the names of torchtitan's)
from __future__ import annotations

import dataclasses
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclasses.dataclass(kw_only=True)
class LinearConfig:
    """As torchtitan.models.common.linear.Linear.Config 0.3.0."""

    in_features: int
    out_features: int
    bias: bool = False
    param_init: Any = None


class ScaledConfig(LinearConfig):
    """The config of a subclass of Linear that has a forward of its own."""


class Configurable:
    """Wires Config to its owner, as torchtitan's does."""

    def __init_subclass__(cls) -> None:
        def build(config: Any) -> Any:
            return cls(config)

        if "Config" in vars(cls):
            vars(cls)["Config"].build = build


class Module(torch.nn.Module, Configurable):
    pass


class Converter:
    @dataclasses.dataclass(kw_only=True)
    class Config:
        pass


class LocalTokenDispatcher(Configurable):
    @dataclasses.dataclass(kw_only=True, slots=True)
    class Config:
        num_experts: int
        top_k: int

    def __init__(self, config: Config) -> None:
        self.num_experts = config.num_experts
        self.top_k = config.top_k

    def wire_meshes(self, *, ep_mesh: Any) -> None:
        pass

    def dispatch(
        self,
        x_TD: Tensor,
        topk_scores_TK: Tensor,
        topk_expert_ids_TK: Tensor,
        num_local_tokens_per_expert_E: Tensor,
    ) -> tuple[Tensor, Tensor, Any]:
        order = topk_expert_ids_TK.flatten().argsort(stable=True)
        tokens = order // self.top_k
        return (
            x_TD[tokens],
            num_local_tokens_per_expert_E,
            (tokens, topk_scores_TK.flatten()[order]),
        )

    def combine(self, routed_output_RD: Tensor, metadata: Any, x_TD: Tensor) -> Tensor:
        tokens, scores = metadata
        weighted = routed_output_RD * scores[:, None].to(routed_output_RD)
        return torch.zeros_like(x_TD).index_add(0, tokens, weighted)


class BaseEPTokenDispatcher(LocalTokenDispatcher):
    @dataclasses.dataclass(kw_only=True, slots=True)
    class Config(LocalTokenDispatcher.Config):
        pass

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.ep_mesh: Any = None

    def wire_meshes(self, *, ep_mesh: Any) -> None:
        self.ep_mesh = ep_mesh
        self.init_buffer()

    def init_buffer(self) -> None:
        pass


class AllToAllTokenDispatcher(BaseEPTokenDispatcher):
    @dataclasses.dataclass(kw_only=True, slots=True)
    class Config(BaseEPTokenDispatcher.Config):
        pass


class GroupedExperts(Module):
    @dataclasses.dataclass(kw_only=True, slots=True)
    class Config:
        dim: int
        hidden_dim: int
        num_experts: int

    def __init__(self, config: Config) -> None:
        super().__init__()
        shape = config.num_experts, config.hidden_dim, config.dim
        self.w1_EFD, self.w3_EFD, down = (
            torch.nn.Parameter(torch.randn(shape) / config.dim**0.5) for _ in range(3)
        )
        self.w2_EDF = torch.nn.Parameter(down.detach().mT.contiguous())

    def forward(self, x_RD: Tensor, num_tokens_per_expert_E: Tensor) -> Tensor:
        results = []
        for rows, *weights in zip(
            x_RD.split(num_tokens_per_expert_E.tolist()),
            *(self.w1_EFD, self.w3_EFD, self.w2_EDF),
            strict=True,
        ):
            gate, up, down = (weight.T.to(rows) for weight in weights)
            results.append((F.silu(rows @ gate) * (rows @ up)) @ down)
        return torch.cat(results)


class OtherExperts(GroupedExperts):
    @dataclasses.dataclass(kw_only=True, slots=True)
    class Config(GroupedExperts.Config):
        pass


class RoutedExperts(Module):
    @dataclasses.dataclass(kw_only=True, slots=True)
    class Config:
        inner_experts: Any
        token_dispatcher: Any

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.inner_experts = config.inner_experts.build()
        self.token_dispatcher = config.token_dispatcher.build()

    def forward(self, x_TD: Tensor, scores: Tensor, ids: Tensor, counts: Tensor) -> Tensor:
        rows, counts, metadata = self.token_dispatcher.dispatch(x_TD, scores, ids, counts)
        return self.token_dispatcher.combine(self.inner_experts(rows, counts), metadata, x_TD)  # type: ignore[no-any-return]


def routed(experts: Any = GroupedExperts, dispatcher: Any = AllToAllTokenDispatcher) -> Any:
    return RoutedExperts.Config(
        inner_experts=experts.Config(dim=256, hidden_dim=128, num_experts=4),
        token_dispatcher=dispatcher.Config(num_experts=4, top_k=2),
    )
