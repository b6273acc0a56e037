"""What `harness check` prints: a configuration in a dozen lines."""

from collections.abc import Iterator, Set
from typing import Any

from harness.config.fields import Section
from harness.config.io import LoadedConfig
from harness.config.run_config import RunConfig
from harness.config.signature import key_texts
from harness.launch.checklist import checklist
from harness.parts import Part, registered
from harness.record.run_directory import changes_since


def summary(loaded: LoadedConfig, *, ranks: int | None, command: str) -> str:
    """Return what a configuration trains, how, on how many ranks, for how long and where; one line each.

    Raises:
        ConfigError: its run directory holds a run that it cannot continue.
    """
    config = loaded.config
    has_run = (config.run_directory / "run.json").exists()
    rows = {
        "model": _section(config.model, exclude=config.model.keys_without_meaning),
        "data": _section(config.data),
        "task": _section(config.task, exclude_defaults=True),
        "optimizer": _section(config.optim),
        "schedule": _section(config.schedule),
        "clip": _section(config.clip),
        "strategy": _section(config.strategy, exclude_defaults=True),
        "batch": _batch(config, ranks),
        "budget": _budget(config),
        "directory": f"{config.run_directory}{' (holds a run, which goes on)' if has_run else ''}",
        "start": command,
    }
    own = [(f"{slot} {found.kind}", found) for slot, found in own_parts(loaded)]
    return "\n".join(
        [
            *(f"notice: {notice}" for notice in (*loaded.notices, *changes_since(config.run_directory, config))),
            *(f"{name:11}{row}" for name, row in rows.items()),
            *(f"{'part':11}{name}: {found.origin}{_keys(found)}" for name, found in own),
            *checklist(config, ranks=ranks, rows=config.data.known_rows(config.task)),
        ]
    )


def own_parts(loaded: LoadedConfig) -> Iterator[tuple[str, Part]]:
    """Yield the parts of a configuration that are not of the catalogue, with their slots."""
    config, parts = loaded.config, loaded.parts or registered()
    for slot, section in {"model": config.model, "data": config.data, "task": config.task}.items():
        part = parts.find(slot, section)
        if part is not None and not part.is_ours:
            yield slot, part
    trackers = parts.of("tracker")
    yield from (("tracker", trackers[name]) for name in config.tracking.own if name in trackers)


def _keys(part: Part) -> str:
    keys = [f"{name}: {text}" for name, text in key_texts(part.section).items()]
    return f"; keys {', '.join(keys)}" if keys else ""


def _section(section: Section, *, exclude_defaults: bool = False, exclude: Set[str] = frozenset()) -> str:
    values: dict[str, Any] = section.model_dump(
        mode="json", exclude_none=True, exclude_defaults=exclude_defaults, exclude=set(exclude)
    )
    kind = values.pop("kind", None) or values.pop("source")
    return f"{kind:12} {', '.join(f'{key} {_shown(value)}' for key, value in values.items())}".rstrip()


def _shown(value: Any) -> str:
    return " ".join(map(str, value)) or "none" if isinstance(value, list) else str(value)


def _batch(config: RunConfig, ranks: int | None) -> str:
    rows = config.data.global_batch
    if ranks is None:
        return f"{rows} rows an update over all ranks (--gpus N shows each rank's share)"
    if (tokens := config.strategy.micro_batch_tokens) is not None:
        share = f"{ranks} ranks x {rows // ranks} rows"
        return f"{rows} rows an update = {share}, in micro-batches of {tokens:,} tokens at most"
    micro_batch = config.strategy.micro_batch or rows // ranks
    accumulation = rows // ranks // micro_batch
    return f"{rows} rows an update = {ranks} ranks x {micro_batch} rows x {accumulation} micro-batches"


def _budget(config: RunConfig) -> str:
    budgets = {"epochs": config.run.max_epochs, "updates": config.run.max_steps}
    limits = [f"{limit:,} {unit}" for unit, limit in budgets.items() if limit is not None]
    text = " or ".join(limits) + (", whichever comes first" if len(limits) > 1 else "")
    if early := config.early_stopping:
        text += f"; ends early after {early.patience_evaluations} evaluations with no better {early.metric}"
    return text
