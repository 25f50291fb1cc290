"""Runs every launch of the simulator's tests on a GPU too, and compares memory bit for bit.

    python -m pytest tests/sim -p tests.hardware.shadow.plugin --shadow-gpu FOLDER

`driver` calls the CUDA driver, `compare` judges differences, `known` lists those that stay,
`shadow` repeats a launch on the GPU, `plugin` is the pytest plugin. docs/benchmarks.md says how to
read the result.
"""
