"""`Work`: what an asynchronous dispatch or combine returns."""

from __future__ import annotations

from collections.abc import Callable
from typing import Generic, TypeVar

Result = TypeVar("Result")


class Work(Generic[Result]):
    """A dispatch or combine whose bytes are under way.

    The first half (quantize, pack, start to send) has run on the caller's stream. `wait` runs the
    second half (unpack, or sum) on the stream that is current then. Works of a dispatcher may be
    waited for in any order, but all ranks must start them in the same order.
    """

    def __init__(self, finish: Callable[[], Result], is_completed: Callable[[], bool]) -> None:
        self._finish: Callable[[], Result] | None = finish
        self._is_completed = is_completed
        self._result: Result

    def is_completed(self) -> bool:
        """Whether the bytes have arrived, so that `wait` would not wait for another rank."""
        return self._finish is None or self._is_completed()

    def wait(self) -> Result:
        """The result. A second call returns the same.

        Raises:
            MissingRanksError: a rank did not take part.
            RuntimeError: a rank sends more rows than the dispatcher's capacity.
        """
        if self._finish is not None:
            finish, self._finish = self._finish, None
            self._result = finish()
        if not hasattr(self, "_result"):
            raise RuntimeError(
                "torchext.moe.Work: wait must succeed once (its first call raised); dispatch or "
                "combine again"
            )
        return self._result
