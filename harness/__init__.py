"""A config-driven distributed training harness: the same arithmetic under every strategy."""

__version__ = "0.1.0"
