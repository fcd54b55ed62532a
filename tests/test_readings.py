"""What a frozen backbone read is kept: the same rewards, and nothing read twice, by several processes either."""

import os
import subprocess
import sys
import tempfile
from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from critrm import readings
from critrm.errors import StorageError
from critrm.readings import PAIRS_PER_FILE, FrozenRewardModel, Readings
from critrm.reward_model import Reads, RewardModel
from critrm.types import CritiquedPair
from critrm.zero_label import CUE

OWN_READ = readings._read


def read(model, encoded):
    with tempfile.TemporaryDirectory() as folder:
        return Readings(folder).of(model, encoded)


@pytest.fixture
def arm(pairs):
    return [
        CritiquedPair(
            pair=replace(pair, id=f"{pair.id}-{n}"),
            critic="c",
            chosen_critique=f"Right. {n}",
            rejected_critique=f"Wrong, and in doubt. {n}",
        )
        for n in range(-(-3 * PAIRS_PER_FILE // len(pairs)))
        for pair in pairs
    ]


@pytest.fixture
def reads(monkeypatch):
    """How many pairs were read, call by call."""
    seen = []
    monkeypatch.setattr(readings, "_read", lambda model, pairs, n: seen.append(len(pairs)) or OWN_READ(model, pairs, n))
    return seen


@pytest.fixture
def model(tiny_model):
    return RewardModel.from_backbone(str(tiny_model), Reads(critic="c", backbone=str(tiny_model), cue=CUE), seed=0)


@pytest.fixture
def frozen(model, tmp_path):
    model.save(tmp_path / "model")
    loaded = FrozenRewardModel.load(tmp_path / "model", precision="fp32")
    loaded.readings = Readings(tmp_path / "readings")
    return loaded


def test_the_head_on_what_was_read_gives_the_models_rewards(model, arm, tmp_path):
    encoded = [model.encode(item) for item in arm]
    with torch.no_grad():
        rewards = model.head(Readings(tmp_path).of(model, encoded)).squeeze(-1)
    scores = [(score.chosen, score.rejected) for score in model.score(arm)]
    assert torch.allclose(rewards, torch.tensor(scores), atol=1e-5)


def test_a_frozen_model_scores_as_any_other_and_reads_no_pair_twice(model, frozen, arm, reads):
    done = []
    scores = frozen.score(arm, on_progress=done.append)
    assert sum(reads) == sum(done) == len(arm)
    plain = RewardModel.load(frozen.name, precision="fp32").score(arm)
    assert [score.pair_id for score in scores] == [item.pair.id for item in arm]
    for ours, theirs in zip(scores, plain, strict=True):
        assert (ours.chosen, ours.rejected) == pytest.approx((theirs.chosen, theirs.rejected), abs=1e-5)
    reads.clear()
    assert frozen.score(arm) == scores
    with torch.no_grad():
        frozen.head.weight.mul_(-1)  # another head on the same backbone
    assert [score.chosen for score in frozen.score(arm)] == [-score.chosen for score in scores]
    assert not reads


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(drawn=st.lists(st.lists(st.integers(0, 11), max_size=12), max_size=4))
def test_any_selection_in_any_order_is_read_once(model, arm, drawn):
    encoded = [model.encode(item) for item in arm[:12]]
    whole = read(model, encoded)
    seen, done = [], []
    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory() as folder:
        patch.setattr(readings, "_read", lambda model, pairs, n: seen.extend(pairs) or OWN_READ(model, pairs, n))
        patch.setattr(readings, "PAIRS_PER_FILE", 3)
        for numbers in filter(None, drawn):
            ends = Readings(folder).of(model, [encoded[n] for n in numbers], on_progress=done.append)
            assert torch.allclose(ends, whole[numbers], atol=1e-5)
    assert len(seen) == len({n for numbers in drawn for n in numbers})
    assert sum(done) == sum(map(len, drawn))


def test_what_is_read_otherwise_is_read_anew(model, arm, reads, tmp_path):
    encoded, store = [model.encode(item) for item in arm[:3]], Readings(tmp_path)
    for change in ({}, {"precision": "bf16"}, {"reads": replace(model.reads, backbone="another")}):
        for name, value in change.items():
            setattr(model, name, value)
        store.of(model, encoded)
    critiqued = replace(arm[0], chosen_critique="Another.")
    store.of(model, [model.encode(critiqued), *encoded[1:]])
    assert reads == [3, 3, 3, 1]


def test_what_another_process_reads_meanwhile_is_not_read_again(model, arm, tmp_path, monkeypatch):
    encoded = [model.encode(item) for item in arm]

    def meanwhile(model, pairs, max_tokens_per_step):
        monkeypatch.setattr(readings, "_read", OWN_READ)
        Readings(tmp_path).of(model, encoded)
        monkeypatch.setattr(readings, "_read", lambda *_: pytest.fail("read twice"))
        return OWN_READ(model, pairs, max_tokens_per_step)

    monkeypatch.setattr(readings, "_read", meanwhile)
    assert torch.equal(Readings(tmp_path).of(model, encoded), Readings(tmp_path).of(model, encoded))


def test_a_killed_process_leaves_nothing_half_written(frozen, arm, tmp_path):
    script = (
        "import os, sys; from critrm import readings; from safetensors.torch import save_file\n"
        "def torn(tensors, path):\n"
        "    save_file(tensors, path); path.write_bytes(path.read_bytes()[:40]); os._exit(9)\n"
        "readings.save_file = torn\n"
        "from critrm.reward_model import RewardModel\n"
        "from critrm.types import CritiquedPair, Message, PreferencePair\n"
        "model = RewardModel.load(sys.argv[1], precision='fp32')\n"
        "pair = PreferencePair(id='1', prompt=(Message('user', 'Why?'),), chosen='So.', rejected='No.')\n"
        "item = CritiquedPair(pair=pair, critic='c', chosen_critique='Good.', rejected_critique='Bad.')\n"
        "readings.Readings(sys.argv[2]).of(model, [model.encode(item)])\n"
    )
    command = [sys.executable, "-c", script, frozen.name, str(tmp_path / "readings")]
    assert subprocess.run(command, env=os.environ, check=False).returncode == 9
    assert not list((tmp_path / "readings").glob("*.safetensors"))
    assert len(list((tmp_path / "readings").iterdir())) == 1
    assert len(frozen.score(arm[:1])) == 1


def test_a_folder_that_cannot_be_written_is_named(model, arm, tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(StorageError, match="file"):
        Readings(tmp_path / "file").of(model, [model.encode(arm[0])])
