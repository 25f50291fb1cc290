"""Parses and launches damaged PTX: `PYTHONPATH=tests python -m support.fuzz_ptx SEED COUNT`.

It is a program of its own so that a crash shows as an exit status. Every damaged text must give a
report or one of the documented exceptions; the last line of output counts the outcomes.
"""

import re
import sys
from collections import Counter

import numpy as np

from support.kernels import CALLS, RACE, SCALE, STRUCT, TMA
from torchext import sim

TOKEN = re.compile(r"[\w.$%]+(?:::\w+[\w.:]*)?|\s+|.", re.DOTALL)
SOURCES = {text: [t for t in TOKEN.findall(text)] for text in (SCALE, STRUCT, TMA, RACE, CALLS)}
WORDS = sorted({t for tokens in SOURCES.values() for t in tokens if t.strip()})
EXTRA = (
    "0 -1 4294967295 18446744073709551616 0x 0f3F800000 1e999 { } [ ] ( ) < > ; , @ ! % . .. :: "
    '" // /* \\ \0 \xff .reg .shared .align .b8 .pred .entry .func .param .loc .file .v4 call bra '
    "ret exit trap %r1000000 %r<1000000000> [1000000000] .b128"
)
WORDS += EXTRA.split(" ")


def damage(rng: np.random.Generator, tokens: list[str]) -> str:
    """A copy with one or two tokens deleted, repeated, replaced or swapped, or the rest cut off."""
    tokens = list(tokens)
    for _ in range(rng.integers(1, 3)):
        at = int(rng.choice([i for i, token in enumerate(tokens) if token.strip()]))
        alike = [i for i, token in enumerate(tokens) if token[0] == tokens[at][0]]
        other = int(rng.choice(alike))
        match rng.integers(8):
            case 0:
                del tokens[at]
            case 1:
                tokens.insert(at, tokens[other])
            case 2:
                tokens[at] = WORDS[rng.integers(len(WORDS))]
            case 3 if rng.integers(4) == 0:
                del tokens[at:]
                break
            case _:
                tokens[at], tokens[other] = tokens[other], tokens[at]
    return "".join(tokens) + "\n"


def arguments_for(kernel: sim.Kernel) -> list:
    """An argument of the right size for each parameter: buffers for pointers, maps, numbers."""
    data = np.zeros((32, 32), np.float32)
    made = []
    for parameter in kernel.parameters:
        match parameter.size:
            case 8:
                made.append(np.zeros(256, np.float32))
            case 128:
                made.append(sim.tensor_map(data, box=(8, 16)))
            case 16:
                made.append(sim.struct(data, np.float32(2), np.uint32(3)))
            case size if size <= 4096:
                made.append(bytes(size))
            case _:
                return []
    return made


def run(rng: np.random.Generator) -> str:
    """Parses and launches one damaged text; returns the name of the outcome."""
    texts = list(SOURCES)
    text = damage(rng, SOURCES[texts[rng.integers(len(texts))]])
    try:
        module = sim.Module(text)
        for kernel in module.kernels():
            report = module.launch(
                kernel.name,
                grid=2,
                block=64,
                args=arguments_for(kernel),
                seed=int(rng.integers(9)),
                completion=("late", "eager", "random")[rng.integers(3)],
                num_threads=1,
                max_instructions=20_000,
            )
            str(report)
            return "ran" if report.ok else "findings"
    except sim.PtxError:
        return "PtxError"
    except ValueError:
        return "ValueError"
    return "no kernel"


def main() -> None:
    seed, count = int(sys.argv[1]), int(sys.argv[2])
    outcomes: Counter[str] = Counter()
    for index in range(seed, seed + count):
        print(index, file=sys.stderr, flush=True)  # names the text of a crash
        outcomes[run(np.random.default_rng(index))] += 1
    print(dict(outcomes))


if __name__ == "__main__":
    main()
