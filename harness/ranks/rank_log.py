"""A rank's own log: where its output goes if whoever launched it named a folder for that."""

import os
import socket
import sys
from datetime import UTC, datetime

from harness.ranks.env import Placement
from harness.record.files import own_file, storage_errors


def redirect_output(place: Placement) -> None:
    """Send what this process prints to the end of its log, which then begins with where the rank runs.

    Raises:
        StorageError: the log cannot be written.
    """
    path = place.log_file
    if path is None:
        return
    with storage_errors("write", path):
        log = own_file(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        os.write(log, f"{header(place)}\n".encode())
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
        os.dup2(log, stream.fileno())
        stream.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    os.close(log)


def header(place: Placement) -> str:
    """Return the first line of a rank's log; a launch that goes on in the same file begins with such a line again."""
    device = f"cuda:{place.local_rank}" if os.path.exists("/dev/nvidiactl") else "cpu"
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    seen = f" of CUDA_VISIBLE_DEVICES={visible}" if visible and device != "cpu" else ""
    time = datetime.now(UTC).isoformat(timespec="seconds")
    return (
        f"{time} host {socket.gethostname()}, rank {place.rank} of {place.world_size}, local rank {place.local_rank}, "
        f"device {device}{seen}, restart {place.restart}, process {os.getpid()}"
    )
