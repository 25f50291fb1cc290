"""torchext.compat.deep_gemm.testing: comparison, timing, and the decorators of test scripts."""

from __future__ import annotations

import os

import pytest
import torch

from torchext.compat.deep_gemm import testing


def test_calc_diff():
    x = torch.randn(50, 20)
    assert testing.calc_diff(x, x) == 0
    assert testing.calc_diff(x, -x) == pytest.approx(2)
    assert testing.calc_diff(torch.zeros(3), torch.zeros(3)) == 0
    y = x + 0.01 * torch.randn(50, 20)
    assert 0 < testing.calc_diff(x.bfloat16(), y) < 1e-3
    # DeepGEMM's definition: one minus twice the inner product over the sum of squares
    assert testing.calc_diff(torch.tensor([1.0, 2.0]), torch.tensor([2.0, 2.0])) == pytest.approx(
        1 - 2 * 6 / 13
    )


def test_count_bytes():
    x, y = torch.zeros(3, 4), torch.zeros(5, dtype=torch.float8_e4m3fn)
    assert testing.count_bytes(x, (y, None, [x, y])) == 2 * 48 + 2 * 5
    assert testing.count_bytes() == 0


def test_assert_bitwise_equal():
    x = torch.randn(4, 5)
    x[2, 3] = torch.nan
    testing.assert_bitwise_equal(x, x.clone())
    testing.assert_bitwise_equal(torch.ones(()), torch.ones(()))
    testing.assert_bitwise_equal(torch.ones(0, 3), torch.ones(0, 3))
    y = x.clone()
    y[1, 4] = 7
    with pytest.raises(AssertionError, match=r"bits differ \(d\): in 1 of 20 .*first at \(1, 4\)"):
        testing.assert_bitwise_equal(x, y, "d")
    with pytest.raises(AssertionError, match="bits differ"):
        testing.assert_bitwise_equal(torch.zeros(2), -torch.zeros(2))
    with pytest.raises(AssertionError, match="dtypes differ"):
        testing.assert_bitwise_equal(x, x.half())
    with pytest.raises(AssertionError, match="shapes differ"):
        testing.assert_bitwise_equal(x, x[0])


def test_bench_counts_calls():
    calls = []
    seconds = testing.bench(lambda: calls.append(1), num_warmups=2, num_tests=3)
    assert len(calls) == 5 and seconds >= 0


def test_bench_kineto_finds_kernels_by_name(capfd, tmp_path):
    x = torch.randn(32, 32)
    calls = []

    def step():
        calls.append(1)
        print("noise")
        return torch.mm(x, x)

    times = testing.bench_kineto(
        step, ("aten::mm", "no such kernel"), num_tests=4, suppress_kineto_output=True,
        trace_path=str(tmp_path / "trace.json"),
    )  # fmt: skip
    assert isinstance(times, tuple)
    assert times[0] > 0 and times[1] == 0
    assert len(calls) == 1 + 2 * 4
    assert capfd.readouterr().out == "noise\n"  # from the call before profiling
    assert (tmp_path / "trace.json").stat().st_size > 0
    assert isinstance(testing.bench_kineto(lambda: torch.mm(x, x), "aten::mm", num_tests=1), float)
    with pytest.raises(ValueError, match=r"must match one kernel each .*with_multiple_kernels"):
        testing.bench_kineto(lambda: (x + 1).mm(x), "aten::", num_tests=1)
    assert testing.bench_kineto(
        lambda: (x + 1).mm(x), "aten::", num_tests=1, with_multiple_kernels=True
    )


def test_decorators(monkeypatch, capsys):
    monkeypatch.setenv("DG_TEST", "1")
    seen = []

    @testing.ignore_env("DG_TEST", lambda: True)
    def without():
        seen.append(os.environ.get("DG_TEST"))
        raise KeyError

    with pytest.raises(KeyError):
        without()
    testing.ignore_env("DG_TEST", lambda: False)(lambda: seen.append(os.environ["DG_TEST"]))()
    assert seen == [None, "1"] and os.environ["DG_TEST"] == "1"
    testing.test_filter(lambda: True)(lambda: seen.append("ran"))()
    testing.test_filter(lambda: testing.get_arch_major() == 10)(without)()
    assert seen[-1] == "ran"
    assert capsys.readouterr().out == "without: left out, by its filter\n"
