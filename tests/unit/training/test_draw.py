"""loss.png is a picture, whole, of the right size."""

from pathlib import Path

from aquila.training.plot import draw_loss


def test_draws_a_png(tmp_path: Path) -> None:
    records = [{"step": s, "loss": 8 / s + 1, "learning_rate": 1e-3} for s in range(1, 60)]
    records[30]["valid_loss"] = 1.5
    records[31]["loss"] = None
    draw_loss(records, tmp_path / "loss.png")
    from matplotlib.image import imread

    height, width, _ = imread(tmp_path / "loss.png").shape
    assert (width, height) == (1080, 720)
    assert [p.name for p in tmp_path.iterdir()] == ["loss.png"]


def test_nothing_to_draw_draws_nothing(tmp_path: Path) -> None:
    draw_loss([], tmp_path / "loss.png")
    assert not list(tmp_path.iterdir())
