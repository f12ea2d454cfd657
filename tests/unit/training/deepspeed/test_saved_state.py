"""Any part of any parameter is read from shards as DeepSpeed lays them out; faults are messages."""

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from aquila.core.errors import UserError
from aquila.training.deepspeed import saved_state
from aquila.training.deepspeed.saved_state import MASTER, MOMENTS, SavedState

SHAPES = {name: torch.Size(shape) for name, shape in {"a": (7, 3), "b": (5,), "c": (1,), "d": (2, 9)}.items()}
GROUPS = [["a", "d"], ["b", "c"]]
KEYS = (MASTER, *MOMENTS)


def values(key: str, name: str) -> torch.Tensor:
    """Different everywhere."""
    start = 1000 * KEYS.index(key) + 100 * list(SHAPES).index(name)
    return torch.arange(start, start + SHAPES[name].numel(), dtype=torch.float32)


def state_of(flats: list[dict[str, torch.Tensor]], *, started: bool) -> dict:
    moments = {
        number: {"step": torch.tensor(3.0), **{key: flat[key] for key in MOMENTS}}
        for number, flat in enumerate(flats)
    }
    return {"state": moments if started else {}, "param_groups": [{"lr": 0.1}]}


def write_zero_2(folder: Path, ranks: int, *, started: bool = True) -> None:
    from deepspeed.utils.tensor_fragment import fragment_address

    for rank in range(ranks):
        flats, places = [], []
        for names in GROUPS:
            size = sum(SHAPES[name].numel() for name in names)
            part = -(-size // (2 * ranks)) * 2
            cut = slice(rank * part, (rank + 1) * part)
            padding = torch.zeros(ranks * part - size)
            whole = {key: torch.cat([*(values(key, name) for name in names), padding]) for key in KEYS}
            flats.append({key: flat[cut].clone() for key, flat in whole.items()})
            at, found = 0, {}
            for name in names:
                begin, end = max(at, cut.start), min(at + SHAPES[name].numel(), cut.stop)
                if begin < end:
                    found[name] = fragment_address(numel=end - begin, start=begin - cut.start)
                at += SHAPES[name].numel()
            places.append(found)
        state = {
            "param_slice_mappings": places,
            "loss_scaler": None,
            "base_optimizer_state": state_of(flats, started=started),
            "single_partition_of_fp32_groups": [flat[MASTER] for flat in flats],
        }
        save(folder, rank, state)


def write_zero_3(folder: Path, ranks: int, *, split: bool) -> None:
    """split: a tensor for each parameter."""
    order = [{name: SHAPES[name] for name in names} for names in GROUPS]
    for rank in range(ranks):
        flats = []
        for names in GROUPS:
            parts = []
            for name in names:
                part = -(-SHAPES[name].numel() // ranks)
                padded = {
                    key: torch.cat([values(key, name), torch.zeros(part * ranks - SHAPES[name].numel())])
                    for key in KEYS
                }
                parts.append({key: flat[rank * part :][:part].clone() for key, flat in padded.items()})
            joined = {key: torch.cat([part[key] for part in parts]) for key in KEYS}
            flats += parts if split else [joined]
        state = {
            "fp32_flat_groups": [flat[MASTER] for flat in flats],
            "loss_scaler": None,
            "optimizer_state_dict": state_of(flats, started=True),
        }
        save(folder, rank, state)
    torch.save({"param_shapes": order}, folder / "zero_pp_rank_0_mp_rank_00_model_states.pt")


def save(folder: Path, rank: int, state: dict) -> None:
    torch.save({"optimizer_state_dict": state}, folder / f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt")


def read(state: SavedState, name: str, key: str, first: int, numel: int) -> torch.Tensor:
    result = torch.full((numel,), -1.0)
    for done, part in state.read(name, key, first, numel):
        result[done : done + len(part)] = part
    return result


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_every_part_of_every_parameter(tmp_path_factory, data) -> None:
    folder = tmp_path_factory.mktemp("shards")
    ranks = data.draw(st.integers(1, 6))
    if data.draw(st.booleans()):
        write_zero_2(folder, ranks)
    else:
        write_zero_3(folder, ranks, split=data.draw(st.booleans()))
    state = SavedState(folder, ranks, SHAPES)
    assert state.step == 3
    for name, shape in SHAPES.items():
        first = data.draw(st.integers(0, shape.numel() - 1))
        numel = data.draw(st.integers(1, shape.numel() - first))
        for key in KEYS:
            assert torch.equal(read(state, name, key, first, numel), values(key, name)[first : first + numel])


def test_large_parts_pass_in_blocks(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(saved_state, "_STAGE", 4)
    write_zero_2(tmp_path, 1)
    state = SavedState(tmp_path, 1, SHAPES)
    assert max(len(part) for _, part in state.read("a", MASTER, 0, 21)) == 4
    assert torch.equal(read(state, "a", MASTER, 2, 17), values(MASTER, "a")[2:19])


def test_before_the_first_step_there_are_no_moments(tmp_path) -> None:
    write_zero_2(tmp_path, 2, started=False)
    state = SavedState(tmp_path, 2, SHAPES)
    assert state.step == 0
    assert list(state.read("a", "exp_avg", 0, 21)) == []
    assert torch.equal(read(state, "a", MASTER, 0, 21), values(MASTER, "a"))


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("missing", "zero_pp_rank_1_mp_rank_00_optim_states.pt is missing"),
        ("shape", r"holds 21 elements of a, which has 28"),
        ("name", "not the shards of this model"),
        ("place", "are asked for"),
        ("fewer", "holds .* elements of a, which has 21"),
    ],
)
def test_faults_are_messages(tmp_path, fault, message) -> None:
    from deepspeed.utils.tensor_fragment import fragment_address

    write_zero_2(tmp_path, 2)
    shapes, world = dict(SHAPES), 2
    first = tmp_path / "zero_pp_rank_0_mp_rank_00_optim_states.pt"
    if fault == "missing":
        (tmp_path / "zero_pp_rank_1_mp_rank_00_optim_states.pt").unlink()
    elif fault == "shape":
        shapes["a"] = torch.Size((7, 4))
    elif fault == "name":
        shapes["e"] = shapes.pop("a")
    elif fault == "place":
        content = torch.load(first, weights_only=False)
        places = content["optimizer_state_dict"]["param_slice_mappings"]
        places[0]["a"] = fragment_address(numel=places[0]["a"].numel, start=10**6)
        torch.save(content, first)
    elif fault == "fewer":
        world = 1
    with pytest.raises(UserError, match=message):
        read(SavedState(tmp_path, world, shapes), "a", MASTER, 0, 21)
