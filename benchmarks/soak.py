"""The former name of tests.hardware.soak, kept as an alias."""

import runpy
import warnings

if __name__ == "__main__":
    warnings.warn("use `python -m tests.hardware.soak`", DeprecationWarning, stacklevel=1)
    runpy.run_module("tests.hardware.soak", run_name="__main__", alter_sys=True)
