"""What a pipeline stage can do, and which stage holds which part of the model: the words that schedules are made of.

An `Action` is one pass of one micro-batch through one *chunk*, a run of layers that a stage holds:

    F3    forward                            B3    backward, whole: the input's gradient and the weights'
    I3    backward, the input's gradient     W3    backward, the weights' gradients, which nobody else waits for
    F3'   the same of the stage's second chunk, F3'' of its third

A `Route` lays the chunks out. The model is cut into stages x chunks *virtual stages*, and every micro-batch passes
through them in order, 0, 1, 2, ... A line has one chunk a stage; with several there are two shapes, here for 4 stages:

                 loop                         turns (the V)
    stage 0      0 \\       4 \\                0 \\           7
    stage 1        1 \\       5 \\                1 \\       6 /
    stage 2          2 \\       6 \\                2 \\   5 /
    stage 3            3 -> 0   7                   3 4 /

In a loop the last stage sends back to the first. In a V the path turns round on the last stage, where nothing is sent,
and ends on the first one: embedding, head and loss are on one rank, and a tied embedding is there only once.

Everything else about a schedule follows from these two: which message an action needs, which one it makes, and
between whom it travels.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

Kind = Literal["forward", "backward", "backward_input", "backward_weight"]
LETTERS: dict[Kind, str] = {"forward": "F", "backward": "B", "backward_input": "I", "backward_weight": "W"}


@dataclass(frozen=True)
class Action:
    """One thing that a stage does: a pass of one micro-batch through one of its chunks."""

    kind: Kind
    micro_batch: int
    chunk: int = 0

    def __str__(self) -> str:
        return f"{LETTERS[self.kind]}{self.micro_batch}{chr(39) * self.chunk}"


Schedule = Callable[[int, int, int], list[Action]]  # (stage, stages, micro_batches) -> what this stage does, in order


class Message(NamedTuple):
    """Hidden states [B, T, D] that virtual stage `maker` hands to the next one, or their gradient to the one before."""

    kind: Literal["forward", "backward"]
    maker: int
    micro_batch: int


@dataclass(frozen=True)
class Route:
    """Which stage holds which virtual stage.

    Attributes:
        stages: ranks along the pipeline's axis.
        chunks: virtual stages that each of them holds.
        turns: every second chunk runs through the stages from the last to the first, as in a V.
    """

    stages: int
    chunks: int = 1
    turns: bool = False

    @property
    def length(self) -> int:
        """The number of virtual stages."""
        return self.stages * self.chunks

    def position(self, stage: int, chunk: int) -> int:
        """The number of the virtual stage that is this chunk of this stage."""
        return chunk * self.stages + (self.stages - 1 - stage if self.turns and chunk % 2 else stage)

    def stage(self, position: int) -> int:
        """The stage that holds a virtual stage."""
        chunk, offset = divmod(position, self.stages)
        return self.stages - 1 - offset if self.turns and chunk % 2 else offset

    def needs(self, stage: int, action: Action) -> Message | None:
        """The message that an action starts from; None where that is tokens, the loss or what its stage has kept."""
        position = self.position(stage, action.chunk)
        if action.kind == "forward":
            return Message("forward", position - 1, action.micro_batch) if position > 0 else None
        if action.kind == "backward_weight" or position == self.length - 1:
            return None
        return Message("backward", position + 1, action.micro_batch)

    def makes(self, stage: int, action: Action) -> Message | None:
        """The message that an action leaves for another virtual stage."""
        position = self.position(stage, action.chunk)
        if action.kind == "forward":
            return Message("forward", position, action.micro_batch) if position < self.length - 1 else None
        if action.kind == "backward_weight" or position == 0:
            return None
        return Message("backward", position, action.micro_batch)

    def ends(self, message: Message) -> tuple[int, int]:
        """The stages that a message travels between, from and to; twice the same where it stays."""
        step = 1 if message.kind == "forward" else -1
        return self.stage(message.maker), self.stage(message.maker + step)

    def goes_down(self, message: Message) -> bool:
        """Whether a message travels towards the last stage, or round from the last to the first; else it goes up."""
        return (message.kind == "forward") != (self.turns and message.maker // self.stages % 2 == 1)


def route_of(schedule: str, stages: int, chunks: int) -> Route:
    """How the schedule of this name (`TrainConfig.schedule`) lays the model over the stages."""
    return Route(stages, chunks, turns=schedule == "zb-v")
