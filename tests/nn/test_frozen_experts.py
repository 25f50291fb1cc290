"""Experts whose weights are frozen in FP8 by quantize_for_inference: torchext.nn.MoE, and experts
that are recognized, whose parameters are transposed or three, or whose rows stand by expert.

tests/test_inference.py has more of experts that are called with choices.
"""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor

from support.linear_testing import gradient, normal, sqnr
from torchext import Recipe, advise, convert_to_fp8_training, dequantize_weights, ops, unconvert
from torchext import quantize_for_inference as quantize
from torchext.moe import Dispatcher
from torchext.nn import FP8Linear, MoE
from torchext.nn.frozen_experts import FrozenExperts, FrozenMoE

from ..test_experts import Equal, Experts, Sorted, SortedInBF16, Transposed

pytestmark = pytest.mark.large  # what is tested does not depend on the kernels
MODES = ["w8a8", "w8a16"]
CPU = torch.device("cpu")
E4M3 = torch.float8_e4m3fn


def moe_of(dtype: Any = torch.float32, **options: Any) -> Any:
    torch.manual_seed(0)
    return MoE(256, 136, 4, dtype=dtype, **options)


def inputs_of(dtype: Any = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    """Some choices are no expert, and leading dimensions are two."""
    ids = torch.randint(-1, 4, (3, 9, 2))
    return normal(3, 9, 256, device=CPU, dtype=dtype), ids, torch.rand(3, 9, 2)


def with_gradients(layer: Any, x: Tensor, ids: Tensor, weights: Tensor) -> list[Tensor]:
    x, weights = x.detach().requires_grad_(), weights.detach().requires_grad_()
    y = layer(x, ids, weights)
    y.square().sum().backward()
    return [y.detach(), gradient(x), gradient(weights)]


@pytest.mark.parametrize("recipe", [Recipe(), Recipe(pow2_scale=True)], ids=str)
def test_w8a8_has_the_bits_of_training(recipe):
    layer, inputs = moe_of(torch.bfloat16, recipe=recipe), inputs_of(torch.bfloat16)
    expected = with_gradients(layer, *inputs)
    result = quantize(layer, pow2_scale=recipe.pow2_scale)
    assert isinstance(layer, FrozenMoE) and isinstance(layer, MoE)
    assert all(map(torch.equal, with_gradients(layer, *inputs), expected))
    with torch.inference_mode():
        assert torch.equal(layer(*inputs), expected[0])
    assert result.converted == {"": "w8a8"} and result.fp8_share == 1
    assert result.bytes_after < 0.51 * result.bytes_before


@pytest.mark.parametrize("mode", MODES)
def test_against_the_dequantized_layer(mode):
    layer, inputs = moe_of(shared_intermediate_size=128), inputs_of()
    quantize(layer, mode)
    assert f"mode='{mode}'" in repr(layer) and repr(layer).startswith("MoE(")
    wide = copy.deepcopy(layer)
    names = dequantize_weights(wide)
    assert names == ("", *(f"shared_experts.{name}_proj" for name in ("gate", "up", "down")))
    assert type(wide) is MoE and not hasattr(wide, "mode")
    for got, expected in zip(
        with_gradients(layer, *inputs), with_gradients(wide, *inputs), strict=True
    ):
        assert sqnr(expected, got) > 20


def test_w8a16_rounds_no_input():
    layer, (x, ids, weights) = moe_of(), inputs_of()
    quantize(layer, "w8a16")
    wide = copy.deepcopy(layer).dequantize_()
    expected = torch.zeros_like(x, dtype=torch.float64)
    for expert, (up, down) in enumerate(zip(wide.gate_up_proj, wide.down_proj, strict=True)):
        gate, rest = (x.double() @ up.double().T).chunk(2, dim=-1)
        y = (torch.nn.functional.silu(gate) * rest) @ down.double().T
        expected += y * ((ids == expert) * weights).sum(-1, keepdim=True)
    assert sqnr(expected, layer(x, ids, weights)) > 100  # FP32


@pytest.mark.parametrize("mode", MODES)
def test_shared_experts_are_added(mode):
    layer, inputs = moe_of(shared=torch.nn.Identity()), inputs_of()
    alone = moe_of()
    for each in (layer, alone):
        quantize(each, mode)
    assert torch.equal(layer(*inputs), alone(*inputs) + inputs[0])
    layer = moe_of(shared_intermediate_size=128)
    result = quantize(layer, mode)
    assert set(map(type, layer.shared_experts.children())) == {FP8Linear}
    assert len(result.converted) == 4 and layer(*inputs).isfinite().all()


def test_state_dict_is_a_checkpoint():
    layer, inputs = moe_of(torch.bfloat16), inputs_of(torch.bfloat16)
    wide = layer.state_dict()
    quantize(layer)
    state = layer.state_dict()
    for name, parameter in wide.items():
        data, scale = ops.quantize_128x128(parameter)
        assert state[name].dtype == E4M3
        assert torch.equal(state[name].float(), data.float())
        assert torch.equal(state[f"{name}_scale_inv"], scale)
    assert len(state) == 2 * len(wide)
    other: Any = MoE(256, 136, 4, dtype=torch.bfloat16)
    quantize(other)
    other.reset_parameters()
    assert other(*inputs).isfinite().all() and other.down_proj.float().std() > 100
    other.load_state_dict(state)
    assert torch.equal(other(*inputs), layer(*inputs))
    with pytest.raises(RuntimeError, match=r"gate_up_proj must be torch.float8_e4m3fn"):
        other.load_state_dict(wide)


@pytest.mark.parametrize("mode", MODES)
def test_copied_moved_pickled(mode):
    layer, inputs = moe_of(), inputs_of()
    quantize(layer, mode)
    y = layer(*inputs)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), layer.half().train()):
        assert other.gate_up_proj.dtype == E4M3 and torch.equal(other(*inputs), y)
    layer.down_proj.requires_grad_()
    with pytest.raises(RuntimeError, match="down_proj must not require a gradient"):
        layer(*inputs)


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
def test_compiled_in_one_graph(mode):
    layer, inputs = moe_of(torch.bfloat16), inputs_of(torch.bfloat16)
    quantize(layer, mode)
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    expected = with_gradients(layer, *inputs)
    assert all(map(torch.equal, with_gradients(compiled, *inputs), expected))
    if mode == "w8a8":
        exported = torch.export.export(layer.eval(), inputs).module()
        assert torch.equal(exported(*inputs), expected[0])


def test_behind_a_dispatcher():
    """w8a8 only: rows arrive in FP8."""
    layer = moe_of(torch.bfloat16, dispatcher=Dispatcher(4))
    inputs = inputs_of(torch.bfloat16)
    expected = with_gradients(layer, *inputs)
    with pytest.warns(UserWarning, match=r"its dispatcher sends rows in FP8.*use mode w8a8"):
        assert not quantize(layer, "w8a16").converted
    quantize(layer)
    assert all(map(torch.equal, with_gradients(layer, *inputs), expected))


def test_reports_and_filters():
    model = torch.nn.ModuleDict(
        {"experts": moe_of(), "small": MoE(256, 64, 4), "linear": torch.nn.Linear(256, 128)}
    )
    convert_to_fp8_training(model)
    result = quantize(model, skip=["linear"])
    assert result.converted == {"experts": "w8a8"}
    assert result.skipped["linear"] == "skipped by 'linear'"
    assert "fewer than 128" in result.skipped["small"] and type(model["small"]) is MoE
    assert {p.name: p.reason for p in result.wide}["small.down_proj"] == result.skipped["small"]
    assert type(model["linear"]) is torch.nn.Linear
    again = quantize(model)
    assert again.skipped["experts"] == "holds FP8 weights already"
    training = convert_to_fp8_training(model)
    assert "call torchext.dequantize_weights first" in training.skipped["experts"]
    assert unconvert(model) == () and isinstance(model["experts"], FrozenMoE)
    advised = {layer.name: layer.shapes for layer in advise(model, tokens=1, device="cpu").layers}
    assert advised["experts"] == ((4, 272, 256), (4, 256, 136))


# ---- experts that are recognized ----

KINDS: dict[str, Any] = {
    "transposed": Transposed, "equal": Equal, "sorted": Sorted, "sorted in BF16": SortedInBF16
}  # fmt: skip
every_kind = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)


def experts_of(kind: Any) -> tuple[Any, list[Tensor]]:
    """The module, and arguments of its forward. One expert has no rows if that is possible."""
    torch.manual_seed(0)
    x = torch.randn(12, 128)
    if kind is Equal:
        return kind(), [x]
    if kind is Transposed:
        return kind(), [x, torch.arange(24).view(12, 2) % 3, torch.rand(12, 2)]
    return kind(), [x, torch.tensor([5, 0, 4, 3])]


def outputs(module: Any, inputs: list[Tensor]) -> list[Tensor]:
    """The result and the gradients of x, and of the choices' weights."""
    given = [t.detach().requires_grad_(t.is_floating_point()) for t in inputs]
    y = module(*given)
    y.square().sum().backward()
    return [y.detach(), *(gradient(t) for t in given if t.requires_grad)]


@every_kind
@pytest.mark.parametrize(("mode", "least"), [("w8a8", 20), ("w8a16", 100)])
def test_recognized_experts(kind, mode, least):
    experts, inputs = experts_of(kind)
    shapes = {name: p.shape for name, p in experts.named_parameters()}
    result = quantize(experts, mode)
    assert result.converted == {"": mode} and isinstance(experts, FrozenExperts)
    assert result.fp8_share == 1 and result.bytes_after < 0.26 * result.bytes_before
    assert {n: p.shape for n, p in experts.named_parameters() if n in shapes} == shapes
    wide = copy.deepcopy(experts).dequantize_()
    assert type(wide) is kind
    if kind is SortedInBF16:
        least = 20
    expected = outputs(wide, inputs)
    found = outputs(experts, inputs)
    for got, true in zip(found, expected, strict=True):
        assert sqnr(true, got) > least
    for name, (data, _) in zip(experts.frozen_names(), experts._pairs(), strict=True):
        assert data.data_ptr() == experts.get_parameter(name).data_ptr()  # no copy
    for other in (copy.deepcopy(experts), pickle.loads(pickle.dumps(experts)), experts.half()):
        assert torch.equal(other(*inputs), found[0])
        strides = [p.stride() for p in other.parameters()]
        assert strides == [p.stride() for p in experts.parameters()]
    with torch.inference_mode():
        assert torch.equal(experts(*inputs), found[0])


@every_kind
def test_their_state_dict_is_a_checkpoint(kind):
    experts, inputs = experts_of(kind)
    wide = experts.state_dict()
    quantize(experts)
    state = experts.state_dict()
    for name, parameter in wide.items():
        data, scale = ops.quantize_128x128(parameter)
        assert torch.equal(state[name].float(), data.float())
        assert torch.equal(state[f"{name}_scale_inv"], scale)
    y = experts(*inputs)
    for assign in (False, True):  # as tensors come from a file, which has no strides
        other = kind()
        quantize(other)
        other.load_state_dict({n: t.clone().contiguous() for n, t in state.items()}, assign=assign)
        assert torch.equal(other(*inputs), y)


def test_transposed_experts_have_the_bits_of_others():
    plain, inputs = Experts(), experts_of(Transposed)[1]
    transposed: Any = Transposed()
    transposed.load_state_dict({n: t.mT for n, t in plain.state_dict().items()})
    for module in (plain, transposed):
        quantize(module)
    assert all(map(torch.equal, outputs(transposed, inputs), outputs(plain, inputs)))


def test_arguments_of_recognized_experts():
    experts, (x,) = experts_of(Equal)
    quantize(experts)
    y = experts(x)
    assert torch.equal(experts(rows=x.view(4, 3, 128)), y)
    assert experts(x[:0]).shape == (0, 128)
    with pytest.raises(ValueError, match=r"as many rows for each of 4 experts \(got 11 rows\)"):
        experts(x[1:])
    with pytest.raises(TypeError, match="arguments must be rows"):
        experts(x, x)


@pytest.mark.slow
@pytest.mark.parametrize("kind, mode", [(Transposed, "w8a8"), (Equal, "w8a16"), (Sorted, "w8a8")])
def test_recognized_experts_compile_to_one_graph(kind, mode):
    experts, inputs = experts_of(kind)
    quantize(experts, mode)
    torch._dynamo.reset()
    compiled = torch.compile(experts, fullgraph=True, backend="aot_eager")
    assert all(map(torch.equal, outputs(compiled, inputs), outputs(experts, inputs)))
