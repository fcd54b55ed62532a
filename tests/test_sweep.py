"""Which pairs are held out, and that the rate with the lowest loss on them is taken."""

import json

import pytest
from rich.console import Console

from critrm.config import TrainConfig
from critrm.errors import DataError
from critrm.sweep import choose_learning_rate, split_held_out
from critrm.types import CritiquedPair


def test_every_arm_holds_out_the_same_pairs(pairs):
    plain = [CritiquedPair(pair=pair) for pair in pairs]
    critiqued = [CritiquedPair(pair=pair, critic="c", chosen_critique="A", rejected_critique="B") for pair in pairs]
    (rest, held_out), (other_rest, other_held_out) = split_held_out(plain, 4), split_held_out(critiqued, 4)
    assert [item.pair for item in held_out] == [item.pair for item in other_held_out]
    assert [item.pair for item in rest] == [item.pair for item in other_rest]
    assert len(held_out) == 4 and {*rest, *held_out} == {*plain}
    assert [item.pair.id for item in rest] == sorted(item.pair.id for item in rest), "the order is kept"


def test_holding_out_all_pairs_is_an_error(pairs):
    with pytest.raises(DataError, match="leave none of 12"):
        split_held_out([CritiquedPair(pair=pair) for pair in pairs], 12)


def test_the_rate_with_the_lowest_held_out_loss_is_taken_and_trials_are_not_repeated(tiny_model, pairs, tmp_path):
    arm = [CritiquedPair(pair=pair) for pair in pairs]
    config = TrainConfig(
        backbone=str(tiny_model), batch_size=4, learning_rates=(1e-6, 1e-2), n_held_out=4, precision="fp32"
    )

    def choose() -> float:
        return choose_learning_rate(arm, config, out=tmp_path, max_length=256, console=Console(quiet=True))

    rate = choose()
    marks = {path.parents[1].name: path for path in tmp_path.glob("*/sweep/done.json")}
    losses = {name: json.loads(path.read_text())["loss"] for name, path in marks.items()}
    assert f"learning-rate-{rate:g}" == min(losses, key=losses.__getitem__) and len(losses) == 2
    times = {name: path.stat().st_mtime_ns for name, path in marks.items()}
    assert choose() == rate
    assert {name: path.stat().st_mtime_ns for name, path in marks.items()} == times
