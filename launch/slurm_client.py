"""What Slurm is asked and told, through its own programs. Needs nothing but the standard library."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
from pathlib import Path

from harness.errors import ConfigError

SLURM_TIMEOUT_SECONDS = 60


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


def sbatch(script: Path, *options: str) -> str:
    """Hand a script to sbatch and return what it printed: the number of the job, with --parsable.

    Raises:
        ConfigError: Slurm refused it, with its words.
    """
    done = ask_slurm("sbatch", *options, str(script))
    if done.returncode != 0:
        words = " ".join(done.stderr.replace("sbatch: error:", " ").split())
        raise ConfigError(f"Slurm refuses {script}: {words}. Mend the cluster file, then submit again")
    return (done.stdout + done.stderr).strip() if "--test-only" in options else done.stdout.strip()


def ask_slurm(*command: str) -> subprocess.CompletedProcess[str]:
    """Run a command of Slurm, which answers within a minute or is taken to be out of order.

    Raises:
        ConfigError: the program is missing, or there was no answer.
    """
    try:
        return subprocess.run(
            command, capture_output=True, text=True, timeout=SLURM_TIMEOUT_SECONDS, check=False, errors="replace"
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ConfigError(f"{shlex.join(command)} failed ({error}); is this a node of the cluster?") from error


def field(text: str, name: str) -> str | None:
    """Return a value of what `scontrol show` prints, such as JobState; None where it is not there or not set."""
    found = re.search(rf"(?:^|\s){re.escape(name)}=(\S+)", text)
    return found[1] if found and found[1] not in ("(null)", "None", "N/A", "Unknown") else None
