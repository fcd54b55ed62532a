"""A head fitted to a frozen backbone: what it minimises, what it leaves alone, and what an interruption costs."""

import math
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from critrm import frozen_head as module
from critrm import readings
from critrm.config import TrainConfig
from critrm.errors import ConfigError
from critrm.frozen_head import STRENGTHS, fit_head
from critrm.prompts import with_critique
from critrm.reward_model import Reads, RewardModel
from critrm.train import train_reward_model
from critrm.types import CritiquedPair, Message
from critrm.zero_label import CUE, reading_direction


@pytest.fixture
def arm(pairs):
    return [
        CritiquedPair(
            pair=replace(pair, id=f"{pair.id}-{n}"),
            critic="c",
            chosen_critique=f"Right, and short. {n}",
            rejected_critique=f"Wrong, and in doubt. {n}",
        )
        for n in range(2)
        for pair in pairs
    ]


@pytest.fixture
def config(tiny_model):
    return TrainConfig(backbone=str(tiny_model), frozen=True, precision="fp32")


def _ends(differences):
    """Both sides of pairs, from how they differ."""
    return torch.stack([differences, torch.zeros_like(differences)], dim=1)


def plain_rewards(folder, item):
    """The rewards of both sides, by plain transformers and the saved chat template."""
    model, tokenizer = AutoModelForSequenceClassification.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    found = []
    for side in ("chosen", "rejected"):
        rows = with_critique(item.pair.prompt, item.pair.completion(side), item.critique(side))
        text = tokenizer.apply_chat_template([{"role": m.role, "content": m.content} for m in rows], tokenize=False)
        assert text.endswith(CUE)
        with torch.no_grad():
            found.append(model(**tokenizer(text, return_tensors="pt")).logits.item())
    return found


def test_the_backbone_stays_and_the_saved_model_is_a_plain_classifier_that_asks_behind_the_cue(arm, config, tmp_path):
    result = train_reward_model(arm, config, out=tmp_path)
    model = RewardModel.load(result.folder, precision="fp32")
    assert model.reads == Reads(critic="c", backbone=config.backbone, cue=CUE)
    untouched = RewardModel.from_backbone(config.backbone, Reads(), seed=0)
    ours, theirs = model.model.state_dict(), untouched.model.state_dict()
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == ["score.weight"]
    for item in arm[:3]:
        (score,) = model.score([item])
        assert plain_rewards(result.folder, item) == pytest.approx([score.chosen, score.rejected], abs=1e-4)
        critiques = [item.chosen_critique, item.rejected_critique]
        texts = [item.pair.chosen, item.pair.rejected]
        rewards = model.score_completions(item.pair.prompt, texts, critiques=critiques)
        assert rewards == pytest.approx([score.chosen, score.rejected], abs=1e-4)
    assert sum(score.chosen > score.rejected for score in model.score(arm)) == len(arm)
    assert "left out of a fit were ranked right" in result.notes[0]
    assert result.n_tokens == sum(model.encode(item).n_tokens for item in arm)


def test_the_cue_is_never_cut(arm, tiny_model):
    model = RewardModel.from_backbone(str(tiny_model), Reads(critic="c", max_length=96, cue=CUE), seed=0)
    cue = model.tokenizer.encode(CUE, add_special_tokens=False)
    long = replace(arm[0], pair=replace(arm[0].pair, chosen="so " * 200), chosen_critique="long " * 200)
    encoded = model.encode(long)
    assert all(branch[-len(cue) :] == cue for branch in encoded.branches)
    assert len(encoded.prompt) + max(map(len, encoded.branches)) == 96


@pytest.mark.parametrize(("score_weight", "flat"), [(0.0, 1e-5), (0.7, 1e-4)])
def test_a_fit_is_where_the_penalised_loss_is_flat(score_weight, flat):
    generator = torch.Generator().manual_seed(0)
    sides = torch.randn(40, 2, 6, generator=generator, dtype=torch.float64)
    margins = torch.rand(40, generator=generator, dtype=torch.float64)
    scores = torch.randn(40, 2, generator=generator, dtype=torch.float64)
    scores[3] = math.nan
    taught = (sides, scores, score_weight) if score_weight else None
    weight = module._fit(sides[:, 0] - sides[:, 1], margins, 0.1, taught).requires_grad_()
    rewards = sides @ weight
    loss = -torch.nn.functional.logsigmoid(rewards[:, 0] - rewards[:, 1] - margins).mean()
    known = [n for n in range(40) if n != 3]
    loss = loss + score_weight / 40 * (rewards - scores)[known].square().mean(1).sum()
    loss = loss + 0.1 * weight[:-1].square().sum() + 1e-4 * weight[-1].square()
    (gradient,) = torch.autograd.grad(loss, weight)
    assert gradient.abs().max() < flat


def test_labels_of_noise_leave_the_backbones_own_reading():
    generator = torch.Generator().manual_seed(0)
    reading = torch.randn(200, generator=generator)
    direction = torch.zeros(30)
    direction[0] = 2.0
    features = torch.randn(200, 30, generator=generator)
    features[:, 0] = reading.abs()  # the reading is right of every pair, and the rest says nothing
    fit = fit_head(_ends(features), torch.zeros(200), direction, seed=0)
    assert fit.strength == max(STRENGTHS)
    assert fit.weight[0] > 20 * fit.weight[1:].abs().max()


def test_what_pairs_say_is_learnt_against_the_reading():
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(300, 10, generator=generator)
    features[:, 4] = features[:, 4].abs() + 0.1
    direction = torch.eye(10)[0]
    fit = fit_head(_ends(features), torch.zeros(300), direction, seed=0)
    assert fit.held_out_accuracy > 0.95 and fit.weight.argmax() == 4
    again = fit_head(_ends(features), torch.zeros(300), direction, seed=0)
    assert torch.equal(fit.weight, again.weight)


def test_scores_teach_what_labels_do_not_tell():
    generator = torch.Generator().manual_seed(0)
    ends = torch.randn(300, 2, 10, generator=generator)
    scores = ends[..., 7] + 0.1 * torch.randn(300, 2, generator=generator)
    ends[:, 0, 4] += 1.0  # what the labels go by
    ends += 5.0  # a level that the scores do not have
    labels, direction = torch.zeros(300), torch.eye(10)[0]
    plain = fit_head(ends, labels, direction, scores=scores, seed=0)
    alone = fit_head(ends, labels, direction, seed=0)
    assert torch.equal(plain.weight, alone.weight), "not asked for"
    assert torch.equal(fit_head(ends, labels, direction, score_weight=1.0, seed=0).weight, alone.weight), "none there"
    taught = fit_head(ends, labels, direction, scores=scores, score_weight=1.0, seed=0)
    found = [
        torch.corrcoef(torch.stack([(ends @ fit.weight).flatten(), scores.flatten()]))[0, 1] for fit in (plain, taught)
    ]
    assert abs(found[0]) < 0.3 and found[1] > 0.8
    # Scores that are not there are no scores of 0.
    scores[:200] = math.nan
    fewer = fit_head(ends, labels, direction, scores=scores, score_weight=1.0, seed=0)
    assert fewer.weight.argmax() == taught.weight.argmax() == 7


@pytest.mark.parametrize("n", [1, 2, 3])
def test_a_few_pairs_are_enough(n):
    fit = fit_head(_ends(torch.ones(n, 4)), torch.zeros(n), torch.tensor([1.0, 0, 0, 0]), seed=0)
    assert torch.isfinite(fit.weight).all() and fit.weight[0] > 0


def test_a_tokenizer_of_bytes_gives_no_direction(tiny_model, arm, config, tmp_path):
    assert torch.equal(reading_direction(str(tiny_model)), torch.zeros(32))
    assert "no reading of its own" in train_reward_model(arm, config, out=tmp_path).notes[0]


@pytest.mark.slow
def test_the_direction_of_a_real_model_tells_good_critiques_from_bad_ones(smollm2):
    direction = reading_direction(str(smollm2))
    model = RewardModel.from_backbone(str(smollm2), Reads(cue=CUE), seed=0)
    with torch.no_grad():
        model.model.score.weight.copy_(direction[None])
    critiques = ["It is excellent: correct, complete and clear.", "It is terrible: wrong, rude and off topic."]
    good, bad = model.score_completions((Message("user", "Why?"),), ["So.", "So."], critiques=critiques)
    assert good > bad


def test_an_interrupted_reading_goes_on_and_ends_as_an_uninterrupted_one(arm, config, tmp_path, monkeypatch):
    monkeypatch.setattr(readings, "PAIRS_PER_FILE", 5)
    whole = train_reward_model(arm, config, out=tmp_path / "whole")
    read, own = [], readings._read

    def stops(model, pairs, max_tokens_per_step):
        if len(read) == 2:
            raise KeyboardInterrupt
        read.append(len(pairs))
        return own(model, pairs, max_tokens_per_step)

    monkeypatch.setattr(readings, "_read", stops)
    with pytest.raises(KeyboardInterrupt):
        train_reward_model(arm, config, out=tmp_path / "cut")
    again = []
    monkeypatch.setattr(readings, "_read", lambda model, pairs, n: again.append(len(pairs)) or own(model, pairs, n))
    cut = train_reward_model(arm, config, out=tmp_path / "cut")
    assert sum(read) + sum(again) == len(arm)
    ours, theirs = (load_file(each.folder / "model.safetensors") for each in (whole, cut))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert train_reward_model(arm, config, out=tmp_path / "cut") == cut  # finished: nothing is read
    assert sum(read) + sum(again) == len(arm)
    assert not (tmp_path / "cut" / "checkpoints").exists()


def test_settings_that_need_training_are_refused(tiny_model, arm, config, tmp_path, monkeypatch):
    for change in ({"lora_rank": 4}, {"n_epochs": 2}, {"lm_weight": 0.1}, {"keep": "best"}, {"loss": "scaled"}):
        with pytest.raises(ValueError, match=next(iter(change))):
            TrainConfig(backbone=str(tiny_model), frozen=True, **change)
    with pytest.raises(ValueError, match="several learning_rates"):
        TrainConfig(backbone=str(tiny_model), frozen=True, learning_rates=(1e-4, 1e-5), n_held_out=3)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="one process"):
        train_reward_model(arm, config, out=tmp_path)


def test_a_cue_is_part_of_a_models_fingerprint(tiny_model):
    plain, asked = (RewardModel.from_backbone(str(tiny_model), Reads(cue=cue), seed=0) for cue in ("", CUE))
    assert plain.fingerprint != asked.fingerprint
