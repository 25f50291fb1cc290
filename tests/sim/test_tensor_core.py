"""Tensor-core arithmetic, bit for bit, against two published models of the hardware.

`mmaemu` covers FP8 with f32 accumulators; its author recorded and replayed it on an H100 and an RTX
4060. `mmasim` (Microsoft's MMA-Sim) covers every other pair of formats. Neither shares code with
this project.
"""

import itertools
import time

import numpy as np
import pytest
import torch
from mmaemu.model import chain
from mmasim.nv_ptx.sim import MMA, WGMMA

from torchext import _sim

DTYPE = {
    "e4m3": torch.float8_e4m3fn,
    "e5m2": torch.float8_e5m2,
    "f16": torch.float16,
    "bf16": torch.bfloat16,
    "tf32": torch.float32,
}
SIZE = {"e4m3": 1, "e5m2": 1, "f16": 2, "bf16": 2, "tf32": 4}
ARCH = {75: "Turing", 80: "Ampere", 89: "Ada Lovelace", 90: "Hopper"}


def random_codes(rng, shape, name, kind):
    """Random bytes [rows, K * size] of finite values; `kind` names what makes them difficult."""
    rows, k = shape
    if kind == "any code":  # subnormals, zeros of both signs, and the whole range of exponents
        raw = rng.integers(0, 256, (rows, k * SIZE[name]), dtype=np.uint8)
        tensor = torch.from_numpy(raw).view(DTYPE[name])
        finite = torch.isfinite(tensor.float())
        return torch.where(finite, tensor.float(), 0.0).to(DTYPE[name])
    values = rng.standard_normal(shape)
    if kind == "positive":
        values = np.abs(values)
    if kind == "spread":
        values *= 2.0 ** rng.integers(-12, 7, shape)
    if kind == "sparse":
        values *= rng.random(shape) < 0.15
    return torch.from_numpy(values).float().to(DTYPE[name])


def raw_bytes(tensor):
    return tensor.contiguous().view(torch.uint8).numpy()


def ours(a, a_name, b, b_name, c, *, k, instruction="wgmma", target=90, acc="f32", slow=False):
    d = _sim.mma(
        instruction, target, acc, raw_bytes(a), a_name, raw_bytes(b), b_name, c.float().numpy(), k,
        slow,
    )  # fmt: skip
    return torch.from_numpy(d)


def assert_same_bits(got, expected):
    got, expected = got.float(), expected.float()
    bits, wanted = got.view(torch.int32), expected.view(torch.int32)
    differ = (bits != wanted).nonzero()
    assert not len(differ), f"{len(differ)} of {got.numel()} differ, first at {differ[0].tolist()}"


KINDS = ["any code", "normal", "positive", "spread", "sparse"]
FP8_PAIRS = list(itertools.product(["e4m3", "e5m2"], repeat=2))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("a_name, b_name", FP8_PAIRS)
@pytest.mark.parametrize("preset", ["hopper", "ada"])
def test_fp8_chain_agrees_with_mmaemu(preset, a_name, b_name, kind):
    rng = np.random.default_rng(KINDS.index(kind))
    m, n, k = 64, 72, 256
    a, b = random_codes(rng, (m, k), a_name, kind), random_codes(rng, (n, k), b_name, kind)
    expected = chain.chain_gemm(
        a.view(torch.uint8), b.view(torch.uint8), fmt_a=a_name, fmt_b=b_name, preset=preset
    )
    instruction, target = {"hopper": ("wgmma", 90), "ada": ("mma.sync", 89)}[preset]
    c = torch.zeros(m, n)
    got = ours(a, a_name, b, b_name, c, k=32, instruction=instruction, target=target)
    assert_same_bits(got, expected)


@pytest.mark.parametrize("spread", [0, 4, 13, 14, 30, 120])
def test_fp8_takes_c_into_the_alignment(spread):
    rng = np.random.default_rng(spread)
    a, b = (
        random_codes(rng, (64, 32), "e4m3", "spread"),
        random_codes(rng, (8, 32), "e4m3", "any code"),
    )
    scale = 2.0 ** rng.integers(-spread, spread + 1, (64, 8)).astype(np.float64)
    c = torch.from_numpy((rng.standard_normal((64, 8)) * scale).astype(np.float32))
    expected = chain.dot(
        a[:, None].expand(64, 8, 32), b[None].expand(64, 8, 32), c, preset="hopper"
    )
    assert_same_bits(ours(a, "e4m3", b, "e4m3", c, k=32), expected)


WGMMA_CASES = [
    ("e4m3", "e5m2", "f32"), ("e4m3", "e4m3", "f16"), ("e5m2", "e4m3", "f16"),
    ("f16", "f16", "f32"), ("f16", "f16", "f16"), ("bf16", "bf16", "f32"), ("tf32", "tf32", "f32"),
]  # fmt: skip


def random_c(rng, shape, acc):
    """Addends C that affect rounding: zeros, subnormals, and numbers as large as the products."""
    c = rng.standard_normal(shape) * 2.0 ** rng.integers(-20, 6, shape)
    c *= rng.random(shape) < 0.8
    if acc == "f16":
        return torch.from_numpy(c).half()
    tiny = rng.random(shape) < 0.1
    return torch.from_numpy(np.where(tiny, c * 2.0**-126, c)).float()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("a_name, b_name, acc", WGMMA_CASES)
def test_wgmma_agrees_with_mmasim(a_name, b_name, acc, kind):
    rng = np.random.default_rng(KINDS.index(kind))
    k = 32 // SIZE[a_name]
    a, b = random_codes(rng, (64, k), a_name, kind), random_codes(rng, (24, k), b_name, kind)
    c = random_c(rng, (64, 24), acc)
    expected = WGMMA("Hopper", f"m64n24k{k}.{acc}.{a_name}.{b_name}")(a, b.T, c)
    assert_same_bits(ours(a, a_name, b, b_name, c, k=k, acc=acc), expected)


MMA_CASES = [
    (75, "f16", "f32", 8), (75, "f16", "f16", 8),
    (80, "f16", "f32", 16), (80, "f16", "f16", 16), (80, "f16", "f32", 8), (80, "bf16", "f32", 16),
    (80, "bf16", "f32", 8), (80, "tf32", "f32", 8), (89, "f16", "f32", 16), (89, "e4m3", "f32", 32),
    (89, "e5m2", "f16", 32), (89, "bf16", "f32", 16), (90, "f16", "f32", 16), (90, "f16", "f16", 8),
    (90, "bf16", "f32", 16), (90, "tf32", "f32", 8), (90, "tf32", "f32", 4),
]  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("target, name, acc, k", MMA_CASES)
def test_mma_sync_agrees_with_mmasim(target, name, acc, k, kind):
    rng = np.random.default_rng(KINDS.index(kind))
    a, b = random_codes(rng, (16, k), name, kind), random_codes(rng, (8, k), name, kind)
    c = random_c(rng, (16, 8), acc)
    expected = MMA(ARCH[target], f"m16n8k{k}.{acc}.{name}.{name}.{acc}")(a, b.T, c)
    got = ours(a, name, b, name, c, k=k, acc=acc, instruction="mma.sync", target=target)
    assert_same_bits(got, expected)


@pytest.mark.parametrize("acc", ["f32", "f16"])
@pytest.mark.parametrize("name", ["e4m3", "e5m2"])
def test_hopper_mma_sync_widens_fp8(name, acc):
    """The SASS of sm_90 is two HMMA.16816, for registers' low and high halves, and an FADD."""
    rng = np.random.default_rng(7)
    a, b = random_codes(rng, (16, 32), name, "spread"), random_codes(rng, (8, 32), name, "spread")
    c = random_c(rng, (16, 8), acc)
    hmma = MMA("Hopper", f"m16n8k16.{acc}.f16.f16.{acc}")
    low = torch.arange(32) % 4 < 2
    d = torch.zeros_like(c)
    for half in (low, ~low):
        d = hmma(a[:, half].half(), b[:, half].half().T, d)
    got = ours(a, name, b, name, c, k=32, acc=acc, instruction="mma.sync", target=90)
    assert_same_bits(got, c + d)


# Elements in which an H200 contradicted an earlier model (2026-11-26): instruction, formats of a, b
# and accumulator, non-zero codes of a and b by k, c, result.
MEASURED = [
    ("mma.sync", "e4m3", "e5m2", "f32", {14: (0x81, 0xEA), 29: (0x01, 0xB0), 31: (0xAB, 0x01)},
     "0x1.064ea8p+3", "0x1.c64c9cp+3"),
    ("mma.sync", "e4m3", "e5m2", "f32", {14: (0x81, 0xDE), 29: (0x01, 0x83), 31: (0xAB, 0xC2)},
     "-0x0p+0", "0x1.c7fffep+0"),
    ("mma.sync", "e4m3", "e5m2", "f32", {7: (0x02, 0x81), 18: (0x02, 0x60), 21: (0x4B, 0x8E)},
     "-0x1.1f368ap-18", "0x1.ff7bb6p+0"),
    ("mma.sync", "e5m2", "e4m3", "f32", {5: (0x81, 0x9D), 18: (0x60, 0x82)},
     "0x1.8afc1p-5", "-0x1.f3a806p+0"),
    ("mma.sync", "e5m2", "e4m3", "f32", {14: (0x29, 0xD1), 26: (0x03, 0x3B), 31: (0x70, 0x01)},
     "-0x0p+0", "0x1.f4c084p+3"),
    ("wgmma", "e5m2", "e5m2", "f16", {3: (0x12, 0x03), 8: (0xBB, 0x81)},
     "0x1.4p-20", "0x1.e8p-17"),
]  # fmt: skip


@pytest.mark.parametrize("case", MEASURED)
@pytest.mark.parametrize("slow", [False, True])
def test_measured_elements(case, slow):
    instruction, a_name, b_name, acc, codes, c, expected = case
    a, b = np.zeros((1, 32), np.uint8), np.zeros((1, 32), np.uint8)
    for k, (x, y) in codes.items():
        a[0, k], b[0, k] = x, y
    c = np.full((1, 1), float.fromhex(c), np.float32)
    got = _sim.mma(instruction, 90, acc, a, a_name, b, b_name, c, 32, slow)
    assert got.item().hex() == float.fromhex(expected).hex()


@pytest.mark.parametrize(
    "name, acc",
    [("e4m3", "f32"), ("e5m2", "f16"), ("f16", "f32"), ("f16", "f16"), ("bf16", "f32"),
     ("tf32", "f32")],
)  # fmt: skip
@pytest.mark.parametrize("kind", KINDS)
def test_fast_path_equals_the_definition(name, acc, kind):
    rng = np.random.default_rng(11)
    k = 32 // SIZE[name]
    a, b = random_codes(rng, (19, 4 * k), name, kind), random_codes(rng, (70, 4 * k), name, kind)
    c = random_c(rng, (19, 70), acc)
    fast = ours(a, name, b, name, c, k=k, acc=acc)
    assert_same_bits(fast, ours(a, name, b, name, c, k=k, acc=acc, slow=True))


@pytest.mark.parametrize("small, expected", [(1.0, 2.0**-149), (1.5, 0.0)])
@pytest.mark.parametrize("target, block, grid", [(80, 8, -156), (89, 8, -156), (90, 16, -158)])
def test_zeros_bound_the_alignment(target, block, grid, small, expected):
    """A zero C aligns to 2^-132 (sm_80, sm_89) or 2^-133 (sm_90): bits below `grid` are dropped.

    One large product and block - 1 small ones sum to about the smallest f32 subnormal. Small
    products of 2^grid are kept, and the sum reaches that subnormal. Products of 1.5 * 2^grid lose
    the 0.5, and the sum stays below it.
    """
    few = block - 1
    large = 2.0 ** (-149 - grid) - (few * 2 // 3 if small == 1.0 else few + few // 2 - 1)
    a, b = torch.full((1, block), 2.0 ** (grid + 90)), torch.full((1, block), 2.0**-90)
    a[0, 0] *= large
    a[0, 1:] *= small
    a, b = a.bfloat16(), b.bfloat16()
    c = torch.zeros(1, 1)
    got = ours(a, "bf16", b, "bf16", c, k=block, instruction="mma.sync", target=target)
    assert got.item() == expected
    if target == 90:
        assert_same_bits(ours(a, "bf16", b, "bf16", c, k=block), got)
    mma = MMA(ARCH[target], f"m16n8k{block}.f32.bf16.bf16.f32")
    assert_same_bits(got, mma(a.expand(16, -1), b.expand(8, -1).T, c.expand(16, 8))[:1, :1])


@pytest.mark.parametrize("target, unit", [(80, -45), (90, -47)])
def test_zeros_bound_the_alignment_of_f16(target, unit):
    """2^-25 is a tie in f16. The small addend breaks the tie unless the alignment drops the addend:
    to 2^-20 (sm_80) or 2^-21 (sm_90)."""
    for exponent, expected in ((unit, 0.0), (unit + 1, 2.0**-24)):
        a = torch.zeros(1, 8)
        b = torch.zeros(1, 8)
        a[0, 0], b[0, 0] = 2.0**-12, 2.0**-13
        a[0, 1], b[0, 1] = 2.0**-24, 2.0 ** (exponent + 24)
        a, b, c = a.half(), b.half(), torch.zeros(1, 1).half()
        got = ours(a, "f16", b, "f16", c, k=8, acc="f16", instruction="mma.sync", target=target)
        assert got.item() == expected
        if target == 90:
            assert_same_bits(ours(a, "f16", b, "f16", c, k=8, acc="f16"), got)
        mma = MMA(ARCH[target], "m16n8k8.f16.f16.f16.f16")
        assert_same_bits(got, mma(a.expand(16, -1), b.expand(8, -1).T, c.expand(16, 8))[:1, :1])


NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    "a0, b0, c, expected",
    [
        (NAN, 1, 1, NAN), (1, NAN, 1, NAN), (1, 1, NAN, NAN), (INF, 1, 1, INF), (-INF, 1, 1, -INF),
        (1, 1, INF, INF), (INF, -1, INF, NAN), (INF, 0, 1, NAN), (0, NAN, 0, NAN),
    ],
)  # fmt: skip
@pytest.mark.parametrize("acc", ["f32", "f16"])
def test_nan_and_infinity(a0, b0, c, expected, acc):
    a, b = torch.ones(2, 32), torch.ones(3, 32)
    a[0, 5], b[0, 5] = a0, b0
    addend = torch.ones(2, 3)
    addend[0, 0] = c
    got = ours(a.to(DTYPE["e5m2"]), "e5m2", b.to(DTYPE["e5m2"]), "e5m2", addend, k=32, acc=acc)
    assert got[1, 1] == 33  # this element involves no special value
    if np.isnan(expected):
        assert got[0, 0].view(torch.int32) == 0x7FFFFFFF
    else:
        assert got[0, 0] == expected


def test_zero_results_are_positive():
    a = torch.full((1, 32), -0.0).to(DTYPE["e4m3"])
    got = ours(a, "e4m3", a, "e4m3", torch.full((1, 1), -0.0), k=32)
    assert got.view(torch.int32).item() == 0
    one = torch.ones(1, 32)
    cancel = one.clone()
    cancel[0, ::2] = -1
    for acc in ("f32", "f16"):
        got = ours(one.to(DTYPE["e4m3"]), "e4m3", cancel.to(DTYPE["e4m3"]), "e4m3",
                   torch.zeros(1, 1), k=32, acc=acc)  # fmt: skip
        assert got.view(torch.int32).item() == 0


def test_accumulator_overflow():
    a = torch.full((1, 32), 448.0).to(DTYPE["e4m3"])
    got = ours(a, "e4m3", a, "e4m3", torch.tensor([[3.4e38]]), k=32)
    # Truncation to 13 fraction bits drops the products, which are far below C; C stays finite.
    assert got.item() == pytest.approx(3.4e38, rel=2**-13) and got.item() < 3.4e38
    got = ours(a, "e4m3", a, "e4m3", torch.zeros(1, 1), k=32, acc="f16")
    assert got.item() == INF


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("wgmma", 90, "f32", "f32"), r"wgmma.mma_async: inputs must be .*\(got f32 for f32\)"),
        (("wgmma", 90, "bf16", "f16"), r"wgmma.mma_async: inputs must be .*\(got bf16 for f16\)"),
        (("mma.sync", 80, "e4m3", "f32"), r"target must be sm_89 or later for FP8 \(got sm_80\)"),
        (("mma.sync", 75, "bf16", "f32"), r"rounding is modeled, .*\(got sm_75\)"),
    ],
)
def test_unsupported_combinations_are_refused(arguments, message):
    instruction, target, name, acc = arguments
    zeros = np.zeros((1, 32), np.uint8)
    with pytest.raises(ValueError, match=message):
        _sim.mma(
            instruction, target, acc, zeros, name, zeros, name, np.zeros((1, 1), np.float32), 4
        )


def test_a_gemm_takes_a_fraction_of_its_budget():
    """256x256x512 in FP8 costs 0.02 to 0.05 s on one core; the budget of the whole op is 1 s."""
    rng = np.random.default_rng(0)
    a, b = (random_codes(rng, (256, 512), "e4m3", "normal") for _ in range(2))
    start = time.process_time()
    ours(a, "e4m3", b, "e4m3", torch.zeros(256, 256), k=32)
    assert time.process_time() - start < 0.3
