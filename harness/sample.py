"""Writes text with a trained language model: `python -m harness.sample DIR --prompt "KING." --tokens 300`."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from harness import api
from harness.catalogue.text.tokenizers import TextTokenizer
from harness.errors import EXIT_DONE, ConfigError, HarnessError


def main(arguments: Sequence[str] | None = None) -> int:
    """Write as the command line says, and return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m harness.sample", description=main.__doc__, allow_abbrev=False)
    parser.add_argument("directory", metavar="DIR", type=Path, help="a run directory, or what harness export wrote")
    parser.add_argument("--prompt", default="", help="the text before; default: the start of a document")
    parser.add_argument("--tokens", type=int, default=200, help="at most so many; default: 200")
    parser.add_argument("--temperature", type=float, default=0.8, help="0 takes the likeliest token; default: 0.8")
    parser.add_argument("--use", metavar="FILE", action="append", default=[], help="that brings the network's kind")
    parser.add_argument("--seed", type=int, default=0, help="default: 0")
    given = parser.parse_args(arguments)
    try:
        network, tokenizer, context = load(given.directory, use=given.use)
    except HarnessError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    ids = write(
        network,
        [tokenizer.end, *tokenizer.encode(given.prompt.encode()).tolist()],
        end=tokenizer.end,
        context=context,
        num_tokens=given.tokens,
        temperature=given.temperature,
        generator=torch.Generator().manual_seed(given.seed),
    )
    print(tokenizer.decode(ids).decode(errors="replace"))
    return EXIT_DONE


def load(directory: Path, *, use: Sequence[str] = ()) -> tuple[nn.Module, TextTokenizer, int]:
    """Return a language model, its tokenizer, and how many tokens it can look back on.

    Args:
        directory: of a run, of which the best checkpoint is taken, or of an export.
        use: files that register its kind, where it is not built in.
    Raises:
        ConfigError: it is no language model.
    """
    loaded = api.load(directory, use=use)
    if loaded.tokenizer is None:
        raise ConfigError(f"{directory} has no tokenizer: give a run of task.kind=causal_lm, or its export")
    (context,) = loaded.facts["input_shape"]
    return loaded.network, loaded.tokenizer, context


@torch.no_grad()
def write(
    network: nn.Module,
    ids: Sequence[int],
    *,
    end: int,
    context: int,
    num_tokens: int,
    temperature: float,
    generator: torch.Generator,
) -> list[int]:
    """Return `ids` and up to `num_tokens` after them, drawn one by one; the end of a document ends it.

    Args:
        ids: at least one; the last `context` of them are looked at.
        end: the token that ends a document.
        temperature: logits are divided by it; at 0 the likeliest token is taken.
    """
    written = list(ids)
    for _ in range(num_tokens):
        logits = network(torch.tensor([written[-context:]]))[0, -1]  # (V,)
        if temperature > 0:
            token = int(torch.multinomial((logits / temperature).softmax(0), 1, generator=generator))
        else:
            token = int(logits.argmax())
        if token == end:
            break
        written.append(token)
    return written


if __name__ == "__main__":
    sys.exit(main())
