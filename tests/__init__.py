"""A package, so that `python -m tests.hardware.soak` finds it before an installed `tests`."""
