"""Imported by the warm parent: what `deepspeed.initialize` would import in every rank of every ZeRO test."""

import importlib
import os

os.environ["DS_ACCELERATOR"] = "cpu"
NAMES = (
    "deepspeed.runtime.engine",
    "deepspeed.runtime.zero.stage3",
    "deepspeed.runtime.zero.stage_1_and_2",
    "deepspeed.module_inject.auto_ep_layer",
    "deepspeed.moe.ep_repack",
    "deepspeed.comm.mori",
    "deepspeed.ops.op_builder.all_ops",
    "deepspeed.runtime.superoffload.superoffload_stage3",
    "deepspeed.runtime.zero.muon.muon_optimizer",
    "deepspeed.utils.timer",
    "functorch.compile",
    "setuptools",
    "torch._dynamo.testing",
    "torch._inductor.compile_fx",
    "transformers.integrations.deepspeed",
    "networkx",
    "accelerate.utils.deepspeed",
    "harness.strategy.build_zero",
    "harness.strategy.zero",
)
for name in NAMES:
    importlib.import_module(name)
importlib.import_module("deepspeed.ops").__compatible_ops__  # noqa: B018 - asked once, or every rank starts gcc twice
del os.environ["DS_ACCELERATOR"]
