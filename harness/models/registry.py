"""From `model.kind` to a network."""

from torch import nn

from harness.config.models import CnnModel, MlpModel, Model, PretrainedModel
from harness.models import cnn, mlp, pretrained


def build_model(config: Model, *, input_shape: tuple[int, ...], num_outputs: int) -> nn.Module:
    """Return the network of `config` for rows of `input_shape`; its weights depend on torch's random state."""
    match config:
        case MlpModel():
            return mlp.build(config, input_shape=input_shape, num_outputs=num_outputs)
        case CnnModel():
            return cnn.build(config, input_shape=input_shape, num_outputs=num_outputs)
        case PretrainedModel():
            return pretrained.build(config, num_outputs=num_outputs)


def batch_norms(model: nn.Module) -> list[str]:
    """Return the names of the layers that cannot train on a single value per channel."""
    return [name for name, module in model.named_modules() if isinstance(module, nn.BatchNorm1d)]
