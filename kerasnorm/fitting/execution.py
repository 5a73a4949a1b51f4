"""One model on its way through its instructions, and how two models correspond."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import keras
import numpy as np
from keras import tree

from kerasnorm.fitting.observations import Array, Parts
from rewriters.program import Instruction, Program, Value, fill


class Opaque:
    """A model without a graph as a program of one instruction: its own call."""

    def __init__(self, model: Any, structure: Any, arrays: Sequence[Array]):
        self.inputs = tuple(Value((None, *a.shape[1:]), str(a.dtype)) for a in arrays)
        x = tree.map_structure(lambda k: self.inputs[k], structure)
        self.outputs = (Value((), "float32"),)
        self.instructions = (Instruction("", model, (x,), {}, self.outputs),)
        self.consumers: dict[Value, list[Instruction]] = {}

    def last_use(self) -> dict[Value, int]:
        return dict.fromkeys((*self.inputs, *self.outputs), 1)


class Side:
    """One model on its way through its program, values kept while needed."""

    def __init__(self, program: Any, inputs: list[Parts]):
        self.program = program
        self.env = dict(zip(program.inputs, inputs, strict=True))
        self.last = program.last_use()
        self.at = 0

    def call(
        self,
        i: Instruction,
        part: int,
        others: Mapping[Value, Any] | None = None,
    ) -> list[Any]:
        """The flat outputs of an instruction for one part of the samples; `others` come
        in the place of what is known."""
        env = {v: self.env[v][part] for v in i.inputs} | dict(others or {})
        args, kwargs = fill(i, env, False)
        outputs = tree.flatten(i.operation(*args, **kwargs))
        # An opaque model's outputs are of no interest, however many they are.
        return outputs[: len(i.outputs)]

    def finish(self, i: Instruction, outputs: list[Parts]) -> None:
        self.env.update(zip(i.outputs, outputs, strict=True))
        self.at += 1

    def free(self, needed: Callable[[Value], bool] = lambda v: False) -> None:
        """Forgets what no instruction to come reads, nor anybody else needs."""
        for v in list(self.env):
            if self.last.get(v, -1) < self.at and not needed(v):
                del self.env[v]


def size_of(x: Any) -> int:
    """Bytes that the values of one variable take."""
    dtype = keras.backend.standardize_dtype(x.dtype)
    size = {"bool": 1, "string": 16}.get(dtype)  # as TensorFlow holds short ones
    size = size or int("".join(c for c in dtype if c.isdigit())) // 8
    return int(np.prod([d or 1 for d in x.shape])) * size


def largest(program: Any) -> int:
    """Bytes of one sample of the largest value, as far as shapes are known."""
    values = [*program.inputs, *(v for i in program.instructions for v in i.outputs)]
    return 4 * max(int(np.prod([d or 1 for d in v.shape[1:]])) for v in values)


def run(model: Any, inputs: Sequence[Any]) -> list[Any]:
    """Flat outputs of a model with a graph, as at inference, of a tensor for each of
    its inputs. Its own call would hold all values until it ends; here they are
    forgotten on the way."""
    program = Program(model)
    side = Side(program, [[x] for x in inputs])
    while side.at < len(program.instructions):
        i = program.instructions[side.at]
        side.finish(i, [[v] for v in side.call(i, 0)])
        side.free(lambda v: v in program.outputs)
    return [side.env[v][0] for v in program.outputs]


def twins(teacher: Any, student: Any) -> dict[Instruction, Instruction]:
    """Student's instruction -> teacher's: same path, same call of it."""

    def numbered(program: Any) -> dict[tuple[str, int], Instruction]:
        count: dict[str, int] = {}
        found = {}
        for i in program.instructions:
            count[i.path] = count.get(i.path, -1) + 1
            found[i.path, count[i.path]] = i
        return found

    known = numbered(teacher)
    return {i: known[key] for key, i in numbered(student).items() if key in known}
