"""Settings of the process, as in DeepGEMM: the SM budget, and switches that are ignored."""

from __future__ import annotations

import torch

_num_sms = 0  # 0: all


def set_num_sms(num_sms: int) -> None:
    """Limits every later call in this process to `num_sms` SMs, an even or odd number.

    0 removes the limit; it is accepted only where torch sees no GPU, since `get_num_sms` returns it
    there.

    Raises ValueError if num_sms is negative or, where torch sees a GPU, 0 or more than its SMs.
    """
    global _num_sms  # noqa: PLW0603  (a setting of the process, as there)
    most = _count_sms()
    if num_sms < 0 or (most and not 0 < num_sms <= most):
        raise ValueError(
            f"set_num_sms: num_sms must be between 1 and the GPU's {most or 'number of'} SMs "
            f"(got {num_sms})"
        )
    _num_sms = num_sms


def get_num_sms() -> int:
    """The limit that `set_num_sms` set; else the SMs of torch's current GPU, or 0 without a GPU."""
    return _num_sms or _count_sms()


def budget() -> int:
    """The limit as torchext's ops take it: 0 for all SMs."""
    return _num_sms


def _count_sms() -> int:
    if not torch.cuda.is_available():
        return 0
    return torch.cuda.get_device_properties(torch.cuda.current_device()).multi_processor_count


def use_deterministic_algorithms(enabled: bool) -> None:
    """Accepted and ignored: every kernel here is deterministic."""


def get_deterministic_algorithms() -> bool:
    """True: every kernel here is deterministic."""
    return True


def set_ignore_compile_dims(new_value: bool) -> None:
    """Accepted and ignored: no kernel is compiled at run time."""
