"""Reads what sass_report.py needs from ELF files: cubins, and the op library.

The layouts are those of ELF-64 in the System V ABI. The attributes of kernels in a cubin are those
that `cuobjdump -elf` shows.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

R_X86_64_RELATIVE, R_AARCH64_RELATIVE = 8, 1027
SHT_RELA, SHT_NOBITS = 4, 8
# EIATTR_*: attributes in a section .nv.info. A tag is followed by nothing, one byte, two bytes, or
# a size and that many bytes (SIZED).
MAX_THREADS, FRAME_SIZE, REGISTERS = 0x05, 0x11, 0x2F
SIZED = 0x04


@dataclass(frozen=True)
class Section:
    name: str
    kind: int
    address: int
    offset: int
    size: int
    data: bytes
    link: int


class Elf:
    def __init__(self, image: bytes):
        if image[:5] != b"\x7fELF\x02":
            raise ValueError(f"Elf: image must be a 64-bit ELF file (got {image[:5]!r})")
        (table,) = struct.unpack_from("<Q", image, 40)
        entry, count, names = struct.unpack_from("<HHH", image, 58)
        headers = [struct.unpack_from("<IIQQQQII", image, table + entry * i) for i in range(count)]
        strings = headers[names][4]
        self.sections: list[Section] = []
        for name, kind, _, address, offset, size, link, _ in headers:
            data = b"" if kind == SHT_NOBITS else image[offset : offset + size]
            text = string_at(image, strings + name)
            self.sections.append(Section(text, kind, address, offset, size, data, link))
        self.by_name = {section.name: section for section in self.sections}

    def symbol_names(self) -> list[str]:
        """The names of all symbols, by the index that `.nv.info` uses."""
        table = self.by_name[".symtab"]
        strings = self.sections[table.link].data
        offsets = (struct.unpack_from("<I", table.data, at)[0] for at in range(0, table.size, 24))
        return [string_at(strings, offset) for offset in offsets]

    def at(self, address: int, size: int) -> bytes | None:
        """Up to `size` bytes that the file has for `address`, or None."""
        for section in self.sections:
            if section.kind == SHT_NOBITS:  # .tbss may overlap other sections
                continue
            if section.address and section.address <= address < section.address + section.size:
                start = address - section.address
                return section.data[start : start + size] or None
        return None

    def pointers(self) -> dict[int, int]:
        """Relocated pointers: the place where the loader writes an address -> that address."""
        found = {}
        for section in self.sections:
            if section.kind == SHT_RELA and section.address:
                for place, info, addend in struct.iter_unpack("<QQq", section.data):
                    if info & 0xFFFFFFFF in (R_X86_64_RELATIVE, R_AARCH64_RELATIVE):
                        found[place] = addend
        return found


def string_at(data: bytes, offset: int) -> str:
    return data[offset : data.index(b"\0", offset)].decode(errors="replace")


def attributes(info: bytes) -> list[tuple[int, bytes]]:
    """The sized attributes of a section .nv.info or .nv.info.KERNEL: (attribute, bytes)."""
    found, at = [], 0
    while at + 4 <= len(info):
        layout, attribute, size = struct.unpack_from("<BBH", info, at)
        at += 4
        if layout == SIZED:
            found.append((attribute, info[at : at + size]))
            at += size
    return found


@dataclass(frozen=True)
class KernelAttributes:
    registers: int
    frame_bytes: int  # local memory per thread
    shared_bytes: int  # static
    max_threads: int | None  # __launch_bounds__


def kernel_attributes(cubin: Elf) -> dict[str, KernelAttributes]:
    if ".nv.info" not in cubin.by_name:
        return {}  # an empty cubin, which the linker adds
    names = cubin.symbol_names()
    of_symbol: dict[tuple[int, str], int] = {}
    for attribute, data in attributes(cubin.by_name[".nv.info"].data):
        if attribute in (REGISTERS, FRAME_SIZE):
            symbol, value = struct.unpack("<II", data)
            of_symbol[attribute, names[symbol]] = value
    found = {}
    for section in cubin.sections:
        prefix, _, name = section.name.partition(".nv.info.")
        if prefix or not name:
            continue
        bounds = [struct.unpack("<III", d) for a, d in attributes(section.data) if a == MAX_THREADS]
        shared = cubin.by_name.get(f".nv.shared.{name}")
        found[name] = KernelAttributes(
            registers=of_symbol[REGISTERS, name],
            frame_bytes=of_symbol.get((FRAME_SIZE, name), 0),
            shared_bytes=shared.size if shared else 0,
            max_threads=bounds[0][0] * bounds[0][1] * bounds[0][2] if bounds else None,
        )
    return found


def dynamic_shared_bytes(library: Elf, max_threads: dict[str, int]) -> dict[str, int]:
    """Kernel -> bytes of dynamic shared memory, for kernels in launchers' tables.

    An entry of a table has a pointer to the kernel's name, followed by 32-bit numbers. Among these
    are the number of threads and, directly after it, the bytes of dynamic shared memory.
    """
    pointers = library.pointers()
    found = {}
    for place, target in pointers.items():
        text = library.at(target, 200)
        if not text or b"\0" not in text:
            continue
        threads = max_threads.get(string_at(text, 0))
        if threads is None:
            continue
        words = []
        for address in range(place + 8, place + 8 + 6 * 4, 4):
            word = library.at(address, 4)
            if address in pointers or word is None or len(word) < 4:
                break
            words.append(struct.unpack("<I", word)[0])
        if threads in words[:-1]:
            found[string_at(text, 0)] = words[words.index(threads) + 1]
    return found
