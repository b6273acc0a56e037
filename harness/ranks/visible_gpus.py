"""How many GPUs there are, as nvidia-smi lists them."""

import os
import shutil
import subprocess

from harness.errors import ConfigError


def count_visible_gpus(listing: str, visible_devices: str | None) -> int:
    """Return how many GPUs of an `nvidia-smi -L` listing CUDA shows under a value of CUDA_VISIBLE_DEVICES.

    As in CUDA, the first entry that names no device hides itself and everything after it.
    """
    num_present = sum(line.startswith("GPU ") for line in listing.splitlines())
    if visible_devices is None:
        return num_present
    num_visible = 0
    for entry in (part.strip() for part in visible_devices.split(",")):
        is_index = entry.isdecimal() and int(entry) < num_present
        if not (is_index or entry.startswith(("GPU-", "MIG-"))):
            break
        num_visible += 1
    return num_visible


def count_gpus() -> int:
    """Return how many GPUs this process may use, by nvidia-smi; without torch, and whatever torch can use.

    Raises:
        ConfigError: nvidia-smi is there and does not work.
    """
    visible_devices = os.environ.get("CUDA_VISIBLE_DEVICES")
    program = shutil.which("nvidia-smi")
    if program is None or (visible_devices is not None and visible_devices.strip() in ("", "-1")):
        return 0
    try:
        answer = subprocess.run([program, "-L"], capture_output=True, text=True, timeout=60, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise _nvidia_smi_failed(str(error)) from error
    said = (answer.stdout + answer.stderr).strip()
    if answer.returncode != 0 and "No devices" not in said:
        raise _nvidia_smi_failed(said.partition("\n")[0] or f"exit code {answer.returncode}")
    return count_visible_gpus(answer.stdout, visible_devices)


def _nvidia_smi_failed(reason: str) -> ConfigError:
    return ConfigError(
        f"nvidia-smi -L failed, so the GPUs cannot be counted ({reason}). "
        "Mend the driver, or set CUDA_VISIBLE_DEVICES= to train on CPU ranks"
    )
