"""Trading time for memory: a block's activations are computed again in the backward pass, not kept."""

from functools import partial

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

from harness.errors import ConfigError


def recompute_blocks(module: nn.Module) -> None:
    """Have every block of `module` keep its inputs only; blocks are the members of its ModuleLists.

    Raises:
        ConfigError: there are no blocks, or a block has BatchNorm, whose statistics a second pass would count twice.
    """
    lists = [child for child in module.modules() if isinstance(child, nn.ModuleList)]
    blocks = [block for members in lists for block in members]
    if not blocks:
        raise ConfigError(
            "strategy.activation_checkpointing: this model has no repeated blocks (a ModuleList) to compute again; "
            "take it out, or choose a smaller strategy.micro_batch"
        )
    for block in blocks:
        if any(isinstance(child, _BatchNorm) for child in block.modules()):
            raise ConfigError(
                "strategy.activation_checkpointing: BatchNorm in a block would count every batch twice; "
                "use model.norm=none"
            )
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)
