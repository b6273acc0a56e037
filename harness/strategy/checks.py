"""Comparing what was built with what was asked for."""

from harness.errors import ConfigError


def check(what: str, found: object, wanted: object) -> None:
    """Refuse to train on something else than the config says.

    Raises:
        ConfigError: `found` is not `wanted`.
    """
    if found != wanted:
        raise ConfigError(
            f"strategy.kind: {what} of what was built is {found}, wanted {wanted}. Training would not be what the "
            "config says; check the launcher's environment, and the versions against constraints.txt"
        )
