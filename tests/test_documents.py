"""Running text comes from files of text: the same documents whatever they stand in, and what is no text is refused."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import os
import pickle
import shutil
import sqlite3
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.feather
import pyarrow.parquet
import pytest
import safetensors.numpy
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from harness.catalogue.causal_lm.section import CausalLmTask
from harness.catalogue.text import read as text
from harness.catalogue.text.documents import CONTENTS, find_corpus
from harness.catalogue.text.section import ByteTokenizer, TextData
from harness.catalogue.text.tokenizing_memory import free_memory, memory_wanted
from harness.errors import DataError
from harness.rows.cache import Facts, Write
from tests.sections import look, prepare
from tests.test_text import splits_of, text_data, write_texts

CHARACTERS = st.characters(exclude_categories=["Cs"])
PROSE = b"The cat sat on the mat and ate. " * 40
STRINGS = {"": pyarrow.string(), "-large": pyarrow.large_string(), "-view": pyarrow.string_view()}


@settings(deadline=None, max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(documents=st.lists(st.text(CHARACTERS, min_size=1, max_size=30), min_size=8, max_size=16))
def test_the_same_documents_give_the_same_tokens_whatever_files_they_stand_in(
    tmp_path: Path, documents: list[str]
) -> None:
    shutil.rmtree(tmp_path / "d", ignore_errors=True)
    folder = tmp_path / "d"
    folder.mkdir()
    patterns = {"txt": write_texts(folder, documents), "jsonl": str(folder / "rows.jsonl")}
    lines = [json.dumps({"id": place, "text": one}, ensure_ascii=place % 2 == 0) for place, one in enumerate(documents)]
    Path(patterns["jsonl"]).write_bytes("\n\n".join(lines).encode())
    for name, kind in {**STRINGS, "-dictionary": pyarrow.dictionary(pyarrow.int32(), pyarrow.string())}.items():
        patterns[name] = str(folder / f"rows{name}.parquet")
        pyarrow.parquet.write_table(pyarrow.table({"text": pyarrow.array(documents, kind)}), patterns[name])
    for name in ("jsonl", "-view"):
        patterns[f"{name}, in capitals"] = str(
            Path(patterns[name]).with_name("ROWS").with_suffix(Path(patterns[name]).suffix.upper())
        )
        shutil.copy(patterns[name], patterns[f"{name}, in capitals"])
    found = [splits_of(text_data(pattern)) for pattern in patterns.values()]
    assert len({(splits.train.digest(), splits.validation.digest()) for splits in found}) == 1


def image(kind: str) -> Callable[[Path], object]:
    return lambda path: Image.new("RGB", (9, 9), "red").save(path, kind)


def array() -> bytes:
    content = io.BytesIO()
    np.save(content, np.arange(9))
    return content.getvalue()


def tar(path: Path) -> None:
    with tarfile.open(path, "w") as archive:
        archive.addfile(tarfile.TarInfo("a.txt"), io.BytesIO())


def zipped(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a.txt", PROSE)


def database(path: Path) -> None:
    with sqlite3.connect(path) as connection:
        connection.execute("create table a (b)")
    connection.close()


TABLE = pyarrow.table({"text": ["a b c"] * 9})
WRITERS: dict[str, Callable[[Path], object]] = {
    "gzip": lambda path: path.write_bytes(gzip.compress(PROSE)),
    "bz2": lambda path: path.write_bytes(bz2.compress(PROSE)),
    "xz": lambda path: path.write_bytes(lzma.compress(PROSE)),
    "zstd": lambda path: path.write_bytes(pyarrow.compress(PROSE, "zstd", asbytes=True)),
    "zip": zipped,
    "tar": tar,
    **{kind: image(kind) for kind in ("PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP")},
    "parquet": lambda path: pyarrow.parquet.write_table(TABLE, path),
    "feather": lambda path: pyarrow.feather.write_feather(TABLE, path),
    "numpy": lambda path: path.write_bytes(array()),
    "torch": lambda path: torch.save({"a": torch.zeros(3)}, path),
    "safetensors": lambda path: safetensors.numpy.save_file({"a": np.zeros(3)}, path),
    "pickle": lambda path: path.write_bytes(pickle.dumps({"a": [1, 2]})),
    "sqlite": database,
    "pdf": lambda path: path.write_bytes(b"%PDF-1.4\n%\xe2\xe3\xcf\xd3\n" + PROSE),
    "utf-16": lambda path: path.write_bytes(PROSE.decode().encode("utf-16")),
    "utf-32": lambda path: path.write_bytes(PROSE.decode().encode("utf-32")),
}


@pytest.mark.parametrize("writer", WRITERS)
def test_what_is_no_text_is_refused_by_its_first_bytes_whatever_it_is_called(tmp_path: Path, writer: str) -> None:
    for name in ("a.txt", "a.jsonl", "a"):
        WRITERS[writer](tmp_path / name)
        with pytest.raises(DataError, match=rf"{name}: is .*, but data\.path wants running text"):
            splits_of(text_data(tmp_path / name, split="tail"))


@pytest.mark.parametrize(("name", "what"), [("a.csv", "columns"), ("a.TSV", "columns"), ("a.json", "records")])
def test_tables_are_refused_by_their_suffix_also_among_others(tmp_path: Path, name: str, what: str) -> None:
    pattern = write_texts(tmp_path).replace("*.txt", "*")
    (tmp_path / name).write_text("text,label\ngood,1\n")
    with pytest.raises(DataError, match=rf"{name}: holds {what}, but data\.path wants running text\. .*\.jsonl"):
        splits_of(text_data(pattern))
    (tmp_path / name).rename(tmp_path / "a.txt")
    assert len(splits_of(text_data(tmp_path / "a.txt", split="tail")).train)


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    start=st.sampled_from([start for place, start, _ in CONTENTS if place == 0 and start.isascii()]),
    prose=st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=40),
)
def test_a_text_may_begin_as_other_files_do(tmp_path: Path, start: bytes, prose: str) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(start.translate(None, bytes(range(32))) + prose.encode() * 20)  # cut within a character too
    assert len(splits_of(text_data(path, split="tail")).train)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"text": "a"', r"line 3 cannot be read as JSON"),
        ('{"text": ""}', r"line 3 has no text 'text', for that is \"\";"),
        ('{"body": "a"}', r"line 3 has no text 'text', but 'body'; set data\.text_column"),
        ('{"text": 7}', r"line 3 has no text 'text', for that is 7; set data\.text_column"),
        ("[1]", r"line 3 has no text 'text', for it is no object"),
        ('{"text": "\\ud800"}', r"line 3 cannot be read as JSON: .*surrogates"),
    ],
)
def test_a_line_that_holds_no_text_is_named(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a b c d e f g h"}\n\n' + line)
    with pytest.raises(DataError, match=message):
        splits_of(text_data(path, split="tail"))


@pytest.mark.parametrize(("file", "said"), [("03.txt", r"03\.txt: changed while"), ("more.txt", "files came or went")])
def test_text_that_changes_while_its_tokens_are_built_leaves_none_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: str, said: str
) -> None:
    pattern, write_tokens = write_texts(tmp_path), text._write_tokens

    def write_slowly(write: Write, data: TextData, *, seed: int) -> Facts:
        facts = write_tokens(write, data, seed=seed)
        (tmp_path / file).write_text("more")
        return facts

    with monkeypatch.context() as patch:
        patch.setattr(text, "_write_tokens", write_slowly)
        with pytest.raises(DataError, match=said):
            splits_of(text_data(pattern))
    assert not list((tmp_path / ".harness-cache").iterdir())
    assert len(splits_of(text_data(pattern)).train)


def test_files_that_train_and_validate_are_told(tmp_path: Path) -> None:
    pattern = write_texts(tmp_path)
    both = splits_of(text_data(pattern, validation_path=str(tmp_path / "0[1-3].txt")))
    assert [notice.split(": ")[1] for notice in both.notices] == [
        "trains and validates; keep it out of data.path or data.validation_path"
    ] * 3
    assert splits_of(text_data(pattern)).notices == ()
    (tmp_path / "copy").mkdir()
    copy = splits_of(text_data(pattern, validation_path=write_texts(tmp_path / "copy")))
    assert "the rows that validate are those that train" in copy.notices[0]


def test_a_document_whose_tokens_cannot_fit_is_refused_before_any_is_made_and_told_by_check(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "large.txt"
    path.write_bytes(PROSE)
    os.truncate(path, 2**40)  # of which the disk has the beginning
    bpe = text_data(path, split="tail", tokenizer={"kind": "bpe", "vocab_size": 300})
    monkeypatch.setattr(text, "token_folder", lambda *_, **__: tmp_path / "tokens")  # or all of it is read first
    with pytest.raises(DataError, match=r"large\.txt: is one document of 1,099,511,627,776 bytes, .* want 230,"):
        prepare(bpe, CausalLmTask(kind="causal_lm"), seed=0)
    (told,) = [line for line in look(bpe, CausalLmTask(kind="causal_lm")) if "GB" in line]
    assert told.startswith(f"{path}: is one document, whose tokens want 230,")
    assert memory_wanted([find_corpus(str(path), text_column="text")], ByteTokenizer(kind="byte"))[1] == 2**40


def test_what_is_free_is_the_less_of_machine_and_container(tmp_path: Path) -> None:
    meminfo = tmp_path / "meminfo"
    assert free_memory(meminfo, tmp_path) is None
    meminfo.write_text("MemTotal: 100 kB\nMemAvailable:   50 kB\n")
    assert free_memory(meminfo, tmp_path) == 50 * 1024
    (tmp_path / "memory.current").write_text("1000\n")
    for limit, free in (("max", 50 * 1024), ("3000", 2000), ("1000000", 50 * 1024)):
        (tmp_path / "memory.max").write_text(f"{limit}\n")
        assert free_memory(meminfo, tmp_path) == free


def test_the_memory_that_is_said_is_what_tokens_want() -> None:
    program = """
from pathlib import Path
from harness.catalogue.text.section import BpeTokenizer
from harness.catalogue.text.tokenizers import train_tokenizer
from harness.catalogue.text.tokenizing_memory import BYTES_FOR_A_BYTE
words = [format(number * 7919 % 99991, "x") for number in range(4000)]
document = " ".join(words[number * number % 4000] for number in range(300_000)).encode()
made = train_tokenizer(BpeTokenizer(kind="bpe", vocab_size=300), [document[:20_000].decode()])
def most_kibibytes():  # not getrusage, whose peak may be that of the process that started this one
    return int(Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0])
before = most_kibibytes()
made.encode(document)
print((most_kibibytes() - before) * 1024 / len(document) / BYTES_FOR_A_BYTE)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert 0.4 < float(done.stdout) < 1.6
