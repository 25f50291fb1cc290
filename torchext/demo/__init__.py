"""The demonstration that `python -m torchext.demo` runs: one model, trained twice, once in FP8."""
