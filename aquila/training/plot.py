"""The picture of a run: training and validation loss, and the learning rate beneath."""

import math
import os
import re
import sys
import warnings
from pathlib import Path
from typing import IO, Any


def draw_loss(records: list[dict[str, Any]], path: Path) -> None:
    """Draws `records` of metrics.jsonl to the PNG `path`, replacing it whole."""
    points = [(r["step"], r["loss"]) for r in records if r.get("loss") is not None]
    if not points:
        return
    steps, losses = zip(*points, strict=True)
    figure, (top, bottom) = _figure(2, (9, 6), sharex=True, gridspec_kw={"height_ratios": [4, 1]})
    top.plot(steps, losses, color="#9ecae1", linewidth=0.8, label="training loss")
    top.plot(steps, smooth(list(losses)), color="#08519c", linewidth=1.8, label="smoothed")
    for number, (name, curve) in enumerate(valid_curves(records).items()):
        color = "#d94801" if name == "" else f"C{number % 10}"
        label = f"validation loss {name}".strip()
        top.plot(*zip(*curve, strict=True), "o-", color=color, markersize=3, linewidth=1.2, label=label)
    top.set_ylabel("loss (nats per token)")
    top.annotate(
        f"{losses[-1]:.3f}", (steps[-1], losses[-1]), textcoords="offset points", xytext=(4, 6), fontsize=9
    )
    top.legend(frameon=False)
    rates = [(r["step"], r["learning_rate"]) for r in records if r.get("learning_rate") is not None]
    bottom.plot(*zip(*rates, strict=True), color="#31a354")
    bottom.set_ylabel("learning rate")
    bottom.set_xlabel("optimizer step")
    _title_and_save(figure, top, path, steps[-1])


def valid_curves(records: list[dict[str, Any]]) -> dict[str, list[tuple[int, float]]]:
    """(step, loss) of every validation set by its name, the split's own under the empty name."""
    curves: dict[str, list[tuple[int, float]]] = {}
    for record in records:
        losses = {"": record.get("valid_loss")} | (record.get("valid_losses") or {})
        for name, loss in losses.items():
            if loss is not None:
                curves.setdefault(name, []).append((record["step"], loss))
    return curves


def draw_throughput(records: list[dict[str, Any]], path: Path) -> None:
    """Draws tokens per second, and MFU where it is known, to the PNG `path`, replacing it whole."""
    points = [(r["step"], r["tokens_per_second"]) for r in records if r.get("tokens_per_second")]
    if not points:
        return
    steps, rates = zip(*points, strict=True)
    figure, (axis,) = _figure(1, (9, 4))
    axis.plot(steps, rates, color="#9ecae1", linewidth=0.8)
    axis.plot(steps, smooth(list(rates)), color="#08519c", linewidth=1.8)
    axis.set_ylim(0, max(rates) * 1.1)
    axis.set_ylabel("tokens per second")
    axis.set_xlabel("optimizer step")
    mfu = [(r["step"], r["mfu"]) for r in records if r.get("mfu")]
    if mfu:
        right = axis.twinx()
        right.plot(*zip(*mfu, strict=True), alpha=0)  # the same curve in another unit: only its scale shows
        right.set_ylim(0, max(value for _, value in mfu) * 1.1)
        right.set_ylabel("model FLOP/s utilization")
    _title_and_save(figure, axis, path, steps[-1])


def draw_runs(runs: dict[str, list[dict[str, Any]]], target: Path | IO[bytes], picture: str = "png") -> None:
    """Draws loss, throughput, gradient norm, learning rate and memory of several runs over one another."""
    parts = {"tokens per second": "tokens_per_second", "gradient norm": "grad_norm",
             "learning rate": "learning_rate", "memory (GiB)": "memory_gib"}  # fmt: skip
    every = [record for records in runs.values() for record in records]
    parts = {label: key for label, key in parts.items() if any(record.get(key) for record in every)}
    shape: dict[str, Any] = {"sharex": True, "gridspec_kw": {"height_ratios": [3, *(1 for _ in parts)]}}
    figure, (loss, *axes) = _figure(1 + len(parts), (10, 6 + 1.6 * len(parts)), **shape)
    for number, (name, records) in enumerate(runs.items()):
        color = f"C{number % 10}"
        for set_number, (set_name, curve) in enumerate(valid_curves(records).items()):
            marker, label = "osD^v<>*"[set_number % 8], f"{name}, validation {set_name}".rstrip()
            loss.plot(*zip(*curve, strict=True), marker + ":", color=color, markersize=4, label=label)
        records = [record for record in records if record.get("loss") is not None]
        steps = [record["step"] for record in records]
        losses = [record["loss"] for record in records]
        loss.plot(steps, losses, color=color, linewidth=0.6, alpha=0.35)
        loss.plot(steps, smooth(losses), color=color, linewidth=1.6, label=name)
        for axis, key in zip(axes, parts.values(), strict=True):
            values = [record.get(key) if record.get(key) is not None else math.nan for record in records]
            axis.plot(steps, values, color=color, linewidth=1.0)
    loss.set_ylabel("loss (nats per token); dots: validation")
    loss.legend(frameon=False)
    for axis, label in zip(axes, parts, strict=True):
        axis.set_ylabel(label)
        axis.set_ylim(bottom=0)
    (axes or [loss])[-1].set_xlabel("optimizer step")
    _save(figure, target, picture)


_CHINESE = r"(?i)notosanscjk|sourcehansans|wqy-|droidsansfallback|simhei|msyh|pingfang"
"""File names of fonts with Chinese: the first that is installed draws what the main one cannot."""


def _figure(rows: int, size: tuple[float, float], **options: Any) -> tuple[Any, Any]:
    from matplotlib import font_manager, rcParams
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    found = sorted(path for path in font_manager.findSystemFonts() if re.search(_CHINESE, Path(path).name))
    for path in found[:1]:
        font_manager.fontManager.addfont(path)
        name = font_manager.FontProperties(fname=path).get_name()
        rcParams["font.family"] = ["DejaVu Sans", name]
    figure = Figure(figsize=size, dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(rows, 1, squeeze=False, **options)[:, 0]
    for axis in axes:
        axis.grid(alpha=0.3)
    return figure, axes


def _save(figure: Any, target: Path | IO[bytes], picture: str = "png") -> None:
    """Text of an SVG stays text, for a browser has fonts for all; what a PNG cannot show is told once."""
    from matplotlib import rc_context

    with rc_context({"svg.fonttype": "none"}), warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        figure.savefig(target, format=picture)
    if picture == "png" and any("missing from font" in str(warning.message) for warning in told):
        print(
            "note: no font here has all letters of the picture: apt-get install fonts-noto-cjk",
            file=sys.stderr,
        )


def _title_and_save(figure: Any, axis: Any, path: Path, step: int) -> None:
    axis.set_title(f"{path.parent.parent.name} / {path.parent.name}: step {step:,}", fontsize=11)
    temporary = path.with_suffix(".tmp.png")
    _save(figure, temporary)
    os.replace(temporary, path)


def smooth(values: list[float]) -> list[float]:
    """The mean of the finite values around each point, over about a twenty-fifth of all points.

    The window is centred, and narrower near the ends, so that the line does not lag behind the values.
    """
    half, result = len(values) // 50, []
    for at, value in enumerate(values):
        reach = min(half, at, len(values) - 1 - at)
        near = [other for other in values[at - reach : at + reach + 1] if math.isfinite(other)]
        result.append(sum(near) / len(near) if near else value)
    return result
