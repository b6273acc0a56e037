"""A user's un-reduced loss as sum and weight, and each thing it may return that is none."""

from __future__ import annotations

from typing import Any, ClassVar

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics import MeanMetric, MetricCollection
from torchmetrics.classification import BinaryAccuracy

from harness.catalogue.causal_lm.task import CausalLm
from harness.catalogue.classification.section import ClassificationTask
from harness.catalogue.classification.task import Classification
from harness.catalogue.regression.task import Regression
from harness.doctor.first_rows import check_steps
from harness.errors import ConfigError
from harness.rows.batches import Batch
from harness.scores import Scores, check_metric
from harness.tasks.adapted import adapted
from harness.tasks.base import TaskLoss
from tests.pairs import pair

CPU = torch.device("cpu")
ALONE = lambda vector: vector.unsqueeze(0)  # noqa: E731


def batch(data: Any, num_rows: int) -> Batch:
    return Batch(data, num_rows, torch.arange(num_rows), is_padding=False)


class Click:
    def loss(self, outputs: Tensor, batch: Any) -> Any:
        return F.binary_cross_entropy_with_logits(outputs, batch["label"], reduction="none")


class Masked(Click):
    def weights(self, batch: Any) -> Any:
        return batch["weight"]


DATA = {"label": torch.tensor([0.0, 1.0, 1.0]), "weight": torch.tensor([1.0, 0.0, 2.0])}
OUTPUTS = torch.tensor([0.5, -1.0, 2.0])


def test_a_sum_over_a_weight_is_the_weighted_mean() -> None:
    each = F.binary_cross_entropy_with_logits(OUTPUTS, DATA["label"], reduction="none")
    plain, masked = adapted(Click(), name="click"), adapted(Masked(), name="masked")
    assert (plain.is_weighted, masked.is_weighted) == (False, True)
    rows = batch(DATA, 3)
    torch.testing.assert_close(plain.loss_sums(OUTPUTS, rows)["loss"] / plain.weight_sum(rows), each.mean())
    found = masked.loss_sums(OUTPUTS, rows)["loss"] / masked.weight_sum(rows)
    torch.testing.assert_close(found, (each * DATA["weight"]).sum() / 3)
    torch.testing.assert_close(plain.row_losses(OUTPUTS, rows), each)
    torch.testing.assert_close(masked.row_losses(OUTPUTS, rows), each * DATA["weight"])


def test_a_target_of_no_weight_may_have_any_loss() -> None:
    outputs = torch.tensor([0.5, torch.nan, 2.0], requires_grad=True)
    task = adapted(Masked(), name="masked")
    loss = task.loss_sums(outputs, batch(DATA, 3))["loss"]
    loss.backward()
    assert loss.isfinite()
    assert outputs.grad is not None
    assert outputs.grad[[0, 2]].isfinite().all()


def test_several_targets_a_row_are_counted_from_the_first_loss_on() -> None:
    task = adapted(Click(), name="tags")
    outputs, labels = torch.zeros(2, 5), torch.ones(2, 5)
    task.loss_sums(outputs, batch({"label": labels}, 2))
    assert task.targets_per_row == 5
    assert task.weight_sum(batch({"label": labels}, 2)) == 10
    with pytest.raises(ConfigError, match=r"has 4 values a row, and had 5 before.*add a method weights\(self, batch\)"):
        task.loss_sums(outputs[:, :4], batch({"label": labels[:, :4]}, 2))


def test_other_terms_are_told_beside_the_one_that_is_trained_on() -> None:
    class Two(Masked):
        def loss(self, outputs: Tensor, batch: Any) -> Any:
            click = super().loss(outputs, batch)
            return {"click": click, "loss": click + outputs.square(), "size": outputs.square()}

    task = adapted(Two(), name="two")
    sums = task.loss_sums(OUTPUTS, batch(DATA, 3))
    assert list(sums) == list(task.terms) == ["loss", "click", "size"]
    torch.testing.assert_close(sums["size"], (OUTPUTS.square() * DATA["weight"]).sum())
    scores = Scores(task, device=CPU)
    scores.update(OUTPUTS, batch(DATA, 3))
    found = scores.compute(ALONE)
    assert list(found) == ["val/loss", "val/click", "val/size"]
    assert found["val/size"] == pytest.approx((OUTPUTS.square() * DATA["weight"]).sum().item() / 3)
    assert found["val/loss"] == pytest.approx(found["val/click"] + found["val/size"])


def returning(value: Any) -> Any:
    class Returns:
        def loss(self, outputs: Any, batch: Any) -> Any:
            return value

    return Returns()


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (torch.tensor(0.5), r"its loss is one number, shape \(\); return one value a target .* reduction=\"none\""),
        (torch.zeros(4), r"its loss has shape \(4,\) for 3 rows; its first dimension is the rows"),
        (torch.zeros(3, dtype=torch.int64), "its loss is torch.int64; a tensor of floats is wanted"),
        (0.5, "its loss is float; a tensor of floats is wanted"),
        (None, "its loss is NoneType"),
        ({"click": torch.zeros(3)}, "a dict with click; the term `loss`, which is trained on, is missing"),
        (
            {"loss": torch.zeros(3), "size": torch.zeros(3, 2)},
            r"the term size .* has shape \(3, 2\), `loss` has \(3,\)",
        ),
        ({"loss": torch.zeros(3), "grad_norm": torch.zeros(3)}, "the term 'grad_norm', which no column"),
        ({"loss": torch.zeros(3), "data_wait_fraction": torch.zeros(3)}, "which no column"),
        ({"loss": torch.zeros(3), "a b": torch.zeros(3)}, "which no column"),
    ],
)
def test_what_is_no_loss_of_targets_is_refused_with_what_to_return(value: Any, said: str) -> None:
    with pytest.raises(ConfigError, match=f"task odd: .*{said}"):
        adapted(returning(value), name="odd").loss_sums(OUTPUTS, batch(DATA, 3))


def test_terms_that_come_and_go_are_refused() -> None:
    class Moody(Click):
        calls = 0

        def loss(self, outputs: Tensor, batch: Any) -> Any:
            self.calls += 1
            return {"loss": outputs} | ({"late": outputs} if self.calls > 1 else {})

    task = adapted(Moody(), name="moody")
    task.loss_sums(OUTPUTS, batch(DATA, 3))
    with pytest.raises(ConfigError, match="returned the terms loss, late, and loss before"):
        task.loss_sums(OUTPUTS, batch(DATA, 3))


@pytest.mark.parametrize(
    ("weights", "said"),
    [
        (torch.ones(2), r"weights have shape \(2,\), the loss has \(3,\)"),
        (1.0, "weights returned float; a tensor of the shape of the loss is wanted"),
    ],
)
def test_weights_are_one_a_target(weights: Any, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        adapted(Masked(), name="masked").loss_sums(OUTPUTS, batch({**DATA, "weight": weights}, 3))


def test_a_negative_weight_makes_the_weight_of_the_batch_no_number() -> None:
    task = adapted(Masked(), name="masked")
    weight = task.weight_sum(batch({**DATA, "weight": torch.tensor([1.0, -1.0, 2.0])}, 3))
    assert isinstance(weight, Tensor)
    assert weight.isnan()
    assert float(task.weight_sum(batch({**DATA, "weight": torch.tensor([True, False, True])}, 3))) == 2


def test_a_part_without_a_loss_is_told_the_nearest_name() -> None:
    class Misspelt:
        def losss(self, outputs: Any, batch: Any) -> None: ...

    with pytest.raises(ConfigError, match="has a method losss and no loss; if loss is meant, call it so"):
        adapted(Misspelt(), name="odd")


def test_methods_with_other_arguments_are_refused_with_how_they_are_called() -> None:
    class Short(Click):
        def weights(self) -> None: ...

        def scored(self, outputs: Any) -> None: ...

    class Named(Click):
        weights = 1.0

    class Free(Click):
        def loss(self, *arguments: Any, **other: Any) -> None: ...

    for part, said in (
        (Short(), r"task odd: weights\(\) -> .*None.* cannot be called as weights\(batch\): too many"),
        (Named(), r"task odd: weights is a float; it is called as weights\(batch\)"),
    ):
        with pytest.raises(ConfigError, match=said):
            adapted(part, name="odd")
    adapted(Free(), name="free")


@pytest.mark.parametrize("step", ["training_step", "configure_optimizers", "closure"])
def test_a_part_that_makes_its_steps_itself_is_refused_with_the_reason(step: str) -> None:
    gan = type("Gan", (Click,), {step: lambda self, *_: None})
    with pytest.raises(ConfigError, match=f"task gan: has {step}, but an update is one step of one optimizer"):
        adapted(gan(), name="gan")
    network = type("Network", (nn.Linear,), {step: lambda self, *_: None})
    with pytest.raises(ConfigError, match=f"model: Network has {step}, but an update is one step"):
        check_steps(network(1, 1))


def test_groups_of_parameters_are_known_by_name() -> None:
    class Grouped(Click):
        groups: ClassVar[Any] = {"weight": {"lr_factor": 0.1}}

        def parameter_groups(self, network: nn.Module) -> Any:
            return self.groups

    part = Grouped()
    task = adapted(part, name="grouped")
    network = nn.Linear(2, 1)
    assert task.parameter_groups(network) == {"weight": {"lr_factor": 0.1}}
    for groups, said in (
        ({"wieght": {"lr_factor": 0.1}}, "names wieght, which the network has not .nearest: weight"),
        ({"weight": {"lr": 0.1}}, "sets lr of weight; lr_factor and weight_decay can be set"),
    ):
        part.groups = groups
        with pytest.raises(ConfigError, match=said):
            task.parameter_groups(network)


class Hits:
    """A metric of a few lines: sums and a quotient."""

    def __init__(self) -> None:
        self.right, self.all = torch.zeros(()), torch.zeros((), dtype=torch.int64)

    def update(self, outputs: Tensor, labels: Tensor) -> None:
        self.right += ((outputs > 0) == labels.bool()).sum()
        self.all += len(labels)

    def compute(self) -> Tensor:
        return self.right / self.all


class Scored(Click):
    made: ClassVar[Any] = {"hits": Hits, "accuracy": BinaryAccuracy}

    def metrics(self) -> Any:
        return {name: metric() for name, metric in self.made.items()}

    def scored(self, outputs: Tensor, batch: Any) -> Any:
        return outputs, batch["label"]


def test_metrics_of_a_few_lines_and_of_torchmetrics_are_summed_over_ranks() -> None:
    task = adapted(Scored(), name="scored")
    task.loss_sums(OUTPUTS, batch(DATA, 3))  # as the look at the start does
    shares = []
    for part in (slice(0, 2), slice(2, 3)):
        shares.append(Scores(task, device=CPU))
        data = {name: column[part] for name, column in DATA.items()}
        shares[-1].update(OUTPUTS[part], batch(data, len(data["label"])))
    sent: list[Tensor] = []
    shares[1].compute(lambda vector: (sent.append(vector), vector.unsqueeze(0))[1])
    found = shares[0].compute(lambda vector: torch.stack([vector, sent.pop(0)]))
    assert found["val/hits"] == found["val/accuracy"] == pytest.approx(1 / 3)


@pytest.mark.parametrize(
    ("metric", "said"),
    [
        (object(), "object has no method update"),
        (MetricCollection([MeanMetric()]), "a MetricCollection is several metrics"),
    ],
)
def test_what_is_no_metric_is_refused_by_name(metric: Any, said: str) -> None:
    with pytest.raises(ConfigError, match=f"metric odd: {said}"):
        check_metric("odd", metric)


def test_a_metric_whose_states_are_no_sums_is_refused() -> None:
    class Largest(BinaryAccuracy):
        def __init__(self) -> None:
            super().__init__()
            self.add_state("largest", torch.zeros(()), dist_reduce_fx="max")

    with pytest.raises(ConfigError, match="the state largest of Largest is reduced over ranks by dim_zero_max"):
        check_metric("top", Largest())
    check_metric("mean", MeanMetric())


def test_a_score_is_a_number() -> None:
    class Odd(Hits):
        def compute(self) -> Any:
            return {"a": 1}

    task = adapted(type("Task", (Scored,), {"made": {"odd": Odd}})(), name="scored")
    task.loss_sums(OUTPUTS, batch(DATA, 3))
    scores = Scores(task, device=CPU)
    scores.update(OUTPUTS, batch(DATA, 3))
    with pytest.raises(ConfigError, match="metric odd: compute returned dict; a number or a tensor is wanted"):
        scores.compute(ALONE)


@pytest.mark.parametrize("kind", ["classes", "weighted classes", "numbers", "tokens"])
def test_the_losses_of_the_rows_of_a_batch_add_up_to_its_loss(kind: str) -> None:
    torch.manual_seed(0)
    labels = torch.tensor([0, 2, 1, 2])
    section = ClassificationTask(kind="classification", num_classes=3, label_smoothing=0.1)
    of_kind: dict[str, tuple[TaskLoss, Tensor, Tensor]] = {
        "classes": (Classification(section, class_weights=None), torch.randn(4, 3), labels),
        "weighted classes": (
            Classification(section, class_weights=torch.tensor([1.0, 2.0, 3.0])),
            torch.randn(4, 3),
            labels,
        ),
        "numbers": (Regression(2), torch.randn(4, 2), torch.randn(4, 2)),
        "tokens": (CausalLm(5, torch.ones(7), decode=bytes), torch.randn(4, 5, 7), torch.randint(7, (4, 5))),
    }
    task, outputs, targets = of_kind[kind]
    rows = pair(outputs, targets)
    each = task.row_losses(outputs, rows)
    assert each.shape == (4,)
    torch.testing.assert_close(each.sum(), task.loss_sums(outputs, rows)["loss"])
    torch.testing.assert_close(each[1:2], task.row_losses(outputs[1:2], pair(outputs[1:2], targets[1:2])))
