"""Steps of training, counted where Keras runs several at a time."""

from __future__ import annotations


class Steps:
    """Counts the steps of training, and tells when multiples of a number are reached.

    Args:
        every: the number; None never tells.

    Attributes:
        count: steps so far.
    """

    def __init__(self, every: int | None):
        self.every, self.count, self._batch = every, 0, -1

    def passed(self, batch: int, of: int | None = None) -> bool:
        """Whether the steps up to the end of `batch` reached a multiple of `every`.

        Args:
            batch: as `on_train_batch_end` is told: the last one of those that ran.
            of: batches of an epoch, where that is known (`params["steps"]`): at its end
                fewer run than `batch` says.
        """
        batch = batch if of is None else min(batch, of - 1)
        before = self.count
        # In a new epoch batches count from 0 again.
        self.count += batch - (self._batch if batch > self._batch else -1)
        self._batch = batch
        return bool(self.every) and self.count // self.every > before // self.every
