"""Prints what a bug report needs: `python -m torchext.collect_env`.

It first prints facts about torchext: version, folder, what works on this machine and why, the
architectures whose PTX was built, environment variables, and the nvcc that the simulator uses. Then
it prints torch's report on torch, driver, GPUs and CPU (torch.utils.collect_env). It launches no
kernel.

If `import torchext` itself fails, run this file: `python .../torchext/collect_env.py`.
"""

from __future__ import annotations

import os
import sys
import traceback
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent
# Variables that change how torchext is built or run.
VARIABLES = ("TORCHEXT_", "CUDA_HOME", "CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS", "LD_PRELOAD")


def facts() -> dict[str, str]:
    """{name: fact about torchext, as text}."""
    result = {"python": sys.version.split()[0], "folder": str(PACKAGE)}
    library = PACKAGE / "_C.so"
    result["op library"] = f"{library.stat().st_size:,} bytes" if library.is_file() else "missing"
    built = sorted(path.name for path in PACKAGE.glob("_ptx/*") if any(path.glob("*.ptx.gz")))
    result["PTX for"] = ", ".join(f"sm_{name}" for name in built) or "no GPU (built without nvcc)"
    extensions = sorted(path.name for path in PACKAGE.glob("_sim.*") if path.suffix == ".so")
    result["simulator"] = ", ".join(extensions) or "missing"
    try:
        import torchext
    except Exception:  # printed: this report must also describe a failing import
        result["import"] = traceback.format_exc().strip()
        return result
    from torchext._architectures import built_paths

    result["torchext"] = torchext.__version__
    result["GEMM kernels"] = ", ".join(built_paths()) or "those of the CPU"
    for feature, answer in torchext.is_available().items():
        result[f"available: {feature}"] = str(answer)
    result["nvcc"] = _nvcc()
    return result


def _nvcc() -> str:
    try:
        from torchext.sim import compiler
    except ImportError as error:
        return str(error)
    try:
        return str(compiler.find_nvcc())
    except compiler.CompileError as error:
        return str(error)


def variables() -> dict[str, str]:
    """{name: value} of the environment variables that affect torchext and are set, by name."""
    return {name: value for name, value in sorted(os.environ.items()) if name.startswith(VARIABLES)}


def report() -> str:
    """The whole text that `python -m torchext.collect_env` prints."""
    from torch.utils.collect_env import get_pretty_env_info

    lines = ["torchext"]
    lines += [f"  {name}: {value}" for name, value in facts().items()]
    lines += ["environment"]
    lines += [f"  {name}={value}" for name, value in variables().items()] or ["  (none set)"]
    return "\n".join([*lines, "", get_pretty_env_info()])


if __name__ == "__main__":
    print(report())
