"""The first screen of the README, followed to the letter."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

README = (Path(__file__).parents[1] / "README.md").read_text()


def block(language: str, first: str) -> str:
    """The one block of code that begins with a text."""
    blocks = re.findall(r"^```(\w*)\n(.*?)^```$", README, re.DOTALL | re.MULTILINE)
    (found,) = [text for name, text in blocks if name == language and text.startswith(first)]
    return str(found)


@pytest.mark.slow
def test_a_network_of_ones_own_trains_on_two_ranks_by_the_first_screen_of_the_readme(tmp_path: Path) -> None:
    (tmp_path / "my_parts.py").write_text(block("python", "# my_parts.py"))
    (tmp_path / "my_run.yaml").write_text(block("yaml", "# my_run.yaml"))

    def harness(*arguments: str) -> str:
        command = [sys.executable, "-m", "harness.launch.cli", *arguments]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout

    commands = [
        line.split("#")[0].split()[1:] for line in block("", "make setup").splitlines() if "bin/harness" in line
    ]
    assert [words[0] for words in commands] == ["check", "launch", "selftest"]
    checked = harness(*commands[0])
    assert "part       model tower: my_parts.py line " in checked
    said = harness(*commands[1])
    assert "promises: all held" in said
    assert "selftest" in harness("selftest", "--help")  # tests/test_selftest.py runs it
    ledger = [json.loads(line) for line in (tmp_path / "runs/clicks/ledger.jsonl").read_text().splitlines()]
    losses = [line["metrics"]["val/loss"] for line in ledger if line["event"] == "evaluation"]
    assert len(losses) == 5
    assert losses[-1] < losses[0] < 0.4, "who knows nothing has 0.69"
    report = (tmp_path / "runs/clicks/report.html").read_text()
    assert "resume exact" in report
    assert (tmp_path / "runs/clicks/config.yaml").read_text().count("my_parts.py") == 1
