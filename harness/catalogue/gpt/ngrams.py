"""Embeddings of the last few tokens together: what counting knows, learned, at the cost of a look-up."""

import torch.nn.functional as F
from torch import Tensor, nn

from harness.catalogue.gpt.section import Ngrams

MULTIPLIER, MODULUS = 1_327_217_885, 2**31 - 1  # 2^31 over the golden ratio, and a prime; products fit 64 bits


class NgramEmbedding(nn.Module):
    """The sum of a vector for each of the last 2, ..., `longest` tokens: (B, T) int64 ids -> (B, T, width).

    Each length has a table whose rows are shared by all runs of tokens that hash alike. They start as zeros, so what
    was never seen adds nothing.
    Source: Pagnoni et al. 2024, arXiv:2412.09871, section 3.2.1 (of bytes); Huang et al. 2025, arXiv:2501.16975.

    Args:
        num_tokens: ids are below it; it stands for what is before the block.
    """

    def __init__(self, config: Ngrams, *, width: int, num_tokens: int) -> None:
        super().__init__()
        self._rows, self._nothing = config.rows, num_tokens
        self.tables = nn.ModuleList(nn.Embedding(config.rows, width) for _ in range(2, config.longest + 1))
        for table in self.tables:
            nn.init.zeros_(table.weight)  # type: ignore[arg-type]

    def forward(self, ids: Tensor) -> Tensor:
        parts = [table(rows) for table, rows in zip(self.tables, self.rows(ids), strict=True)]
        result: Tensor = sum(parts[1:], start=parts[0])  # (B, T, width)
        return result

    def rows(self, ids: Tensor) -> list[Tensor]:
        """Return for n = 2, ... the (B, T) row of the n tokens that end at each place."""
        T, hashes, found = ids.shape[1], ids, []
        for back in range(1, len(self.tables) + 1):
            before = F.pad(ids, (back, 0), value=self._nothing)[:, :T]
            hashes = (hashes * MULTIPLIER + before) % MODULUS
            found.append(hashes % self._rows)
        return found
