"""Compiles the CPU kernels without torch, for this machine or for aarch64, and checks results.

    python tools/cross_check.py native      every level that this machine has
    python tools/cross_check.py asan        the same under ASan and UBSan
    python tools/cross_check.py aarch64     Debian's cross compiler; runs under qemu-user

The program is in tests/cross. For aarch64, the C++ sources of the ops that need torch are compiled
too, but neither linked nor run. Exit status: 0 if all results are right, 2 if a tool is missing.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# As in setup.py.
FLAGS = [
    "-std=c++17", "-fvisibility=hidden", "-Wall", "-Wextra", "-Werror",
    "-DTORCH_TARGET_VERSION=0x020a000000000000",
]  # fmt: skip
# No machine of ours has AMX: the program runs its kernels on an emulation of the instructions.
EMULATE_AMX = '-DTORCHEXT_EMULATED_AMX="tests/cross/emulated_amx.h"'
EMULATED = "csrc/gemm/cpu/amx.cpp"
KERNELS = ("csrc/gemm/cpu", "csrc/cpu")
NEED_TORCH = {"csrc/gemm/cpu/gemm_cpu.cpp", "csrc/gemm/cpu/activation.cpp"}
PROGRAM = "tests/cross"


@dataclass(frozen=True)
class Target:
    compiler: str
    flags: tuple[str, ...] = ("-O3",)
    runner: tuple[str, ...] = ()
    packages: str = ""  # of Debian, which have compiler and runner
    whole_library: bool = False  # also compile the sources that need torch
    of_build: bool = False  # link the objects of the library's build where they are current


SANITIZERS = ("-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined")
TARGETS = {
    "native": Target("c++", of_build=True),
    "asan": Target("c++", SANITIZERS),
    "aarch64": Target(
        "aarch64-linux-gnu-g++",
        runner=("qemu-aarch64", "-L", "/usr/aarch64-linux-gnu"),
        packages="g++-aarch64-linux-gnu qemu-user",
        whole_library=True,
    ),
}


def kernel_sources() -> list[Path]:
    """The kernels, which do not need torch, and the program that checks them."""
    found = [path for folder in (*KERNELS, PROGRAM) for path in (ROOT / folder).glob("*.cpp")]
    kernels = [path for path in found if str(path.relative_to(ROOT)) not in NEED_TORCH]
    return sorted([*kernels, ROOT / "csrc/runtime/cpu_level.cpp"])


def library_sources() -> list[Path]:
    """What a CPU-only build compiles (setup.py)."""
    patterns = ("csrc/*.cpp", "csrc/*/*.cpp", "csrc/*/cpu/*.cpp")
    found = {path for pattern in patterns for path in ROOT.glob(pattern)}
    return sorted(found - {ROOT / "csrc/runtime/cuda_device.cpp"})


def missing(target: Target) -> list[str]:
    """The programs that `target` needs and that this machine lacks."""
    return [name for name in (target.compiler, *target.runner[:1]) if shutil.which(name) is None]


def include_flags() -> list[str]:
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError("cross_check: torch must be installed: its headers are needed")
    torch = Path(spec.origin).parent / "include"
    return ["-I", str(ROOT), "-isystem", str(torch), "-isystem", sysconfig.get_path("include")]


def outdated(source: Path, output: Path, newest_header: float) -> bool:
    if not output.exists():
        return True
    return output.stat().st_mtime < max(newest_header, source.stat().st_mtime)


def built_objects(source: str) -> list[Path]:
    """Finds the objects that setup.py has compiled of a source, for any platform tag."""
    return sorted(ROOT.glob(f"build/temp.*/{Path(source).with_suffix('.o')}"))


def build(name: str, folder: Path) -> Path:
    """Compiles what changed, and links. Returns the program. Raises CalledProcessError."""
    target, includes = TARGETS[name], include_flags()
    folder.mkdir(parents=True, exist_ok=True)
    headers = [*(ROOT / "csrc").rglob("*.h"), *(ROOT / PROGRAM).glob("*.h"), Path(__file__)]
    newest = max(header.stat().st_mtime for header in headers)
    jobs, objects = [], []
    for source in kernel_sources():
        name = str(source.relative_to(ROOT))
        built = [] if not target.of_build or name == EMULATED else built_objects(name)
        current = [path for path in built if not outdated(source, path, newest)]
        objects.append(current[0] if current else folder / (name.replace("/", "_") + ".o"))
        if outdated(source, objects[-1], newest):
            jobs.append(["-c", str(source), "-o", str(objects[-1])])
    if target.whole_library:
        jobs += [["-fsyntax-only", str(s)] for s in library_sources() if s not in kernel_sources()]

    def compile_one(job: list[str]) -> None:
        run(target.compiler, *target.flags, *FLAGS, EMULATE_AMX, *includes, *job)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(compile_one, jobs))
    program = folder / "check"
    run(target.compiler, *target.flags, *map(str, objects), "-o", str(program))
    return program


def run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        print(shlex.join(command), done.stdout, done.stderr, sep="\n", file=sys.stderr)
        done.check_returncode()


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("target", choices=TARGETS)
    name = parser.parse_args(arguments).target
    target = TARGETS[name]
    if absent := missing(target):
        print(
            f"cross_check: {name} needs {', '.join(absent)} (Debian: apt-get install"
            f" {target.packages or 'g++'})",
            file=sys.stderr,
        )
        return 2
    try:
        program = build(name, ROOT / "build" / "cross" / name)
    except subprocess.CalledProcessError:
        return 1
    return subprocess.run([*target.runner, str(program)], check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
