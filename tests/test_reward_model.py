"""The saved model is a plain transformers classifier, and its rewards do not depend on how pairs are batched."""

import json
from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from critrm.errors import DataError, ModelError
from critrm.prompts import reward_segments
from critrm.reward_model import Reads, RewardModel
from critrm.types import SIDES, CritiquedPair


@pytest.fixture(scope="module")
def reward_model(tiny_model):
    return RewardModel.from_backbone(str(tiny_model), Reads(critic="c", max_length=400), seed=3)


@pytest.fixture
def items(pairs):
    return [
        CritiquedPair(pair=pair, critic="c", chosen_critique="Clear and right.", rejected_critique="Wrong " * (i + 1))
        for i, pair in enumerate(pairs)
    ]


def _by_side(scores):
    return torch.tensor([[score.chosen, score.rejected] for score in scores])


def test_the_saved_model_loads_with_plain_transformers_and_gives_the_same_rewards(reward_model, items, tmp_path):
    reward_model.save(tmp_path)
    assert {path.suffix for path in tmp_path.iterdir()} <= {".json", ".safetensors", ".jinja"}
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path).eval()
    assert plain.config.num_labels == 1
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    ours = reward_model.score(items)
    for item, score in zip(items, ours, strict=True):
        texts = ["".join(reward_segments(item.pair.prompt, item.pair.completion(s), item.critique(s))) for s in SIDES]
        batch = tokenizer(texts, return_tensors="pt", padding=True, split_special_tokens=True)
        with torch.no_grad():
            rewards = plain(**batch).logits.squeeze(-1)
        torch.testing.assert_close(rewards, torch.tensor([score.chosen, score.rejected]), atol=1e-5, rtol=0)
    again = RewardModel.load(tmp_path, precision="fp32")
    assert (again.critic, again.reads.max_length) == ("c", 400)
    torch.testing.assert_close(_by_side(again.score(items)), _by_side(ours), atol=1e-6, rtol=0)
    assert json.loads((tmp_path / "config.json").read_text())["architectures"] == ["LlamaForSequenceClassification"]


@given(max_tokens=st.integers(1, 3000), order=st.randoms())
@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_scores_do_not_depend_on_batch_size_or_order(reward_model, items, max_tokens, order):
    alone = {item.pair.id: reward_model.score([item])[0] for item in items}
    shuffled = list(items)
    order.shuffle(shuffled)
    scores = reward_model.score(shuffled, max_tokens_per_step=max_tokens)
    assert [score.pair_id for score in scores] == [item.pair.id for item in shuffled]
    torch.testing.assert_close(
        _by_side(scores), _by_side([alone[score.pair_id] for score in scores]), atol=1e-5, rtol=0
    )


def test_scores_do_not_depend_on_padding(reward_model, items):
    item = items[0]
    encoded = reward_model.encode(item)
    ids = torch.tensor([encoded.prompt + encoded.branches[0]])
    pad = torch.full((1, 9), reward_model.tokenizer.pad_token_id)
    expected = reward_model.score([item])[0].chosen
    for padded in (torch.cat([ids, pad], 1), torch.cat([pad, ids], 1)):
        mask = (padded != reward_model.tokenizer.pad_token_id).long()
        with torch.no_grad():
            reward = reward_model.model(padded, attention_mask=mask).logits.item()
        assert reward == pytest.approx(expected, abs=1e-5)


def test_gradients_equal_those_of_separate_rows(tiny_model, items):
    from critrm.batching import pack

    model = RewardModel.from_backbone(str(tiny_model), Reads(critic="c"), seed=0)
    encoded = [model.encode(item) for item in items[:4]]
    model.rewards(pack(encoded)).pow(2).sum().backward()
    packed = {name: parameter.grad.clone() for name, parameter in model.model.named_parameters()}
    model.model.zero_grad()
    for pair in encoded:
        for branch in pair.branches:
            model.model(torch.tensor([pair.prompt + branch])).logits.pow(2).sum().backward()
    for name, parameter in model.model.named_parameters():
        assert (packed[name] - parameter.grad).norm() <= 1e-5 * parameter.grad.norm()


def test_the_critique_is_read_and_the_label_is_not(reward_model, items):
    item = items[0]
    changed = reward_model.score([replace(item, chosen_critique="Dreadful.")])[0]
    assert changed.chosen != reward_model.score([item])[0].chosen
    swapped_pair = replace(item.pair, chosen=item.pair.rejected, rejected=item.pair.chosen)
    swapped = replace(
        item, pair=swapped_pair, chosen_critique=item.rejected_critique, rejected_critique=item.chosen_critique
    )
    score, mirror = reward_model.score([item])[0], reward_model.score([swapped])[0]
    assert (mirror.chosen, mirror.rejected) == pytest.approx((score.rejected, score.chosen), abs=1e-5)


def test_hostile_and_very_long_texts_are_scored(reward_model, items):
    hostile = "<|im_end|></s>{{ 7*7 }}\x00‮אבג🙂 "
    pair = replace(items[0].pair, chosen=hostile * 2000, rejected=hostile)
    score = reward_model.score([replace(items[0], pair=pair, chosen_critique=hostile)])[0]
    assert score.chosen == score.chosen
    assert score.rejected == score.rejected


def test_the_head_depends_on_the_seed_alone(tiny_model, items):
    def scores(seed):
        return _by_side(RewardModel.from_backbone(str(tiny_model), Reads(), seed=seed).score(items))

    assert torch.equal(scores(1), scores(1))
    assert not torch.equal(scores(1), scores(2))


def test_errors_name_what_is_wrong(reward_model, items, tiny_model, tmp_path):
    with pytest.raises(DataError, match="ids must be unique"):
        reward_model.score([items[0], items[0]])
    with pytest.raises(ModelError, match=r"lack score.weight.*critrm train"):
        RewardModel.load(tiny_model)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ModelError, match=str(tmp_path)):
        RewardModel.load(tmp_path)
