"""Mistakes in what a user brings: his rows, his loss, and what a run promises with them."""

from tests.mutants.mutant import Mutant

_ADAPTED, _OWN, _BATCHES = "harness/tasks/adapted.py", "harness/rows/own.py", "harness/rows/batches.py"
_FIRST, _HIDDEN = "harness/doctor/first_rows.py", "harness/doctor/hidden_state.py"
_PROMISES, _UNUSED, _DDP = "harness/doctor/promises.py", "harness/strategy/unused.py", "harness/strategy/ddp.py"
_SCORES, _INTERVAL, _LOOP, _FITS = "harness/scores.py", "harness/interval.py", "harness/loop.py", "harness/fits.py"
_TESTS, _ROWS = ("distributed/test_promises.py",), ("test_own_rows.py",)
_COLLATE, _COLLATED, _PADDING = "harness/rows/collate.py", ("test_collate.py",), ("distributed/test_padding.py",)
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
    Mutant(
        "rows_are_padded_at_their_beginnings",
        _COLLATE,
        "place[tuple(map(slice, tensor.shape))] = tensor",
        "place[tuple(slice(place.shape[d] - n, None) for d, n in enumerate(tensor.shape))] = tensor",
        _COLLATED,
    ),
    Mutant(
        "a_size_in_which_no_row_differs_is_rounded_up",
        _COLLATE,
        "[new if is_ragged else old for",
        "[new for",
        _COLLATED,
    ),
    Mutant(
        "a_fill_that_a_type_does_not_hold_pads",
        _COLLATE,
        "    if not holds:\n",
        "    if False:\n",
        _COLLATED,
    ),
    Mutant(
        "a_name_that_no_tensor_has_is_not_told",
        _COLLATE,
        "        if name not in tensors:\n",
        "        if False:\n",
        _COLLATED,
    ),
    Mutant(
        "a_key_that_one_row_has_alone_is_dropped",
        _COLLATE,
        "    if len(set(map(len, rows))) > 1:\n",
        "    if isinstance(first, list | tuple) and len(set(map(len, rows))) > 1:\n",
        _COLLATED,
    ),
    Mutant(
        "a_worker_gives_all_rows_the_type_of_the_first",
        _COLLATE,
        "if get_worker_info() is not None and len(",
        "if False and len(",
        _COLLATED,
    ),
    Mutant(
        "a_part_of_the_rows_is_not_padded",
        _OWN,
        "ids=self._ids[ids], pad=self._pad)",
        "ids=self._ids[ids])",
        _COLLATED,
    ),
    Mutant(
        "what_the_run_pads_may_count_in_the_loss",
        _OWN,
        "return self._collate is not None or self._pad is not None",
        "return self._collate is not None",
        _TESTS,
    ),
    Mutant(
        "padding_that_reaches_a_row_is_not_named",
        _PROMISES,
        'of_padding = OF_PADDING if company and may_pad(batches) else ""',
        'of_padding = ""',
        _PADDING,
    ),
)
