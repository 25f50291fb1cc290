"""PTX modules: parse, list, launch, read and write variables."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torchext import _sim

from . import names
from .arguments import Argument, argument_of
from .memory import Arena
from .options import launch_options
from .ptx_file import read_ptx, warn_unless_ascii
from .report import Report, report_from
from .variables import Variable


@dataclass(frozen=True)
class Parameter:
    """A kernel's parameter.

    Attributes:
        name, size, alignment: as PTX declares them, in bytes.
        type: of an element, such as "u32"; "b8" for structs.
        is_array: a struct or an array, passed by value.
        is_pointer: declared with `.ptr`. Many a pointer is declared as a plain u64.
    """

    name: str
    size: int
    alignment: int
    type: str
    is_array: bool
    is_pointer: bool


@dataclass(frozen=True)
class Kernel:
    """An entry point of a module.

    Attributes:
        name, parameters: as PTX declares them.
        max_threads, required_threads, cluster: `.maxntid`, `.reqntid` and `.reqnctapercluster`,
            (0, 0, 0) where absent.
        line: of the declaration, in the PTX text.
    """

    name: str
    parameters: tuple[Parameter, ...]
    max_threads: tuple[int, int, int]
    required_threads: tuple[int, int, int]
    cluster: tuple[int, int, int]
    line: int

    @property
    def signature(self) -> str:
        """The name as C++ declares it: "void scale<128>(float*)"; other names unchanged."""
        return names.signature(self.name)

    def __str__(self) -> str:
        if self.signature != self.name:
            return self.signature
        sizes = ", ".join(f"{p.size} bytes" for p in self.parameters)
        return f"{self.name}({sizes})"


def dim3(
    name: str, value: int | Sequence[int], where: str = "torchext.sim.Module.launch"
) -> tuple[int, int, int]:
    """One to three numbers as three. Raises ValueError, which starts with `where`."""
    values = (value,) if isinstance(value, int) else tuple(value)
    if not 1 <= len(values) <= 3 or any(not 0 <= v < 1 << 32 for v in values):
        raise ValueError(f"{where}: {name} must be 1 to 3 numbers (got {value!r})")
    x, y, z = (*values, 1, 1)[:3]
    return x, y, z


def _named_text(ptx_text_or_path: str | Path, name: str | None) -> tuple[str, str]:
    if isinstance(ptx_text_or_path, str) and "\n" in ptx_text_or_path:
        path, text = "<ptx>", ptx_text_or_path.removeprefix("\ufeff")
        warn_unless_ascii(ptx_text_or_path, path)
    else:
        path, text = str(ptx_text_or_path), read_ptx(ptx_text_or_path)
    return path if name is None else name, text


def _texts_to_link(parts: Sequence[str | Path | Module], name: str | None) -> list[tuple[str, str]]:
    where = "torchext.sim.Module"
    if name is not None:
        raise ValueError(
            f"{where}: name must be None for linked modules, which keep theirs (got {name!r})"
        )
    texts: list[tuple[str, str]] = []
    for part in parts:
        if isinstance(part, Module):
            texts += part._texts
        elif isinstance(part, str | Path):
            texts.append(_named_text(part, None))
        else:
            raise TypeError(
                f"{where}: each module to link must be a PTX text, a path or a Module "
                f"(got {type(part).__name__})"
            )
    if not texts:
        raise ValueError(
            f"{where}: ptx_text_or_path must name at least one module to link (got none)"
        )
    return texts


def link(parts: Sequence[str | Path | Module]) -> Module:
    """Links texts, .ptx files and modules into one, as `Module(parts)` does."""
    return Module(parts)


class Module:
    """PTX text, or the path of a .ptx file, ready to be launched; or several, linked.

    Variables keep their values between launches, as a loaded module's do on a GPU.

    Args:
        ptx_text_or_path: a string with a line break is text. A sequence of texts, paths and modules
            is linked: `.extern` names are resolved, other modules' `.visible` ones found.
        name: what findings call the module; by default its path. Linked modules keep their own.

    Raises:
        PtxError: the PTX is malformed, a file holds something else, or of linked modules a name is
            defined twice or not at all; the message names file and line.
        OSError: a file is missing or cannot be read.
    """

    def __init__(
        self,
        ptx_text_or_path: str | Path | Sequence[str | Path | Module],
        name: str | None = None,
    ) -> None:
        if isinstance(ptx_text_or_path, str | Path):
            self._texts = [_named_text(ptx_text_or_path, name)]
        else:
            self._texts = _texts_to_link(ptx_text_or_path, name)
        self._module = _sim.Module(self._texts)

    @property
    def raw(self) -> _sim.Module:
        """The module of the extension, for `launch_group`."""
        return self._module

    @property
    def target(self) -> str:
        """The `.target` of the module, such as "sm_90a"."""
        return self._module.target

    def kernels(self) -> list[Kernel]:
        """The module's entry points, in the order of the text."""
        return [
            Kernel(**{**k, "parameters": tuple(Parameter(*p) for p in k["parameters"])})
            for k in self._module.kernels()
        ]

    def kernel(self, name: str) -> Kernel:
        """The entry point of that name: its symbol, or a C++ name that is unique in the module.

        `_Z5scaleILi128EEvPf` is also "scale", "scale<128>" and "void scale<128>(float*)".

        Raises ValueError, listing them, if there is none or more than one.
        """
        kernels = {kernel.name: kernel for kernel in self.kernels()}
        return kernels[names.find(name, list(kernels), "torchext.sim.Module.kernel")]

    def variables(self) -> list[Variable]:
        """The `.global` and `.const` variables of the module, in the order of the text."""
        return [Variable(**v, _module=self._module) for v in self._module.variables()]

    def variable(self, name: str) -> Variable:
        """The variable of that name, to be read and written; see `Variable`.

            module.variable("weights").set(np.arange(9, dtype=np.float32))

        Raises ValueError, listing them, if there is none.
        """
        variables = self.variables()
        for variable in variables:
            if variable.name == name:
                return variable
        raise ValueError(
            f"torchext.sim.Module.variable: name must be a variable of the module (got {name!r}); "
            f"the module has {', '.join(v.name for v in variables) or 'none'}"
        )

    def reset_variables(self) -> None:
        """Gives every variable its initial value again, as loading the module anew would."""
        self._module.reset_variables()

    def check(self, name: str) -> None:
        """Decodes a kernel and all it calls; raises PtxError for an unknown opcode or modifier."""
        self._module.decode(self.kernel(name).name)

    def arguments(self, kernel: Kernel, args: Sequence[Any], where: str) -> list[Argument]:
        """What `args` are to the kernel's parameters.

        Raises ValueError and TypeError for arguments that do not fit; messages start with `where`.
        """
        if len(args) != len(kernel.parameters):
            raise ValueError(
                f"{where}: args must have one entry for each of the kernel's "
                f"{len(kernel.parameters)} parameters (got {len(args)})"
            )
        arguments = [
            argument_of(arg, f"{where}: argument {i}", parameter)
            for i, (arg, parameter) in enumerate(zip(args, kernel.parameters, strict=True))
        ]
        for i, (argument, parameter) in enumerate(zip(arguments, kernel.parameters, strict=True)):
            if argument.size != parameter.size:
                raise ValueError(
                    f"{where}: argument {i} must have {parameter.size} bytes, the size of "
                    f"parameter {parameter.name} (got {argument.size})"
                )
        return arguments

    def launch(
        self,
        name: str,
        *,
        grid: int | Sequence[int],
        block: int | Sequence[int],
        args: Sequence[Any] = (),
        smem: int = 0,
        cluster: int | Sequence[int] | None = None,
        non_portable_cluster: bool = False,
        seed: int = 0,
        completion: str = "late",
        lane_order: str = "converged",
        checks: bool = True,
        num_threads: int = 0,
        num_sms: int = 132,
        max_instructions: int = 20_000_000_000,
        timing: str | None = None,
        timing_only: bool = False,
    ) -> Report:
        """Runs a kernel and returns what the checker saw.

        Args:
            name: of the kernel; see `kernel`.
            grid, block, cluster: one to three numbers. `cluster` None is the kernel's own.
            args: one for each parameter. Numpy arrays and torch CPU tensors become buffers that
                the kernel may read and write (`read_only(x)` and `output(x)` say more); they are
                copied into memory of their own, with guard gaps, and back. A Python int, float or
                bool takes the parameter's type, and must fit it; numpy and ctypes scalars bring a C
                type of their own. Also `tensor_map(...)`, `struct(...)` and bytes.
            smem: bytes of dynamic shared memory; more than 48 KiB need no opting in.
            non_portable_cluster: allow clusters of more than 8 CTAs, as
                cudaFuncAttributeNonPortableClusterSizeAllowed does.
            seed: of the schedule. A seed gives the same schedule every time if num_threads is 1.
            completion: when asynchronous work (TMA, wgmma, cp.async) completes: "late", not before
                something waits for it; "eager", at once; "random".
            lane_order: "converged": an `.aligned` or `.sync` instruction orders the lanes of its
                warp. "strict": only bar.warp.sync and barriers do.
            checks: False finds only what stops a kernel, and is faster.
            num_threads: host threads; 0 uses all cores.
            num_sms: what %nsmid says.
            max_instructions: a finding ends the launch after so many warp-instructions.
            timing: a GPU of docs/timing.md, such as "h100", for which `report.timing` predicts the
                launch's time.
            timing_only: run only the clusters that the prediction is made of, without checks, and
                without wgmma's products. The arrays are not valid afterwards.

        Raises:
            ValueError: no such kernel, arguments that do not fit, a launch that exceeds what the
                GPUs of the module's target have.
            TypeError: an argument of no known kind.
            PtxError: an opcode or modifier that the simulator does not know, or that the module's
                target does not have.
        """
        kernel = self.kernel(name)
        where = f"torchext.sim.Module.launch of {name}"
        options = launch_options(
            where,
            seed=seed,
            completion=completion,
            lane_order=lane_order,
            checks=checks,
            num_threads=num_threads,
            num_sms=num_sms,
            max_instructions=max_instructions,
            timing=timing,
            timing_only=timing_only,
            non_portable_cluster=non_portable_cluster,
        )
        arguments = self.arguments(kernel, args, where)
        arena = Arena()
        for i, argument in enumerate(arguments):
            argument.register(arena, f"argument {i}")
        arena.place()
        raw = self._module.launch(
            kernel.name,
            dim3("grid", grid),
            dim3("block", block),
            (0, 0, 0) if cluster is None else dim3("cluster", cluster),
            smem,
            options,
            [argument.to_bytes(arena) for argument in arguments],
            arena.buffers(),
        )
        arena.copy_back()
        return report_from(raw)
