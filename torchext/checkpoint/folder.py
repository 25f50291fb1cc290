"""Writes a checkpoint's folder so that it is there whole or not at all, and can be gone on with."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .files import (
    CONFIG,
    INDEX,
    Checkpoint,
    CheckpointError,
    Reader,
    ShardWriter,
    open_checkpoint,
    read_json,
)
from .plan import Options, Plan, shapes_of
from .progress import Progress
from .steps import Step

_STATE = ".torchext_conversion.json"
# Weights in other files would contradict the new ones.
_WEIGHT_FILES = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx")
# Files beside config.json that say how weights are quantized, as of the source.
_QUANTIZATION_FILES = ("hf_quant_config.json", "quantize_config.json", "quant_config.json")
_PARAMS = "params.json"  # Mistral's config.json, with its own `quantization`
_INDEXES = (".safetensors.index.json", ".bin.index.json")


class Unfinished:
    """The folder beside the target in which a conversion works, TARGET.partial.

    A file in it has its final name once it is whole. After an interruption the same conversion
    goes on behind the files that are finished.
    """

    def __init__(self, target: Path, checkpoint: Checkpoint, plan: Plan, options: Options) -> None:
        self.target, self.folder = target, target.with_name(target.name + ".partial")
        self._checkpoint = checkpoint
        self._shards = plan.shards(options.max_shard_bytes)
        if os.path.lexists(target):
            raise CheckpointError(
                f"{target} must not exist (got a {'folder' if target.is_dir() else 'file'}); "
                "choose another target, or remove it"
            )
        identity = _identity(checkpoint, self._shards, options)
        state = self.folder / _STATE
        if self.folder.exists():
            if not state.exists() or state.read_text() != identity:
                raise CheckpointError(
                    f"{self.folder} must hold the beginning of this conversion (got that of another"
                    " source or with other options); remove it, or choose another target"
                )
        else:
            self.folder.mkdir(parents=True)
            _write(state, identity)
        self.finished = [name for name in self._shards if self._is_finished(name)]
        self._require_space()

    def _is_finished(self, name: str) -> bool:
        if not (self.folder / name).exists():
            return False
        try:
            found = open_checkpoint(self.folder / name).entries.values()
        except CheckpointError:
            return False  # the machine stopped before the file was on the disk: written again
        return {e.name: (e.dtype, e.shape) for e in found} == shapes_of(self._shards[name])

    def _require_space(self) -> None:
        missing = _nbytes(self._left())
        free = shutil.disk_usage(self.folder).free
        if free < missing:
            raise CheckpointError(
                f"{self.folder} must have room for {missing:,} bytes (got {free:,} free); free some"
                " space, and run the same conversion again"
            )

    def _left(self) -> dict[str, list[Step]]:
        return {name: steps for name, steps in self._shards.items() if name not in self.finished}

    def sources_left(self) -> set[str]:
        """Names of the tensors of the source that are not converted yet."""
        return {
            entry.name
            for steps in self._left().values()
            for step in steps
            for entry in step.sources
        }

    def write_shards(self) -> set[str]:
        """Writes every file of tensors that is not finished, and returns the names of tensors that
        it read."""
        todo = self._left()
        progress = Progress(
            f"writing {self.target.name}, files {len(self.finished) + 1} to {len(self._shards)}",
            _nbytes(todo),
        )
        reader = Reader()
        try:
            for name, steps in todo.items():
                specs = [spec for step in steps for spec in step.outputs]
                with ShardWriter(self.folder / name, specs) as writer:

                    def emit(tensor: str, data: Any, start: int, to: ShardWriter = writer) -> None:
                        to.write(tensor, data, start)
                        progress.add(data.nbytes)

                    for step in steps:
                        step.run(reader, emit)
                self.finished.append(name)
        finally:
            progress.end()
        return reader.names

    def how_to_go_on(self) -> str:
        """What an interrupted user must know."""
        return (
            f"{len(self.finished)} of {len(self._shards)} files are finished in {self.folder}; "
            "nothing is lost: run the same conversion again to go on behind them, or remove the "
            "folder"
        )

    def finish(self, config: Mapping[str, Any]) -> list[str]:
        """Adds the other files and renames the folder. Returns the names of copied files."""
        if len(self._shards) > 1:
            weight_map = {
                spec.name: name
                for name, steps in self._shards.items()
                for step in steps
                for spec in step.outputs
            }
            index = {"metadata": {"total_size": _nbytes(self._shards)}, "weight_map": weight_map}
            _write(self.folder / INDEX, json.dumps(index, indent=2, sort_keys=True) + "\n")
        if config:
            _write(self.folder / CONFIG, json.dumps(config, indent=2) + "\n")
        copied = self._copy_others()
        (self.folder / _STATE).unlink()
        os.rename(self.folder, self.target)
        _sync(self.target.parent)
        return copied

    def _copy_others(self) -> list[str]:
        source = self._checkpoint.folder
        if source is None:
            return []
        copied = []
        for root, folders, files in os.walk(source, followlinks=False):
            folders[:] = sorted(
                name
                for name in folders
                if not name.startswith(".") and not self.folder.samefile(Path(root) / name)
            )
            for name in sorted(files):
                file = Path(root) / name
                relative = file.relative_to(source)
                if name.endswith((*_WEIGHT_FILES, *_INDEXES)):
                    continue
                if str(relative) in (CONFIG, *_QUANTIZATION_FILES):
                    continue
                to = self.folder / relative
                to.parent.mkdir(parents=True, exist_ok=True)
                if str(relative) == _PARAMS:
                    params = read_json(file)
                    params.pop("quantization", None)
                    _write(to, json.dumps(params, indent=2) + "\n")
                else:
                    shutil.copyfile(file, to)
                copied.append(str(relative))
        return copied


def _nbytes(shards: Mapping[str, Sequence[Step]]) -> int:
    return sum(spec.nbytes for steps in shards.values() for step in steps for spec in step.outputs)


def _identity(
    checkpoint: Checkpoint, shards: Mapping[str, Sequence[Step]], options: Options
) -> str:
    """What must not change between the beginning of a conversion and its continuation."""
    outputs = json.dumps({name: shapes_of(steps) for name, steps in shards.items()})
    sources = [
        (str(file.resolve()), stat.st_size, stat.st_mtime_ns)
        for file in checkpoint.files
        for stat in [file.stat()]
    ]
    identity = {
        "options": options.to_dict(),
        "source": sources,
        "result": hashlib.sha256(outputs.encode()).hexdigest(),
    }
    return json.dumps(identity, indent=2)


def _write(file: Path, text: str) -> None:
    with file.open("w") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
