from support.staged_benchmarks import staged

__all__ = ["staged"]
