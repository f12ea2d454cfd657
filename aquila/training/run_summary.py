"""A run folder in numbers: losses, what it read, its settings, its starts and how its time was spent."""

import json
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from aquila.config.run import RunConfig
from aquila.core.errors import UserError
from aquila.core.jsonl import objects
from aquila.data.order import FILE as ORDER
from aquila.data.order import open_order
from aquila.training.metrics import METRICS, SCORES, read_metrics

HISTORY = "history.jsonl"
"""Every start of a run, in its folder."""


@dataclass(frozen=True)
class Run:
    """What a run folder says. records: of metrics.jsonl, those of steps that count alone."""

    name: str
    folder: Path
    records: list[dict[str, Any]]
    starts: list[dict[str, Any]]
    scores: list[dict[str, Any]]

    def settings(self) -> dict[str, str]:
        """Every setting of the last start by name, as text."""
        if not self.starts:
            return {}
        last = self.starts[-1]
        named = {key: value for key, value in (last.get("config") or {}).items() if key != "resume"}
        named |= {f"config.json: {key}": value for key, value in (last.get("model_config") or {}).items()}
        named |= {"devices": last.get("devices", last.get("world_size")), "model": last.get("model")}
        return {key: _text(value) for key, value in named.items()}

    def identity(self) -> dict[str, str]:
        """What the run was, by its last start: for who has the page alone."""
        if not self.starts:
            return {}
        last, config = self.starts[-1], self.starts[-1].get("config") or {}
        size = last.get("parameters")
        defaults = {name: field.default for name, field in RunConfig.model_fields.items()}
        changed = [f"{key}={_text(value)}" for key, value in config.items() if value != defaults.get(key)]
        return {
            "model": f"{Path(last.get('model') or '-').name}{f', {size:,} parameters' if size else ''}",
            "data": _text(config.get("data_prefix", "-")),
            "devices": str(last.get("devices", last.get("world_size", "-"))),
            "commit": last.get("commit") or "-",
            "begun": time.strftime("%Y-%m-%d %H:%M", time.localtime(self.starts[0]["time"])),
            "settings other than the defaults": " ".join(changed) or "none",
        }

    def summary(self) -> dict[str, Any]:
        """The numbers of the report; None where the run does not say."""
        steps = [record for record in self.records if record.get("loss") is not None]
        rates = [record["tokens_per_second"] for record in steps if record.get("tokens_per_second")]
        mfu = [record["mfu"] for record in steps if record.get("mfu")]
        norms = [record["grad_norm"] for record in steps if record.get("grad_norm")]
        last = self.records[-1]
        return {
            "steps": last["step"],
            "consumed_tokens": last.get("consumed_tokens"),
            "first_loss": steps[0]["loss"],
            "last_loss": steps[-1]["loss"],
            "valid_loss": self._curve(lambda record: record.get("valid_loss")),
            "valid_losses": self._curves("valid_losses"),
            "valid_bits_per_byte": self._curves("valid_bits_per_byte"),
            "train_losses": self._last("train_losses"),
            "lm_eval": self.scores[-1] if self.scores else None,
            "learning_rate": steps[-1].get("learning_rate"),
            "grad_norm": median(norms) if norms else None,
            "memory_gib": max((record.get("memory_gib") or 0 for record in steps), default=0) or None,
            "skipped": sum(1 for record in self.records if record.get("skipped")),
            "tokens_per_second": median(rates) if rates else None,
            "mfu": median(mfu) if mfu else None,
            "consumed_samples": self._consumed(last.get("consumed_samples")),
            "starts": [start["step"] for start in self.starts],
            **self._time(steps),
        }

    def _curve(self, value_of: Any) -> dict[str, float] | None:
        values = [value for record in self.records if (value := value_of(record)) is not None]
        return {"first": values[0], "last": values[-1], "best": min(values)} if values else None

    def _curves(self, key: str) -> dict[str, Any]:
        names = dict.fromkeys(name for record in self.records for name in record.get(key) or {})
        return {name: self._curve(lambda r, name=name: (r.get(key) or {}).get(name)) for name in names}

    def _last(self, key: str) -> dict[str, float]:
        return next((record[key] for record in reversed(self.records) if record.get(key)), {})

    def _consumed(self, samples: int | None) -> dict[str, int] | None:
        """Samples of each corpus, where the datasets can be read."""
        if samples is None or not (self.folder / ORDER).is_file():
            return None
        try:
            return open_order(self.folder).consumed(samples)
        except (UserError, OSError):
            return None

    def _time(self, steps: list[dict[str, Any]]) -> dict[str, float | None]:
        """Seconds from the first start to the last record, those of steps that count, and their share.

        A record's `step_seconds` is the mean of the steps since the one before it.
        """
        ends = [record["time"] for record in self.records if record.get("time")]
        if not self.starts or not ends:
            return {"wall_seconds": None, "step_seconds": None, "goodput": None}
        wall = ends[-1] - self.starts[0]["time"]
        spent, before = 0.0, 0
        for record in self.records:
            if record.get("step_seconds") and not record.get("skipped"):
                spent += (record["step"] - before) * record["step_seconds"]
            before = record["step"]
        return {"wall_seconds": wall, "step_seconds": spent, "goodput": spent / wall if wall > 0 else None}


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def read_run(name: str, folder: Path) -> Run:
    """The run of a folder. Raises `UserError` where no step is logged yet."""
    records = read_metrics(folder / METRICS)
    if not any(record.get("loss") is not None for record in records):
        raise UserError(f"{folder / METRICS} has no logged step yet")
    history = folder / HISTORY
    starts = objects(history.read_bytes()) if history.is_file() else []
    starts = [start for start in starts if isinstance(start.get("step"), int) and start.get("time")]
    return Run(name, folder, records, starts, read_metrics(folder / SCORES))


def differing(runs: list[Run]) -> dict[str, list[str]]:
    """Settings that are not the same in all runs: name to each run's value, '-' where it has none."""
    each = [run.settings() for run in runs]
    names = dict.fromkeys(name for settings in each for name in settings)
    rows = {name: [settings.get(name, "-") for settings in each] for name in names}
    return {name: values for name, values in rows.items() if len(set(values)) > 1}


def changes(run: Run) -> list[tuple[int, str, str, str]]:
    """(step, setting, before, after) for each setting that a later start of a run changed."""
    found = []
    settings = [Run(run.name, run.folder, run.records, [start], []).settings() for start in run.starts]
    for start, then, now in zip(run.starts[1:], settings, settings[1:], strict=False):
        for name in dict.fromkeys([*then, *now]):
            if then.get(name, "-") != now.get(name, "-"):
                found.append((start["step"], name, then.get(name, "-"), now.get(name, "-")))
    return found
