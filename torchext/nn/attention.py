"""torchext.nn.Attention: self-attention whose projections run in FP8."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ..recipe import Recipe
from .composition import is_composed
from .linear import Linear, output_dtype
from .norm import RMSNorm
from .rotary import rotary_embedding, rotated


class KVCache(Protocol):
    """What `cache` of Attention.forward must be: an object that keeps the keys and values of one
    layer between calls. The layers of a cache of transformers are such objects."""

    def update(self, k: Tensor, v: Tensor, /) -> tuple[Tensor, Tensor]:
        """Adds the new keys and values, and returns those that the new queries attend to.

        Called once in each forward. The new ones come last in the result, unless the caller passes
        is_causal=False and a mask that tells which are which.

        Args:
            k: the new keys, [..., num_kv_heads, length, head_dim], after norm and rotary embedding.
            v: the new values, of the same shape.
        """
        ...


class Attention(torch.nn.Module):
    """Self-attention: o_proj(softmax(q @ k.T * scale) @ v), with q = q_proj(x) and so on.

    The projections are torchext.nn.Linears. Between them the heads of q and k may be normalized
    (RMSNorm, as in Qwen3) and turned (rotary embedding, as in Llama), and PyTorch's
    scaled_dot_product_attention computes the rest, in the dtype of the output.

    q, k and v quantize their input once, and save it once. Bytes kept for backward for each token,
    beside the FP8 weights, where K = hidden_size, Q = num_heads * head_dim, V = num_kv_heads *
    head_dim, and the output is BF16:

        K            the input in FP8, for the gradients of the three weights
        2 Q + 4 V    q, k and v as scaled_dot_product_attention reads them
        2 Q          its result, which o_proj quantizes again in backward; and 4 for each head
        2 Q + 2 V    with qk_norm: what the norms read

    With `recompute`, backward keeps the input, 2 K, and in FP8 that of o_proj, Q; it repeats all
    that comes before o_proj, to the same bits.

    Parameters are those of four linear layers, `q_proj` [Q, K], `k_proj` and `v_proj` [V, K] and
    `o_proj` [K, Q], and with qk_norm `q_norm.weight` and `k_norm.weight`, [head_dim]. A state_dict
    may hold `qkv_proj`, the rows of q, k and v one after another, in place of the first three.
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        num_kv_heads: int | None = None,
        *,
        head_dim: int | None = None,
        bias: bool = False,
        output_bias: bool | None = None,
        qk_norm: bool | Callable[..., torch.nn.Module] = False,
        norm_eps: float = 1e-6,
        theta: float | None = None,
        rotary_dim: int | None = None,
        is_causal: bool = False,
        dropout: float = 0.0,
        scale: float | None = None,
        recompute: bool = False,
        recipe: Recipe | None = None,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Allocates and initializes the projections, as torchext.nn.Linear does.

        Args:
            hidden_size: size K of the last dimension of input and output.
            num_heads: heads of q.
            num_kv_heads: heads of k and v, each of which num_heads / num_kv_heads heads of q share
                (grouped-query attention); num_heads if None.
            head_dim: features of a head; hidden_size / num_heads if None.
            bias: whether q_proj, k_proj and v_proj have biases.
            output_bias: whether o_proj has a bias; as `bias` if None.
            qk_norm: whether the heads of q and k are normalized, each by its own RMSNorm; or, in
                place of RMSNorm, a function that makes a norm from head_dim and norm_eps.
            norm_eps: what these norms add to the mean of squares.
            theta: base of the rotary frequencies, as for torchext.nn.rotary_embedding. If None, q
                and k turn only if forward gets `position_embeddings`.
            rotary_dim: how many features of a head turn, the first ones; all if None.
            is_causal: whether a token attends only to itself and the tokens before it.
            dropout: probability with which an attention weight is zeroed in training.
            scale: factor of q @ k.T; head_dim ** -0.5 if None.
            recompute: whether backward computes q, k, v and attention again.
            recipe: of the projections; Recipe.deepseek_v3() if None.
            device, dtype: of the parameters, as for torchext.nn.Linear.

        Raises:
            ValueError: num_heads does not divide hidden_size, and head_dim is None; num_kv_heads
                does not divide num_heads; rotary_dim is odd, not positive, larger than head_dim, or
                given without theta; dropout is not in [0, 1).
            TypeError, RuntimeError: as for torchext.nn.Linear.
        """
        super().__init__()
        num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        if num_heads < 1 or (head_dim is None and hidden_size % num_heads):
            raise ValueError(
                f"torchext.nn.Attention: num_heads must be positive and divide hidden_size, "
                f"{hidden_size} (got {num_heads}); otherwise pass head_dim"
            )
        if num_kv_heads < 1 or num_heads % num_kv_heads:
            raise ValueError(
                f"torchext.nn.Attention: num_kv_heads must be positive and divide num_heads, "
                f"{num_heads} (got {num_kv_heads}); omit it for as many heads as q has"
            )
        head_dim = hidden_size // num_heads if head_dim is None else head_dim
        if rotary_dim is not None and (
            theta is None or rotary_dim % 2 or not 0 < rotary_dim <= head_dim
        ):
            raise ValueError(
                "torchext.nn.Attention: rotary_dim must be even, at most head_dim, which is "
                f"{head_dim}, and come with theta (got {rotary_dim} and theta {theta}); omit it to "
                "turn whole heads"
            )
        if not 0 <= dropout < 1:
            raise ValueError(
                f"torchext.nn.Attention: dropout must be in [0, 1) (got {dropout}); pass 0 for none"
            )
        self.num_heads = num_heads
        self.num_kv_heads = num_kv_heads
        self.head_dim = head_dim
        self.theta = theta
        self.rotary_dim = rotary_dim
        self.is_causal = is_causal
        self.dropout = dropout
        self.scale = scale
        self.recompute = recompute
        options: dict[str, Any] = {"device": device, "dtype": dtype}
        q_size, kv_size = num_heads * head_dim, num_kv_heads * head_dim
        self.q_proj = Linear(hidden_size, q_size, bias, recipe=recipe, **options)
        self.k_proj = Linear(hidden_size, kv_size, bias, recipe=recipe, **options)
        self.v_proj = Linear(hidden_size, kv_size, bias, recipe=recipe, **options)
        output_bias = bias if output_bias is None else output_bias
        self.o_proj = Linear(q_size, hidden_size, output_bias, recipe=recipe, **options)
        self.o_proj._keeps_input = not recompute  # scaled_dot_product_attention keeps it anyway
        norm = RMSNorm if qk_norm is True else qk_norm
        self.q_norm = norm(head_dim, norm_eps, **options) if norm else None
        self.k_norm = norm(head_dim, norm_eps, **options) if norm else None
        self.register_load_state_dict_pre_hook(_split_qkv)

    def forward(
        self,
        input: Tensor,
        attn_mask: Tensor | None = None,
        *,
        position_ids: Tensor | None = None,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        cache: KVCache | None = None,
        is_causal: bool | None = None,
    ) -> Tensor:
        """The layer's output, [..., length, hidden_size].

        Args:
            input: [..., length, hidden_size], as for torchext.nn.Linear.
            attn_mask: as for scaled_dot_product_attention, broadcast to [..., num_heads, length,
                keys]: bool, True where a token may attend, or values that are added to q @ k.T *
                scale. With is_causal, later keys are hidden, too.
            position_ids: [length] or [..., length], for a layer with theta; 0, 1, ... if None.
            position_embeddings: (cos, sin), each [length, rotary_dim] or [..., length, rotary_dim],
                in place of position_ids. Their dtype is that of the rotation, whose result is
                rounded to the dtype of q and k.
            cache: gets the new keys and values, and returns all. With theta, position_ids are
                required then. `recompute` has no effect: a cache must see each key once.
            is_causal: in place of the layer's own. The last token attends to all keys, the one
                before it to all but one, and so on.

        Raises:
            ValueError: position_ids for a layer without theta; none for a layer with theta and a
                cache; is_causal with an attn_mask of a subclass of torch.Tensor.
            RuntimeError: position_ids or position_embeddings are not for `length` tokens; otherwise
                as torchext.nn.Linear's forward and scaled_dot_product_attention.
            TypeError: as torchext.nn.Linear's forward.
        """
        if input.dim() < 2:
            raise RuntimeError(
                "torchext.nn.Attention: input must have shape [..., length, hidden_size] (got "
                f"{list(input.shape)}); add a dimension with input[None]"
            )
        is_causal = self.is_causal if is_causal is None else is_causal
        rotary = self._rotary(input, position_ids, position_embeddings, cache)

        def attend(x: Tensor) -> Tensor:
            return self._attend(x, rotary, cache, attn_mask, is_causal)

        if self.recompute and cache is None:
            random = self.training and self.dropout > 0
            return self.o_proj(recomputed(attend, input, random=random))
        return self.o_proj(attend(input))

    def extra_repr(self) -> str:
        words = [f"num_heads={self.num_heads}", f"num_kv_heads={self.num_kv_heads}"]
        words += [f"head_dim={self.head_dim}"]
        defaults = {
            "theta": None,
            "rotary_dim": None,
            "is_causal": False,
            "dropout": 0,
            "scale": None,
            "recompute": False,
        }
        for name, default in defaults.items():
            if getattr(self, name) != default:
                words.append(f"{name}={getattr(self, name)}")
        return ", ".join(words)

    def _rotary(
        self,
        input: Tensor,
        position_ids: Tensor | None,
        position_embeddings: tuple[Tensor, Tensor] | None,
        cache: KVCache | None,
    ) -> tuple[Tensor, Tensor] | None:
        """cos and sin with a dimension for the heads, or None if nothing turns."""
        length = input.shape[-2]
        if position_embeddings is not None:
            cos, sin = position_embeddings
            width = cos.shape[-1]
            if (
                cos.shape != sin.shape
                or cos.dim() < 2
                or cos.shape[-2] != length
                or width % 2
                or width > self.head_dim
            ):
                raise RuntimeError(
                    "torchext.nn.Attention: position_embeddings must be two tensors of shape [..., "
                    f"{length}, rotary_dim], rotary_dim even and at most {self.head_dim} (got "
                    f"{list(cos.shape)}, {list(sin.shape)}); make them with "
                    "torchext.nn.rotary_embedding"
                )
        elif self.theta is None:
            if position_ids is not None:
                raise ValueError(
                    "torchext.nn.Attention: position_ids must be None for a layer without theta "
                    "(got a tensor); create the layer with theta, or pass position_embeddings"
                )
            return None
        else:
            if position_ids is None:
                if cache is not None:
                    raise ValueError(
                        "torchext.nn.Attention: position_ids must be a tensor with a cache (got "
                        "None); pass the positions of the new tokens"
                    )
                position_ids = torch.arange(length, device=input.device)
            if position_ids.dim() < 1 or position_ids.shape[-1] != length:
                raise RuntimeError(
                    f"torchext.nn.Attention: position_ids must have shape [..., {length}] (got "
                    f"{list(position_ids.shape)}); pass one position for each token"
                )
            rotary_dim = self.rotary_dim or self.head_dim
            cos, sin = rotary_embedding(position_ids, rotary_dim, self.theta, output_dtype(input))
        return cos.unsqueeze(-2), sin.unsqueeze(-2)

    def _attend(
        self,
        input: Tensor,
        rotary: tuple[Tensor, Tensor] | None,
        cache: KVCache | None,
        attn_mask: Tensor | None,
        is_causal: bool,
    ) -> Tensor:
        """Computes what o_proj reads, [..., length, num_heads * head_dim]."""
        q, k, v = (
            projection(input).unflatten(-1, (-1, self.head_dim))
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        if rotary is not None:
            q, k = rotated(q, *rotary), rotated(k, *rotary)
        q, k = q.to(v.dtype), k.to(v.dtype)  # norms may return the dtype of their weights
        q, k, v = (x.transpose(-3, -2) for x in (q, k, v))
        if cache is not None:
            k, v = cache.update(k, v)
        if is_causal:
            attn_mask, is_causal = _causal_mask(attn_mask, q.shape[-2], k)
        grouped = self.num_kv_heads != self.num_heads
        if grouped and attn_mask is not None and k.is_cuda:  # no fused kernel there takes both
            k, v = (x.repeat_interleave(q.shape[-3] // x.shape[-3], -3) for x in (k, v))
        y = F.scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask,
            self.dropout if self.training else 0.0,
            is_causal,
            scale=self.scale,
            enable_gqa=grouped,
        )
        return y.transpose(-3, -2).flatten(-2)


def recomputed(function: Callable[[Tensor], Tensor], x: Tensor, *, random: bool) -> Tensor:
    """function(x), of which backward keeps only x; `random` if it draws random numbers.

    Transforms of torch.func refuse the hooks that this needs.
    """
    if not torch.is_grad_enabled() or (not torch.compiler.is_compiling() and is_composed()):
        return function(x)
    y: Tensor = checkpoint(function, x, use_reentrant=False, preserve_rng_state=random)
    return y


def _causal_mask(attn_mask: Tensor | None, length: int, k: Tensor) -> tuple[Tensor | None, bool]:
    """attn_mask and is_causal for scaled_dot_product_attention, which takes one of the two, and
    would align the first query with the first key."""
    keys = k.shape[-2]
    if length == 1:  # the last token
        return attn_mask, False
    if attn_mask is None and length == keys:
        return None, True
    visible = torch.ones(length, keys, dtype=torch.bool, device=k.device).tril(keys - length)
    if attn_mask is None:
        return visible, False
    if type(attn_mask) is not Tensor:
        raise ValueError(
            "torchext.nn.Attention: attn_mask must be a plain tensor with is_causal=True (got a "
            f"{type(attn_mask).__name__}); pass is_causal=False if it hides later keys itself"
        )
    if attn_mask.dtype == torch.bool:
        return attn_mask & visible, False
    return attn_mask.masked_fill(~visible, float("-inf")), False


def _split_qkv(module: Any, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
    """Loads `qkv_proj`, the rows of q, then those of k and of v, if it is there."""
    error_messages: list[str] = rest[-1]
    sizes = [heads * module.head_dim for heads in (module.num_heads, *[module.num_kv_heads] * 2)]
    for name in ("weight", "bias"):
        key = f"{prefix}qkv_proj.{name}"
        if key not in state_dict:
            continue
        rows = state_dict[key]
        if rows.shape[0] != sum(sizes):
            error_messages.append(
                f"torchext.nn.Attention: {key} must have {sum(sizes)} rows (got {rows.shape[0]}); "
                "load it into a layer with its num_heads, num_kv_heads and head_dim"
            )
            continue
        del state_dict[key]
        for part, its_rows in zip("qkv", rows.split(sizes), strict=True):
            state_dict[f"{prefix}{part}_proj.{name}"] = its_rows
