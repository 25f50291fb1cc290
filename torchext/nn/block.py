"""torchext.nn.Block: a transformer's decoder or encoder layer with FP8 attention and MLP."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..ops.mlp_function import Save
from ..recipe import Recipe
from .attention import Attention, recomputed
from .mlp import SwiGLU
from .norm import RMSNorm


class Block(torch.nn.Module):
    """x + self_attn(input_layernorm(x)), and that y + mlp(post_attention_layernorm(y)).

    As in Llama, Mistral, Qwen2, Qwen3 and Gemma, whose decoder layers have the same parameters and
    `state_dict` keys: those of `self_attn`, a torchext.nn.Attention, of `mlp`, and those of the two
    norms. What both norms return is quantized by the kernels that compute it.

    With `norms_after`, as in Gemma 2 and 3: y = x + post_attention_layernorm(
    self_attn(input_layernorm(x))), and y + post_feedforward_layernorm(mlp(
    pre_feedforward_layernorm(y))).
    """

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        num_heads: int,
        num_kv_heads: int | None = None,
        *,
        mlp: Callable[..., torch.nn.Module] = SwiGLU,
        mlp_bias: bool = False,
        norm: Callable[..., torch.nn.Module] = RMSNorm,
        norm_eps: float = 1e-6,
        norms_after: bool = False,
        theta: float | None = 10000.0,
        is_causal: bool = True,
        save: Save = "fp8",
        recompute_attention: bool = False,
        recipe: Recipe | None = None,
        device: Any = None,
        dtype: torch.dtype | None = None,
        **attention: Any,
    ) -> None:
        """Allocates and initializes the parameters, as torchext.nn.Linear and RMSNorm do.

        Args:
            hidden_size: size of the last dimension of input and output.
            intermediate_size: of the MLP.
            num_heads, num_kv_heads, theta, is_causal: as for torchext.nn.Attention.
            mlp: the MLP's class, torchext.nn.SwiGLU, GEGLU, GELUMLP or ReLU2MLP, or a function with
                the same arguments: functools.partial(GEGLU, tanh_approximation=False).
            mlp_bias: whether the MLP's projections have biases.
            norm: the norms' class, torchext.nn.RMSNorm or LayerNorm, or a function with the same
                arguments: functools.partial(RMSNorm, unit_offset=True).
            norm_eps: what all norms add to the mean of squares, or to the variance.
            norms_after: whether norms follow attention and the MLP, too.
            save: what the MLP keeps for backward, as for torchext.nn.SwiGLU.
            recompute_attention: whether backward computes the first norm and attention again.
                It keeps nothing of them but x, which the norm keeps anyway. `recompute` of
                torchext.nn.Attention repeats less (not o_proj), and keeps more.
            recipe: of all projections; Recipe.deepseek_v3() if None.
            device, dtype: of all parameters.
            attention: the other keyword arguments of torchext.nn.Attention: head_dim, bias, ...

        Raises:
            ValueError, TypeError, RuntimeError: as torchext.nn.Attention and `mlp`.
        """
        super().__init__()
        self.recompute_attention = recompute_attention
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.self_attn = Attention(
            hidden_size,
            num_heads,
            num_kv_heads,
            norm_eps=norm_eps,
            theta=theta,
            is_causal=is_causal,
            recipe=recipe,
            **factory,
            **attention,
        )
        self.mlp = mlp(
            hidden_size, intermediate_size, mlp_bias, recipe=recipe, save=save, **factory
        )
        self.input_layernorm = norm(hidden_size, norm_eps, **factory)
        self.post_attention_layernorm = norm(hidden_size, norm_eps, **factory)
        self.pre_feedforward_layernorm: torch.nn.Module | None = None
        if norms_after:
            self.pre_feedforward_layernorm = norm(hidden_size, norm_eps, **factory)
            self.post_feedforward_layernorm = norm(hidden_size, norm_eps, **factory)

    def forward(self, input: Tensor, attn_mask: Tensor | None = None, **options: Any) -> Tensor:
        """The layer's output, [..., length, hidden_size], in the input's dtype.

        Args:
            input: [..., length, hidden_size], as for torchext.nn.Linear.
            attn_mask, options: as for torchext.nn.Attention's forward.

        Raises:
            ValueError, TypeError, RuntimeError: as torchext.nn.Attention's forward.
        """

        def attend(x: Tensor) -> Tensor:
            return self.self_attn(self.input_layernorm(x), attn_mask, **options)

        if self.recompute_attention and options.get("cache") is None:
            random = self.training and getattr(self.self_attn, "dropout", 1) > 0
            attended = recomputed(attend, input, random=random)
        else:
            attended = attend(input)
        if self.pre_feedforward_layernorm is None:
            x = input + attended
            return x + self.mlp(self.post_attention_layernorm(x))
        x = input + self.post_attention_layernorm(attended)
        y: Tensor = self.mlp(self.pre_feedforward_layernorm(x))
        return x + self.post_feedforward_layernorm(y)

    def extra_repr(self) -> str:
        return "recompute_attention=True" if self.recompute_attention else ""
