"""What the harness imports beside the standard library, and which distributions bring it to a machine with torch."""

from __future__ import annotations

NEEDED = {
    "torch": "torch",
    "numpy": "numpy",
    "accelerate": "accelerate",
    "datasets": "datasets",
    "deepspeed": "deepspeed",
    "fsspec": "fsspec",
    "hjson": "hjson",
    "jinja2": "Jinja2",
    "matplotlib": "matplotlib",
    "PIL": "pillow",
    "pyarrow": "pyarrow",
    "pydantic": "pydantic",
    "rich": "rich",
    "safetensors": "safetensors",
    "tokenizers": "tokenizers",
    "torchmetrics": "torchmetrics",
    "transformers": "transformers",
    "xxhash": "xxhash",
    "yaml": "PyYAML",
}
"""By module, the distribution."""
