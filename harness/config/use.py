"""What `use:` names: files of a person, and installed packages, whose code registers kinds of parts.

A file is imported as the module that its name says, and its folder is the last place where modules are looked for, as
the folder of a script is the first: so it may import what lies beside it, and any process that gets `sys.path` from
this one can import it as well. One configuration's files are loaded at a time.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import keyword
import os
import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.machinery import PathFinder
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path

from harness.config.problems import nearest_name
from harness.errors import ConfigError
from harness.parts import coming_from, forget, mark_used, modules_registered, number_registered

GROUP = "harness.parts"
"""The entry points of installed packages."""
STORED_USE = (
    "use: {path} lies in a run directory, whose `use` is not followed: it may be somebody else's. Start the "
    "configuration that the run was started with, or say yourself which code it may bring: 'use={use}'"
)
GUARD = 'guard what starts a training with `if __name__ == "__main__":`'


@dataclass(frozen=True)
class UsedFile:
    """A file whose code a configuration brings."""

    file: str
    """Its absolute path."""
    sha256: str

    def to_json(self) -> dict[str, str]:
        """Return what run.json has of it."""
        return {"file": self.file, "sha256": self.sha256}


@dataclass(frozen=True)
class Used:
    """What a configuration brings."""

    files: tuple[UsedFile, ...] = ()
    """Each file that is named, and those from its folder that it imports."""
    modules: frozenset[str] = frozenset()
    """Their names, as they registered parts."""
    names: tuple[str, ...] = ()
    """What was asked for, files by their absolute paths: what another process is to be given."""


NOTHING_USED = Used()


@dataclass(frozen=True)
class _Loaded:
    """A file that was imported in this process."""

    path: Path
    files: tuple[UsedFile, ...]
    modules: frozenset[str]


class _Loader:
    """What this process has imported for `use`."""

    def __init__(self) -> None:
        self.files: dict[Path, _Loaded] = {}
        self.packages: dict[str, Used] = {}
        self.now: str | None = None
        """What is being imported."""

    def file(self, name: str, path: Path) -> Used:
        known = self.files.get(path)
        if known and all(Path(file.file).exists() and _digest(Path(file.file)) == file.sha256 for file in known.files):
            return Used(known.files, known.modules)
        self.drop([path])
        if (there := _imported(path)) is not None:  # by the script that trains, or because it is that script
            return Used((UsedFile(str(path), _digest(path)),), frozenset({there}))
        module, folder = path.stem, str(path.parent)
        _check_module_name(name, path)
        count, before = number_registered(), set(sys.modules)
        if folder not in sys.path:
            sys.path.append(folder)
        importlib.invalidate_caches()
        with self._importing(name, folder), coming_from(None):
            importlib.import_module(module)
        own = [found for found in set(sys.modules) - before if _lies_in(found, folder)]
        modules = modules_registered(count)
        paths = sorted({Path(str(sys.modules[found].__file__)) for found in own} - {path})
        files = tuple(UsedFile(str(file), _digest(file)) for file in (path, *paths))
        self.files[path] = _Loaded(path, files, frozenset(own) | modules)
        mark_used(modules)
        return Used(files, frozenset(modules))

    def package(self, name: str, found: EntryPoint) -> Used:
        if name in self.packages:
            return self.packages[name]
        distribution = f"{found.dist.name} {found.dist.version}" if found.dist else "an unknown distribution"
        count = number_registered()
        with self._importing(name, None), coming_from(f"entry point {name} of distribution {distribution}"):
            importlib.import_module(found.module)
            found.load()
        modules = modules_registered(count)
        file = Path(str(sys.modules[found.module].__file__))
        mark_used(modules)
        self.packages[name] = Used((UsedFile(str(file), _digest(file)),), frozenset(modules))
        return self.packages[name]

    def drop(self, paths: Sequence[Path]) -> None:
        for path in paths:
            if known := self.files.pop(path, None):
                self._undo(known.modules, known.modules)
                folder = str(path.parent)
                if folder in sys.path and not any(other.parent == path.parent for other in self.files):
                    sys.path.remove(folder)

    def _undo(self, names: Sequence[str] | frozenset[str], registered: set[str] | frozenset[str]) -> None:
        for module in names:
            sys.modules.pop(module, None)
        forget(registered)

    @contextmanager
    def _importing(self, name: str, folder: str | None) -> Iterator[None]:
        """Import what is named inside; whatever keeps it from that is a ConfigError with the line.

        Bytecode is not written: nothing is left in a person's folder, and none is stale.
        """
        before, count, known = set(sys.modules), number_registered(), sys.dont_write_bytecode
        was_open = _has_process_group()
        self.now, sys.dont_write_bytecode = name, True
        try:
            yield
            if _has_process_group() and not was_open:
                raise ConfigError(f"use: {name} starts torch.distributed when it is imported; {GUARD}")
            if not modules_registered(count):
                raise ConfigError(
                    f'{name} registers no part; put @harness.model("NAME"), @harness.data, @harness.task or '
                    "@harness.tracker over a class of it"
                )
        except BaseException as error:
            new = [found for found in set(sys.modules) - before if folder is None or _lies_in(found, folder)]
            self._undo(new if folder else [], modules_registered(count))
            if folder in sys.path and not any(str(path.parent) == folder for path in self.files):
                sys.path.remove(folder)
            if isinstance(error, Exception | SystemExit):
                raise ConfigError(f"use: {_failure(name, error, folder)}") from error
            raise
        finally:
            self.now, sys.dont_write_bytecode = None, known


_LOADER = _Loader()


def load_used(names: Sequence[str], *, folder: Path, is_typed: bool = False) -> Used:
    """Import what `use` names.

    Args:
        folder: of the configuration.
        is_typed: whether they were typed on a command line, so that a file may be anywhere.
    Raises:
        ConfigError: one cannot be found or imported, or registers no part.
    """
    resolved = {name: _found(name, folder, is_typed=is_typed) for name in dict.fromkeys(names)}
    paths = [found for found in resolved.values() if isinstance(found, Path)]
    if resolved:
        _LOADER.drop([path for path in _LOADER.files if path not in paths])
        _check_apart(paths)
    found = [
        _LOADER.file(name, path) if isinstance(path, Path) else _LOADER.package(name, path)
        for name, path in resolved.items()
    ]
    files = tuple(dict.fromkeys(file for used in found for file in used.files))
    asked = tuple(str(path) if isinstance(path, Path) else name for name, path in resolved.items())
    return Used(files, frozenset().union(*(used.modules for used in found)), asked)


def unload() -> None:
    """Take back every file that was loaded, as if this process had not heard of it."""
    _LOADER.drop(list(_LOADER.files))


def refuse_while_loading(what: str) -> None:
    """Refuse to train where a file is only imported for what it registers.

    Raises:
        ConfigError: that is the case.
    """
    if _LOADER.now is not None:
        raise ConfigError(f"{_LOADER.now} calls {what} when it is imported; {GUARD}")


def _found(name: str, folder: Path, *, is_typed: bool) -> Path | EntryPoint:
    """Return the file, or the package, that a name stands for."""
    path = Path(name)
    if path.suffix != ".py" and len(path.parts) == 1:
        return _package(name, folder)
    if not is_typed and (path.is_absolute() or ".." in path.parts):
        raise ConfigError(
            f"use: {name} leads out of the configuration's folder; put the file into it, or start where it lies and "
            f"write use: [{path.name}], or name it on the command line: 'use=[{name}]'"
        )
    folders = [Path.cwd()] if is_typed else [folder, Path.cwd()]
    there = list(dict.fromkeys((place / path).resolve() for place in folders if (place / path).is_file()))
    if len(there) > 1:
        raise ConfigError(f"use: {name} is there twice, {there[0]} and {there[1]}; remove or rename one of them")
    if not there:
        places = [(place / path).parent for place in folders]
        nearest = nearest_name(path.name, [file.name for place in places for file in place.glob("*.py")])
        where = " nor ".join(dict.fromkeys(str(place) for place in folders))
        hint = f" (nearest: {path.with_name(nearest)})" if nearest else ""
        raise ConfigError(f"use: there is no file {name} in {where}{hint}")
    return there[0]


def _package(name: str, folder: Path) -> EntryPoint:
    known = entry_points(group=GROUP)
    found = list({entry.value: entry for entry in known if entry.name == name}.values())
    if len(found) == 1:
        return found[0]
    if found:
        packages = " and ".join(entry.dist.name if entry.dist else entry.value for entry in found)
        raise ConfigError(f"use: {name} is an entry point of {packages}; uninstall one of them")
    files = {file.name for place in (folder, Path.cwd()) for file in place.glob("*.py")}
    nearest = nearest_name(name, {entry.name for entry in known}) or nearest_name(f"{name}.py", files)
    hint = f" (nearest: {nearest})" if nearest else ""
    raise ConfigError(
        f"use: no installed package has an entry point {name!r} in the group {GROUP}{hint}; a file of yours ends with "
        ".py"
    )


def _check_module_name(name: str, path: Path) -> None:
    """Refuse a file whose name would import something else."""
    module = path.stem
    if not module.isidentifier() or keyword.iskeyword(module):
        good = "".join(letter if letter.isalnum() else "_" for letter in module)
        raise ConfigError(f"use: {name} cannot be imported by its name; call it {good}.py")
    known = sys.modules.get(module)
    if known is not None:
        other = getattr(known, "__file__", None) or "built into Python"
    else:
        importlib.invalidate_caches()
        spec = None if module in sys.builtin_module_names else PathFinder.find_spec(module)
        other = (spec.origin or module) if spec else None
        if module in sys.builtin_module_names:
            other = "built into Python"
    if other is not None and not (os.path.exists(other) and os.path.samefile(other, path)):
        raise ConfigError(f"use: {name} has the name of another module, {other}; rename the file")


def _imported(path: Path) -> str | None:
    """Return the name of the module that a file is already, if it has registered something."""
    for name in (path.stem, "__main__"):
        file = getattr(sys.modules.get(name), "__file__", None)
        if file and os.path.exists(file) and os.path.samefile(file, path) and name in modules_registered(0):
            return name
    return None


def _check_apart(paths: Sequence[Path]) -> None:
    """Refuse two files whose folders have modules of one name, of which one would stand for both."""
    folders = list(dict.fromkeys(path.parent for path in paths))
    for path in paths:
        for other in folders:
            if other != path.parent and (other / path.name).exists():
                raise ConfigError(f"use: {path} and {other / path.name} have one name; rename one of them")


def _failure(name: str, error: BaseException, folder: str | None) -> str:
    """Return what kept a file from being imported, with the line."""
    if isinstance(error, ConfigError):
        return error.args[0].removeprefix("use: ") if error.args else str(error)
    if isinstance(error, SyntaxError):
        line = f": {error.text.strip()}" if error.text else ""
        return f"{Path(error.filename or name).name} line {error.lineno}: {error.msg}{line}"
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if folder and frame.filename.startswith(f"{folder}{os.sep}")] or frames
    place = f"{Path(own[-1].filename).name} line {own[-1].lineno}"
    if isinstance(error, SystemExit):
        return f"{place} ends the program when it is imported; {GUARD}"
    if isinstance(error, ModuleNotFoundError) and error.name:
        return f"{place} imports {error.name!r}, which is not installed here; pip install what it belongs to"
    message = " ".join(str(error).split())
    return f"{place} raised {type(error).__name__}{f': {message}' if message else ''}"


def _has_process_group() -> bool:
    module = sys.modules.get("torch.distributed")
    return module is not None and module.is_available() and bool(module.is_initialized())


def _lies_in(module: str, folder: str) -> bool:
    """Whether a module was found in a folder itself, and not in one of the places below it, such as a .venv."""
    file = getattr(sys.modules.get(module), "__file__", None)
    if not file or module.partition(".")[0] == "harness":
        return False
    places = [place for place in sys.path if place and file.startswith(place.rstrip(os.sep) + os.sep)]
    return max(places, key=len, default="") == folder


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
