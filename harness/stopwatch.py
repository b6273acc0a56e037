"""What the host spends the time of updates on; one clock reading a lap."""

import time


class Stopwatch:
    """Adds up the seconds between laps, by what they were spent on."""

    def __init__(self) -> None:
        self._seconds: dict[str, float] = {}
        self._began = self._last = time.perf_counter()

    def lap(self, spent_on: str) -> None:
        """Count the time since the last lap to `spent_on`."""
        now = time.perf_counter()
        self._seconds[spent_on] = self._seconds.get(spent_on, 0.0) + now - self._last
        self._last = now

    def fractions(self) -> dict[str, float]:
        """Return the share of each in the time since the last call, and start anew; they add up to 1 with `rest`."""
        self.lap("rest")
        total = max(self._last - self._began, 1e-9)
        fractions = {spent_on: seconds / total for spent_on, seconds in self._seconds.items()}
        self._seconds, self._began = {}, self._last
        return fractions
