"""The picture of a run: training and validation loss, and the learning rate beneath."""

import math
import os
from pathlib import Path
from typing import Any


def draw_loss(records: list[dict[str, Any]], path: Path) -> None:
    """Draws `records` of metrics.jsonl to the PNG `path`, replacing it whole."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    points = [(r["step"], r["loss"]) for r in records if r.get("loss") is not None]
    if not points:
        return
    steps, losses = zip(*points, strict=True)
    figure = Figure(figsize=(9, 6), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    top, bottom = figure.subplots(2, 1, sharex=True, gridspec_kw={"height_ratios": [4, 1]})
    top.plot(steps, losses, color="#9ecae1", linewidth=0.8, label="training loss")
    top.plot(steps, smooth(list(losses)), color="#08519c", linewidth=1.8, label="smoothed")
    valid = [(r["step"], r["valid_loss"]) for r in records if r.get("valid_loss") is not None]
    if valid:
        top.plot(
            *zip(*valid, strict=True),
            "o-",
            color="#d94801",
            markersize=3,
            linewidth=1.2,
            label="validation loss",
        )
    top.set_ylabel("loss (nats per token)")
    top.annotate(
        f"{losses[-1]:.3f}", (steps[-1], losses[-1]), textcoords="offset points", xytext=(4, 6), fontsize=9
    )
    top.grid(alpha=0.3)
    top.legend(frameon=False)
    top.set_title(f"{path.parent.parent.name} / {path.parent.name}: step {steps[-1]:,}", fontsize=11)
    bottom.plot([r["step"] for r in records], [r["learning_rate"] for r in records], color="#31a354")
    bottom.set_ylabel("learning rate")
    bottom.set_xlabel("optimizer step")
    bottom.grid(alpha=0.3)
    temporary = path.with_suffix(".tmp.png")
    figure.savefig(temporary)
    os.replace(temporary, path)


def smooth(values: list[float]) -> list[float]:
    """Exponential moving average over about a fiftieth of the points, without bias at the start."""
    decay = 1 - 1 / max(1.0, len(values) / 50)
    average, weight, result = 0.0, 0.0, []
    for value in values:
        if math.isfinite(value):
            average = decay * average + (1 - decay) * value
            weight = decay * weight + (1 - decay)
        result.append(average / weight if weight else value)
    return result
