"""Repeats launches of torchext.sim.Module on a GPU and compares memory afterwards."""

from __future__ import annotations

import ctypes
import hashlib
import re
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any, NoReturn

from torchext.sim import module as sim_module
from torchext.sim.arguments import Argument, _Struct, _TensorMap, argument_of
from torchext.sim.memory import Arena, View
from torchext.sim.report import Report

from . import known
from .compare import FUNCTION_WINDOW, Buffer, Verdict, compare
from .driver import UNSUPPORTED_PTX_VERSION, Driver, DriverError, HungError, Launch

GUARD_BYTES = 256
POISON = 0xA5
# Instructions around the tested ones, which a description of a kernel leaves out.
_SCAFFOLDING = re.compile(
    r"^\s*(\.reg|\.version|\.target|\.address_size|ld\.param|\}|\{|ret;|$|//)"
)


class _RecordingArena(Arena):
    """The simulator's arena, which keeps the bytes that the kernel finds. `last` is the newest."""

    last: _RecordingArena | None = None

    def place(self) -> None:
        super().place()
        self.before = {
            (a.base, r.begin): ctypes.string_at(a.base + r.begin, r.end - r.begin)
            for a in self._allocations.values()
            for r in a.ranges
        }
        _RecordingArena.last = self


class _DeviceArena(Arena):
    """The same buffers in the memory of the GPU."""

    def __init__(self, driver: Driver) -> None:
        super().__init__()
        self.driver = driver
        self.views: list[View] = []

    def add(self, view: View, access: str, name: str, device: int | None = None) -> None:
        super().add(view, access, name, device)
        self.views.append(view)

    def fill(self, before: dict[tuple[int, int], bytes], poison_outputs: bool) -> None:
        """Allocates the buffers and gives them the bytes `before`. All others are POISON, also
        those of outputs if `poison_outputs`."""
        for a in self._allocations.values():
            data = bytearray([POISON]) * (a.size + 2 * GUARD_BYTES)
            for r in a.ranges:
                if not (poison_outputs and r.access == "write"):
                    at = GUARD_BYTES + r.begin
                    data[at : at + r.end - r.begin] = before[a.base, r.begin]
            a.address = self.driver.allocate(len(data)) + GUARD_BYTES
            self.driver.write(a.address - GUARD_BYTES, bytes(data))

    def results(self) -> Iterator[tuple[str, Buffer]]:
        """(access, buffer) of every range; `sim` is the host's memory. Bytes of no range are a
        buffer of their own."""
        for a in self._allocations.values():
            data = self.driver.read(a.address - GUARD_BYTES, a.size + 2 * GUARD_BYTES)
            rest = bytearray(data)
            for r in a.ranges:
                at = GUARD_BYTES + r.begin
                gpu = data[at : at + r.end - r.begin]
                rest[at : at + r.end - r.begin] = bytes([POISON]) * len(gpu)
                sim = ctypes.string_at(a.base + r.begin, r.end - r.begin)
                view = next(
                    v for v in self.views
                    if v.base == a.base and v.extent and r.begin <= v.offset < r.end
                )  # fmt: skip
                yield r.access, Buffer(" and ".join(r.names), view.dtype, view.itemsize, gpu, sim)
            name = f"memory around {a.ranges[0].names[0]}"
            yield "around", Buffer(name, "uint8", 1, bytes(rest), bytes([POISON]) * len(rest))

    def allocations(self, other: Arena) -> list[tuple[int, int, int]]:
        """(address in `other`, address on the device, bytes) of every allocation."""
        return [
            (other._allocations[key].address, a.address, a.size)
            for key, a in self._allocations.items()
        ]

    def free(self) -> None:
        for a in self._allocations.values():
            if a.address:
                self.driver.free(a.address - GUARD_BYTES)


class _NamingArena(Arena):
    """Addresses that are the same for equal launches, to tell whether two are."""

    def place(self) -> None:
        at = 1 << 40
        for a in self._allocations.values():
            a.address = at
            at += -(-a.size // GUARD_BYTES) * GUARD_BYTES


class _Launched:
    """A launch on the simulator. variables: their values before it, and whether these are others
    than the initial ones."""

    def __init__(
        self, module: Any, name: str, options: dict[str, Any], *,
        variables: dict[str, tuple[bytes, bool]], arena: _RecordingArena, report: Report,
    ) -> None:  # fmt: skip
        self.module = module
        self.kernel = module.kernel(name)
        self.shape = _shape(options, "".join(text for _, text in module._texts))
        self.variables = variables
        self.arena = arena
        self.report = report
        self.arguments = [
            argument_of(argument, f"argument {i}", parameter)
            for i, (argument, parameter) in enumerate(
                zip(options.get("args", ()), self.kernel.parameters, strict=True)
            )
        ]

    def register(self, arena: Arena) -> None:
        for i, argument in enumerate(self.arguments):
            argument.register(arena, f"argument {i}")

    def variables_hold_addresses(self) -> bool:
        """Whether the host or an earlier launch has stored an address, which the GPU lacks."""
        words = [
            word
            for value, changed in self.variables.values()
            if changed
            for word in struct.unpack(f"<{len(value) // 8}Q", value[: len(value) // 8 * 8])
        ]
        mapped = [
            tuple(int(end, 16) for end in line.split(" ")[0].split("-"))
            for line in (Path("/proc/self/maps").read_text().splitlines() if words else [])
        ]
        return any(
            word >> 56 == FUNCTION_WINDOW or any(low <= word < high for low, high in mapped)
            for word in words
        )

    def key(self) -> bytes:
        """A hash of all that decides what the launch computes."""
        arena = _NamingArena()
        self.register(arena)
        arena.place()
        everything = (
            self.module._texts, self.kernel.name, self.shape, self.variables,
            [argument.to_bytes(arena) for argument in self.arguments],
            [*self.arena.before.values()],
        )  # fmt: skip
        return hashlib.sha256(repr(everything).encode()).digest()


class Shadow:
    """Repeats every launch of `torchext.sim.Module` within `installed()`.

    open_driver: makes the driver, at the first launch.
    record: called with a dict for each launch: test, status ("same", "differs", "skipped",
        "refused" by the driver, "failed" on the GPU, "hung") and what belongs to it.
    lost: called if the GPU cannot be used any more; must not return.
    """

    def __init__(
        self,
        open_driver: Callable[[], Driver],
        record: Callable[[dict[str, Any]], None],
        lost: Callable[[Exception], NoReturn],
    ):
        self._open_driver = open_driver
        self.record = record
        self._lost = lost
        self.limit_s = 10.0  # of a kernel; those of the tests take milliseconds
        self.test = ""
        self.mismatches: list[str] = []  # of the current test
        self._done: set[bytes] = set()

    @cached_property
    def driver(self) -> Driver:
        return self._open_driver()

    @contextmanager
    def installed(self) -> Iterator[None]:
        module_class = sim_module.Module
        original_init, original_launch = module_class.__init__, module_class.launch
        original_arena = sim_module.Arena
        shadow = self

        def init(module: Any, *args: Any, **kwargs: Any) -> None:
            original_init(module, *args, **kwargs)
            module._initial_variables = _variables(module)

        def launch(module: Any, name: str, **kwargs: Any) -> Report:
            before = {
                name: (value, value != module._initial_variables.get(name))
                for name, value in _variables(module).items()
            }
            report = original_launch(module, name, **kwargs)
            arena = _RecordingArena.last
            assert arena is not None
            shadow.repeat(
                _Launched(module, name, kwargs, variables=before, arena=arena, report=report)
            )
            return report

        module_class.__init__, module_class.launch = init, launch  # type: ignore[assignment, method-assign]
        sim_module.Arena = _RecordingArena  # type: ignore[misc]
        try:
            yield
        finally:
            module_class.__init__ = original_init  # type: ignore[assignment, method-assign]
            module_class.launch = original_launch  # type: ignore[assignment, method-assign]
            sim_module.Arena = original_arena  # type: ignore[misc]

    def repeat(self, launched: _Launched) -> None:
        """Runs one launch, which the simulator has just run, on the GPU."""
        module = launched.module
        fields: dict[str, Any] = {"kernel": launched.kernel.name, "target": module.target}
        key = launched.key()
        reason = self._why_not(module, launched.report)
        if reason is None and launched.variables_hold_addresses():
            reason = "a variable holds an address of the simulator"
        if reason is None and key in self._done:
            reason = "the same launch as one before"
        if reason is not None:
            self._say("skipped", fields, reason)
            return
        self._done.add(key)
        fields["opcodes"] = sorted(launched.report.instructions)
        try:
            verdict = self._run(launched)
        except DriverError as error:
            if error.code == UNSUPPORTED_PTX_VERSION:
                return self._say("skipped", fields, "a PTX version that the driver does not know")
            status = "failed" if error.call in ("the kernel", "cuLaunchKernelEx") else "refused"
            self._mismatch(status, fields, str(error), module)
            if error.sticky:
                self._lost(error)
            return
        except HungError as error:
            self._mismatch("hung", fields, str(error), module)
            self._lost(error)
        fields["counts"] = {k: n for k, n in verdict.counts.items() if n}
        fields["errors"] = verdict.errors
        if verdict.mismatches:
            self._mismatch("differs", fields, "\n".join(verdict.mismatches), module)
        else:
            self._say("same", fields, "")

    def _why_not(self, module: Any, report: Report) -> str | None:
        match = re.match(r"sm_(\d+)([af]?)", module.target)
        if match is None:
            return f"target {module.target}"
        number, suffix = int(match[1]), match[2]
        capability = self.driver.capability
        if number > capability or (suffix == "a" and number != capability):
            return f"target {module.target} on a GPU of capability {capability}"
        if not report.ok:
            return "the simulator reports errors"
        if report.findings:
            return "the simulator reports notes"
        return None

    def _run(self, launched: _Launched) -> Verdict:
        driver, verdict, module = self.driver, Verdict(), launched.module
        arena = _DeviceArena(driver)
        launched.register(arena)
        loaded = driver.load(module._texts)
        try:
            arena.fill(launched.arena.before, poison_outputs=not launched.report.unwritten)
            parameters = [self._bytes(argument, arena, verdict) for argument in launched.arguments]
            addresses = self._set_variables(loaded, launched.variables, verdict)
            function = driver.function(loaded, launched.kernel.name)
            driver.launch(function, launched.shape, parameters, self.limit_s)
            text = "\n".join(text for _, text in module._texts)
            allocations = arena.allocations(launched.arena) + [
                (v.address, addresses[v.name], v.size)
                for v in module.variables()
                if v.name in addresses
            ]
            results = list(arena.results())
            inputs = [buffer for access, buffer in results if access == "read"]
            for _, buffer in results:
                compare(verdict, buffer, text, allocations, inputs)
            for name, value in _variables(module).items():
                if name in addresses:
                    gpu = driver.read(addresses[name], len(value))
                    buffer = Buffer(f"variable {name}", "uint8", 1, gpu, value)
                    compare(verdict, buffer, text, allocations, [])
        except HungError:
            raise  # to free memory would wait for the kernel
        except DriverError as error:
            if not error.sticky:
                self._clean(arena, loaded)
            raise
        self._clean(arena, loaded)
        return verdict

    def _clean(self, arena: _DeviceArena, loaded: int) -> None:
        arena.free()
        self.driver.unload(loaded)

    def _bytes(self, argument: Argument, arena: _DeviceArena, verdict: Verdict) -> bytes:
        """An argument with device addresses; tensor maps are the driver's."""
        if isinstance(argument, _Struct):
            data = bytearray(argument.size)
            for offset, member in argument._members:
                data[offset : offset + member.size] = self._bytes(member, arena, verdict)
            return bytes(data)
        if not isinstance(argument, _TensorMap):
            return argument.to_bytes(arena)
        address = arena.address_of(argument._pointer.view)
        fields = argument._encode.keywords
        return self.driver.encode_tensor_map(global_address=address, **fields)

    def _set_variables(
        self, loaded: int, variables: dict[str, tuple[bytes, bool]], verdict: Verdict
    ) -> dict[str, int]:
        """Gives variables the values before the launch; returns the addresses that are known."""
        addresses: dict[str, int] = {}
        for name, (value, changed) in variables.items():
            found = self.driver.variable(loaded, name)
            if found is None:
                verdict.counts["variable that the driver does not find"] += 1
                continue
            addresses[name] = found[0]
            # Initial values may hold addresses, which the driver's loader has filled in.
            if changed:
                self.driver.write(found[0], value)
        return addresses

    def _say(self, status: str, fields: dict[str, Any], reason: str) -> None:
        self.record({"test": self.test, "status": status, "reason": reason, **fields})

    def _mismatch(self, status: str, fields: dict[str, Any], reason: str, module: Any) -> None:
        code = [
            line.strip()
            for _, text in module._texts
            for line in text.splitlines()
            if not _SCAFFOLDING.match(line)
        ]
        why = known.reason(status, self.test, "\n".join(code))
        if why is not None:
            return self._say("known", {**fields, "was": status}, why)
        self._say(status, {**fields, "code": code[:40]}, reason)
        self.mismatches.append(f"{status}: {reason}")


def _variables(module: Any) -> dict[str, bytes]:
    """Values of the module's variables. Names that several linked modules use are left out."""
    found = module.variables()
    names = [v.name for v in found]
    return {
        v.name: ctypes.string_at(v.address, v.size)
        for v in found
        if v.size and names.count(v.name) == 1
    }


def _shape(options: dict[str, Any], text: str) -> Launch:
    def three(value: Any) -> tuple[int, int, int]:
        values = (value,) if isinstance(value, int) else tuple(value)
        x, y, z = (*values, 1, 1)[:3]
        return x, y, z

    cluster = options.get("cluster")
    return Launch(
        grid=three(options["grid"]),
        block=three(options["block"]),
        shared_bytes=options.get("smem", 0),
        cluster=None if cluster is None else three(cluster),
        non_portable_cluster=options.get("non_portable_cluster", False),
        cooperative=re.search(r"%envreg[12]\b", text) is not None,
    )
