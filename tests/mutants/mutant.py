"""A mistake that a person could make in one place of the product."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Mutant:
    """One such mistake. None is listed that nobody could notice."""

    name: str
    """What is wrong with the product then, as a sentence."""
    path: str
    old: str
    """Of the file at `path`, where it stands once."""
    new: str
    tests: tuple[str, ...]
    """What should see it, the nearest and cheapest first: files in tests/, or `FILE::TEST` where a file has many."""

    @property
    def files(self) -> list[str]:
        """Files of `tests`, in which any other test may see it as well."""
        return list(dict.fromkeys(test.partition("::")[0] for test in self.tests))

    def put_into(self, folder: Path) -> None:
        """Make the mistake in the checkout that lies in `folder`."""
        path = folder / self.path
        path.write_text(self.mutated(path.read_text()))

    def mutated(self, text: str) -> str:
        """Return the text of the file with the mistake.

        Raises:
            ValueError: it is not the file that the mistake was written for.
        """
        count = text.count(self.old)
        if count != 1:
            raise ValueError(f"{self.name}: {self.path} has the text {count} times, wanted once: {self.old!r}")
        return text.replace(self.old, self.new)
