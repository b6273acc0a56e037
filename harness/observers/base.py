"""Who is told what happens. Rank zero has observers, the other ranks have none; the loop tells all alike."""

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

from harness.state import FitResult, TrainState
from harness.stopping import Standings

Line = dict[str, Any]
Link = tuple[str, str]
"""What for, and where or what to type."""


class Observer:
    """Hears of a run; every method may be left as it is."""

    def on_update(self, line: Line) -> None:
        """Take note of one attempted update: a line of the ledger."""

    def on_settled(self) -> None:
        """Hear that an interval's updates were all told."""

    def on_evaluation(self, line: Line, standings: Standings) -> None:
        """Hear of one evaluation: a line of the ledger, and which is the best so far."""

    def on_event(self, line: Line) -> None:
        """Hear of anything else: a line of events.jsonl."""

    def on_end(self, result: FitResult) -> None:
        """Hear how the run ended."""

    def links(self) -> list[Link]:
        """Return where this observer shows the run, and what to type to see it there."""
        return []

    def news(self) -> list[Line]:
        """Return events that this observer knows of and has not told yet: what its own threads have found out."""
        return []

    def seal(self) -> int:
        """Close what was heard so far; the ledger returns its length in bytes."""
        return 0

    def sync(self) -> None:
        """Make durable what was sealed, or raise StorageError; called from another thread."""

    def close(self) -> None:
        """Let go of files and of the terminal; also called when the run failed."""


@contextmanager
def own_random_numbers() -> Iterator[None]:
    """Leave python's random numbers of the training alone: libraries that draw, and print, take some for their ids."""
    state = random.getstate()
    try:
        yield
    finally:
        random.setstate(state)


@dataclass(frozen=True)
class Observers:
    """All observers of this rank; none of them can touch the random numbers of the training."""

    members: Sequence[Observer] = ()

    def updated(self, line: Line) -> None:
        """Tell of one attempted update, of which observers only take note until it is settled."""
        for member in self.members:
            member.on_update(line)

    def settled(self) -> None:
        """Tell that an interval is over."""
        self._tell(lambda member: member.on_settled())
        self._pass_news()

    def evaluated(self, state: TrainState, standings: Standings) -> None:
        """Tell of one evaluation."""
        line = {"event": "evaluation", "step": state.step, "metrics": state.metrics}
        self._tell(lambda member: member.on_evaluation(line, standings))

    def happened(self, event: str, **details: Any) -> None:
        """Tell of an event."""
        self._tell(lambda member: member.on_event({"event": event, **details}))

    def ended(self, result: FitResult) -> None:
        """Tell how the run ended."""
        self._tell(lambda member: member.on_end(result))

    def _pass_news(self) -> None:
        for line in [line for member in self.members for line in member.news()]:
            self.happened(**line)

    def _tell(self, hear: Callable[[Observer], None]) -> None:
        if self.members:
            with own_random_numbers():
                for member in self.members:
                    hear(member)

    def links(self) -> list[Link]:
        """Return where the run can be looked at."""
        return [link for member in self.members for link in member.links()]

    def seal(self) -> int:
        """Return the length in bytes that the ledger has once all that was told is in it; 0 on ranks without one."""
        return sum(member.seal() for member in self.members)

    def sync(self) -> None:
        """Make durable what was sealed, or raise StorageError; may be called from another thread."""
        for member in self.members:
            member.sync()

    def close(self) -> None:
        """Let go of files and of the terminal, the last member first, which may have something to say to the others."""
        with ExitStack() as stack:
            for member in self.members:
                stack.callback(self._pass_news)
                stack.callback(member.close)
