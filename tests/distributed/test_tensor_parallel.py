"""The FP8 parallel styles on two ranks, compared with the model on one rank."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ParallelStyle, parallelize_module

import torchext
from support.ranks import Meshes, run_checks
from torchext import Recipe, ops
from torchext.distributed import (
    Fp8ColwiseParallel,
    Fp8RowwiseParallel,
    PrepareFp8Input,
    activation,
)

pytestmark = pytest.mark.slow  # starts processes, each of which loads torch


class Mlp(nn.Module):
    def __init__(self, features: int = 256, inner: int = 512) -> None:
        super().__init__()
        self.up = torchext.nn.Linear(features, inner)
        self.gate = torchext.nn.Linear(features, inner, bias=False)
        self.down = torchext.nn.Linear(inner, features)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


def difference(got: Tensor, expected: Tensor) -> float:
    return ((got - expected).norm() / expected.norm()).item()


def grad(parameter: Any) -> Tensor:
    assert parameter.grad is not None
    return parameter.grad  # type: ignore[no-any-return]


def whole(parameter: Any) -> Tensor:
    assert isinstance(parameter.grad, DTensor)
    return parameter.grad.full_tensor()


def compare(meshes: Meshes, dim: int | None, prepare: bool, shape: tuple[int, ...]) -> None:
    """Compares results of both ranks, which have rows of x along `dim` or all of them."""
    mesh = meshes.all
    torch.manual_seed(0)
    plain = Mlp()
    model: Any = copy.deepcopy(plain)
    x = torch.randn(shape)
    expected_x = x.clone().requires_grad_()
    expected = plain(expected_x)
    weights = torch.randn_like(expected)
    (expected * weights).sum().backward()

    layout = None if dim is None else Shard(dim)
    column = Fp8ColwiseParallel(input_layouts=None if prepare else layout)
    if prepare:
        assert layout is not None
        parallelize_module(model, mesh, PrepareFp8Input(input_layouts=layout))
    plan: dict[str, ParallelStyle] = {
        "up": column,
        "gate": column,
        "down": Fp8RowwiseParallel(output_layouts=layout),
    }
    parallelize_module(model, mesh, plan)

    def own(tensor: Tensor) -> Tensor:
        return tensor if dim is None else tensor.chunk(2, dim)[dist.get_rank()]

    part = own(x).clone().requires_grad_()
    y = model(part)
    assert y.shape == own(expected).shape and y.dtype == expected.dtype
    assert difference(y, own(expected)) < 1e-6  # the order of an FP32 sum
    (y * own(weights)).sum().backward()
    assert part.grad is not None and expected_x.grad is not None
    assert difference(part.grad, own(expected_x.grad)) < 1e-6
    # The inputs of `down` and of its gradient are those of the plain model, to the bit.
    assert torch.equal(whole(model.down.weight), grad(plain.down.weight))
    assert difference(whole(model.down.bias), grad(plain.down.bias)) < 1e-6
    for name in ("up", "gate"):
        got, wanted = getattr(model, name), getattr(plain, name)
        assert torch.equal(whole(got.weight), grad(wanted.weight))
    assert torch.equal(whole(model.up.bias), grad(plain.up.bias))


def check_replicated(meshes: Meshes) -> None:
    compare(meshes, None, False, (2, 24, 256))


def check_sequence_parallel(meshes: Meshes) -> None:
    compare(meshes, 0, False, (256, 256))
    compare(meshes, 1, False, (2, 256, 256))


def check_one_gather_for_all_layers(meshes: Meshes) -> None:
    compare(meshes, 1, True, (2, 256, 256))


def check_bytes(meshes: Meshes) -> None:
    """FP8 and scales: half of BF16's bytes for each gather; one in each direction."""
    sent = []
    plain = activation._all_gather

    def counted(output: Tensor, input: Tensor, **options: Any) -> Any:
        sent.append(input.nbytes)
        return plain(output, input, **options)

    model: Any = Mlp()
    styles = {
        "": PrepareFp8Input(input_layouts=Shard(0)),
        "up": Fp8ColwiseParallel(),
        "gate": Fp8ColwiseParallel(),
        "down": Fp8RowwiseParallel(output_layouts=Shard(0)),
    }
    for name, style in styles.items():
        parallelize_module(model.get_submodule(name), meshes.all, style)
    activation._all_gather = counted  # type: ignore[assignment]
    try:
        model(torch.randn(128, 256, requires_grad=True)).sum().backward()
    finally:
        activation._all_gather = plain  # type: ignore[assignment]
    once = 128 * 256 + 128 * 256 // 128 * 4
    assert sent == [once, 2 * once, once]  # x; dy both ways; x along its rows


def check_cut_blocks(meshes: Meshes) -> None:
    plain = Mlp(256, 320)
    model: Any = copy.deepcopy(plain)
    with pytest.raises(ValueError, match=r"out_features .* shard of 160 cuts a 128x128 block"):
        parallelize_module(model.up, meshes.all, Fp8ColwiseParallel())
    with pytest.raises(ValueError, match=r"in_features .* cut=.requantize"):
        parallelize_module(model.down, meshes.all, Fp8RowwiseParallel())
    x = torch.randn(24, 256)
    expected = plain(x)
    column: ParallelStyle = Fp8ColwiseParallel(cut="requantize")
    row = Fp8RowwiseParallel(cut="requantize")
    parallelize_module(model, meshes.all, {"up": column, "gate": column, "down": row})
    assert 0 < difference(model(x), expected) < 0.1


def check_ops_of_dtensors(meshes: Meshes) -> None:
    """Shards of results have the bits of the whole results, or the placements are refused."""
    mesh = meshes.all
    x, w = torch.randn(256, 512), torch.randn(512, 512)

    def distributed(tensor: Tensor, placement: Any) -> Any:
        return distribute_tensor(tensor, mesh, [placement])

    def bits(tensor: Any) -> Tensor:
        return tensor.view(torch.uint8) if tensor.itemsize == 1 else tensor  # type: ignore[no-any-return]

    def local_bits(results: Any) -> list[tuple[Any, Tensor]]:
        own = []
        for result in results:
            (placement,), parts = result.placements, result
            own.append((placement, bits(parts.to_local())))
        return own

    names = ["1x128", "1x128_t", "1x128_dual", "128x128", "128x128_dual"]
    for name in names:
        quantize = getattr(ops, f"quantize_{name}")
        expected = quantize(x)
        for placement in (Replicate(), Shard(0), Shard(1)):
            results = quantize(distributed(x, placement))
            for (own, local), whole_result in zip(local_bits(results), expected, strict=True):
                wanted = bits(whole_result)
                if isinstance(own, Shard):
                    wanted = wanted.chunk(2, own.dim)[dist.get_rank()]
                assert isinstance(own, Shard) == isinstance(placement, Shard)
                assert torch.equal(local, wanted), (name, placement)
        for shape, placement in (((256, 320), Shard(1)), ((320, 256), Shard(0))):
            cuts = {"1x128": 1, "1x128_t": 0}.get(name, placement.dim) == placement.dim
            if cuts:
                with pytest.raises(RuntimeError, match=rf"quantize_{name}: placements must let"):
                    quantize(distributed(torch.randn(shape), placement))
            else:
                quantize(distributed(torch.randn(shape), placement))
    _, row_scale = ops.quantize_rowwise(distributed(x, Shard(0)))
    assert isinstance(row_scale, DTensor) and row_scale.placements == (Shard(0),)
    for placement, refused in ((Shard(0), False), (Shard(1), True)):  # gate and up are the halves
        if refused:
            with pytest.raises(RuntimeError, match="silu_mul_quantize_1x128: placements must let"):
                ops.silu_mul_quantize_1x128(distributed(x, placement))
        else:
            data, _ = ops.silu_mul_quantize_1x128(distributed(x, placement))
            ((own, local),) = local_bits([data])
            wanted = bits(ops.silu_mul_quantize_1x128(x)[0])
            assert own == placement and torch.equal(local, wanted.chunk(2)[dist.get_rank()])
    with pytest.raises(RuntimeError, match="quantize_tensorwise: placements must let"):
        ops.quantize_tensorwise(distributed(x, Shard(0)))

    for of_x, of_w, of_y in (
        (Shard(0), Replicate(), Shard(0)),
        (Replicate(), Shard(0), Shard(1)),
        (Shard(1), Shard(1), Partial()),
    ):
        a, b = ops.quantize_1x128(x), ops.quantize_128x128(w)
        expected = ops.fp8_gemm_nt(*a, *b, out_dtype=torch.float32)
        da = ops.quantize_1x128(distributed(x, of_x))
        db = ops.quantize_128x128(distributed(w, of_w))
        y: Any = ops.fp8_gemm_nt(*da, *db, out_dtype=torch.float32)
        assert y.placements == (of_y,) and y.dtype == torch.float32
        assert ops.fp8_gemm_nt(*da, *db).dtype == torch.bfloat16  # DTensor caches decisions
        if isinstance(of_y, Shard):
            assert torch.equal(y.full_tensor(), expected)
        else:
            assert difference(y.full_tensor(), expected) < 1e-6
    with pytest.raises(RuntimeError, match="fp8_gemm_nt: placements must let"):
        ops.fp8_gemm_nt(*ops.quantize_1x128(distributed(x, Shard(1))), *b_of(w, distributed))


def check_fused_ops_of_dtensors(meshes: Meshes) -> None:
    """Rows of results have the bits of the whole results; so have columns where they may."""
    mesh, rank = meshes.all, dist.get_rank()
    x, weight, residual = torch.randn(256, 512), torch.randn(512), torch.randn(256, 512)
    a, b = ops.quantize_1x128(x), ops.quantize_128x128(torch.randn(512, 512))

    def distributed(tensor: Tensor, placement: Any) -> Any:
        return DTensor.from_local(own_part(tensor, placement), mesh, [placement])

    def own_part(tensor: Tensor, placement: Any) -> Tensor:
        if not isinstance(placement, Shard):
            return tensor
        return tensor.view_as(tensor).chunk(2, placement.dim)[rank].contiguous()

    def compare_bits(results: Any, expected: Any, placement: Any) -> None:
        for result, wanted in zip(results, expected, strict=True):
            (own,) = result.placements
            assert isinstance(own, Shard) == (isinstance(placement, Shard) and wanted.numel() > 0)
            assert result.shape == wanted.shape and result.dtype == wanted.dtype
            local, part = result.to_local(), own_part(wanted, own)
            if local.itemsize == 1:
                local, part = local.view(torch.uint8), part.view(torch.uint8)
            assert torch.equal(local, part)

    for name, parameters in (("rms", [weight]), ("layer", [weight, -weight])):
        for ending in ("", "_dual"):
            op = getattr(ops, f"{name}_norm_quantize_1x128{ending}")
            cases: list[dict[str, Any]] = [{}, {"residual": residual}, {"return_normed": True}]
            for options in cases:
                expected = op(x, *parameters, 1e-5, **options)
                given = {k: distributed(v, Shard(0)) if k == "residual" else v
                         for k, v in options.items()}  # fmt: skip
                whole_parameters = [distributed(p, Replicate()) for p in parameters]
                results = op(distributed(x, Shard(0)), *whole_parameters, 1e-5, **given)
                compare_bits(results, expected, Shard(0))
            with pytest.raises(RuntimeError, match=f"{name}_norm_.*placements must let"):
                op(distributed(x, Shard(1)), *whole_parameters, 1e-5)

    for name, columns in (("swiglu", False), ("gelu", True), ("relu2", True)):
        op = getattr(ops, f"fp8_gemm_nt_{name}_quantize")
        expected = op(*a, *b)
        da = ops.quantize_1x128(distributed(x, Shard(0)))
        replicated = [distributed(t, Replicate()) for t in b]
        compare_bits(op(*da, *replicated), expected, Shard(0))
        whole_a = ops.quantize_1x128(distributed(x, Replicate()))
        of_rows = [DTensor.from_local(t.chunk(2)[rank], mesh, [Shard(0)]) for t in b]
        if columns:
            compare_bits(op(*whole_a, *of_rows), expected, Shard(1))
        else:
            with pytest.raises(RuntimeError, match="swiglu_quantize: placements must let"):
                op(*whole_a, *of_rows)


def same_bits(got: Any, wanted: Tensor) -> None:
    """Of this rank's shard, or the replica."""
    (placement,), local = got.placements, got.to_local()
    assert got.shape == wanted.shape and got.dtype == wanted.dtype
    part = wanted
    if isinstance(placement, Shard):
        part = wanted.chunk(2, placement.dim)[dist.get_rank()]
    assert torch.equal(*(t.view(torch.uint8) if t.itemsize == 1 else t for t in (local, part)))


def check_gradients_of_dtensors(meshes: Meshes) -> None:
    """Of activations and norms: the bits of the unsharded op, but sums over rows in another order.

    What each rule allows: tests/distributed/test_sharding_rules.py.
    """
    x, grad, weight = torch.randn(256, 512), torch.randn(256, 256), torch.randn(512)
    rstd = x.square().mean(-1).rsqrt()
    options: dict[str, Any] = {"bias_grad": True, "activation_dtype": torch.float8_e4m3fn}
    calls: list[tuple[Any, Any, Any]] = [
        (ops.silu_mul_backward_quantize_1x128_dual, [grad, x], options),
        (ops.relu2_backward_quantize_1x128_dual, [grad, x[:, :256]], options),
        (ops.rms_norm_backward_quantize_1x128_dual, [x.flip(0), x, weight, rstd], {}),
        (ops.quantize_1x128_dual_bias_grad, [x], {}),
        (ops.dequantize, [*ops.quantize_1x128(x)], {"out_dtype": torch.float32}),
    ]

    def distributed(tensor: Tensor, placement: Any) -> Any:
        part = tensor.chunk(2)[dist.get_rank()] if placement == Shard(0) else tensor
        return DTensor.from_local(part, meshes.all, [placement])

    for op, tensors, given in calls:
        expected = op(*tensors, **given)
        results = op(
            *(distributed(t, Replicate() if t is weight else Shard(0)) for t in tensors), **given
        )
        if isinstance(results, Tensor):
            results, expected = (results,), (expected,)
        for got, wanted in zip(results, expected, strict=True):
            if got.placements == (Partial(),):
                assert wanted.dtype == torch.float32
                assert difference(got.full_tensor(), wanted) < 1e-6
            else:
                assert isinstance(got.placements[0], Shard)
                same_bits(got, wanted)
    columns = distribute_tensor(x, meshes.all, [Shard(1)])
    whole_rows = [distributed(t, Replicate()) for t in (weight, rstd)]
    with pytest.raises(RuntimeError, match="rms_norm_backward: placements must let each rank"):
        ops.rms_norm_backward(columns, columns, *whole_rows)


def check_ops_for_experts_of_dtensors(meshes: Meshes) -> None:
    """Each rank has all tokens and some columns of each expert's result."""
    x, w, bias = torch.randn(40, 256), torch.randn(3, 256, 256), torch.randn(3, 256)
    ids, weights = torch.randint(3, (40, 2)), torch.rand(40, 2)

    def run(x: Any, w: Any, bias: Any, ids: Any, weights: Any) -> list[Any]:
        slots, offsets = ops.moe_route(ids, 3)
        rows, scale = ops.moe_permute_quantize_1x128(x, slots)
        pair = ops.quantize_128x128(w)
        y = ops.m_grouped_fp8_gemm_nt_contiguous(rows, scale, *pair, offsets, bias=bias)
        z = ops.moe_combine(y, slots, weights, residual=ops.moe_combine(y, slots))
        again = ops.moe_permute(z, slots, weights)
        dw = ops.k_grouped_fp8_gemm_nt(
            *ops.quantize_1x128_t(y), *ops.quantize_1x128_t(x.repeat(2, 1)), offsets
        )
        return [rows, scale, y, z, again, dw]

    def distributed(tensor: Tensor, placement: Any) -> Any:
        return distribute_tensor(tensor, meshes.all, [placement])

    given = x, w, bias, ids, weights
    whole, columns = Replicate(), Shard(1)
    results = run(*map(distributed, given, (whole, columns, columns, whole, whole)))
    placements = [p for result in results for p in result.placements]
    assert placements == [whole, whole, columns, columns, columns, columns]
    for got, wanted in zip(results, run(*given), strict=True):
        same_bits(got, wanted)

    slots, _ = ops.moe_route(ids, 3)
    own = [distributed(x, columns), distributed(slots, whole)]
    for got, wanted in zip(
        ops.moe_permute_quantize_1x128(*own), ops.moe_permute_quantize_1x128(x, slots), strict=True
    ):
        assert got.placements == (columns,)  # type: ignore[attr-defined]
        same_bits(got, wanted)

    with pytest.raises(RuntimeError, match=r"moe_route: tensors must be replicated, .*Dispatcher"):
        ops.moe_route(distributed(ids, Shard(0)), 3)
    with pytest.raises(RuntimeError, match="contiguous: placements must let each rank"):
        ops.m_grouped_fp8_gemm_nt_contiguous(
            *ops.quantize_1x128(distributed(x, Shard(0))),
            *ops.quantize_128x128(distributed(w, whole)),
            distributed(torch.tensor([10, 20, 40]).int(), whole),
        )

    def gradients(x: Any, slots: Any, weights: Any) -> list[Any]:
        leaves = [t.clone().requires_grad_() for t in (x, weights)]
        y = ops.moe_permute(leaves[0], slots, leaves[1])
        z = ops.moe_combine(y, slots, leaves[1])
        return [*torch.autograd.grad(z.square().sum(), leaves)]

    got = gradients(*own, distributed(weights, whole))
    dx, dweights = gradients(x, slots, weights)
    same_bits(got[0], dx)
    assert difference(got[1].full_tensor(), dweights) < 1e-6


def b_of(w: Tensor, distributed: Any) -> Any:
    return ops.quantize_128x128(distributed(w, Shard(0)))


def check_errors(meshes: Meshes) -> None:
    mesh = meshes.all
    with pytest.raises(TypeError, match=r"must be a torchext.nn.Linear \(got Linear\)"):
        parallelize_module(nn.Linear(256, 256), mesh, Fp8ColwiseParallel())
    rowwise = torchext.nn.Linear(256, 256, recipe=Recipe.rowwise())
    with pytest.raises(ValueError, match="recipe must be blockwise"):
        parallelize_module(rowwise, mesh, Fp8RowwiseParallel())
    with pytest.raises(ValueError, match="must be a multiple of the 2 ranks"):
        parallelize_module(torchext.nn.Linear(256, 257), mesh, Fp8ColwiseParallel())
    with pytest.raises(ValueError, match=r"cut must be .*got 'cut'"):
        Fp8ColwiseParallel(cut="cut")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"input_layouts must be Shard\(dim\)"):
        PrepareFp8Input(input_layouts=Replicate())
    layer = torchext.nn.Linear(256, 256)
    parallelize_module(layer, mesh, Fp8ColwiseParallel(input_layouts=Shard(0)))
    with pytest.raises(
        ValueError, match=r"must be multiples of 128 for FP8 gathers \(got 100 rows"
    ):
        layer(torch.randn(100, 256))
    layer = torchext.nn.Linear(256, 256)
    parallelize_module(layer, mesh, Fp8ColwiseParallel(input_layouts=Shard(-1)))
    with pytest.raises(ValueError, match="must be sharded along its rows"):
        layer(torch.randn(128, 128))
    reads = nn.Sequential(nn.ReLU())
    parallelize_module(reads, mesh, PrepareFp8Input(input_layouts=Shard(0)))
    with pytest.raises(NotImplementedError, match=r"aten.relu.*only Fp8ColwiseParallel"):
        reads(torch.randn(128, 256))


CHECKS = [name for name in dir() if name.startswith("check_")]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str | None]:
    return run_checks(__file__, CHECKS, 2, tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("check", CHECKS)
def test_on_two_ranks(check: str, found: dict[str, str | None]) -> None:
    assert found[check] is None, found[check]
