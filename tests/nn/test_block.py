"""A transformer's layer in FP8, beside the decoder layers of transformers and its own parts."""

from __future__ import annotations

import copy
import functools
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor

from support.linear_testing import gradient, normal, saved_tensors, sqnr
from torchext import Recipe, convert_to_fp8_training
from torchext.nn import GEGLU, GELUMLP, Attention, Block, LayerNorm, Linear, RMSNorm, SwiGLU

pytestmark = pytest.mark.large  # its kernels are those of its parts

K, WIDE, HEADS = 128, 256, 4


def block_of(device: torch.device, **options: Any) -> Block:
    torch.manual_seed(0)
    options = {"num_kv_heads": 2, "device": device, **options}
    block = Block(K, WIDE, HEADS, **options)
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.normal_(std=parameter.shape[-1] ** -0.5).add_(parameter.dim() == 1)
    return block


def inputs(device: torch.device, *shape: int) -> Tensor:
    torch.manual_seed(1)
    return normal(*(shape or (2, 12)), K, device=device)


def results(layer: Any, x: Tensor, **options: Any) -> dict[str, Tensor]:
    """y, and the gradients of x and of all parameters."""
    x = x.detach().requires_grad_()
    layer.zero_grad()
    y = layer(x * 1, **options)
    dy = torch.arange(y.numel(), device=y.device).remainder(11).view_as(y).sub(3).to(y)
    y.backward(dy)
    gradients = {name: gradient(p) for name, p in layer.named_parameters()}
    return {"y": y.detach(), "x": gradient(x), **gradients}


def assert_equal(got: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert list(got) == list(expected)
    for name, tensor in expected.items():
        assert torch.equal(got[name], tensor), name


def assert_close(got: dict[str, Tensor], exact: dict[str, Tensor], limit: float = 15) -> None:
    assert sorted(got) == sorted(exact)
    for name, expected in exact.items():
        if expected.square().mean() > 1e-9:  # k's bias has no gradient: softmax ignores it
            assert sqnr(expected, got[name]) > limit, name


# ---- beside transformers ----

SIZES = {
    "hidden_size": K,
    "intermediate_size": WIDE,
    "num_attention_heads": HEADS,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "rms_norm_eps": 1e-5,
    "num_hidden_layers": 1,
}
UNIT_OFFSET = functools.partial(RMSNorm, unit_offset=True)
FAMILIES: dict[str, dict[str, Any]] = {
    "Llama": {},
    "Mistral": {},
    "Qwen2": {"bias": True, "output_bias": False},
    "Qwen3": {"qk_norm": True},
    "Gemma": {"mlp": GEGLU, "norm": UNIT_OFFSET},
    "Gemma3": {"mlp": GEGLU, "norm": UNIT_OFFSET, "qk_norm": UNIT_OFFSET, "norms_after": True},
}
# As far as their names are not those of Llama.
MODELS = {"Gemma3": ("Gemma3TextConfig", "Gemma3TextModel")}
THEIRS = {"Gemma3": {"query_pre_attn_scalar": 32, "sliding_window": 64}}
every_family = pytest.mark.parametrize("family", FAMILIES)


def their_layer(family: str, implementation: str = "sdpa") -> tuple[Any, Any]:
    """A random decoder layer of transformers, and its module that makes rotary embeddings."""
    transformers = pytest.importorskip("transformers")
    names = MODELS.get(family, (f"{family}Config", f"{family}Model"))
    config_class, model_class = (getattr(transformers, name) for name in names)
    config = config_class(**SIZES, **THEIRS.get(family, {}), pad_token_id=0)
    config._attn_implementation = implementation
    torch.manual_seed(0)
    model = model_class(config)
    (layer,) = model.layers
    mean = 0 if "Gemma" in family else 1  # of the weights of norms, and of biases
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_(std=parameter.shape[-1] ** -0.5).add_(mean * (parameter.dim() == 1))
    rotary = model.rotary_emb
    if family == "Gemma3":  # its layers have frequencies by their type
        rotary = functools.partial(rotary, layer_type=layer.self_attn.layer_type)
    return layer, rotary


def ours(family: str, layer: Any) -> Block:
    block = Block(K, WIDE, HEADS, 2, head_dim=32, norm_eps=1e-5, **FAMILIES[family])
    block.load_state_dict(layer.state_dict(), strict=True)
    assert list(block.state_dict()) == list(layer.state_dict())
    layer.load_state_dict(block.state_dict(), strict=True)
    return block


@pytest.mark.slow
@every_family
def test_close_to_the_layer_of_transformers(family):
    layer, rotary = their_layer(family)
    block, x = ours(family, layer), inputs(torch.device("cpu"))
    embeddings = rotary(x, torch.arange(12)[None])
    exact = results(layer, x, position_embeddings=embeddings)
    assert_close(results(block, x, position_embeddings=embeddings), exact)
    assert_close(results(block, x), exact)  # Block's theta is their default


@pytest.mark.slow
@pytest.mark.parametrize("family", [f for f in FAMILIES if f != "Gemma3"])
@pytest.mark.parametrize("masked", [False, True])
def test_bits_are_those_of_the_converted_layer(family, masked):
    """Norms aside, which round differently: both run the same ones.

    Gemma 3 normalizes q and k when they are transposed, and its norms are then PyTorch's.
    """
    layer, rotary = their_layer(family)
    block, x = ours(family, layer), inputs(torch.device("cpu"))
    for norm in [name for name, _ in layer.named_children() if name.endswith("_layernorm")]:
        setattr(layer, norm, copy.deepcopy(getattr(block, norm)))
    if block.self_attn.q_norm is not None:
        layer.self_attn.q_norm = copy.deepcopy(block.self_attn.q_norm)
        layer.self_attn.k_norm = copy.deepcopy(block.self_attn.k_norm)
    result = convert_to_fp8_training(layer, module_filter_fn=lambda module, name: True)
    assert len(result.converted) == 7 and len(result.fused) == 1
    embeddings = rotary(x, torch.arange(12)[None])
    mask = torch.ones(2, 1, 12, 12, dtype=torch.bool).tril()
    mask[1, :, 3:, :3] = False
    options: dict[str, Any] = {"position_embeddings": embeddings}
    theirs = results(layer, x, attention_mask=mask if masked else None, **options)
    got = results(block, x, attn_mask=mask if masked else None, **options)
    for norm in ("q_norm", "k_norm"):  # sums over the same rows in another order
        name = f"self_attn.{norm}.weight"
        if name in got:
            assert sqnr(theirs.pop(name), got[name]) > 100
    assert_equal({name: got[name] for name in theirs}, theirs)


@pytest.mark.slow
def test_fused_projections_of_phi():
    """qkv_proj and gate_up_proj load into the projections' own parameters."""
    layer, rotary = their_layer("Phi3")
    block, x = Block(K, WIDE, HEADS, 2, head_dim=32, norm_eps=1e-5), inputs(torch.device("cpu"))
    block.load_state_dict(layer.state_dict(), strict=True)
    embeddings = rotary(x, torch.arange(12)[None])
    exact = results(layer, x, position_embeddings=embeddings)
    got = results(block, x, position_embeddings=embeddings)
    for fused, parts in {"self_attn.qkv_proj": "qkv", "mlp.gate_up_proj": ("gate", "up")}.items():
        parent = fused.partition(".")[0]
        weights = [got.pop(f"{parent}.{part}_proj.weight") for part in parts]
        got[f"{fused}.weight"] = torch.cat(weights)
    assert_close(got, exact)


@pytest.mark.slow
def test_decoding_with_a_cache_of_transformers():
    import transformers

    layer, _ = their_layer("Llama")
    block, x = ours("Llama", layer).eval(), inputs(torch.device("cpu"))
    cache: Any = transformers.DynamicCache(config=layer.self_attn.config).layers[0]
    positions = torch.arange(12)
    with torch.no_grad():
        steps = [
            block(part, position_ids=ids, cache=cache)
            for part, ids in zip(x.split(5, 1), positions.split(5), strict=True)
        ]
        assert sqnr(block(x), torch.cat(steps, 1)) > 100


# ---- its parts ----


class Parts(torch.nn.Module):
    """The layer written out."""

    def __init__(self, block: Block) -> None:
        super().__init__()
        self.block = block

    def forward(self, x: Tensor, **options: Any) -> Tensor:
        block = self.block
        y = x + block.self_attn(block.input_layernorm(x), **options)
        return y + block.mlp(block.post_attention_layernorm(y))


def test_bits_are_those_of_its_parts(device):
    block, x = block_of(device), inputs(device)
    mask = torch.ones(12, 12, dtype=torch.bool, device=device).tril()
    for options in ({}, {"attn_mask": mask, "is_causal": False}):
        expected = results(Parts(block), x, **options)
        got = results(block, x, **options)
        assert_equal(got, {name.removeprefix("block."): t for name, t in expected.items()})


def test_parts_that_the_arguments_choose(device):
    recipe = Recipe.rowwise()
    options: dict[str, Any] = {"mlp_bias": True, "recipe": recipe, "device": device}
    gelu = functools.partial(GELUMLP, tanh_approximation=True)
    block = Block(
        K,
        WIDE,
        HEADS,
        norm=LayerNorm,
        mlp=gelu,
        save="recompute",
        bias=True,
        dropout=0.25,
        theta=None,
        **options,
    )
    assert isinstance(block.mlp, GELUMLP) and block.mlp.tanh_approximation
    assert block.mlp.save == "recompute" and block.mlp.up_proj.bias is not None
    assert type(block.input_layernorm) is type(block.post_attention_layernorm) is LayerNorm
    attention = block.self_attn
    assert attention.q_proj.bias is not None and attention.dropout == 0.25
    assert attention.theta is None and attention.is_causal
    assert {m.recipe for m in block.modules() if isinstance(m, Linear)} == {recipe}
    block = Block(K, WIDE, HEADS, device="meta", dtype=torch.bfloat16, mlp=GEGLU)
    assert isinstance(block.mlp, GEGLU) and block.self_attn.theta == 10000
    assert {(p.device.type, p.dtype) for p in block.parameters()} == {("meta", torch.bfloat16)}
    assert isinstance(Block(K, WIDE, HEADS).mlp, SwiGLU)


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_recomputed_attention_gives_the_same_bits(device, dropout):
    x = inputs(device)
    kept, again = (block_of(device, dropout=dropout, recompute_attention=r) for r in (False, True))
    torch.manual_seed(2)
    expected = results(kept, x)
    torch.manual_seed(2)
    assert_equal(results(again, x), expected)


def test_recomputed_attention_keeps_nothing_but_its_input(device):
    block = block_of(device, recompute_attention=True, dtype=torch.bfloat16)
    x = inputs(device).bfloat16().requires_grad_() * 1
    for rest in ("mlp", "post_attention_layernorm"):
        setattr(block, rest, torch.nn.Identity())
    with saved_tensors() as saved:
        block(x)
    storages = {t.untyped_storage().data_ptr() for t in saved if t.numel()}
    assert storages == {x.untyped_storage().data_ptr()}


def test_recomputation_stores_no_key_twice(device):
    stored: list[int] = []

    class Cache:
        def update(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
            stored.append(k.shape[-2])
            return k, v

    block = block_of(device, recompute_attention=True)
    positions = torch.arange(12, device=device)
    block(inputs(device), position_ids=positions, cache=Cache()).sum().backward()
    assert stored == [12]


@pytest.mark.slow
@pytest.mark.parametrize("recompute_attention", [False, True])
def test_compiled_in_one_graph(device, recompute_attention):
    block, x = block_of(device, recompute_attention=recompute_attention), inputs(device)
    exact = results(copy.deepcopy(block), x)
    torch._dynamo.reset()
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    got = results(compiled, x)
    assert_close({name.removeprefix("_orig_mod."): t for name, t in got.items()}, exact)


def test_copies_and_pickles(device):
    block, x = block_of(device, recompute_attention=True), inputs(device)
    for twin in (copy.deepcopy(block), pickle.loads(pickle.dumps(block))):
        assert_equal(results(twin, x), results(block, x))
        assert repr(twin) == repr(block)
    assert repr(block).startswith("Block(\n  recompute_attention=True\n  (self_attn): Attention(")


def test_autocast_and_empty_batches(device):
    block, x = block_of(device), inputs(device)
    with torch.autocast(device.type, torch.bfloat16):
        y = block(x)
    assert y.dtype == torch.float32 and sqnr(block(x), y) > 30
    assert block(inputs(device, 0, 5)).shape == (0, 5, K)


def test_errors(device):
    with pytest.raises(ValueError, match=r"SwiGLU: save must be one of"):
        Block(K, WIDE, HEADS, save="all")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"Attention: num_heads must be .*\(got 3\)"):
        Block(K, WIDE, 3)
    with pytest.raises(TypeError, match="unexpected keyword argument 'heads'"):
        Block(K, WIDE, HEADS, heads=3)
    with pytest.raises(RuntimeError, match=r"position_ids must have shape"):
        block_of(device)(inputs(device), position_ids=torch.arange(3, device=device))
    assert type(block_of(device).self_attn) is Attention
