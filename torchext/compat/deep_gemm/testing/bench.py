"""Times of calls and of kernels, on a GPU, or of ops on the CPU where torch sees none."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

_L2_FLUSH_BYTES = 256_000_000  # several times any GPU's L2


def bench(
    fn: Callable[[], Any], num_warmups: int = 5, num_tests: int = 10, high_precision: bool = False
) -> float:
    """Mean time of a call of `fn`, in seconds.

    On a GPU between two events, after L2 was flushed once; with high_precision a large product
    before them keeps the GPU busy while the calls are launched. On the CPU by the clock.
    """
    on_gpu = torch.cuda.is_available()
    if on_gpu:
        _flush_l2()
    for _ in range(num_warmups):
        fn()
    if not on_gpu:
        start = time.perf_counter()
        for _ in range(num_tests):
            fn()
        return (time.perf_counter() - start) / num_tests
    if high_precision:
        x = torch.ones(8192, 8192, device="cuda")
        torch.mm(x, x)
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(num_tests):
        fn()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) / num_tests / 1e3


def _flush_l2() -> None:
    torch.empty(_L2_FLUSH_BYTES // 4, dtype=torch.int32, device="cuda").zero_()


class empty_suppress(contextlib.nullcontext[None]):  # noqa: N801  (DeepGEMM's name)
    """A context manager that does nothing."""


@contextlib.contextmanager
def suppress_stdout_stderr() -> Iterator[None]:
    """Within it, whatever this process writes to its standard streams is dropped."""
    with contextlib.ExitStack() as stack:
        null = stack.enter_context(open(os.devnull, "w"))
        for descriptor in (1, 2):
            saved = os.dup(descriptor)
            stack.callback(os.close, saved)
            stack.callback(os.dup2, saved, descriptor)
            os.dup2(null.fileno(), descriptor)
        stack.enter_context(contextlib.redirect_stdout(null))
        stack.enter_context(contextlib.redirect_stderr(null))
        yield


def bench_kineto(
    fn: Callable[[], Any],
    kernel_names: str | tuple[str, ...],
    num_tests: int = 30,
    suppress_kineto_output: bool = False,
    trace_path: str | None = None,
    flush_l2: bool = True,
    with_multiple_kernels: bool = False,
    barrier: Callable[[], Any] | None = None,
) -> float | tuple[float, ...]:
    """Mean time of the kernels of `fn` whose names contain `kernel_names`, in seconds.

    On a GPU those of the CUDA kernels, here `fp8_gemm_nt` and others; where torch sees no GPU,
    those of ops, without what they call. Kernel names are torchext's, not DeepGEMM's.

    Args:
        fn: what to profile, without arguments.
        kernel_names: parts of names; for a tuple, a tuple of times is returned.
        num_tests: profiled calls, after as many that are not.
        suppress_kineto_output: drop what the profiler prints.
        trace_path: where to write a Chrome trace, if anywhere.
        flush_l2: overwrite the GPU's L2 before each call.
        with_multiple_kernels: allow several kernels of one name, to be averaged over.
        barrier: called before each call of `fn`, to align ranks.

    A kernel that was not seen counts 0, as in DeepGEMM. Raises ValueError if several kernels match
    a name and with_multiple_kernels is False.
    """
    on_gpu = torch.cuda.is_available()
    fn()
    silence = suppress_stdout_stderr() if suppress_kineto_output else empty_suppress()
    activity = ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU
    schedule = torch.profiler.schedule(wait=0, warmup=1, active=1, repeat=1)
    with silence, profile(activities=[activity], schedule=schedule, acc_events=True) as profiler:
        for _ in range(2):  # warm-up, then what counts
            for _ in range(num_tests):
                if on_gpu and flush_l2:
                    _flush_l2()
                if barrier is not None:
                    barrier()
                fn()
            if on_gpu:
                torch.cuda.synchronize()
            profiler.step()
    if trace_path is not None:
        profiler.export_chrome_trace(trace_path)
    events = profiler.key_averages()
    names = (kernel_names,) if isinstance(kernel_names, str) else kernel_names
    times = []
    for name in names:
        found = [event for event in events if name in event.key]
        if len(found) > 1 and not with_multiple_kernels:
            raise ValueError(
                f"bench_kineto: kernel_names must match one kernel each (got {name!r}, which "
                f"matches {', '.join(event.key for event in found)}); pass "
                "with_multiple_kernels=True to average over them"
            )
        micros = sum(
            event.self_device_time_total if on_gpu else event.self_cpu_time_total for event in found
        )
        count = sum(event.count for event in found)
        times.append(micros / count / 1e6 if count else 0.0)
    return times[0] if isinstance(kernel_names, str) else tuple(times)
