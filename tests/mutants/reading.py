"""Mistakes in what is read of files: which columns, values and rows."""

from tests.mutants.mutant import Mutant

_TABULAR, _COLUMNS, _SHARDS, _SOURCES = (
    f"harness/data/{name}.py" for name in ("tabular", "columns", "shards", "sources")
)
_DOCUMENTS, _TEXT, _IMAGES = (f"harness/data/{name}.py" for name in ("documents", "text", "images"))
_SUSPECTS, _PREPROCESS, _RESUME = "harness/data/suspects.py", "harness/data/preprocess.py", "harness/resume.py"
_TESTS, _UNCHANGED = ("test_columns.py",), ("test_unchanged.py",)

READING = (
    Mutant(
        "labels_of_a_validation_file_are_what_they_look_like_there",
        _TABULAR,
        "name not in (table.spelled or ()) or (as_in is not None and as_in.kind(name) == TEXTS)",
        "name not in (table.spelled or ())",
        _TESTS,
    ),
    Mutant(
        "texts_in_one_file_and_numbers_in_the_other_are_read",
        _TABULAR,
        'if kind != wanted and "null" not in (kind, wanted):',
        "if False:",
        _TESTS,
    ),
    Mutant(
        "words_of_csv_are_missing_values",
        _TABULAR,
        '"keep_default_na": False, "na_values": [""]}',
        '"keep_default_na": True, "na_values": [""]}',
        _TESTS,
    ),
    Mutant(
        "a_number_with_a_leading_zero_is_that_number",
        _COLUMNS,
        r"(?:0|[1-9]\d*)(?:\.\d*)?",
        r"\d+(?:\.\d*)?",
        _TESTS,
    ),
    Mutant(
        "categories_of_csv_stand_in_the_order_of_their_spelling",
        _PREPROCESS,
        "return texts if numbers is None else",
        "return texts if numbers is not None else",
        _TESTS,
    ),
    Mutant(
        "the_word_that_stood_for_no_number_is_not_named",
        _TABULAR,
        "if table.spelled is not None and name not in table.spelled:",
        "if False:",
        _TESTS,
    ),
    Mutant("times_in_json_are_no_texts", _TABULAR, "if pyarrow.types.is_timestamp(field.type)]", "if False]", _TESTS),
    Mutant(
        "a_decimal_is_rounded_as_arrow_does",
        _COLUMNS,
        "column.cast(pyarrow.string()).cast(pyarrow.float64())",
        "column.cast(pyarrow.float64())",
        _TESTS,
    ),
    Mutant(
        "a_text_as_polars_writes_it_is_none",
        _COLUMNS,
        "if types.is_string_view(column.type):",
        "if False:",
        _TESTS,
    ),
    Mutant(
        "shards_may_have_other_columns_than_the_first",
        _SHARDS,
        "        check_same_columns(table, [*self.features, *data.targets], as_in=self.first)\n",
        "",
        _TESTS,
    ),
    Mutant(
        "a_column_that_only_later_shards_have_is_left_out",
        _SHARDS,
        "if data.features is None and more:",
        "if False:",
        _TESTS,
    ),
    Mutant(
        "the_classes_are_those_of_the_first_shard",
        _SHARDS,
        "for name in self._names for text in",
        "for name in self._names[:1] for text in",
        _TESTS,
    ),
    Mutant("the_index_of_pandas_is_a_feature", _COLUMNS, "if isinstance(name, str)]", "if False]", _TESTS),
    Mutant("a_row_number_is_not_told", _SUSPECTS, "if is_number_of_row:\n", "if False:\n", _TESTS),
    Mutant(
        "chance_is_told_as_prediction",
        _SUSPECTS,
        "max(by_values, by_intervals) > log(LEAST_ODDS * odds)",
        "max(by_values, by_intervals) > log(2)",
        _TESTS,
    ),
    Mutant(
        "a_value_that_says_two_things_predicts",
        _SUSPECTS,
        "    if (is_new_code & ~is_new_value).any():\n        return False\n",
        "",
        _TESTS,
    ),
    Mutant(
        "rows_that_train_and_validate_are_not_told",
        _SOURCES,
        "notices = [*splits.notices, *_same_rows(splits.train, splits.validation)]",
        "notices = [*splits.notices]",
        _TESTS,
    ),
    Mutant(
        "a_run_that_read_otherwise_is_told_of_other_data",
        _RESUME,
        'if run.read_otherwise and trainer.get("reading")',
        'if False and trainer.get("reading")',
        _TESTS,
    ),
    Mutant(
        "a_run_with_other_data_is_told_that_they_are_read_otherwise",
        _RESUME,
        'if run.read_otherwise and trainer.get("reading") != run.facts["reading"]:',
        "if run.read_otherwise:",
        _TESTS,
    ),
    Mutant(
        "what_is_no_text_is_text",
        _DOCUMENTS,
        "if what is not None and not _is_plain(start):",
        "if False:",
        ("test_documents.py",),
    ),
    Mutant(
        "a_text_that_begins_as_an_image_does_is_none",
        _DOCUMENTS,
        "if what is not None and not _is_plain(start):",
        "if what is not None:",
        ("test_documents.py",),
    ),
    Mutant(
        "a_csv_file_is_text",
        _DOCUMENTS,
        "if path.suffix.lower() in TABLES:",
        "if False:",
        ("test_documents.py",),
    ),
    Mutant(
        "tokens_of_a_text_that_changed_are_kept",
        _TEXT,
        "        check_unchanged(before)\n",
        "",
        ("test_documents.py",),
    ),
    Mutant(
        "tokens_do_not_know_of_files_that_came",
        _TEXT,
        "if _corpora(data) != corpora:",
        "if False:",
        ("test_documents.py",),
    ),
    Mutant(
        "a_table_that_changed_is_kept",
        _TABULAR,
        "    check_unchanged(before)\n",
        "",
        _UNCHANGED,
    ),
    Mutant("columns_of_a_table_that_changed_are_cached", _SOURCES, "        check_unchanged(before)\n", "", _UNCHANGED),
    Mutant("an_image_that_changed_is_kept", _IMAGES, "    check_unchanged(before)\n", "", _UNCHANGED),
    Mutant(
        "a_shard_that_changed_is_read",
        _SHARDS,
        "        if self._state(name) != self._states[name]:\n",
        "        if False:\n",
        _UNCHANGED,
    ),
    Mutant(
        "an_image_without_a_suffix_is_left_out",
        _IMAGES,
        "        if _is_image(path):\n",
        "        if False:\n",
        ("test_sources.py",),
    ),
    Mutant("files_left_out_are_not_told", _IMAGES, "    if not others:\n", "    if True:\n", ("test_sources.py",)),
)
