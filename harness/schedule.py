"""The learning rate of an update, as a pure function of its number.

In every formula u = update - 1 counts from 0, w is `warmup_steps`, T is `total_steps` or else the updates of the whole
run, and f `final_lr_fraction`.
The rate warms up as peak * (u + 1) / w for u < w, so the first update never has rate 0.
"""

import math

from harness.config.checks import phase_problems
from harness.config.training import (
    ConstantSchedule,
    CosineSchedule,
    InverseSqrtSchedule,
    LinearSchedule,
    PlateauSchedule,
    Schedule,
    StepSchedule,
    WsdSchedule,
)
from harness.errors import ConfigError


def learning_rate(
    update: int, schedule: Schedule, *, peak_lr: float, total_updates: int, updates_per_epoch: int
) -> float:
    """Return the rate of the `update`-th applied update (the first is 1), before any plateau factor.

    Epochs are counted by applied updates too: where some were skipped, a rate that falls with the epochs falls as many
    updates later.

    Source of the shapes: linear, cosine (Loshchilov & Hutter 2017, arXiv:1608.03983), inverse square root
    (Vaswani et al. 2017, arXiv:1706.03762), warm-up-stable-decay (Hu et al. 2024, arXiv:2404.06395).
    """
    u, w = update - 1, schedule.warmup_steps
    if u < w:
        return peak_lr * (u + 1) / w
    return peak_lr * _decay(u, schedule, total_updates, updates_per_epoch)


def _decay(u: int, schedule: Schedule, total_updates: int, updates_per_epoch: int) -> float:
    w, total_updates = schedule.warmup_steps, schedule.length(total_updates)
    progress = min(1.0, (u - w) / max(1, total_updates - w))
    match schedule:
        case ConstantSchedule() | PlateauSchedule():
            return 1.0
        case LinearSchedule(final_lr_fraction=f):  # 1 - (1 - f) (u - w) / (T - w)
            return 1.0 - (1.0 - f) * progress
        case CosineSchedule(final_lr_fraction=f):  # f + (1 - f) (1 + cos(pi (u - w) / (T - w))) / 2
            return f + (1.0 - f) * 0.5 * (1.0 + math.cos(math.pi * progress))
        case InverseSqrtSchedule():  # sqrt(max(w, 1) / (u + 1))
            return math.sqrt(max(w, 1) / (u + 1))
        case WsdSchedule(final_lr_fraction=f, decay_steps=d):  # 1, then 1 - (1 - f) (u - (T - d)) / d
            return 1.0 - (1.0 - f) * min(1.0, max(0.0, (u - (total_updates - d)) / d))
        case StepSchedule(every_steps=steps, every_epochs=epochs, factor=factor):  # factor ** floor(u / every)
            return float(factor ** (u // (steps or (epochs or 1) * updates_per_epoch)))


def check_fits(schedule: Schedule, *, total_updates: int) -> None:
    """Refuse a schedule whose phases are longer than the run.

    Raises:
        ConfigError: warm-up (and decay) take more updates than the run has.
    """
    problems = phase_problems(schedule, total_updates=total_updates)
    if problems:
        raise ConfigError(problems[0])
