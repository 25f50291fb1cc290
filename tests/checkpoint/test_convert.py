"""torchext.checkpoint: every format that it reads, what it writes, bit for bit."""

from __future__ import annotations

import json

import pytest
import torch

from support.checkpoint_testing import (
    FINE_GRAINED,
    config_of,
    fp8,
    load,
    same,
    save,
    scales,
    spread,
)
from torchext import checkpoint, ops

N, K = 576, 192  # kv_a_proj_with_mqa of DeepSeek-V3 has 576 rows


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def wide_model(dtype=torch.bfloat16):
    def weight(*shape):
        return torch.randn(shape).to(dtype)

    return {
        "model.embed_tokens.weight": weight(300, K),
        "model.layers.0.self_attn.kv_a_proj_with_mqa.weight": weight(N, K),
        "model.layers.0.input_layernorm.weight": weight(K),
        "model.layers.0.mlp.gate.weight": weight(8, K),
        "model.layers.0.mlp.gate_proj.weight": weight(200, K),
        "model.layers.0.mlp.up_proj.weight": weight(200, K),
        "model.layers.0.mlp.e_score_correction_bias": torch.randn(8),
        "model.layers.1.mlp.down_proj.weight": weight(K, 200),
        "lm_head.weight": weight(300, K),
    }


QUANTIZED = [
    "model.layers.0.self_attn.kv_a_proj_with_mqa.weight",
    "model.layers.0.mlp.gate_proj.weight",
    "model.layers.0.mlp.up_proj.weight",
    "model.layers.1.mlp.down_proj.weight",
]


@pytest.mark.parametrize("pow2", [False, True])
def test_quantize(tmp_path, pow2):
    tensors = wide_model()
    source = save(tmp_path / "wide", tensors, shards=2, torch_dtype="bfloat16")
    result = checkpoint.quantize(
        source, tmp_path / "fp8", pow2_scale=pow2, max_shard_bytes=200_000,
        modules_to_not_convert=["mlp.up_proj"],
    )  # fmt: skip
    found, config = load(tmp_path / "fp8"), config_of(tmp_path / "fp8")
    assert set(result.quantized) == set(QUANTIZED) - {"model.layers.0.mlp.up_proj.weight"}
    for name, tensor in tensors.items():
        if name in result.quantized:
            data, scale = ops.quantize_128x128(tensor, pow2_scale=pow2)
            assert same(found.pop(name), data) and same(found.pop(f"{name}_scale_inv"), scale)
        else:
            assert same(found.pop(name), tensor)
    assert not found
    assert config["torch_dtype"] == "bfloat16" and config["model_type"] == "llama"
    assert config["quantization_config"] == FINE_GRAINED | {
        "modules_to_not_convert": [
            "lm_head", "model.embed_tokens", "model.layers.0.mlp.gate", "model.layers.0.mlp.up_proj"
        ],
        **({"scale_fmt": "ue8m0"} if pow2 else {}),
    }  # fmt: skip
    assert result.files > 1 and (tmp_path / "fp8/model.safetensors.index.json").exists()
    assert result.copied == ("tokenizer.json",) and (tmp_path / "fp8/tokenizer.json").exists()
    assert result.patterns == {"mlp.up_proj": ("model.layers.0.mlp.up_proj",)}
    inspected = checkpoint.inspect(tmp_path / "fp8")
    assert inspected.format == "fine-grained FP8" and not inspected.problems
    assert checkpoint.verify(tmp_path / "fp8", original=source, min_sqnr=29).ok
    checkpoint.dequantize(tmp_path / "fp8", tmp_path / "back")
    back = load(tmp_path / "back")
    assert back.keys() == tensors.keys() and "quantization_config" not in config_of(
        tmp_path / "back"
    )
    for name in result.quantized:
        data, scale = ops.quantize_128x128(tensors[name], pow2_scale=pow2)
        assert same(back[name], ops.dequantize(data, scale, out_dtype=torch.bfloat16))


def test_bands_of_a_large_weight(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint.steps, "BAND", 128 * K)
    monkeypatch.setattr(checkpoint.files, "_CHUNK", 1 << 15)
    tensors = {"up.weight": torch.randn(1000, K), "b.up.bias": torch.randn(100_000)}
    source = save(tmp_path / "wide", tensors)
    checkpoint.quantize(source, tmp_path / "fp8")
    found = load(tmp_path / "fp8")
    data, scale = ops.quantize_128x128(tensors["up.weight"])
    assert same(found["up.weight"], data) and same(found["up.weight_scale_inv"], scale)
    assert same(found["b.up.bias"], tensors["b.up.bias"])
    assert checkpoint.verify(tmp_path / "fp8", original=source, min_sqnr=29).ok


@pytest.mark.parametrize("experts", ["keep", "one_by_one"])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_quantize_state_dict_equals_the_disk(tmp_path, experts, dtype):
    tensors = wide_model(torch.float32) | {
        "model.layers.1.mlp.experts.gate_up_proj": torch.randn(2, 2 * 192, K),
        "model.layers.1.mlp.experts.down_proj": torch.randn(2, K, 192),
    }
    options = {"experts": experts, "wide_dtype": dtype, "modules_to_not_convert": ["up_proj"]}
    checkpoint.quantize(save(tmp_path / "wide", tensors), tmp_path / "fp8", **options)
    streamed, stored = (
        dict(checkpoint.quantize_state_dict(tensors, **options)),
        load(tmp_path / "fp8"),
    )
    assert streamed.keys() == stored.keys()
    assert all(same(streamed[name], stored[name]) for name in stored)
    if experts == "one_by_one":
        gate_up = tensors["model.layers.1.mlp.experts.gate_up_proj"].to(dtype or torch.float32)
        data, scale = ops.quantize_128x128(gate_up[1, 192:])
        name = "model.layers.1.mlp.experts.1.up_proj.weight"
        assert same(stored[name], data) and same(stored[f"{name}_scale_inv"], scale)
    assert checkpoint.verify(tmp_path / "fp8", original=tmp_path / "wide", min_sqnr=29).ok


# ---- formats ----

COMPRESSED = {"quant_method": "compressed-tensors", "format": "float-quantized"}


def compressed(strategy, **weights):
    weights = {"num_bits": 8, "type": "float", "strategy": strategy, **weights}
    return COMPRESSED | {
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
        "ignore": ["lm_head", "re:.*mlp[.]gate$"],
    }


def blocks(rows, columns):
    return -(-N // rows), -(-K // columns)


FORMATS = {
    # name: (suffix of the scale's name, scale, block of spread, quantization_config, lossless)
    "fine-grained": ("weight_scale_inv", scales(*blocks(128, 128)), (128, 128), FINE_GRAINED, True),
    "bf16 scales": (
        "weight_scale_inv", scales(*blocks(128, 128)).bfloat16(), (128, 128), FINE_GRAINED, True
    ),
    "ue8m0": (
        "weight_scale_inv", scales(*blocks(128, 128)).to(torch.float8_e8m0fnu), (128, 128),
        FINE_GRAINED | {"scale_fmt": "ue8m0"}, True,
    ),
    "ue8m0 in bytes": (
        "scale", scales(*blocks(128, 128)).to(torch.float8_e8m0fnu).view(torch.uint8), (128, 128),
        FINE_GRAINED, True,
    ),
    "96x64": (
        "weight_scale_inv", scales(*blocks(96, 64)), (96, 64),
        FINE_GRAINED | {"weight_block_size": [96, 64]}, False,
    ),
    "256x128": (
        "weight_scale_inv", scales(*blocks(256, 128)), (256, 128),
        FINE_GRAINED | {"weight_block_size": [256, 128]}, True,
    ),
    "no config": ("weight_scale_inv", scales(*blocks(128, 128)), (128, 128), None, True),
    "mx": (
        "weight_scale_inv", scales(*blocks(1, 32)).to(torch.float8_e8m0fnu), (1, 32), None, False
    ),
    "tensor, 0-d": (
        "weight_scale_inv", scales(), (N, K), FINE_GRAINED | {"weight_block_size": None}, True
    ),
    "tensor, (1,)": ("qscale_weight", scales(1), (N, K), None, True),
    "row": ("weight_scale", scales(N, 1), (1, K), compressed("channel"), False),
    "row, 1-d": ("weight_scale", scales(N), (1, K), None, False),
    "compressed-tensors FP8_BLOCK": (
        "weight_scale", scales(*blocks(128, 128)).bfloat16(), (128, 128),
        compressed("block", block_structure=[128, 128]), True,
    ),
}  # fmt: skip


@pytest.mark.parametrize("format", FORMATS)
def test_formats(tmp_path, format):
    suffix, scale, block, quantization, lossless = FORMATS[format]
    data = fp8(N, K)
    norm, gate, head = torch.randn(K), torch.randn(8, K).bfloat16(), torch.randn(300, K).bfloat16()
    source = save(
        tmp_path / "fp8",
        {
            "a.kv.weight": data, f"a.kv.{suffix}": scale, "a.norm.weight": norm,
            "a.mlp.gate.weight": gate, "lm_head.weight": head, "a.kv.input_scale": scales(),
        },
        quantization,
        shards=2,
        text_config={"dtype": "float32"},
    )  # fmt: skip
    factor = scale.view(torch.float8_e8m0fnu) if scale.dtype == torch.uint8 else scale
    factor = factor.float().reshape(-1, 1) if scale.dim() < 2 else factor
    expected = data.float() * spread(factor, block, N, K)
    checked = checkpoint.verify(source)
    assert checked.ok and checked.weights == 1
    inspected = checkpoint.inspect(source)
    assert inspected.fp8_weights == 1 and inspected.activation_scales == 1
    assert inspected.format.split(",")[0].split()[0].lower() in (
        "fine-grained", "per-tensor", "row-wise", "compressed-tensors"
    )  # fmt: skip
    result = checkpoint.dequantize(source, tmp_path / "wide")
    wide = load(tmp_path / "wide")
    assert same(wide["a.kv.weight"], expected.bfloat16()) and same(wide["a.norm.weight"], norm)
    assert wide.keys() == {"a.kv.weight", "a.norm.weight", "a.mlp.gate.weight", "lm_head.weight"}
    assert result.scales == 1 and result.dropped == ("a.kv.input_scale",)
    assert config_of(tmp_path / "wide") == {
        "model_type": "llama", "text_config": {"dtype": "bfloat16"}
    }  # fmt: skip

    if not lossless:
        with pytest.raises(checkpoint.CheckpointError, match=r"a\.kv\.weight in .*requantize=True"):
            checkpoint.convert(source, tmp_path / "again", to="fp8")
        assert not (tmp_path / "again.partial").exists()
    checkpoint.convert(source, tmp_path / "again", to="fp8", requantize=not lossless)
    again = load(tmp_path / "again")
    written = again["a.kv.weight_scale_inv"]
    assert written.dtype == torch.float32 and written.shape == blocks(128, 128)
    if lossless:
        assert same(again["a.kv.weight"], data)
        assert torch.equal(data.float() * spread(written, (128, 128), N, K), expected)
    else:
        assert all(map(same, ops.quantize_128x128(expected), (again["a.kv.weight"], written)))
    config = config_of(tmp_path / "again")["quantization_config"]
    assert config["modules_to_not_convert"] == ["a.mlp.gate", "lm_head"]
    assert config.get("scale_fmt") == ("ue8m0" if format == "ue8m0" else None)
    assert checkpoint.verify(tmp_path / "again").ok


# ---- experts in 3-D, of widths that blocks do not divide ----


def experts_checkpoint(folder, width, scale_rows):
    names = "m.experts.gate_up_proj", "m.experts.gate_up_proj_scale_inv"
    tensors = dict(zip(names, (fp8(2, 2 * width, K), scales(2, scale_rows, 2)), strict=True))
    save(folder, tensors, FINE_GRAINED)
    return tensors.values()


def reference(data, scale, width, apart):
    block = (128, 128)
    if not apart:
        return data.float() * spread(scale, block, 2 * width, K)
    half = scale.shape[1] // 2
    factors = [spread(s, block, width, K) for s in (scale[:, :half], scale[:, half:])]
    return data.float() * torch.cat(factors, 1)


@pytest.mark.parametrize(
    "width, scale_rows, gate_up, apart",
    [
        (192, 3, None, False),
        (192, 4, None, True),
        (64, 1, None, False),
        (64, 2, None, True),
        (256, 4, None, False),
        (96, 2, "fused", False),
        (96, 2, "apart", True),
    ],
)
def test_experts(tmp_path, width, scale_rows, gate_up, apart):
    data, scale = experts_checkpoint(tmp_path / "fp8", width, scale_rows)
    expected = reference(data, scale, width, apart)
    checkpoint.dequantize(tmp_path / "fp8", tmp_path / "wide", gate_up=gate_up)
    assert same(load(tmp_path / "wide")["m.experts.gate_up_proj"], expected.bfloat16())
    # gate keeps its bytes; up does where its first row begins a block
    convert = {"to": "fp8", "gate_up": gate_up, "experts": "one_by_one"}
    if apart or width % 128 == 0:
        result = checkpoint.convert(tmp_path / "fp8", tmp_path / "one", **convert)
        assert result.relabeled
    else:
        with pytest.raises(checkpoint.CheckpointError, match="requantize=True"):
            checkpoint.convert(tmp_path / "fp8", tmp_path / "one", **convert)
        checkpoint.convert(tmp_path / "fp8", tmp_path / "one", requantize=True, **convert)
    one = load(tmp_path / "one")
    assert len(one) == 8 and checkpoint.verify(tmp_path / "one").ok
    for expert in range(2):
        for name, rows in (("gate_proj", slice(0, width)), ("up_proj", slice(width, None))):
            weight = one[f"m.experts.{expert}.{name}.weight"]
            factor = one[f"m.experts.{expert}.{name}.weight_scale_inv"]
            back = weight.float() * spread(factor, (128, 128), width, K)
            wanted = expected[expert, rows]
            if apart or width % 128 == 0:
                assert same(weight, data[expert, rows]) and torch.equal(back, wanted)
            else:
                assert all(map(same, ops.quantize_128x128(wanted), (weight, factor)))
    if gate_up is None:
        checkpoint.convert(tmp_path / "fp8", tmp_path / "kept", to="fp8")
        kept = load(tmp_path / "kept")
        assert same(kept["m.experts.gate_up_proj"], data)
        assert same(kept["m.experts.gate_up_proj_scale_inv"], scale)


def test_an_ambiguous_width_is_refused(tmp_path):
    experts_checkpoint(tmp_path / "fp8", 96, 2)
    with pytest.raises(checkpoint.CheckpointError, match=r'gate_up_proj in .*pass gate_up="apart"'):
        checkpoint.dequantize(tmp_path / "fp8", tmp_path / "wide")
    save(tmp_path / "wide", {"m.experts.gate_up_proj": torch.randn(2, 192, K)})
    with pytest.raises(checkpoint.CheckpointError, match=r'gate_up_proj .*"one_by_one"'):
        checkpoint.quantize(tmp_path / "wide", tmp_path / "again")
    checkpoint.quantize(tmp_path / "wide", tmp_path / "again", experts="one_by_one")


def test_per_tensor_scales_of_experts(tmp_path):
    data, scale = fp8(2, 128, K), scales(2)
    tensors = {"m.experts.down_proj": data, "m.experts.down_proj_scale": scale}
    save(tmp_path / "fp8", tensors)
    checkpoint.dequantize(tmp_path / "fp8", tmp_path / "wide", experts="one_by_one")
    wide = load(tmp_path / "wide")["m.experts.1.down_proj.weight"]
    assert same(wide, (data[1].float() * scale[1]).bfloat16())


def test_experts_that_cannot_be_split(tmp_path):
    tensors = {"m.experts.gate_up_proj": torch.randn(2, K, 512)}  # transposed
    tensors["m.experts.down_proj"] = torch.randn(2, 256, K)
    wide = save(tmp_path / "wide", tensors)
    with pytest.raises(checkpoint.CheckpointError, match=r"gate_up_proj in .*transposed"):
        checkpoint.quantize(wide, tmp_path / "fp8", experts="one_by_one")
    tensors = {"m.experts.gate_up_proj": torch.randn(2, 512, K)}
    tensors["m.experts.gate_up_proj_bias"] = torch.randn(2, 512)
    wide = save(tmp_path / "biased", tensors)
    with pytest.raises(checkpoint.CheckpointError, match=r"gate_up_proj in .*no bias"):
        checkpoint.quantize(wide, tmp_path / "fp8", experts="one_by_one")
    checkpoint.quantize(wide, tmp_path / "fp8")


def test_other_files(tmp_path):
    """What other files say of the source's quantization must not reach the result."""
    tensors = {"a.up.weight": fp8(128, K), "a.up.qscale_weight": scales()}
    source = save(tmp_path / "fp8", tensors)
    (source / "params.json").write_text(
        '{"dim": 192, "quantization": {"qformat_weight": "fp8_e4m3"}}'
    )
    (source / "hf_quant_config.json").write_text("{}")
    (source / "pytorch_model.bin").write_bytes(b"weights")
    (source / ".cache").mkdir()
    (source / "assets").mkdir()
    (source / "assets/chat.jinja").write_text("{{ x }}")
    # within the source, which must not be copied into itself
    result = checkpoint.dequantize(source, source / "wide")
    assert result.copied == ("params.json", "tokenizer.json", "assets/chat.jinja")
    assert json.loads((source / "wide/params.json").read_text()) == {"dim": 192}
    assert (source / "wide/assets/chat.jinja").read_text() == "{{ x }}"


def test_one_file_is_a_checkpoint(tmp_path):
    save(tmp_path / "wide", {"up.weight": torch.randn(128, K)})
    checkpoint.quantize(tmp_path / "wide/model.safetensors", tmp_path / "fp8")
    assert sorted(p.name for p in (tmp_path / "fp8").iterdir()) == ["model.safetensors"]


def test_files_are_aligned(tmp_path):
    tensors = {
        "a.up.weight": torch.randn(128, K).bfloat16(),
        "a.norm.weight": torch.randn(3).half(),
    }
    checkpoint.quantize(save(tmp_path / "wide", tensors), tmp_path / "fp8")
    raw = (tmp_path / "fp8/model.safetensors").read_bytes()
    assert (8 + int.from_bytes(raw[:8], "little")) % 64 == 0


# ---- experts one by one, joined into 3-D ----


def one_by_one(folder, width, kind, experts=3):
    """Experts one by one in BF16, or in fine-grained FP8; each matrix's values in FP32."""
    tensors, values = {"m.norm.weight": torch.randn(K)}, {}
    shapes = {"gate_proj": (width, K), "up_proj": (width, K), "down_proj": (K, width)}
    for expert in reversed(range(experts)):  # not in order, and over several files
        for part, (rows, columns) in shapes.items():
            name = f"m.experts.{expert}.{part}.weight"
            if kind == "bf16":
                tensors[name] = torch.randn(rows, columns).bfloat16()
                values[expert, part] = tensors[name].float()
                continue
            data, scale = fp8(rows, columns), scales(-(-rows // 128), -(-columns // 128))
            tensors[name], tensors[f"{name}_scale_inv"] = data, scale
            values[expert, part] = data.float() * spread(scale, (128, 128), rows, columns)
    save(folder, tensors, FINE_GRAINED if kind == "fp8" else None, shards=3)
    return tensors, values


@pytest.mark.parametrize("width", [256, 192, 64, 224])  # 224: the scales' shape tells nothing
def test_experts_are_stacked(tmp_path, width):
    tensors, values = one_by_one(tmp_path / "fp8", width, "fp8")
    stacked = {
        "m.experts.gate_up_proj": [
            torch.cat([values[e, "gate_proj"], values[e, "up_proj"]]) for e in range(3)
        ],
        "m.experts.down_proj": [values[e, "down_proj"] for e in range(3)],
    }
    result = checkpoint.convert(
        tmp_path / "fp8", tmp_path / "3d", to="fp8", experts="stacked", max_shard_bytes=100_000
    )
    assert len(result.relabeled) == 9 and result.scales == 9
    found = load(tmp_path / "3d")
    assert found.keys() == {"m.norm.weight", *stacked, *(f"{n}_scale_inv" for n in stacked)}
    for expert in range(3):
        halves = found["m.experts.gate_up_proj"][expert].split(width)
        for part, half in zip(("gate_proj", "up_proj"), halves, strict=True):
            assert same(half, tensors[f"m.experts.{expert}.{part}.weight"])
    layout = str(checkpoint.inspect(tmp_path / "3d").experts)
    assert layout.endswith("with blocks of their own") == (width % 128 != 0)
    assert checkpoint.verify(tmp_path / "3d").ok
    checkpoint.dequantize(tmp_path / "3d", tmp_path / "wide")
    wide = load(tmp_path / "wide")
    for name, matrices in stacked.items():
        assert same(wide[name], torch.stack(matrices).bfloat16())
    # there and back, bit for bit
    checkpoint.convert(tmp_path / "3d", tmp_path / "back", to="fp8", experts="one_by_one")
    back = load(tmp_path / "back")
    assert back.keys() == tensors.keys()
    assert all(same(back[name], tensor) for name, tensor in tensors.items())
    config = config_of(tmp_path / "back")["quantization_config"]
    assert "gate_up_blocks" not in config


@pytest.mark.parametrize("width", [128, 192])
def test_wide_experts_are_stacked_and_quantized(tmp_path, width):
    tensors, _ = one_by_one(tmp_path / "wide", width, "bf16")
    result = checkpoint.quantize(tmp_path / "wide", tmp_path / "fp8", experts="stacked")
    assert len(result.quantized) == 9
    found = load(tmp_path / "fp8")
    pairs = [
        ops.quantize_128x128(tensors[f"m.experts.1.{part}.weight"])
        for part in ("gate_proj", "up_proj")
    ]
    data, scale = (
        torch.cat([each.float() for each in parts]) for parts in zip(*pairs, strict=True)
    )
    assert torch.equal(found["m.experts.gate_up_proj"][1].float(), data)
    assert same(found["m.experts.gate_up_proj_scale_inv"][1], scale)
    assert checkpoint.verify(tmp_path / "fp8", original=tmp_path / "wide", min_sqnr=29).ok
    checkpoint.convert(tmp_path / "wide", tmp_path / "3d", to="bf16", experts="stacked")
    wide = load(tmp_path / "3d")
    assert wide.keys() == {"m.norm.weight", "m.experts.gate_up_proj", "m.experts.down_proj"}
    assert same(wide["m.experts.down_proj"][2], tensors["m.experts.2.down_proj.weight"])
    kept = checkpoint.quantize(
        tmp_path / "wide", tmp_path / "kept", experts="stacked",
        modules_to_not_convert=["gate_proj", "up_proj"],
    )  # fmt: skip
    assert len(kept.quantized) == 3
    config = config_of(tmp_path / "kept")["quantization_config"]
    assert config["modules_to_not_convert"] == ["m.experts.gate_up_proj"]


def test_experts_fused_or_under_other_names(tmp_path):
    names = {"gate_up_proj": (512, K), "w2": (K, 256)}
    tensors = {
        f"m.experts.{e}.{name}.weight": torch.randn(shape)
        for e in range(2)
        for name, shape in names.items()
    }
    checkpoint.quantize(save(tmp_path / "wide", tensors), tmp_path / "fp8", experts="stacked")
    found = load(tmp_path / "fp8")
    for name in names:
        stack = torch.stack([tensors[f"m.experts.{e}.{name}.weight"] for e in range(2)])
        data, scale = ops.quantize_128x128(stack)
        assert same(found[f"m.experts.{name}"], data)
        assert same(found[f"m.experts.{name}_scale_inv"], scale)


CANNOT_STACK = {
    "no experts": (
        lambda t: t.clear() or t.update({"a.weight": torch.randn(128, K)}), "got no name"
    ),
    "missing": (lambda t: t.pop("m.experts.1.up_proj.weight"), r"got none of expert 1\)"),
    "another shape": (
        lambda t: t.update({"m.experts.2.down_proj.weight": torch.randn(K, 256).bfloat16()}),
        r"experts.2.down_proj.weight in .* must become what m.experts.0.down_proj.weight",
    ),
    "a bias": (
        lambda t: t.update({"m.experts.0.up_proj.bias": torch.randn(128)}), "must be a matrix"
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CANNOT_STACK)
def test_experts_that_cannot_be_stacked(tmp_path, case):
    tensors, _ = one_by_one(tmp_path / "good", 128, "bf16")
    change, message = CANNOT_STACK[case]
    change(tensors)
    save(tmp_path / "wide", tensors)
    with pytest.raises(checkpoint.CheckpointError, match=message):
        checkpoint.quantize(tmp_path / "wide", tmp_path / "fp8", experts="stacked")
    assert not (tmp_path / "fp8.partial").exists()
    with pytest.raises(ValueError, match="cannot be joined"):
        checkpoint.quantize_state_dict(tensors, experts="stacked")


def test_part_of_the_experts_cannot_stay_wide(tmp_path):
    one_by_one(tmp_path / "wide", 128, "bf16")
    with pytest.raises(checkpoint.CheckpointError, match="quantize all experts or none"):
        checkpoint.quantize(
            tmp_path / "wide", tmp_path / "fp8", experts="stacked",
            modules_to_not_convert=["experts.1"],
        )  # fmt: skip
