"""Other libraries' interfaces on torchext's kernels: to change one import and nothing else.

`torchext.compat.deep_gemm` is DeepGEMM's FP8 interface for Hopper.
"""
