"""The training text, which every machine has: sources of Python's standard library, as bytes."""

from __future__ import annotations

import dataclasses
import sysconfig
from pathlib import Path

import torch
from torch import Tensor

# Tests are repetitive, and site-packages differ between machines.
_LEFT_OUT = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}


@dataclasses.dataclass(frozen=True)
class Corpus:
    """The bytes (uint8) of whole files, concatenated. Every tenth file is held out."""

    train: Tensor
    held_out: Tensor
    num_files: int


def standard_library() -> Corpus:
    """The corpus of this Python, the same in every run.

    Raises FileNotFoundError if the library's sources are not on disk.
    """
    root = Path(sysconfig.get_path("stdlib"))
    files = sorted(
        path
        for path in root.rglob("*.py")
        if _LEFT_OUT.isdisjoint(path.relative_to(root).parts) and path.stat().st_size > 0
    )
    if len(files) < 100:
        raise FileNotFoundError(
            f"torchext.demo: text must be Python's standard library as .py files in {root} (got "
            f"{len(files)} files); run it with a Python that has its sources on disk"
        )
    texts = [torch.frombuffer(bytearray(path.read_bytes()), dtype=torch.uint8) for path in files]
    held_out = [text for i, text in enumerate(texts) if i % 10 == 0]
    train = [text for i, text in enumerate(texts) if i % 10 != 0]
    return Corpus(torch.cat(train), torch.cat(held_out), len(files))


def batches(text: Tensor, count: int, batch: int, length: int, seed: int) -> Tensor:
    """`count` batches of random passages of `text`: int64 [count, batch, length + 1]."""
    generator = torch.Generator().manual_seed(seed)
    starts = torch.randint(len(text) - length, (count, batch, 1), generator=generator)
    return text[starts + torch.arange(length + 1)].long()
