import asyncio

import pytest

from critrm.attribute import attribute_sentences
from critrm.critique_cache import CritiqueCache
from critrm.errors import ConfigError, CriticMismatch, DataError, ModelError
from critrm.live import LiveRewardModel
from critrm.llm import Reply
from critrm.reward_model import Reads, RewardModel
from critrm.types import CritiquedPair, PreferencePair
from live_parts import PROMPT, READS, critique_of, make_critic, offline, scripted_critic


@pytest.fixture(scope="session")
def reads_critiques(tiny_model) -> RewardModel:
    return RewardModel.from_backbone(str(tiny_model), READS, seed=0)


@pytest.fixture
def cache(tmp_path):
    with CritiqueCache(tmp_path / "critiques.sqlite") as store:
        yield store


def test_critiques_and_scores_as_offline(reads_critiques, scripted_chat, cache):
    chat = scripted_critic()
    completions = ["4.", "It is 5.", "<|im_end|>{{ x }}\0\u202e🙂"]
    heard = []
    with LiveRewardModel(reads_critiques, critic=make_critic(chat, cache)) as live:
        scores = asyncio.run(live.score(PROMPT, completions, on_critique=lambda i, c: heard.append((i, c.text))))
    critiques = [critique_of(request.messages[0].content) for request in chat.calls]
    assert [score.critique for score in scores] == critiques
    assert heard == list(enumerate(critiques))
    assert [score.critic for score in scores] == ["scripted"] * 3
    assert [score.reward for score in scores] == pytest.approx(
        offline(reads_critiques, completions, critiques), abs=1e-4
    )
    assert len({score.reward for score in scores}) == 3


def test_each_call_is_made_once(reads_critiques, scripted_chat, cache):
    chat = scripted_critic()
    with LiveRewardModel(reads_critiques, critic=make_critic(chat, cache)) as live:

        async def many():
            return await asyncio.gather(*(live.score(PROMPT, ["4", "5"]) for _ in range(20)))

        first = asyncio.run(many())
        assert len(chat.calls) == 2
        again = asyncio.run(live.score(PROMPT, ["4", "5"]))  # in another event loop
        assert len(chat.calls) == 2
    assert all(score.cached for score in again)
    assert not first[0][0].cached
    assert {round(scores[1].reward, 4) for scores in first} == {round(again[1].reward, 4)}
    assert live.batcher.stats.n_batches < 10, "requests that wait are computed together"
    assert live.critic.stats.n_answered == 2
    assert live.batcher.stats.n_waiting == 0


def test_without_its_critique_all_of_a_request_are_scored_without(reads_critiques, scripted_chat, cache):
    def answer(request):
        bad = "Chatbot: 5" in request.messages[0].content
        return Reply(id=request.id, failure="http 400: too long") if bad else "Good."

    critic = make_critic(scripted_chat(answer), cache)
    with LiveRewardModel(reads_critiques, critic=critic, on_failure="without") as live:
        scores = asyncio.run(live.score(PROMPT, ["4", "5"]))
    assert [(score.critic, score.critique, score.failure) for score in scores] == [
        ("none", "", ""),
        ("none", "", "http 400"),
    ]
    assert [score.reward for score in scores] == pytest.approx(offline(reads_critiques, ["4", "5"], ["", ""]), abs=1e-4)
    assert live.n_without == 2


def test_policies_are_checked_at_the_start(tiny_model, scripted_chat, cache, reads_critiques):
    strict = RewardModel.from_backbone(str(tiny_model), Reads(critic="scripted"), seed=0)
    critic = make_critic(scripted_critic(), cache)
    with pytest.raises(ConfigError, match="critique_dropout"):
        LiveRewardModel(strict, critic=critic, on_failure="without")
    with pytest.raises(ConfigError, match="--critic"):
        LiveRewardModel(strict)
    other = RewardModel.from_backbone(str(tiny_model), Reads(critic="other"), seed=0)
    with pytest.raises(CriticMismatch, match="'other'"):
        LiveRewardModel(other, critic=critic)
    LiveRewardModel(other, critic=critic, allow_other_critic=True)
    with LiveRewardModel(reads_critiques) as live:  # it was trained to do without
        (score,) = asyncio.run(live.score(PROMPT, ["4"]))
    assert score.critic == "none"


def test_bad_requests_are_data_errors(reads_critiques):
    with LiveRewardModel(reads_critiques) as live:
        with pytest.raises(DataError, match="no completions"):
            asyncio.run(live.score(PROMPT, []))
        with pytest.raises(DataError, match="critiques of 2"):
            asyncio.run(live.score(PROMPT, ["a"], critiques=["x", "y"]))
        with pytest.raises(DataError, match="no critique"):
            asyncio.run(live.attribute(PROMPT, "a", critique=" "))


def test_given_critiques_call_nobody(reads_critiques, scripted_chat, cache):
    chat = scripted_critic()
    with LiveRewardModel(reads_critiques, critic=make_critic(chat, cache)) as live:
        scores = asyncio.run(live.score(PROMPT, ["4", "5"], critiques=["Right.", "Wrong."]))
    assert not chat.calls
    rewards = offline(reads_critiques, ["4", "5"], ["Right.", "Wrong."])
    assert [score.reward for score in scores] == pytest.approx(rewards, abs=1e-4)


def test_attributes_as_offline(reads_critiques):
    critique = "It is right. It is short. But it is rude."
    pair = PreferencePair(id="a", prompt=PROMPT, chosen="4", rejected="5")
    item = CritiquedPair(pair=pair, critic="scripted", chosen_critique=critique, rejected_critique=critique)
    expected = attribute_sentences(reads_critiques, [item])[0]
    with LiveRewardModel(reads_critiques) as live:
        found = asyncio.run(live.attribute(PROMPT, "4", critique=critique))
    assert [each.text for each in found.sentences] == [each.text for each in expected.sentences]
    effects = [each.effect for each in expected.sentences]
    assert [each.effect for each in found.sentences] == pytest.approx(effects, abs=1e-4)


def test_a_number_that_is_none_is_an_error(tiny_model):
    broken = RewardModel.from_backbone(str(tiny_model), Reads(), seed=0)
    broken.model.score.weight.data.fill_(float("nan"))
    with LiveRewardModel(broken) as live, pytest.raises(ModelError, match="not a number"):
        asyncio.run(live.score(PROMPT, ["4"]))
