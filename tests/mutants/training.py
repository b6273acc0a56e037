"""Mistakes in the update, in its interval, in how it is spread over ranks, and in the rows that it sees."""

from tests.mutants.mutant import Mutant

_LOOP, _INTERVAL, _TRAIN = "harness/loop.py", "harness/interval.py", "harness/session.py"
_DDP, _ZERO, _FRAGMENTS = "harness/strategy/ddp.py", "harness/strategy/zero.py", "harness/strategy/zero_fragments.py"
_BUILD_ZERO, _DEEPSPEED = "harness/strategy/build_zero.py", "harness/strategy/deepspeed_config.py"
_AVERAGE, _NOISE, _SCALE = (f"harness/strategy/{name}.py" for name in ("average", "noise", "loss_scale"))
_ORDER, _BATCHES, _ASSEMBLE = "harness/rows/order.py", "harness/rows/batches.py", "harness/assemble.py"

_NOISY = """\
        if self._noise is not None:
            self._noise.add(gradients, position=position)
"""
_FINITE = """\
        difference = norm - norm  # 0 for a finite norm and NaN for any other
        torch.ne(difference, 0, out=self._found_inf)
"""

LOOP = (
    Mutant(
        "a_smaller_last_batch_is_divided_by_the_size_of_a_whole_one",
        _LOOP,
        "return run.plan.rows_at(position) * run.task.targets_per_row",
        "return run.plan.global_batch * run.task.targets_per_row",
        ("distributed/test_reference.py",),
    ),
    Mutant(
        "only_the_loss_of_the_last_micro_batch_is_told",
        _LOOP,
        "sum((part[name] for part in parts[1:]), start=term)",
        "parts[-1][name]",
        ("distributed/test_reference.py",),
    ),
    Mutant(
        "a_row_that_does_not_count_leaves_a_trace_in_batch_norm",
        _LOOP,
        "        model.train(not batch.is_padding)  # also",
        "        model.train()  # also",
        ("distributed/test_loop.py::test_a_rank_without_rows_takes_no_statistics_of_that_update_and_of_every_other",),
    ),
    Mutant(
        "a_rank_that_had_no_row_goes_on_in_eval_mode",
        _LOOP,
        "    if model.training == batch.is_padding:",
        "    if model.training and batch.is_padding:",
        ("distributed/test_loop.py::test_a_rank_without_rows_takes_no_statistics_of_that_update_and_of_every_other",),
    ),
    Mutant(
        "class_weights_count_the_row_of_a_rank_that_has_none",
        _LOOP,
        "torch.as_tensor(run.task.weight_sum(batch)) * (not batch.is_padding)",
        "torch.as_tensor(run.task.weight_sum(batch))",
        (
            "distributed/test_reference.py::test_a_weighted_loss_is_that_mean_under_every_strategy_and_on_ranks_without_rows",
        ),
    ),
    Mutant(
        "every_rank_judges_by_scores_of_its_own",
        _LOOP,
        "strategy.broadcast(scores.compute(strategy.gather))",
        "scores.compute(strategy.gather)",
        ("distributed/test_loop.py::test_rank_zeros_scores_count_whatever_the_others_compute",),
    ),
    Mutant(
        "the_live_weights_are_evaluated_and_not_their_average",
        _LOOP,
        "with strategy.averaged():",
        "with torch.no_grad():",
        ("distributed/test_average.py::test_the_average_is_evaluated_and_the_weights_come_back_to_the_same_bits",),
    ),
    Mutant(
        "every_rank_evaluates_with_the_batch_norm_statistics_of_its_own_rows",
        _LOOP,
        "    strategy.share_buffers()\n",
        "",
        ("distributed/test_evaluation.py::test_every_rank_evaluates_with_the_batch_norm_statistics_of_rank_zero",),
    ),
    Mutant(
        "a_run_ends_without_a_last_save",
        _LOOP,
        "if reason or run.agenda.save_is_due(state):",
        "if run.agenda.save_is_due(state):",
        (
            "distributed/test_saving.py::test_a_stop_signal_waits_for_the_save_in_flight_and_for_its_own",
            "distributed/test_resume.py",
        ),
    ),
    Mutant(
        "weights_that_no_update_has_changed_are_evaluated_again",
        _LOOP,
        "            state.evaluated_step = state.step\n",
        "",
        ("distributed/test_loop.py::test_after_a_skipped_update_the_same_weights_are_not_evaluated_again",),
    ),
    Mutant(
        "every_rank_draws_the_same_dropout",
        _TRAIN,
        'permutation_key(config.run.seed, ranks.rank, "rank")',
        'permutation_key(config.run.seed, 0, "rank")',
        ("distributed/test_resume.py", "distributed/test_loop.py", "distributed/test_language_runs.py"),
    ),
)

INTERVAL = (
    Mutant(
        "the_stop_vote_is_read_from_rank_zero_only",
        _INTERVAL,
        "stop_vote = max(int(ballot.stop_vote) for ballot in ballots)",
        "stop_vote = int(ballots[0].stop_vote)",
        ("distributed/test_loop.py::test_a_stop_that_one_rank_was_asked_for_stops_all_at_the_same_update",),
    ),
    Mutant(
        "every_rank_goes_by_its_own_pace_for_the_next_interval",
        _INTERVAL,
        "run.agenda.updates_until_vote = int(ballots[0].updates_in_a_second)",
        "run.agenda.updates_until_vote = run.agenda.updates_in_a_second()",
        ("distributed/test_loop.py::test_the_ranks_of_an_interval_go_by_the_pace_of_rank_zero",),
    ),
    Mutant(
        "the_rate_moves_on_with_updates_that_were_skipped",
        _INTERVAL,
        "self._applied += report.gradient.applied",
        "self._applied += 1",
        ("distributed/test_loop.py::test_how_often_reports_are_read_changes_no_bit_even_with_skipped_updates",),
    ),
    Mutant(
        "the_rate_that_is_told_moves_on_with_skipped_updates",
        _INTERVAL,
        "if self._write_line(report, parts, figures, seconds=seconds):\n                    rate",
        "self._write_line(report, [row[_BALLOT + index] for row in rows], figures, seconds=seconds)\n"
        "                if True:\n                    rate",
        ("distributed/test_loop.py::test_an_update_with_a_nan_is_skipped_by_all_ranks_and_counts_as_none",),
    ),
    Mutant(
        "the_loss_that_is_told_is_that_of_rank_zero",
        _INTERVAL,
        "math.fsum(of_ranks) for name",
        "of_ranks[0] for name",
        ("distributed/test_loop.py::test_the_textbook_loop_as_a_config_stops_at_the_same_epoch",),
    ),
    Mutant(
        "skipped_updates_are_counted_though_others_were_applied_between_them",
        _INTERVAL,
        "state.step, state.nonfinite_in_a_row = step, 0",
        "state.step = step",
        ("distributed/test_loop.py::test_how_often_reports_are_read_changes_no_bit_even_with_skipped_updates",),
    ),
    Mutant(
        "a_run_gives_up_one_skipped_update_late",
        _INTERVAL,
        "if self._state.nonfinite_in_a_row < limit:",
        "if self._state.nonfinite_in_a_row <= limit:",
        ("distributed/test_loop.py::test_a_run_gives_up_after_three_in_a_row_and_names_rank_and_parameter",),
    ),
    Mutant(
        "an_overflow_of_fp16_counts_towards_giving_up",
        _INTERVAL,
        "if scale > LEAST and all(map(math.isfinite, parts)):",
        "if scale < LEAST and all(map(math.isfinite, parts)):",
        ("distributed/test_fp16.py::test_overflows_cost_updates_and_do_not_end_a_run",),
    ),
    Mutant(
        "a_save_goes_on_when_rank_zero_has_written",
        _INTERVAL,
        "if all(ballot.is_written for ballot in ballots):",
        "if ballots[0].is_written:",
        ("distributed/test_saving.py::test_training_goes_on_while_the_disk_of_one_rank_does_not_answer",),
    ),
    Mutant(
        "a_rank_does_not_leave_the_time_for_its_last_save",
        _INTERVAL,
        "seconds_needed=seconds + self._state.save_seconds",
        "seconds_needed=seconds",
        ("distributed/test_saving.py::test_the_time_of_a_save_is_left_before_the_end_of_a_job",),
    ),
)

DDP = (
    Mutant(
        "ddp_warms_up_nothing",
        _DDP,
        "        if not isinstance(self.model, DistributedDataParallel):\n            return\n",
        "        return\n",
        (
            "distributed/test_loop.py::test_an_update_after_a_resume_has_the_bits_of_one_in_an_undisturbed_run",
            "distributed/test_checkpoints.py::test_a_rank_that_loads_is_and_goes_on_as_the_one_that_saved_to_the_bit",
        ),
    ),
    Mutant(
        "an_update_with_an_infinite_norm_is_applied",
        _DDP,
        "difference = norm - norm  # 0 for a finite norm and NaN for any other\n",
        "difference = torch.where(norm.isnan(), norm, 0.0)\n",
        ("distributed/test_zero.py::test_a_gradient_whose_norm_overflows_is_skipped_under_every_strategy",),
    ),
    Mutant(
        "a_momentum_whose_first_update_was_skipped_starts_from_anything",
        _DDP,
        "self.optimizer.found_inf = self._found_inf  # type: ignore[attr-defined]\n        self._start_momentum()\n",
        "self.optimizer.found_inf = self._found_inf  # type: ignore[attr-defined]\n",
        ("distributed/test_loop.py::test_a_first_update_that_is_skipped_leaves_nothing_behind",),
    ),
    Mutant(
        "noise_is_added_before_the_gradient_is_clipped",
        _DDP,
        "        coefficient = self._clip_gradients(gradients, norm)\n" + _FINITE + _NOISY,
        _NOISY + "        coefficient = self._clip_gradients(gradients, norm)\n" + _FINITE,
        ("distributed/test_gradient_noise.py::test_an_update_follows_the_clipped_gradient_and_the_noise",),
    ),
    Mutant(
        "nothing_of_nothing_is_no_number_after_clipping_by_value",
        _DDP,
        "return (clipped / norm).nan_to_num(nan=1.0)  # nothing of nothing is all of it",
        "return clipped / norm",
        ("distributed/test_zero.py::test_of_a_gradient_of_zeros_everything_is_left_by_clipping",),
    ),
    Mutant(
        "every_group_of_parameters_has_the_same_rate",
        _DDP,
        'learning_rate * group["lr_factor"] if "lr_factor" in group else learning_rate',
        "learning_rate",
        (
            "distributed/test_pretrained_runs.py::test_frozen_blocks_and_the_rate_of_each_depth_are_those_of_a_loop_by_hand",
        ),
    ),
    Mutant(
        "a_skipped_update_moves_the_average_of_ddp",
        _DDP,
        "self.average.update(applied)",
        "self.average.update(torch.ones_like(applied))",
        ("distributed/test_average.py::test_a_skipped_update_does_not_move_the_average",),
    ),
)

ZERO = (
    Mutant(
        "the_coefficient_that_zero_tells_is_not_limited_to_1",
        _ZERO,
        "coefficient = torch.clamp(max_norm / (norm + CLIP_EPSILON), max=1.0)",
        "coefficient = max_norm / (norm + CLIP_EPSILON)",
        (
            "distributed/test_zero.py::test_the_coefficient_that_is_told_is_the_one_that_was_applied_also_where_nothing_is_clipped",
        ),
    ),
    Mutant(
        "zero_reduces_with_every_micro_batch",
        _ZERO,
        "self._engine.set_gradient_accumulation_boundary(is_last)",
        "self._engine.set_gradient_accumulation_boundary(True)",
        ("distributed/test_reference.py::test_every_strategy_makes_the_same_update",),
    ),
    Mutant(
        "weights_that_zero_has_loaded_are_lost_with_the_next_update",
        _ZERO,
        "        self._engine.optimizer.refresh_fp32_params()\n",
        "",
        (
            "distributed/test_zero.py::test_resuming_under_the_same_stage_and_world_size_is_bitwise",
            "distributed/test_zero.py::test_a_checkpoint_of_any_strategy_loads_in_any_other_bit_for_bit",
        ),
    ),
    Mutant(
        "a_piece_of_a_loaded_moment_is_taken_from_the_beginning",
        _FRAGMENTS,
        "whole.reshape(-1).narrow(0, self.start, self.numel)",
        "whole.reshape(-1).narrow(0, 0, self.numel)",
        ("distributed/test_zero.py::test_a_checkpoint_of_any_strategy_loads_in_any_other_bit_for_bit",),
    ),
    Mutant(
        "the_padding_of_zero3_is_taken_for_a_part_of_the_weight",
        _FRAGMENTS,
        "numel = min(padded, parameter.ds_numel - start)",
        "numel = min(padded, parameter.ds_numel)",
        (
            "distributed/test_reference.py::test_every_strategy_makes_the_same_update",
            "distributed/test_zero.py",
        ),
    ),
    Mutant(
        "zero3_keeps_the_weights_that_an_evaluation_has_gathered",
        _ZERO,
        "        self._engine.empty_partition_cache()\n",
        "        return\n",
        ("distributed/test_zero.py::test_evaluating_under_zero3_leaves_weights_partitioned",),
    ),
    Mutant(
        "zero_tells_that_clipping_by_value_left_everything",
        _ZERO,
        "coefficient = (torch.linalg.vector_norm(self._norms(pieces)) / norm).nan_to_num(nan=1.0)",
        "pass",
        ("distributed/test_zero.py::test_clipping_by_value_limits_every_element_of_the_reduced_gradient",),
    ),
    Mutant(
        "an_overflow_of_the_norm_is_left_to_deepspeed",
        _ZERO,
        "                    piece.fill_(torch.nan)\n",
        "                    pass\n",
        ("distributed/test_zero.py::test_a_gradient_whose_norm_overflows_is_skipped_under_every_strategy",),
    ),
    Mutant(
        "every_group_of_zeros_parameters_has_the_same_rate",
        _ZERO,
        'rate * group.get("lr_factor", 1.0)',
        "rate",
        (
            "distributed/test_pretrained_runs.py::test_frozen_blocks_and_the_rate_of_each_depth_are_those_of_a_loop_by_hand",
        ),
    ),
    Mutant(
        "deepspeed_clips_what_is_clipped_by_value",
        _DEEPSPEED,
        "config.clip.max_norm if isinstance(config.clip, NormClip) else 0.0,",
        'getattr(config.clip, "max_norm", getattr(config.clip, "max_value", 0.0)),',
        ("test_deepspeed_config.py",),
    ),
    Mutant(
        "auto_within_a_section_is_left_to_deepspeed",
        _DEEPSPEED,
        "key: _without_auto(value) if isinstance(value, dict) else value",
        "key: value",
        ("test_deepspeed_config.py",),
    ),
)

AVERAGE_NOISE_SCALE = (
    Mutant(
        "an_average_remembers_the_weights_of_which_nothing_was_learned",
        _AVERAGE,
        "(1 - self._decay) / (1 - self._decay ** self.count.clamp(min=1))",
        "(1 - self._decay)",
        ("distributed/test_average.py::test_the_average_is_the_sum_of_its_formula",),
    ),
    Mutant(
        "the_variance_of_the_noise_starts_to_fall_one_update_late",
        _NOISE,
        "(1 + position) ** self._config.gamma",
        "max(1, position) ** self._config.gamma",
        ("distributed/test_gradient_noise.py",),
    ),
    Mutant(
        "noise_is_drawn_as_it_comes_and_not_by_the_position",
        _NOISE,
        'self._generator.manual_seed(permutation_key(self._seed, position, "gradient noise"))',
        'position or self._generator.manual_seed(permutation_key(self._seed, position, "gradient noise"))',
        ("distributed/test_gradient_noise.py",),
    ),
    Mutant(
        "the_scale_of_fp16_doubles_with_every_update_once_it_has",
        _SCALE,
        "self._applied_in_a_row = in_a_row * ~grows",
        "self._applied_in_a_row = in_a_row - grows.long()",
        ("test_loss_scale.py",),
    ),
    Mutant(
        "a_resumed_run_counts_anew_until_its_scale_doubles",
        _SCALE,
        '        self._applied_in_a_row = torch.full_like(self._applied_in_a_row, state["applied_in_a_row"])\n',
        "",
        ("test_loss_scale.py",),
    ),
)

ORDER = (
    Mutant(
        "every_epoch_has_the_order_of_the_first",
        _ORDER,
        "permute(places, size=self.num_rows, key=permutation_key(self.seed, epoch))",
        "permute(places, size=self.num_rows, key=permutation_key(self.seed, 0))",
        ("test_order.py",),
    ),
    Mutant(
        "rows_that_do_not_divide_over_the_ranks_are_left_out",
        _ORDER,
        "return start + rank * rows // self.world_size, start + (rank + 1) * rows // self.world_size",
        "rows //= self.world_size\n        return start + rank * rows, start + (rank + 1) * rows",
        ("test_order.py",),
    ),
    Mutant(
        "a_rank_with_fewer_rows_has_fewer_micro_batches",
        _ORDER,
        "largest_share = -(-self.rows_at(position) // self.world_size)",
        "largest_share = stop - start",
        ("test_order.py",),
    ),
    Mutant(
        "every_epoch_has_the_same_sample_of_a_large_class",
        _ORDER,
        'permutation_key(self._seed, epoch, f"class {label}")',
        'permutation_key(self._seed, 0, f"class {label}")',
        ("test_order.py",),
    ),
    Mutant(
        "the_first_row_of_a_shard_is_looked_for_in_the_one_before",
        _ORDER,
        'np.searchsorted(ends, places, side="right")',
        'np.searchsorted(ends, places, side="left")',
        ("test_shards.py",),
    ),
    Mutant(
        "rows_are_looked_up_past_the_end_of_the_epoch",
        _BATCHES,
        "num_full = plan.num_rows // plan.global_batch - position % plan.steps_per_epoch",
        "num_full = plan.steps_per_epoch - position % plan.steps_per_epoch",
        ("test_batches.py",),
    ),
    Mutant(
        "images_are_changed_in_the_same_way_every_epoch",
        _BATCHES,
        "self._augmentation.draw(places, epoch=plan.epoch_of(position))",
        "self._augmentation.draw(places, epoch=0)",
        ("test_augment.py",),
    ),
    Mutant(
        "rows_with_other_inputs_pass_for_the_same_data",
        "harness/rows/rows.py",
        "for column in (self.targets, self.inputs[::every]):",
        "for column in (self.targets,):",
        ("test_batches.py::test_a_digest_tells_another_number_of_rows_another_input_and_another_target_apart",),
    ),
    Mutant(
        "a_balanced_run_sees_its_rows_as_they_come",
        _ASSEMBLE,
        'if config.data.sampling == "uniform":',
        'if config.data.sampling != "even":',
        ("distributed/test_sampling.py",),
    ),
)
