"""Hardware, driver, versions and commit of a run. `python -m benchmarks.environment` prints them as
JSON."""

from __future__ import annotations

import argparse
import json
import platform
import re
import subprocess
import sys
from pathlib import Path

GPU_QUERY = (
    "driver_version,clocks.sm,clocks.mem,clocks.max.sm,clocks.max.mem,power.limit,power.draw,"
    "temperature.gpu,ecc.mode.current,persistence_mode"
)


def describe(device: str) -> dict:
    import torch

    facts: dict[str, object] = {
        "device": device,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda_of_torch": torch.version.cuda,
        "system": platform.platform(terse=True),
        "cpu": _cpu_model(),
        "cpu_threads": torch.get_num_threads(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "commit": _output("git", "rev-parse", "HEAD"),
        "uncommitted_changes": bool(
            _output("git", "status", "--porcelain", "--untracked-files=no")
        ),
    }
    facts |= _torchext()
    if device == "cuda":
        facts["gpu"] = _gpu()
    return facts


def _torchext() -> dict:
    try:
        import torchext
    except Exception as error:  # any error at import belongs in the results
        return {"torchext": None, "torchext_reason": f"{type(error).__name__}: {error}"}
    return {"torchext": torchext.__version__}


def gpu_name() -> str | None:
    """The name of GPU 0, found without torch and without starting CUDA; None if there is none."""
    return _output("nvidia-smi", "--query-gpu=name", "--format=csv,noheader", "--id=0")


def slug(name: str) -> str:
    """`name` as part of a folder's name: lower case, digits and hyphens."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def _gpu() -> dict:
    import torch

    if not torch.cuda.is_available():
        return {"reason": f"torch.cuda.is_available() is False (torch {torch.__version__})"}
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    gpu: dict[str, object] = {
        "name": properties.name,
        "compute_capability": f"{properties.major}.{properties.minor}",
        "sm_count": properties.multi_processor_count,
        "memory_bytes": properties.total_memory,
        "l2_bytes": properties.L2_cache_size,
    }
    answer = _output("nvidia-smi", f"--query-gpu={GPU_QUERY}", "--format=csv,noheader", "--id=0")
    if answer:
        values = [value.strip() for value in answer.split(",")]
        gpu |= dict(zip(GPU_QUERY.split(","), values, strict=True))
    return gpu


def _cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor()


def _output(*command: str) -> str | None:
    """The output of `command`, or None if it cannot run or fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    facts = describe(parser.parse_args().device)
    json.dump(facts, sys.stdout)
    print(flush=True)


if __name__ == "__main__":
    main()
