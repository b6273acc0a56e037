"""Convolutional networks for small images."""

from torch import nn

from harness.config.models import CnnModel, MlpModel
from harness.errors import ConfigError
from harness.models import mlp


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
    channels, height, width = input_shape
    layers: list[nn.Module] = []
    for out_channels in config.channels:
        layers.append(nn.Conv2d(channels, out_channels, kernel_size=3, padding=1))  # (B, out_channels, H, W)
        if config.norm == "batch":
            layers.append(nn.BatchNorm2d(out_channels))
        layers += [nn.ReLU(), nn.MaxPool2d(2)]  # (B, out_channels, H/2, W/2)
        channels, height, width = out_channels, height // 2, width // 2
    if height == 0 or width == 0:
        raise ConfigError(
            f"model.channels: {len(config.channels)} poolings leave nothing of images of "
            f"{input_shape[1]}x{input_shape[2]}; list fewer channels"
        )
    head = MlpModel(kind="mlp", hidden=config.hidden, norm=config.norm, dropout=config.dropout)
    return nn.Sequential(*layers, mlp.build(head, input_shape=(channels, height, width), num_outputs=num_outputs))
