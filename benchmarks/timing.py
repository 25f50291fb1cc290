"""Measures interleaved times, host times, energy, and the two ceilings of a roofline.

Contenders take turns, one call each in every round and in rotating order. A drift of clocks or
temperature then affects all contenders alike.
"""

from __future__ import annotations

import ctypes
import math
import statistics
import time
from collections.abc import Callable

import torch

from .problems import Run

WARM_UPS = 2


def summarize(samples: list[float]) -> dict:
    """Seconds -> {"median", "p20", "p80", "samples"}, the first three in milliseconds."""
    ordered = sorted(1e3 * sample for sample in samples)
    last = len(ordered) - 1
    return {
        "median": statistics.median(ordered),
        "p20": ordered[round(0.2 * last)],
        "p80": ordered[round(0.8 * last)],
        "samples": len(ordered),
    }


def interleave(
    runs: dict[str, Run], device: str, rounds: int, seconds: float
) -> dict[str, list[float]]:
    """Seconds of each call of each run, over `rounds` rounds, or as many as fit in `seconds`, at
    least 3."""
    stopwatch = CudaStopwatch() if device == "cuda" else CpuStopwatch()
    for run in runs.values():
        for _ in range(WARM_UPS):
            stopwatch.sample(run)
        stopwatch.learn(run)
    estimate = sum(stopwatch.cost(run) for run in runs.values())
    rounds = max(3, min(rounds, int(seconds / estimate)))
    pending: dict[str, list[Callable[[], float]]] = {name: [] for name in runs}
    order = list(runs)
    for _ in range(rounds):
        for name in order:
            pending[name].append(stopwatch.sample(runs[name]))
        order.append(order.pop(0))
    stopwatch.finish()
    return {name: [read() for read in reads] for name, reads in pending.items()}


class CpuStopwatch:
    # A sample of a short call is the mean of as many calls in a row as last this long; a call that
    # needs preparation before it is always a sample of its own.
    SAMPLE_SECONDS = 5e-4

    def __init__(self) -> None:
        self._cost: dict[int, float] = {}
        self._calls: dict[int, int] = {}

    def sample(self, run: Run) -> Callable[[], float]:
        """Calls `run`. The returned function gives the seconds of a call; call it after
        finish()."""
        if run.before:
            run.before()
        calls = self._calls.get(id(run), 1)
        start = time.perf_counter()
        for _ in range(calls):
            run.call()
        elapsed = (time.perf_counter() - start) / calls
        return lambda: elapsed

    def learn(self, run: Run) -> None:
        """Chooses the number of calls in a sample of `run`, and measures the seconds that the
        sample takes, everything included."""
        start = time.perf_counter()
        seconds = self.sample(run)()
        self._cost[id(run)] = time.perf_counter() - start
        if run.before is None:
            calls = math.ceil(self.SAMPLE_SECONDS / max(1e-7, seconds))
            self._calls[id(run)] = calls
            self._cost[id(run)] *= calls

    def cost(self, run: Run) -> float:
        return self._cost[id(run)]

    def finish(self) -> None:
        pass


class CudaStopwatch(CpuStopwatch):
    """CUDA events around a call whose inputs are not in the L2 cache.

    Before the first event the GPU clears a buffer of four times the L2's size. It then spins for as
    long as the host needs to launch the call, so that only device work lies between the events.
    """

    CYCLES_PER_SECOND = 2e9  # above any Hopper's clock, so that the spin is never too short

    def __init__(self) -> None:
        super().__init__()
        l2 = torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size
        self._flush = torch.empty(max(4 * l2, 1 << 28) // 4, dtype=torch.int32, device="cuda")
        self._launch_seconds: dict[int, float] = {}

    def sample(self, run: Run) -> Callable[[], float]:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        if run.before:
            run.before()
        self._flush.zero_()
        launch = self._launch_seconds.get(id(run), 1e-3)
        torch.cuda._sleep(int(1.5 * launch * self.CYCLES_PER_SECOND))
        begin.record()
        run.call()
        end.record()
        return lambda: begin.elapsed_time(end) / 1e3

    def learn(self, run: Run) -> None:
        if run.before:
            run.before()
        torch.cuda.synchronize()
        start = time.perf_counter()
        run.call()
        self._launch_seconds[id(run)] = time.perf_counter() - start
        torch.cuda.synchronize()
        start = time.perf_counter()
        self.sample(run)
        torch.cuda.synchronize()
        self._cost[id(run)] = time.perf_counter() - start

    def finish(self) -> None:
        torch.cuda.synchronize()


def host_microseconds(run: Run, device: str, batches: int = 9, calls: int = 100) -> float:
    """Host microseconds of one call, as a median over batches.

    A GPU works asynchronously, so that its time does not count. On a CPU this is the calling
    thread's CPU time, kernel included, so that other work on the machine does not count.
    """
    clock = time.perf_counter if device == "cuda" else time.thread_time
    means = []
    for _ in range(batches + 1):
        if device == "cuda":
            torch.cuda.synchronize()
        start = clock()
        for _ in range(calls):
            run.call()
        means.append((clock() - start) / calls)
    if device == "cuda":
        torch.cuda.synchronize()
    return 1e6 * statistics.median(means[1:])


class Nvml:
    """The energy counter of the current GPU, read through NVML, the driver's library.

    Raises OSError or RuntimeError if the library, the GPU or the counter is missing.
    """

    def __init__(self) -> None:
        self._library = ctypes.CDLL("libnvidia-ml.so.1")
        self._call("nvmlInit_v2")
        uuid = torch.cuda.get_device_properties(torch.cuda.current_device()).uuid
        self._handle = ctypes.c_void_p()
        name = f"GPU-{uuid}".encode()
        self._call("nvmlDeviceGetHandleByUUID", name, ctypes.byref(self._handle))
        self.millijoules()

    def _call(self, function: str, *arguments: object) -> None:
        status = getattr(self._library, function)(*arguments)
        if status != 0:
            raise RuntimeError(f"{function}: NVML status {status}")

    def millijoules(self) -> int:
        """Millijoules since the driver was loaded. The counter advances about every 100 ms."""
        value = ctypes.c_ulonglong()
        self._call("nvmlDeviceGetTotalEnergyConsumption", self._handle, ctypes.byref(value))
        return value.value


class EnergyMeter:
    """Joules of a call among back-to-back calls, including the GPU's idle power."""

    SECONDS = 1.0
    LIMIT_S = 10.0  # after this time without a change, the counter counts as stopped

    def __init__(self, millijoules: Callable[[], int] | None = None):
        self._millijoules = millijoules or Nvml().millijoules

    def joules(self, run: Run) -> float:
        """Joules of a call, measured between two changes of the counter that lie at least SECONDS
        apart, with calls all the time."""
        calls = self._calls_in(run, 0.005)
        self._until_tick(run, calls, 0.0)
        before = self._millijoules()
        count = self._until_tick(run, calls, self.SECONDS)
        return (self._millijoules() - before) / 1e3 / count

    def _calls_in(self, run: Run, seconds: float) -> int:
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(3):
            run.call()
        torch.cuda.synchronize()
        return max(1, min(1000, int(3 * seconds / (time.perf_counter() - start))))

    def _until_tick(self, run: Run, calls: int, seconds: float) -> int:
        """Calls `run` until the counter changes after `seconds`; returns the number of calls.

        calls: the number of calls between two readings of the counter.
        """
        start, count, last = time.perf_counter(), 0, self._millijoules()
        while True:
            for _ in range(calls):
                run.call()
            torch.cuda.synchronize()
            count += calls
            now, elapsed = self._millijoules(), time.perf_counter() - start
            if now != last and elapsed >= seconds:
                return count
            if elapsed > seconds + self.LIMIT_S:
                raise RuntimeError(f"NVML's energy counter stood still for {self.LIMIT_S:.0f} s")
            last = now


def measure_ceilings(device: str) -> dict:
    """The machine's measured peak rates: the two lines of a roofline.

    copy_bytes_per_s: a large copy, bytes read plus bytes written. gemm_flops_per_s: a large BF16
    GEMM on random data. fp8_flops_per_s: the rate that reports take shares of: twice the BF16 rate
    on a GPU; on a CPU, which has no FP8 units, the BF16 rate. On a CPU, the rates are those of all
    threads; one_thread: the same rates of one.
    """
    if device == "cuda":
        return _ceilings(device)
    threads = torch.get_num_threads()
    everything = _ceilings(device)
    torch.set_num_threads(1)
    one = _ceilings(device)
    torch.set_num_threads(threads)
    return everything | {"one_thread": one}


def _ceilings(device: str) -> dict:
    megabytes, size = (2048, 8192) if device == "cuda" else (256, 1536)
    dtype = torch.bfloat16
    source = torch.randint(0, 127, (megabytes << 20,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    runs = {
        "copy": Run(lambda: target.copy_(source), lambda result: {}),
        "gemm": Run(lambda: a @ b.t(), lambda result: {}),
    }
    times = interleave(runs, device, rounds=11, seconds=5.0)
    copy, gemm = (statistics.median(times[name]) for name in ("copy", "gemm"))
    flops = 2.0 * size**3 / gemm
    return {
        "copy_bytes_per_s": 2.0 * source.numel() / copy,
        "gemm_flops_per_s": flops,
        "gemm_dtype": str(dtype).removeprefix("torch."),
        "fp8_flops_per_s": 2 * flops if device == "cuda" else flops,
    }
