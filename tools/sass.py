"""Disassembles kernels, finds their loops and counts the instructions.

A loop's instructions are counted along its main path: of all paths through the loop, the one with
the most tensor-core instructions, then the most FP32 instructions, then the fewest instructions. A
K block takes this path if its waits succeed at once and it is no special case. Instructions off the
path are counted separately.
"""

from __future__ import annotations

import json
import re
import subprocess
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

BYTES = 16  # size of an instruction, since Volta
WARPGROUP, WARP = 128, 32  # threads

# Shapes of mma.sync in the names of its machine instructions, e.g. QMMA.16832.F32.E4M3.E4M3.
MMA_SHAPES = {
    "884": (8, 8, 4),
    "1684": (16, 8, 4),
    "1688": (16, 8, 8),
    "16816": (16, 8, 16),
    "16832": (16, 8, 32),
    "16864": (16, 8, 64),
    "8816": (8, 8, 16),
}


@dataclass(frozen=True)
class Instruction:
    predicate: str
    opcode: str
    operands: str

    @property
    def name(self) -> str:
        return self.opcode.partition(".")[0]

    @property
    def target(self) -> int | None:
        """The index of the instruction that a branch jumps to, or None."""
        match = re.search(r"(?:^|[ ,])0x([0-9a-f]+)$", self.operands)
        return int(match[1], 16) // BYTES if match else None


@dataclass(frozen=True)
class Mma:
    """A tensor-core instruction: its unit, its shape (M, N, K) and the threads that issue it."""

    unit: str  # QGMMA, HGMMA, QMMA, HMMA, IMMA
    shape: tuple[int, int, int]
    threads: int

    @property
    def macs(self) -> int:
        m, n, k = self.shape
        return m * n * k


def tensor_core(instruction: Instruction) -> Mma | None:
    if match := re.fullmatch(r"([QHI]GMMA)\.(?:SP\.)?(\d+)x(\d+)x(\d+)\b.*", instruction.opcode):
        m, n, k = map(int, match.group(2, 3, 4))
        return Mma(match[1], (m, n, k), WARPGROUP)
    if match := re.fullmatch(r"([QHI]MMA)\.(\d+)\b.*", instruction.opcode):
        return Mma(match[1], MMA_SHAPES[match[2]], WARP)
    return None


def disassemble(nvdisasm: Path, cubin: Path) -> tuple[str, dict[str, list[Instruction]]]:
    """The version of the compiler that made the cubin, and the instructions of each function."""
    done = subprocess.run(
        [str(nvdisasm), "-json", "-c", str(cubin)], capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        raise RuntimeError(f"nvdisasm {cubin.name}: {done.stderr.strip()}")
    header, functions = json.loads(done.stdout)
    tool = header.get(".note.nv.tkinfo", {}).get("tki_toolVersion", "")
    version = re.search(r"V(\d+\.\d+\.\d+)", tool)
    return version[1] if version else "unknown", {
        function["function-name"]: [
            Instruction(i.get("predicate", ""), i["opcode"], i.get("operands", ""))
            for i in function["sass-instructions"]
        ]
        for function in functions
    }


def _ends(instruction: Instruction) -> bool:
    """Whether control never reaches the next instruction from this one."""
    if instruction.predicate:
        return False
    plain_branch = instruction.name == "BRA" and re.fullmatch(r"0x[0-9a-f]+", instruction.operands)
    return bool(plain_branch) or instruction.name in ("EXIT", "RET", "BRX", "JMP", "JMX")


class Flow:
    """The control flow of one function: basic blocks, and the loops they form."""

    BRANCHES = ("BRA", "BRX", "JMP", "JMX", "EXIT", "RET")

    def __init__(self, code: list[Instruction]):
        self.code = code
        starts = {0}
        for i, instruction in enumerate(code):
            if instruction.name in self.BRANCHES:
                starts.add(i + 1)
                if instruction.target is not None:
                    starts.add(instruction.target)
        ordered = sorted(start for start in starts if start < len(code))
        self.blocks = list(zip(ordered, [*ordered[1:], len(code)], strict=True))
        self.successors = self._edges({start: b for b, (start, _) in enumerate(self.blocks)})
        self.predecessors: list[list[int]] = [[] for _ in self.blocks]
        for block, following in enumerate(self.successors):
            for successor in following:
                self.predecessors[successor].append(block)

    def _edges(self, at: dict[int, int]) -> list[list[int]]:
        edges: list[list[int]] = []
        indirect = []
        for block, (_, end) in enumerate(self.blocks):
            last = self.code[end - 1]
            following = []
            if last.name == "BRX":
                indirect.append(block)
            elif last.name in ("BRA", "JMP") and last.target is not None:
                following.append(at[last.target])
            if not _ends(last) and end in at:
                following.append(at[end])
            edges.append(following)
        # The listing does not give the targets of an indirect branch: assume that it jumps to every
        # block that nothing else reaches.
        reached: set[int] = set()

        def reach(block: int) -> None:
            pending = [block]
            while pending:
                following = pending.pop()
                if following not in reached:
                    reached.add(following)
                    pending += edges[following]

        reach(0)
        for block in range(len(edges) if indirect else 0):
            if block not in reached:
                for source in indirect:
                    edges[source].append(block)
                reach(block)
        return edges

    def _dominators(self) -> dict[int, int]:
        """The immediate dominator of each reachable block (Cooper, Harvey, Kennedy)."""
        order, seen, stack = [], {0}, [(0, iter(self.successors[0]))]
        while stack:
            block, following = stack[-1]
            for successor in following:
                if successor not in seen:
                    seen.add(successor)
                    stack.append((successor, iter(self.successors[successor])))
                    break
            else:
                order.append(block)
                stack.pop()
        rank = {block: i for i, block in enumerate(order)}
        dominator = {0: 0}

        def common(a: int, b: int) -> int:
            while a != b:
                while rank[a] < rank[b]:
                    a = dominator[a]
                while rank[b] < rank[a]:
                    b = dominator[b]
            return a

        changed = True
        while changed:
            changed = False
            for block in reversed(order[:-1]):
                new = None
                for other in self.predecessors[block]:
                    if other in dominator:
                        new = other if new is None else common(other, new)
                if new is not None and dominator.get(block) != new:
                    dominator[block] = new
                    changed = True
        return dominator

    def loops(self) -> dict[int, set[int]]:
        """Every natural loop: its first block -> its blocks."""
        dominator = self._dominators()

        def dominates(a: int, b: int) -> bool:
            while b not in (a, 0):
                b = dominator[b]
            return a == b

        found: dict[int, set[int]] = {}
        for block in dominator:
            for first in self.successors[block]:
                if not dominates(first, block):
                    continue
                body = found.setdefault(first, {first})
                pending = [block]
                while pending:
                    inner = pending.pop()
                    if inner not in body:
                        body.add(inner)
                        pending += [p for p in self.predecessors[inner] if p in dominator]
        return found

    def _instructions(self, blocks: set[int]) -> list[Instruction]:
        return [i for block in sorted(blocks) for i in self.code[slice(*self.blocks[block])]]

    def main_loops(self) -> list[tuple[list[Instruction], list[Instruction], int]]:
        """For every innermost loop with tensor-core instructions: the instructions on its main
        path; those on the main path of the loop around it, without the inner loop's; and the number
        of the inner loop's instructions off its main path."""
        loops = self.loops()
        feeding = {
            first: body
            for first, body in loops.items()
            if any(map(tensor_core, self._instructions(body)))
        }
        found = []
        for first, body in feeding.items():
            if any(other != first and other in body for other in feeding):
                continue
            way = self._way_through(first, body)
            through = self._instructions(way)
            around = [(len(b), f) for f, b in loops.items() if f != first and body < b]
            outer = min(around)[1] if around else first
            rest = self._way_through(outer, loops[outer]) - body
            aside = len(self._instructions(body)) - len(through)
            found.append((through, self._instructions(rest), aside))
        return found

    def _way_through(self, first: int, body: set[int]) -> set[int]:
        """The blocks on the main path of a loop, as this file's docstring defines it."""

        def weight(block: int) -> tuple[int, int, int]:
            inside = count(self._instructions({block}))
            return inside["mma"], inside["fp32"], -inside["all"]

        # Order the blocks topologically, ignoring back edges of this loop and of loops inside it.
        order: list[int] = []
        seen = {first}
        stack = [(first, iter(self.successors[first]))]
        while stack:
            block, following = stack[-1]
            for successor in following:
                if successor in body and successor not in seen:
                    seen.add(successor)
                    stack.append((successor, iter(self.successors[successor])))
                    break
            else:
                order.append(block)
                stack.pop()
        place = {block: i for i, block in enumerate(reversed(order))}
        best: dict[int, tuple[tuple[int, int, int], int | None]] = {first: (weight(first), None)}
        for block in reversed(order):
            for successor in self.successors[block]:
                if successor not in place or place[successor] <= place[block]:
                    continue
                here = best[block][0]
                a, b, c = weight(successor)
                total = here[0] + a, here[1] + b, here[2] + c
                if successor not in best or total > best[successor][0]:
                    best[successor] = total, block
        last: int | None = max(
            (block for block in place if first in self.successors[block]),
            key=lambda block: best[block][0],
        )
        way = set()
        while last is not None:
            way.add(last)
            last = best[last][1]
        return way


GROUPS = {
    "fp32": ("FFMA", "FMUL", "FADD"),
    "loads": ("LDS", "LDSM", "LDG", "LD"),
    "barriers": ("SYNCS", "BAR", "WARPSYNC", "DEPBAR", "LDGDEPBAR", "WARPGROUP", "UCGABAR_ARV",
                 "UCGABAR_WAIT", "CCTL", "ELECT", "NANOSLEEP", "BARRIER"),
    "spills": ("LDL", "STL"),
    "tma": ("UTMALDG", "UTMASTG", "UTMAREDG", "UBLKCP"),
}  # fmt: skip


def count(code: list[Instruction]) -> Counter[str]:
    """Numbers of instructions: by group, by name, and for LDG and STG by width too (LDG.128)."""
    found: Counter[str] = Counter()
    groups = {name: group for group, names in GROUPS.items() for name in names}
    for instruction in code:
        found["all"] += 1
        found[instruction.name] += 1
        if instruction.name in groups:
            found[groups[instruction.name]] += 1
        if tensor_core(instruction):
            found["mma"] += 1
        if instruction.name in ("LDG", "STG"):
            width = re.search(r"\.(128|64|U16|S16|U8|S8)\b", instruction.opcode)
            found[f"{instruction.name}.{width[1] if width else '32'}"] += 1
    return found


@dataclass(frozen=True)
class MainLoop:
    """A main loop's figures for one K block of the kernel's tile, or for one iteration if the
    kernel's name does not give the tile.

    warps: the number of warps in a CTA that execute the loop. counts, aside: instructions of one
    warp.
    """

    counts: Mapping[str, float]
    aside: float  # instructions off the main path
    mma: Mma
    blocks: float | None  # K blocks in one iteration; None: the tile is unknown
    warps: int
    macs: float  # multiply-adds of the CTA

    @property
    def issue_cycles(self) -> float:
        """Cycles of each of an SM's four schedulers, which issue one instruction per cycle."""
        return self.counts["all"] * self.warps / 4


TILE = re.compile(r"(\d+)x(\d+)(?:x(\d+))?(?!.*\dx\d)")


def tile_macs(name: str, k_block: int = 128) -> int | None:
    """Multiply-adds (M x N x K) of a K block of the tile in the kernel's name, or None.

    fp8_linear multiplies each of the three BF16 parts of an FP32 x.
    """
    match = TILE.search(name)
    parts = 3 if "_fp8_linear_f32_" in name else 1
    return parts * int(match[1]) * int(match[2]) * int(match[3] or k_block) if match else None


def main_loop(name: str, code: list[Instruction], threads: int) -> MainLoop | None:
    """The main loop with the most issue cycles per multiply-add; None without tensor-core
    instructions.

    threads: of the CTA. In a kernel with wgmma, one warpgroup loads and does not execute the loop.
    """
    if not any(map(tensor_core, code)):
        return None
    measured = []
    for body, around, aside in Flow(code).main_loops():
        units = [mma for mma in map(tensor_core, body) if mma]
        warpgroups = units[0].threads == WARPGROUP
        warps = (threads - WARPGROUP if warpgroups else threads) // WARP
        teams = warps * WARP // units[0].threads
        macs = teams * sum(mma.macs for mma in units)
        wanted = tile_macs(name)
        blocks = macs / wanted if wanted else None
        share = blocks or 1.0
        counts = Counter({key: value / share for key, value in count(body).items()})
        if share < 1:  # a K block takes several iterations, and one of the loop around them
            counts.update(count(around))
        measured.append(MainLoop(counts, aside / share, units[0], blocks, warps, macs / share))
    if not measured:
        raise RuntimeError(f"{name}: tensor-core instructions, but no loop around any")
    return max(measured, key=lambda loop: loop.issue_cycles / loop.macs)
