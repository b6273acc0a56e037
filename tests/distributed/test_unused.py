"""Parameters that no loss uses: frozen and told on any number of ranks, under every strategy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from harness.errors import ConfigError
from harness.ranks.group import Ranks
from harness.record.json_lines import read_events
from harness.strategy.untouched import no_trace
from harness.strategy.unused import freeze, unused_parameters
from tests import helpers
from tests.distributed.ranks import run_ranks, run_standing_ranks
from tests.distributed.scenarios import join, train_main, train_main_and_listen
from tests.tiny_architectures import write_architecture
from tests.tiny_models import NUM_TOKENS, config_values, write_reviews, write_tokenizer

ALONE = Ranks(rank=0, world_size=1, device=torch.device("cpu"))


def write_run(folder: Path, family: str, **sections: Any) -> str:
    model = write_architecture(folder / "model", family, head="sequence_classification", vocab_size=NUM_TOKENS)
    write_tokenizer(model)
    write_reviews(folder / "reviews.csv")
    return str(helpers.write_config(folder / "tiny.yaml", config_values(folder, model, **sections)))


@pytest.mark.parametrize("strategy", ["ddp", pytest.param("zero2", marks=pytest.mark.slow)])
@pytest.mark.parametrize("family", ["big_bird", "xlnet", pytest.param("luke", marks=pytest.mark.slow)])
def test_two_ranks_train_a_model_with_parameters_that_no_loss_uses_and_name_them(
    family: str, strategy: str, tmp_path: Path
) -> None:
    name = {"big_bird": "bert.pooler.weight", "xlnet": "transformer.mask_emb", "luke": "luke.entity_embeddings"}[family]
    config = write_run(tmp_path, family, strategy={"kind": strategy})
    assert run_ranks(2, train_main, config, "run.max_steps=3") == [0, 0]
    notices = [event["text"] for event in read_events(tmp_path / "runs/tiny") if event["event"] == "notice"]
    (said,) = [text for text in notices if "the loss does not depend on" in text]
    assert name in said
    ledger = helpers.plain_ledger(tmp_path / "runs/tiny/ledger.jsonl")
    assert len([line for line in ledger if line["event"] == "update"]) == 3


def test_one_rank_and_two_train_the_same_parameters_of_such_a_model(tmp_path: Path) -> None:
    config = write_run(tmp_path, "big_bird")
    for world_size in (1, 2):
        done = run_ranks(world_size, train_main, config, f"run.name=of{world_size}", "run.max_steps=2")
        assert done == [0] * world_size
    one, two = (
        [event for event in read_events(tmp_path / f"runs/of{n}") if event["event"] == "started"] for n in (1, 2)
    )
    assert one[0]["num_trained_parameters"] == two[0]["num_trained_parameters"] < one[0]["num_parameters"]


class Halves(nn.Module):
    """Rows that begin with a positive number go through one layer, all others through another."""

    def __init__(self) -> None:
        super().__init__()
        self.positive, self.negative, self.never = nn.Linear(2, 1), nn.Linear(2, 1), nn.Linear(2, 1)

    def forward(self, rows: Tensor) -> Tensor:
        parts = ((self.positive, rows[rows[:, 0] > 0]), (self.negative, rows[rows[:, 0] <= 0]))
        return torch.cat([layer(some) for layer, some in parts if len(some)])


def frozen(signs: list[list[float]]) -> tuple[list[str], tuple[str, ...]]:
    ranks = join()
    module = Halves()
    rows = torch.tensor([[sign, 1.0] for sign in signs[ranks.rank]])
    unused = unused_parameters(module, lambda: module(rows[:2]).sum(), [lambda: module(rows).sum()])
    notices, _ = freeze(module, unused, ranks, waits=True)
    return [name for name, parameter in module.named_parameters() if not parameter.requires_grad], notices


def refusal(signs: list[list[float]]) -> str:
    with pytest.raises(ConfigError) as caught:
        frozen(signs)
    return caught.value.args[0]


def test_what_the_third_row_uses_is_not_frozen() -> None:
    for names, (notice,) in run_standing_ranks(2, frozen, [[1.0, 2.0, -1.0], [-1.0, -1.0, 3.0]]):
        assert names == ["never.weight", "never.bias"]
        assert "never.weight, never.bias" in notice


def test_what_only_one_rank_uses_is_refused_on_all_ranks_by_name() -> None:
    one, two = run_standing_ranks(2, refusal, [[1.0, -1.0], [1.0, 1.0]])
    assert one == two
    assert "2 parameters, such as negative.weight, for some rows, at some times or on some ranks only" in one


def test_looking_for_them_leaves_no_trace_in_the_module_or_the_random_numbers() -> None:
    module = nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.5), nn.BatchNorm1d(2))
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    state = torch.get_rng_state()

    def loss() -> Tensor:
        return module(torch.ones(3, 2)).sum()

    with no_trace(module, ALONE.device):
        assert unused_parameters(module, loss, [loss], draws=True, is_known=False) == ([], [], [])
    assert torch.equal(torch.get_rng_state(), state)
    assert module.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in module.state_dict().items())
    assert all(parameter.grad is None and parameter.requires_grad for parameter in module.parameters())


def test_a_model_of_which_nothing_would_be_trained_is_refused() -> None:
    module = nn.Linear(2, 2).requires_grad_(False)

    def loss() -> Tensor:
        return module(torch.ones(3, 2)).sum()

    with pytest.raises(ConfigError, match="nothing would be trained"):
        freeze(module, unused_parameters(module, loss, [loss]), ALONE, waits=True)


def train_padding_at_the_end(*arguments: str) -> int:
    """Train as the versions before did, which padded every model at the end of its rows."""
    from harness import assemble
    from harness.catalogue.pretrained import network as pretrained

    pretrained._choose_padding = lambda model, config: None  # type: ignore[assignment]
    assemble.READING = 1
    return train_main(*arguments)


@pytest.mark.slow
def test_a_run_whose_rows_were_padded_at_the_other_side_is_refused_and_says_why(tmp_path: Path) -> None:
    config = write_run(tmp_path, "xlnet")
    assert run_ranks(1, train_padding_at_the_end, config, "run.max_steps=2") == [0]
    ((code, said),) = run_ranks(1, train_main_and_listen, config, "run.max_steps=4")
    assert code == 3
    assert "this version pads short rows at their beginning. Go on with the harness that has written it" in said
    assert run_ranks(1, train_main, config, "run.name=new", "run.max_steps=2") == [0]
    assert run_ranks(1, train_main, config, "run.name=new", "run.max_steps=4") == [0]
