"""The host time of a call is measured for every op. Tests do not check how long it is."""

from benchmarks import host_overhead
from torchext import ops


def test_every_op_and_linear_are_measured():
    figures = host_overhead.measure("cpu", rounds=1)
    assert figures.keys() == host_overhead.measure("cpu", rounds=1, rows=3).keys()
    assert {f"ops.{name}" for name in ops.OPS} <= figures.keys()
    assert {"Linear forward, training", "Linear forward, frozen"} <= figures.keys()
    assert all(microseconds > 0 for microseconds in figures.values())
