"""The rows of examples/ragged with a collate of their own, which does what its data.collate says."""

from __future__ import annotations

from ragged import Walks  # type: ignore[import-not-found]
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

import harness


@harness.data("walks_by_hand")
class ByHand(Walks):  # type: ignore[misc]
    """Is asked for a batch of its rows."""

    def collate(self, rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        steps = pad_sequence([row["steps"] for row in rows], batch_first=True)
        sides = pad_sequence([row["side"] for row in rows], batch_first=True, padding_value=-100)
        return {"steps": steps, "side": sides}
