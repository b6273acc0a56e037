"""The nodes of a job answer each other before their ranks start, each in a process of its own as on a cluster."""

from __future__ import annotations

import socket
import subprocess
import sys

import pytest

pytestmark = pytest.mark.slow

NODES = ("node1", "node2", "node3")


def call(me: str, port: int, *, seconds: float, patched: str = "") -> subprocess.Popen[str]:
    program = f"""
import sys, time
import torch.distributed as dist
from harness.strategy import roll_call
roll_call.SILENCE_SECONDS = 3.0
{patched}
sys.argv = ["roll_call", {me!r}, "127.0.0.1:{port}", "{seconds}", *{NODES!r}]
sys.exit(roll_call.main())
"""
    command = [sys.executable, "-c", program]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def answers(*calls: subprocess.Popen[str]) -> list[tuple[int, str, str]]:
    said = [process.communicate(timeout=120) for process in calls]
    return [(process.returncode, *words) for process, words in zip(calls, said, strict=True)]


@pytest.fixture
def port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


def test_nodes_that_all_answer_are_well(port: int) -> None:
    assert answers(*(call(node, port, seconds=60) for node in NODES)) == [(0, "", "")] * 3


def test_a_node_that_does_not_answer_is_named_by_the_first_and_by_nobody_else(port: int) -> None:
    first, second = answers(*(call(node, port, seconds=10) for node in NODES[:2]))
    assert first[:2] == (1, "node3: did not answer node1 in 10 s\n")
    assert second[0] == 1
    assert "node3" not in second[1]


def test_a_first_node_that_is_silent_is_named_by_the_others(port: int) -> None:
    for node, (code, said, _) in zip(NODES[1:], answers(*(call(n, port, seconds=5) for n in NODES[1:])), strict=True):
        assert code == 1
        assert said.startswith(f"node1: did not answer {node} in 8 s (")


def test_a_node_that_stops_in_the_sum_is_named(port: int) -> None:
    stuck = call("node3", port, seconds=10, patched="roll_call._add_up = lambda *a, **k: time.sleep(60)")
    first, second = answers(*(call(node, port, seconds=10) for node in NODES[:2]))
    stuck.kill()
    stuck.communicate()
    assert first[:2] == (1, "node3: hung in a sum over all nodes\n")
    assert second[:2] == (1, "")


def test_a_sum_that_comes_out_wrong_is_told_with_its_numbers(port: int) -> None:
    wrong = "roll_call.torch.full = (lambda full: lambda *a, **k: full(*a, **k) + 0.5)(roll_call.torch.full)"
    for code, said, words in answers(*(call(node, port, seconds=60, patched=wrong) for node in NODES)):
        assert (code, said) == (1, "")
        assert "the sum over 3 nodes is 7.5 to 7.5, not 6" in words
