"""Exercises that check themselves: a learner writes a function, and real ranks say whether it is right.

    check("03.bucket_order", my_answer)     ->   03.bucket_order: passed
                                            ->   03.bucket_order: failed: <the misconception that this answer shows>
                                            ->   03.bucket_order: not attempted yet

A chapter's exercises are the list `EXERCISES` of `course/tasks/chapter_NN.py`. An exercise carries its own proof: the
reference answer, which its checker must pass, and planted mistakes, each of which it must fail with that mistake's
own hint. A test goes through all of them, so a check that waves everything through cannot be committed.
"""

from __future__ import annotations

import dis
import importlib
import inspect
import pkgutil
import re
from collections.abc import Callable
from dataclasses import dataclass
from types import CodeType
from typing import Any, Literal

from ..config import UserError
from ..launch import RankError
from .passes import record as record_pass

Answer = Callable[..., Any]


class NotAttempted(UserError):
    """Raised by the stub of an exercise: there is no answer yet."""


@dataclass(frozen=True)
class Mistake:
    """A wrong answer that people give, and what to tell them."""

    name: str
    answer: Answer
    hint: str


@dataclass(frozen=True)
class Exercise:
    """A task with its checker.

    Attributes:
        id: chapter and name, as "03.bucket_order".
        task: what to do, in one paragraph.
        stub: the signature to fill in; raises `NotAttempted`.
        reference: a right answer.
        mistakes: wrong answers; `run` must answer each with its own hint.
        run: runs an answer, on ranks where that matters; None if it is right, else the hint.
    """

    id: str
    title: str
    task: str
    stub: Answer
    reference: Answer
    mistakes: tuple[Mistake, ...]
    run: Callable[[Answer], str | None]

    @property
    def chapter(self) -> str:
        return self.id.split(".")[0]


@dataclass(frozen=True)
class Outcome:
    """What became of an attempt."""

    id: str
    status: Literal["passed", "failed", "not attempted yet"]
    hint: str = ""

    @property
    def passed(self) -> bool:
        return self.status == "passed"

    def __str__(self) -> str:
        return f"{self.id}: {self.status}" + (f": {self.hint}" if self.hint else "")

    def _ipython_display_(self) -> None:
        """A notebook shows nothing for it: `check` has printed the line."""


def registered(room: str, attribute: str) -> list[Any]:
    """The things that the modules of `course/ROOM/` list in their `attribute`, in the modules' order."""
    package = importlib.import_module(f"{__package__}.{room}")
    names = sorted(module.name for module in pkgutil.iter_modules(package.__path__))
    modules = [importlib.import_module(f"{package.__name__}.{name}") for name in names]
    return [item for module in modules for item in getattr(module, attribute, [])]


def exercises() -> dict[str, Exercise]:
    """Every exercise of every chapter by its id."""
    return {exercise.id: exercise for exercise in registered("tasks", "EXERCISES")}


def exercise(exercise_id: str) -> Exercise:
    """One exercise.

    Raises:
        UserError: there is none of this id.
    """
    found = exercises()
    if exercise_id not in found:
        raise UserError(f"there is no exercise {exercise_id!r}; there are {', '.join(found)}")
    return found[exercise_id]


def check(exercise_id: str, attempt: Answer | None = None, *, record: bool = True) -> Outcome:
    """Run an answer, print one line about it, and remember a pass for `picotron-mini progress`.

    An exception in the answer is a failed attempt, told in a line; the notebook goes on.

    Args:
        attempt: the learner's function. None, a function without a body, and one that raises `NotAttempted` are not
            attempted yet.
    """
    outcome = judge(exercise(exercise_id), attempt)
    print(outcome)
    if outcome.passed and record:
        record_pass(exercise_id)
    return outcome


def judge(item: Exercise, attempt: Answer | None) -> Outcome:
    """`check` without print and memory."""
    if attempt is None or is_empty(attempt):
        return Outcome(item.id, "not attempted yet")
    try:
        hint = item.run(attempt)
    except NotAttempted:
        return Outcome(item.id, "not attempted yet")
    except Exception as error:  # the learner's code may raise anything, here or on a rank
        return Outcome(item.id, "failed", one_line(error))
    return Outcome(item.id, "failed", hint) if hint else Outcome(item.id, "passed")


def solution(exercise_id: str) -> None:
    """Print the reference answer's source."""
    print(inspect.getsource(exercise(exercise_id).reference).rstrip())


def is_empty(function: Answer) -> bool:
    """Whether a function does nothing: its body is a docstring, `...`, `pass`, or `return ...`."""
    code = getattr(function, "__code__", None)
    if not isinstance(code, CodeType):
        return False
    idle = {"RESUME", "NOP", "LOAD_CONST", "RETURN_VALUE", "RETURN_CONST", "CACHE"}
    loaded = [i.argval for i in dis.get_instructions(code) if i.opname in ("LOAD_CONST", "RETURN_CONST")]
    return all(i.opname in idle for i in dis.get_instructions(code)) and loaded[-1] in (None, ...)


def one_line(error: Exception) -> str:
    """What went wrong, as a learner wants to read it: the rank and its last line, without the traceback."""
    if not isinstance(error, RankError):
        return f"{type(error).__name__}: {error}".splitlines()[0]
    first, *rest = str(error).splitlines()[1:]  # the line before says which rank of how many
    if first.startswith("no end after"):
        return f"{first.split('. ')[0]}: the ranks wait for each other. Does each of them make the same calls in order?"
    killed = re.search(r"killed by (SIG[A-Z]+)", first)
    if killed:  # what follows is a dump of where Python was; an abort in C++ has told its reason before it
        why = next((line.split("what():")[1].strip() for line in rest if "what():" in line), "")
        return f"rank {error.rank} was killed by {killed[1]}{_told(why)}"
    said = [line for line in rest if line and not line[0].isspace()] or [first]
    return f"on rank {error.rank}: {said[-1]}"


def _told(why: str) -> str:
    if "data size" in why:  # gloo, of two ranks that hand over tensors of different sizes
        return (
            ": it received another number of bytes than it waited for. Did the ranks send tensors of different sizes?"
        )
    return f": {why}" if why else ""
