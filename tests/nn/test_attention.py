"""Attention with FP8 projections: numbers, masks, rotary embedding, cache, and what it saves."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right
from torch.utils.checkpoint import checkpoint

from support.linear_testing import (
    QUANTIZE_ACTIVATION,
    OpCounter,
    gradient,
    normal,
    saved_tensors,
    sqnr,
)
from torchext import Recipe, convert_to_fp8_training, unconvert
from torchext.nn import Attention, Linear, rotary_embedding

pytestmark = pytest.mark.large  # its kernels are those of Linear

K, HEADS, D = 96, 4, 32
LAYERS: dict[str, dict[str, Any]] = {
    "BERT": {"bias": True},
    "GPT-2": {"bias": True, "is_causal": True},
    "Llama": {"num_kv_heads": 2, "theta": 1e4, "is_causal": True},
    "Qwen2": {"num_kv_heads": 1, "theta": 1e6, "is_causal": True, "bias": True,
              "output_bias": False},
    "Qwen3": {"num_kv_heads": 2, "theta": 1e6, "is_causal": True, "qk_norm": True},
    "partial": {"theta": 1e4, "rotary_dim": 8, "scale": 0.3},
}  # fmt: skip
every_layer = pytest.mark.parametrize("options", LAYERS.values(), ids=LAYERS)


def layer_of(device: torch.device, **options: Any) -> Attention:
    torch.manual_seed(0)
    layer = Attention(K, HEADS, head_dim=D, device=device, **options)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_(std=parameter.shape[-1] ** -0.5)
    return layer


def inputs(device: torch.device, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    torch.manual_seed(1)
    return torch.randn(*(shape or (2, 12)), K, device=device, dtype=dtype)


def results(layer: Any, x: Tensor, **options: Any) -> list[Tensor]:
    """y, and the gradients of x and of all parameters."""
    x = x.detach().requires_grad_()
    layer.zero_grad()
    y = layer(x * 1, **options)  # an input that the model computed
    dy = torch.arange(y.numel(), device=y.device).remainder(11).view_as(y).sub(3).to(y)
    y.backward(dy)
    return [y.detach(), gradient(x), *map(gradient, layer.parameters())]


class Reference(torch.nn.Module):
    """Computes what the layer should, in float64 and with nothing fused."""

    def __init__(self, layer: Attention, visible: Tensor | None = None) -> None:
        super().__init__()
        self.layer = copy.deepcopy(layer).double()
        self.visible = visible

    def forward(self, x: Tensor, added: float | Tensor = 0.0) -> Tensor:
        layer = self.layer

        def heads(name: str) -> Tensor:
            projection, norm = (getattr(layer, f"{name}_{kind}", None) for kind in ("proj", "norm"))
            assert projection is not None
            bias = 0 if projection.bias is None else projection.bias
            y = (x @ projection.weight.T + bias).unflatten(-1, (-1, D))
            if norm is not None:
                y = y / (y.square().mean(-1, keepdim=True) + norm.eps).sqrt() * norm.weight
            return torch.stack([y[..., h, :] for h in range(y.shape[-2])], -3)

        q, k, v = heads("q"), heads("k"), heads("v")
        q, k = self.turned(q), self.turned(k)
        k, v = (t.repeat_interleave(HEADS // layer.num_kv_heads, -3) for t in (k, v))
        scores = q @ k.mT * (D**-0.5 if layer.scale is None else layer.scale) + added
        hidden = torch.zeros(scores.shape[-2:], dtype=torch.bool, device=x.device)
        if layer.is_causal:
            hidden = hidden.logical_not().triu(1)
        if self.visible is not None:
            hidden = hidden | ~self.visible
        y = scores.masked_fill(hidden, -torch.inf).softmax(-1) @ v
        y = torch.cat([y[..., h, :, :] for h in range(HEADS)], -1)
        bias = 0 if layer.o_proj.bias is None else layer.o_proj.bias
        return y @ layer.o_proj.weight.T + bias

    def turned(self, x: Tensor) -> Tensor:
        """x with each pair of elements, as a complex number, multiplied by a unit number."""
        if self.layer.theta is None:
            return x
        width = self.layer.rotary_dim or D
        pairs = torch.complex(x[..., : width // 2], x[..., width // 2 : width])
        steps = torch.arange(width // 2, device=x.device).double() * -2 / width
        positions = torch.arange(x.shape[-2], device=x.device).double()
        angles = positions[:, None] * self.layer.theta**steps
        pairs = pairs * torch.polar(torch.ones_like(angles), angles)
        return torch.cat([pairs.real, pairs.imag, x[..., width:]], -1)


def assert_close(got: list[Tensor], exact: list[Tensor], limit: float = 17) -> None:
    for mine, expected in zip(got, exact, strict=True):
        assert mine.shape == expected.shape
        if expected.square().mean() > 1e-20:  # k's bias has no gradient: softmax ignores it
            assert sqnr(expected, mine) >= limit


def assert_equal(got: list[Tensor], expected: list[Tensor]) -> None:
    for mine, theirs in zip(got, expected, strict=True):
        assert torch.equal(mine, theirs)


# ---- numbers ----


@every_layer
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_against_float64(device, options, dtype):
    layer = layer_of(device, dtype=dtype, **options)
    x = inputs(device, dtype=dtype)
    got = results(layer, x)
    assert all(mine.dtype == dtype for mine in got)
    assert_close(got, results(Reference(layer), x.double()))


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("num_kv_heads", [HEADS, 2])
def test_masks(device, is_causal, num_kv_heads):
    layer = layer_of(device, is_causal=is_causal, num_kv_heads=num_kv_heads)
    x = inputs(device)
    visible = torch.rand(2, 1, 12, 12, device=device) > 0.4
    visible |= torch.eye(12, dtype=torch.bool, device=device)
    exact = results(Reference(layer, visible), x.double())
    assert_close(results(layer, x, attn_mask=visible), exact)
    added = torch.zeros(visible.shape, device=device).masked_fill(~visible, -torch.inf)
    assert_close(results(layer, x, attn_mask=added), exact)
    padded = visible[:, :, :1].clone()  # the same keys for all queries
    padded[..., 0] = True
    assert_close(results(layer, x, attn_mask=padded), results(Reference(layer, padded), x.double()))
    added = normal(2, HEADS, 12, 12, device=device)
    exact = results(Reference(layer), x.double(), added=added.double())
    assert_close(results(layer, x, attn_mask=added), exact)


def test_is_causal_of_one_call(device):
    layer, causal = layer_of(device), layer_of(device, is_causal=True)
    x = inputs(device)
    assert torch.equal(layer(x, is_causal=True), causal(x))
    assert torch.equal(causal(x, is_causal=False), layer(x))
    assert torch.equal(layer(x, causal_lower_right(12, 12)), causal(x))


def test_rotary_embedding_given_by_the_caller(device):
    x = inputs(device)
    own = layer_of(device, theta=500.0, rotary_dim=16)
    given = layer_of(device)
    positions = torch.arange(12, device=device)
    embeddings = rotary_embedding(positions, 16, 500.0)
    assert_equal(results(given, x, position_embeddings=embeddings), results(own, x))
    assert_equal(results(own, x, position_embeddings=embeddings), results(own, x))
    # Attention depends on differences of positions only.
    shifted = torch.stack([positions + 3, positions + 70])
    assert sqnr(own(x), own(x, position_ids=shifted)) > 60
    assert sqnr(own(x), own(x, position_ids=positions * 2)) < 40
    # FP32 angles: products in FP32, rounded once.
    x, given = x.bfloat16(), given.bfloat16()
    assert given(x, position_embeddings=embeddings).dtype == torch.bfloat16


@pytest.mark.slow
def test_rotary_embedding_is_that_of_transformers(device):
    llama = pytest.importorskip("transformers.models.llama.modeling_llama")
    phi = pytest.importorskip("transformers.models.phi3.modeling_phi3")
    from transformers import LlamaConfig

    from torchext.nn.rotary import rotated

    config = LlamaConfig(hidden_size=64, num_attention_heads=2, rope_theta=3e4)
    module = llama.LlamaRotaryEmbedding(config)
    for dtype in (torch.float32, torch.bfloat16):
        q, k = normal(2, 2, 9, 32, device=device).to(dtype), normal(2, 2, 9, 32, device=device)
        k = k.to(dtype)
        positions = torch.randint(1000, (2, 9))
        embeddings = module(q.cpu(), positions)
        assert_equal(list(rotary_embedding(positions, 32, 3e4, dtype)), list(embeddings))
        cos, sin = (t.to(device)[:, None] for t in embeddings)
        expected = llama.apply_rotary_pos_emb(q, k, *(t.to(device) for t in embeddings))
        assert_equal([rotated(q, cos, sin), rotated(k, cos, sin)], expected)
        part = [t[..., :12] for t in (cos, sin)]
        expected = phi.apply_rotary_pos_emb(q, k, *(t[:, 0] for t in part))
        assert_equal([rotated(q, *part), rotated(k, *part)], expected)


# ---- the cache ----


class GrowingCache:
    def __init__(self) -> None:
        self.held: tuple[Tensor, Tensor] | None = None

    def update(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        if self.held is not None:
            k, v = torch.cat([self.held[0], k], -2), torch.cat([self.held[1], v], -2)
        self.held = k, v
        return k, v


@pytest.mark.parametrize("chunks", [[1] * 12, [5, 1, 4, 2]], ids=str)
@pytest.mark.parametrize("kind", ["own", pytest.param("transformers", marks=pytest.mark.slow)])
def test_decoding_with_a_cache(device, chunks, kind):
    """Rows are quantized one by one, so that steps give the values of one forward."""
    layer = layer_of(device, num_kv_heads=2, theta=1e4, is_causal=True, recompute=True)
    x = inputs(device)
    if kind == "own":
        cache: Any = GrowingCache()
    else:
        transformers = pytest.importorskip("transformers")
        config = transformers.LlamaConfig(num_hidden_layers=2)
        cache = transformers.DynamicCache(config=config).layers[1]
    steps = []
    positions = torch.arange(12, device=device)
    for part, ids in zip(x.split(chunks, 1), positions.split(chunks), strict=True):
        steps.append(layer(part, position_ids=ids, cache=cache))
    assert sqnr(layer(x), torch.cat(steps, 1)) > 100
    exact = Reference(layer)(x.double())
    assert sqnr(exact, torch.cat(steps, 1)) > 20


def test_recomputation_stores_no_key_twice(device):
    layer = layer_of(device, theta=1e4, recompute=True)
    cache = GrowingCache()
    layer(
        inputs(device), position_ids=torch.arange(12, device=device), cache=cache
    ).sum().backward()
    assert cache.held is not None and cache.held[0].shape == (2, HEADS, 12, D)


# ---- what is saved ----


@pytest.mark.parametrize("options", [{}, {"is_causal": True, "theta": 1e4}], ids=["", "rotary"])
def test_input_is_quantized_and_saved_once(device, options):
    k, q, v = 256, 256, 128
    layer = Attention(k, 4, 2, device=device, dtype=torch.bfloat16, **options)
    x = normal(4, 32, k, device=device, dtype=torch.bfloat16, grad=True) * 1
    layer(x)
    with saved_tensors() as saved, OpCounter() as counter:
        layer(x)
    assert counter.of(*QUANTIZE_ACTIVATION) == 2
    assert counter.of("quantize_1x128_dual") == 1  # x; that of o_proj needs no transpose yet
    storages = {t.untyped_storage().data_ptr(): t for t in saved if t.element_size() < 4}
    angles = sum(t.nbytes for t in storages.values() if t.shape == (32, 1, 64))
    size = sum(t.untyped_storage().nbytes() for t in storages.values()) - angles
    weights = 2 * k * q + 2 * k * v  # the FP8 transposes
    assert size == 128 * (k + 2 * q + 4 * v + 2 * q) + weights
    wide = {t.untyped_storage().data_ptr(): t for t in saved if t.element_size() == 4}
    assert sum(t.untyped_storage().nbytes() for t in wide.values()) < size / 16  # scales, sums


def test_bytes_that_the_norms_of_q_and_k_keep(device):
    x = normal(4, 32, 256, device=device, dtype=torch.bfloat16, grad=True) * 1
    sizes = []
    for qk_norm in (False, True):
        layer = Attention(256, 4, 2, qk_norm=qk_norm, device=device, dtype=torch.bfloat16)
        layer(x)
        with saved_tensors() as saved:
            layer(x)
        parameters = {p.data_ptr() for p in layer.parameters()}
        kept = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in saved}
        sizes.append(sum(size for place, size in kept.items() if place not in parameters))
    rows = 4 * 6  # one FP32 value for each head of q and k
    assert sizes[1] - sizes[0] == 128 * (2 * 256 + 2 * 128 + rows)


def test_recomputation_keeps_the_input_only(device):
    k, q = 256, 256
    options = {"device": device, "dtype": torch.bfloat16}
    layer = Attention(k, 4, 2, theta=1e4, qk_norm=True, recompute=True, **options)
    x = normal(2, 64, k, device=device, dtype=torch.bfloat16, grad=True) * 1
    with saved_tensors() as saved:
        layer(x)
    storages = {t.untyped_storage().data_ptr(): t for t in saved if t.element_size() < 4}
    assert x.untyped_storage().data_ptr() in storages
    size = sum(t.untyped_storage().nbytes() for t in storages.values())
    assert size <= 128 * (2 * k + q) + k * q + 1


@every_layer
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_recomputation_gives_the_same_bits(device, options, dropout):
    x = inputs(device)
    kept, again = (layer_of(device, recompute=r, dropout=dropout, **options) for r in (False, True))
    torch.manual_seed(2)
    expected = results(kept, x)
    torch.manual_seed(2)
    assert_equal(results(again, x), expected)


@pytest.mark.parametrize("recipe", [Recipe.deepseek_v3(), Recipe.rowwise()], ids=str)
def test_input_of_o_proj_is_quantized_again_to_the_same_bits(device, recipe):
    layer, x = layer_of(device, recipe=recipe, output_bias=True), inputs(device)
    expected = results(layer, x)
    layer.o_proj._keeps_input = False
    assert_equal(results(layer, x), expected)


# ---- modes ----


def test_dropout(device):
    layer = layer_of(device, dropout=0.5)
    x = inputs(device)
    y = layer(x)
    assert not torch.equal(layer(x), y)
    assert torch.equal(layer.eval()(x), layer_of(device)(x))


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing(device, use_reentrant):
    layer = layer_of(device, dropout=0.5, theta=1e4)
    x = inputs(device)
    torch.manual_seed(2)
    expected = results(layer, x)
    torch.manual_seed(2)

    class Checkpointed(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = layer

        def forward(self, x: Tensor) -> Any:
            return checkpoint(self.layer, x, use_reentrant=use_reentrant)

    assert_equal(results(Checkpointed(), x), expected)


@pytest.mark.slow
@pytest.mark.parametrize("recompute", [False, True])
def test_compiled_in_one_graph(device, recompute):
    layer = layer_of(device, recompute=recompute, **LAYERS["Qwen3"])
    x = inputs(device)
    torch._dynamo.reset()
    compiled = torch.compile(copy.deepcopy(layer), fullgraph=True, backend="aot_eager")
    assert_close(results(compiled, x), results(Reference(layer), x.double()))


@pytest.mark.parametrize("recompute", [False, True])
def test_transforms(device, recompute):
    layer, x = layer_of(device, recompute=recompute, theta=1e4, is_causal=True), inputs(device)
    expected = results(layer, x)[2:]

    def loss(parameters: dict[str, Tensor]) -> Tensor:
        y = torch.func.functional_call(layer, parameters, (x,))
        dy = torch.arange(y.numel(), device=y.device).remainder(11).view_as(y).sub(3)
        return (y * dy).sum()

    got = torch.func.grad(loss)(dict(layer.named_parameters()))
    assert_equal([*got.values()], expected)
    assert torch.func.vmap(layer)(x).shape == x.shape


def test_autocast(device):
    layer = layer_of(device, theta=1e4, qk_norm=True, num_kv_heads=2)
    x = inputs(device)
    with torch.autocast(device.type, torch.bfloat16):
        got = results(layer, x)
    assert got[0].dtype == torch.bfloat16 and got[1].dtype == torch.float32
    assert_close(got, results(Reference(layer), x.double()))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_input_of_another_dtype_than_the_parameters(device, dtype):
    other = torch.float32 if dtype == torch.bfloat16 else torch.bfloat16
    layer = layer_of(device, theta=1e4, qk_norm=True, dtype=other)
    x = inputs(device, dtype=dtype)
    got = results(layer, x)
    assert got[0].dtype == dtype
    assert_close(got, results(Reference(layer), x.double()))


def test_norms_that_return_another_dtype(device):
    layer = layer_of(device, qk_norm=True, theta=1e4, dtype=torch.bfloat16)
    x = inputs(device, dtype=torch.bfloat16)
    y = layer(x)
    for norm in (layer.q_norm, layer.k_norm):
        assert norm is not None
        norm.register_forward_hook(lambda module, args, y: y.float())
    assert layer(x).dtype == torch.bfloat16 and sqnr(y, layer(x)) > 25


@pytest.mark.parametrize("shape", [(12,), (3, 1), (0, 5), (2, 0), (2, 2, 5)], ids=str)
def test_inputs_of_any_rank(device, shape):
    layer = layer_of(device, theta=1e4, num_kv_heads=2, is_causal=True)
    x = inputs(device, *shape)
    got = results(layer, x)
    assert got[0].shape == x.shape
    if x.numel():
        assert_close(got, results(Reference(layer), x.double()))


# ---- as a module ----


def test_state_dict(device):
    layer = layer_of(device, num_kv_heads=2, bias=True, qk_norm=True)
    names = [f"{part}_proj.{p}" for part in "qkvo" for p in ("weight", "bias")]
    state = {name: tensor + 1 for name, tensor in layer.state_dict().items()}
    assert list(state) == [*names, "q_norm.weight", "k_norm.weight"]
    separate = layer_of(device, num_kv_heads=2, bias=True, qk_norm=True)
    separate.load_state_dict(state)
    assert_equal([*separate.state_dict().values()], [*state.values()])
    for p in ("weight", "bias"):
        state[f"qkv_proj.{p}"] = torch.cat([state.pop(f"{part}_proj.{p}") for part in "qkv"])
    layer.load_state_dict(state)
    assert_equal([*layer.state_dict().values()], [*separate.state_dict().values()])
    with pytest.raises(RuntimeError, match=r"qkv_proj\.weight must have 384 rows \(got 256\)"):
        layer_of(device, bias=True, qk_norm=True).load_state_dict(state)


def test_copies_and_pickles(device):
    layer = layer_of(device, theta=1e4, num_kv_heads=2, recompute=True)
    x = inputs(device)
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert_equal(results(twin, x), results(layer, x))
        assert repr(twin) == repr(layer)
        state = {"qkv_proj.weight": torch.zeros(256, K), "o_proj.weight": torch.zeros(K, 128)}
        twin.load_state_dict(state)
        assert not twin(x).any() and layer(x).any()


def test_made_on_the_meta_device(device):
    with torch.device("meta"):
        layer = Attention(K, HEADS, theta=1e4, qk_norm=True, dtype=torch.bfloat16)
    assert {(p.device.type, p.dtype) for p in layer.parameters()} == {("meta", torch.bfloat16)}
    layer.to_empty(device=device)
    trained = Attention(K, HEADS, theta=1e4, qk_norm=True, device=device, dtype=torch.bfloat16)
    layer.load_state_dict(trained.state_dict())
    x = inputs(device, dtype=torch.bfloat16)
    assert torch.equal(layer(x), trained(x))


def test_conversion_leaves_it_alone(device):
    model = torch.nn.Sequential(layer_of(device, recipe=Recipe.rowwise()))
    x = inputs(device)
    y = model(x)
    assert not convert_to_fp8_training(model).converted
    assert torch.equal(model(x), y) and type(model[0]) is Attention
    unconvert(model)
    assert type(model[0]) is Attention and type(model[0].q_proj) is torch.nn.Linear
    assert_close([model(x).detach()], [Reference(model[0])(x.double()).detach()], 100)


def test_errors(device):
    def refuses(error: type[Exception], match: str, **options: Any) -> None:
        with pytest.raises(error, match=match):
            Attention(**{"hidden_size": 96, "num_heads": 4, **options})

    refuses(ValueError, r"num_heads must be .* divide hidden_size, 96 \(got 5\)", num_heads=5)
    refuses(ValueError, r"num_kv_heads must .* divide num_heads, 4 \(got 3\)", num_kv_heads=3)
    refuses(
        ValueError, r"rotary_dim must be even.*\(got 5 and theta 10.0\)", rotary_dim=5, theta=10.0
    )
    refuses(ValueError, r"rotary_dim must .* 24.*\(got 26", rotary_dim=26, theta=10.0)
    refuses(ValueError, r"rotary_dim must .* theta.*\(got 8 and theta None\)", rotary_dim=8)
    refuses(ValueError, r"dropout must be in \[0, 1\) \(got 1\)", dropout=1)
    refuses(TypeError, r"recipe must be a torchext\.Recipe", recipe="blockwise")

    plain, layer, x = layer_of(device), layer_of(device, theta=1e4), inputs(device)
    ids = torch.arange(11, device=device)
    with pytest.raises(RuntimeError, match=r"input must have shape .* \(got \[96\]\)"):
        layer(x[0, 0])
    with pytest.raises(RuntimeError, match=r"input must have shape \[\.\.\., 96\]"):
        layer(x[..., 1:])
    with pytest.raises(ValueError, match=r"position_ids must be None for a layer without theta"):
        plain(x, position_ids=ids)
    with pytest.raises(ValueError, match=r"position_ids must be a tensor with a cache"):
        layer(x, cache=GrowingCache())
    with pytest.raises(RuntimeError, match=r"position_ids must have .* 12\] \(got \[11\]\)"):
        layer(x, position_ids=ids)
    with pytest.raises(RuntimeError, match=r"position_embeddings must .* 12.*\(got \[11, 32\]"):
        layer(x, position_embeddings=rotary_embedding(ids, 32))
    with pytest.raises(ValueError, match=r"attn_mask must be a plain tensor .* CausalBias"):
        layer(x, causal_lower_right(12, 12), is_causal=True)
    with pytest.raises(ValueError, match=r"rotary_dim must be even and positive \(got 7\)"):
        rotary_embedding(ids, 7)
    with pytest.raises(ValueError, match=r"theta must be positive \(got 0\)"):
        rotary_embedding(ids, 8, 0)


def test_uses_linear_layers():
    layer = Attention(8, 2, theta=1e4, is_causal=True)
    assert all(type(child) is Linear for child in layer.children() if child is not None)
    expected = "num_heads=2, num_kv_heads=2, head_dim=4, theta=10000.0, is_causal=True"
    assert layer.extra_repr() == expected
