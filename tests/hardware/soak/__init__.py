"""Random ops with random shapes, configurations, streams and CUDA graphs, to find faults that occur
once in thousands of launches. Wherever bits are promised, results are compared bit for bit.

    python -m tests.hardware.soak --minutes 3

jobs.py draws jobs with their expected results; operands.py has operands, outputs and comparisons
that jobs share; runner.py launches jobs alone, on streams and in graphs.
"""
