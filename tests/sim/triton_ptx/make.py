"""Compiles the Triton kernels whose PTX is beside this file. Needs no GPU:

    pip install triton==3.9.0
    python tests/sim/triton_ptx/make.py

`num_warps` is 4. Triton appends two pointers to every signature, for scratch memory.
"""

import os
from pathlib import Path

os.environ["TRITON_DISABLE_LINE_INFO"] = "1"  # no paths of this machine in the PTX

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource


@triton.jit
def softmax(x, out, n, block: tl.constexpr):
    row = tl.program_id(0)
    i = tl.arange(0, block)
    value = tl.load(x + row * n + i, i < n, -float("inf"))
    value = tl.exp(value - tl.max(value, 0))
    tl.store(out + row * n + i, value / tl.sum(value, 0), i < n)


@triton.jit
def matmul(a, b, c, m, n, k, bm: tl.constexpr, bn: tl.constexpr, bk: tl.constexpr):  # noqa: PLR0917
    """C = A @ B.T through tensor maps that the kernel makes itself."""
    row, column = tl.program_id(0) * bm, tl.program_id(1) * bn
    a_map = tl.make_tensor_descriptor(a, [m, k], [k, 1], [bm, bk])
    b_map = tl.make_tensor_descriptor(b, [n, k], [k, 1], [bn, bk])
    c_map = tl.make_tensor_descriptor(c, [m, n], [n, 1], [bm, bn])
    total = tl.zeros((bm, bn), tl.float32)
    for at in range(0, k, bk):
        total = tl.dot(a_map.load([row, at]), b_map.load([column, at]).T, total)
    c_map.store([row, column], total.to(c.dtype.element_ty))


def write(name: str, kernel, capability: int, constants: dict, **signature: str) -> None:
    signature |= dict.fromkeys(constants, "constexpr")
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants)
    built = triton.compile(source, target=GPUTarget("cuda", capability, 32))
    Path(__file__).with_name(f"{name}.ptx").write_text(built.asm["ptx"])
    print(f"{name}: {built.metadata.shared} bytes of shared memory")


if __name__ == "__main__":
    for capability in (80, 90):
        write(f"softmax_sm{capability}", softmax, capability, {"block": 1024},
              x="*fp32", out="*fp32", n="i32")  # fmt: skip
    tiles = {"bm": 64, "bn": 64, "bk": 64}
    sizes = {"m": "i32", "n": "i32", "k": "i32"}
    write("matmul_fp8_sm90", matmul, 90, tiles,
          a="*fp8e4nv", b="*fp8e4nv", c="*fp16", **sizes)  # fmt: skip
