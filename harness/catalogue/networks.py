"""From `model.kind` to a network."""

from torch import nn

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
