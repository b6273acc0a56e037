"""What Slurm is asked and told, through its own programs. Needs nothing but the standard library."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from harness.errors import ConfigError

SLURM_TIMEOUT_SECONDS = 60
PATIENCE_SECONDS = 900.0
"""How long a job waits for a controller that is restarted or busy; without it nothing can be decided."""
SECONDS_BETWEEN_TRIES = 5.0
NO_ANSWER = 1000
"""In the place of a return code: the controller did not answer."""
_SILENCE = re.compile(
    r"unable to contact slurm|timed out|connection (refused|reset)|zero bytes|communication"
    r"|control machine address|configuration (source|file)",  # its host has no address, or nobody has Slurm's settings
    re.I,
)
_ABOUT_THIS_PROCESS = ("SLURM_", "SQUEUE_", "SINFO_", "SCANCEL_")
_ABOUT_THE_SITE = ("SLURM_CONF", "SLURM_CLUSTERS")


def require_slurm() -> None:
    """Refuse to go on where Slurm's programs are not.

    Raises:
        ConfigError: says what to do instead.
    """
    if shutil.which("sbatch") is None:
        raise ConfigError(
            "sbatch is not on the PATH, so nothing can be submitted from here. Log in to a node of the cluster that "
            "has it (or load its module); --dry-run shows the job's script anywhere"
        )


def sbatch(script: Path | str, *options: str, cancelled: Sequence[int] | None = None) -> str:
    """Hand a script to sbatch and return what it printed: the number of the job, with --parsable.

    Args:
        script: a file, or the text itself.
        cancelled: of a job that submits its own continuation: it waits for a controller that does not answer, until
            something is in it.
    Raises:
        ConfigError: Slurm refused it, with its words.
    """
    is_file = isinstance(script, Path)
    command = ["sbatch", *options, *([str(script)] if is_file else [])]
    text = "" if is_file else str(script)
    done = ask_slurm(*command, text=text) if cancelled is None else ask_patiently(*command, cancelled=cancelled)
    words = " ".join(done.stderr.replace("sbatch: error:", " ").split())
    if done.returncode == NO_ANSWER:
        raise ConfigError(f"Slurm does not answer ({words}). Try again when sinfo does")
    if done.returncode != 0:
        what = script if is_file else "the job"
        raise ConfigError(f"Slurm refuses {what}: {words}. Mend the cluster file, then submit again")
    return (done.stdout + done.stderr).strip() if "--test-only" in options else done.stdout.strip()


def ask_slurm(*command: str, text: str = "") -> subprocess.CompletedProcess[str]:
    """Run a command of Slurm; its return code is NO_ANSWER if the controller, or the program itself, does not answer.

    Args:
        text: what it reads.
    Raises:
        ConfigError: the program is missing.
    """
    try:
        done = subprocess.run(
            command,
            input=text,
            env=environment(os.environ),
            capture_output=True,
            text=True,
            timeout=SLURM_TIMEOUT_SECONDS,
            check=False,
            errors="replace",
        )
    except subprocess.TimeoutExpired:
        return subprocess.CompletedProcess(command, NO_ANSWER, "", f"no answer in {SLURM_TIMEOUT_SECONDS} s")
    except OSError as error:
        raise ConfigError(f"{shlex.join(command)} failed ({error}); is this a node of the cluster?") from error
    if done.returncode < 0 or (done.returncode != 0 and _SILENCE.search(done.stderr)):
        done.returncode = NO_ANSWER
    return done


def ask_patiently(*command: str, cancelled: Sequence[int] = ()) -> subprocess.CompletedProcess[str]:
    """Run a command of Slurm again until the controller answers, for PATIENCE_SECONDS.

    Args:
        cancelled: once something is in it the job is being ended, and nothing is asked any more.
    """
    give_up = time.monotonic() + PATIENCE_SECONDS
    while True:
        done = ask_slurm(*command)
        if done.returncode != NO_ANSWER or cancelled or time.monotonic() > give_up:
            return done
        time.sleep(SECONDS_BETWEEN_TRIES)


def environment(found: Mapping[str, str]) -> dict[str, str]:
    """Return an environment without what Slurm has said about this process, which would go before what is asked.

    A job that is submitted from within another one, or by a user with another time format, is a job like any other.
    """
    kept = {
        name: value
        for name, value in found.items()
        if name in _ABOUT_THE_SITE or not name.startswith(_ABOUT_THIS_PROCESS)
    }
    return kept | {"SLURM_TIME_FORMAT": "standard"}


def job_state(job: str) -> str | None:
    """Return the state of a job that waits or runs; None if it has ended or Slurm does not know it any more.

    Raises:
        ConfigError: the controller does not answer, so nobody knows.
    """
    done = ask_slurm("squeue", "--noheader", "--jobs", job, "--format", "%T")
    if done.returncode == NO_ANSWER:
        raise ConfigError(f"Slurm does not say how job {job} stands ({done.stderr.strip()}). Try again when sinfo does")
    state = done.stdout.split()
    return state[0] if state else None


def field(text: str, name: str) -> str | None:
    """Return a value of what `scontrol show` prints, such as JobState; None where it is not there or not set."""
    found = re.search(rf"(?:^|\s){re.escape(name)}=(\S+)", text)
    return found[1] if found and found[1] not in ("(null)", "None", "N/A", "Unknown") else None
