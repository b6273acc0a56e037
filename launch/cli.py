"""The `harness` command. A wrong configuration is answered here, before torch is imported anywhere."""

import argparse
import difflib
import os
import platform
import shlex
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path, PurePath
from typing import NoReturn

from harness.config.io import load_config
from harness.config.signature import SLOTS, key_texts
from harness.config.sweep import swept
from harness.config.use import load_used, refuse_while_loading
from harness.errors import ConfigError, HarnessError, RunInUseError
from harness.launch import torchrun
from harness.launch.examples import write_examples
from harness.launch.look import look_at_data
from harness.launch.plan import choose_ranks, launch_plan, this_machine
from harness.launch.runs import SORT_KEYS, as_json, as_table, statuses
from harness.launch.selftest import Selftest, ways_of
from harness.launch.slurm import status as run_status
from harness.launch.slurm.cluster import load_cluster, with_options
from harness.launch.slurm.submit import TRAIN_MODULE, check_with_slurm, prepare
from harness.launch.slurm.submit import submit as submit_job
from harness.launch.slurm.sweep import Sweep, runs_of, task_name
from harness.launch.summary import summary
from harness.launch.verify import checkpoint_lines
from harness.parts import parts_of
from harness.ranks.process import pin_packages
from harness.record.exit_file import ExitFile
from harness.record.provenance import versions
from harness.report.at_end import write_report

EXPORT_MODULE, DATA_MODULE = "harness.export", "harness.examples.prepare"
REPORT_MODULE, TRACK_MODULE = "harness.report", "harness.tracking.track"


def command() -> NoReturn:
    """Run the command of this process."""
    pin_packages(os.environ)
    sys.exit(main())


def main(argv: list[str] | None = None) -> int:
    """Run one command and return its exit code."""
    arguments = sys.argv[1:] if argv is None else argv
    refuse_while_loading("harness")
    try:
        if not arguments or arguments[0] in ("-h", "--help"):
            print(help_text())
            return 0 if arguments else ConfigError.exit_code
        if arguments[0] == "--version":
            print(version_text())
            return 0
        name, *rest = arguments
        if name not in COMMANDS:
            nearest = difflib.get_close_matches(name, COMMANDS, n=1, cutoff=0.5)
            known = f"nearest: harness {nearest[0]}" if nearest else f"choose from {', '.join(COMMANDS)}"
            raise ConfigError(f"harness {name}: there is no such command; {known}")
        return COMMANDS[name](rest)
    except HarnessError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        return torchrun.EXIT_KILLED
    except BrokenPipeError:  # of `harness runs | head`; what is still to be flushed goes nowhere
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE


def train(arguments: list[str]) -> int:
    """train one rank here, in the foreground"""
    os.execv(sys.executable, [sys.executable, "-m", TRAIN_MODULE, *arguments])


def launch(arguments: list[str]) -> int:
    """train on this machine: all its GPUs, or CPU ranks"""
    parser = _parser(launch)
    restarts_help = "start again so often after a crash (default 0)"
    parser.add_argument("--max-restarts", metavar="K", type=_count(0), default=0, help=restarts_help)
    given = parser.parse_intermixed_args(arguments)
    machine = this_machine()
    ranks = choose_ranks(given.gpus, machine)
    config = load_config(given.config, given.overrides, world_size=ranks).config
    if config.tracking.wandb:
        given.overrides = swept(given.overrides, name=config.run.name)
        config = load_config(given.config, given.overrides, world_size=ranks).config
    path = given.config if not given.config.startswith("-") else f"./{given.config}"
    plan = launch_plan(
        [TRAIN_MODULE, path, *given.overrides],
        run_directory=config.run_directory,
        ranks=ranks,
        machine=machine,
        max_restarts=given.max_restarts,
    )
    exit_file = ExitFile(config.run_directory)
    code = torchrun.run(plan)
    was_killed = exit_file.new_code() is None and code not in (RunInUseError.exit_code, torchrun.EXIT_KILLED)
    if was_killed and config.tracking.report and (config.run_directory / "run.json").exists():
        write_report(config.run_directory)  # rank zero could not
    return code


def submit(arguments: list[str]) -> int:
    """train as a Slurm job"""
    parser = _parser(submit)
    parser.add_argument("--cluster", metavar="FILE", required=True, help="such as slurm/cluster.example.yaml")
    parser.add_argument("--nodes", metavar="N", type=_count(1), help="instead of the cluster file's")
    parser.add_argument("--time-limit-minutes", metavar="M", type=_count(1), help="instead of the cluster file's")
    parser.add_argument(
        "--sweep", metavar="GRID", help="a run for each of these values, such as slurm/sweep.example.yaml"
    )
    parser.add_argument("--at-once", metavar="N", type=_count(1), help="how many runs of a sweep may train at once")
    only = parser.add_mutually_exclusive_group()
    only.add_argument("--dry-run", action="store_true", help="print the job's script; needs no Slurm")
    only.add_argument("--check", action="store_true", help="have Slurm judge the script, and queue nothing")
    given = parser.parse_intermixed_args(arguments)
    if given.at_once and not given.sweep:
        parser.error("argument --at-once: it is about the runs of a --sweep")
    cluster = with_options(
        load_cluster(given.cluster), nodes=given.nodes, gpus=given.gpus, time_limit_minutes=given.time_limit_minutes
    )
    loaded = load_config(given.config, given.overrides)
    sweep = given.sweep and Sweep(given.config, given.overrides, given.sweep, cluster, at_once=given.at_once)
    submission = sweep.submission(range(len(sweep.tasks))) if sweep else prepare(loaded, cluster)
    if given.dry_run:
        print(submission.script, end="")
        return 0
    for notice in loaded.notices:
        print(f"notice: {notice}")
    if given.check:
        print(check_with_slurm(submission))
    elif sweep:
        job, indices = sweep.submit()
        for index in indices:
            print(f"job {job}_{index}: {sweep.directory / task_name(index)}  {' '.join(sweep.tasks[index])}")
    else:
        print(f"job {submit_job(submission)}: {submission.script_path}")
    return 0


def check(arguments: list[str]) -> int:
    """validate a configuration, or several, and say what they would do; starts nothing"""
    parser = _parser(check)
    parser.add_argument("--no-data", action="store_true", help="do not look at the first rows of the data")
    given = parser.parse_intermixed_args(arguments)
    more = [text for text in given.overrides if PurePath(text).suffix in (".yaml", ".yml") and "=" not in text]
    overrides = [text for text in given.overrides if text not in more]
    settings = {"ranks": given.gpus, "is_alone": not more, "looks": not given.no_data}
    return max(_check_one(path, overrides, **settings) for path in (given.config, *more))


def _check_one(path: str, overrides: Sequence[str], *, ranks: int | None, is_alone: bool, looks: bool) -> int:
    options = [] if ranks is None else ["--gpus", str(ranks)]
    command = shlex.join(["harness", "launch", path, *options, *overrides])
    try:
        loaded = load_config(path, overrides, world_size=ranks)
        text = summary(loaded, ranks=ranks, command=command)
    except ConfigError as error:  # the other files are looked at all the same
        print(error, file=sys.stderr)
        return error.exit_code
    print(text if is_alone else f"{path}\n{text}\n", flush=True)
    return look_at_data(loaded.config) if looks else 0


def selftest(arguments: list[str]) -> int:
    """try on your own files what a run promises: some updates on 1 and 2 ranks, killed and resumed"""
    parser = _parser(selftest, has_gpus=False)
    kinds_help = "such as ddp,zero3; default: the configuration's own"
    parser.add_argument("--strategies", metavar="KIND,KIND", type=_names, default=(), help=kinds_help)
    ranks_help = "default 1,2: one a GPU, or CPU ranks where there is no GPU"
    parser.add_argument("--ranks", metavar="N,N", type=_counts, default=(1, 2), help=ranks_help)
    given = parser.parse_intermixed_args(arguments)
    ways = ways_of(given.config, given.overrides, given.strategies, given.ranks, machine=this_machine())
    return Selftest(ways).run()


def parts(arguments: list[str]) -> int:
    """list the kinds of models, data, tasks and trackers, and where they come from"""
    parser = _Parser(prog="harness parts", description=parts.__doc__, allow_abbrev=False)
    parser.add_argument("use", metavar="FILE", nargs="*", help="such as my_parts.py, whose code is run")
    used = load_used(parser.parse_args(arguments).use, folder=Path.cwd(), is_typed=True)
    known = parts_of(used.modules)
    for slot in SLOTS:
        for kind, part in sorted(known.of(slot).items()):
            keys = ", ".join(f"{name}: {text}" for name, text in key_texts(part.section).items())
            print(f"{slot:8}{kind:16}{part.origin}{f'; keys {keys}' if keys else ''}")
    return 0


def verify(arguments: list[str]) -> int:
    """read every byte of a run's checkpoints and say which are whole"""
    for line in checkpoint_lines(_run_parser(verify).parse_args(arguments).run):
        print(line, flush=True)
    return 0


def status(arguments: list[str]) -> int:
    """say how runs and their Slurm jobs stand"""
    parser = _run_parser(status, several=True)
    for directory in parser.parse_args(arguments).run:
        for run, overrides in runs_of(directory).items():
            print("  ".join([run_status.status_of(run).line(), *overrides]), flush=True)
    return 0


def tail(arguments: list[str]) -> int:
    """follow what rank zero of a job says"""
    return run_status.tail(_run_parser(tail).parse_args(arguments).run)


def cancel(arguments: list[str]) -> int:
    """end the Slurm job of a run, or the jobs of a sweep; what was saved stays"""
    for line in run_status.cancel(runs_of(_run_parser(cancel).parse_args(arguments).run)):
        print(line)
    return 0


def examples(arguments: list[str]) -> int:
    """write the example configurations and the cluster file into a folder"""
    parser = _Parser(prog="harness examples", description=examples.__doc__, allow_abbrev=False)
    parser.add_argument("folder", metavar="FOLDER", type=Path, help="such as . for this one")
    for line in write_examples(parser.parse_args(arguments).folder):
        print(line)
    return 0


def export(arguments: list[str]) -> int:
    """take the network out of a run, as model.safetensors and config.json"""
    os.execv(sys.executable, [sys.executable, "-m", EXPORT_MODULE, *arguments])


def data(arguments: list[str]) -> int:
    """write the data of the examples under a folder: harness data prepare NAME"""
    os.execv(sys.executable, [sys.executable, "-m", DATA_MODULE, *arguments])


def runs(arguments: list[str]) -> int:
    """list the runs below a folder: state, step, best score, age, strategy, ranks"""
    parser = _Parser(prog="harness runs", description=runs.__doc__, allow_abbrev=False)
    parser.add_argument("root", metavar="ROOT", type=Path, nargs="?", default=Path("runs"), help="default: runs")
    parser.add_argument("--sort", choices=SORT_KEYS, default="age", help="default: age, the youngest first")
    parser.add_argument("--reverse", action="store_true", help="the other way round")
    parser.add_argument("--json", action="store_true", help="for programs")
    parser.add_argument("--all", action="store_true", help="also those that failed before their first update")
    given = parser.parse_args(arguments)
    found = statuses(given.root, sort=given.sort, is_reversed=given.reverse)
    kept = [run for run in found if given.all or not run.failed_to_start]
    print(as_json(kept) if given.json else as_table(kept, root=given.root), flush=True)
    if not given.json and (num := len(found) - len(kept)):
        print(f"left out: {num} that failed before the first update (--all)", flush=True)
    return 0


def report(arguments: list[str]) -> int:
    """draw one or several runs: one HTML file that opens anywhere"""
    os.execv(sys.executable, [sys.executable, "-m", REPORT_MODULE, *arguments])


def track(arguments: list[str]) -> int:
    """send what wandb does not have yet of a run: harness track sync RUN"""
    os.execv(sys.executable, [sys.executable, "-m", TRACK_MODULE, *arguments])


COMMANDS = {
    "train": train,
    "launch": launch,
    "submit": submit,
    "check": check,
    "selftest": selftest,
    "parts": parts,
    "examples": examples,
    "data": data,
    "runs": runs,
    "status": status,
    "tail": tail,
    "cancel": cancel,
    "report": report,
    "track": track,
    "verify": verify,
    "export": export,
}


def version_text() -> str:
    """Return what `harness --version` prints."""
    found = {**versions(), "Python": platform.python_version()}
    return f"{', '.join(map(' '.join, found.items()))}; {Path(__file__).parents[1]}"


def help_text() -> str:
    """Return what `harness --help` prints."""
    lines = [f"  {name:9}{command.__doc__}" for name, command in COMMANDS.items()]
    usage = "usage: harness COMMAND CONFIG|RUN [key=value ...]       (harness COMMAND --help says more)"
    return "\n".join([usage, "", *lines])


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{self.prog}: {message} (see {self.prog} --help)")


def _parser(command: Callable[[list[str]], int], *, has_gpus: bool = True) -> argparse.ArgumentParser:
    parser = _Parser(prog=f"harness {command.__name__}", description=command.__doc__, allow_abbrev=False)
    parser.add_argument("config", metavar="CONFIG", help="a YAML file, such as configs/mnist_cnn.yaml")
    parser.add_argument("overrides", metavar="key=value", nargs="*", default=[], help="such as optim.peak_lr=3e-4")
    gpus_help = "number of ranks: one a GPU, or CPU ranks where there is no GPU"
    if has_gpus:
        parser.add_argument("--gpus", metavar="N", type=_count(1), help=gpus_help)
    return parser


def _run_parser(command: Callable[[list[str]], int], *, several: bool = False) -> argparse.ArgumentParser:
    parser = _Parser(prog=f"harness {command.__name__}", description=command.__doc__, allow_abbrev=False)
    number = {"nargs": "+"} if several else {}
    parser.add_argument("run", metavar="RUN", type=Path, help="a run directory, such as runs/mnist-cnn", **number)  # type: ignore[arg-type]
    return parser


def _count(at_least: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        if not (text.isdecimal() and int(text) >= at_least):
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least {at_least}")
        return int(text)

    return parse


def _names(text: str) -> tuple[str, ...]:
    return tuple(dict.fromkeys(text.split(",")))


def _counts(text: str) -> tuple[int, ...]:
    return tuple(sorted({_count(1)(count) for count in text.split(",")}))


if __name__ == "__main__":
    command()
