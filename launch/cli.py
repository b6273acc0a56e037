"""The `harness` command. A wrong configuration is answered here, before torch is imported anywhere."""

import argparse
import difflib
import os
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from harness.config.io import load_config
from harness.config.sweep import swept
from harness.errors import ConfigError, HarnessError
from launch import torchrun
from launch.plan import choose_ranks, launch_plan, this_machine
from launch.summary import summary
from launch.verify import checkpoint_lines

TRAIN_MODULE, EXPORT_MODULE, DATA_MODULE = "harness.train", "harness.export", "harness.data.prepare"
TRACK_MODULE = "harness.track"


def main(argv: list[str] | None = None) -> int:
    """Run one command and return its exit code."""
    arguments = sys.argv[1:] if argv is None else argv
    try:
        if not arguments or arguments[0] in ("-h", "--help"):
            print(help_text())
            return 0 if arguments else ConfigError.exit_code
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
    return torchrun.run(plan)


def check(arguments: list[str]) -> int:
    """validate a configuration and say what it would do; starts nothing"""
    given = _parser(check).parse_intermixed_args(arguments)
    loaded = load_config(given.config, given.overrides, world_size=given.gpus)
    options = [] if given.gpus is None else ["--gpus", str(given.gpus)]
    command = shlex.join(["harness", "launch", given.config, *options, *given.overrides])
    print(summary(loaded, ranks=given.gpus, command=command))
    return 0


def verify(arguments: list[str]) -> int:
    """read every byte of a run's checkpoints and say which are whole"""
    parser = _Parser(prog="harness verify", description=verify.__doc__, allow_abbrev=False)
    parser.add_argument("run", metavar="RUN", type=Path, help="a run directory, such as runs/mnist-cnn")
    for line in checkpoint_lines(parser.parse_args(arguments).run):
        print(line, flush=True)
    return 0


def export(arguments: list[str]) -> int:
    """take the network out of a run, as model.safetensors and config.json"""
    os.execv(sys.executable, [sys.executable, "-m", EXPORT_MODULE, *arguments])


def track(arguments: list[str]) -> int:
    """send what wandb does not have yet of a run: harness track sync RUN"""
    os.execv(sys.executable, [sys.executable, "-m", TRACK_MODULE, *arguments])


def data(arguments: list[str]) -> int:
    """write the data of the examples under a folder: harness data prepare NAME"""
    os.execv(sys.executable, [sys.executable, "-m", DATA_MODULE, *arguments])


COMMANDS = {
    "train": train,
    "launch": launch,
    "check": check,
    "verify": verify,
    "export": export,
    "data": data,
    "track": track,
}


def help_text() -> str:
    """Return what `harness --help` prints."""
    lines = [f"  {name:8}{command.__doc__}" for name, command in COMMANDS.items()]
    usage = "usage: harness COMMAND CONFIG|RUN [key=value ...]       (harness COMMAND --help says more)"
    return "\n".join([usage, "", *lines])


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{self.prog}: {message} (see {self.prog} --help)")


def _parser(command: Callable[[list[str]], int]) -> argparse.ArgumentParser:
    parser = _Parser(prog=f"harness {command.__name__}", description=command.__doc__, allow_abbrev=False)
    parser.add_argument("config", metavar="CONFIG", help="a YAML file, such as configs/mnist_cnn.yaml")
    parser.add_argument("overrides", metavar="key=value", nargs="*", default=[], help="such as optim.peak_lr=3e-4")
    gpus_help = "number of ranks: one a GPU, or CPU ranks where there is no GPU"
    parser.add_argument("--gpus", metavar="N", type=_count(1), help=gpus_help)
    return parser


def _count(at_least: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        if not (text.isdecimal() and int(text) >= at_least):
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least {at_least}")
        return int(text)

    return parse


if __name__ == "__main__":
    sys.exit(main())
