"""The nodes of a job add up numbers before their ranks start, so that one that hangs or cannot be reached has a name.

`python -m harness.ranks.roll_call ME ADDRESS SECONDS NODE...` on each of the nodes, of which the first keeps the
store at ADDRESS (host:port). It judges the others; should it stay silent itself, they judge it. Prints `NODE: reason`.
"""

import sys
import time
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

NUM_ADDED = 2**18
"""Numbers of the sum: a megabyte, which a network that only carries greetings loses."""
SILENCE_SECONDS = 30.0
"""How long after its own time the first node may still name the others."""


def roll_call(me: str, nodes: Sequence[str], *, host: str, port: int, seconds: float) -> dict[str, str]:
    """Return what is wrong with which node, as far as this one is to say it. Collective over nodes.

    Args:
        seconds: from now until every node must be here, and again for the sum.
    Raises:
        RuntimeError: all nodes are here, and cannot add up.
    """
    first, patience = nodes[0], seconds if me == nodes[0] else seconds + SILENCE_SECONDS
    try:
        store = dist.TCPStore(  # type: ignore[attr-defined]
            host, port, is_master=me == first, timeout=_time(patience), wait_for_workers=False
        )
        store.set(f"here/{me}", "")
        if me == first:
            late = _late(store, [f"here/{node}" for node in nodes], seconds=seconds)
            if late:
                return {key.removeprefix("here/"): f"did not answer {first} in {seconds:g} s" for key in late}
            store.set("all here", "")
        store.wait(["all here"], _time(patience))
    except dist.DistError as error:
        reason = str(error).partition("\n")[0]
        return {first: f"did not answer {me} in {patience:g} s ({reason})" if me != first else reason}
    problem = ""
    try:
        _add_up(store, nodes.index(me), len(nodes), seconds=seconds)
    except RuntimeError as error:  # perhaps of another node, which is then the only one that says nothing
        problem = str(error)
    store.set(f"done/{me}", "")
    late = _late(store, [f"done/{node}" for node in nodes], seconds=seconds) if me == first else []
    if problem and not late:
        raise RuntimeError(problem)
    return {key.removeprefix("done/"): "hung in a sum over all nodes" for key in late}


def _add_up(store: Any, rank: int, world_size: int, *, seconds: float) -> None:
    on_gpu = torch.cuda.is_available()
    dist.init_process_group(
        "nccl" if on_gpu else "gloo", store=store, rank=rank, world_size=world_size, timeout=_time(seconds)
    )
    numbers = torch.full((NUM_ADDED,), rank + 1.0, device="cuda" if on_gpu else "cpu")
    dist.all_reduce(numbers, async_op=True).wait(_time(seconds))
    wanted = world_size * (world_size + 1) / 2
    if not (numbers == wanted).all():
        raise RuntimeError(f"the sum over {world_size} nodes is {numbers.min():g} to {numbers.max():g}, not {wanted:g}")
    dist.destroy_process_group()


def _late(store: Any, keys: Sequence[str], *, seconds: float) -> list[str]:
    """Return the keys that nobody sets in this time."""
    give_up, waiting = time.monotonic() + seconds, list(keys)
    while waiting := [key for key in waiting if not store.check([key])]:
        if time.monotonic() > give_up:
            break
        time.sleep(0.02)
    return waiting


def _time(seconds: float) -> timedelta:
    return timedelta(seconds=seconds)


def main() -> int:
    """Print a line for each bad node; return 0 only if every node is well."""
    me, address, seconds, *nodes = sys.argv[1:]
    host, _, port = address.rpartition(":")
    try:
        bad = roll_call(me, nodes, host=host, port=int(port), seconds=float(seconds))
    except RuntimeError as error:
        print(f"{me} reaches {nodes[0]}, but the nodes cannot add up numbers: {error}", file=sys.stderr, flush=True)
        return 1
    for node, reason in bad.items():
        print(f"{node}: {reason}", flush=True)
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
