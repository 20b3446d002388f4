"""Asks a driver within a time limit. A wedged driver blocks in the kernel, where nothing can interrupt the asking."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Final, TypeVar

if TYPE_CHECKING:
    from threading import Thread

T = TypeVar("T")

_LEFT_BEHIND: Final[dict[str, Thread]] = {}  # by name: the thread that still waits for an answer


def ask(name: str, call: Callable[[], T], timeout_s: float) -> T | None:
    """Return the answer, or None where there is none in time: then a thread is left behind that waits on.

    What the call raises is raised here. As long as a thread waits, whoever asks again under this name is told so at
    once: waiting once for a wedged driver is enough, and one thread is enough to lose.
    """
    from queue import Empty, SimpleQueue  # noqa: PLC0415 - only machines with such a driver pay for it
    from threading import Thread  # noqa: PLC0415 - likewise

    if name in _LEFT_BEHIND and _LEFT_BEHIND[name].is_alive():
        return None
    answers: SimpleQueue[tuple[T | None, Exception | None]] = SimpleQueue()

    def work() -> None:
        try:
            answers.put((call(), None))
        except Exception as error:  # noqa: BLE001 - it belongs to whoever asked, not to this thread
            answers.put((None, error))

    thread = Thread(target=work, name=name, daemon=True)
    thread.start()
    try:
        answer, error = answers.get(timeout=timeout_s)
    except Empty:
        _LEFT_BEHIND[name] = thread
        return None
    if error is not None:
        raise error
    return answer
