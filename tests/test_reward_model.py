"""The saved model is a plain transformers classifier, and its rewards do not depend on how pairs are batched."""

import itertools
import json
import random
from dataclasses import replace
from functools import partial

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from critrm.batching import Candidates, EncodedPair, pack, token_batches
from critrm.errors import DataError, ModelError
from critrm.prompts import reward_segments, with_critique
from critrm.reward_model import Reads, RewardModel
from critrm.types import SIDES, CritiquedPair


@pytest.fixture(scope="module")
def reward_model(tiny_model):
    return RewardModel.from_backbone(str(tiny_model), Reads(critic="c", max_length=400), seed=3)


@pytest.fixture(scope="module")
def critique_first(tiny_model):
    return RewardModel.from_backbone(str(tiny_model), Reads(critic="c", max_length=400, critique_first=True), seed=3)


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


@given(max_tokens=st.integers(1, 3000), n=st.integers(1, 4), order=st.randoms())
@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_scores_do_not_depend_on_batch_size_threads_or_order(reward_model, items, set_threads, max_tokens, n, order):
    set_threads(n)
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


TOKENS = st.integers(3, 250)
PARTS = st.tuples(
    st.lists(TOKENS, min_size=1, max_size=30),
    st.lists(TOKENS, min_size=1, max_size=30),
    st.lists(TOKENS, min_size=1, max_size=30),
)


def _encoded(parts, *, same_prompt):
    """Pairs of any lengths; a one-token side beside a long one in each, and a second pair of the first one's prompt."""
    pairs = [EncodedPair(str(i), prompt, (a, b)) for i, (prompt, a, b) in enumerate(parts)]
    pairs.append(EncodedPair("left over", parts[0][0] if same_prompt else [4], (parts[0][1], [7])))
    return pairs


def _gradients(model):
    found = {name: parameter.grad for name, parameter in model.model.named_parameters()}
    model.model.zero_grad()
    return found


def _separately(model, pairs):
    return torch.stack(
        [
            torch.cat([model.model(torch.tensor([pair.prompt + branch])).logits[0] for branch in pair.branches])
            for pair in pairs
        ]
    )


@given(st.lists(PARTS, min_size=1, max_size=4), st.booleans(), st.randoms())
@example([([67], [135], [64])], True, random.Random(0))
@settings(max_examples=25, deadline=None)
def test_rewards_and_gradients_equal_those_of_separate_rows(reward_model, parts, same_prompt, order):
    """Each pair's weight in the loss is its own, so that a reward of another pair would show."""
    pairs = _encoded(parts, same_prompt=same_prompt)
    weights = {pair.pair_id: float(i + 1) for i, pair in enumerate(pairs)}
    rewards = reward_model.rewards(pack(pairs))
    expected = _separately(reward_model, pairs)
    scale = float(expected.detach().abs().max())
    assert float((rewards - expected).detach().abs().max()) < 1e-5 * scale
    (expected.pow(2).sum(1) * torch.tensor([weights[pair.pair_id] for pair in pairs])).sum().backward()
    true = _gradients(reward_model)
    # In another order, and in two rows.
    order.shuffle(pairs)
    for part in (pairs[:1], pairs[1:]):
        squares = reward_model.rewards(pack(part)).pow(2).sum(1)
        (squares * torch.tensor([weights[pair.pair_id] for pair in part])).sum().backward()
    total = torch.cat([gradient.flatten() for gradient in true.values()]).norm()
    for name, gradient in _gradients(reward_model).items():
        # Some gradients nearly cancel (a key's, where few are seen): the rest is off by the rounding of what
        # it is made of, which is gone in fp64.
        rounding = 4 * torch.finfo(torch.float32).eps * total
        assert (gradient - true[name]).norm() <= 1e-5 * true[name].norm() + rounding, name


@given(st.lists(PARTS, min_size=1, max_size=4), st.booleans())
@settings(max_examples=15, deadline=None)
def test_in_bf16_rewards_and_gradients_are_as_exact_as_those_of_separate_rows(reward_model, parts, same_prompt):
    """Rounding is what separate rows in bf16 are off by, which depends on the weights: at most three times that.

    One percent is added, two to three roundings of 0.4 %, for the rows that happen to be hardly off.
    """
    pairs = _encoded(parts, same_prompt=same_prompt)

    def results(rewards):
        rewards.pow(2).sum().backward()
        return rewards.detach(), torch.cat([gradient.flatten() for gradient in _gradients(reward_model).values()])

    exact = results(reward_model.rewards(pack(pairs)))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        packed, apart = results(reward_model.rewards(pack(pairs))), results(_separately(reward_model, pairs).float())
    for mine, theirs, true in zip(packed, apart, exact, strict=True):
        assert (mine - true).norm() <= 3 * (theirs - true).norm() + 0.01 * true.norm()


def test_loaded_in_bf16_it_gives_the_bits_of_autocast_and_keeps_its_head(reward_model, items, tmp_path):
    reward_model.save(tmp_path)
    loaded = RewardModel.load(tmp_path, precision="bf16")
    kinds = {name: parameter.dtype for name, parameter in loaded.model.named_parameters()}
    assert kinds["score.weight"] == torch.float32
    assert kinds["model.layers.0.mlp.up_proj.weight"] == torch.bfloat16
    autocast = RewardModel.load(tmp_path, precision="fp32")
    autocast.precision = "bf16"
    assert loaded.score(items) == autocast.score(items)


def test_a_stream_is_scored_by_window_in_constant_memory(reward_model, items, monkeypatch):
    monkeypatch.setattr("critrm.reward_model.token_batches", partial(token_batches, window=4))
    n_read, n_done = [], []

    def endless():
        for i in itertools.count():
            n_read.append(i)
            item = items[i % len(items)]
            yield replace(item, pair=replace(item.pair, id=str(i)))

    stream = reward_model.score_stream(endless(), on_progress=n_done.append)
    first = [next(stream) for _ in range(12)]
    assert len(n_read) <= 12 + 4
    assert [sorted(int(score.pair_id) for score in first[i : i + 4]) for i in (0, 4, 8)] == [
        [0, 1, 2, 3],
        [4, 5, 6, 7],
        [8, 9, 10, 11],
    ]
    by_id = {score.pair_id: score for score in first}
    expected = {str(i): score for i, score in enumerate(reward_model.score(items))}
    for pair_id, score in by_id.items():
        assert (score.chosen, score.rejected) == pytest.approx(
            (expected[pair_id].chosen, expected[pair_id].rejected), abs=1e-5
        )
    assert sum(n_done) >= 8


def test_the_same_call_gives_the_same_bits(reward_model, items):
    assert reward_model.score(items) == reward_model.score(items)


@pytest.mark.parametrize("max_tokens", [1, 150, 4096])
def test_candidates_get_the_rewards_they_get_alone(reward_model, items, max_tokens):
    candidates = [
        Candidates(
            prompt=item.pair.prompt,
            completions=(item.pair.chosen, item.pair.rejected, item.pair.chosen),
            critiques=(("Good.", "Rather long, but good.", ""), ("Wrong.",), ("Good.",)) if i % 2 else (),
        )
        for i, item in enumerate(items[:5])
    ]
    n_done = []
    rewards = list(
        reward_model.score_candidates(iter(candidates), max_tokens_per_step=max_tokens, on_progress=n_done.append)
    )
    assert sum(n_done) == len(candidates)
    for each, found in zip(candidates, rewards, strict=True):
        assert [len(of_one) for of_one in found] == [len(c) for c in each.critiques or ((1,),) * 3]
        for completion, critiques, of_one in zip(each.completions, each.critiques or (("",),) * 3, found, strict=True):
            for critique, reward in zip(critiques, of_one, strict=True):
                text = "".join(reward_segments(each.prompt, completion, critique))
                with torch.no_grad():
                    alone = reward_model.model(torch.tensor([reward_model._encode(text)])).logits.item()
                assert reward == pytest.approx(alone, abs=1e-5)


def test_a_critique_may_be_read_before_the_completion(critique_first, reward_model, items, tmp_path):
    scores = critique_first.score(items)
    assert critique_first.fingerprint != reward_model.fingerprint
    assert scores != reward_model.score(items)
    critique_first.save(tmp_path)
    assert RewardModel.load(tmp_path, precision="fp32").score(items) == scores
    plain, tokenizer = AutoModelForSequenceClassification.from_pretrained(tmp_path), critique_first.tokenizer
    for item, score in zip(items, scores, strict=True):
        critiques = [(item.critique(side),) for side in SIDES]
        candidates = Candidates(
            prompt=item.pair.prompt, completions=tuple(map(item.pair.completion, SIDES)), critiques=tuple(critiques)
        )
        rewards = [rewards[0] for rewards in next(critique_first.score_candidates([candidates]))]
        assert rewards == pytest.approx([score.chosen, score.rejected], abs=1e-5)
        read = with_critique(item.pair.prompt, item.pair.chosen, item.chosen_critique, critique_first=True)
        rows = [{"role": each.role, "content": each.content} for each in read]
        text = AutoTokenizer.from_pretrained(tmp_path).apply_chat_template(rows, tokenize=False)
        with torch.no_grad():
            logit = plain(**tokenizer(text, return_tensors="pt")).logits.item()
        assert logit == pytest.approx(score.chosen, abs=1e-5)


def test_completions_of_one_prompt_are_rewarded_like_a_pair(reward_model, items):
    item = items[2]
    score = reward_model.score([item])[0]
    rewards = reward_model.score_completions(
        item.pair.prompt,
        [item.pair.rejected, item.pair.chosen],
        critiques=[item.rejected_critique, item.chosen_critique],
    )
    assert rewards == pytest.approx([score.rejected, score.chosen], abs=1e-5)
    assert len(reward_model.score_completions(item.pair.prompt, ["a", "b", "a"])) == 3
    assert reward_model.score_completions(item.pair.prompt, []) == []
    with pytest.raises(DataError, match="critiques of 1 completions"):
        reward_model.score_completions(item.pair.prompt, ["a", "b"], critiques=["good"])


def test_out_of_memory_says_what_to_lower(reward_model, items, monkeypatch):
    def fails(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(reward_model.model, "forward", fails)
    with pytest.raises(ModelError, match=r"memory ran out .*held \d+ tokens.*--max-tokens-per-step"):
        reward_model.score(items)


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
