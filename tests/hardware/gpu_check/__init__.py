"""The check of a wheel on a machine with a GPU: tests, compute-sanitizer, benchmarks, one folder.

    python -m tests.hardware.gpu_check --wheel dist/torchext-*.whl

needs that wheel, this repository and the machine's own torch; no network, no compiler. The wheel is
installed into a temporary copy of the repository whose source package is left out, so that nothing
can import the checkout by mistake. Everything runs in processes of its own under time limits;
results.json is rewritten after every step. docs/benchmarks.md describes what is left behind.
"""
