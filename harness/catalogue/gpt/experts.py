"""The feed-forward nets of a Transformer: what is between their matrices, and several of them behind a router."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from harness.catalogue.gpt.section import Experts, GptModel
from harness.catalogue.layers import swiglu


class MixtureOfExperts(nn.Module):
    """Every token goes through the `top_k` nets that a router likes best: (B, T, width) both ways.

    Their outputs are weighted with the router's probabilities, over the chosen ones brought to a sum of 1 (Shazeer et
    al. 2017, arXiv:1701.06538); with `top_k: 1` the probability itself is the weight, or the router would learn nothing
    (Fedus et al. 2022, arXiv:2101.03961, eq. 2). No token is dropped.

    The weights of all experts are in one tensor each of `up` and `down`, so one that gets no token has a gradient of
    zeros like any other, and no rank waits for it. How many tokens each gets is read to the host, once a forward pass;
    on GPUs that is the one read of an update.

    In training `penalty` is, (), what the load adds to the mean loss: `load_balance * E * sum_e f_e P_e` (eq. 4), f_e
    the share of the micro-batch's choices that fell on expert e, P_e the mean of its probability; `load_balance` if all
    get as many. It is not linear in the rows: the mean over the micro-batches of an update depends on their size, not
    on how many ranks they are dealt out to. With `load_balance: 0` neither matters, as without experts.
    """

    penalty: Tensor | None = None

    def __init__(self, config: GptModel, experts: Experts) -> None:
        super().__init__()
        self._is_gated = config.activation == "swiglu"
        self._top_k, self._load_balance = experts.top_k, experts.load_balance
        self.router = nn.Linear(config.width, experts.count, bias=False)
        self.up = nn.Parameter(torch.empty(experts.count, config.width, (1 + self._is_gated) * config.hidden_width))
        self.down = nn.Parameter(torch.empty(experts.count, config.hidden_width, config.width))
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(0, -2)  # (N, width)
        gates, chosen, probabilities = self._route(tokens)
        num_tokens_of = chosen.flatten().bincount(minlength=probabilities.shape[1])  # (E,)
        if self.training and self._load_balance:
            share = num_tokens_of / chosen.numel()  # (E,)
            balance = len(share) * (share * probabilities.mean(dim=0)).sum()
            self.penalty = self._load_balance * balance
        else:
            self.penalty = None
        order = chosen.flatten().argsort(stable=True)  # (N top_k,) choices, those of the first expert first
        copies = tokens.unsqueeze(1).expand(-1, self._top_k, -1).flatten(0, 1)  # (N top_k, width), a row a choice
        rows_of = torch.split(copies[order], num_tokens_of.tolist())
        outputs = [
            activated(rows @ up, is_gated=self._is_gated) @ down
            for rows, up, down in zip(rows_of, self.up, self.down, strict=True)
        ]
        by_token = torch.cat(outputs)[order.argsort()].view(*chosen.shape, -1)  # (N, top_k, width)
        mixed = (by_token * gates.unsqueeze(-1)).sum(dim=1)
        result: Tensor = self.dropout(mixed).view_as(x)
        return result

    def _route(self, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the weights and numbers of the chosen experts, (N, top_k) each, and (N, E) probabilities of all."""
        with torch.autocast(tokens.device.type, enabled=False):  # bf16 would choose others
            probabilities = self.router(tokens.to(self.router.weight.dtype)).softmax(dim=-1)
        gates, chosen = probabilities.topk(self._top_k, dim=-1)
        if self._top_k > 1:
            gates = gates / gates.sum(dim=-1, keepdim=True)
        return gates, chosen, probabilities


def activated(x: Tensor, *, is_gated: bool) -> Tensor:
    """Return GELU of (..., H), or (..., H) from (..., 2 H): the first half gated by the second."""
    if not is_gated:
        return F.gelu(x)
    value, gate = x.chunk(2, dim=-1)  # not in the order of layers.SwiGLU; so the weights of a gpt are saved
    return swiglu(gate, value)
