"""loss.png is a picture, whole, of the right size."""

from pathlib import Path

from aquila.training.plot import draw_loss, draw_throughput


def test_draws_a_png(tmp_path: Path) -> None:
    records = [{"step": s, "loss": 8 / s + 1, "learning_rate": 1e-3} for s in range(1, 60)]
    records[30]["valid_loss"] = 1.5
    records[31]["loss"] = None
    draw_loss(records, tmp_path / "loss.png")
    from matplotlib.image import imread

    height, width, _ = imread(tmp_path / "loss.png").shape
    assert (width, height) == (1080, 720)
    assert [p.name for p in tmp_path.iterdir()] == ["loss.png"]


def test_draws_throughput(tmp_path: Path) -> None:
    records = [{"step": s, "tokens_per_second": 100.0 + s, "mfu": 0.5} for s in range(1, 9)]
    draw_throughput(records, tmp_path / "throughput.png")
    assert (tmp_path / "throughput.png").read_bytes().startswith(b"\x89PNG")


def test_nothing_to_draw_draws_nothing(tmp_path: Path) -> None:
    draw_loss([], tmp_path / "loss.png")
    draw_throughput([], tmp_path / "throughput.png")
    assert not list(tmp_path.iterdir())
