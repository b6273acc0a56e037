"""From `model.kind` to a network."""

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from harness.catalogue.cnn import network as cnn
from harness.catalogue.cnn.section import CnnModel
from harness.catalogue.gpt import network as gpt
from harness.catalogue.gpt.section import GptModel
from harness.catalogue.mlp import network as mlp
from harness.catalogue.mlp.section import MlpModel, PerceptronModel
from harness.catalogue.pretrained import network as pretrained
from harness.catalogue.pretrained.section import PretrainedModel
from harness.config.kinds import Model


def build_model(config: Model, *, input_shape: tuple[int, ...], num_outputs: int) -> nn.Module:
    """Return the network of `config` for rows of `input_shape`; its weights depend on torch's random state."""
    match config:
        case PerceptronModel():
            return mlp.build_perceptron(config, input_shape=input_shape, num_outputs=num_outputs)
        case MlpModel():
            return mlp.build(config, input_shape=input_shape, num_outputs=num_outputs)
        case CnnModel():
            return cnn.build(config, input_shape=input_shape, num_outputs=num_outputs)
        case GptModel():
            return gpt.build(config, input_shape=input_shape, num_outputs=num_outputs)
        case PretrainedModel():
            return pretrained.build(config, num_outputs=num_outputs)


def batch_norms(model: nn.Module, *, input_shape: tuple[int, ...]) -> list[str]:
    """Return the names of the layers that cannot train on one row: their statistics would be of a single value.

    A BatchNorm of images is one of them where it sees images of 1x1, so a row of zeros goes through the network.
    """
    layers = {name: module for name, module in model.named_modules() if isinstance(module, _BatchNorm)}
    if not layers:
        return []
    single: set[nn.Module] = set()

    def look(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        if inputs[0].numel() == inputs[0].shape[1]:
            single.add(module)

    hooks = [module.register_forward_pre_hook(look) for module in layers.values()]
    parameter = next(model.parameters())
    was_training = model.training
    model.eval()
    with torch.no_grad():
        model(torch.zeros(1, *input_shape, dtype=parameter.dtype, device=parameter.device))
    model.train(was_training)
    for hook in hooks:
        hook.remove()
    return [name for name, module in layers.items() if module in single]
