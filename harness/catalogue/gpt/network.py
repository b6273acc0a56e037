"""Decoder-only Transformers, pre-norm, with GPT-2's initialisation (Radford et al. 2019) and no biases."""

from __future__ import annotations

from math import sqrt

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from harness.catalogue.gpt.experts import MixtureOfExperts, activated
from harness.catalogue.gpt.ngrams import NgramEmbedding
from harness.catalogue.gpt.rotary import rotated
from harness.catalogue.gpt.section import GptModel

INITIAL_STD = 0.02


class Gpt(nn.Module):
    """Logits of the next token at every place: (B, T) int64 ids -> (B, T, num_tokens); T up to the context."""

    def __init__(self, config: GptModel, *, context: int, num_tokens: int) -> None:
        super().__init__()
        self.tokens = nn.Embedding(num_tokens, config.width)
        self.places = nn.Embedding(context, config.width) if config.positions == "learned" else None
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = a_norm(config)
        self.head = nn.Linear(config.width, num_tokens, bias=False)
        # Two layers with one parameter, not one layer's parameter used by another: ZeRO-3 gathers a layer's own.
        if config.tied_embeddings:
            self.head.weight = self.tokens.weight
        for name, parameter in self.named_parameters():
            if parameter.dim() >= 2:
                # A sum of 2 x layers branches is to keep the size of one.
                is_last_of_branch = name.removesuffix(".weight").endswith((".attention.out", ".feed_forward.down"))
                std = INITIAL_STD / sqrt(2 * config.layers) if is_last_of_branch else INITIAL_STD
                nn.init.normal_(parameter, std=std)
        ngrams = config.ngrams
        self.ngrams = NgramEmbedding(ngrams, width=config.width, num_tokens=num_tokens) if ngrams else None

    def forward(self, ids: Tensor) -> Tensor:
        x = self.tokens(ids)  # (B, T, width)
        if self.places is not None:
            x = x + self.places(torch.arange(ids.shape[1], device=ids.device))
        if self.ngrams is not None:
            x = x + self.ngrams(ids)
        x = self.dropout(x)
        for block in self.blocks:
            x = block(x)
        logits: Tensor = self.head(self.norm(x))  # (B, T, num_tokens)
        return logits

    def penalty(self) -> Tensor | None:
        """Return what the experts of all blocks add to the mean loss of the last forward pass, (); None without any."""
        parts = [part.penalty for part in self.modules() if isinstance(part, MixtureOfExperts)]
        given = [part for part in parts if part is not None]
        return torch.stack(given).sum() if given else None


class Block(nn.Module):
    """Attention, then the feed-forward net, each after a norm and added to what came in: (B, T, width) both ways."""

    def __init__(self, config: GptModel) -> None:
        super().__init__()
        self.attention_norm = a_norm(config)
        self.attention = Attention(config)
        self.feed_forward_norm = a_norm(config)
        self.feed_forward = FeedForward(config) if config.experts is None else MixtureOfExperts(config, config.experts)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.attention_norm(x))
        result: Tensor = x + self.feed_forward(self.feed_forward_norm(x))
        return result


class Attention(nn.Module):
    """Causal attention of several heads: (B, T, width) both ways."""

    def __init__(self, config: GptModel) -> None:
        super().__init__()
        self._heads, self._dropout = config.heads, config.dropout
        self._is_rotary = config.positions == "rotary"
        self.queries_keys_values = nn.Linear(config.width, 3 * config.width, bias=False)
        self.out = nn.Linear(config.width, config.width, bias=False)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor) -> Tensor:
        B, T, _ = x.shape
        qkv = self.queries_keys_values(x).view(B, T, 3, self._heads, -1)
        qkv = qkv.permute(2, 0, 3, 1, 4)  # (3, B, heads, T, width / heads)
        q, k = rotated(qkv[:2]) if self._is_rotary else qkv[:2]
        mixed = attended(q, k, qkv[2], dropout=self._dropout if self.training else 0.0)
        result: Tensor = self.dropout(self.out(mixed.transpose(1, 2).flatten(2)))
        return result


def attended(queries: Tensor, keys: Tensor, values: Tensor, *, dropout: float) -> Tensor:
    """Return causal attention, (B, heads, T, H) all; on CPUs in fp32 where autocast would have it in bf16."""
    if values.device.type != "cpu" or values.dtype != torch.bfloat16:
        return F.scaled_dot_product_attention(queries, keys, values, dropout_p=dropout, is_causal=True)
    # The kernel of torch 2.13 for CPUs takes three times as long in bf16 for blocks of 64 tokens, as long for 512 and
    # nine tenths for 2,048.
    with torch.autocast("cpu", enabled=False):
        q, k, v = queries.float(), keys.float(), values.float()
        return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True)


class FeedForward(nn.Module):
    """GELU between two matrices, or SwiGLU (Shazeer 2020, arXiv:2002.05202): (B, T, width) both ways."""

    def __init__(self, config: GptModel) -> None:
        super().__init__()
        self._is_gated = config.activation == "swiglu"
        self.up = nn.Linear(config.width, (1 + self._is_gated) * config.hidden_width, bias=False)
        self.down = nn.Linear(config.hidden_width, config.width, bias=False)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor) -> Tensor:
        hidden = activated(self.up(x), is_gated=self._is_gated)  # (B, T, hidden_width)
        result: Tensor = self.dropout(self.down(hidden))
        return result


def a_norm(config: GptModel) -> nn.Module:
    """Return the norm that `config` names, over the width, with a scale and no shift."""
    if config.norm == "rms":
        return nn.RMSNorm(config.width)
    return nn.LayerNorm(config.width, bias=False)


def build(config: GptModel, *, input_shape: tuple[int, ...], num_outputs: int) -> nn.Module:
    """Return a network for blocks of `input_shape`, (T,), of `num_outputs` different tokens."""
    (context,) = input_shape
    return Gpt(config, context=context, num_tokens=num_outputs)
