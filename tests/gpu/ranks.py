"""Several ranks of a check, each a fresh process with torchrun's variables, in the process group of the check."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from tests.gpu.worker import break_as_asked, resolve

SECONDS = 250.0


def run_ranks(world_size: int, function: str, *arguments: Any) -> list[Any]:
    """Return what `function` returns on each rank, in order of rank.

    Args:
        function: `module:function`; `arguments` are JSON values, and what it returns torch.load reads without pickle.
    Raises:
        AssertionError: with the last lines of a rank that failed.
    """
    with tempfile.TemporaryDirectory() as name:
        folder, port = Path(name), _free_port()
        logs = [folder / f"rank-{rank}.log" for rank in range(world_size)]
        started = []
        try:
            for rank, log in enumerate(logs):
                variables = {"RANK": rank, "WORLD_SIZE": world_size, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": world_size}
                variables |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
                with log.open("wb") as output:
                    command = [sys.executable, "-m", "tests.gpu.ranks", function, json.dumps(arguments), str(folder)]
                    environment = os.environ | {name: str(value) for name, value in variables.items()}
                    started.append(subprocess.Popen(command, stdout=output, stderr=output, env=environment))
            _wait(started, logs)
        finally:
            for process in started:
                process.kill()
                process.wait()
        return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(world_size)]


def _wait(started: list[subprocess.Popen[bytes]], logs: list[Path]) -> None:
    give_up = time.monotonic() + SECONDS
    while None in (codes := [process.poll() for process in started]):
        if any(codes):
            time.sleep(1.0)  # the others may say more
            break
        assert time.monotonic() < give_up, f"ranks did not end in {SECONDS:g} s: {_told(logs)}"
        time.sleep(0.05)
    codes = [process.poll() for process in started]
    assert not any(codes), f"the ranks ended with {codes}: {_told(logs)}"


def _told(logs: list[Path]) -> str:
    last = []
    for rank, log in enumerate(logs):
        lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
        print(f"--- rank {rank}", *lines[-30:], sep="\n")
        last.append(f"rank {rank}: {lines[-1][:300] if lines else 'nothing'}")
    return "; ".join(last)


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
    return port


def main(arguments: list[str]) -> int:
    """Be one rank."""
    function, values, folder = arguments
    break_as_asked()
    returned = resolve(function)(*json.loads(values))
    torch.save(returned, Path(folder) / f"{os.environ['RANK']}.pt")
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
