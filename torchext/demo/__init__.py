"""The demonstration of `python -m torchext.demo`: one model, trained as written and in FP8."""
