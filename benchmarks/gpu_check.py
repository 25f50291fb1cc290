"""The former name of tests.hardware.gpu_check, kept as an alias."""

import runpy
import warnings

if __name__ == "__main__":
    warnings.warn("use `python -m tests.hardware.gpu_check`", DeprecationWarning, stacklevel=1)
    runpy.run_module("tests.hardware.gpu_check", run_name="__main__", alter_sys=True)
