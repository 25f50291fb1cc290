"""MLPs of any class are recognized by what they compute, fused in place, and given back."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from support.linear_testing import OpCounter, gradient, sqnr
from torchext import convert_to_fp8_training, unconvert
from torchext._fusion import FusedMLP, MLPRoles, fuse_, recognize_mlp
from torchext._split_fusion import SplitRoles, _FeedForwardChunk, _Forward, recognize_split_mlp
from torchext.nn import Linear


class Llama(nn.Module):
    """As in transformers: gate_proj, up_proj, down_proj and an activation module."""

    def __init__(self, activation: nn.Module | None = None, bias: bool = False) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(160, 256, bias)
        self.up_proj = nn.Linear(160, 256, bias)
        self.down_proj = nn.Linear(256, 160, bias)
        self.act_fn = activation or nn.SiLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


class Titan(nn.Module):
    """As in torchtitan: w1, w2, w3, in this order, and a functional activation."""

    def __init__(self) -> None:
        super().__init__()
        self.w1 = nn.Linear(160, 256, bias=False)
        self.w2 = nn.Linear(256, 160, bias=False)
        self.w3 = nn.Linear(160, 256, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class Square(nn.Module):
    """All sizes are equal, so that only a call tells which layer comes first."""

    def __init__(self) -> None:
        super().__init__()
        self.last = nn.Linear(160, 160)
        self.first = nn.Linear(160, 160)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(F.relu(self.first(x)).square())


class WithDropout(Llama):
    def __init__(self, p: float) -> None:
        super().__init__()
        self.dropout = nn.Dropout(p)

    def forward(self, x: Tensor) -> Tensor:
        return self.dropout(super().forward(x))


RECOGNIZED = {
    "Llama": (Llama(), "silu_mul", None, ("gate_proj", "up_proj", "down_proj")),
    "with biases": (Llama(bias=True), "silu_mul", None, ("gate_proj", "up_proj", "down_proj")),
    "Gemma": (Llama(nn.GELU("tanh")), "gelu_mul", True, ("gate_proj", "up_proj", "down_proj")),
    "GEGLU": (Llama(nn.GELU()), "gelu_mul", False, ("gate_proj", "up_proj", "down_proj")),
    "torchtitan": (Titan(), "silu_mul", None, ("w1", "w3", "w2")),
    "square": (Square(), "relu2", None, ("first", "last")),
    "a sequence": (
        nn.Sequential(nn.Linear(96, 384), nn.GELU(), nn.Dropout(0), nn.Linear(384, 96)),
        "gelu",
        False,
        ("0", "3"),
    ),
    "dropout of nothing": (WithDropout(0), "silu_mul", None, ("gate_proj", "up_proj", "down_proj")),
}


@pytest.mark.parametrize("module, activation, tanh, layers", RECOGNIZED.values(), ids=RECOGNIZED)
@pytest.mark.parametrize("training", [True, False])
def test_recognized(module, activation, tanh, layers, training):
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    state = torch.get_rng_state()
    assert recognize_mlp(module.train(training)) == MLPRoles(layers, activation, tanh)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(m.training is training for m in module.modules())
    assert all(torch.equal(t, before[name]) for name, t in module.state_dict().items())


def test_recognized_without_memory():
    with torch.device("meta"):
        module = Llama()
        roles = recognize_mlp(module)  # while it is the default device
    assert recognize_mlp(module) == roles
    assert roles == MLPRoles(("gate_proj", "up_proj", "down_proj"), "silu_mul", None)


class Clamped(Llama):
    def forward(self, x: Tensor) -> Tensor:
        gate = self.gate_proj(x).clamp(max=7)
        return self.down_proj(F.silu(gate) * self.up_proj(x))


class Scaled(Llama):
    def forward(self, x: Tensor) -> Tensor:
        return 0.5 * super().forward(x)


class Residual(Llama):
    def forward(self, x: Tensor) -> Tensor:
        return x + super().forward(x)


class MixesTokens(Llama):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.roll(1, dims=-2))


class MoreParameters(Llama):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(160))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.scale


class NeedsMore(Llama):
    def forward(self, x: Tensor, router: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(x)


class ReturnsTuple(Llama):
    def forward(self, x: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return super().forward(x), None


OTHERS = {
    "dropout": WithDropout(0.1),
    "clamp": Clamped(),
    "scaled": Scaled(),
    "residual": Residual(),
    "mixes tokens": MixesTokens(),
    "more parameters": MoreParameters(),
    "two inputs": NeedsMore(),
    "a tuple": ReturnsTuple(),
    "another activation": Llama(nn.Mish()),
    "no activation": nn.Sequential(nn.Linear(96, 384), nn.Linear(384, 96)),
    "one layer": nn.Sequential(nn.Linear(96, 384), nn.SiLU()),
    "norm between": nn.Sequential(
        nn.Linear(96, 384),
        nn.GELU(),
        nn.LayerNorm(384, elementwise_affine=False),
        nn.Linear(384, 96),
    ),
    "other shapes": nn.Sequential(nn.Linear(96, 384), nn.Linear(96, 384), nn.Linear(96, 384)),
}


@pytest.mark.parametrize("module", OTHERS.values(), ids=OTHERS)
def test_left_alone(module):
    assert recognize_mlp(module) is None


def test_replaced_forward_is_left_alone():
    module = Llama()
    module.forward = lambda x: x  # type: ignore[method-assign, assignment]
    assert recognize_mlp(module) is None


# ---- MLPs in two modules ----


class Before(nn.Module):
    """As transformers' BertIntermediate."""

    def __init__(self, activation: nn.Module) -> None:
        super().__init__()
        self.dense = nn.Linear(160, 256)
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        return self.activation(self.dense(x))


class After(nn.Module):
    """As BertOutput."""

    def __init__(self, p: float = 0.1) -> None:
        super().__init__()
        self.dense = nn.Linear(256, 160)
        self.dropout = nn.Dropout(p)
        self.norm = nn.LayerNorm(160)
        nn.init.zeros_(self.norm.weight)

    def forward(self, h: Tensor, x: Tensor) -> Tensor:
        return self.norm(self.dropout(self.dense(h)) + x)


class Split(nn.Module):
    """A layer of BERT, without attention."""

    def __init__(self, activation: nn.Module | None = None, p: float = 0.1) -> None:
        super().__init__()
        self.before, self.after = Before(activation or nn.GELU()), After(p)

    def feed_forward_chunk(self, x: Tensor) -> Tensor:
        return self.after(self.before(x), x)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        halves = [self.feed_forward_chunk(half) for half in x.chunk(2)]
        return torch.cat(halves) if mask is None else torch.cat(halves) * mask


class SplitInForward(Split):
    """A user's own MLP, without the names of transformers."""

    feed_forward_chunk = None  # type: ignore[assignment]

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        return x + self.after(self.before(x), 2 * x)


class ReadsTheHidden(Split):
    def feed_forward_chunk(self, x: Tensor) -> Tensor:
        h = self.before(x)
        return self.after(h, x) + h.mean(-1, keepdim=True)


class NormBefore(Split):
    def feed_forward_chunk(self, x: Tensor) -> Tensor:
        return self.after(self.before(F.layer_norm(x, x.shape[-1:])), x)


SPLIT = {
    "BERT": (Split(), _FeedForwardChunk, "gelu", False),
    "tanh": (Split(nn.GELU("tanh")), _FeedForwardChunk, "gelu", True),
    "forward": (SplitInForward(), _Forward, "gelu", False),
}


@pytest.mark.parametrize("module, base, activation, tanh", SPLIT.values(), ids=SPLIT)
def test_split_mlps_are_recognized(module, base, activation, tanh):
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    state = torch.get_rng_state()
    mlp = MLPRoles(("dense", "dense"), activation, tanh)
    expected = base, SplitRoles(("before", "after"), mlp)
    assert recognize_split_mlp(module) == expected
    assert recognize_split_mlp(copy.deepcopy(module).to("meta")) == expected
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(t, before[name]) for name, t in module.state_dict().items())


@pytest.mark.parametrize(
    "module",
    [Split(nn.Mish()), Split(nn.Sequential(nn.GELU(), nn.Dropout(0.1))), ReadsTheHidden(),
     NormBefore(), nn.Sequential(Before(nn.GELU()), After())],
    ids=["activation", "dropout between", "reads", "norm", "no pair"],
)  # fmt: skip
def test_other_pairs_are_left_alone(module):
    assert recognize_split_mlp(module) is None


@pytest.mark.parametrize("name", ["BERT", "forward"])
@pytest.mark.parametrize("save", ["bf16", "fp8", "recompute"])
def test_split_mlps_run_fused_and_come_back(name, save):
    torch.manual_seed(0)
    plain: Any = copy.deepcopy(SPLIT[name][0]).bfloat16()
    nn.init.ones_(plain.after.norm.weight)
    plain.after.dropout.p = 0.0  # the masks for BF16 and float64 differ
    model, separate, wide = (copy.deepcopy(plain) for _ in range(3))
    result = convert_to_fp8_training(model, save=save)
    assert result.fused == {"": "GELU", "after.norm": "LayerNorm"}
    convert_to_fp8_training(separate, fuse=False)
    assert type(model).__name__ == type(plain).__name__ and isinstance(model, type(plain))
    assert list(model.state_dict()) == list(plain.state_dict())

    def results(layer: Any, x: Tensor) -> list[Tensor]:
        torch.manual_seed(1)
        leaf = x.detach().requires_grad_()
        with OpCounter() as counter:
            y = layer(leaf)
        counts.append(counter.of("gelu_quantize_1x128"))
        y.backward(dy)
        gradients = [gradient(p) for p in layer.parameters()]
        layer.zero_grad()
        return [y.detach(), gradient(leaf), *gradients]

    x, dy = torch.randn(4, 40, 160).bfloat16(), torch.randn(4, 40, 160).bfloat16()
    counts: list[int] = []
    exact = results(wide.double(), x.double())
    for mine, theirs, best in zip(results(model, x), results(separate, x), exact, strict=True):
        assert sqnr(best, mine) > min(20, sqnr(best, theirs) - 3)
    assert counts == [0, 2 if name == "BERT" else 1, 0]
    for module in (model, separate, plain):
        module.after.dropout.p = 0.1
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert type(twin) is type(model)
        assert all(map(torch.equal, results(twin, x), results(model, x)))

    model.before.activation.register_forward_hook(lambda *_: None)
    unfused = copy.deepcopy(model)
    unfused.revert_()
    counts.clear()
    assert all(map(torch.equal, results(model, x), results(unfused, x)))
    assert counts == [0, 0]
    model.before.activation._forward_hooks.clear()
    assert unconvert(model) == result.converted
    assert type(model) is type(plain) and vars(model).keys() == vars(plain).keys()
    assert all(map(torch.equal, results(model, x), results(plain, x)))


# ---- fusing in place ----


def fused(module: Any) -> Any:
    torch.manual_seed(0)
    module = copy.deepcopy(module)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
    roles = recognize_mlp(module)
    assert roles is not None
    for child in module.children():
        if isinstance(child, nn.Linear):
            Linear.convert_(child)
    fuse_(module, roles, "bf16")
    return module


@pytest.mark.parametrize("name", RECOGNIZED)
def test_fused_equals_separate_layers(name):
    """Values lie in FP32, so that PyTorch's activations round as the fused kernels do, nearly."""
    module = fused(RECOGNIZED[name][0])
    separate = copy.deepcopy(module)
    separate.revert_()
    width = next(module.parameters()).shape[1]
    x = torch.randn(2, 40, width)
    ys = []
    for layer in (module, separate):
        leaf = x.clone().requires_grad_()
        y = layer(leaf)
        y.square().sum().backward()
        ys.append([y, gradient(leaf), *map(gradient, layer.parameters())])
    for mine, theirs in zip(*ys, strict=True):
        assert sqnr(theirs, mine) > 30  # they differ by single FP8 values, one step each


class Conv1D(nn.Module):
    """A layer that holds its weight as [in, out], as transformers' class of that name."""

    def __init__(self, nf: int, nx: int) -> None:
        super().__init__()
        self.nf = nf
        self.weight = nn.Parameter(torch.randn(nx, nf) / nx**0.5)
        self.bias = nn.Parameter(torch.randn(nf))

    def forward(self, x: Tensor) -> Tensor:
        y = torch.addmm(self.bias, x.flatten(0, -2), self.weight)
        return y.unflatten(0, x.shape[:-1])


@pytest.mark.parametrize("save", ["bf16", "fp8", "recompute"])
def test_transposed_weights_give_the_same_bits(save):
    """As in GPT-2. The model with torch.nn.Linears holds the transposes."""
    torch.manual_seed(0)
    own = nn.Sequential(Conv1D(256, 160), nn.GELU("tanh"), Conv1D(160, 256))
    linear = nn.Sequential(nn.Linear(160, 256), nn.GELU("tanh"), nn.Linear(256, 160))
    for name, parameter in own.named_parameters():
        linear.get_parameter(name).data = parameter.detach().t().clone()
    x, ys = torch.randn(2, 40, 160), []
    for model in (own, linear):
        assert convert_to_fp8_training(model, save=save).fused == {"": "GELU"}
        leaf = x.clone().requires_grad_()
        y = model(leaf)
        y.square().sum().backward()
        ys.append([y, gradient(leaf), *(gradient(p) for p in model.parameters())])
        with torch.no_grad():
            assert torch.equal(model.eval()(x), y)
    for mine, theirs in zip(*ys, strict=True):
        assert torch.equal(mine if mine.dim() != 2 else mine.t(), theirs)
    own[2].register_forward_hook(lambda *_: None)
    assert torch.equal(own(x), nn.Sequential.forward(own, x))


def test_class_and_state_stay():
    original = Llama()
    module = fused(original)
    assert isinstance(module, Llama) and isinstance(module, FusedMLP)
    assert type(module).__name__ == "Llama"
    assert list(module.state_dict()) == list(original.state_dict())
    assert repr(module).startswith("Llama(\n  (gate_proj): Linear(")
    module.revert_()
    assert type(module) is Llama and "fused_roles" not in vars(module)


def test_copies_pickles_and_files():
    module = fused(Llama())
    x = torch.randn(5, 160)
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module)), loaded):
        assert type(twin) is type(module)
        assert torch.equal(twin(x), module(x))


def test_calls_with_a_keyword_or_a_hook_run_the_class():
    module = fused(Llama())
    x, called = torch.randn(5, 160), list[int]()
    assert torch.equal(module(x=x), Llama.forward(module, x))
    for child in (module.up_proj, module.act_fn):
        hook = child.register_forward_hook(lambda *_: called.append(1))
        assert torch.equal(module(x), Llama.forward(module, x)) and len(called) == 2
        called.clear()
        hook.remove()
    with pytest.raises(TypeError, match="forward"):
        module(x, x)


def test_compiled_and_traced():
    module = fused(Llama())
    x = torch.randn(5, 160)
    torch._dynamo.reset()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    separate = Llama.forward(module, x)
    assert torch.equal(compiled(x), module(x))
    assert torch.equal(torch.fx.symbolic_trace(module)(x), separate)
    assert torch.export.export(module, (x,)).module()(x).shape == x.shape
