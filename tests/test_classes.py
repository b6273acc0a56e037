"""A class without rows is told, and no run is judged by the score of one."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import pytest
import torch

from harness.catalogue.classification.classes import check_judges, class_notices, scored_class
from harness.catalogue.classification.section import ClassificationTask
from harness.catalogue.classification.task import Classification
from harness.catalogue.images.section import ImageFolderData
from harness.catalogue.table.section import TableData
from harness.config.io import load_config
from harness.config.run_config import RunConfig
from harness.errors import DataError
from harness.rows.rows import Columns
from harness.scores import Scores
from tests.helpers import write_config
from tests.pairs import pair
from tests.sections import load


def judge(run: RunConfig, validation: Columns, names: list[str] | None) -> None:
    """As a run is judged by its task before it starts."""
    assert isinstance(run.task, ClassificationTask)
    check_judges(run.task, run, validation, names)


def of(labels: list[int]) -> Columns:
    return Columns(torch.zeros(len(labels), 1), torch.tensor(labels))


def task(num_classes: int, **settings: Any) -> ClassificationTask:
    return ClassificationTask(kind="classification", num_classes=num_classes, **settings)


def test_classes_without_training_or_validation_rows_are_named() -> None:
    assert class_notices(of([0, 1, 2]), of([0, 1, 2]), task(3), None) == []
    learned, judged = class_notices(of([0, 2]), of([0, 1]), task(3), ["a", "b", "c"])
    assert learned.startswith("no training row is of class 'b', so nothing is learned of it")
    assert judged.startswith("no validation row is of class 'c', so the scores say nothing of it")
    learned, judged = class_notices(of([0, 0]), of([1]), task(2), None)
    assert learned.startswith("no training row is of class 1, so")
    assert judged.startswith("no validation row is of class 0, so")
    (judged,) = class_notices(of(list(range(9))), of([0]), task(9), None)
    assert judged.startswith("no validation row is of class 1, 2, 3, 4, 5 or 3 more, so")


def test_rows_that_are_all_of_one_class_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_text("a,y\n" + "1,1\n" * 8)
    data = TableData(source="csv", path=str(path), targets=("y",), global_batch=2)
    with pytest.raises(DataError, match=r"all 8 rows are of class 1, so there is nothing to tell apart"):
        load(data, task(3), seed=0)
    path.write_text("a,y\n" + "1,1\n" * 8 + "1,0\n")
    learned, judged = load(data, task(3), seed=0).notices
    assert learned.startswith("no training row is of class 2")
    assert judged.startswith("no validation row is of class 0 or 2")


def test_images_have_their_notices_too(tmp_path: Path) -> None:
    from PIL import Image

    for name, count in (("cat", 8), ("dog", 1)):
        (tmp_path / name).mkdir()
        for number in range(count):
            Image.new("L", (2, 2)).save(tmp_path / name / f"{number}.png")
    data = ImageFolderData(source="imagefolder", path=str(tmp_path), global_batch=2)
    (notice,) = load(data, task(2, positive_class=1), seed=0).notices
    assert notice.startswith("no validation row is of class 'dog'")


def test_which_of_two_named_classes_the_scores_are_of_is_told_where_nobody_chose_it() -> None:
    rows = of([0, 1])
    (notice,) = class_notices(rows, rows, task(2), ["bad", "good"])
    assert notice.startswith("precision, recall, f1, auc and average_precision are of class 'good', the second by the")
    assert notice.endswith("task.positive_class=bad makes them of 'bad'")
    assert class_notices(rows, rows, task(2, positive_class=1), ["bad", "good"]) == []
    assert class_notices(rows, rows, task(2), None) == []


def test_the_scored_class_is_called_by_its_name_where_classes_have_names() -> None:
    assert scored_class(task(2, positive_class="bad"), ["bad", "good"]) == 0
    assert scored_class(task(3, positive_class="2"), ["1", "2", "10"]) == 1, "a name, though it looks like a number"
    assert scored_class(task(3, positive_class=2), ["1", "2", "10"]) == 2
    with pytest.raises(DataError, match=r"'worst' is no class; use 'bad' or 'good'"):
        class_notices(of([0, 1]), of([0, 1]), task(2, positive_class="worst"), ["bad", "good"])
    with pytest.raises(DataError, match=r"'bad' is a name, and the labels are numbers; use one of 0 to 1"):
        scored_class(task(2, positive_class="bad"), None)


@pytest.mark.parametrize("name", ["bad", "very bad", "1", "null", "it's", "[a]", "a: b"])
def test_the_name_that_the_notice_says_to_type_is_that_class(name: str, tmp_path: Path) -> None:
    (notice,) = class_notices(of([0, 1]), of([0, 1]), task(2), [name, "~"])
    (typed,) = shlex.split(notice.partition("; ")[2].partition(" makes ")[0])
    write_config(tmp_path / "a.yaml", config("val/accuracy", num_classes=2).model_dump(mode="json"))
    found = load_config(tmp_path / "a.yaml", [typed]).config.task
    assert isinstance(found, ClassificationTask)
    assert scored_class(found, [name, "~"]) == 0


@pytest.mark.parametrize(("answers", "only"), [([1, 1, 1], "good"), ([0, 0, 0], "bad"), ([0, 1, 0], None)])
def test_a_network_that_answers_everything_alike_is_told(answers: list[int], only: str | None) -> None:
    classification = Classification(task(2), class_weights=None, classes=["bad", "good"], scored_class=1)
    scores = Scores(classification, device=torch.device("cpu"))
    scores.update(torch.eye(2)[answers], pair(torch.eye(2)[answers], torch.tensor([0, 1, 1])))
    scores.compute(lambda vector: vector[None])
    assert scores.only_answer() == only


def test_where_all_rows_are_of_one_class_it_is_no_fault_to_say_so() -> None:
    scores = Scores(Classification(task(2), class_weights=None), device=torch.device("cpu"))
    scores.update(torch.eye(2)[[1, 1]], pair(torch.eye(2), torch.tensor([1, 1])))
    scores.compute(lambda vector: vector[None])
    assert scores.only_answer() is None


def config(metric: str, *, where: str = "early_stopping", **settings: Any) -> RunConfig:
    judged = {"metric": metric, "mode": "max"}
    judge: dict[str, Any] = {
        "early_stopping": {"early_stopping": judged},
        "schedule": {"schedule": {"kind": "plateau", **judged}},
    }[where]
    return RunConfig.model_validate(
        {
            "run": {"name": "a", "max_epochs": 1},
            "model": {"kind": "mlp", "hidden": []},
            "data": {"source": "csv", "path": "a", "targets": ["y"], "global_batch": 2},
            "task": {"kind": "classification", **settings},
            "optim": {"kind": "sgd", "peak_lr": 0.1},
            **judge,
        }
    )


@pytest.mark.parametrize("where", ["early_stopping", "schedule"])
@pytest.mark.parametrize("name", ["auc", "average_precision", "f1", "precision", "recall"])
def test_no_run_is_judged_by_the_score_of_a_class_that_no_validation_row_is_of(where: str, name: str) -> None:
    judged = config(f"val/{name}", where=where, num_classes=2)
    with pytest.raises(DataError, match=rf"{where}\.metric: val/{name} is about class 'yes', but of the 3 .* none is"):
        judge(judged, of([0, 0, 0]), ["no", "yes"])
    judge(judged, of([0, 0, 1]), ["no", "yes"])


def test_ranking_wants_rows_of_other_classes_too() -> None:
    for name, is_refused in (("auc", True), ("average_precision", True), ("f1", False)):
        judged = config(f"val/{name}", num_classes=3, positive_class=2)
        if is_refused:
            with pytest.raises(DataError, match=r"class 2, but of the 2 validation rows every one is of it"):
                judge(judged, of([2, 2]), None)
        else:
            judge(judged, of([2, 2]), None)


def test_scores_of_all_classes_judge_whatever_is_missing() -> None:
    of_one_class = of([0, 0, 0])
    for metric in ("val/loss", "val/accuracy", "val/macro_f1"):
        judge(config(metric, num_classes=2), of_one_class, None)
        judge(config(metric, num_classes=3), of_one_class, None)
    with pytest.raises(DataError, match="val/f1 is about class 1"):
        judge(config("val/f1", num_classes=2), of_one_class, None)
