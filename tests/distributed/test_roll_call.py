"""The nodes of a job answer each other before their ranks start, each in a process of its own as on a cluster."""

from __future__ import annotations

import contextlib
import io
import os
import sys
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch

from harness.ranks import roll_call
from tests.distributed.ranks import free_port, run_ranks

pytestmark = pytest.mark.slow

NODES = ("node1", "node2", "node3")
SILENCE_SECONDS = 2.0
Answer = tuple[int, str, str]
"""Exit code, stdout and stderr."""


def answers(*nodes: str, seconds: float = 50, damage: Callable[[str], None] | None = None) -> list[Answer]:
    """What these nodes of a job on all three answer.

    Args:
        damage: is done in each of them first, and given its name.
    """
    return run_ranks(len(nodes), answer, nodes, f"127.0.0.1:{free_port()}", seconds, damage)


def answer(nodes: tuple[str, ...], address: str, seconds: float, damage: Callable[[str], None] | None) -> Answer:
    me = nodes[int(os.environ["RANK"])]
    roll_call.SILENCE_SECONDS = SILENCE_SECONDS
    if damage is not None:
        damage(me)
    sys.argv = ["roll_call", me, address, str(seconds), *NODES]
    said, words, code = io.StringIO(), io.StringIO(), -1
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(words), contextlib.suppress(Stuck):
        code = roll_call.main()
    return code, said.getvalue(), words.getvalue()


def test_nodes_that_all_answer_are_well() -> None:
    assert answers(*NODES) == [(0, "", "")] * 3


def test_a_node_that_does_not_answer_is_named_by_the_first_and_by_nobody_else() -> None:
    first, second = answers(*NODES[:2], seconds=4)
    assert first[:2] == (1, "node3: did not answer node1 in 4 s\n")
    assert second[0] == 1
    assert "node3" not in second[1]


def test_a_first_node_that_is_silent_is_named_by_the_others() -> None:
    for node, (code, said, _) in zip(NODES[1:], answers(*NODES[1:], seconds=2), strict=True):
        assert code == 1
        assert said.startswith(f"node1: did not answer {node} in 4 s (")


class Stuck(BaseException):
    """Of a node that hung until the others had given up."""


def hang_in_the_sum(me: str) -> None:
    def hang(*_: Any, **__: Any) -> None:
        time.sleep(10)  # the first waits 4 s for the sum, and 4 s for this node
        raise Stuck

    if me == "node3":
        roll_call._add_up = hang


def test_a_node_that_stops_in_the_sum_is_named() -> None:
    first, second, _ = answers(*NODES, seconds=4, damage=hang_in_the_sum)
    assert first[:2] == (1, "node3: hung in a sum over all nodes\n")
    assert second[:2] == (1, "")


def add_wrongly(me: str) -> None:
    full = torch.full
    torch.full = lambda *args, **kwargs: full(*args, **kwargs) + 0.5


def test_a_sum_that_comes_out_wrong_is_told_with_its_numbers() -> None:
    for code, said, words in answers(*NODES, damage=add_wrongly):
        assert (code, said) == (1, "")
        assert "the sum over 3 nodes is 7.5 to 7.5, not 6" in words
