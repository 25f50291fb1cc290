"""Speed of torchext beside its peers: `python -m benchmarks` (docs/benchmarks.md).

Reading order: cases, problems, contenders, timing, worker, runner; then results, goals, report,
plots, documents. `python -m benchmarks.tune` tunes the Hopper GEMM.
"""
