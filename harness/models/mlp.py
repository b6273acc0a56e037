"""Multi-layer perceptrons."""

from math import prod

from torch import nn

from harness.config.models import MlpModel

ACTIVATIONS: dict[str, type[nn.Module]] = {
    "relu": nn.ReLU,
    "gelu": nn.GELU,
    "tanh": nn.Tanh,
    "sigmoid": nn.Sigmoid,
}


def hidden_layers(config: MlpModel, *, in_features: int) -> list[nn.Module]:
    """Return Linear, norm, activation, dropout for every hidden width; (B, in_features) -> (B, hidden[-1])."""
    layers: list[nn.Module] = []
    for width in config.hidden:
        layers.append(nn.Linear(in_features, width))
        if config.norm == "batch":
            layers.append(nn.BatchNorm1d(width))
        layers.append(ACTIVATIONS[config.activation]())
        if config.dropout:
            layers.append(nn.Dropout(config.dropout))
        in_features = width
    return layers


def build(config: MlpModel, *, input_shape: tuple[int, ...], num_outputs: int) -> nn.Module:
    """Return a network from (B, *input_shape) to (B, num_outputs), with torch's own initialisation."""
    in_features = prod(input_shape)
    flatten = [nn.Flatten()] if len(input_shape) > 1 else []
    hidden = hidden_layers(config, in_features=in_features)
    return nn.Sequential(*flatten, *hidden, nn.Linear(config.hidden[-1] if config.hidden else in_features, num_outputs))
