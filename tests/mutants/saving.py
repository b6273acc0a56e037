"""Mistakes in checkpoints, in resuming from them, in the ledger and in the directory of a run."""

from tests.mutants.mutant import Mutant

_CHECKPOINT = "harness/checkpoint/"
_STORE = f"{_CHECKPOINT}store.py"
_DIRECTORY, _MANIFEST = "harness/record/checkpoints.py", "harness/record/manifest.py"
_LAYOUT, _TENSORS, _SNAPSHOT = (f"{_CHECKPOINT}{name}.py" for name in ("layout", "tensors", "snapshot"))
_RNG, _TRAINER = f"{_CHECKPOINT}rng.py", "harness/record/progress.py"
_RESUME, _TRAIN = "harness/saving.py", "harness/session.py"
_LEDGER, _LINES, _RUN = "harness/observers/ledger.py", "harness/record/json_lines.py", "harness/record/run_directory.py"

CHECKPOINT = (
    Mutant(
        "a_step_that_could_not_be_saved_counts_as_saved",
        _STORE,
        "        if save.problem is None:\n            self._newest_step = save.step\n",
        "        self._newest_step = save.step\n        if save.problem is None:\n",
        ("distributed/test_saving.py", "distributed/test_checkpoints.py"),
    ),
    Mutant(
        "only_best_knows_which_checkpoint_is_the_best",
        _STORE,
        'best = {"best_step": step if is_best else self._best_step}',
        'best: dict[str, int | None] = {"best_step": None}',
        (
            "distributed/test_checkpoints.py::test_a_checkpoint_that_the_disk_refused_to_call_best_is_known_to_be_and_is_called_so_by_the_next_save",
        ),
    ),
    Mutant(
        "what_a_run_resumed_from_is_deleted_like_any_other",
        _STORE,
        "keep_every_steps=keep.keep_every_steps, keep=self._source",
        "keep_every_steps=keep.keep_every_steps, keep=None",
        ("distributed/test_saving.py::test_every_mth_checkpoint_and_the_one_resumed_from_are_kept",),
    ),
    Mutant(
        "a_rank_verifies_one_file_where_it_has_several",
        _STORE,
        "share=slice(strategy.rank, None, strategy.world_size)",
        "share=slice(strategy.rank, strategy.rank + 1)",
        ("distributed/test_checkpoints.py::test_a_broken_checkpoint_is_set_aside_by_all_ranks_for_the_one_before",),
    ),
    Mutant(
        "a_checkpoint_does_not_wait_for_the_ledger_that_it_refers_to",
        _STORE,
        "                also_sync()\n",
        "",
        ("distributed/test_saving.py::test_the_disk_has_the_ledger_that_a_checkpoint_refers_to_before_its_commit",),
    ),
    Mutant(
        "every_rank_goes_on_with_the_random_state_of_rank_zero",
        _STORE,
        'own = tensor_file("rng", self._strategy.rank)',
        'own = tensor_file("rng", 0)',
        ("distributed/test_checkpoints.py::test_a_rank_that_loads_is_and_goes_on_as_the_one_that_saved_to_the_bit",),
    ),
    Mutant(
        "only_rank_zero_says_that_a_state_is_not_the_saved_one",
        _STORE,
        "            if different:\n",
        "            if different and strategy.rank == 0:\n",
        ("distributed/test_saving.py::test_under_ddp_every_rank_compares_its_own_copy",),
    ),
    Mutant(
        "a_save_is_renamed_before_the_disk_has_its_names",
        _DIRECTORY,
        "        sync_directory(temporary)\n",
        "",
        (
            "distributed/test_checkpoints.py::test_wherever_the_power_is_cut_the_next_start_finds_the_old_or_the_new_one_whole",
        ),
    ),
    Mutant(
        "a_save_is_done_before_the_disk_has_its_new_name",
        _DIRECTORY,
        "        os.rename(temporary, self.step(manifest.step))\n        sync_directory(self.path)\n",
        "        os.rename(temporary, self.step(manifest.step))\n",
        (
            "distributed/test_checkpoints.py::test_wherever_the_power_is_cut_the_next_start_finds_the_old_or_the_new_one_whole",
        ),
    ),
    Mutant(
        "the_best_is_deleted_when_it_is_old",
        _DIRECTORY,
        "if is_kept or directory == keep or directory.name == best:",
        "if is_kept or directory == keep:",
        ("distributed/test_checkpoints.py::test_the_newest_few_and_the_best_are_kept",),
    ),
    Mutant(
        "the_newest_checkpoint_knows_of_no_later_best_than_its_own",
        _DIRECTORY,
        "return saved if type(written_after) is int and written_after < step_of(newest) else named",
        "return named",
        (
            "distributed/test_checkpoints.py::test_a_checkpoint_that_the_disk_refused_to_call_best_is_known_to_be_and_is_called_so_by_the_next_save",
        ),
    ),
    Mutant(
        "a_link_in_a_checkpoint_is_followed",
        _MANIFEST,
        "    path = directory / entry.name\n    if problem := _link_problem(path):\n        return problem\n",
        "    path = directory / entry.name\n",
        ("test_verify.py", "distributed/test_checkpoints.py"),
    ),
    Mutant(
        "a_folder_that_was_renamed_passes_for_another_step",
        _MANIFEST,
        'if not isinstance(manifest.step, int) or directory.name != f"step-{manifest.step:08d}":',
        "if not isinstance(manifest.step, int):",
        ("distributed/test_checkpoints.py::test_a_broken_checkpoint_is_set_aside_by_all_ranks_for_the_one_before",),
    ),
    Mutant(
        "an_infinite_count_of_updates_is_taken_up",
        _LAYOUT,
        "if not (isfinite(count) and count >= 0):",
        "if count < 0:",
        (
            "distributed/test_average.py::test_an_average_of_another_size_or_of_no_number_of_updates_is_refused",
            "distributed/test_checkpoints.py",
        ),
    ),
    Mutant(
        "a_tensor_that_only_the_commit_has_is_not_missed",
        _LAYOUT,
        "unlisted = sorted(saved.keys() ^ manifest.tensors.keys())",
        "unlisted = sorted(saved.keys() - manifest.tensors.keys())",
        ("distributed/test_checkpoints.py::test_a_commit_that_lists_other_tensors_than_its_files_hold_is_refused",),
    ),
    Mutant(
        "a_save_is_written_from_the_weights_that_training_goes_on_to_change",
        _SNAPSHOT,
        "share[key] = self._copy(key, tensor.detach())",
        "share[key] = tensor.detach()",
        ("distributed/test_saving.py::test_training_goes_on_while_the_disk_does_not_answer_and_reaches_no_file",),
    ),
    Mutant(
        "rank_zero_writes_everything",
        _SNAPSHOT,
        "if offset // STRIPE_BYTES % strategy.world_size == strategy.rank:",
        "if strategy.rank == 0:",
        ("distributed/test_saving.py::test_a_large_state_is_written_by_all_ranks_and_read_by_any_number_of_them",),
    ),
    Mutant(
        "the_second_of_pythons_two_gaussian_numbers_is_lost",
        _RNG,
        "random.setstate((version, tuple(words), gauss[0] if gauss else None))",
        "random.setstate((version, tuple(words), None))",
        ("distributed/test_checkpoints.py::test_every_generator_draws_on_where_it_was_captured",),
    ),
    Mutant(
        "an_evaluation_may_come_after_the_last_update",
        _TRAINER,
        '@field_validator("step", "evaluated_step")',
        '@field_validator("step")',
        ("test_trainer_json.py",),
    ),
)

RESUME = (
    Mutant(
        "a_resumed_run_has_forgotten_its_best_evaluation",
        _RESUME,
        '    run.judge.load_state_dict(trainer["judge"])\n',
        "",
        ("distributed/test_resume.py::test_a_run_stopped_by_a_signal_comes_back_to_the_same_bits",),
    ),
    Mutant(
        "a_resumed_run_has_forgotten_how_many_updates_were_skipped_in_a_row",
        _RESUME,
        'nonfinite_in_a_row=trainer["nonfinite_in_a_row"],',
        "nonfinite_in_a_row=0,",
        ("distributed/test_saving.py::test_a_resumed_run_counts_on_from_what_was_saved",),
    ),
    Mutant(
        "a_resumed_run_has_forgotten_the_scale_of_its_loss",
        _RESUME,
        'if run.strategy.loss_scale and trainer["loss_scale"]:',
        'if run.strategy.loss_scale and not trainer["loss_scale"]:',
        ("distributed/test_fp16.py::test_a_scaled_run_is_resumed_to_the_same_bits_and_the_same_scale",),
    ),
    Mutant(
        "a_save_that_succeeds_does_not_end_a_row_of_failed_ones",
        _RESUME,
        "        state.failed_saves.clear()\n",
        "",
        ("distributed/test_saving.py::test_two_failed_saves_do_not_stop_a_run_and_all_ranks_hear_of_them",),
    ),
    Mutant(
        "rows_in_another_order_are_taken_for_those_that_are_left",
        _RESUME,
        'return {"seed": run.plan.seed, "global_batch": run.plan.global_batch, **by_length}',
        'return {"global_batch": run.plan.global_batch}',
        ("distributed/test_resume.py::test_another_order_of_rows_is_refused_even_where_the_stored_config_is_lost",),
    ),
    Mutant(
        "a_step_that_became_the_best_when_it_was_saved_is_not_called_so",
        _RESUME,
        "if state.step == state.saved_step and not state.is_best:",
        "if state.step == state.saved_step:",
        (
            "distributed/test_checkpoints.py::test_the_best_evaluation_may_come_after_a_skipped_update_of_a_step_that_is_saved",
        ),
    ),
    Mutant(
        "a_run_that_gives_up_drops_the_save_in_flight",
        _TRAIN,
        "                record_save_result(run, self.state, run.checkpoints.finish())\n",
        "                pass\n",
        ("distributed/test_saving.py::test_a_run_that_gives_up_on_nan_publishes_the_save_in_flight",),
    ),
)

LEDGER = (
    Mutant(
        "lines_that_a_full_disk_refused_are_dropped",
        _LEDGER,
        "self._problem = error  # the next save fails with it",
        'self._problem, self._pending = error, b""',
        ("test_ledger.py",),
    ),
    Mutant(
        "the_disk_is_not_waited_for_when_a_checkpoint_refers_to_the_ledger",
        _LEDGER,
        "            os.fsync(self._file.fileno())\n",
        "",
        ("test_ledger.py",),
    ),
    Mutant(
        "the_checkpoint_of_another_run_cuts_this_runs_ledger",
        _LEDGER,
        "return 0 if is_of_another_run(trainer, run_id=run_id) else ledger_bytes",
        "return ledger_bytes",
        ("test_ledger.py", "distributed/test_resume.py"),
    ),
    Mutant(
        "a_ledger_that_ends_with_a_skipped_update_is_taken_for_another",
        _LEDGER,
        'step + (last.get("applied") is False)',
        "step",
        ("test_ledger.py",),
    ),
    Mutant(
        "an_event_goes_on_where_a_killed_process_left_half_of_one",
        _LINES,
        'return b"" if file.read() in (b"", b"\\n") else b"\\n"',
        'return b""',
        ("test_ledger.py",),
    ),
    Mutant(
        "an_event_may_be_lost_with_the_power",
        _LINES,
        "        os.fsync(file.fileno())\n        sync_directory(run_directory)\n",
        "        sync_directory(run_directory)\n",
        ("test_ledger.py",),
    ),
    Mutant(
        "two_processes_may_train_in_one_directory",
        _RUN,
        "fcntl.LOCK_EX | fcntl.LOCK_NB",
        "fcntl.LOCK_SH | fcntl.LOCK_NB",
        ("test_run_directory.py",),
    ),
    Mutant(
        "a_run_whose_checkpoints_were_all_set_aside_may_become_another",
        _RUN,
        'patterns = ("checkpoints/step-*", "checkpoints/quarantine/step-*")',
        'patterns = ("checkpoints/step-*",)',
        ("test_run_directory.py",),
    ),
)
