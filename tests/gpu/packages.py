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
    "packaging": "packaging",
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

GATHERED = (
    *(
        "accelerate",
        "annotated-doc",
        "annotated-types",
        "anyio",
        "click",
        "datasets",
        "dill",
        "einops",
        "h11",
        "hf-xet",
    ),
    *("hjson", "httpcore2", "httpx2", "huggingface_hub", "idna", "lightning-utilities", "markdown-it-py", "mdurl"),
    *("msgpack", "multiprocess", "ninja", "packaging", "pillow", "psutil", "py-cpuinfo", "pydantic", "pydantic_core"),
    *("Pygments", "python-dateutil", "PyYAML", "regex", "rich", "safetensors", "shellingham", "tokenizers"),
    *("torchmetrics", "tqdm", "transformers", "truststore", "typer", "typing-inspection", "tzdata", "xxhash"),
)
"""Distributions of `make gpu-wheels`: all that is needed but torch, what torch brings, numpy, pandas and pyarrow."""
BUILT = "deepspeed"
"""Has no wheel on the index: a pure one is built, without its compiled operations."""
