"""How many parameters and operations a gpt has, by the closed forms that those of the network are compared with."""

from harness.catalogue.gpt.section import GptModel


def num_parameters(config: GptModel, *, context: int, num_tokens: int) -> int:
    """Return the parameters of the network, tied ones once.

    `layers * (4 w^2 + m w h) + (2 layers + 1) w + context w + num_tokens w`, the last twice if the head is not tied;
    without `context w` if positions are rotary, and with `(longest - 1) rows w` more for n-grams. With E experts
    `E m w h` and the router's `E w` stand for `m w h`.
    """
    embeddings = num_tokens * (1 if config.tied_embeddings else 2)
    embeddings += context if config.positions == "learned" else 0
    embeddings += (config.ngrams.longest - 1) * config.ngrams.rows if config.ngrams else 0
    norms = 2 * config.layers + 1
    matrices = matrix_parameters(config, experts=config.experts.count if config.experts else 1)
    return matrices + (embeddings + norms) * config.width


def forward_flops_per_token(config: GptModel, *, context: int, num_tokens: int) -> int:
    """Return the floating-point operations of matrix products for one token; a training update has three times as many.

    Two for each weight of a matrix that a token meets, the head's included, and `4 context width` a layer for the
    attention, which is counted in full although half of it is masked.
    Source: Kaplan et al. 2020, arXiv:2001.08361, table 1, with the head.
    """
    weights = matrix_parameters(config, experts=config.experts.top_k if config.experts else 1)
    return 2 * (weights + num_tokens * config.width) + 4 * config.layers * context * config.width


def matrix_parameters(config: GptModel, *, experts: int) -> int:
    """Return the weights of the matrices in all blocks, of which each has so many feed-forward nets."""
    attention, router = 4 * config.width**2, config.experts.count * config.width if config.experts else 0
    matrices = 2 if config.activation == "gelu" else 3
    return config.layers * (attention + router + experts * matrices * config.width * config.hidden_width)
