"""Mistakes in what reads the rows of a Dataset: random numbers, worker processes, what a resumed run compares."""

from tests.mutants.mutant import Mutant

_DRAWS, _DATASET, _LOADER = "harness/rows/draws.py", "harness/rows/dataset.py", "harness/rows/loader.py"
_FILES = "harness/rows/open_files.py"
_TESTS, _STATES = ("test_loader.py",), ("test_draws.py",)

LOADING = (
    Mutant(
        "nobody_looks_whether_rows_draw",
        _DATASET,
        "            self._draws = draws.drew(before, draws.state())\n",
        "",
        _TESTS,
    ),
    Mutant(
        "the_random_state_of_the_process_is_lost",
        _DATASET,
        "            draws.restore(before)\n",
        "            pass\n",
        _TESTS,
    ),
    Mutant(
        "a_generator_that_is_seeded_from_torchs_seed_is_not_seen",
        _DATASET,
        "            self._draws |= seen[1] != seen[2]\n",
        "",
        _TESTS,
    ),
    Mutant(
        "rows_that_are_asked_for_at_once_are_believed",
        _DATASET,
        "return [_digest(row) for row in self._dataset.__getitems__(numbers)] == alone",
        "return True",
        _TESTS,
    ),
    Mutant(
        "rows_that_are_never_the_same_refuse_a_resume",
        _DATASET,
        'others = [number for number in others if self._seen(number) == now["rows"][str(number)]]',
        "others = list(others)",
        _TESTS,
    ),
    Mutant(
        "what_collate_draws_is_not_noted",
        _DATASET,
        "self.collate_draws = draws.drew(before, draws.state())",
        "self.collate_draws = False",
        _TESTS,
    ),
    Mutant(
        "a_second_number_of_randn_is_forgotten",
        _DRAWS,
        'self._words = b"" if self._state["has_gauss"] else words',
        "self._words = words",
        _STATES,
    ),
    Mutant(
        "a_second_number_of_gauss_is_forgotten",
        _DRAWS,
        "        or before.python_spare != after.python_spare\n",
        "",
        _STATES,
    ),
    Mutant(
        "a_state_that_was_put_back_is_read_as_the_one_before",
        _DRAWS,
        '        np.random.set_state(state)\n        self._words = b""\n',
        "        np.random.set_state(state)\n",
        _STATES,
    ),
    Mutant(
        "the_loader_draws_from_the_generator_of_the_run",
        _LOADER,
        "                generator=torch.Generator(),  # or it would draw from the process's own\n",
        "",
        _TESTS,
    ),
    Mutant(
        "the_death_of_a_worker_is_raised_anywhere",
        _LOADER,
        "            signal.signal(signal.SIGCHLD, on_death)",
        "            pass",
        _TESTS,
    ),
    Mutant(
        "a_signal_of_the_rank_ends_its_workers",
        _LOADER,
        "            signal.signal(number, signal.SIG_IGN)\n",
        "            signal.signal(number, signal.SIG_DFL)\n",
        _TESTS,
    ),
    Mutant(
        "workers_outlive_their_rank",
        _LOADER,
        "        die_with_parent(parent=self._rank)\n",
        "",
        _TESTS,
    ),
    Mutant(
        "workers_hold_the_connections_of_their_rank",
        _LOADER,
        "        _leave_connections()\n",
        "",
        _TESTS,
    ),
    Mutant(
        "a_rank_that_fails_waits_for_its_workers_for_ever",
        _LOADER,
        "        atexit.register(self.close)  # before multiprocessing asks them to end, and waits\n",
        "",
        _TESTS,
    ),
    Mutant(
        "a_long_tmpdir_is_taken_for_sockets",
        _LOADER,
        "        _find_short_folder()\n",
        "",
        _TESTS,
    ),
    Mutant(
        "workers_share_what_their_rank_holds_open",
        _LOADER,
        "            if self._makes_again:\n",
        "            if False:\n",
        _TESTS,
    ),
    Mutant(
        "small_tensors_lose_their_numbers_on_the_way",
        _LOADER,
        "return _Numbers(leaf.numpy(force=True))",
        "return _Numbers(0 * leaf.numpy(force=True))",
        _TESTS,
    ),
    Mutant(
        "a_mapped_file_is_taken_for_a_handle",
        _FILES,
        "return sorted(still - mapped)",
        "return sorted(still)",
        _TESTS,
    ),
)
