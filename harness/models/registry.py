"""From `model.kind` to a network."""

from torch import nn

from harness.config.models import CnnModel, MlpModel, Model
from harness.models import cnn, mlp


def build_model(config: Model, *, input_shape: tuple[int, ...], num_outputs: int) -> nn.Module:
    """Return the network of `config` for rows of `input_shape`; its weights depend on torch's random state."""
    match config:
        case MlpModel():
            return mlp.build(config, input_shape=input_shape, num_outputs=num_outputs)
        case CnnModel():
            return cnn.build(config, input_shape=input_shape, num_outputs=num_outputs)
