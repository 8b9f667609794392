"""Ctrl-C and SIGTERM as a wish: the loop ends at the next update, or while it samples, keeping everything. A second
Ctrl-C ends at once."""

from __future__ import annotations

import signal
import threading
import time
from types import FrameType, TracebackType
from typing import Any

from dualign.common.errors import StopRun

ECHO = 1.0  # seconds within which a second Ctrl-C is the launcher passing on the first


class StopAsked(StopRun):
    """The wish, where the loop can follow it."""


class Interrupts:
    """While active, `requested` names the signal that asked to stop, if one did."""

    def __init__(self) -> None:
        self.requested: str | None = None
        self._since = 0.0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Interrupts:
        if threading.current_thread() is threading.main_thread():  # signals can be handled nowhere else
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def check(self) -> None:
        """Raises StopAsked if one asked to stop."""
        if self.requested:
            raise StopAsked(self.requested)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if not self.requested:
            self.requested = "Ctrl-C" if number == signal.SIGINT else "SIGTERM"
            self._since = time.monotonic()
        elif number == signal.SIGINT and time.monotonic() - self._since > ECHO:
            raise KeyboardInterrupt
