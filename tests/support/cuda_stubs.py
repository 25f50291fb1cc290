"""Makes a CUDA build of torch importable on a machine without CUDA's gigabytes of libraries.

torch's own libraries are linked to cuBLAS, cuDNN and others, and the loader requires every symbol
that they name. `write_stubs` builds shared libraries with those sonames, symbols and symbol
versions. Every function in them returns the error "no device". That is enough: on the CPU, torch
asks CUDA for nothing more than whether there is a device.
"""

from __future__ import annotations

import re
import subprocess
from collections import defaultdict
from pathlib import Path

CUDA_LIBRARY = re.compile(r"lib(cu|nccl|nv)")


def _run(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def write_stubs(torch_lib: Path, folder: Path) -> None:
    """Builds, in `folder`, a stub for each CUDA library that the libraries in `torch_lib` need."""
    folder.mkdir(parents=True, exist_ok=True)
    libraries = sorted(torch_lib.glob("*.so*"))
    present = {library.name for library in libraries}
    needed: set[str] = set()
    undefined: set[str] = set()
    library_of_version: dict[str, str] = {}
    for library in libraries:
        needed.update(re.findall(r"NEEDED.*\[(.*)\]", _run("readelf", "-dW", str(library))))
        nm = _run("nm", "-D", "--undefined-only", str(library))
        undefined.update(line.split()[-1] for line in nm.splitlines())
        owner = None
        for line in _run("readelf", "-VW", str(library)).splitlines():
            if match := re.search(r"File: (\S+)", line):
                owner = match[1]
            elif (match := re.search(r"Name: (\S+)\s+Flags", line)) and owner:
                library_of_version[match[1]] = owner
    missing = sorted(n for n in needed if CUDA_LIBRARY.match(n) and n not in present)

    symbols: dict[str, dict[str | None, set[str]]] = {n: defaultdict(set) for n in missing}
    for version, owner in library_of_version.items():
        if owner in symbols:
            symbols[owner][version] = set()
    for symbol in undefined:
        name, _, version = symbol.partition("@")
        if library_of_version.get(version) in symbols:
            symbols[library_of_version[version]][version].add(name)
        elif not version and re.match(r"cu|nccl|nv", name):
            symbols[missing[0]][None].add(name)  # has no version: any stub may define it
    for name, versions in symbols.items():
        _build(folder, name, versions)


def _build(folder: Path, soname: str, versions: dict[str | None, set[str]]) -> None:
    names = sorted(set().union(*versions.values())) if versions else []
    source, script = folder / "stub.s", folder / "stub.map"
    body = "".join(f".globl {n}\n.type {n},@function\n{n}: {_answer(n)}\n" for n in names)
    source.write_text(
        f'.text\n{body}text: .asciz "no device: a stub"\n.section .note.GNU-stack,"",@progbits\n'
    )
    named = {v: sorted(ns) for v, ns in versions.items() if v is not None}
    script.write_text(
        "".join(f"{v} {{ global: {' '.join(n + ';' for n in ns)} }};\n" for v, ns in named.items())
    )
    flags = [f"-Wl,--version-script={script}"] if named else []
    output = str(folder / soname)
    _run(
        "gcc", "-shared", "-nostdlib", f"-Wl,-soname,{soname}", *flags, "-o", output, str(source)
    )  # fmt: skip


def _answer(function: str) -> str:
    if re.search(r"GetError(String|Name)$", function):
        return "leaq text(%rip), %rax; ret"
    return "movl $100, %eax; ret"  # cudaErrorNoDevice, CUDA_ERROR_NO_DEVICE
