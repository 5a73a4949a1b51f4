"""CRC-32C, the checksum of TensorFlow's files, at gigabytes a second in NumPy.

A checksum is the remainder of the data, taken as one long polynomial over GF(2),
divided by a fixed one. That one divides x^5685 + x^1362 + x^426 + 1, and as squares
of sums are sums of squares here, the same with every exponent times 8 or 64. So a run
of up to 5685 - 1362 bytes, or words of 8 bytes, may be removed from the front when it
is added to what lies 4323, 5259 and 5685 of them further on: three exclusive ors of
long arrays instead of a table for each byte.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np


_SHIFTS = (5685 - 1362, 5685 - 426, 5685)
# Four bytes that bring a checksum that starts at zero to its proper start, all ones.
_START = bytes.fromhex("54641f64")


def _table() -> list[int]:
    table = []
    for n in range(256):
        for _ in range(8):
            n = (n >> 1) ^ 0x82F63B78 if n & 1 else n >> 1
        table.append(n)
    return table


_TABLE = _table()


def masked_crc32c(parts: Iterable[bytes | memoryview]) -> int:
    """The checksum of the `parts` together, rotated and offset as TensorFlow stores it.

    Args:
        parts: the data in order; parts of some megabytes are the fastest.
    """
    left = np.frombuffer(_START, np.uint8)
    for part in parts:
        left = np.concatenate([left, np.frombuffer(part, np.uint8)])
        whole = left[: len(left) // 8 * 8].view(np.uint64)
        left = left[8 * _fold(whole) :]
    left = left[_fold(left) :]
    crc = 0
    for byte in left.tolist():
        crc = _TABLE[(crc ^ byte) & 0xFF] ^ (crc >> 8)
    crc ^= 0xFFFFFFFF
    return (((crc >> 15) | (crc << 17)) + 0xA282EAD8) & 0xFFFFFFFF


def _fold(items: np.ndarray) -> int:
    """Adds the front of `items` to their end, in place; returns how many to remove."""
    removed = max(0, len(items) - _SHIFTS[-1])
    for start in range(0, removed, _SHIFTS[0]):
        run = items[start : min(start + _SHIFTS[0], removed)]
        for shift in _SHIFTS:
            items[start + shift : start + shift + len(run)] ^= run
    return removed
