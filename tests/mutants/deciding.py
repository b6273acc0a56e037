"""Mistakes in stopping and rates, in what is due, in configurations, in tracking, and in what a Slurm job decides."""

from tests.mutants.mutant import Mutant

_STOPPING, _SCHEDULE, _AGENDA = "harness/stopping.py", "harness/schedule.py", "harness/agenda.py"
_CHANGES, _CHECKS, _PROBLEMS = (f"harness/config/{name}.py" for name in ("changes", "checks", "problems"))
_IO, _RUN, _TRACKING = (f"harness/config/{name}.py" for name in ("io", "run", "tracking"))
_ROWS, _SIDECAR, _WANDB = (f"harness/tracking/{name}.py" for name in ("points", "sidecar", "wandb"))
_TRACK = "harness/tracking/track.py"
_USE, _SIGNATURE = "harness/config/use.py", "harness/config/signature.py"
_ATTEMPTS, _FACTS, _JOB = (f"launch/slurm/{name}.py" for name in ("attempts", "job_facts", "job"))
_SLURM, _CLIENT, _SUBMIT = (f"launch/slurm/{name}.py" for name in ("script", "client", "submit"))
_TORCHRUN = "launch/torchrun.py"

STOPPING = (
    Mutant(
        "a_value_better_by_exactly_min_delta_is_an_improvement",
        _STOPPING,
        "sign * value < sign * self.best - self.min_delta",
        "sign * value <= sign * self.best - self.min_delta",
        ("test_stopping.py",),
    ),
    Mutant(
        "a_run_stops_one_evaluation_late",
        _STOPPING,
        "return self._patience.evaluations_without_improvement >= self._stopping.patience_evaluations",
        "return self._patience.evaluations_without_improvement > self._stopping.patience_evaluations",
        ("test_stopping.py",),
    ),
    Mutant(
        "a_resumed_run_trains_at_the_rate_before_the_plateau",
        _STOPPING,
        '            self.lr_factor = state["lr_factor"]\n',
        "",
        ("test_stopping.py",),
    ),
    Mutant(
        "a_rule_that_changed_goes_on_with_the_old_best",
        _STOPPING,
        'for key in ("metric", "mode", "min_delta"))',
        'for key in ("metric",))',
        ("test_stopping.py",),
    ),
    Mutant(
        "no_margin_is_left_before_the_end_of_a_jobs_time",
        _STOPPING,
        "time.time() + seconds_needed + MARGIN_SECONDS >= self._end_time",
        "time.time() + seconds_needed >= self._end_time",
        ("test_stopping.py",),
    ),
    Mutant(
        "a_signal_that_came_before_the_rank_is_lost",
        _STOPPING,
        "            self.received = signal.Signals(number)\n\n    def _remember",
        "            pass\n\n    def _remember",
        ("test_job.py::test_a_signal_that_came_before_the_rank_could_take_it_is_not_lost",),
    ),
)

SCHEDULE = (
    Mutant(
        "the_first_update_of_a_warm_up_has_rate_0",
        _SCHEDULE,
        "return peak_lr * (u + 1) / w",
        "return peak_lr * u / w",
        ("test_schedule.py",),
    ),
    Mutant(
        "a_decay_begins_with_the_run_and_not_after_the_warm_up",
        _SCHEDULE,
        "progress = min(1.0, (u - w) / max(1, total_updates - w))",
        "progress = min(1.0, u / max(1, total_updates))",
        ("test_schedule.py",),
    ),
    Mutant(
        "a_rate_past_the_budget_rises_again",
        _SCHEDULE,
        "progress = min(1.0, (u - w) / max(1, total_updates - w))",
        "progress = (u - w) / max(1, total_updates - w)",
        ("test_schedule.py",),
    ),
    Mutant(
        "steps_of_the_rate_are_counted_from_the_end_of_the_warm_up",
        _SCHEDULE,
        "float(factor ** (u // (steps or",
        "float(factor ** ((u - w) // (steps or",
        ("test_schedule.py",),
    ),
)

AGENDA = (
    Mutant(
        "a_save_is_passed_over_by_an_interval",
        _AGENDA,
        "            self.config.checkpoint.every_steps,\n",
        "",
        ("test_agenda.py",),
    ),
    Mutant(
        "a_run_ends_without_a_last_evaluation",
        _AGENDA,
        "            or self._budget_is_spent(state)\n",
        "",
        ("test_agenda.py",),
    ),
    Mutant(
        "a_run_that_is_done_is_called_interrupted",
        _AGENDA,
        '            return "budget"\n',
        '            return "interrupted" if state.stop_signal else "budget"\n',
        ("test_agenda.py",),
    ),
    Mutant(
        "the_best_evaluation_is_saved_only_when_a_save_is_due",
        _AGENDA,
        "return state.is_best or _is_multiple",
        "return _is_multiple",
        ("test_agenda.py",),
    ),
)

CONFIG = (
    Mutant(
        "the_seed_may_change_when_a_run_is_resumed",
        _CHANGES,
        '"run.seed": "refused",',
        '"run.seed": "noticed",',
        ("test_config_changes.py",),
    ),
    Mutant(
        "a_metric_may_be_judged_the_wrong_way_round",
        _CHECKS,
        "        elif mode != wanted:\n",
        '        elif mode not in (wanted, "min"):\n',
        ("test_config.py",),
    ),
    Mutant(
        "what_a_strangers_run_directory_uses_is_run",
        _IO,
        "    if names and not is_typed and is_stored(path):\n",
        "    if False:\n",
        ("test_use.py",),
    ),
    Mutant(
        "a_configuration_may_use_files_outside_its_folder",
        _USE,
        '    if not is_typed and (path.is_absolute() or ".." in path.parts):\n',
        "    if False:\n",
        ("test_use.py",),
    ),
    Mutant(
        "code_that_has_changed_is_kept_as_it_was_first_imported",
        _USE,
        "_digest(Path(file.file)) == file.sha256 for file",
        "True for file",
        ("test_use.py",),
    ),
    Mutant(
        "a_part_may_take_the_name_of_one_of_ours",
        "harness/parts.py",
        "            if other.is_ours and not part.is_ours:\n",
        "            if False:\n",
        ("test_parts.py",),
    ),
    Mutant(
        "true_is_a_whole_number_of_a_part",
        "harness/config/annotations.py",
        "{int: Annotated[int, Strict()], bool",
        "{int: int, bool",
        ("test_parts.py",),
    ),
    Mutant(
        "what_the_data_say_may_be_contradicted",
        _SIGNATURE,
        "            elif name in facts and value != facts[name]:\n",
        "            elif False:\n",
        ("test_parts.py",),
    ),
    Mutant(
        "a_node_with_other_code_trains",
        "launch/slurm/preflight.py",
        '        if found != wanted:\n            yield f"{path} is not',
        '        if False:\n            yield f"{path} is not',
        ("test_use.py",),
    ),
    Mutant(
        "facts_of_other_data_are_taken_when_a_run_goes_on",
        "harness/record/run_directory.py",
        "            if before is not None and before != now:\n",
        "            if False:\n",
        ("test_own_runs.py",),
    ),
    Mutant(
        "a_micro_batch_need_not_divide_a_ranks_share",
        _CHECKS,
        "if micro_batch is not None and share % micro_batch:",
        "if micro_batch is not None and micro_batch % share:",
        ("test_config.py",),
    ),
    Mutant(
        "a_message_shows_the_key_that_it_warns_of",
        _PROBLEMS,
        "text = without_keys(repr(value))",
        "text = repr(value)",
        ("test_tracking_config.py", "test_config.py"),
    ),
    Mutant(
        "training_waits_for_every_save_unless_told_otherwise",
        _RUN,
        "    asynchronous: bool = True\n",
        "    asynchronous: bool = False\n",
        ("test_config.py", "distributed/test_saving.py"),
    ),
    Mutant(
        "a_run_gives_up_after_five_updates_unless_told_otherwise",
        _RUN,
        "max_nonfinite_updates: PositiveInt = 3",
        "max_nonfinite_updates: PositiveInt = 5",
        ("distributed/test_loop.py::test_a_run_gives_up_after_three_in_a_row_and_names_rank_and_parameter",),
    ),
    Mutant(
        "a_variable_of_wandb_goes_after_the_configuration",
        _TRACKING,
        'if text := environment.get(variable, "").strip():',
        'if (text := environment.get(variable, "").strip()) and field not in tracking.wandb.model_fields_set:',
        ("test_tracking_config.py",),
    ),
)

TRACKING = (
    Mutant(
        "a_skipped_update_closes_the_row_of_the_one_before",
        _ROWS,
        "            self._num_skipped += 1\n            return\n",
        "            self._num_skipped += 1\n            yield from self.rest()\n            return\n",
        ("test_rows.py",),
    ),
    Mutant(
        "the_last_row_that_is_there_is_sent_again",
        _TRACK,
        "if row.step > self._opened.last_step:",
        "if row.step >= self._opened.last_step:",
        ("test_rows.py",),
    ),
    Mutant(
        "the_last_row_of_a_killed_run_is_sent_before_its_evaluation",
        _TRACK,
        "        if self._exit_code is not None:\n            self._log(self._rows.rest())\n",
        "        self._log(self._rows.rest())\n",
        ("test_rows.py",),
    ),
    Mutant(
        "an_interrupted_run_is_tracked_as_done",
        _TRACK,
        'return EXIT_INTERRUPTED if reason == "interrupted" else EXIT_DONE',
        "return EXIT_DONE",
        ("test_rows.py",),
    ),
    Mutant(
        "a_signal_for_the_training_ends_its_tracker",
        _TRACK,
        "        signal.signal(number, signal.SIG_IGN)\n",
        "        pass\n",
        ("test_wandb.py::test_a_signal_to_every_process_of_a_job_interrupts_the_run_and_is_told",),
    ),
    Mutant(
        "a_tracker_that_is_started_again_alerts_of_everything_again",
        _SIDECAR,
        '            self._alerts_from = said["alerts_from"]\n',
        "",
        ("test_wandb.py::test_online_a_tracker_that_is_started_again_follows_and_alerts_nobody_twice",),
    ),
    Mutant(
        "a_tracker_that_cannot_begin_is_started_for_ever",
        _SIDECAR,
        "            restarts_left -= 1\n",
        "            pass\n",
        ("test_wandb.py::test_a_tracker_that_cannot_begin_is_left_alone_and_sync_is_advised_only_where_it_helps",),
    ),
    Mutant(
        "a_tracker_that_is_started_again_is_not_told_to_follow",
        _SIDECAR,
        "        if self._is_followed:\n            self._say_follow()\n",
        "",
        ("test_wandb.py::test_online_a_tracker_that_is_started_again_follows_and_alerts_nobody_twice",),
    ),
    Mutant(
        "the_first_row_after_a_restart_is_left_out_online",
        _WANDB,
        "self._last_step = self._wandb_run.starting_step - 1",
        "self._last_step = self._wandb_run.starting_step",
        ("test_wandb.py::test_online_a_run_is_one_run_however_often_it_is_started",),
    ),
    Mutant(
        "an_interrupted_run_is_not_marked_in_wandb",
        _WANDB,
        "            self._wandb_run.mark_preempting()\n",
        "            pass\n",
        ("test_wandb.py::test_an_interrupted_run_is_preempted_and_a_run_that_gives_up_has_failed",),
    ),
)

SLURM = (
    Mutant(
        "a_job_that_slurm_ends_is_brought_back_to_life",
        _ATTEMPTS,
        'if attempt.state not in ("RUNNING", "UNKNOWN"):',
        'if attempt.state == "CANCELLED":',
        ("test_job.py",),
    ),
    Mutant(
        "a_preempted_job_is_queued_twice",
        _ATTEMPTS,
        '    if attempt.is_preempted:\n        return "leave", "preempted"\n',
        "",
        ("test_job.py",),
    ),
    Mutant(
        "a_job_that_loses_nodes_comes_back_once_more_than_it_may",
        _ATTEMPTS,
        "attempt.losses < MAX_LOSSES",
        "attempt.losses <= MAX_LOSSES",
        ("test_job.py",),
    ),
    Mutant(
        "a_save_that_was_cut_off_counts_as_progress",
        _FACTS,
        'names = [path.parent.name for path in run_directory.glob("checkpoints/step-*/COMMIT.json")]',
        'names = [path.name for path in run_directory.glob("checkpoints/step-*")]',
        ("test_job.py",),
    ),
    Mutant(
        "a_node_that_does_not_answer_is_not_lost",
        _FACTS,
        'if state.endswith("*") or state.startswith(("down", "fail")))',
        'if state.startswith(("down", "fail")))',
        ("test_job.py", "test_continuation.py"),
    ),
    Mutant(
        "a_job_in_which_no_rank_has_trained_is_done",
        _JOB,
        "    if step_code == EXIT_DONE and recorded is None:\n",
        "    if step_code != EXIT_DONE and recorded is None:\n",
        ("test_continuation.py",),
    ),
    Mutant(
        "a_job_that_was_cancelled_submits_another",
        _JOB,
        "        if self.cancelled:\n            return\n",
        "",
        ("test_continuation.py",),
    ),
    Mutant(
        "nodes_that_were_left_out_before_are_back",
        _JOB,
        "[*([excluded] if excluded else []), *bad]",
        "bad",
        ("test_continuation.py",),
    ),
    Mutant(
        "a_finished_run_that_is_to_go_on_is_taken_for_done",
        _JOB,
        "if job.restart and ExitFile(directory).code() == EXIT_DONE:",
        "if ExitFile(directory).code() == EXIT_DONE:",
        ("test_job.py", "test_continuation.py"),
    ),
    Mutant(
        "slurm_may_not_requeue_the_job",
        _SLURM,
        'return [*lines, "--requeue"]',
        "return lines",
        ("test_submit.py",),
    ),
    Mutant(
        "how_a_run_ended_before_is_left_for_the_next_job_to_find",
        _SUBMIT,
        '            (submission.directory / folder / "exit.json").unlink(missing_ok=True)\n',
        "",
        ("test_submit.py",),
    ),
    Mutant(
        "a_directory_in_use_ends_with_the_code_of_the_run_that_uses_it",
        _TORCHRUN,
        "    if agent == RunInUseError.exit_code:\n        return agent",
        "    if agent == RunInUseError.exit_code and recorded is None:\n        return agent",
        ("test_launch.py::test_the_exit_code_is_that_of_the_run",),
    ),
    Mutant(
        "what_the_command_starts_is_looked_for_in_the_working_directory_first",
        "harness/ranks/process.py",
        'environment["PYTHONSAFEPATH"] = "1"',
        'environment.pop("PYTHONSAFEPATH", None)',
        ("test_launch.py::test_what_the_command_starts_is_of_its_own_package_wherever_that_is",),
    ),
)
