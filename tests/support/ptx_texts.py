"""Small PTX texts for tests of grammar, modules and calls, which ptxas can check."""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from pathlib import Path

import numpy as np

from torchext import sim

HEADER = ".version 8.8\n.target sm_90a\n.address_size 64\n"
REGISTERS = (
    ".reg .pred %p<9>;\n.reg .b16 %h<9>;\n.reg .b32 %r<40>;\n.reg .f32 %f<9>;\n"
    ".reg .b64 %rd<20>;\n.reg .f64 %d<9>;\n"
)


def text_of(
    code: str, before: str = "", attributes: str = "", params: str = ".param .u64 out"
) -> str:
    """The text of a module with kernel `k`: %rd1 is the address `out`, %r1 the thread's number."""
    return (
        f"{HEADER}{before}\n.visible .entry k({params})\n{attributes}\n{{\n{REGISTERS}"
        f"ld.param.u64 %rd1, [out];\nmov.u32 %r1, %tid.x;\n{code}\nret;\n}}\n"
    )


def ptxas_accepts(text: str, arch: str = "sm_90a") -> str:
    """The messages of ptxas if it refuses the text; "" if it accepts it or is not installed."""
    ptxas = shutil.which("ptxas")
    if ptxas is None:
        return ""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "x.ptx"
        path.write_text(text)
        command = [ptxas, f"-arch={arch}", "-c", "-o", f"{folder}/x.o", str(path)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout + done.stderr if done.returncode else ""


def run(text: str | sim.Module, words: int = 32, dtype=np.uint32, **options):
    """Launches `k` on one buffer of `words` zeros; returns the report and the buffer."""
    out = np.zeros(words, dtype)
    module = sim.Module(text) if isinstance(text, str) else text
    report = module.launch("k", args=[out], **{"grid": 1, "block": 32, **options})
    return report, out


def value_of(code: str, before: str = "", dtype=np.uint32, **options):
    """The value that thread 0 leaves in %r2 (%rd2 for 8 bytes); asserts that there is no error."""
    wide = np.dtype(dtype).itemsize == 8
    store = "st.global.u64 [%rd1], %rd2;" if wide else "st.global.u32 [%rd1], %r2;"
    text = text_of(f"{code}\n{store}", before, **options)
    assert ptxas_accepts(text) == ""
    report, out = run(text, words=1, dtype=dtype, block=1)
    assert report.ok, str(report)
    return out[0]
