"""Runs of a tiny pretrained model: every strategy, resumed, in another strategy, and taken out for transformers."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from harness.catalogue.pretrained.network import build
from harness.catalogue.pretrained.section import PretrainedModel
from harness.config.io import load_config
from harness.config.run_config import RunConfig
from harness.export import load_exported, main
from harness.record.json_lines import read_events
from harness.rows.order import BatchPlan
from harness.rows.rows import Columns
from tests import helpers
from tests.distributed.ranks import run_ranks, run_standing_ranks
from tests.distributed.scenarios import Spec, harness_trace, load_and_train, save_after, train_main
from tests.sections import load
from tests.tiny_architectures import change_config, write_architecture
from tests.tiny_models import NUM_TOKENS, config_values, write_model, write_reviews, write_tokenizer

STRATEGIES = ("ddp", "zero1", "zero2", "zero3")
DECAY, PEAK = 0.5, 1e-3


@dataclass(frozen=True)
class PretrainedSpec(Spec):
    """Rows of tokens for a tiny BERT whose embeddings and lowest block are frozen."""

    network: str = "pretrained"
    path: str = ""
    frozen_layers: int | None = 1
    updates: int = 6

    @property
    def is_classification(self) -> bool:
        return True

    @property
    def model_config(self) -> PretrainedModel:
        """Its model section."""
        return PretrainedModel(
            kind="pretrained",
            path=self.path,
            frozen_layers=self.frozen_layers,
            layer_lr_decay=DECAY,
            dropout=0.0,
        )

    @property
    def config(self) -> RunConfig:
        return super().config.model_copy(update={"model": self.model_config})

    def model(self) -> nn.Module:
        torch.manual_seed(0)
        return build(self.model_config, num_outputs=5)

    def columns(self) -> Columns:
        generator = torch.Generator().manual_seed(1)
        tokens = torch.randint(4, NUM_TOKENS, (self.rows, 6), generator=generator)
        lengths = torch.randint(2, 7, (self.rows, 1), generator=generator)
        tokens[torch.arange(6) >= lengths] = 0
        return Columns(tokens, torch.randint(5, (self.rows,), generator=generator))


def plain_loop(spec: PretrainedSpec) -> tuple[list[float], dict[str, Tensor]]:
    """Train transformers' own network by hand, with a rate for each depth written out; return losses and weights."""
    model, columns, config = spec.model(), spec.columns(), spec.config
    network = model.network
    places = {"classifier": 0, "pooler": 0, "layer.1": 1, "layer.0": 2, "embeddings": 3}
    groups = []
    for name, parameter in network.named_parameters():
        depth = next(depth for part, depth in places.items() if part in name)
        frozen = spec.frozen_layers is not None and depth > 2 - spec.frozen_layers
        parameter.requires_grad_(not frozen)
        if not frozen:
            decay = 0.1 if parameter.dim() >= 2 else 0.0
            groups.append({"params": [parameter], "lr": PEAK * DECAY**depth, "weight_decay": decay})
    optimizer = torch.optim.AdamW(groups)
    warm = torch.optim.lr_scheduler.LinearLR(optimizer, start_factor=1 / 4, total_iters=3)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=spec.updates - 4)
    schedule = torch.optim.lr_scheduler.SequentialLR(optimizer, [warm, decay], milestones=[4])
    plan = BatchPlan(
        num_rows=spec.rows, global_batch=spec.global_batch, world_size=1, micro_batch=None, seed=config.run.seed
    )
    losses = []
    for position in range(spec.updates):
        ids = torch.from_numpy(plan.sample_ids(position, 0))
        tokens = columns.inputs[ids]
        logits = network(input_ids=tokens, attention_mask=(tokens != 0).long()).logits
        loss = nn.functional.cross_entropy(logits, columns.targets[ids])
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), spec.max_norm or float("inf"))
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    return losses, {f"network.{name}": p.detach().clone() for name, p in network.named_parameters() if p.requires_grad}


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("models") / "bert")


@pytest.mark.slow
@pytest.mark.parametrize("frozen_layers", [None, 1])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_frozen_blocks_and_the_rate_of_each_depth_are_those_of_a_loop_by_hand(
    bert: Path, strategy: str, frozen_layers: int | None
) -> None:
    spec = PretrainedSpec(path=str(bert), strategy=strategy, frozen_layers=frozen_layers, optimizer="adamw")
    losses, weights = plain_loop(spec)
    traces = run_standing_ranks(2, harness_trace, spec, deadline_seconds=180)
    assert traces[0].losses == pytest.approx(losses, rel=1e-5)
    assert traces[0].parameters.keys() == weights.keys()
    start = dict(spec.model().named_parameters())
    for name, weight in weights.items():
        if name.endswith("key.bias"):  # its gradient is rounding alone, which Adam scales up
            continue
        moved, wanted = traces[0].parameters[name] - start[name], weight - start[name]
        torch.testing.assert_close(moved, wanted, rtol=2e-2, atol=2e-6, msg=lambda text, name=name: f"{name}: {text}")
        assert wanted.abs().max() > 1e-5, f"{name} did not move, so the comparison proves nothing"


@pytest.mark.slow
@pytest.mark.parametrize("loads", ["zero1", "zero3"])
def test_a_checkpoint_of_ddp_on_two_ranks_goes_on_under_zero_on_one_with_its_frozen_weights(
    bert: Path, tmp_path: Path, loads: str
) -> None:
    spec = PretrainedSpec(path=str(bert))
    saved = run_standing_ranks(2, save_after, spec, str(tmp_path / "cut"), 3)[0]
    wanted = run_standing_ranks(2, save_after, spec, str(tmp_path / "whole"), 6)[0]
    names = {key.removeprefix("model/") for key in saved if key.startswith("model/")}
    assert names == {name for name, _ in spec.model().named_parameters()}
    loaded, found, _ = run_standing_ranks(1, load_and_train, replace(spec, strategy=loads), str(tmp_path / "cut"), 6)[0]
    assert loaded.keys() == saved.keys()
    for key, tensor in saved.items():
        assert torch.equal(loaded[key], tensor), key
    for key, tensor in wanted.items():
        torch.testing.assert_close(found[key], tensor, rtol=1e-3, atol=1e-4, msg=lambda text, key=key: f"{key}: {text}")


def write_config(folder: Path, directory: Path, /, **sections: Any) -> str:
    write_reviews(folder / "reviews.csv")
    return str(helpers.write_config(folder / "tiny.yaml", config_values(folder, directory, **sections)))


def test_a_run_in_two_parts_has_the_bits_of_a_run_in_one(bert: Path, tmp_path: Path) -> None:
    model = {"frozen_layers": 1, "layer_lr_decay": 0.7}
    config = write_config(tmp_path, bert, model=model)
    for name, budgets in (("whole", (10,)), ("parts", (5, 10))):
        for budget in budgets:
            assert run_ranks(2, train_main, config, f"run.name={name}", f"run.max_steps={budget}") == [0, 0]
    whole, parts = (
        [line for line in helpers.plain_ledger(tmp_path / f"runs/{name}/ledger.jsonl") if line["event"] == "update"]
        for name in ("whole", "parts")
    )
    assert len(whole) == 10
    assert parts == whole
    weights = "checkpoints/step-00000010/model-00000.safetensors"
    assert (tmp_path / "runs/parts" / weights).read_bytes() == (tmp_path / "runs/whole" / weights).read_bytes()


@pytest.mark.parametrize("strategy", ["ddp", pytest.param("zero3", marks=pytest.mark.slow)])
def test_a_run_says_how_many_of_its_parameters_are_trained(bert: Path, tmp_path: Path, strategy: str) -> None:
    import transformers

    config = write_config(tmp_path, bert, model={"frozen_layers": 1}, strategy={"kind": strategy})
    assert run_ranks(1, train_main, config, "run.max_steps=1") == [0]
    network = transformers.AutoModel.from_pretrained(bert, local_files_only=True)
    frozen = [p for name, p in network.named_parameters() if name.startswith(("embeddings.", "encoder.layer.0."))]
    events = read_events(tmp_path / "runs/tiny")
    (start,) = [event for event in events if event["event"] == "started"]
    num_parameters, num_trained = start["num_parameters"], start["num_trained_parameters"]
    assert num_parameters - num_trained == sum(parameter.numel() for parameter in frozen) > 0
    said = f"with {num_parameters:,} parameters ({num_trained:,} of them trained), "
    assert [event for event in events if said in event.get("text", "")]


@pytest.mark.parametrize("strategy", ["ddp", pytest.param("zero3", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    ("family", "lora", "ema"),
    [
        ("bert", None, None),
        ("bert", {"rank": 2, "dropout": 0.1}, None),
        ("bert", {"rank": 2, "dropout": 0.1}, {"decay": 0.7}),
        ("gpt2", {"rank": 2, "alpha": 3.0, "target_modules": ["c_attn", "c_proj"]}, None),  # one of c_proj is square
    ],
)
def test_transformers_loads_what_was_exported_and_gives_the_scores_of_the_run(
    tmp_path: Path, strategy: str, family: str, lora: dict[str, Any] | None, ema: dict[str, float] | None
) -> None:
    import transformers

    if lora is not None:
        pytest.importorskip("peft")
    model = write_model(tmp_path / "model", family=family)
    config = write_config(tmp_path, model, model={"lora": lora}, strategy={"kind": strategy})
    average = [] if ema is None else [f"ema={json.dumps(ema)}"]
    assert run_ranks(1, train_main, config, *average) == [0]
    out = tmp_path / "out"
    assert main([str(tmp_path / "runs/tiny"), "--to", str(out), "--from", "latest"]) == 0
    loaded = load_config(config).config
    rows = load(loaded.data, loaded.task, seed=loaded.run.seed).validation
    network = transformers.AutoModelForSequenceClassification.from_pretrained(out, local_files_only=True)
    tokenizer = transformers.AutoTokenizer.from_pretrained(out, local_files_only=True)
    assert network.config.id2label == {0: "great", 1: "other"}
    assert tokenizer("the food was good")["input_ids"] == [2, 11, 8, 13, 4, 3]
    with torch.no_grad():
        logits = network.eval()(input_ids=rows.inputs, attention_mask=(rows.inputs != 0).long()).logits
        ours = load_exported(out)(rows.inputs)
    torch.testing.assert_close(ours, logits, rtol=1e-5, atol=1e-6)
    scores = json.loads((out / "harness.json").read_bytes())["metrics"]
    assert nn.functional.cross_entropy(logits, rows.targets).item() == pytest.approx(scores["val/loss"], rel=1e-5)
    start = transformers.AutoModel.from_pretrained(model, local_files_only=True)
    moved = [
        not torch.equal(tensor, start.state_dict()[name]) for name, tensor in network.base_model.state_dict().items()
    ]
    assert any(moved)


def exported_run(folder: Path, model: Path, **sections: Any) -> Path:
    """Train ten updates of a model and export them."""
    assert run_ranks(1, train_main, write_config(folder, model, **sections)) == [0]
    assert main([str(folder / "runs/tiny"), "--to", str(folder / "out"), "--from", "latest"]) == 0
    return folder / "out"


@pytest.mark.parametrize("has_names", [True, False])
def test_an_export_has_the_classes_type_and_files_of_the_run_and_not_those_of_the_model_it_began_with(
    has_names: bool, tmp_path: Path
) -> None:
    import transformers

    names = {0: "contradiction", 1: "neutral"}
    options = {"vocab_size": NUM_TOKENS, "id2label": names, "label2id": {name: label for label, name in names.items()}}
    model = write_architecture(tmp_path / "model", "bert", head="sequence_classification", **options)
    write_tokenizer(model)
    change_config(model, dtype="bfloat16")
    kept = {"chat_template.jinja": "{{ messages }}", "vocab.txt": "good", "merges.txt": "a b", "spiece.model": "x"}
    for name, text in kept.items():
        (model / name).write_text(text)
    (model / "model.safetensors.index.json").write_text("{}")
    write_reviews(tmp_path / "reviews.csv")
    if not has_names:
        rows = (tmp_path / "reviews.csv").read_text()
        (tmp_path / "numbers.csv").write_text(rows.replace(",great", ",0").replace(",other", ",1"))
    out = exported_run(tmp_path, model, data={} if has_names else {"path": str(tmp_path / "numbers.csv")})
    network = transformers.AutoModelForSequenceClassification.from_pretrained(out, local_files_only=True)
    assert network.config.id2label == ({0: "great", 1: "other"} if has_names else {0: "LABEL_0", 1: "LABEL_1"})
    assert network.config.label2id == {name: label for label, name in network.config.id2label.items()}
    assert network.dtype == torch.float32
    assert {name: (out / name).read_text() for name in kept} == kept
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (out / name).read_bytes() == (model / name).read_bytes()
    assert not (out / "model.safetensors.index.json").exists()


def test_a_bart_with_two_classes_is_exported_with_two_also_where_they_have_no_names(tmp_path: Path) -> None:
    import transformers

    options = {"vocab_size": NUM_TOKENS, "num_labels": 2, "eos_token_id": 3}
    model = write_architecture(tmp_path / "model", "bart", head="sequence_classification", **options)
    write_tokenizer(model)
    write_reviews(tmp_path / "reviews.csv")
    rows = (tmp_path / "reviews.csv").read_text()
    (tmp_path / "numbers.csv").write_text(rows.replace(",great", ",0").replace(",other", ",1"))
    out = exported_run(tmp_path, model, data={"path": str(tmp_path / "numbers.csv"), "max_tokens": 16})
    network = transformers.AutoModelForSequenceClassification.from_pretrained(out, local_files_only=True)
    assert network.config.num_labels == 2


def test_an_export_whose_logits_are_others_is_not_said_to_be_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from transformers import PreTrainedModel

    model = write_model(tmp_path / "model")
    assert run_ranks(1, train_main, write_config(tmp_path, model)) == [0]
    save = PreTrainedModel.save_pretrained

    def save_otherwise(network: Any, directory: Path) -> None:
        with torch.no_grad():
            network.classifier.weight.add_(0.01)
        save(network, directory)

    monkeypatch.setattr(PreTrainedModel, "save_pretrained", save_otherwise)
    assert main([str(tmp_path / "runs/tiny"), "--to", str(tmp_path / "out")]) == 4
    assert "nothing was exported: what transformers loads from the export has other logits" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_model_directory_that_is_another_now_is_told_when_a_run_is_exported(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = write_model(tmp_path / "model")
    assert run_ranks(1, train_main, write_config(tmp_path, model)) == [0]
    write_model(tmp_path / "model", intermediate_size=64)
    assert main([str(tmp_path / "runs/tiny"), "--to", str(tmp_path / "out")]) == 4
    said = capsys.readouterr().err
    assert "are of different networks" in said
    assert "Put the directory back that the run began with" in said


def test_a_head_that_is_tied_to_the_embeddings_is_exported_with_what_was_added_to_it(tmp_path: Path) -> None:
    """The issue's case: the run said 3.776, the export had 5.694."""
    import transformers

    pytest.importorskip("peft")
    from tests.distributed.test_pretrained_language import TEXTS, write_run
    from tests.tiny_models import write_language_model

    write_language_model(tmp_path / "model", TEXTS)
    path = write_run(tmp_path, model={"lora": {"rank": 4, "target_modules": ["lm_head", "wte"]}})
    assert run_ranks(1, train_main, str(path)) == [0]
    loaded = load_config(path).config
    run = Path(loaded.run.output_root) / loaded.run.name
    assert main([str(run), "--to", str(tmp_path / "out"), "--from", "latest"]) == 0
    rows = load(loaded.data, loaded.task, seed=loaded.run.seed).validation
    scores = json.loads((tmp_path / "out/harness.json").read_bytes())["metrics"]
    losses = []
    for directory in (tmp_path / "out", tmp_path / "model"):
        network = transformers.AutoModelForCausalLM.from_pretrained(directory, local_files_only=True).eval()
        with torch.no_grad():
            logits = network(input_ids=rows.inputs.long()).logits
        losses.append(nn.functional.cross_entropy(logits.flatten(0, 1), rows.targets.long().flatten()).item())
    assert losses[0] == pytest.approx(scores["val/loss"], rel=1e-5)
    assert losses[0] < losses[1] - 0.01


def write_experts(folder: Path, strategy: str) -> str:
    options = {"vocab_size": NUM_TOKENS, "num_labels": 2}
    model = write_architecture(folder / "model", "mixtral", head="sequence_classification", **options)
    write_tokenizer(model)
    lora = {"rank": 2, "target_modules": ["w1", "w2", "w3"]}
    return write_config(folder, model, model={"lora": lora}, strategy={"kind": strategy})


@pytest.mark.parametrize("strategy", ["ddp", pytest.param("zero2", marks=pytest.mark.slow)])
def test_what_is_added_to_experts_on_two_ranks_is_in_the_export(strategy: str, tmp_path: Path) -> None:
    import transformers

    pytest.importorskip("peft")
    config = write_experts(tmp_path, strategy)
    assert run_ranks(2, train_main, config) == [0, 0]
    assert main([str(tmp_path / "runs/tiny"), "--to", str(tmp_path / "out"), "--from", "latest"]) == 0
    loaded = load_config(config).config
    rows = load(loaded.data, loaded.task, seed=loaded.run.seed).validation
    network = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "out").eval()
    with torch.no_grad():
        logits = network(input_ids=rows.inputs, attention_mask=(rows.inputs != 0).long()).logits
    scores = json.loads((tmp_path / "out/harness.json").read_bytes())["metrics"]
    assert nn.functional.cross_entropy(logits, rows.targets).item() == pytest.approx(scores["val/loss"], rel=1e-5)


@pytest.mark.slow
def test_experts_that_are_added_to_are_refused_under_zero3_which_has_them_in_pieces(
    tmp_path: Path,
) -> None:
    pytest.importorskip("peft")
    assert run_ranks(1, train_main, write_experts(tmp_path, "zero3")) == [2]
    reason = json.loads((tmp_path / "runs/tiny/exit.json").read_bytes())["reason"]
    assert "strategy.kind: zero3 has the tensor of a layer's experts in pieces" in reason
