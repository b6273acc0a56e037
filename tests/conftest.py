"""Shared by all tests."""

import os
from pathlib import Path

import pytest
import torch

torch.set_num_threads(1)  # ranks of distributed tests run beside this process


@pytest.fixture(scope="session")
def prepared_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that the data of the examples are prepared in; HARNESS_DATA_ROOT keeps it between sessions."""
    return Path(os.environ.get("HARNESS_DATA_ROOT") or tmp_path_factory.mktemp("data"))
