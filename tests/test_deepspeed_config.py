"""The dictionary that DeepSpeed gets, what a user's own file may add to it, and how DeepSpeed behaves as a guest."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from harness.config.run_config import RunConfig
from harness.config.strategy import StrategySection, Zero3Strategy, ZeroStrategy
from harness.errors import ConfigError
from harness.strategy.deepspeed_config import deepspeed_config
from tests.benchmarks.zero_cost import Variant
from tests.distributed.ranks import run_ranks
from tests.distributed.scenarios import assemble_spec, train_main

STAGES = ("zero1", "zero2", "zero3")
REPOSITORY = Path(__file__).parent.parent


def config_of(
    kind: str = "zero2", *, global_batch: int = 24, clip: dict[str, Any] | None = None, **options: Any
) -> RunConfig:
    """Return a run under `kind` with these keys of the section `strategy`."""
    values = {
        "run": {"name": "golden", "max_steps": 10},
        "model": {"kind": "mlp", "hidden": [8]},
        "data": {"source": "mnist_5k", "global_batch": global_batch},
        "task": {"kind": "classification", "num_classes": 10},
        "optim": {"kind": "adamw", "peak_lr": 1e-3},
        "clip": clip or {"kind": "none"},
        "strategy": {"kind": kind, **options},
    }
    return RunConfig.model_validate(values)


# ---------------------------------------------------------------- the whole dictionary


def test_the_dictionary_of_zero1_with_every_default() -> None:
    assert deepspeed_config(config_of("zero1"), world_size=4) == {
        "train_batch_size": 24,
        "train_micro_batch_size_per_gpu": 6,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 0.0,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": {
            "stage": 1,
            "reduce_bucket_size": 500_000_000,
            "overlap_comm": False,
            "contiguous_gradients": True,
            "allgather_bucket_size": 500_000_000,
            "use_multi_rank_bucket_allreduce": False,
        },
        "torch_autocast": {"enabled": False, "dtype": "bfloat16", "lower_precision_safe_modules": []},
        "steps_per_print": 2**31,
    }


def test_the_dictionary_of_zero2_with_accumulation_and_a_clipped_norm() -> None:
    clip = {"kind": "norm", "max_norm": 0.5}
    config = config_of("zero2", clip=clip, micro_batch=2, overlap_communication=True, communication_dtype="fp32")
    assert deepspeed_config(config, world_size=4) == {
        "train_batch_size": 24,
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": 3,
        "gradient_clipping": 0.5,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": {
            "stage": 2,
            "reduce_bucket_size": 500_000_000,
            "overlap_comm": True,
            "contiguous_gradients": True,
            "allgather_bucket_size": 500_000_000,
            "use_multi_rank_bucket_allreduce": False,
        },
        "torch_autocast": {"enabled": False, "dtype": "bfloat16", "lower_precision_safe_modules": []},
        "communication_data_type": "fp32",
        "steps_per_print": 2**31,
    }


def test_the_dictionary_of_zero3_in_bf16_with_everything_offloaded() -> None:
    config = config_of("zero3", precision="bf16", offload_optimizer=True, offload_parameters=True)
    assert deepspeed_config(config, world_size=8) == {
        "train_batch_size": 24,
        "train_micro_batch_size_per_gpu": 3,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 0.0,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": {
            "stage": 3,
            "reduce_bucket_size": 500_000_000,
            "overlap_comm": False,
            "contiguous_gradients": True,
            "stage3_prefetch_bucket_size": 50_000_000,
            "stage3_param_persistence_threshold": 100_000,
            "offload_optimizer": {"device": "cpu", "pin_memory": True},
            "offload_param": {"device": "cpu", "pin_memory": True},
        },
        "torch_autocast": {"enabled": True, "dtype": "bfloat16", "lower_precision_safe_modules": []},
        "steps_per_print": 2**31,
    }


# ---------------------------------------------------------------- batch, clip, options


@given(
    kind=st.sampled_from(STAGES),
    world_size=st.integers(1, 64),
    micro_batch=st.integers(1, 32),
    accumulation=st.integers(1, 16),
    is_given=st.booleans(),
)
def test_micro_batch_times_accumulation_times_ranks_is_the_global_batch(
    kind: str, world_size: int, micro_batch: int, accumulation: int, is_given: bool
) -> None:
    global_batch = world_size * micro_batch * accumulation
    config = config_of(kind, global_batch=global_batch, micro_batch=micro_batch if is_given else None)
    found = deepspeed_config(config, world_size=world_size)
    micro, steps = found["train_micro_batch_size_per_gpu"], found["gradient_accumulation_steps"]
    assert micro * steps * world_size == found["train_batch_size"] == global_batch
    assert (micro, steps) == ((micro_batch, accumulation) if is_given else (micro_batch * accumulation, 1))


@pytest.mark.parametrize("kind", STAGES)
def test_of_tokens_deepspeed_is_told_as_many_micro_batches_as_there_may_be(kind: str) -> None:
    found = deepspeed_config(config_of(kind, global_batch=24, micro_batch_tokens=100), world_size=2)
    assert (found["train_micro_batch_size_per_gpu"], found["gradient_accumulation_steps"]) == (1, 12)


@pytest.mark.parametrize("kind", STAGES)
@pytest.mark.parametrize(
    ("clip", "wanted"),
    [
        ({"kind": "norm", "max_norm": 0.25}, 0.25),
        ({"kind": "value", "max_value": 0.25}, 0.0),  # the strategy clamps; DeepSpeed knows norms only
        ({"kind": "none"}, 0.0),
    ],
)
def test_deepspeed_clips_norms_and_nothing_else(kind: str, clip: dict[str, Any], wanted: float) -> None:
    # Without the key DeepSpeed does not clip either, but Accelerate would fill in its own default.
    assert deepspeed_config(config_of(kind, clip=clip), world_size=2)["gradient_clipping"] == wanted


ON_CPU = {"device": "cpu", "pin_memory": True}
OF_ALL = [
    ("reduce_bucket_elements", 12_345, "zero_optimization.reduce_bucket_size", 12_345),
    ("overlap_communication", True, "zero_optimization.overlap_comm", True),
    ("communication_dtype", "fp16", "communication_data_type", "fp16"),
    ("offload_optimizer", True, "zero_optimization.offload_optimizer", ON_CPU),
    ("precision", "bf16", "torch_autocast.enabled", True),
]
OF_ZERO12 = [
    ("allgather_bucket_elements", 12_346, "zero_optimization.allgather_bucket_size", 12_346),
    ("multi_rank_buckets", True, "zero_optimization.use_multi_rank_bucket_allreduce", True),
]
OF_ZERO3 = [
    ("offload_parameters", True, "zero_optimization.offload_param", ON_CPU),
    ("prefetch_bucket_elements", 12_345, "zero_optimization.stage3_prefetch_bucket_size", 12_345),
    ("persistence_threshold_elements", 12_345, "zero_optimization.stage3_param_persistence_threshold", 12_345),
]
OPTIONS = {"zero1": OF_ALL + OF_ZERO12, "zero2": OF_ALL + OF_ZERO12, "zero3": OF_ALL + OF_ZERO3}


def lookup(values: dict[str, Any], key: str) -> Any:
    """Return what stands under a dotted key, or None."""
    section, _, name = key.rpartition(".")
    return (values.get(section, {}) if section else values).get(name)


@pytest.mark.parametrize(
    ("kind", "option", "value", "key", "wanted"),
    [(kind, *option) for kind, options in OPTIONS.items() for option in options],
)
def test_every_option_changes_its_key_of_deepspeeds_and_no_other(
    kind: str, option: str, value: Any, key: str, wanted: Any
) -> None:
    found = deepspeed_config(config_of(kind, **{option: value}), world_size=2)
    default = deepspeed_config(config_of(kind), world_size=2)
    assert lookup(found, key) == wanted != lookup(default, key)
    for keys in (found, default):
        section, _, name = key.rpartition(".")
        (keys[section] if section else keys).pop(name, None)
    assert found == default


@pytest.mark.parametrize(
    ("section", "kind"), [(ZeroStrategy, "zero1"), (ZeroStrategy, "zero2"), (Zero3Strategy, "zero3")]
)
def test_no_option_of_zero_is_forgotten_here(section: type[StrategySection], kind: str) -> None:
    own = section.model_fields.keys() - StrategySection.model_fields.keys() - {"kind", "deepspeed_overrides"}
    assert own == {option for option, *_ in OPTIONS[kind]}


@pytest.mark.parametrize("kind", STAGES)
def test_the_dictionary_survives_json(kind: str) -> None:
    for options in ({}, {option: value for option, value, *_ in OPTIONS[kind]}):
        found = deepspeed_config(config_of(kind, **options), world_size=2)
        assert json.loads(json.dumps(found, allow_nan=False)) == found


def what_deepspeed_read(variant: Variant) -> dict[str, Any]:
    """Build an engine and return its view of its configuration, by the keys of the dictionary."""
    engine: Any = assemble_spec(variant).strategy.model
    return {
        "train_batch_size": engine.train_batch_size(),
        "train_micro_batch_size_per_gpu": engine.train_micro_batch_size_per_gpu(),
        "gradient_accumulation_steps": engine.gradient_accumulation_steps(),
        "gradient_clipping": engine.gradient_clipping(),
        "zero_optimization": engine._config.zero_config.model_dump(by_alias=True),
        "communication_data_type": {"torch.float32": "fp32"}[str(engine.communication_data_type)],
    }


@pytest.mark.parametrize("kind", STAGES)
def test_deepspeed_reads_what_was_written(kind: str) -> None:
    without_gpu = {"offload_optimizer", "offload_parameters", "precision"}
    options = {option: value for option, value, *_ in OPTIONS[kind] if option not in without_gpu}
    options["communication_dtype"] = "fp32"
    variant = Variant(strategy=kind, options=options, rows=24, global_batch=24, micro_batch=4, max_norm=0.25)
    wanted = deepspeed_config(variant.config, world_size=2)
    for found in run_ranks(2, what_deepspeed_read, variant):
        for key, value in found.pop("zero_optimization").items():
            assert value == wanted["zero_optimization"].get(key, value), key
        assert found == {key: wanted[key] for key in found}


# ---------------------------------------------------------------- a user's own file


def merged(folder: Path, content: Any, kind: str = "zero2", **options: Any) -> dict[str, Any]:
    """Return the dictionary with a file of this content merged in, at 2 ranks."""
    path = folder / "mine.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return deepspeed_config(config_of(kind, deepspeed_overrides=str(path), **options), world_size=2)


def refusal(folder: Path, content: Any, **options: Any) -> str:
    """Return the message that a file of this content is refused with."""
    with pytest.raises(ConfigError) as caught:
        merged(folder, content, **options)
    message = str(caught.value)
    assert message.startswith("ConfigError: strategy.deepspeed_overrides: ")
    assert str(folder / "mine.json") in message
    return message


def test_a_file_adds_to_what_we_derive_at_every_depth(tmp_path: Path) -> None:
    mine = {
        "wall_clock_breakdown": True,
        "zero_optimization": {
            "round_robin_gradients": True,
            "reduce_bucket_size": 1000,
            "offload_optimizer": {"buffer_count": 8},
        },
    }
    wanted = deepspeed_config(config_of(offload_optimizer=True), world_size=2)
    wanted["wall_clock_breakdown"] = True
    wanted["zero_optimization"] |= {
        "round_robin_gradients": True,
        "reduce_bucket_size": 1000,
        "offload_optimizer": {"device": "cpu", "pin_memory": True, "buffer_count": 8},
    }
    assert merged(tmp_path, mine, offload_optimizer=True) == wanted


@pytest.mark.parametrize(
    ("mine", "owner"),
    [
        ({"train_batch_size": 25}, "data.global_batch"),
        ({"train_micro_batch_size_per_gpu": 6}, "strategy.micro_batch"),
        ({"gradient_accumulation_steps": 2}, "data.global_batch and strategy.micro_batch"),
        ({"elasticity": {"enabled": True, "max_train_batch_size": 99}}, "data.global_batch"),
        ({"gradient_clipping": 2.0}, "clip"),
        ({"bf16": {"enabled": True}}, "strategy.precision"),
        ({"fp16": {"enabled": True}}, "strategy.precision"),
        ({"fp16": True}, "strategy.precision"),
        ({"amp": {"enabled": True}}, "strategy.precision"),
        ({"torch_autocast": {"enabled": True}}, "strategy.precision"),
        ({"torch_autocast": {"lower_precision_safe_modules": ["torch.nn.Linear"]}}, "strategy.precision"),
        ({"data_types": {"grad_accum_dtype": "bf16"}}, "strategy.precision"),
        ({"bfloat16": {"enabled": True}}, "strategy.precision"),
        ({"gradient_accumulation_dtype": "bf16"}, "strategy.precision"),
        ({"tensor_parallel": {"autotp_size": 2}}, "strategy.kind"),
        ({"zero_optimization": {"cpu_offload": True}}, "strategy.offload_optimizer"),
        ({"optimizer": {"type": "AdamW", "params": {"lr": 1.0}}}, "optim"),
        ({"zero_allow_untested_optimizer": False}, "optim"),
        ({"zero_force_ds_cpu_optimizer": True}, "optim"),
        ({"scheduler": {"type": "WarmupLR"}}, "schedule"),
        ({"zero_optimization": {"stage": 3}}, "strategy.kind"),
        ({"zero_optimization": {"stage": "2"}}, "strategy.kind"),
    ],
)
def test_what_the_run_decides_is_refused_by_name(tmp_path: Path, mine: dict[str, Any], owner: str) -> None:
    (key, value), prefix = next(iter(mine.items())), ""
    if key == "zero_optimization":
        (key, value), prefix = next(iter(value.items())), "zero_optimization."
    message = refusal(tmp_path, mine)
    assert f"\n  {prefix}{key}: {value!r} contradicts {owner}, which decides it; it is " in message
    assert message.count("\n") == 1


def test_everything_that_contradicts_the_run_is_listed_at_once_with_what_the_run_has(tmp_path: Path) -> None:
    mine = {
        "gradient_clipping": 1.0,
        "train_batch_size": 100,
        "wall_clock_breakdown": True,
        "fp16": {"enabled": True},
        "zero_optimization": {"stage": 3, "overlap_comm": True},
        "scheduler": {"type": "WarmupLR"},
    }
    lines = refusal(tmp_path, mine, clip={"kind": "norm", "max_norm": 0.5}).splitlines()[1:]
    assert sorted(line.split(":")[0].strip() for line in lines) == [
        "fp16",
        "gradient_clipping",
        "scheduler",
        "train_batch_size",
        "zero_optimization.stage",
    ]
    ends = {line.split(":")[0].strip(): line.rpartition("; it ")[2] for line in lines}
    assert ends["gradient_clipping"] == "is 0.5 in this run"
    assert ends["train_batch_size"] == "is 24 in this run"
    assert ends["zero_optimization.stage"] == "is 2 in this run"
    assert ends["fp16"] == "is off in this run"
    assert ends["scheduler"] == "is not DeepSpeed's to decide"


def test_values_that_agree_with_the_run_change_nothing(tmp_path: Path) -> None:
    mine = {
        "train_batch_size": 24,
        "train_micro_batch_size_per_gpu": 12,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 1,
        "bf16": {"enabled": False},
        "fp16": {"enabled": False, "loss_scale": 0},
        "amp": {},
        "torch_autocast": {"enabled": False},
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {"stage": 2},
    }
    clip = {"kind": "norm", "max_norm": 1.0}
    assert merged(tmp_path, mine, clip=clip) == deepspeed_config(config_of(clip=clip), world_size=2)


def test_auto_leaves_a_value_to_the_run_wherever_it_stands(tmp_path: Path) -> None:
    # As in the files that transformers ships. DeepSpeed would put its own defaults in the place of "auto", not ours.
    mine = {
        "train_batch_size": "auto",
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "communication_data_type": "auto",
        "bf16": {"enabled": "auto"},
        "fp16": {"enabled": "auto", "loss_scale": 0, "loss_scale_window": 1000},
        "optimizer": "auto",
        "zero_optimization": {
            "stage": "auto",
            "reduce_bucket_size": "auto",
            "use_multi_rank_bucket_allreduce": "auto",
            "offload_optimizer": {"device": "auto"},
        },
    }
    options = {"reduce_bucket_elements": 1000, "communication_dtype": "fp32", "offload_optimizer": True}
    assert merged(tmp_path, mine, **options) == deepspeed_config(config_of(**options), world_size=2)


def test_an_empty_object_changes_nothing(tmp_path: Path) -> None:
    assert merged(tmp_path, {}) == deepspeed_config(config_of(), world_size=2)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("{'stage': 2}", "is not JSON: Expecting property name"),
        ("", "is not JSON"),
        ("[" * 100_000, "is not JSON"),
        ("[1, 2]", "holds a list, wanted an object"),
        ("null", "holds a NoneType, wanted an object"),
        ('{"zero_optimization": 2}', "zero_optimization in "),
        ('{"zero_optimization": null}', "is not an object"),
    ],
)
def test_a_file_that_is_no_object_of_json_is_refused(tmp_path: Path, content: str, words: str) -> None:
    assert words in refusal(tmp_path, content)


def test_a_file_that_is_not_there_is_refused_with_its_path(tmp_path: Path) -> None:
    config = config_of(deepspeed_overrides=str(tmp_path / "no.json"))
    with pytest.raises(ConfigError, match=r"cannot read .*no\.json: No such file"):
        deepspeed_config(config, world_size=2)


# ---------------------------------------------------------------- a guest in this house: cold starts

UPDATES = 3


def small_run(folder: Path) -> str:
    """Write a config over a small csv file; accumulation and an optimizer that DeepSpeed does not know are in it."""
    (folder / "rows.csv").write_text("x,y\n" + "\n".join(f"{i},{i % 3}" for i in range(40)) + "\n")
    config = {
        "run": {"name": "guest", "output_root": str(folder / "runs"), "max_steps": UPDATES},
        "model": {"kind": "mlp", "hidden": [4]},
        "data": {"source": "csv", "path": str(folder / "rows.csv"), "targets": ["y"], "global_batch": 8},
        "task": {"kind": "classification", "num_classes": 3},
        "optim": {"kind": "sgd", "peak_lr": 0.1},
        "strategy": {"kind": "ddp", "micro_batch": 2},
    }
    path = folder / "guest.yaml"
    path.write_text(json.dumps(config))
    return str(path)


def start(*command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run Python cold with these arguments."""
    ours = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY), **environment}
    return subprocess.run(
        [sys.executable, *command],
        timeout=240,
        capture_output=True,
        text=True,
        check=False,
        cwd=REPOSITORY,
        env={**os.environ, **ours},
    )


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    """What ranks tell whose parent has not imported DeepSpeed."""
    done = start("-m", "tests.without_deepspeed", small_run(tmp_path_factory.mktemp("told")))
    assert done.returncode == 0, done.stderr
    found: dict[str, list[dict[str, Any]]] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.mark.slow
def test_ddp_on_two_ranks_never_imports_deepspeed(told: dict[str, list[dict[str, Any]]]) -> None:
    assert told["two ranks"] == [{"code": 0, "said": "", "has_imported": False}] * 2


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "code"), [("ddp", 0), ("zero1", 2)])
def test_without_deepspeed_ddp_trains_and_zero_says_what_to_install(
    told: dict[str, list[dict[str, Any]]], kind: str, code: int
) -> None:
    (rank,) = told[kind]
    assert rank["code"] == code, rank
    if code:
        assert rank["said"].startswith("ConfigError: strategy.kind: zero1 needs DeepSpeed")
        assert "pip install 'harness-train[zero]', or use strategy.kind=ddp" in rank["said"]
        assert "Traceback" not in rank["said"]


@pytest.fixture(scope="module")
def extensions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for what torch compiles, with the lock of a build that was killed."""
    folder = tmp_path_factory.mktemp("extensions")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "path", list(sys.path))  # setuptools adds to it
        from torch.utils.cpp_extension import _get_build_directory

        patch.setenv("TORCH_EXTENSIONS_DIR", str(folder))
        build = Path(_get_build_directory("deepspeed_shm_comm", verbose=False))
    (build / "lock").touch()  # torch waits in FileBaton.wait for as long as it is there
    return build.parent


@pytest.fixture(scope="module")
def cold_start(extensions: Path, tmp_path_factory: pytest.TempPathFactory) -> subprocess.CompletedProcess[str]:
    """What a process says that imports DeepSpeed, and nothing before."""
    run = ("-m", "harness.train", small_run(tmp_path_factory.mktemp("cold")), "strategy.kind=zero3")
    return start(*run, "tracking.report=false", TORCH_EXTENSIONS_DIR=str(extensions))


@pytest.mark.slow
def test_a_lock_that_a_killed_build_left_behind_hangs_nobody_and_nothing_is_built(
    cold_start: subprocess.CompletedProcess[str], extensions: Path
) -> None:
    assert cold_start.returncode == 0, cold_start.stderr
    assert [path.name for path in extensions.rglob("*")] == ["deepspeed_shm_comm", "lock"]


def train_and_tell(folder: str, *arguments: str) -> tuple[int, str, str]:
    """Train as one rank; return the exit code and what this process has written to its stdout and its stderr."""
    del os.environ["ACCELERATE_LOG_LEVEL"]  # no user has it
    paths = [Path(folder, f"{name}-{os.environ['RANK']}") for name in ("stdout", "stderr")]
    for stream, path in zip((sys.stdout, sys.stderr), paths, strict=True):
        stream.flush()
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), stream.fileno())
    code = train_main(*arguments)
    sys.stdout.flush()
    sys.stderr.flush()
    return code, *(path.read_text() for path in paths)  # type: ignore[return-value]


def beginnings(stdout: str, *, kind: str) -> set[str]:
    """What each line starts with, up to its first number or colon."""
    return {re.split(r"[\d:]", line.replace(kind, "KIND"))[0] for line in stdout.splitlines()}


@pytest.mark.slow
def test_zero_says_nothing_that_ddp_does_not_say(cold_start: subprocess.CompletedProcess[str], tmp_path: Path) -> None:
    said = {}
    for kind in ("ddp", "zero1", "zero3"):
        (tmp_path / kind).mkdir()
        run = (small_run(tmp_path), f"strategy.kind={kind}", f"run.name={kind}")
        first, second = run_ranks(2, train_and_tell, str(tmp_path / kind), *run)
        assert [first[::2], second[::2]] == [(0, "")] * 2, kind
        said[kind] = beginnings(first[1] + second[1], kind=kind)
    assert said["zero1"] == said["zero3"] == said["ddp"]
    assert "update " in said["ddp"]
    # The parent of those ranks had imported DeepSpeed; here is what that says.
    assert cold_start.stderr == ""
    assert beginnings(cold_start.stdout, kind="zero3") - said["ddp"] == {"strategy.kind"}  # of the only rank


@pytest.mark.long
def test_launched_cold_on_two_ranks_zero_says_nothing_that_ddp_does_not_say(tmp_path: Path) -> None:
    said = {}
    for kind in ("ddp", "zero1", "zero3"):
        run = (small_run(tmp_path), f"strategy.kind={kind}", f"run.name={kind}", "tracking.report=false")
        launch = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "harness.train")
        done = start(*launch, *run, TMPDIR=str(tmp_path))  # where torchrun leaves folders
        assert done.returncode == 0, done.stderr
        assert done.stderr == "", kind
        said[kind] = beginnings(done.stdout, kind=kind)
    assert said["zero1"] == said["zero3"] == said["ddp"]
    assert "update " in said["ddp"]
