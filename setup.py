"""Builds torchext with torch's cpp_extension.

There are two extension modules. `torchext._C` has the ops. It uses LibTorch's stable ABI and no
Python API, so one binary serves every torch >= 2.10 and every Python. It contains the CUDA kernels
if nvcc is found. `torchext._sim` has the Python objects of the PTX simulator. It uses pybind11 and
serves only the Python that built it. The build also adds the PTX of every kernel
(torchext/_ptx/ARCHITECTURE) and the ptx/isa headers (torchext/include) to the package.

TORCHEXT_ARCHS names the GPUs to build kernels for, such as "90a"; without it, all
(csrc/build/generations.py). Two environment variables are for developers. TORCHEXT_WERROR=1 asks
for more warnings, of nvcc and its host compiler too, and makes them errors: the Makefile sets it; a
user's compiler may warn of more than ours. TORCHEXT_SANITIZE, "address" or "thread", builds for the
CPU alone, with GCC's sanitizers; "thread" builds the simulator only.
"""

import gzip
import os
import shutil
import sys
import sysconfig
from pathlib import Path

import pybind11
from setuptools import Extension, find_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel
from torch.utils import cpp_extension

ROOT = Path(__file__).parent.resolve()
sys.path.insert(0, str(ROOT / "csrc" / "build"))

import generations  # noqa: E402
from nvcc import BY_FOLDER, is_outdated  # noqa: E402
from toolchain import find_toolkit  # noqa: E402

SANITIZE = os.environ.get("TORCHEXT_SANITIZE", "")
TOOLKIT = None if SANITIZE else find_toolkit()
GENERATIONS = generations.parse(os.environ.get(generations.VARIABLE, ""))
# torch 2.10 is the oldest release that can load the binary.
STABLE_ABI = "-DTORCH_TARGET_VERSION=0x020a000000000000"
SANITIZERS = {
    "": [],
    "address": ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"],
    # As calls, because GCC does not instrument the code it writes in place of them.
    "thread": [
        "-fsanitize=thread",
        *(f"-fno-builtin-{name}" for name in ("memcpy", "memmove", "memset", "memcmp")),
    ],
}[SANITIZE]
COMMON = [] if SANITIZE else ["-O3", "-g0"]
COMMON += ["-std=c++17", "-fvisibility=hidden", "-Wall"]
NVCC_WARNINGS: list[str] = []
if os.environ.get("TORCHEXT_WERROR") == "1":
    # Our code only: to GCC, a folder that is also given with -isystem is the system's.
    system = []
    for folder in (
        *cpp_extension.include_paths(),
        pybind11.get_include(),
        *map(sysconfig.get_path, ("include", "platinclude")),
        *([] if TOOLKIT is None else [str(TOOLKIT.home / "include")]),
    ):
        system += ["-isystem", folder]
    COMMON += ["-Wextra", *system, "-Werror"]
    NVCC_WARNINGS = ["-Xcompiler", "-Wall,-Wextra,-Werror", "-Werror=all-warnings", *system]
else:
    COMMON.append("-Wno-unused-function")
if SANITIZE:
    COMMON += ["-Og", "-g1", "-fno-omit-frame-pointer", *SANITIZERS]  # -O1 compiles twice as long


def sources(*patterns: str) -> list[str]:
    return sorted(str(p.relative_to(ROOT)) for pattern in patterns for p in ROOT.glob(pattern))


def op_library() -> Extension:
    files = sources("csrc/*.cpp", "csrc/*/*.cpp", "csrc/*/cpu/*.cpp")
    cxx = [*COMMON, STABLE_ABI]
    nvcc = []
    include_dirs = [str(ROOT)]
    link = ["-Wl,--no-as-needed", "-ltorch", *SANITIZERS]
    if TOOLKIT is None:
        files.remove("csrc/runtime/cuda_device.cpp")
        print("torchext: no nvcc found: building for the CPU only", file=sys.stderr)
    else:
        files = sources("csrc/*.cpp", "csrc/*/*.cpp", "csrc/*/*/*.cpp", "csrc/*/*/*.cu")
        files = [each for each in files if generations.needs(each, GENERATIONS)]
        cxx.append("-DTORCHEXT_CUDA")
        nvcc = [
            "-O3",
            "-std=c++17",
            "-lineinfo",
            # Line numbers stay in the PTX, for the simulator. In machine code they would be three
            # quarters of the bytes.
            "-Xptxas=--suppress-debug-info",
            "--compress-mode=size",
            STABLE_ABI,
            "-DTORCHEXT_CUDA",
            BY_FOLDER,
            *NVCC_WARNINGS,
        ]
        include_dirs.append(str(TOOLKIT.home / "include"))
        link += [f"-L{TOOLKIT.library_dir}", "-lcudart_static", "-ldl", "-lrt", "-lpthread"]
    return cpp_extension.CppExtension(
        "torchext._C",
        files,
        include_dirs=include_dirs,
        extra_compile_args={"cxx": cxx, "nvcc": nvcc},
        extra_link_args=link,
        py_limited_api=True,  # does not link libtorch_python
    )


def simulator() -> Extension:
    return Extension(
        "torchext._sim",
        sources("ptx/sim/*/*.cpp"),
        include_dirs=[str(ROOT), pybind11.get_include()],
        extra_compile_args={"cxx": COMMON},
        extra_link_args=SANITIZERS,
        language="c++",
    )


class BuildExtension(cpp_extension.BuildExtension):
    """torch's build_ext, with the wrapper csrc/build/nvcc.py as nvcc and with the data files."""

    def build_extensions(self) -> None:
        os.environ.setdefault("MAX_JOBS", str(os.cpu_count()))
        os.environ.setdefault("NINJA_STATUS", "torchext: file %f of %t, after %e s: ")
        if TOOLKIT is not None:
            # A CPU-only torch leaves this None, even if the environment sets CUDA_HOME.
            cpp_extension.CUDA_HOME = str(TOOLKIT.home)
            os.environ["TORCHEXT_NVCC"] = str(TOOLKIT.nvcc)
            # The arguments are part of each command, so that ninja compiles anew if they change.
            wrapper = "nvcc.py"
            if GENERATIONS != generations.EVERY:
                wrapper = f"generations.py {','.join(map(str, GENERATIONS))}"
                chosen = ", ".join(f"sm_{number}" for number in GENERATIONS)
                print(
                    f"torchext: {generations.VARIABLE}: CUDA kernels for {chosen}", file=sys.stderr
                )
            os.environ["PYTORCH_NVCC"] = f"{sys.executable} {ROOT / 'csrc' / 'build'}/{wrapper}"
        self._remove_outdated_kernels()
        super().build_extensions()
        package = Path(self.build_lib) / "torchext"
        headers = package / "include" / "ptx" / "isa"
        shutil.rmtree(headers, ignore_errors=True)
        shutil.copytree(ROOT / "ptx" / "isa", headers)
        shutil.rmtree(package / "_ptx", ignore_errors=True)
        for source in self._kernel_sources():
            kernels = Path(self.build_temp) / source
            for ptx in kernels.parent.glob(f"{kernels.stem}.*.ptx"):  # NAME.90a.ptx
                _, architecture, _ = ptx.name.rsplit(".", 2)
                folder = package / "_ptx" / architecture
                folder.mkdir(parents=True, exist_ok=True)
                target = folder / f"{kernels.parents[1].name}_{kernels.stem}.ptx.gz"
                assert not target.exists(), f"two sources would leave {target}"
                target.write_bytes(gzip.compress(ptx.read_bytes(), 6, mtime=0))

    def copy_extensions_to_source(self) -> None:  # build_ext --inplace
        super().copy_extensions_to_source()
        ptx = Path(self.build_lib) / "torchext" / "_ptx"
        shutil.rmtree(ROOT / "torchext" / "_ptx", ignore_errors=True)
        if ptx.exists():
            shutil.copytree(ptx, ROOT / "torchext" / "_ptx")

    def _kernel_sources(self) -> list[str]:
        every = (source for extension in self.extensions for source in extension.sources)
        return [source for source in every if source.endswith(".cu")]

    def _remove_outdated_kernels(self) -> None:
        """Removes objects of .cu files that are older than a header they include or than the nvcc
        wrapper. A CPU-only torch does not tell ninja about these headers."""
        for source in self._kernel_sources():
            obj = (Path(self.build_temp) / source).with_suffix(".o")
            if obj.exists() and is_outdated(obj):
                obj.unlink()

    def get_ext_filename(self, name: str) -> str:
        # The op library does not use Python's ABI, so its file name does not contain one. The name
        # comes with the package (for copies) or without it (for the linker's output).
        *package, module = name.split(".")
        if module == "_C":
            return os.path.join(*package, "_C.so")
        return super().get_ext_filename(name)


class BinaryWheel(bdist_wheel):
    """One wheel for every Python, although torchext._sim needs the Python that built it."""

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


setup(
    packages=find_packages(include=["torchext", "torchext.*"]),
    package_data={"torchext": ["py.typed", "_sim.pyi"]},
    ext_modules=[simulator()] if SANITIZE == "thread" else [op_library(), simulator()],
    cmdclass={"build_ext": BuildExtension, "bdist_wheel": BinaryWheel},
)
