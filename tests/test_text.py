"""Running text: every byte in a token, every token in a block once, and one token file for all ranks."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import TypeAdapter

from harness.catalogue.causal_lm.section import CausalLmTask
from harness.catalogue.text.documents import Document, cut_at
from harness.catalogue.text.read import TRAIN, VALIDATION, documents_of, prepare_text, token_folder
from harness.catalogue.text.section import TextData, Tokenizer
from harness.catalogue.text.tokenizers import TextTokenizer, tokenizer_from_json, train_tokenizer
from harness.errors import DataError, StorageError
from harness.rows.batches import Batch, TrainingBatches, ValidationBatches
from harness.rows.order import BatchPlan
from harness.rows.rows import Columns
from harness.rows.splits import DataSplits
from tests.sections import load, prepare
from tests.test_order import unhurried

TASK = CausalLmTask(kind="causal_lm")
TEXTS = [
    "To be, or not to be,\nthat is the question.\n",
    "Whether 'tis nobler in the mind to suffer\n",
    "Ay, ça ira!\n",
] * 4
KINDS = [{"kind": "byte"}, {"kind": "char"}, {"kind": "bpe", "vocab_size": 280}]
PARSER: TypeAdapter[Tokenizer] = TypeAdapter(Tokenizer)


def text_data(path: str | Path, **settings: Any) -> TextData:
    values = {"source": "text", "path": str(path), "block": 4, "global_batch": 2, "validation_fraction": 0.25}
    return TextData.model_validate({**values, **settings})


def write_texts(folder: Path, texts: list[str] = TEXTS) -> str:
    for number, text in enumerate(texts):
        (folder / f"{number:02d}.txt").write_bytes(text.encode())
    return str(folder / "*.txt")


def splits_of(data: TextData, seed: int = 1) -> DataSplits:
    prepare(data, TASK, seed=seed)
    return load(data, TASK, seed=seed)


def tokenizer(kind: dict[str, Any], texts: list[str] = TEXTS) -> TextTokenizer:
    return train_tokenizer(PARSER.validate_python(kind), texts)


def stream_of(columns: Columns) -> list[int]:
    """The tokens that the blocks were cut from, but for those at the end that fill no block."""
    return [*columns.inputs.flatten().tolist(), int(columns.targets[-1, -1])]


# ---------------------------------------------------------------- tokenizers


@unhurried
@given(st.text(st.characters(exclude_categories=["Cs"])), st.sampled_from(KINDS))
def test_any_text_comes_back_from_its_tokens_and_each_of_its_bytes_is_counted_once(
    text: str, kind: dict[str, Any]
) -> None:
    made = TOKENIZERS[kind["kind"]]
    ids = made.encode(text.encode())
    assert made.decode(ids.tolist()) == text.encode()
    assert made.token_bytes()[ids].sum() == len(text.encode())
    assert made.decode([*ids.tolist(), made.num_tokens - 1]) == text.encode(), "the end of a document is no text"


TOKENIZERS = {kind["kind"]: tokenizer(kind) for kind in KINDS}


@pytest.mark.parametrize("kind", KINDS)
def test_a_tokenizer_is_the_same_after_a_round_trip_through_json(kind: dict[str, Any]) -> None:
    made = tokenizer(kind)
    again = tokenizer_from_json(made.to_json())
    text = "The end <|endoftext|> €\n".encode()
    assert again.num_tokens == made.num_tokens
    assert again.encode(text).tolist() == made.encode(text).tolist()
    assert again.token_bytes().tolist() == made.token_bytes().tolist()


def test_a_character_of_the_training_text_is_one_token_and_any_other_its_bytes() -> None:
    made = tokenizer({"kind": "char"}, ["abç"])
    assert made.num_tokens == 3 + 256 + 1
    assert made.encode("çab".encode()).tolist() == [2, 0, 1]
    assert made.encode("€".encode()).tolist() == [3 + byte for byte in "€".encode()]


def test_byte_pairs_are_merged_where_they_are_frequent() -> None:
    made = tokenizer({"kind": "bpe", "vocab_size": 259}, ["the then they", "thing"])
    assert made.num_tokens == 259
    assert sorted(made.token_bytes().tolist()) == [0, *[1] * 256, 2, 3], "th, the; and an end of no byte"
    assert made.encode(b"thethat").size == 1 + 3


def test_more_tokens_than_the_text_has_pairs_for_are_refused_with_the_largest_number() -> None:
    with pytest.raises(DataError, match=r"no more than 258 tokens to give, 300 are wanted; use 258 or less"):
        tokenizer({"kind": "bpe", "vocab_size": 300}, ["ab"])


# ---------------------------------------------------------------- blocks


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("block", [1, 3, 16])
def test_blocks_are_the_documents_end_to_end_with_ends_between_them(
    tmp_path: Path, block: int, kind: dict[str, Any]
) -> None:
    data = text_data(write_texts(tmp_path), block=block, tokenizer=kind)
    splits = splits_of(data)
    assert splits.input_shape == (block,)
    made = splits.tokenizer
    assert made is not None
    assert splits.num_outputs == made.num_tokens
    for columns, validating in ((splits.train, False), (splits.validation, True)):
        end = made.num_tokens - 1
        whole = [end]
        for document in documents_of(data, seed=1, validating=validating):
            whole += [*made.encode(document.content).tolist(), end]
        num_rows = (len(whole) - 1) // block
        assert columns.inputs.shape == columns.targets.shape == (num_rows, block)
        assert stream_of(columns) == whole[: num_rows * block + 1]
        assert columns.targets.flatten()[:-1].tolist() == columns.inputs.flatten()[1:].tolist()


def test_inputs_and_targets_share_the_memory_of_the_file_and_are_as_small(tmp_path: Path) -> None:
    train = splits_of(text_data(write_texts(tmp_path))).train
    assert train.inputs.dtype == train.targets.dtype == torch.int16
    assert train.targets.data_ptr() == train.inputs.data_ptr() + 2


@pytest.mark.parametrize("split", ["documents", "tail"])
def test_each_byte_trains_or_validates_and_none_does_both(tmp_path: Path, split: str) -> None:
    data = text_data(write_texts(tmp_path), split=split)
    parts = [[d.content for d in documents_of(data, seed=1, validating=v)] for v in (False, True)]
    everything = "".join(TEXTS).encode()
    assert sorted(b"".join(parts[0] + parts[1])) == sorted(everything)
    if split == "tail":
        assert b"".join(parts[0] + parts[1]) == everything
        assert len(b"".join(parts[1])) == pytest.approx(0.25 * len(everything), abs=4)
    else:
        assert len(parts[1]) == 3
        assert sorted(parts[0] + parts[1]) == sorted(text.encode() for text in TEXTS)


def test_which_documents_validate_follows_from_the_seed(tmp_path: Path) -> None:
    data = text_data(write_texts(tmp_path, [f"text {number}" for number in range(12)]))
    chosen = [[d.content for d in documents_of(data, seed=seed, validating=True)] for seed in (1, 1, 2)]
    assert chosen[0] == chosen[1] != chosen[2]


@unhurried
@given(st.lists(st.text(min_size=1, max_size=5), min_size=1, max_size=4), st.integers(0, 80))
def test_a_cut_keeps_characters_whole_and_the_order_of_the_text(texts: list[str], cut: int) -> None:
    documents = [Document(str(n), text.encode("utf-8", "replace")) for n, text in enumerate(texts)]
    pieces = list(cut_at(iter(documents), cut))
    assert b"".join(piece.content for _, piece in pieces) == b"".join(d.content for d in documents)
    assert [trains for trains, _ in pieces] == sorted([trains for trains, _ in pieces], reverse=True)
    before = sum(len(piece.content) for trains, piece in pieces if trains)
    assert min(cut, sum(len(d.content) for d in documents)) - 3 <= before <= cut
    for _, piece in pieces:
        piece.text()


def test_files_of_their_own_validate(tmp_path: Path) -> None:
    (tmp_path / "other.md").write_text("elsewhere")
    data = text_data(write_texts(tmp_path), validation_path=str(tmp_path / "other.md"))
    assert stream_of(splits_of(data).validation)[:9] == [256, *b"elsewher"]
    assert len(list(documents_of(data, seed=1, validating=False))) == len(TEXTS)


def test_each_row_of_a_parquet_file_is_a_document(tmp_path: Path) -> None:
    table = pyarrow.table({"body": TEXTS, "n": list(range(len(TEXTS)))})
    pyarrow.parquet.write_table(table, tmp_path / "texts.parquet")
    data = text_data(tmp_path / "texts.parquet", text_column="body")
    (tmp_path / "files").mkdir()
    files = text_data(write_texts(tmp_path / "files"))
    for validating in (False, True):
        found, wanted = ([d.content for d in documents_of(d_, seed=1, validating=validating)] for d_ in (data, files))
        assert found == wanted


def test_the_tokenizer_learns_from_the_training_text_only(tmp_path: Path) -> None:
    (tmp_path / "other.md").write_text("ωωω")
    data = text_data(write_texts(tmp_path), validation_path=str(tmp_path / "other.md"), tokenizer={"kind": "char"})
    splits = splits_of(data)
    assert splits.num_outputs == len(set("".join(TEXTS))) + 256 + 1
    assert splits.validation.inputs.min() >= len(set("".join(TEXTS))), "what it has not seen is written in bytes"


# ---------------------------------------------------------------- batches


def test_ids_reach_the_model_as_int64_whatever_the_precision(tmp_path: Path) -> None:
    splits = splits_of(text_data(write_texts(tmp_path)))
    plan = BatchPlan(num_rows=len(splits.train), global_batch=4, world_size=2, micro_batch=None, seed=3)
    seen: list[Batch] = []
    for rank in range(2):
        batches = TrainingBatches(splits.train, plan, rank=rank, device=torch.device("cpu"), dtype=torch.float64)
        seen += [batch for position in range(plan.steps_per_epoch) for batch in batches.at(position)]
    rows = [batch for batch in seen if not batch.is_padding]
    assert (
        {batch.data["inputs"].dtype for batch in rows}
        == {batch.data["targets"].dtype for batch in rows}
        == {torch.int64}
    )
    found = sorted(
        row for batch in rows for row in torch.cat([batch.data["inputs"], batch.data["targets"]], dim=1).tolist()
    )
    wanted = torch.cat([splits.train.inputs, splits.train.targets], dim=1).tolist()
    assert found == sorted(wanted), "an epoch has every block once"


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_every_validation_block_is_visited_once(tmp_path: Path, world_size: int) -> None:
    columns = splits_of(text_data(write_texts(tmp_path))).validation
    rows = []
    for rank in range(world_size):
        batches = ValidationBatches(
            columns, rank=rank, world_size=world_size, batch_rows=4, device=torch.device("cpu"), dtype=torch.float32
        )
        rows += [row for batch in batches if not batch.is_padding for row in batch.data["targets"].tolist()]
    assert rows == columns.targets.tolist()


# ---------------------------------------------------------------- the token folder


def test_tokens_are_built_once_and_again_when_text_or_settings_change(tmp_path: Path) -> None:
    data = text_data(write_texts(tmp_path))
    first = prepare_text(data, seed=1)
    before = (first / TRAIN).stat().st_mtime_ns
    assert prepare_text(data.model_copy(update={"block": 2, "global_batch": 7}), seed=1) == first
    assert (first / TRAIN).stat().st_mtime_ns == before
    changed = [
        prepare_text(data, seed=2),
        prepare_text(data.model_copy(update={"validation_fraction": 0.5}), seed=1),
        prepare_text(data.model_copy(update={"split": "tail"}), seed=1),
        prepare_text(data.model_copy(update={"tokenizer": PARSER.validate_python({"kind": "char"})}), seed=1),
        prepare_text(data.model_copy(update={"validation_path": str(tmp_path / "00.txt")}), seed=1),
    ]
    (tmp_path / "03.txt").write_text("Another text of the same length as before\n")
    changed.append(prepare_text(data, seed=1))
    assert len({first, *changed}) == 7
    assert [path.name for path in first.parent.iterdir() if path.name.startswith(".")] == [], "nothing half-made stays"


def test_the_cache_can_lie_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = text_data(write_texts(tmp_path))
    monkeypatch.setenv("HARNESS_CACHE", str(tmp_path / "elsewhere"))
    splits_of(data)
    assert not (tmp_path / ".harness-cache").exists()
    assert prepare_text(data, seed=1).parent == tmp_path / "elsewhere"


def cut_off(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 3)


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("name", "damage", "words"),
    [
        (TRAIN, cut_off, r"train.bin has [\d,]+ bytes, wanted"),
        (VALIDATION, flip_a_bit, r"validation.bin is not what was written"),
        ("tokenizer.json", flip_a_bit, r"tokenizer.json is not what was written"),
        ("facts.json", cut_off, r"Expecting|delimiter|Unterminated"),
        ("facts.json", Path.unlink, r"No such file"),
    ],
)
def test_a_torn_token_folder_is_refused_and_says_what_to_remove(
    tmp_path: Path, name: str, damage: Callable[[Path], None], words: str
) -> None:
    data = text_data(write_texts(tmp_path), tokenizer={"kind": "char"})
    folder = prepare_text(data, seed=1)
    damage(folder / name)
    with pytest.raises(DataError, match=words) as raised:
        prepare(data, TASK, seed=1)
    assert f"rm -r {folder}" in str(raised.value)


def test_a_cut_off_token_file_is_refused_by_every_rank_before_it_is_mapped(tmp_path: Path) -> None:
    data = text_data(write_texts(tmp_path))
    cut_off(prepare_text(data, seed=1) / TRAIN)
    with pytest.raises(DataError, match="wanted"):
        load(data, TASK, seed=1)


def test_a_cache_that_cannot_be_written_says_where_it_could_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = text_data(write_texts(tmp_path))
    monkeypatch.setenv("HARNESS_CACHE", str(tmp_path / "00.txt" / "cache"))
    with pytest.raises(StorageError, match=r"Not a directory\. Mend that, or set HARNESS_CACHE to a folder"):
        prepare(data, TASK, seed=1)


def test_a_rank_that_does_not_find_the_tokens_says_that_nodes_must_share_them(tmp_path: Path) -> None:
    data = text_data(write_texts(tmp_path))
    with pytest.raises(DataError, match="a folder that all nodes share"):
        load(data, TASK, seed=1)
    assert not token_folder(data, seed=1).exists()


# ---------------------------------------------------------------- refusals


def no_files(folder: Path) -> dict[str, Any]:
    return {"path": str(folder / "none-*.txt")}


def a_folder(folder: Path) -> dict[str, Any]:
    return {"path": str(folder)}


def an_empty_file(folder: Path) -> dict[str, Any]:
    (folder / "05.txt").write_bytes(b"")
    return {}


def latin_1(folder: Path) -> dict[str, Any]:
    (folder / "05.txt").write_bytes(b"caf\xe9 au lait\n" * 9)
    return {"tokenizer": {"kind": "char"}}


def one_document(folder: Path) -> dict[str, Any]:
    return {"path": str(folder / "00.txt")}


def a_long_block(folder: Path) -> dict[str, Any]:
    return {"block": 100_000}


def not_parquet(folder: Path) -> dict[str, Any]:
    (folder / "a.parquet").write_bytes(b"PAR1 and nothing")
    return {"path": str(folder / "a.parquet")}


def another_column(folder: Path) -> dict[str, Any]:
    pyarrow.parquet.write_table(pyarrow.table({"body": ["a"]}), folder / "a.parquet")
    return {"path": str(folder / "a.parquet")}


def numbers(folder: Path) -> dict[str, Any]:
    pyarrow.parquet.write_table(pyarrow.table({"text": [1, 2]}), folder / "a.parquet")
    return {"path": str(folder / "a.parquet")}


def a_row_without_text(folder: Path) -> dict[str, Any]:
    pyarrow.parquet.write_table(pyarrow.table({"text": ["a", None, "b"]}), folder / "a.parquet")
    return {"path": str(folder / "a.parquet")}


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (no_files, r"data.path: no file is called .*none-\*\.txt, or looks like it"),
        (a_folder, r"is a folder, but data.path wants files; write .*/\*\.txt"),
        (an_empty_file, r"05.txt: is empty \(0 bytes\)"),
        (latin_1, r"05.txt: is not UTF-8 at byte 3 \(0xe9\).*data.tokenizer=\{kind: byte\}"),
        (one_document, r"0.25 of 1 documents leaves 1 to train and 0 to validate; set data.split=tail"),
        (a_long_block, r"data.block: 100,000 tokens are more than the training text has \(\d+\); use a smaller"),
        (not_parquet, r"a.parquet: cannot be read as parquet"),
        (another_column, r"has no column 'text', but body; set data.text_column"),
        (numbers, r"column 'text' holds int64, but text is wanted"),
        (a_row_without_text, r"row 1 has no text in column 'text'"),
    ],
)
def test_what_cannot_be_trained_on_is_refused_in_words(
    tmp_path: Path, spoil: Callable[[Path], dict[str, Any]], words: str
) -> None:
    path = write_texts(tmp_path)
    data = text_data(**{"path": path, **spoil(tmp_path)})
    with pytest.raises(DataError, match=words):
        splits_of(data)


def test_bytes_that_are_no_text_are_fine_as_bytes(tmp_path: Path) -> None:
    path = write_texts(tmp_path)
    latin_1(tmp_path)
    train = splits_of(text_data(path)).train
    validation = splits_of(text_data(path)).validation
    assert 0xE9 in stream_of(train) + stream_of(validation)
