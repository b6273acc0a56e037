"""Mistakes in what a user brings: his rows, his loss, and what a run promises with them."""

from tests.mutants.mutant import Mutant

_ADAPTED, _OWN, _BATCHES = "harness/tasks/adapted.py", "harness/rows/own.py", "harness/rows/batches.py"
_FIRST, _HIDDEN = "harness/doctor/first_rows.py", "harness/doctor/hidden_state.py"
_PROMISES, _UNUSED, _DDP = "harness/doctor/promises.py", "harness/strategy/unused.py", "harness/strategy/ddp.py"
_SCORES, _INTERVAL, _LOOP, _FITS = "harness/scores.py", "harness/interval.py", "harness/loop.py", "harness/fits.py"
_ORDER, _LENGTHS, _BY_LENGTH = (
    "harness/rows/order.py",
    ("test_by_length.py",),
    ("distributed/test_by_length_runs.py",),
)
_TESTS, _ROWS = ("distributed/test_promises.py",), ("test_own_rows.py",)
_TASKS, _PARTS = ("test_adapted.py",), ("distributed/test_own_parts.py",)

OPENING = (
    Mutant(
        "the_loss_of_a_user_is_a_mean_over_his_batch",
        _ADAPTED,
        "return {name: values.sum() for name, values in terms.items()}",
        "return {name: values.mean() for name, values in terms.items()}",
        (*_TASKS, *_PARTS),
    ),
    Mutant(
        "a_weight_below_zero_is_taken",
        _ADAPTED,
        "torch.where((weights < 0).any(), torch.nan, 0.0)",
        "0.0",
        (*_TASKS, *_TESTS),
    ),
    Mutant(
        "a_loss_that_is_no_number_counts_where_its_weight_is_zero",
        _ADAPTED,
        "torch.where((weights == 0) & ~values.isfinite(), 0.0, values * weights)",
        "values * weights",
        _TASKS,
    ),
    Mutant(
        "other_terms_of_a_loss_are_not_weighted",
        _ADAPTED,
        "return {name: _weighted(values, weights).sum() for name, values in terms.items()}",
        "return {n: (_weighted(v, weights) if n == LOSS else v).sum() for n, v in terms.items()}",
        _TASKS,
    ),
    Mutant(
        "a_row_draws_alike_in_every_epoch",
        _OWN,
        'seeds = random_bits(self._ids[ids], key=permutation_key(self._seed, epoch, "row")).tolist()',
        'seeds = random_bits(self._ids[ids], key=permutation_key(self._seed, 0, "row")).tolist()',
        _ROWS,
    ),
    Mutant(
        "what_a_row_draws_depends_on_its_place_in_the_batch",
        _OWN,
        'seeds = random_bits(self._ids[ids], key=permutation_key(self._seed, epoch, "row")).tolist()',
        'seeds = random_bits(np.arange(len(ids)), key=permutation_key(self._seed, epoch, "row")).tolist()',
        _ROWS,
    ),
    Mutant(
        "rows_leave_their_random_state_to_the_process",
        _OWN,
        "        torch.set_rng_state(own)\n",
        "",
        _ROWS,
    ),
    Mutant(
        "rows_that_train_also_validate",
        _OWN,
        "(rows.only(part) if isinstance(rows, DatasetRows) else _only(rows, part) for part in ids)",
        "(rows.only(ids[0]) if isinstance(rows, DatasetRows) else _only(rows, ids[0]) for part in ids)",
        _ROWS,
    ),
    Mutant(
        "a_row_that_only_keeps_ranks_company_may_be_nan",
        _BATCHES,
        "return leaf.nan_to_num() if isinstance(leaf, Tensor) and leaf.is_floating_point() else leaf",
        "return leaf",
        ("distributed/test_own_mixed.py",),
    ),
    Mutant(
        "rows_that_depend_on_each_other_are_not_told",
        _FIRST,
        "    if not differs.any():",
        "    if True:",
        _TESTS,
    ),
    Mutant(
        "ranks_may_build_other_weights",
        _HIDDEN,
        "if found.get(name) != of_ranks[0].get(name)]",
        "if found.get(name) is None]",
        _TESTS,
    ),
    Mutant(
        "state_that_is_no_buffer_is_not_told",
        _HIDDEN,
        "        if value != before[name].get(attribute)\n",
        "        if False\n",
        _TESTS,
    ),
    Mutant(
        "the_order_of_module_calls_is_that_of_rank_zero",
        _PROMISES,
        "same_calls = len(set(ranks.gather_objects(calls))) == 1",
        "same_calls = len(set(ranks.gather_objects(calls)[:1])) == 1",
        _TESTS,
    ),
    Mutant(
        "a_head_of_training_alone_is_frozen",
        _UNUSED,
        "always=[name for name in trainable if name not in used],",
        "always=[name for name in trainable if name not in in_eval_mode],",
        _TESTS,
    ),
    Mutant(
        "ddp_warms_up_in_eval_mode",
        _DDP,
        "            self.backward(zero_of(forward()))\n",
        "            self.model.eval()\n            self.backward(zero_of(forward()))\n",
        _TESTS,
    ),
    Mutant(
        "a_rank_without_rows_may_wait_for_a_head_of_training",
        _FITS,
        "    for position in {0, plan.steps_per_epoch - 1} if only_in_training else ():",
        "    for position in ():",
        _TESTS,
    ),
    Mutant(
        "a_window_is_sorted_and_its_batches_stay_so",
        _ORDER,
        "batches[permute(np.arange(len(batches)), size=len(batches), key=key)].ravel()",
        "batches.ravel()",
        _LENGTHS,
    ),
    Mutant(
        "a_whole_epoch_is_one_window",
        _ORDER,
        "max(min(4, self._num_batches), -(-self._num_batches // WINDOW_BATCHES))",
        "min(1, self._num_batches)",
        _LENGTHS,
    ),
    Mutant(
        "a_window_of_another_epoch_is_taken_for_the_last",
        _ORDER,
        "if (last_epoch, last_window) == (epoch, window):",
        "if last_window == window:",
        _LENGTHS,
    ),
    Mutant(
        "a_micro_batch_is_measured_by_its_last_row",
        _ORDER,
        "            if length > longest:\n",
        "            if True:\n",
        _LENGTHS,
    ),
    Mutant(
        "a_rank_has_as_many_micro_batches_as_its_own_tokens_want",
        _ORDER,
        "found.append(of_ranks[rank] + [0] * num_empty)",
        "found.append(of_ranks[rank])",
        _LENGTHS,
    ),
    Mutant(
        "all_updates_of_a_block_have_as_many_micro_batches",
        _BATCHES,
        "self._firsts = list(accumulate(map(len, sizes), initial=0))",
        "self._firsts = [len(sizes[0]) * index for index in range(len(sizes) + 1)]",
        ("test_batches.py",),
    ),
    Mutant(
        "validation_is_in_batches_of_any_number_of_tokens",
        _BATCHES,
        "            token_limit=token_limit,\n",
        "            token_limit=None,\n",
        _LENGTHS,
    ),
    Mutant(
        "a_split_has_the_lengths_of_the_first_rows",
        _OWN,
        "of_all[self._ids]",
        "of_all[: len(self)]",
        _ROWS,
    ),
    Mutant(
        "batch_norm_may_meet_one_row_of_many_tokens",
        _FITS,
        "    if _is_cut_by_tokens(plan):\n",
        "    if False:\n",
        _LENGTHS,
    ),
    Mutant(
        "a_rank_without_rows_by_tokens_may_wait_for_a_head_of_training",
        _FITS,
        "if only_in_training and plan.world_size > 1 and _is_cut_by_tokens(plan):",
        "if False:",
        _LENGTHS,
    ),
    Mutant(
        "lengths_may_differ_between_ranks",
        _FITS,
        "if of_rank != digests[0]]:",
        "if of_rank is None]:",
        _BY_LENGTH,
    ),
    Mutant(
        "other_lengths_go_on_in_another_order",
        "harness/saving.py",
        "        if changed:\n",
        "        if False:\n",
        _BY_LENGTH,
    ),
    Mutant(
        "a_metric_may_be_a_maximum",
        _SCORES,
        "    if not isinstance(metric, Metric):\n        return\n    for state",
        "    if True:\n        return\n    for state",
        _TASKS,
    ),
    Mutant(
        "the_terms_of_all_updates_are_those_of_the_first",
        _INTERVAL,
        "first = index * len(report.terms)",
        "first = 0",
        ("distributed/test_own_examples.py", "distributed/test_loop.py"),
    ),
)
