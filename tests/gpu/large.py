"""A GPT of any size on random tokens, put together as a run is, to measure what it costs."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from harness.assemble import assemble
from harness.catalogue.gpt.section import GptModel
from harness.catalogue.text.tokenizers import Bytes
from harness.config.run_config import RunConfig
from harness.rows.rows import Columns
from harness.rows.splits import DataSplits
from harness.run import Run
from harness.stopping import StopSignals
from tests.gpt_sizes import num_parameters
from tests.gpu.small import joined
from tests.sections import build_model


class ManyTokens(Bytes):
    """Stands for a tokenizer of as many tokens as are wanted; nothing is read or written with it."""

    def token_bytes(self) -> Any:
        return torch.ones(GPT_350M.num_tokens, dtype=torch.int64).numpy()


@dataclass(frozen=True)
class Gpt:
    """A decoder-only Transformer and its batch, on one rank."""

    layers: int = 24
    width: int = 1024
    heads: int = 16
    block: int = 1024
    num_tokens: int = 50_304
    rows: int = 8
    """Of one update."""
    precision: str = "bf16"
    strategy: str = "ddp"
    optimizer: str = "adamw"
    activation_checkpointing: bool = False

    @property
    def model_config(self) -> dict[str, Any]:
        """Its section of a configuration."""
        return {"kind": "gpt", "layers": self.layers, "width": self.width, "heads": self.heads}

    @property
    def num_parameters(self) -> int:
        """Weights of the network, by the closed form."""
        config = GptModel.model_validate(self.model_config)
        return num_parameters(config, context=self.block, num_tokens=self.num_tokens)

    def assembled(self, folder: Path) -> Run:
        """Put its run together; there are as many random rows as 64 updates see."""
        momentum = {"momentum": 0.9} if self.optimizer in ("sgd", "muon") else {}
        config = RunConfig.model_validate(
            {
                "run": {"name": "large", "max_steps": 10**6},
                "model": self.model_config,
                "data": {"source": "text", "path": "none", "block": self.block, "global_batch": self.rows},
                "task": {"kind": "causal_lm"},
                "optim": {"kind": self.optimizer, "peak_lr": 3e-4, "weight_decay": 0.1, **momentum},
                "clip": {"kind": "norm", "max_norm": 1.0},
                "strategy": {
                    "kind": self.strategy,
                    "precision": self.precision,
                    "activation_checkpointing": self.activation_checkpointing,
                },
                "evaluation": {"every_steps": 10**6},
                "tracking": {"log_every_steps": 5},
            }
        )
        generator = torch.Generator().manual_seed(1)
        # Few different tokens, so that there is something to learn.
        shape = (64 * self.rows, self.block + 1)
        ids = torch.randint(min(256, self.num_tokens), shape, generator=generator, dtype=torch.int32)
        columns = Columns(ids[:, :-1].contiguous(), ids[:, 1:].contiguous())
        splits = DataSplits(columns, columns, (self.block,), self.num_tokens, tokenizer=ManyTokens())
        torch.manual_seed(0)
        model = build_model(config.model, input_shape=splits.input_shape, num_outputs=splits.num_outputs)
        (folder / "checkpoints").mkdir(parents=True, exist_ok=True)
        ranks = joined(self.strategy)
        return assemble(config, ranks, splits, model, directory=folder, signals=StopSignals())


GPT_350M = Gpt()
"""24 layers, 1,024 wide, 1,024 tokens a row: 355 million parameters, GPT-2 medium without biases."""


@contextmanager
def running(gpt: Gpt) -> Iterator[Run]:
    """Have its run inside."""
    with tempfile.TemporaryDirectory() as name:
        run = gpt.assembled(Path(name))
        try:
            yield run
        finally:
            run.checkpoints.close()
