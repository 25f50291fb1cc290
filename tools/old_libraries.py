"""Makes what a linker needs to link for an older glibc and libstdc++ than this machine's.

A binary runs where every symbol version that it refers to exists. The linker refers to the newest
version of a symbol that it sees; glibc and libstdc++ keep all old ones. So `write_stubs` copies the
lists of symbols of this machine's libraries into empty libraries, without what is newer than a
manylinux policy allows: `-L` of their folder makes g++ link a binary for old systems.

What glibc 2.32 to 2.34 moved into libc.so.6 is put back into libpthread, libdl and librt. What
libstdc++ gained since is taken from libstdc++.a, as Red Hat's toolchains do.
"""

from __future__ import annotations

import re
import subprocess
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

# The versions of manylinux_2_28 (PEP 600; auditwheel's policies list them) and of GCC 8.
NEWEST = {"GLIBC": (2, 28), "GLIBCXX": (3, 4, 24), "CXXABI": (1, 3, 11), "GCC": (7, 0, 0)}
# Where glibc had symbols that it has since moved into libc.so.6, where they got a newer version.
OLD_HOMES = {
    "libpthread.so.0": r"(__)?(pthread|sem|tss|mtx|cnd|thrd)_|call_once",
    "libdl.so.2": r"dl",
    "librt.so.1": r"(shm|mq|timer|aio|lio)_",
}

# Names that a newer glibc has and an older one lacks. __libc_single_threaded = 0 means that there
# may be several threads. stat and lstat were static functions in an older glibc, and called
# __xstat and __lxstat with the version of the struct.
COMPAT = """
#define HIDDEN extern "C" __attribute__((visibility("hidden")))
HIDDEN char __libc_single_threaded = 0;
extern "C" int __xstat(int, const char*, void*);
extern "C" int __lxstat(int, const char*, void*);
constexpr int kVersion = 1;  // of x86-64
HIDDEN int old_stat(const char*, void*) __asm__("stat");
HIDDEN int old_lstat(const char*, void*) __asm__("lstat");
int old_stat(const char* path, void* to) { return __xstat(kVersion, path, to); }
int old_lstat(const char* path, void* to) { return __lxstat(kVersion, path, to); }
"""


@dataclass(frozen=True)
class Symbol:
    name: str
    version: str
    default: bool
    kind: str
    size: int


def number(version: str) -> tuple[str, tuple[int, ...]] | None:
    """("GLIBC", (2, 34)) of GLIBC_2.34; None for private and other versions."""
    match = re.fullmatch(r"([A-Z]+)_([\d.]+)", version)
    return (match[1], tuple(map(int, match[2].split(".")))) if match else None


def is_old(version: str) -> bool:
    found = number(version)
    return found is not None and found[0] in NEWEST and found[1] <= NEWEST[found[0]]


def too_new(library: Path) -> list[str]:
    """The symbols that a binary takes from glibc or libstdc++ and that older releases lack.

    These are symbols with a version that NEWEST forbids, and symbols without a version: the linker
    found them in no library, but this machine's libraries have them.
    """
    output = _run("readelf", "--dyn-syms", "-W", str(library))
    here = {
        symbol.name
        for soname in ("libc.so.6", "libm.so.6", "libstdc++.so.6")
        for symbol in _symbols(_run("readelf", "--dyn-syms", "-W", _path(soname)))
    } | {"atexit"}
    found = defaultdict(set)
    for binding, name, version in re.findall(
        r" (GLOBAL|WEAK) +DEFAULT +UND ([^\s@]+)(?:@+(\S+))?", output
    ):
        if not version and binding == "GLOBAL" and name in here:
            found["no version"].add(name)
        elif (number(version) or ("",))[0] in NEWEST and not is_old(version):
            found[version].add(name)
    return [f"{version}: {', '.join(sorted(names))}" for version, names in sorted(found.items())]


def write_stubs(folder: Path) -> None:
    """Writes the libraries into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    members: dict[str, list[Symbol]] = {"libc.so.6": [], **{soname: [] for soname in OLD_HOMES}}
    for symbol, moved in _chosen("libc.so.6"):
        homes = [soname for soname, names in OLD_HOMES.items() if re.match(names, symbol.name)]
        members[homes[0] if moved and homes else "libc.so.6"].append(symbol)
    for soname in ("libm.so.6", "libstdc++.so.6"):
        members[soname] = [symbol for symbol, _ in _chosen(soname)]
    for soname, symbols in members.items():
        _library(folder, soname, symbols)
    compat = folder / "compat.o"
    (folder / "compat.cpp").write_text(COMPAT)
    _run("g++", "-O2", "-fPIC", "-c", str(folder / "compat.cpp"), "-o", str(compat))
    _run("ar", "rc", str(folder / "libcompat.a"), str(compat))
    loader = _path("ld-linux-x86-64.so.2")
    static = f"{_path('libc_nonshared.a')} libcompat.a"  # atexit is nowhere else
    scripts = {
        "libc.so": f"libc.so.6 {' '.join(OLD_HOMES)} {static} AS_NEEDED({loader})",
        "libm.so": "libm.so.6",
        "libstdc++.so": f"libstdc++.so.6 {_path('libstdc++.a')} libcompat.a",
        "libpthread.so": "libpthread.so.0",
        "libdl.so": "libdl.so.2",
        "librt.so": "librt.so.1",
    }
    for name, text in scripts.items():
        files = " ".join(
            str(folder / each) if (folder / each).exists() else each for each in text.split()
        )
        (folder / name).write_text(f"GROUP({files})\n")


def _chosen(soname: str) -> list[tuple[Symbol, bool]]:
    """The newest version of each name that is old enough, and whether there is a newer one."""
    by_name: dict[str, list[Symbol]] = defaultdict(list)
    for symbol in _symbols(_run("readelf", "--dyn-syms", "-W", _path(soname))):
        by_name[symbol.name].append(symbol)
    found = []
    for symbols in by_name.values():
        old = [each for each in symbols if is_old(each.version)]
        if old:
            newest = max(old, key=lambda each: number(each.version) or ("", ()))
            found.append((newest, not newest.default))
    return found


def _symbols(listing: str) -> list[Symbol]:
    pattern = re.compile(
        r"^ *\d+: \w+ +(0x[0-9a-f]+|\d+) +(FUNC|IFUNC|OBJECT|TLS|NOTYPE) +(?:GLOBAL|WEAK|UNIQUE) +"
        r"DEFAULT +(?:\[.*\] +)?(?!UND)\w+ (\S+?)(@@?)(\S+)",
        re.MULTILINE,
    )
    return [
        Symbol(name, version, at == "@@", kind, int(size, 0))
        for size, kind, name, at, version in pattern.findall(listing)
    ]


def _library(folder: Path, soname: str, symbols: list[Symbol]) -> None:
    kinds = {"OBJECT": "object", "TLS": "tls_object"}
    sections = {"OBJECT": ".data", "TLS": '.tdata,"awT"'}
    lines = []
    for index, symbol in enumerate(symbols):
        label = f"stub_{index}"
        lines += [
            f".section {sections.get(symbol.kind, '.text')}",
            f".globl {label}",
            f".type {label},%{kinds.get(symbol.kind, 'function')}",
            f".size {label},{symbol.size}",
            f"{label}: .zero {max(symbol.size if symbol.kind in kinds else 4, 4)}",
            f".symver {label},{symbol.name}@@{symbol.version},remove",
        ]
    lines.append('.section .note.GNU-stack,"",%progbits')
    source, script = folder / f"{soname}.s", folder / f"{soname}.map"
    source.write_text("\n".join(lines) + "\n")
    versions = sorted({symbol.version for symbol in symbols})
    script.write_text("".join(f"{version} {{ }};\n" for version in versions))
    _run(
        "g++", "-shared", "-nostdlib", "-x", "assembler", str(source), f"-Wl,-soname,{soname}",
        f"-Wl,--version-script={script}", "-o", str(folder / soname),
    )  # fmt: skip


def _path(file: str) -> str:
    return str(Path(_run("g++", f"-print-file-name={file}").strip()).resolve())


def _run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{done.stdout}{done.stderr}")
    return done.stdout
