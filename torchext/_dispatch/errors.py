"""Converts a compiled op's RuntimeError to the class that its message names.

LibTorch's stable ABI can only raise a RuntimeError, so csrc/runtime/check.h writes the intended
class at the end of the message: "... [ValueError]".
"""

from __future__ import annotations

import re

_CLASSES: dict[str, type[Exception]] = {"ValueError": ValueError, "TypeError": TypeError}
# With TORCH_SHOW_CPP_STACKTRACES=1 a C++ stack trace follows the message.
_TAGGED = re.compile(r"(.*?) \[(ValueError|TypeError)\](\n.*)?", re.DOTALL)


def python_error(error: RuntimeError) -> Exception:
    """`error` as the class that its message names, without that tag; `error` itself without a tag.

    Used as `except RuntimeError as error: raise python_error(error) from None` around a call. This
    costs nothing unless the call raises, and torch.compile traces through it.
    """
    tagged = _TAGGED.fullmatch(str(error))
    if tagged is None:
        return error
    message, name, trace = tagged.groups()
    return _CLASSES[name](message + (trace or ""))
