"""Mistakes in which evaluation is the best, in what a resumed run is told, and in who the ranks believe they are."""

from tests.mutants.mutant import Mutant

_STOPPING, _RESUME, _TRAIN = "harness/stopping.py", "harness/saving.py", "harness/session.py"
_DIRECTORY, _BUILD, _STORE = (
    "harness/record/checkpoints.py",
    "harness/ranks/join.py",
    "harness/checkpoint/store.py",
)
_INSTALLED, _CLASSES = "harness/config/installed.py", "harness/catalogue/classification/classes.py"
_RESUMED = "distributed/test_resume.py"

JUDGING = (
    Mutant(
        "an_evaluation_without_a_checkpoint_is_the_best",
        _STOPPING,
        "is_best = has_checkpoint and self.best.observe(",
        "is_best = self.best.observe(",
        ("test_stopping.py",),
    ),
    Mutant(
        "the_best_stays_the_best_though_its_save_failed",
        _RESUME,
        "    run.judge.standings.forget(step)\n",
        "",
        ("distributed/test_saving.py",),
    ),
    Mutant(
        "another_judge_does_not_look_at_the_ledger",
        _RESUME,
        "evaluations, rate = read_back(ledger, num_bytes=num_bytes) if num_bytes else ([], None)",
        "evaluations, rate = [], read_back(ledger, num_bytes=num_bytes)[1] if num_bytes else None",
        (f"{_RESUMED}::test_another_judge_looks_at_all_evaluations_of_the_ledger_and_says_so",),
    ),
    Mutant(
        "best_moves_and_its_file_does_not",
        _RESUME,
        "        checkpoints.name_best(best.best_step)\n",
        "        pass\n",
        (f"{_RESUMED}::test_another_judge_looks_at_all_evaluations_of_the_ledger_and_says_so",),
    ),
    Mutant(
        "the_next_save_names_the_best_of_the_rule_before",
        _STORE,
        '            self.directory.point("BEST", self.directory.step(step).name)\n        self._best_step = step\n',
        '            self.directory.point("BEST", self.directory.step(step).name)\n',
        (
            "distributed/test_checkpoints.py::test_of_best_and_the_newest_checkpoint_the_one_that_spoke_last_says_which_is_the_best",
        ),
    ),
    Mutant(
        "a_schedule_of_its_own_length_follows_the_budget",
        "harness/config/training.py",
        "return self.total_steps or budget",
        "return budget",
        ("test_schedule.py",),
    ),
    Mutant(
        "a_lifted_rate_is_not_told",
        _RESUME,
        "if before is None or math.isclose(before, run.learning_rate(state.step), rel_tol=1e-5):",
        "if True:",
        (f"{_RESUMED}::test_training_longer_tells_from_which_rate_to_which_it_goes_on_and_may_leave_it",),
    ),
    Mutant(
        "a_start_that_is_refused_leaves_its_config_behind",
        "harness/record/run_directory.py",
        'if (self.path / "config.yaml").exists() or not has_saves(self.path):',
        "if True:",
        (f"{_RESUMED}::test_another_order_of_rows_is_refused_even_where_the_stored_config_is_lost",),
    ),
    Mutant(
        "all_attempts_of_torchrun_share_a_store",
        _BUILD,
        'return dist.PrefixStore(f"attempt {place.attempt}", store)',
        "return store",
        ("distributed/test_stray_variables.py",),
    ),
    Mutant(
        "a_dead_peer_is_told_as_a_bug_of_ours",
        _TRAIN,
        "            with self._first_errors():  # so that what is told of the failure is what exit.json says\n",
        "            if True:\n",
        ("test_end_to_end.py::test_a_killed_rank_is_started_again_by_torchrun_where_its_store_outlives_the_attempt",),
    ),
    Mutant(
        "what_mpirun_has_left_is_believed",
        _BUILD,
        "        del os.environ[name]  # Accelerate",
        "        pass  # Accelerate",
        ("distributed/test_stray_variables.py",),
    ),
    Mutant(
        "a_package_that_is_too_old_trains",
        _INSTALLED,
        'if any(part.operator != "<" for part in failed):',
        'if any(part.operator == "==" for part in failed):',
        ("test_installed.py",),
    ),
    Mutant(
        "a_class_by_name_is_a_number",
        _CLASSES,
        "    return names.index(chosen)\n",
        "    return 1\n",
        ("test_classes.py",),
    ),
)
