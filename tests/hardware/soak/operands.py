"""What the soak's jobs share: the device, sizes, operands, guarded outputs, comparisons."""

from __future__ import annotations

import random
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.problems import dequantize as dequantized
from benchmarks.problems import round_up
from benchmarks.selection import Product, Selection

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
GUARD = 0x5A  # each byte of memory that no kernel may write
GROUP = 128
Outputs = tuple[Tensor, ...]


@dataclass
class Lab:
    """The device on which jobs run, and its limits.

    exact: whether a GEMM of some rows has the same bits as those rows of the whole GEMM. Not on the
    CPU, whose BLAS chooses the order of its sums by the shape.
    """

    device: str  # cpu, sim or cuda
    selection: Selection
    sm_count: int = 132
    without: frozenset[str] = frozenset()  # makers whose ops have no kernels here

    @property
    def torch_device(self) -> str:
        return "cuda" if self.device == "cuda" else "cpu"

    @property
    def exact(self) -> bool:
        return self.device != "cpu"

    @property
    def largest(self) -> tuple[int, int, int]:
        """The largest M, N and K."""
        return {"sim": (200, 280, 1400), "cpu": (300, 300, 600)}.get(
            self.device, (8192, 8192, 8192)
        )

    @property
    def macs(self) -> int:
        """The most multiply-adds in a job, so that many jobs run."""
        return {"sim": 1 << 23, "cpu": 1 << 26}.get(self.device, 1 << 36)


# ---- sizes and operands ----

EDGES = (1, 2, 7, 8, 15, 16, 17, 31, 33, 63, 64, 65, 96, 127, 128, 129, 192, 255, 256, 257, 384,
         576, 768, 1536, 2112, 4096, 7168)  # fmt: skip


def size(rng: random.Random, most: int) -> int:
    edges = [edge for edge in EDGES if edge <= most]
    return rng.choice(edges) if rng.random() < 0.5 else rng.randint(1, most)


def shape(lab: Lab, rng: random.Random, even_n: bool = False) -> tuple[int, int, int]:
    while True:
        m, n, k = (size(rng, most) for most in lab.largest)
        n += even_n and n % 2
        if m * n * k <= lab.macs:
            return m, n, k


def sms(lab: Lab, rng: random.Random) -> int:
    return rng.choice((0, 0, 1, 2, 3, rng.randint(1, lab.sm_count), lab.sm_count))


def fp8(lab: Lab, rows: int, k: int, dtype: torch.dtype) -> Tensor:
    """Random data [rows, k], with the row pitch of the quantizers' results."""
    x = torch.randn(rows, round_up(max(k, 1), 16), device=lab.torch_device)
    return x.mul_(2).to(dtype)[:, :k]


def positive(lab: Lab, *size: int) -> Tensor:
    return torch.rand(*size, device=lab.torch_device).add_(0.5).mul_(2.0**-4)


def group_scale(lab: Lab, rows: int, k: int) -> Tensor:
    """Random 1x128 scales, M-major."""
    groups = -(-k // GROUP)
    return positive(lab, groups, round_up(rows, 4)).t()[:rows]


@dataclass
class Operands:
    """Quantized operands. b: a matrix, or one matrix for each group. granularity: "1d2d", "1d1d" or
    "rowwise"."""

    granularity: str
    a: Tensor
    a_scale: Tensor
    b: Tensor
    b_scale: Tensor

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.a, self.a_scale, self.b, self.b_scale

    def of_rows(self, rows: Tensor | slice, group: int) -> Operands:
        """Operands of a separate GEMM: some rows of a and one matrix of b, in fresh layouts."""
        # Clones are aligned: for K <= 128, row-wise scales have the shape of 1x128 scales, which
        # must be aligned.
        a_scale, b_scale = self.a_scale[rows].clone(), self.b_scale[group].clone()
        if self.granularity != "rowwise":
            a_scale = m_major(a_scale)
        if self.granularity == "1d1d":
            b_scale = m_major(b_scale)
        return Operands(self.granularity, pitched(self.a[rows]), a_scale, self.b[group], b_scale)

    def product_of(self, num_sms: int, out_dtype: torch.dtype, accumulate: bool) -> Product:
        """The Product by which the library chooses a kernel."""
        (m, k), n = self.a.shape, self.b.shape[-2]
        return Product(
            m, n, k, self.granularity, self.a.dtype, self.b.dtype, num_sms, out_dtype, accumulate
        )

    def product(self) -> Tensor:
        """The product of the dequantized operands, in float64."""
        a = dequantized(self.a, self.a_scale, torch.float64)
        return a @ dequantized(self.b, self.b_scale, torch.float64).t()


def pitched(data: Tensor) -> Tensor:
    rows, k = data.shape
    fresh = torch.zeros(rows, round_up(max(k, 1), 16), dtype=torch.uint8, device=data.device).view(
        data.dtype
    )[:, :k]
    fresh.view(torch.uint8)[:, :] = data.view(torch.uint8)
    return fresh


def m_major(scale: Tensor) -> Tensor:
    rows, groups = scale.shape
    return scale.new_ones(groups, round_up(rows, 4)).t()[:rows].copy_(scale)


def operands(
    lab: Lab,
    rng: random.Random,
    size: tuple[int, int, int],
    granularity: str,
    groups: int | None = None,
) -> Operands:
    m, n, k = size
    a_dtype, b_dtype = (rng.choice((E4M3, E4M3, E5M2)) for _ in range(2))
    a = fp8(lab, m, k, a_dtype)
    b = fp8(lab, n * (groups or 1), k, b_dtype)
    blocks = -(-n // GROUP), -(-k // GROUP)
    if granularity == "rowwise":
        a_scale = positive(lab, m, 1)
        b_scale = positive(lab, n * (groups or 1), 1)
    else:
        a_scale = group_scale(lab, m, k)
        if granularity == "1d2d":
            b_scale = positive(lab, blocks[0] * (groups or 1), blocks[1])
        else:
            b_scale = group_scale(lab, n * (groups or 1), k)
    if groups is not None:
        b, b_scale = b.unflatten(0, (groups, n)), b_scale.unflatten(0, (groups, -1))
    return Operands(granularity, a, a_scale, b, b_scale)


def draw_granularity(rng: random.Random) -> str:
    return rng.choice(("1d2d", "1d2d", "1d1d", "rowwise"))


# ---- outputs between guards ----


class Guarded:
    """An output between guard rows, with a row pitch that may exceed its columns. Kernels must not
    write to the guard rows or between the rows."""

    def __init__(self, lab: Lab, rng: random.Random, size: tuple[int, ...], dtype: torch.dtype):
        *self.batch, self.rows, self.columns = size
        self.dtype, self.device = dtype, lab.torch_device
        step = 16 // dtype.itemsize
        # Two pitches that TMA can store to, and one that it cannot.
        self.pitch = round_up(self.columns, step) + rng.choice((0, step, 1))
        count = self.rows
        for number in self.batch:
            count *= number
        self.count = count

    def fresh(self) -> tuple[Tensor, Tensor]:
        """(a new output, all of its memory), every byte GUARD."""
        size = (self.count + 2) * self.pitch * self.dtype.itemsize + 16
        memory = torch.full((size,), GUARD, dtype=torch.uint8, device=self.device)
        flat = memory[: size - 16].view(self.dtype).view(self.count + 2, self.pitch)
        out = flat[1:-1, : self.columns]
        return (out.unflatten(0, (*self.batch, self.rows)) if self.batch else out), memory

    def filled(self, values: Tensor) -> Tensor:
        """All of the memory that a correct call leaves with `values` in the output."""
        out, memory = self.fresh()
        out.copy_(values)
        return memory


# ---- names and comparison ----


def short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def kinds(given: Operands) -> str:
    return " x ".join("e5m2" if x.dtype == E5M2 else "e4m3" for x in (given.a, given.b))


def describe(x: Tensor) -> str:
    return f"{short(x.dtype)} {tuple(x.shape)} strides {x.stride()}"


def bits(x: Tensor) -> Tensor:
    wide = {1: torch.uint8, 2: torch.int16, 4: torch.int32}
    return x.contiguous().view(wide[x.element_size()])


def differing(got: Outputs, want: Outputs) -> str | None:
    """A message that says what differs, or None. A NaN equals every other NaN."""
    if len(got) != len(want):
        return f"{len(got)} outputs, expected {len(want)}"
    for number, (x, y) in enumerate(zip(got, want, strict=True)):
        if x.shape != y.shape or x.dtype != y.dtype:
            return (
                f"output {number}: {x.dtype} {tuple(x.shape)}, expected {y.dtype} {tuple(y.shape)}"
            )
        unequal = bits(x) != bits(y)
        if x.is_floating_point():
            unequal &= ~(torch.isnan(x.float()) & torch.isnan(y.float()))
        count = int(unequal.sum())
        if count:
            place = tuple(unequal.nonzero()[0].tolist())
            return (
                f"output {number}: {count} of {x.numel()} elements differ, the first at {place}:"
                f" {x[place].item()}, expected {y[place].item()}"
            )
    return None
