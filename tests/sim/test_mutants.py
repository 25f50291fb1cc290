"""Every planted fault is caught in every run, and the table in ptx/sim/README.md says how."""

from __future__ import annotations

from functools import cache

import pytest
import torch

from support import mutants

README = (mutants.ROOT / "ptx" / "sim" / "README.md").read_text()
pytestmark = pytest.mark.slow  # each fault takes a run of nvcc and up to 18 calls


@cache
def truth(problem: str) -> list[torch.Tensor]:
    return mutants.truth_of(mutants.PROBLEMS[problem])


@pytest.mark.parametrize("problem", mutants.PROBLEMS)
def test_the_unchanged_kernel_passes(problem: str) -> None:
    """Shows that the findings come from the edits, not from the way in which they are run."""
    outcome = mutants.examine(None, mutants.PROBLEMS[problem], truth(problem))
    assert outcome == mutants.Outcome(kinds=(), caught=0, by_checker=0, wrong=0)


@pytest.mark.parametrize("mutant", mutants.MUTANTS, ids=lambda mutant: mutant.name)
def test_mutant_is_caught_in_every_run(mutant: mutants.Mutant) -> None:
    problem = mutants.PROBLEMS[mutant.problem]
    outcome = mutants.examine(mutant, problem, truth(mutant.problem))
    assert outcome.caught == mutants.RUNS
    assert mutants.row(mutant, outcome) in README


def test_the_table_has_no_other_rows() -> None:
    rows = [
        line for line in README.splitlines() if line.endswith("of 9 |") or "unchecked |" in line
    ]
    assert len(rows) == len(mutants.MUTANTS)
