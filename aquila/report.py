"""Runs side by side: their curves as a PNG, and all numbers as one HTML page that loads nothing, and as JSON.

    python -m aquila.report EXP... [--output report]

EXP: experiments under checkpoints_out/ (their newest run), or run folders. The page has every loss, the
settings that differ, the data read by corpus, restarts and goodput: the share of the time from the first
start to the last record that was spent in steps that count.
"""

import argparse
import base64
import html
import io
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from aquila.core.errors import UserError, run_command
from aquila.core.files import write_atomically
from aquila.core.run_folder import newest_launch, versions
from aquila.training.metrics import METRICS
from aquila.training.plot import draw_runs
from aquila.training.run_summary import Run, changes, differing, read_run

OUTPUT = "checkpoints_out"


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m aquila.report", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("experiments", nargs="+", metavar="EXP", help="experiments or run folders")
    parser.add_argument(
        "--output", type=Path, default=Path("report"), help="without suffix (default: report)"
    )
    arguments = parser.parse_args()
    runs = list({run.name: run for run in map(find_run, arguments.experiments)}.values())
    curves = {run.name: run.records for run in runs}
    png, page, numbers = (arguments.output.with_suffix(end) for end in (".png", ".html", ".json"))
    png.parent.mkdir(parents=True, exist_ok=True)
    draw_runs(curves, png)
    svg = io.BytesIO()
    draw_runs(curves, svg, picture="svg")
    summaries = {run.name: run.summary() for run in runs}
    told = {
        "runs": summaries,
        "differing": differing(runs),
        "changes": {run.name: changes(run) for run in runs},
    }
    write_atomically(numbers, json.dumps(told, indent=1, ensure_ascii=False) + "\n")
    write_atomically(page, render(runs, summaries, svg.getvalue()))
    print(f"{png}\n{page}\n{numbers}")
    return 0


def find_run(name: str) -> Run:
    """The run of a run folder, or an experiment's newest run. Raises `UserError`."""
    for folder in (Path(name), Path(OUTPUT) / name):
        if (folder / METRICS).is_file():
            return read_run(f"{folder.parent.name}/{folder.name}", folder)
        # Versions of launches in their order; a rank that was started by hand may name its own.
        found = [run_dir for run_dir in versions(folder) if (run_dir / METRICS).is_file()]
        if found := found or sorted(path.parent for path in folder.glob(f"*/{METRICS}")):
            newest = newest_launch(folder)
            newest = newest if newest in found else found[-1]
            return read_run(f"{folder.name}/{newest.name}", newest)
    raise UserError(f"no run {name}: neither a run folder nor an experiment under {OUTPUT}/ with {METRICS}")


def rows(summaries: dict[str, dict[str, Any]]) -> list[tuple[str, list[str]]]:
    """The table: a row's name, and its cell for each run."""
    each = list(summaries.values())

    def row(name: str, form: str, *path: str) -> tuple[str, list[str]]:
        return name, [_cell(_at(summary, path), form) for summary in each]

    def names(*path: str) -> Iterable[str]:
        return dict.fromkeys(name for summary in each for name in _at(summary, path) or {})

    table = [
        row("steps", ",", "steps"),
        row("tokens", ",", "consumed_tokens"),
        row("first loss", ".4f", "first_loss"),
        row("last loss", ".4f", "last_loss"),
    ]
    table += [row(f"last loss, {name}", ".4f", "train_losses", name) for name in names("train_losses")]
    table += [
        row(f"{which} validation loss", ".4f", "valid_loss", which) for which in ("first", "last", "best")
    ]
    for name in names("valid_losses"):
        table += [
            row(f"{w} validation loss, {name}", ".4f", "valid_losses", name, w)
            for w in ("first", "last", "best")
        ]
    table += [
        row(f"last bits per byte, {n}", ".4f", "valid_bits_per_byte", n, "last")
        for n in names("valid_bits_per_byte")
    ]
    table += [
        row(f"lm_eval {name}", ".4f", "lm_eval", "lm_eval", name) for name in names("lm_eval", "lm_eval")
    ]
    table += [
        row(f"samples read, {name}", ",", "consumed_samples", name) for name in names("consumed_samples")
    ]
    table += [
        row("last learning rate", ".3g", "learning_rate"),
        row("gradient norm, median", ".3g", "grad_norm"),
        row("peak memory, GiB", ".2f", "memory_gib"),
        row("skipped steps", ",", "skipped"),
        row("tokens/s", ",.0f", "tokens_per_second"),
        row("MFU", ".1%", "mfu"),
        ("restarts", [str(max(0, len(summary["starts"]) - 1)) for summary in each]),
        row("hours", ".2f", "hours"),
        row("goodput", ".1%", "goodput"),
    ]
    return [(name, cells) for name, cells in table if set(cells) != {"-"}]


def _at(summary: dict[str, Any], path: tuple[str, ...]) -> Any:
    if path == ("hours",):
        return None if summary["wall_seconds"] is None else summary["wall_seconds"] / 3600
    value: Any = summary
    for key in path:
        value = (value or {}).get(key)
    return value


def _cell(value: Any, form: str) -> str:
    return "-" if value is None else f"{value:{form}}"


def render(runs: list[Run], summaries: dict[str, dict[str, Any]], svg: bytes) -> str:
    """One page with the picture, the tables and the data in it; it loads nothing."""
    names = [run.name for run in runs]
    data = json.dumps({run.name: run.records for run in runs}).replace("<", "\\u003c")
    numbers = json.dumps(summaries, ensure_ascii=False).replace("<", "\\u003c")
    settings = differing(runs) if len(runs) > 1 else {}
    changed = [
        (f"{run.name}, after step {step}", name, then, now)
        for run in runs
        for step, name, then, now in changes(run)
    ]
    identities = [run.identity() for run in runs]
    keys = dict.fromkeys(key for told in identities for key in told)
    known = [[key, *(told.get(key, "-") for told in identities)] for key in keys]
    parts = [
        _table("runs", ["", *names], [[name, *cells] for name, cells in rows(summaries)]),
        _section(
            "Settings that differ", _table("settings", ["", *names], [[k, *v] for k, v in settings.items()])
        ),
        _section(
            "Settings that changed in a run", _table("changes", ["", "setting", "before", "after"], changed)
        ),
    ]
    body = parts[0] + (_section("What was run", _table("identity", ["", *names], known)) if known else "")
    body += (parts[1] if settings else "") + (parts[2] if changed else "")
    picture = base64.b64encode(svg).decode()
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>Aquila training report</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<style>
body {{ font: 15px/1.5 system-ui, "Noto Sans CJK SC", "PingFang SC", "Microsoft YaHei", sans-serif;
  margin: 2rem auto; max-width: 70rem; padding: 0 1rem; }}
div {{ overflow-x: auto; }}
table {{ border-collapse: collapse; width: 100%; }}
@media print {{ body {{ margin: 0; font-size: 11px; }} tr, img {{ break-inside: avoid; }} }}
th, td {{ padding: .35rem .7rem; border-bottom: 1px solid #ddd; text-align: right; overflow-wrap: anywhere; }}
th:first-child, td:first-child {{ text-align: left; overflow-wrap: normal; }}
img {{ width: 100%; }}
</style></head><body>
<h1>Training report</h1>
<img alt="loss, validation loss and throughput by step" src="data:image/svg+xml;base64,{picture}">
{body}
<p>Goodput: seconds of the steps that count over the seconds from the first start to the last record.</p>
<script type="application/json" id="data">{data}</script>
<script type="application/json" id="numbers">{numbers}</script>
</body></html>
"""


def _section(title: str, table: str) -> str:
    return f"<h2>{title}</h2>\n{table}"


def _table(name: str, head: list[str], lines: Iterable[Iterable[str]]) -> str:
    top = "".join(f"<th>{html.escape(cell)}</th>" for cell in head)
    body = "".join("<tr>" + "".join(f"<td>{html.escape(c)}</td>" for c in line) + "</tr>\n" for line in lines)
    return f'<div><table id="{name}"><thead><tr>{top}</tr></thead><tbody>\n{body}</tbody></table></div>\n'


if __name__ == "__main__":
    run_command(main)
