"""The order of calls and what is timed. CUDA is replaced by a stand-in."""

import time
from types import SimpleNamespace

import pytest
import torch

from benchmarks import timing
from benchmarks.problems import Run

pytestmark = pytest.mark.alone  # measures times


def run(calls: list[str], name: str, seconds: float, before: float = 0.0) -> Run:
    def call() -> None:
        calls.append(name)
        time.sleep(seconds)

    return Run(call, lambda result: {}, before=(lambda: time.sleep(before)) if before else None)


def test_contenders_take_turns_and_preparation_is_not_timed():
    calls: list[str] = []
    runs = {"a": run(calls, "a", 0.002, before=0.02), "b": run(calls, "b", 0.004)}
    times = timing.interleave(runs, "cpu", rounds=4, seconds=60)
    assert calls[-8:] == ["a", "b", "b", "a", "a", "b", "b", "a"]
    assert [len(samples) for samples in times.values()] == [4, 4]
    assert 0.002 <= min(times["a"]) < 0.02 and min(times["b"]) >= 0.004


def test_few_rounds_when_time_is_short_but_never_fewer_than_three():
    calls: list[str] = []
    times = timing.interleave({"a": run(calls, "a", 0.01)}, "cpu", rounds=1000, seconds=0.1)
    assert 3 <= len(times["a"]) <= 10
    assert len(timing.interleave({"a": run(calls, "a", 0.01)}, "cpu", 9, 0.0)["a"]) == 3


def test_short_calls_are_sampled_by_the_mean_of_many():
    calls: list[str] = []
    times = timing.interleave({"a": run(calls, "a", 0.0)}, "cpu", rounds=3, seconds=60)
    assert len(times["a"]) == 3
    in_a_sample, rest = divmod(len(calls) - timing.WARM_UPS - 1, 3)
    assert in_a_sample > 1 and rest == 0
    assert max(times["a"]) < timing.CpuStopwatch.SAMPLE_SECONDS


def test_a_cpus_ceilings_are_those_of_all_threads_and_of_one(monkeypatch):
    threads: list[int] = [torch.get_num_threads()]
    monkeypatch.setattr(torch, "set_num_threads", threads.append)
    monkeypatch.setattr(timing, "_ceilings", lambda device: {"threads": threads[-1]})
    ceilings = timing.measure_ceilings("cpu")
    assert ceilings == {"threads": threads[0], "one_thread": {"threads": 1}}
    assert threads[-1] == threads[0]


def test_host_time_on_a_cpu_is_cpu_time():
    assert timing.host_microseconds(run([], "a", 0.002), "cpu", batches=2, calls=2) < 1000


def test_summary_is_in_milliseconds():
    summary = timing.summarize([0.005, 0.001, 0.003, 0.002, 0.004])
    assert summary == pytest.approx({"median": 3, "p20": 2, "p80": 4, "samples": 5})


def test_on_a_gpu_caches_are_cleared_and_the_host_gets_ahead(monkeypatch):
    log: list[str] = []
    spins: list[int] = []

    class Event:
        def __init__(self, enable_timing: bool):
            assert enable_timing

        def record(self) -> None:
            self.at = time.perf_counter()
            log.append("event")

        def elapsed_time(self, end: "Event") -> float:
            return 1e3 * (end.at - self.at)

    class Buffer:
        def zero_(self) -> None:
            log.append("flush")

    sizes: list[int] = []

    def empty(size: int, **options: object) -> Buffer:
        sizes.append(4 * size)
        return Buffer()

    def spin(cycles):
        spins.append(cycles)
        log.append("spin")

    properties = SimpleNamespace(L2_cache_size=100 << 20)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(torch.cuda, "_sleep", spin)
    monkeypatch.setattr(torch, "empty", empty)
    subject = run(log, "call", 0.003)
    subject.before = lambda: log.append("before")
    times = timing.interleave({"a": subject}, "cuda", rounds=5, seconds=60)
    assert log[-6:] == ["before", "flush", "spin", "event", "call", "event"]
    assert sizes == [400 << 20]
    assert len(times["a"]) == 5 and 0.003 <= min(times["a"]) < 0.1
    assert spins[-1] >= 0.003 * timing.CudaStopwatch.CYCLES_PER_SECOND  # as long as the launch
    assert timing.host_microseconds(subject, "cuda", batches=2, calls=3) >= 3000


def test_joules_are_counted_from_tick_to_tick(monkeypatch):
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    calls: list[str] = []
    start = time.perf_counter()

    def millijoules() -> int:  # 100 W; the counter advances every 50 ms
        return 5000 * int((time.perf_counter() - start) / 0.05)

    meter = timing.EnergyMeter(millijoules)
    meter.SECONDS = 0.2
    joules = meter.joules(run(calls, "a", 0.002))
    assert 0.2 <= joules <= 0.4  # 100 W for 2 ms and the overhead of sleeping
    assert len(calls) > 60


def test_a_counter_that_stands_still_is_an_error(monkeypatch):
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    meter = timing.EnergyMeter(lambda: 7)
    meter.LIMIT_S = 0.05
    with pytest.raises(RuntimeError, match="energy counter stood still"):
        meter.joules(run([], "a", 0.001))


def test_no_nvml_is_said_by_name():
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises((OSError, RuntimeError), match=r"libnvidia-ml|NVML status|CUDA|NVIDIA"):
        timing.EnergyMeter()
