"""Where a run can be watched: the `tracking` section, and the WANDB_* variables that go before it.

For each setting the first of these that is there counts: its WANDB_* variable, the command line's `tracking.wandb.x=`,
the file, the default here. The API key comes from WANDB_API_KEY or a netrc file, and from nowhere else.
"""

from __future__ import annotations

import netrc
import os
import sys
from collections.abc import Collection, Mapping
from configparser import ConfigParser
from configparser import Error as ConfigParserError
from importlib.machinery import PathFinder
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import AfterValidator, Field, ValidationError, model_validator

from harness.config.fields import RUN_ID, Int, PositiveFloat, PositiveInt, Section, looks_like_key
from harness.config.problems import nearest_name

VARIABLES = {
    "mode": "WANDB_MODE",
    "project": "WANDB_PROJECT",
    "entity": "WANDB_ENTITY",
    "group": "WANDB_RUN_GROUP",
    "tags": "WANDB_TAGS",
    "notes": "WANDB_NOTES",
    "job_type": "WANDB_JOB_TYPE",
}
"""The variables of wandb that go before a setting of `tracking.wandb`.

WANDB_NAME goes before `run.name`, WANDB_RUN_ID names a run that has no id yet, WANDB_DIR is where its files are; wandb
itself hears of all others.
"""
_FORBIDDEN_IN_PROJECTS = set("/\\#?%:")


def _check_project(value: str) -> str:
    found = "".join(sorted(_FORBIDDEN_IN_PROJECTS & set(value)))
    if found or not value.strip() or len(value) > 128:
        problem = f"{found!r} in it" if found else f"{len(value)} characters"
        raise ValueError(f"a project has 1 to 128 characters and none of / \\ # ? % : (found {problem})")
    return value


class Wandb(Section):
    """A projection of the ledger to Weights & Biases, made by a process of its own beside rank zero."""

    mode: Literal["online", "offline", "disabled"] = "offline"
    project: Annotated[str, AfterValidator(_check_project)] = "harness"
    entity: str | None = None
    group: str | None = None
    tags: tuple[Annotated[str, Field(min_length=1, max_length=64)], ...] = ()
    notes: str | None = None
    job_type: str | None = None
    log_every_steps: PositiveInt | None = None
    """Updates whose step is a multiple of this become rows; null is `tracking.log_every_steps`."""
    save_code: bool = False
    """Send this package's source files with the run."""
    log_checkpoints: bool = False
    """Send the best checkpoint of a finished run as an artifact."""
    start_timeout_seconds: PositiveFloat = 20.0
    """How long the server may take to answer at the start before the run is tracked offline; training never waits."""

    @model_validator(mode="before")
    @classmethod
    def _holds_no_key(cls, values: Any) -> Any:
        items = list(values.values()) if isinstance(values, dict) else [values]
        texts = [text for item in items for text in (item if isinstance(item, list | tuple) else [item])]
        if any(looks_like_key(text) for text in texts if isinstance(text, str)):
            raise ValueError(
                "something in it looks like an API key; a key belongs in WANDB_API_KEY or ~/.netrc (wandb login), "
                "never in a configuration. Take it out, and revoke it if the file was shared"
            )
        return values


class TensorBoard(Section):
    """A projection of the ledger to event files in RUN/tensorboard, made by a process of its own beside rank zero."""

    log_every_steps: PositiveInt | None = None
    """Updates whose step is a multiple of this become points; null is `tracking.log_every_steps`."""


class Tracking(Section):
    """How often reports are reduced over ranks, read to the host and written; and where else they go."""

    log_every_steps: PositiveInt = 10
    report: bool = True
    """Draw report.html in the run directory when a launch ends, which takes a second or two."""
    sample_table_rows: Annotated[Int, Field(ge=0, le=1000)] = 0
    """So many validation rows, evenly spread, are told with target and prediction at each evaluation."""
    stall_alert_seconds: PositiveFloat | None = 900.0
    """After so long without an update, an evaluation or a save people are alerted, where a tracker can do that."""
    wandb: Wandb | None = None
    tensorboard: TensorBoard | None = None
    own: tuple[Annotated[str, Field(pattern=r"^[A-Za-z_][\w-]*(\.[A-Za-z_]\w*)*$")], ...] = ()
    """Trackers of yours, subclasses of `harness.tracking.tracker.Tracker`: kinds that a file of `use` registers, or
    classes by their place, such as my_trackers.Lines."""


def wandb_settings(tracking: Tracking, environment: Mapping[str, str] = os.environ) -> Wandb | None:
    """Return the wandb section after the WANDB_* variables; None if nothing goes to wandb.

    Variables change how a run goes to wandb. Whether it does at all, the configuration says.

    Raises:
        ValueError: a variable has a value that its setting does not allow.
    """
    if tracking.wandb is None:
        return None
    values = tracking.wandb.model_dump()
    for field, variable in VARIABLES.items():
        if text := environment.get(variable, "").strip():
            tags = tuple(filter(None, (tag.strip() for tag in text.split(","))))
            value = {"tags": tags, "mode": {"dryrun": "offline"}.get(text, text)}.get(field, text)
            try:
                values[field] = getattr(Wandb.model_validate({field: value}), field)
            except ValidationError as error:
                problem = error.errors(include_url=False, include_input=False)[0]["msg"]
                raise ValueError(f"{variable}: {problem}; unset it, or set another value") from None
    settings = Wandb.model_validate(values)
    return None if settings.mode == "disabled" else settings


def tracking_problems(tracking: Tracking, environment: Mapping[str, str] = os.environ) -> list[str]:
    """Return what on this machine keeps the configured trackers from working, one `path: problem` line each."""
    problems = []
    try:
        wandb = wandb_settings(tracking, environment)
    except ValueError as error:
        return [str(error)]
    if wandb is not None and not is_installed("wandb"):
        problems.append(
            "tracking.wandb: wandb is not installed; pip install 'harness-train[wandb]', or tracking.wandb=null"
        )
    run_id = environment.get("WANDB_RUN_ID", "").strip()
    if wandb is not None and run_id and not RUN_ID.fullmatch(run_id):
        problems.append(
            f"WANDB_RUN_ID: {run_id!r} has more in it than letters, digits, - _ and .; unset it, or set another"
        )
    if wandb is not None and wandb.mode == "online" and not has_key(environment):
        problems.append(
            f"tracking.wandb.mode: online wants an API key for {_host(environment)}, and there is none in "
            "WANDB_API_KEY nor in a netrc file; use wandb login, or tracking.wandb.mode=offline"
        )
    if tracking.tensorboard is not None and not is_installed("tensorboard"):
        problems.append(
            "tracking.tensorboard: tensorboard is not installed; pip install 'harness-train[tensorboard]', or "
            "tracking.tensorboard=null"
        )
    for name in (name for name in tracking.own if "." in name):
        module = name.partition(".")[0]
        if PathFinder.find_spec(module, [os.getcwd(), *sys.path]) is None:
            problems.append(f"tracking.own: there is no module {module} here or in PYTHONPATH, for {name}")
    return problems


def tracker_problems(tracking: Tracking, kinds: Collection[str]) -> list[str]:
    """Return which trackers are not among the kinds that are registered, one `path: problem` line each."""
    problems = []
    for name in tracking.own:
        if "." not in name and name not in kinds:
            nearest = nearest_name(name, kinds)
            hint = f" (nearest: {nearest})" if nearest else ""
            problems.append(
                f"tracking.own: no file of `use` registers a tracker {name!r}{hint}; a class is named by its place, "
                "such as my_trackers.Lines"
            )
    return problems


def is_installed(package: str) -> bool:
    """Return whether a package can be imported, without importing it; a folder of that name is none."""
    spec = find_spec(package)
    return spec is not None and spec.origin is not None


def has_key(environment: Mapping[str, str] = os.environ) -> bool:
    """Return whether wandb would find an API key, in WANDB_API_KEY or for its server in a netrc file."""
    if environment.get("WANDB_API_KEY", "").strip():
        return True
    home = Path(environment.get("HOME", "~")).expanduser()
    named = environment.get("NETRC")
    for path in [Path(named).expanduser()] if named else [home / ".netrc", home / "_netrc"]:
        try:
            entry = netrc.netrc(path).authenticators(_host(environment))
        except (OSError, netrc.NetrcParseError):
            continue  # wandb cannot read it either
        if entry and entry[2]:
            return True
    return False


def _host(environment: Mapping[str, str]) -> str:
    url = environment.get("WANDB_BASE_URL") or _url_of_login(environment) or "https://api.wandb.ai"
    return urlsplit(url).netloc or "api.wandb.ai"  # with its port: so wandb writes and looks up a netrc entry


def _url_of_login(environment: Mapping[str, str]) -> str | None:
    """Return the server that `wandb login --host` has left in wandb's own settings."""
    folder = environment.get("WANDB_CONFIG_DIR") or f"{environment.get('HOME', '~')}/.config/wandb"
    settings = ConfigParser(interpolation=None)
    try:
        settings.read(Path(folder).expanduser() / "settings")
    except (ConfigParserError, UnicodeDecodeError):
        return None  # wandb cannot read it either
    return settings.get("default", "base_url", fallback=None)
