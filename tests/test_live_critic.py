import asyncio
import json
import threading

import pytest

from critrm.budget import Price
from critrm.calls import Calls, call_key
from critrm.critique_cache import CritiqueCache
from critrm.errors import ConfigError, CriticError
from critrm.live import LiveRewardModel
from critrm.llm import OpenAIChat, Reply, Sampling
from critrm.prompts import critique_messages, load_template
from critrm.reward_model import RewardModel
from critrm.types import PreferencePair
from live_parts import PROMPT, READS, make_critic
from scripted_server import Answer, completion, serving


@pytest.fixture(scope="session")
def reads_critiques(tiny_model) -> RewardModel:
    return RewardModel.from_backbone(str(tiny_model), READS, seed=0)


@pytest.fixture
def cache(tmp_path):
    with CritiqueCache(tmp_path / "critiques.sqlite") as store:
        yield store


def test_a_call_has_the_key_of_the_offline_stage():
    pair = PreferencePair(id="a", prompt=PROMPT, chosen="4", rejected="4")
    sampling = Sampling(temperature=1, max_tokens=9, seed=3)
    (key,) = Calls([pair], "m", sampling=sampling, samples=1, template="critique").places
    version = load_template("critique").version
    assert call_key("m", critique_messages(PROMPT, "4"), sampling=sampling, prompt_version=version) == key


def failing(kind: str):
    return lambda request: Reply(id=request.id, failure=kind)


def test_a_failed_critic_raises(reads_critiques, scripted_chat, cache):
    chat = scripted_chat(failing("refusal: http://inner.host/ says no"))
    critic = make_critic(chat, cache, retries=3)
    with LiveRewardModel(reads_critiques, critic=critic) as live, pytest.raises(CriticError, match=r"\(refusal\)") as e:
        asyncio.run(live.score(PROMPT, ["4"]))
    assert "inner.host" not in str(e.value)
    assert len(chat.calls) == 1, "a refusal would come again"
    assert len(cache) == 0, "a failure that cost nothing is not kept"


PRICE = Price(read=0.0, written=1e6)
"""A dollar a token."""


def test_no_more_is_spent_than_allowed(reads_critiques, scripted_chat, cache):
    # An answer costs 3 dollars, and might cost 4: after two of them a third might exceed 9.
    chat = scripted_chat(lambda request: Reply(id=request.id, text="Fine.", n_prompt_tokens=1, n_completion_tokens=3))
    critic = make_critic(chat, cache, price=PRICE, max_cost=9.0, max_tokens=4)
    with LiveRewardModel(reads_critiques, critic=critic) as live:
        for text in ("1", "2"):
            assert asyncio.run(live.score(PROMPT, [text]))[0].critique
        with pytest.raises(CriticError, match="spending limit"):
            asyncio.run(live.score(PROMPT, ["3"]))
        assert asyncio.run(live.score(PROMPT, ["1"]))[0].cached, "what is known costs nothing"
    assert (len(chat.calls), critic.stats.cost) == (2, 6.0)


def test_calls_under_way_do_not_exceed_the_limit_together(reads_critiques, scripted_chat, cache):
    chat = scripted_chat(lambda request: Reply(id=request.id, text="Fine.", n_prompt_tokens=1, n_completion_tokens=4))
    critic = make_critic(chat, cache, price=PRICE, max_cost=10.0, max_tokens=4)

    async def many():
        return await asyncio.gather(*(critic.critique(PROMPT, str(n)) for n in range(8)))

    found = asyncio.run(many())
    assert sorted(critique.failure for critique, _ in found) == ["", "", *["spending limit reached"] * 6]
    assert len(chat.calls) == 2


def test_a_call_that_was_never_made_takes_nothing_from_the_limit(cache):
    with serving(lambda _: Answer(body="", delay=3.0)) as server:
        chat = OpenAIChat("scripted", base_url=server.url, concurrency=1, timeout=30, api_key="k")
        critic = make_critic(chat, cache, deadline=0.5, concurrency=1, price=PRICE, max_cost=100.0, max_tokens=4)

        async def three():
            found = await asyncio.gather(*(critic.critique(PROMPT, str(n)) for n in range(3)))
            await asyncio.sleep(0.1)
            return [critique.failure for critique, _ in found]

        assert asyncio.run(three()) == ["timeout"] * 3
    assert critic.purse.left == 96.0, "the one under way may be billed; those in the queue cannot"


def test_a_limit_needs_a_price(scripted_chat, cache):
    with pytest.raises(ConfigError, match="price"):
        make_critic(scripted_chat(failing("x")), cache, max_cost=1.0)


def test_a_passing_failure_is_retried(reads_critiques, scripted_chat, cache, monkeypatch):
    monkeypatch.setattr("critrm.live_critic.delay_before_retry", lambda n: 0.01)
    answers = [Reply(id="", failure="http 503"), Reply(id="", failure="timeout"), "Fine. Good."]

    def answer(request):
        found = answers.pop(0)
        return found if isinstance(found, str) else Reply(id=request.id, failure=found.failure)

    critic = make_critic(scripted_chat(answer), cache, retries=2)
    with LiveRewardModel(reads_critiques, critic=critic) as live:
        (score,) = asyncio.run(live.score(PROMPT, ["4"]))
    assert (score.critique, score.failure) == ("Fine. Good.", "")
    assert critic.stats.n_retried == 2


def test_a_hanging_critic_is_given_up_and_recovers(reads_critiques, cache):
    hangs = threading.Event()
    hangs.set()

    def answer(body):
        if hangs.is_set():
            return Answer(body="", delay=3.0)
        return completion("Good.")

    with serving(answer) as server:
        chat = OpenAIChat("scripted", base_url=server.url, concurrency=2, timeout=30, api_key="k")
        critic = make_critic(chat, cache, deadline=0.5, concurrency=2)
        with LiveRewardModel(reads_critiques, critic=critic) as live:

            async def run():
                calls = [live.score(PROMPT, [str(i)]) for i in range(6)]  # more than there is room for
                found = await asyncio.gather(*calls, return_exceptions=True)
                assert all(isinstance(each, CriticError) and "timeout" in str(each) for each in found)
                hangs.clear()
                critic.deadline = 30
                return await live.score(PROMPT, ["4"])

            (score,) = asyncio.run(run())
    assert score.critique == "Good."
    assert critic.stats.n_under_way == 0


def test_critic_calls_are_concurrent_within_the_limit(reads_critiques, cache):
    with serving(lambda body: completion(json.dumps(body)[-40:])) as server:
        chat = OpenAIChat("scripted", base_url=server.url, concurrency=4, api_key="k")
        with LiveRewardModel(reads_critiques, critic=make_critic(chat, cache, concurrency=4)) as live:

            async def run():
                return await asyncio.gather(*(live.score(PROMPT, [str(i)]) for i in range(24)))

            found = asyncio.run(run())
    assert len(server.bodies) == 24
    assert server.peak <= 4
    assert all(score.critique for (score,) in found)
    assert len(cache) == 24


def test_a_dead_critic_is_unavailable(reads_critiques, scripted_chat, cache, monkeypatch):
    monkeypatch.setattr("critrm.live_critic.delay_before_retry", lambda n: 0.01)

    def answer(request):
        raise CriticError("http://secret.host rejects the API key")

    critic = make_critic(scripted_chat(answer), cache, retries=1)
    with LiveRewardModel(reads_critiques, critic=critic) as live, pytest.raises(CriticError) as error:
        asyncio.run(live.score(PROMPT, ["4"]))
    assert "critic unavailable" in str(error.value)
    assert "secret.host" not in str(error.value)
    assert critic.stats.n_retried == 1
