"""A package, so that `python -m tests.hardware.soak` runs it and not an installed `tests`."""
