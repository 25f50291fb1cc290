"""Random ops on random shapes, configurations, streams and CUDA graphs, for as long as asked, every
result compared bit for bit: faults that strike once in thousands of launches.

    python -m tests.hardware.soak --minutes 3

jobs.py draws the work, made of operands.py, and says what must come out; runner.py launches it in
every way there is.
"""
