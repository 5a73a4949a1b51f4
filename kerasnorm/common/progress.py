"""A progress bar for work that turns out to take more than two seconds."""

from __future__ import annotations

import time
from typing import Any


class Progress:
    """Context whose `update` draws a bar, gone when the work is done.

    Args:
        verbose: False never draws.
        after: seconds before the bar appears.
    """

    def __init__(self, verbose: bool | int = True, after: float = 2.0):
        self.verbose, self.after = bool(verbose), after
        self.started = time.perf_counter()
        self.bar: Any = None

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *exc: object) -> None:
        if self.bar is not None:
            self.bar.stop()

    def update(self, what: str, share: float) -> None:
        """Says what is being done, and the share of it that is, 0 to 1."""
        if not self.verbose or time.perf_counter() - self.started < self.after:
            return
        if self.bar is None:
            from rich.progress import Progress as Bar

            self.bar = Bar(transient=True)
            self.task = self.bar.add_task(what, total=1.0)
            self.bar.start()
        self.bar.update(self.task, description=what, completed=share)
