"""Checks a wheel on a machine with a GPU: tests, compute-sanitizer, soak and benchmarks.

    python -m tests.hardware.gpu_check --wheel dist/torchext_fp8-*.whl

This needs the wheel, this repository and the machine's own torch, but no network and no compiler.
The wheel is installed into a temporary copy of the repository without the source package, so that
nothing imports the checkout by mistake. Every stage runs in processes of its own under time limits,
and results.json is rewritten after every step. docs/benchmarks.md describes the files that a check
writes.
"""
