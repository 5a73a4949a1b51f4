"""How many samples have room in memory at each step of a walk."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

from kerasnorm.fitting.execution import Side, size_of
from rewriters.program import Instruction, Value


# Share of the memory that live values may take; the rest is for what is computed on the
# way, and for the least-squares problems.
LIVE = 0.7


class Room:
    """How many samples fit, by instruction of the student.

    Values are wide at first, and few samples show what thousands of positions of each
    say; later ones are narrow, and all samples fit.

    Args:
        programs: the teacher's and the student's.
        inputs: a few samples, a tensor for each input.
        ahead: `ahead(s)`: the teacher's instruction that has to have run before the
            student's s.
        needed: `needed(v, k)`: whether the teacher's value v is read at the student's
            k-th instruction or later.
        work: `work(s)`: values of the size of its output that s makes beside it.
        memory: bytes.

    Attributes:
        fits: samples that fit at each instruction.
        later: samples that fit there and at all that follow.
        part: samples to run at once.
    """

    def __init__(
        self,
        programs: Sequence[Any],
        inputs: Sequence[Any],
        ahead: Callable[[Instruction], int],
        needed: Callable[[Value, int], bool],
        work: Callable[[Instruction], int],
        memory: float,
    ):
        sizes = [_sizes(p, inputs) for p in programs]
        samples = len(inputs[0])
        sides: Any = (
            Side(p, cast(Any, [size[v] for v in p.inputs]))  # in the place of values
            for p, size in zip(programs, sizes, strict=True)
        )

        teacher, student = sides

        def step(side: Any, size: dict[Value, int]) -> int:
            i = side.program.instructions[side.at]
            side.finish(i, [size[v] for v in i.outputs])
            return sum(size[v] for v in i.outputs)

        self.fits = []
        for s in student.program.instructions:
            while teacher.at <= ahead(s):
                step(teacher, sizes[0])
                teacher.free(lambda v: needed(v, student.at))
            made = step(student, sizes[1])
            live = sum(sum(side.env.values()) for side in (teacher, student))
            self.fits.append(LIVE * memory * samples / (live + work(s) * made + 1))
            student.free()
            teacher.free(lambda v: needed(v, student.at))
        self.later = list(self.fits)
        for k in reversed(range(len(self.later) - 1)):
            self.later[k] = min(self.later[k], self.later[k + 1])
        largest = max(max(size.values()) for size in sizes) / samples
        self.part = max(1, int(memory / 48 / largest))


def _sizes(program: Any, inputs: Sequence[Any]) -> dict[Value, int]:
    """Bytes of each value for these samples."""
    side = Side(program, [[x] for x in inputs])
    sizes = {v: size_of(x) for v, x in zip(program.inputs, inputs, strict=True)}
    for i in program.instructions:
        outputs = side.call(i, 0)
        sizes |= {v: size_of(x) for v, x in zip(i.outputs, outputs, strict=True)}
        side.finish(i, [[x] for x in outputs])
        side.free()
    return sizes
