"""What is told of an error in a user's code: the line that is theirs to mend."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

import harness
from harness.own_code import told


def module_at(path: Path, text: str) -> ModuleType:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("folder", ["other/lib/python3.11/site-packages", "usr/lib/python3/dist-packages"])
def test_a_package_of_another_environment_is_not_what_a_user_wrote(
    folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    library = module_at(tmp_path / folder / "library.py", "def fails():\n    raise ValueError('no')\n")
    monkeypatch.setitem(sys.modules, "library", library)
    mine = module_at(tmp_path / "mine.py", "import library\n\ndef call():\n    library.fails()\n")
    with pytest.raises(ValueError, match="no") as found:
        mine.call()
    assert told(found.value) == f"ValueError: no ({tmp_path / 'mine.py'}, line 4: library.fails())"


def test_a_folder_that_begins_like_ours_is_a_users() -> None:
    ours = Path(harness.__file__).parent
    code = compile("raise ValueError('no')", f"{ours}_of_mine/parts.py", "exec")
    with pytest.raises(ValueError, match="no") as found:
        exec(code)  # noqa: S102  # a file beside ours that is not written there
    assert told(found.value) == f"ValueError: no ({ours}_of_mine/parts.py, line 1)"


def test_a_message_is_cut_where_it_has_no_end_and_told_as_missing_where_it_raises() -> None:
    class Silent(Exception):
        def __str__(self) -> str:
            raise ValueError("no words")

    assert told(ValueError("x" * 5000)) == f"ValueError: {'x' * 500} ..."
    assert told(Silent()) == "Silent: its message raised ValueError"
