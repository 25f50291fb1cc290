"""Benchmarks of torchext beside its peers, and the check that a machine with a GPU runs.

`python -m benchmarks` times (docs/benchmarks.md); `python -m benchmarks.gpu_check` tests, sanitizes
and times a wheel. Reading order: cases, problems, contenders, timing, worker, runner; then results,
goals, report, plots; then gpu_check.
"""
