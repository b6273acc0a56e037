"""What `harness check` says of classes; needs no torch."""

from __future__ import annotations

from collections.abc import Iterator

from harness.catalogue.classification.section import ClassificationTask
from harness.config.run_config import RunConfig
from harness.config.slots import KnownRows

RARE = 0.5
"""A class is rare that has less than this times the rows it would have if all had as many."""


def advice(task: ClassificationTask, config: RunConfig, rows: KnownRows | None) -> Iterator[str]:
    """Yield what there is to say of rare classes."""
    stopping = config.early_stopping
    counts = rows.classes if rows else {}
    rarest = min(counts, key=lambda name: counts[name], default=None)
    share = counts[rarest] / sum(counts.values()) if rarest is not None else None
    who = "" if share is None else f"; the rarest, {rarest}, has {100 * share:.1f} % of the rows"
    is_rare = share is not None and share * len(counts) < RARE
    is_evened_out = task.class_weights is not None or config.data.sampling == "balanced"
    if task.class_weights is not None:
        yield f"imbalance: classes are weighted in the loss{who}"
    elif is_evened_out:
        yield f"imbalance: rows of every class are drawn equally often{who}"
    elif is_rare:
        yield (
            f"imbalance: every row counts alike{who}; if it matters, use task.class_weights=balanced and val/macro_f1"
        )
    elif share is not None:
        yield f"imbalance: little{who}"
    else:
        yield "imbalance: every row counts alike; if a class is rare, use task.class_weights=balanced and val/macro_f1"
    if stopping and stopping.metric == "val/accuracy" and (is_rare or is_evened_out):
        yield "WARNING: early_stopping.metric: accuracy hides rare classes; use val/macro_f1"
