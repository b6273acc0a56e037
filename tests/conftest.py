"""Shared by all tests."""

import torch

torch.set_num_threads(1)  # ranks of distributed tests run beside this process
