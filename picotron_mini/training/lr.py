"""The learning rate of each step: warm up, then decay.

    cosine    /‾‾\\__        down along half a cosine to min_lr_ratio * lr
    wsd       /‾‾‾‾‾\\       hold, then straight down over the last fifth (warm-up, stable, decay)
    constant  /‾‾‾‾‾‾

Warm-up is there because Adam's second moments are estimates of a few steps at first. Cosine: arXiv 1608.03983; WSD,
whose plateau can be continued without knowing the number of steps in advance: arXiv 2404.06395.
"""

import math

from ..config import TrainConfig

DECAY_SHARE = 0.2  # of the steps, for WSD


def learning_rate(train: TrainConfig, step: int) -> float:
    """The learning rate of step 0, 1, ..., `train.steps - 1`; a pure function."""
    if step < train.warmup_steps:
        return train.lr * (step + 1) / train.warmup_steps
    low = train.lr * train.min_lr_ratio
    done = (step - train.warmup_steps) / max(1, train.steps - train.warmup_steps)  # 0 ... 1
    if train.lr_schedule == "cosine":
        return low + (train.lr - low) * (1 + math.cos(math.pi * done)) / 2
    if train.lr_schedule == "wsd":
        return low + (train.lr - low) * min(1.0, (1 - done) / DECAY_SHARE)
    return train.lr
