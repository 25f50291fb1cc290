"""The PTX of CUDA's headers for wmma, rounding and SIMD intrinsics, cooperative groups and 16-byte
atomics; nvcc compiles cuda_features.cu for several targets."""

from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch

from support.exact import extract, rounded, saturate
from torchext import sim
from torchext.sim.compiler import CompileError, find_nvcc

SEEDS = range(2)


@pytest.fixture(scope="module", params=["75", "80", "90a"])
def module(request):
    try:
        find_nvcc()
    except CompileError:
        pytest.skip("there is no nvcc to compile with")
    return sim.compile_cuda(Path(__file__).with_name("cuda_features.cu"), arch=request.param)


def run(module, name, args, **options):
    if name not in [kernel.name for kernel in module.kernels()]:
        pytest.skip(f"{module.target} has no {name}")
    report = module.launch(name, args=args, **options)
    assert report.ok, str(report)


@pytest.mark.parametrize("name,dtype", [("wmma_f16", torch.half), ("wmma_bf16", torch.bfloat16)])
@pytest.mark.slow
def test_wmma(module, name, dtype):
    torch.manual_seed(0)
    a, b = torch.randint(-8, 8, (32, 64)).to(dtype), torch.randint(-8, 8, (48, 64)).to(dtype)
    d = torch.randint(-8, 8, (32, 48)).float()
    want = 0.5 * a.float() @ b.float().T + d
    scalars = [np.float32(0.5), np.int32(48), np.int32(64)]
    run(module, name, [sim.read_only(a), sim.read_only(b), d, *scalars], grid=(3, 2), block=32)
    assert torch.equal(d, want)


def test_rounding_intrinsics(module):
    rng = np.random.default_rng(0)
    a, b = (rng.standard_normal(64) * 2.0 ** rng.integers(-30, 30, 64) for _ in range(2))
    out = np.zeros((6, 4, 64))
    run(module, "rounding", [sim.read_only(a), sim.read_only(b), sim.output(out)], grid=1, block=64)
    exact = {0: lambda x, y: x + y, 1: lambda x, y: x * y, 2: lambda x, y: x / y,
             3: lambda x, y: x * y + x, 5: lambda x, y: x}  # fmt: skip
    for index, f in exact.items():
        left = a.view(np.int64).tolist() if index == 5 else a.tolist()
        for m, mode in enumerate(["rn", "rz", "rp", "rm"]):
            want = [
                rounded(f(Fraction(x), Fraction(y)), mode)
                for x, y in zip(left, b.tolist(), strict=True)
            ]
            np.testing.assert_array_equal(out[index, m], want)
    near, zero, up, down = out[4]
    np.testing.assert_array_equal(near, np.sqrt(np.abs(a)))
    np.testing.assert_array_equal(zero, down)
    assert ((down <= near) & (near <= up) & (np.nextafter(down, np.inf) >= up)).all()


def lanewise(f, count, signed):
    """A function of two 32-bit words that applies f to each of their `count` lanes."""
    bits = 32 // count

    def word(x, y):
        parts = [
            f(extract(x, n * bits, bits, signed), extract(y, n * bits, bits, signed))
            for n in range(count)
        ]
        return sum((int(p) & (1 << bits) - 1) << n * bits for n, p in enumerate(parts))

    return word


def total(count, signed):
    bits = 32 // count
    return lambda x, y: sum(
        abs(extract(x, n * bits, bits, signed) - extract(y, n * bits, bits, signed))
        for n in range(count)
    )


WORDS = {
    "__vadd4": lanewise(lambda x, y: x + y, 4, False),
    "__vsubus4": lanewise(lambda x, y: max(x - y, 0), 4, False),
    "__vaddss2": lanewise(lambda x, y: saturate(x + y, True, 16), 2, True),
    "__vabsdiffu4": lanewise(lambda x, y: abs(x - y), 4, False),
    "__vabsdiffs2": lanewise(lambda x, y: abs(x - y), 2, True),
    "__vsadu4": total(4, False),
    "__vsads2": total(2, True),
    "__vavgu4": lanewise(lambda x, y: x + y + 1 >> 1, 4, False),
    "__vavgs2": lanewise(lambda x, y: x + y + (x + y >= 0) >> 1, 2, True),
    "__vmaxs4": lanewise(max, 4, True),
    "__vcmpgtu4": lanewise(lambda x, y: -(x > y), 4, False),
    "__vsetles2": lanewise(lambda x, y: x <= y, 2, True),
}


def test_simd_intrinsics(module):
    rng = np.random.default_rng(1)
    a, b = (rng.integers(0, 2**32, 96, np.uint32) for _ in range(2))
    out = np.zeros((len(WORDS), 96), np.uint32)
    run(module, "words", [sim.read_only(a), sim.read_only(b), sim.output(out)], grid=1, block=96)
    for got, (name, f) in zip(out, WORDS.items(), strict=True):
        want = [f(x, y) & 0xFFFFFFFF for x, y in zip(a.tolist(), b.tolist(), strict=True)]
        np.testing.assert_array_equal(got, np.array(want, np.uint32), err_msg=name)


def test_functions_of_halves(module):
    x = np.linspace(0.1, 3, 64).astype(np.float16)
    out = np.zeros((9, 64, 2), np.float16)
    run(module, "halves", [sim.read_only(x), sim.output(out)], grid=1, block=64)
    a, b = x.astype(float), x[::-1].astype(float)
    clipped = [np.clip(v * v + v, 0, 1) for v in (a, b)]
    pairs = [
        (np.sqrt(a), 1 / np.sqrt(a)), (1 / a, np.exp(a)), (np.sin(a), np.cos(a)),
        (np.log(a), np.tanh(a)), (np.sqrt(a), np.sqrt(b)), (1 / a, 1 / b),
        (np.cos(a), np.cos(b)), (a < b, b < a), clipped,
    ]  # fmt: skip
    for got, pair in zip(out, pairs, strict=True):
        want = np.stack(pair, 1)
        error = np.abs(got - want) / np.spacing(np.abs(want).astype(np.float16)).astype(float)
        assert error.max() <= 1


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("threads", [1, 2])
def test_grid_sync(module, seed, threads):
    now, steps = np.arange(4 * 64, dtype=np.int32), 5
    want = now.copy()
    for _ in range(steps):
        want += np.roll(want, 1)
    following = np.zeros_like(now)
    run(
        module, "grid_steps", [now, following, np.int32(steps)],
        grid=4, block=64, seed=seed, num_threads=threads,
    )  # fmt: skip
    np.testing.assert_array_equal(following, want)


@pytest.mark.parametrize("seed", SEEDS)
def test_groups(module, seed):
    v = np.random.default_rng(seed).integers(0, 100, 96).astype(np.int32)
    out = np.zeros((7, 96), np.int32)
    run(module, "groups", [sim.read_only(v), sim.output(out)], grid=1, block=96, seed=seed)
    eights, warps = v.reshape(-1, 8), v.reshape(-1, 32)
    np.testing.assert_array_equal(out[0], np.repeat(eights.sum(1), 8))
    np.testing.assert_array_equal(out[1], np.repeat(eights.min(1), 8))
    np.testing.assert_array_equal(out[2], eights.cumsum(1).reshape(-1))
    before = np.bitwise_xor.accumulate(eights, 1) ^ eights
    np.testing.assert_array_equal(out[3], before.reshape(-1))
    same = (warps[:, :, None] & 3) == (warps[:, None] & 3)
    np.testing.assert_array_equal(out[4], (same * warps[:, None]).sum(2).reshape(-1))
    np.testing.assert_array_equal(out[5], same.sum(2).reshape(-1))
    odd = warps & 1
    want = odd * ((warps * odd).sum(1, keepdims=True) + 1000 * (odd.cumsum(1) - 1))
    np.testing.assert_array_equal(out[6], want.reshape(-1))


@pytest.mark.parametrize("seed", SEEDS)
def test_tiles_of_several_warps(module, seed):
    v = np.random.default_rng(seed).integers(0, 20, 128).astype(np.int32)
    out = np.zeros((4, 128), np.int32)
    run(module, "wide_tiles", [sim.read_only(v), sim.output(out)], grid=1, block=128, seed=seed)
    tiles = v.reshape(2, 64)
    np.testing.assert_array_equal(out[0], np.repeat(tiles.sum(1), 64))
    np.testing.assert_array_equal(out[1], np.repeat(tiles[:, 5], 64))
    np.testing.assert_array_equal(out[2], np.repeat((tiles == 7).any(1) + 2, 64))
    np.testing.assert_array_equal(out[3], tiles.cumsum(1).reshape(-1))


@pytest.mark.parametrize("completion", ["late", "eager", "random"])
def test_memcpy_async(module, completion):
    x = np.random.default_rng(0).integers(0, 2**31, (128, 4)).astype(np.int32)
    out = np.zeros_like(x)
    run(
        module, "copies", [sim.read_only(x), sim.output(out)],
        grid=1, block=128, completion=completion,
    )  # fmt: skip
    np.testing.assert_array_equal(out, x[::-1])


def test_atomics_of_16_bytes(module):
    total_, last = np.zeros(2, np.int64), np.zeros(2, np.int64)
    run(module, "pairs", [total_, last], grid=1, block=64)
    assert total_.tolist() == [64 * 63 // 2, 64]
    assert last[1] == 1 and 0 <= last[0] < 64
