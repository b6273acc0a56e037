"""The perceptron, and multi-layer perceptrons, plain or residual."""

from math import prod

from torch import Tensor, nn

from harness.catalogue.layers import activation_layers, initialised, norm_layers
from harness.catalogue.mlp.section import Activation, HiddenLayers, Init, MlpModel, PerceptronModel


def build_perceptron(config: PerceptronModel, *, input_shape: tuple[int, ...], num_outputs: int) -> nn.Module:
    """Return one linear layer with an activation: (B, *input_shape) -> (B, num_outputs)."""
    linear = initialised(nn.Linear(prod(input_shape), num_outputs), config.init, followed_by=config.activation)
    return nn.Sequential(*flatten(input_shape), linear, *activation_layers(config.activation))


def build(config: MlpModel, *, input_shape: tuple[int, ...], num_outputs: int) -> nn.Module:
    """Return a network from (B, *input_shape) to (B, num_outputs)."""
    head = fully_connected(config, config.activation, in_features=prod(input_shape), num_outputs=num_outputs)
    softmax = activation_layers("softmax") if config.output == "softmax" else []
    return nn.Sequential(*flatten(input_shape), *head, *softmax)


def flatten(input_shape: tuple[int, ...]) -> list[nn.Module]:
    """Return what makes (B, F) of (B, *input_shape)."""
    return [nn.Flatten()] if len(input_shape) > 1 else []


def fully_connected(
    config: HiddenLayers, activation: Activation, *, in_features: int, num_outputs: int
) -> list[nn.Module]:
    """Return the hidden layers and a last linear one: (B, in_features) -> (B, num_outputs)."""
    if config.residual and config.hidden:
        hidden: list[nn.Module] = [ResidualMlp(config, activation, in_features=in_features)]
    else:
        hidden = plain_hidden(config, activation, in_features=in_features)
    last = nn.Linear(config.hidden[-1] if config.hidden else in_features, num_outputs)
    return [*hidden, initialised(last, config.init)]


def plain_hidden(config: HiddenLayers, activation: Activation, *, in_features: int) -> list[nn.Module]:
    """Return Linear, norm, activation, dropout for every hidden width; (B, in_features) -> (B, hidden[-1])."""
    layers: list[nn.Module] = []
    for width, norm, dropout in zip(config.hidden, config.norms, config.dropouts, strict=True):
        layers += hidden_layer(in_features, width, activation, norm=norm, init=config.init)
        if dropout:
            layers.append(nn.Dropout(dropout))
        in_features = width
    return layers


def hidden_layer(
    in_features: int, width: int, activation: Activation, *, norm: str = "none", init: Init
) -> list[nn.Module]:
    """Return Linear, norm and activation: (B, in_features) -> (B, width)."""
    inner = 2 * width if activation == "swiglu" else width
    linear = initialised(nn.Linear(in_features, inner), init, followed_by=activation)
    return [linear, *norm_layers(norm, inner), *activation_layers(activation)]


class ResidualMlp(nn.Module):
    """A linear layer, a residual block for every hidden width, and a norm: (B, in_features) -> (B, hidden[-1])."""

    def __init__(self, config: HiddenLayers, activation: Activation, *, in_features: int) -> None:
        super().__init__()
        width = config.hidden[0]
        self.stem = initialised(nn.Linear(in_features, width), config.init)
        self.blocks = nn.ModuleList()
        for out_width, norm, dropout in zip(config.hidden, config.norms, config.dropouts, strict=True):
            self.blocks.append(
                ResidualBlock(width, out_width, activation, norm=norm, dropout=dropout, init=config.init)
            )
            width = out_width
        self.norm = nn.Sequential(*norm_layers(config.norms[-1], width))

    def forward(self, x: Tensor) -> Tensor:
        h = self.stem(x)  # (B, hidden[0])
        for block in self.blocks:
            h = block(h)  # (B, width of the block)
        normed: Tensor = self.norm(h)
        return normed


class ResidualBlock(nn.Module):
    """x + Linear(Dropout(activation(Linear(norm(x))))), pre-norm: (B, in_features) -> (B, width).

    Where the widths differ, x goes through a linear layer without bias.
    Source: He et al. 2016, arXiv:1603.05027.
    """

    def __init__(
        self, in_features: int, width: int, activation: Activation, *, norm: str, dropout: float, init: Init
    ) -> None:
        super().__init__()
        self.shortcut: nn.Module = nn.Identity()
        if in_features != width:
            self.shortcut = initialised(nn.Linear(in_features, width, bias=False), init)
        self.inside = nn.Sequential(
            *norm_layers(norm, in_features),
            *hidden_layer(in_features, width, activation, init=init),
            *([nn.Dropout(dropout)] if dropout else []),
            initialised(nn.Linear(width, width), init),
        )

    def forward(self, x: Tensor) -> Tensor:
        added: Tensor = self.shortcut(x) + self.inside(x)
        return added
