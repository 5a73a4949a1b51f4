"""Which outputs are but added to others: what counts of them is the sum."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import keras

from rewriters.program import Instruction, Value


# What leaves its input as it is at inference.
PASSING = (
    keras.layers.Identity,
    keras.layers.Dropout,  # spatial dropout as well
    keras.layers.GaussianDropout,
    keras.layers.GaussianNoise,
)


def sums(
    teacher: Any, student: Any, twins: Mapping[Instruction, Instruction]
) -> dict[Instruction, list[tuple[Value, Value]]]:
    """Student's instructions whose output goes into a sum and nowhere else, with the
    `(teacher's, student's)` values that it is added to.

    What each has to make up for is what the others, as far as they are known by then,
    lack of the teacher's.
    """
    found = {}
    for s, t in twins.items():
        old, new = _end(teacher, t), _end(student, s)
        if old is None or new is None or twins.get(new[0]) is not old[0]:
            continue
        shape = s.outputs[0].shape
        found[s] = [
            (a, b)
            for a, b in zip(old[0].inputs, new[0].inputs, strict=True)
            if a is not old[1] and b is not new[1] and a.shape == b.shape == shape
        ]
    return found


def _end(program: Any, i: Instruction) -> tuple[Instruction, Value] | None:
    """The sum that an instruction's output goes into, and as which of its inputs."""
    value = i.outputs[0] if len(i.outputs) == 1 else None
    while value is not None:
        consumers = program.consumers.get(value, ())
        if len(consumers) != 1 or value in program.outputs:
            return None
        (end,) = consumers
        # The layer and the operation.
        if type(end.operation).__name__ == "Add":
            return (end, value) if end.inputs.count(value) == 1 else None
        value = end.outputs[0] if isinstance(end.operation, PASSING) else None
    return None
