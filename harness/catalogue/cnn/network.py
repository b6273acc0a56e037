"""Convolutional networks for small images, gray or colour, plain or residual."""

from torch import Tensor, nn

from harness.catalogue.cnn.section import CnnModel
from harness.catalogue.layers import activation_layers, initialised, norm_layers
from harness.catalogue.mlp.network import fully_connected
from harness.errors import ConfigError


def build(config: CnnModel, *, input_shape: tuple[int, ...], num_outputs: int) -> nn.Module:
    """Return convolutions, then fully connected layers: (B, C, H, W) -> (B, num_outputs).

    Raises:
        ConfigError: the rows are not images, or too small to be halved once for every entry of `model.channels`.
    """
    if len(input_shape) != 3:
        raise ConfigError(
            f"model.kind: cnn wants images (channels, height, width), the data has rows of shape {input_shape}; "
            "use model.kind=mlp"
        )
    if config.residual:
        layers, in_features = _residual(config, channels=input_shape[0]), config.channels[-1]
    else:
        layers, in_features = _plain(config, input_shape)
    plain = config.model_copy(update={"residual": False})  # the blocks are those of the images
    head = fully_connected(plain, config.activation, in_features=in_features, num_outputs=num_outputs)
    return nn.Sequential(*layers, *head)


def _plain(config: CnnModel, input_shape: tuple[int, ...]) -> tuple[list[nn.Module], int]:
    """Return convolution, norm, activation, pooling for every entry of `channels`, and how many features come out."""
    channels, height, width = input_shape
    layers: list[nn.Module] = []
    for out_channels in config.channels:
        convolution = nn.Conv2d(channels, out_channels, kernel_size=3, padding=1)  # (B, out_channels, H, W)
        layers += [
            initialised(convolution, config.init, followed_by=config.activation),
            *norm_layers(config.norm, out_channels, of_images=True),
            *activation_layers(config.activation),
            nn.MaxPool2d(2),  # (B, out_channels, H/2, W/2)
        ]
        channels, height, width = out_channels, height // 2, width // 2
    if height == 0 or width == 0:
        raise ConfigError(
            f"model.channels: {len(config.channels)} poolings leave nothing of images of "
            f"{input_shape[1]}x{input_shape[2]}; list fewer channels"
        )
    return [*layers, nn.Flatten()], channels * height * width


def _residual(config: CnnModel, *, channels: int) -> list[nn.Module]:
    """Return a small ResNet: (B, C, H, W) -> (B, channels[-1])."""
    width = config.channels[0]
    stem = nn.Conv2d(channels, width, kernel_size=3, padding=1, bias=config.norm == "none")
    layers: list[nn.Module] = [
        initialised(stem, config.init, followed_by=config.activation),
        *norm_layers(config.norm, width, of_images=True),
        *activation_layers(config.activation),
    ]
    for index, out_width in enumerate(config.channels):
        layers.append(ResidualBlock(width, out_width, config, stride=1 if index == 0 else 2))
        width = out_width
    return [*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten()]


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions added to their input: (B, in_channels, H, W) -> (B, channels, H/stride, W/stride).

    Where the shapes differ, the input goes through a 1x1 convolution. Biases are left to the norms.
    Source: He et al. 2016, arXiv:1512.03385, figure 2.
    """

    def __init__(self, in_channels: int, channels: int, config: CnnModel, *, stride: int) -> None:
        super().__init__()
        has_bias = config.norm == "none"

        def convolution(before: int, kernel_size: int, stride: int, followed_by: str) -> list[nn.Module]:
            padding = kernel_size // 2
            layer = nn.Conv2d(before, channels, kernel_size, stride=stride, padding=padding, bias=has_bias)
            layer = initialised(layer, config.init, followed_by=followed_by)
            return [layer, *norm_layers(config.norm, channels, of_images=True)]

        self.inside = nn.Sequential(
            *convolution(in_channels, 3, stride, followed_by=config.activation),
            *activation_layers(config.activation),
            *convolution(channels, 3, 1, followed_by="none"),
        )
        has_other_shape = stride > 1 or in_channels != channels
        self.shortcut = nn.Sequential(*(convolution(in_channels, 1, stride, "none") if has_other_shape else []))
        self.activation = activation_layers(config.activation)[0]

    def forward(self, x: Tensor) -> Tensor:
        h: Tensor = self.activation(self.inside(x) + self.shortcut(x))
        return h
