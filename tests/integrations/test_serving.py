"""The plug-ins for vLLM and SGLang, against stand-ins with the signatures of vLLM 0.33.0 and SGLang
0.5.23: both pin another torch, so neither can be installed here."""

from __future__ import annotations

import enum
import functools
import importlib.util
import re
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch

from support.linear_testing import sqnr
from torchext import ops
from torchext.compat import deep_gemm
from torchext.integrations import sglang, vllm
from torchext.nn import FP8Linear

E4M3 = torch.float8_e4m3fn
SUBMODULES = ("testing", "utils", "utils.layout", "utils.math")
N, K = 320, 256


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Puts modules into sys.modules, and takes them out after the test."""
    for name in ("", *SUBMODULES):  # so that the plug-in's entries go, too
        key = f"deep_gemm.{name}".rstrip(".")
        monkeypatch.setitem(sys.modules, key, ModuleType(key))
        del sys.modules[key]

    def make(path: str, **attributes: Any) -> None:
        parts = path.split(".")
        for i in range(1, len(parts) + 1):
            name = ".".join(parts[:i])
            if name not in sys.modules:
                monkeypatch.setitem(sys.modules, name, ModuleType(name))
        for name, value in attributes.items():
            setattr(sys.modules[path], name, value)

    return make


@pytest.fixture(scope="module")
def layer() -> FP8Linear:
    torch.manual_seed(0)
    return FP8Linear(K, N, dtype=torch.bfloat16)


# ---- vLLM ----


class GroupShape(NamedTuple):
    row: int
    col: int


def quant_key(rows: int, columns: int, static: bool = False, dtype: Any = E4M3) -> Any:
    scale = SimpleNamespace(group_shape=GroupShape(rows, columns), static=static)
    return SimpleNamespace(dtype=dtype, scale=scale)


def config(**changes: Any) -> Any:
    """As FP8ScaledMMLinearLayerConfig."""
    fields = {
        "weight_quant_key": quant_key(128, 128),
        "activation_quant_key": quant_key(1, 128),
        "weight_shape": (N, K),
        "input_dtype": torch.bfloat16,
        "out_dtype": torch.bfloat16,
    }
    return SimpleNamespace(**{**fields, **changes})


class BlockKernel:
    """As Fp8BlockScaledMMLinearKernel: what it calls of a subclass, and with which arguments."""

    apply_input_quant = True

    def __init__(self, config: Any) -> None:
        self.config = config

    @classmethod
    def can_implement(cls, config: Any) -> tuple[bool, str | None]:
        if config.activation_quant_key.scale.static:
            return False, "is for dynamic scales"
        return True, None

    def _get_layer_params(self, layer: torch.nn.Module, **kwargs: Any) -> Any:
        name = "weight_scale_inv" if hasattr(layer, "weight_scale_inv") else "weight_scale"
        return SimpleNamespace(
            weight=layer.weight,
            block_scale=getattr(layer, name),
            block_scale_attr=name,
            input_scale=None,
        )

    def process_weights_after_loading(self, layer: Any) -> None:
        layer.normalized = True

    def apply_weights(
        self,
        layer: torch.nn.Module,
        x: torch.Tensor,
        bias: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        parameters = self._get_layer_params(layer)
        rows = x.view(-1, x.shape[-1])
        scale = rows.new_empty(1)
        if self.apply_input_quant:
            raise AssertionError("the plug-in's kernel takes inputs as they are")
        apply: Any = self.apply_block_scaled_mm  # type: ignore[attr-defined]
        y = apply(A=rows, B=parameters.weight, As=scale, Bs=parameters.block_scale)
        y = y if bias is None else y + bias
        return y.to(self.config.out_dtype).view(*x.shape[:-1], -1)


def replace_parameter(layer: torch.nn.Module, param_name: str, new_tensor: Any) -> None:
    setattr(layer, param_name, torch.nn.Parameter(new_tensor, requires_grad=False))


class PlatformEnum(enum.Enum):
    CUDA = enum.auto()
    CPU = enum.auto()
    ROCM = enum.auto()


class TheirKernel:
    pass


@pytest.fixture
def vllm_kernels(stand_in: Callable[..., None]) -> dict[PlatformEnum, list[type]]:
    kernels: dict[PlatformEnum, list[type]] = {p: [TheirKernel] for p in PlatformEnum}

    def register(kernel_class: type, platform: PlatformEnum, kernel_type: str = "mp") -> None:
        assert kernel_type == "fp8_block"
        kernels[platform].append(kernel_class)

    path = "vllm.model_executor.kernels.linear"
    stand_in("vllm", __version__="0.33.0")
    stand_in(path, register_linear_kernel=register, _POSSIBLE_FP8_BLOCK_KERNELS=kernels)
    stand_in(
        f"{path}.scaled_mm.BlockScaledMMLinearKernel", Fp8BlockScaledMMLinearKernel=BlockKernel
    )
    platform = SimpleNamespace(is_cuda=lambda: False)
    stand_in("vllm.platforms", PlatformEnum=PlatformEnum, current_platform=platform)
    stand_in("vllm.model_executor.utils", replace_parameter=replace_parameter)
    return kernels


def test_vllm_tries_the_kernel_first(vllm_kernels, monkeypatch):
    monkeypatch.delenv(vllm.VARIABLE, raising=False)
    vllm.register()
    assert all(kernels == [TheirKernel] for kernels in vllm_kernels.values())
    monkeypatch.setenv(vllm.VARIABLE, "1")
    vllm.register()
    vllm.register()  # vLLM may load plug-ins twice
    for platform in (PlatformEnum.CUDA, PlatformEnum.CPU):
        names = [kernel.__name__ for kernel in vllm_kernels[platform]]
        assert names == [vllm.KERNEL, "TheirKernel"]
    assert vllm_kernels[PlatformEnum.ROCM] == [TheirKernel]
    assert "deep_gemm" not in sys.modules


@pytest.mark.parametrize("scale_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["weight_scale_inv", "weight_scale"])
def test_vllm_layer(vllm_kernels, monkeypatch, layer, name, scale_dtype):
    monkeypatch.setenv(vllm.VARIABLE, "linear")
    vllm.register()
    kernel_class: Any = vllm_kernels[PlatformEnum.CPU][0]
    assert kernel_class.is_supported() == (True, None)
    assert kernel_class.can_implement(config()) == (True, None)
    kernel = kernel_class(config())
    theirs: Any = torch.nn.Module()
    theirs.weight = layer.weight
    setattr(theirs, name, torch.nn.Parameter(layer.weight_scale_inv.to(scale_dtype), False))
    kernel.process_weights_after_loading(theirs)
    assert theirs.normalized
    assert getattr(theirs, name).dtype == torch.float32
    x = torch.randn(2, 3, K, dtype=torch.bfloat16)
    y = kernel.apply_weights(theirs, x, layer.bias)
    assert y.shape == (2, 3, N)
    assert sqnr(layer(x).detach(), y.detach()) > (45 if scale_dtype == torch.float32 else 30)
    weight, scale = theirs.weight, getattr(theirs, name)
    expected = ops.fp8_gemm_nt(*ops.quantize_1x128(x[0]), weight, scale)
    assert torch.equal(kernel.apply_weights(theirs, x[0]), expected)
    data, data_scale = ops.quantize_1x128(x[0])
    quantized = kernel.apply_block_scaled_mm(data, weight, data_scale.contiguous(), scale)
    assert torch.equal(quantized, expected)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"weight_quant_key": quant_key(64, 128)}, r"weights with a scale for each \(128, 128\)"),
        ({"activation_quant_key": quant_key(1, 64)}, r"activations .* \(1, 128\) \(got \(1, 64\)"),
        ({"activation_quant_key": quant_key(1, 128, static=True)}, "dynamic"),
        ({"weight_quant_key": quant_key(128, 128, dtype=torch.int8)}, "e4m3 weights"),
        ({"out_dtype": torch.float64}, "BF16, FP16 or FP32"),
        ({"weight_shape": (N, 250)}, "multiple of 16 bytes"),
    ],
)
def test_vllm_is_told_what_the_kernel_cannot_do(changes, reason):
    platform = SimpleNamespace(is_cuda=lambda: False)
    kernel: Any = vllm.kernel_class(BlockKernel, platform, replace_parameter)
    possible, why = kernel.can_implement(config(**changes))
    assert not possible
    assert re.search(reason, why)


def test_vllm_is_told_where_the_kernel_cannot_run():
    for is_cuda, capability, reason in ((True, None, "cannot run"), (True, 60, "6.0")):
        platform = SimpleNamespace(is_cuda=lambda value=is_cuda: value)
        kernel: Any = vllm.kernel_class(BlockKernel, platform, replace_parameter)
        possible, why = kernel.is_supported(capability)
        if torch.cuda.is_available() and capability is None:
            continue
        assert not possible
        assert reason in why


def test_vllm_of_another_structure(vllm_kernels, monkeypatch):
    monkeypatch.setenv(vllm.VARIABLE, "1")
    del sys.modules["vllm.model_executor.kernels.linear"].register_linear_kernel
    with pytest.raises(ImportError, match=r"got vllm 0.33.0 without .*register_linear_kernel"):
        vllm.register()


# ---- SGLang ----


class HookType(enum.Enum):
    AROUND = "around"


@pytest.fixture
def sglang_linear(stand_in: Callable[..., None], monkeypatch: pytest.MonkeyPatch):
    """Registers, and returns SGLang's dispatcher as the hook leaves it."""
    hooks: dict[str, Callable[..., Any]] = {}

    class HookRegistry:
        @classmethod
        def register(
            cls, target: str, hook: Callable[..., Any], hook_type: Any, *, source: Any = None
        ) -> None:
            assert hook_type is HookType.AROUND
            hooks[target] = hook

    stand_in("sglang.srt.plugins.hook_registry", HookRegistry=HookRegistry, HookType=HookType)
    monkeypatch.setenv(sglang.VARIABLE, "1")
    sglang.register()

    def original(weight_block_size: Any = None, act_scale_ue8m0: bool = False) -> Any:
        return "theirs", weight_block_size, act_scale_ue8m0

    (hook,) = hooks.values()
    assert list(hooks) == [
        "sglang.srt.layers.quantization.fp8_utils.dispatch_w8a8_block_fp8_linear"
    ]
    return functools.partial(hook, original)


def test_sglang_layer(sglang_linear, layer):
    assert sglang_linear(weight_block_size=[32, 32]) == ("theirs", [32, 32], False)
    x = torch.randn(2, 3, K, dtype=torch.bfloat16)
    of_layer = {"weight": layer.weight, "block_size": [128, 128], "bias": layer.bias}
    scale = layer.weight_scale_inv
    for linear in (sglang_linear(), sglang_linear(weight_block_size=[128, 128])):
        y = linear(input=x, weight_scale=scale, input_scale=None, **of_layer)
        assert torch.equal(y, layer(x))
    assert sqnr(y, linear(input=x, weight_scale=scale.bfloat16(), **of_layer)) > 30
    data, x_scale = ops.quantize_1x128(x)
    again = linear(input=data, weight_scale=scale, input_scale=x_scale.contiguous(), **of_layer)
    assert torch.equal(again, y)
    pow2 = sglang_linear(weight_block_size=[128, 128], act_scale_ue8m0=True)
    data, x_scale = ops.quantize_1x128(x, pow2_scale=True)
    expected = ops.fp8_gemm_nt(data, x_scale, layer.weight, scale, bias=layer.bias)
    assert torch.equal(pow2(input=x, weight_scale=scale, **of_layer), expected)


def test_sglang_errors(sglang_linear, layer):
    linear, x = sglang_linear(), torch.randn(3, K, dtype=torch.bfloat16)
    of_layer = {"weight": layer.weight, "weight_scale": layer.weight_scale_inv}
    with pytest.raises(ValueError, match=r"must be \[128, 128\] \(got \[64, 128\]\)"):
        linear(input=x, block_size=[64, 128], **of_layer)
    packed = torch.zeros(3, 1, dtype=torch.int32)
    with pytest.raises(TypeError, match=r"must be torch.float32 .*got torch.int32"):
        linear(input=x.to(E4M3), input_scale=packed, block_size=[128, 128], **of_layer)


# ---- both ----


@pytest.mark.parametrize("plugin", [vllm, sglang])
def test_deep_gemm_stands_in(stand_in, monkeypatch, plugin):
    monkeypatch.setenv(plugin.VARIABLE, "deep_gemm")
    plugin.register()
    plugin.register()
    assert importlib.import_module("deep_gemm") is deep_gemm
    for name in SUBMODULES:
        module = importlib.import_module(f"deep_gemm.{name}")
        assert module is importlib.import_module(f"torchext.compat.deep_gemm.{name}")
    monkeypatch.setitem(sys.modules, "deep_gemm", ModuleType("deep_gemm"))
    with pytest.raises(RuntimeError, match="deep_gemm must not be imported before"):
        plugin.register()


# What the engines call of DeepGEMM, found in their sources, beside what MISSING lists.
CALLED = {
    vllm: (
        "cublaslt_gemm_nt", "fp8_gemm_nt", "fp8_m_grouped_gemm_nt_masked",
        "get_k_grouped_mn_major_tma_aligned_packed_ue8m0_tensor",
        "get_mk_alignment_for_contiguous_layout", "get_mn_major_tma_aligned_packed_ue8m0_tensor",
        "get_mn_major_tma_aligned_tensor", "get_num_sms",
        "get_theoretical_mk_alignment_for_contiguous_layout", "m_grouped_fp8_gemm_nt_contiguous",
        "m_grouped_fp8_gemm_nt_masked", "pack_ue8m0_to_int",
        "set_mk_alignment_for_contiguous_layout", "set_num_sms",
        "transform_sf_into_required_layout",
    ),
    sglang: (
        "fp8_gemm_nt", "fp8_m_grouped_gemm_nt_masked", "get_mk_alignment_for_contiguous_layout",
        "get_num_sms", "m_grouped_bf16_gemm_nt_contiguous", "m_grouped_fp8_gemm_nt_contiguous",
        "per_block_cast_to_fp8", "set_mk_alignment_for_contiguous_layout", "set_num_sms",
        "transform_sf_into_required_layout", "use_deterministic_algorithms",
    ),
}  # fmt: skip


@pytest.mark.parametrize("plugin", CALLED)
def test_what_the_stand_in_lacks_is_listed(plugin):
    for name in CALLED[plugin]:
        assert callable(getattr(deep_gemm, name))
    for name, feature in plugin.MISSING.items():
        assert not hasattr(deep_gemm, name)
        assert feature
    text = (Path(__file__).parents[2] / "docs" / "serving.md").read_text()
    for name in plugin.MISSING:
        assert f"`{name}`" in text


@pytest.mark.parametrize("plugin", [vllm, sglang])
def test_the_variable(monkeypatch, plugin):
    for off in ("", "0", "off"):
        monkeypatch.setenv(plugin.VARIABLE, off)
        plugin.register()  # looks for no engine, which is not installed
    monkeypatch.setenv(plugin.VARIABLE, "linear,deepgemm")
    with pytest.raises(ValueError, match=rf"{plugin.VARIABLE} must be .*got 'linear,deepgemm'"):
        plugin.register()
    monkeypatch.setenv(plugin.VARIABLE, "1")
    name = plugin.__name__.rpartition(".")[2]
    if importlib.util.find_spec(name) is None:
        with pytest.raises(ImportError, match=rf"install {name}=={plugin.TESTED}"):
            plugin.register()


def test_entry_points():
    tomllib = pytest.importorskip("tomllib")  # Python 3.11
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    points = project["entry-points"]
    assert points["vllm.general_plugins"]["torchext"] == "torchext.integrations.vllm:register"
    assert points["sglang.srt.plugins"]["torchext"] == "torchext.integrations.sglang:register"
