"""Reads PTX files, plain or compressed by gzip, as those of the build are. For a file of another
kind, the error says what it is."""

from __future__ import annotations

import gzip
import warnings
import zlib
from pathlib import Path

from torchext import _sim

# Kinds of files that are not PTX, by their first bytes.
_SIGNATURES = {
    b"\x7fELF": "an ELF file (a cubin, or a compiled program)",
    b"\x50\xed\x55\xba": "a fatbin",
    b"BC\xc0\xde": "LLVM bitcode",
    b"\xff\xfe": "UTF-16 text",
    b"\xfe\xff": "UTF-16 text",
    b"\x00\x00\xfe\xff": "UTF-32 text",
}
_GZIP = b"\x1f\x8b"
_NOT_TEXT = bytes([*range(0x09), *range(0x0E, 0x20)])


def warn_unless_ascii(text: bytes | str, name: str | Path) -> None:
    """Warns of what the simulator skips and ptxas 13.0 refuses, even in a comment."""
    if not text.isascii():
        data = text.encode(errors="replace") if isinstance(text, str) else text
        at = next(at for at, byte in enumerate(data) if byte > 127)
        line = data.count(b"\n", 0, at) + 1
        warnings.warn(
            f"{name}:{line}: PTX must be ASCII text (got byte 0x{data[at]:02x}); the simulator "
            "skips such bytes in comments, but ptxas refuses the file: remove them",
            stacklevel=2,
        )


def read_ptx(path: str | Path) -> str:
    """The text of a PTX file, without a byte-order mark. Warns of bytes that ptxas refuses.

    A file that gzip compressed is decompressed, whatever its name.

    Raises OSError if it cannot be read, PtxError if it is not text; both name the file.
    """
    try:
        data = Path(path).read_bytes()
    except FileNotFoundError:
        raise FileNotFoundError(
            f"torchext.sim: path must be a .ptx file (got {str(path)!r}); there is no such file"
        ) from None
    except IsADirectoryError:
        raise IsADirectoryError(
            f"torchext.sim: path must be a .ptx file (got {str(path)!r}, which is a folder)"
        ) from None
    except OSError as error:
        raise type(error)(
            f"torchext.sim: path must be readable (got {str(path)!r}: {error.strerror})"
        ) from None
    if data.startswith(_GZIP):
        try:
            data = gzip.decompress(data)
        except (EOFError, OSError, zlib.error) as error:
            raise _sim.PtxError(
                f"{path}: the file must be whole (got damaged gzip data: {error}); copy it again"
            ) from None
    for signature, what in _SIGNATURES.items():
        if data.startswith(signature):
            hint = "save it as UTF-8" if "text" in what else "pass the PTX itself (nvcc -ptx)"
            raise _sim.PtxError(f"{path}: the file must be PTX text (got {what}); {hint}")
    if len(data.translate(None, _NOT_TEXT)) < len(data):  # much faster than a search
        at = next(at for at, byte in enumerate(data) if byte in _NOT_TEXT)
        raise _sim.PtxError(
            f"{path}: the file must be PTX text (got byte 0x{data[at]:02x}, which no text has, "
            f"at offset {at})"
        )
    if not data.strip():
        raise _sim.PtxError(f"{path}: the file must be PTX text (got an empty file)")
    warn_unless_ascii(data, path)
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError:
        # PTX is ASCII; file names in it are bytes of any encoding.
        return data.decode("latin-1")
