"""What reading one file may cost: counted over all of it, before anything is built.

A limit on each part is no limit: a file of a few kilobytes holds any number of parts.
`load` therefore opens one budget, and every reader spends from it what it is about to
allocate or to walk through. The limits grow with the bytes that the file really has on
disk, so that a small file stays cheap and a sound file of gigabytes loads.

    with budget.opened(size):
        budget.spend("bytes", declared, what="the array 'dense/kernel'")
"""

from __future__ import annotations

import contextlib
import contextvars
import math
import time
from collections.abc import Iterator

from rewriters.errors import RewriteError


# Kind: (what every file may have, more for each byte on disk, the most of all).
_LIMITS = {
    # Objects of a container: zip members, HDF5 groups and datasets, nodes of a
    # SavedModel. Each takes 64 bytes or more in a file; the largest sound models have
    # some 50 000 of them, optimizer included.
    "members": (4_000, 1 / 64, 100_000),
    # Names in lists and attributes, keys of an index.
    "names": (20_000, 1 / 16, 400_000),
    # Layers of the config, nested ones included. Keras needs about a millisecond to
    # build one; the largest published models have some 3 000.
    "layers": (10_000, 0, 10_000),
    # Values of a JSON text, fields of a protocol buffer. Some 80 bytes and a
    # microsecond each in Python; a vocabulary of a million words has a million.
    "values": (1_000_000, 1, 5_000_000),
}
# Bytes unpacked, read or declared. Keras compresses nothing, and what it does not
# compress is met three times: in the archive, as an array, in the model. Others pack
# files, at most a hundredfold; of that, no more than a gigabyte.
_BYTES = 64 << 20
_TIMES = 8
_EXPANSION = 100
_EXPANDED = 1 << 30
# Seconds of this thread's CPU before anything is built. Reading is some 500 MB/s.
_SECONDS = 7.0
_BYTES_A_SECOND = 20e6


class Budget:
    """What one file may still cost.

    Args:
        size: bytes that the file, or the folder, really has on disk.
    """

    def __init__(self, size: int):
        self.size = size
        self.limits = {
            kind: int(min(most, each * size + free))
            for kind, (free, each, most) in _LIMITS.items()
        }
        self.limits["bytes"] = _BYTES + max(
            _TIMES * size, min(_EXPANSION * size, _EXPANDED)
        )
        self.seconds = _SECONDS + size / _BYTES_A_SECOND
        self.spent = dict.fromkeys(self.limits, 0)
        self._start = time.thread_time()

    def spend(self, kind: str, count: int = 1, *, what: str) -> None:
        """Takes `count` of a kind: bytes, members, names, layers or values.

        Args:
            kind: one of the kinds above.
            count: how many are about to be read, walked through or allocated.
            what: whose they are, for the message.

        Raises:
            RewriteError: if the file has used up its limit, or its seconds.
        """
        self.check(kind, count, what=what)
        self.spent[kind] += count

    def building(self) -> None:
        """Stops the clock: what Keras takes to build a sound model of many layers is
        no sign of a file made to hurt, and archives are read on after it."""
        self.seconds = math.inf

    def check(self, kind: str, count: int = 1, *, what: str) -> None:
        """Raises as `spend` does, and takes nothing."""
        if self.spent[kind] + count > self.limits[kind]:
            raise RewriteError(
                "The file asks for more than it can hold",
                got=f"{self.spent[kind] + count} {kind} up to {what}, "
                f"in {self.size} bytes on disk",
                expected=f"at most {self.limits[kind]} {kind}",
                fix="Fetch or save it again",
            )
        if time.thread_time() - self._start > self.seconds:
            raise RewriteError(
                "The file takes too long to read",
                got=f"more than {self.seconds:.0f} s up to {what}, "
                f"for {self.size} bytes on disk",
                expected="a file whose parts are named once each",
                fix="Fetch or save it again",
            )


_current: contextvars.ContextVar[Budget | None] = contextvars.ContextVar(
    "budget", default=None
)


@contextlib.contextmanager
def opened(size: int) -> Iterator[Budget]:
    """The budget of the file that is read inside, of `size` bytes on disk."""
    token = _current.set(Budget(size))
    try:
        yield current()
    finally:
        _current.reset(token)


def current() -> Budget:
    """The open budget; outside a load, a new one of the least file."""
    return _current.get() or Budget(0)


def spend(kind: str, count: int = 1, *, what: str) -> None:
    """`Budget.spend` of the file that is being read."""
    current().spend(kind, count, what=what)
