"""Ranks that stay for the tests of one file."""

from collections.abc import Iterator

import pytest

from tests.distributed.ranks import dismiss_standing_ranks


@pytest.fixture(scope="module", autouse=True)
def standing_ranks_go_with_their_file() -> Iterator[None]:
    """Processes, and what a test might leave in them, are no other file's."""
    yield
    dismiss_standing_ranks()
