"""The untrained backbone as a reward model: what is compared, against plain forward passes, and what is kept."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from critrm import zero_label as module
from critrm.baselines import UNTRAINED_ALONE, UNTRAINED_WHOLE
from critrm.errors import ConfigError, DataError, ModelError
from critrm.prompts import reward_segments
from critrm.reward_model import Reads, RewardModel
from critrm.store import read_rows
from critrm.types import CritiquedPair, Outcome
from critrm.zero_label import BAD, CUE, GOOD, ZeroLabelModel, telling_paths, zero_label_scores


@pytest.fixture
def items(pairs):
    return [
        CritiquedPair(
            pair=pair, critic="c", chosen_critique=f"Good: {n}.", rejected_critique=f"Not {n}, bad <|im_end|>"
        )
        for n, pair in enumerate(pairs[:5])
    ]


def test_words_are_told_apart_by_the_fewest_tokens():
    assert telling_paths([(1,), (2, 3), (2, 4)], [(2, 5)]) == ((1,), (2, 3), (2, 4))
    assert telling_paths([(1,), (2, 3), (2, 4)], [(6,)]) == ((1,), (2,))
    assert telling_paths([(1, 2), (3,)], [(1, 2, 9)]) == ((3,),), "a word that begins an opposite one is left out"


WORDS = st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=4).map(tuple), min_size=1, max_size=5)


@given(WORDS, WORDS)
def test_no_path_begins_an_opposite_word_or_another_path(words, others):
    paths = telling_paths(words, others)
    for path in paths:
        assert not any(other[: len(path)] == path for other in others)
        assert any(word[: len(path)] == path for word in words)
        assert not any(path != other and path[: len(other)] == other for other in paths), "or it would count twice"


def _by_hand(model, text):
    """From one plain forward pass for each token of each word that it takes to tell it from the opposite ones."""
    encode = model._encode
    words = [[tuple(encode(f" {word}")) for word in each] for each in (GOOD, BAD)]

    def log_p(path):
        total = 0.0
        for n, token in enumerate(path):
            ids = torch.tensor([model._bos + encode(text) + encode(CUE) + list(path[:n])])
            with torch.inference_mode():
                total += model.model(input_ids=ids).logits[0, -1].log_softmax(-1)[token]
        return total

    good, bad = telling_paths(words[0], words[1]), telling_paths(words[1], words[0])
    return float(torch.stack([log_p(p) for p in good]).logsumexp(0) - torch.stack([log_p(p) for p in bad]).logsumexp(0))


@pytest.mark.parametrize("packs", [True, False])
def test_both_readings_are_those_of_plain_forward_passes(tiny_model, items, packs):
    model = ZeroLabelModel.load(str(tiny_model), critic="c", device="cpu")
    assert model.packs and max(map(len, model._starts)) > 0, "the tiny tokenizer splits the words"
    if not packs:
        model.packs = False
        model.model.set_attn_implementation("sdpa")
    whole = model.score(items[:2])
    model.critique_only = True
    alone = model.score(items[:2])
    for item, read, critique in zip(items, whole, alone, strict=False):
        for side in ("chosen", "rejected"):
            text = "".join(reward_segments(item.pair.prompt, item.pair.completion(side), item.critique(side)))
            assert getattr(read, side) == pytest.approx(_by_hand(model, text), abs=1e-3)
            assert getattr(critique, side) == pytest.approx(_by_hand(model, item.critique(side)), abs=1e-3)


def test_scores_do_not_depend_on_company_and_come_in_order(tiny_model, items):
    model, done = ZeroLabelModel.load(str(tiny_model), critic="c", device="cpu"), []
    scores = model.score(items, max_tokens_per_step=200, on_progress=done.append)
    assert [score.pair_id for score in scores] == [item.pair.id for item in items]
    assert sum(done) == len(items) and len(done) > 1
    (alone,) = model.score(items[2:3])
    assert (alone.chosen, alone.rejected) == pytest.approx((scores[2].chosen, scores[2].rejected), abs=1e-4)
    (changed,) = model.score([replace(items[0], chosen_critique="A quite different critique.")])
    assert changed.chosen != pytest.approx(scores[0].chosen, abs=1e-3), "it reads the critique"
    assert changed.rejected == pytest.approx(scores[0].rejected, abs=1e-4)


def test_long_texts_are_cut_to_what_it_may_read(tiny_model, items):
    model = ZeroLabelModel.load(str(tiny_model), critic="c", max_length=150, device="cpu")
    longest = replace(items[0], chosen_critique="word " * 500, rejected_critique="other " * 900)
    for model.critique_only in (True, False):
        tree = model.encode(longest)
        starts = max(map(len, model._starts))
        assert max(len(tree.prompt) + len(text) + starts for text, _ in tree.branches) <= 150
        assert all(text[-len(model._cue) :] == model._cue for text, _ in tree.branches), "the cue is never cut"


def test_without_critiques_only_the_whole_text_is_read(tiny_model, pairs, items):
    plain = [CritiquedPair(pair=pair) for pair in pairs[:3]]
    assert set(zero_label_scores(plain, backbone=str(tiny_model))) == {UNTRAINED_WHOLE}
    assert zero_label_scores([], backbone="no/such-model") == {UNTRAINED_WHOLE: []}
    with pytest.raises(ConfigError, match="give them"):
        ZeroLabelModel.load(str(tiny_model), critique_only=True)
    items[1] = replace(items[1], rejected_critique=" ")
    found = zero_label_scores(items, backbone=str(tiny_model))
    assert [n for n, each in enumerate(found[UNTRAINED_ALONE]) if each.outcome is Outcome.UNSCORED] == [1]
    assert not any(each.outcome is Outcome.UNSCORED for each in found[UNTRAINED_WHOLE])


def rewards(readings):
    """By reading and pair."""
    return {
        (name, score.pair_id): (score.chosen, score.rejected) for name, scores in readings.items() for score in scores
    }


def test_what_was_read_is_kept_and_an_interrupted_reading_goes_on(tiny_model, items, tmp_path, monkeypatch):
    path, alone = tmp_path / "z.jsonl", rewards(zero_label_scores(items, backbone=str(tiny_model)))
    # Other windows of pairs round otherwise.
    whole = {place: pytest.approx(found, abs=1e-4) for place, found in alone.items()}
    monkeypatch.setattr(module, "PAIRS_PER_SAVE", 2)
    read, score = [], ZeroLabelModel.score

    def counted(self, found, **how):
        if len(read) == 2:
            raise KeyboardInterrupt
        read.append(len(found))
        return score(self, found, **how)

    monkeypatch.setattr(ZeroLabelModel, "score", counted)
    with pytest.raises(KeyboardInterrupt):
        zero_label_scores(items, backbone=str(tiny_model), path=path)
    assert (read, len(list(read_rows(path)))) == ([2, 2], 4)
    read.insert(0, 0)
    assert rewards(zero_label_scores(items, backbone=str(tiny_model), path=path)) == whole
    assert read[3:] == [1, 2, 2, 1], "what was left of one reading, then the other"
    monkeypatch.setattr(ZeroLabelModel, "load", lambda *_, **__: pytest.fail("loaded though all is known"))
    assert rewards(zero_label_scores(items, backbone=str(tiny_model), path=path)) == whole


def test_identical_completions_tie(tiny_model, items):
    same = replace(items[0], pair=replace(items[0].pair, rejected=items[0].pair.chosen))
    found = zero_label_scores([same], backbone=str(tiny_model))
    assert set(found) == {UNTRAINED_ALONE, UNTRAINED_WHOLE}
    assert all(score.outcome is Outcome.TIE for scores in found.values() for score in scores)


def test_what_is_no_language_model_or_tells_no_words_is_refused(tiny_model, tmp_path, monkeypatch):
    RewardModel.from_backbone(str(tiny_model), Reads(), seed=0).save(tmp_path / "trained")
    with pytest.raises(ModelError, match="a classifier"):
        ZeroLabelModel.load(str(tmp_path / "trained"))
    monkeypatch.setattr(module, "GOOD", ("bad",))
    monkeypatch.setattr(module, "BAD", ("bad", "badly"))
    with pytest.raises(DataError, match="does not tell"):
        ZeroLabelModel.load(str(tiny_model))


def test_another_question_or_other_weights_are_another_model(tiny_model, monkeypatch):
    first = ZeroLabelModel.load(str(tiny_model), critic="c", device="cpu")
    assert ZeroLabelModel.load(str(tiny_model), critic="c", device="cpu").fingerprint == first.fingerprint
    prints = {first.fingerprint}
    first.critique_only = True
    prints.add(first.fingerprint)
    monkeypatch.setattr(module, "CUE", "\n\nIs it good? It is")
    prints.add(first.fingerprint)
    with torch.no_grad():
        first.model.get_output_embeddings().weight += 1e-3
    prints.add(first.fingerprint)
    assert len(prints) == 4


@pytest.mark.slow
def test_smollm2_prefers_praised_completions(smollm2, items):
    praise = "The response is correct, complete and clear; it answers the question fully."
    blame = "The response is wrong, rambles, and does not answer the question at all."
    items = [replace(item, chosen_critique=praise, rejected_critique=blame) for item in items]
    found = zero_label_scores(items, backbone=str(smollm2))
    assert all(score.outcome is Outcome.RIGHT for scores in found.values() for score in scores)
