"""The section of causal language modelling."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from harness.config.slots import TaskSection
from harness.parts import task

if TYPE_CHECKING:
    import torch

    from harness.config.run_config import RunConfig
    from harness.rows.splits import DataSplits
    from harness.tasks.base import TaskLoss


@task("causal_lm")
class CausalLmTask(TaskSection):
    """Each token of a text from those before it; cross-entropy over every token."""

    kind: Literal["causal_lm"]

    @property
    def metric_names(self) -> tuple[str, ...]:
        """The numbers of an evaluation."""
        return ("val/loss", "val/perplexity", "val/bits_per_byte")

    def build(self, splits: DataSplits, *, device: torch.device, dtype: torch.dtype) -> TaskLoss:
        import torch

        from harness.catalogue.causal_lm.task import CausalLm

        assert splits.tokenizer, "causal_lm without text is refused by catalogue/agree.py"
        token_bytes = torch.from_numpy(splits.tokenizer.token_bytes())
        return CausalLm(splits.input_shape[0], token_bytes, decode=splits.tokenizer.decode)

    def problems(self, config: RunConfig) -> list[str]:
        from harness.catalogue.agree import language_problems

        return language_problems(config)
