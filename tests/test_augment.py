"""Augmentation: the same pixels for a place in training, whoever computes them, and only small changes."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from harness.catalogue.classification.section import ClassificationTask
from harness.catalogue.images.augment import Augmentation, augment
from harness.catalogue.images.section import Mnist5kData
from harness.errors import DataError
from harness.rows.batches import TrainingBatches
from harness.rows.order import BatchPlan
from harness.rows.rows import Columns
from tests.sections import load

CPU = torch.device("cpu")
IMAGES = torch.rand(40, 2, 5, 7, generator=torch.Generator().manual_seed(0))
BOTH = Augmentation(shift_pixels=2, horizontal_flip=True, seed=3)


def plan(*, world_size: int = 1, micro_batch: int | None = None) -> BatchPlan:
    return BatchPlan(num_rows=40, global_batch=12, world_size=world_size, micro_batch=micro_batch, seed=3)


def global_batch(plan: BatchPlan, position: int, augmentation: Augmentation | None) -> tuple[list[int], torch.Tensor]:
    """Row numbers (as targets) and inputs of all ranks of a position, one rank after another."""
    columns = Columns(IMAGES, torch.arange(40))
    ids, inputs = [], []
    for rank in range(plan.world_size):
        batches = TrainingBatches(columns, plan, rank=rank, device=CPU, dtype=torch.float32, augmentation=augmentation)
        for batch in batches.at(position):
            if not batch.is_padding:
                ids += batch.data["targets"].tolist()
                inputs.append(batch.data["inputs"])
    return ids, torch.cat(inputs)


def by_hand(image: torch.Tensor, down: int, right: int, is_mirrored: int) -> torch.Tensor:
    """One image, one pixel at a time."""
    result = torch.zeros_like(image)
    _, height, width = image.shape
    for row in range(height):
        for column in range(width):
            source_row, source_column = row - down, column - right
            if 0 <= source_row < height and 0 <= source_column < width:
                source_column = width - 1 - source_column if is_mirrored else source_column
                result[:, row, column] = image[:, source_row, source_column]
    return result


def test_images_are_mirrored_then_shifted_and_black_comes_in() -> None:
    draws = BOTH.draw(np.arange(40), epoch=1)
    expected = [by_hand(image, *draw) for image, draw in zip(IMAGES, draws.tolist(), strict=True)]
    assert torch.equal(augment(IMAGES, draws), torch.stack(expected))


def test_every_shift_and_both_sides_occur_equally_often() -> None:
    draws = BOTH.draw(np.arange(50_000), epoch=0)
    for column, values in ((0, range(-2, 3)), (1, range(-2, 3)), (2, range(2))):
        counts = [int((draws[:, column] == value).sum()) for value in values]
        assert sum(counts) == 50_000
        assert min(counts) > 0.95 * 50_000 / len(values)
    joint = draws[:, 0] * 5 + draws[:, 1] + 12
    assert joint.bincount(minlength=25).min() > 0.9 * 50_000 / 25


def test_only_what_was_asked_for_happens() -> None:
    shifted = Augmentation(shift_pixels=3, horizontal_flip=False, seed=0).draw(np.arange(500), epoch=0)
    mirrored = Augmentation(shift_pixels=0, horizontal_flip=True, seed=0).draw(np.arange(500), epoch=0)
    assert not shifted[:, 2].any()
    assert not mirrored[:, :2].any()
    assert 200 < int(mirrored[:, 2].sum()) < 300


@pytest.mark.parametrize(("world_size", "micro_batch"), [(2, None), (4, 1), (8, None)])
def test_the_pixels_of_a_batch_are_the_same_at_any_number_of_ranks(world_size: int, micro_batch: int | None) -> None:
    for position in range(8):  # of two epochs, the last batch of each uneven
        alone = global_batch(plan(), position, BOTH)
        together = global_batch(plan(world_size=world_size, micro_batch=micro_batch), position, BOTH)
        assert together[0] == alone[0]
        assert torch.equal(together[1], alone[1])


def test_a_row_is_changed_in_another_way_in_another_epoch_or_with_another_seed() -> None:
    other_seed = Augmentation(shift_pixels=2, horizontal_flip=True, seed=4)
    draws = [
        BOTH.draw(np.arange(40), epoch=0),
        BOTH.draw(np.arange(40), epoch=1),
        other_seed.draw(np.arange(40), epoch=0),
    ]
    assert not torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])


def test_the_rows_of_a_batch_are_changed_as_is_drawn_for_their_places_and_their_epoch() -> None:
    for position, epoch in ((1, 0), (5, 1)):
        ids, inputs = global_batch(plan(), position, BOTH)
        assert torch.equal(inputs, augment(IMAGES[ids], BOTH.draw(np.arange(12, 24), epoch=epoch)))


def test_without_augmentation_rows_are_as_they_were() -> None:
    ids, inputs = global_batch(plan(), 1, None)
    assert torch.equal(inputs, IMAGES[ids])
    ids, inputs = global_batch(plan(), 1, BOTH)
    assert not torch.equal(inputs, IMAGES[ids])


def test_a_shift_out_of_sight_is_refused() -> None:
    data = Mnist5kData(source="mnist_5k", global_batch=64, augment_shift_pixels=28)
    with pytest.raises(DataError, match="28 can shift all of an image of 28x28 pixels out of sight; use 3 or so"):
        load(data, ClassificationTask(kind="classification", num_classes=10), seed=0)
