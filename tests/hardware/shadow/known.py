"""Differences between an H200 and the simulator whose cause is known and that stay, as data.

Only what PTX leaves open, or what ptxas does against the PTX manual, belongs here.
"""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Known:
    """status: what the comparison says of the launch. test, code: patterns of which one is to be
    found in the pytest node, the other in the PTX."""

    status: str
    reason: str
    test: str = ""
    code: str = ""


ORDER = "depends on the order of threads, which PTX leaves open"
HEAP = "the driver's heap has other addresses, and room for more than its nominal size"
VIDEO = "ptxas 13.0 compiles this video instruction for sm_90 against the PTX manual"
# Found with ptxas 13.0 and an H200 on 2026-11-26 (docs/simulator.md).
KNOWN = [
    Known("differs", ORDER, test=r"test_atomic_results_count_every_thread_once"),
    Known("differs", ORDER, test=r"test_atomics_of_16_bytes"),
    Known("differs", ORDER, test=r"test_what_is_ordered_has_no_finding\[queue"),
    Known("differs", ORDER, test=r"test_a_thread_that_waits_for_one_that_has_passed"),
    Known("differs", ORDER, test=r"test_mbarrier_state_tokens_drop_and_pending_count"),
    Known("differs", HEAP, test=r"test_device_heap\.py", code=r"\bmalloc\b"),
    Known("differs", "bytes of addresses", code=r"\.u8 \w+\[[^;]*= *\{[^;]*0xFF0*\("),
    Known("differs", "bfe.s32 with a constant position beyond 31 is -1 from ptxas 13.0, for any "
          "operand; with a position in a register it is the sign, as the PTX manual says",
          code=r"bfe\.s32 %\w+, %\w+, 40,"),
    Known("differs", VIDEO, code=r"\bv(add|sub|min|max|absdiff|shl|shr)\.[\w.]*\.(min|max)\b"),
    Known("differs", VIDEO, code=r"\bv(add|sub|shl)\.[\w.]*\.sat\b"),
    Known("differs", VIDEO, code=r"\bvsub\.[\w.]+ %\w+\.h1,"),
    Known("differs", VIDEO, code=r"\bvmad\.\w+\.\w+\.u32[\w.]*\.(sat|shr7|shr15)\b"),
    Known("differs", VIDEO, code=r"\bvset\.s32\.\w+\.\w+\.max\b"),
    Known("failed", "a deliberate fault, which another schedule of the simulator finds",
          test=r"test_faults_are_found\[06 "),
    Known("refused", "ptxas takes ASCII alone; the simulator warns",
          test=r"test_files_as_editors_leave_them|test_text_with_a_byte_order_mark"),
]  # fmt: skip


def reason(status: str, test: str, code: str) -> str | None:
    """Why a launch may differ, or None."""
    for known in KNOWN:
        if known.status == status and re.search(known.test, test) and re.search(known.code, code):
            return known.reason
    return None
