"""Calls that are made once: cached, within a limit, failures kept as rows."""

from collections.abc import AsyncIterator, Iterable
from pathlib import Path

import pytest

from critrm.budget import MAYBE_BILLED, Ledger, Price, Purse
from critrm.critique_cache import CritiqueCache
from critrm.errors import ConfigError, CriticError
from critrm.llm import ChatRequest, Reply, Sampling, ScriptedChat
from critrm.questions import ModelFlags, Question, ask
from critrm.types import Critique, Message


def questions(*texts: str) -> list[Question]:
    return [
        Question(pair_id=f"p{i}", side="chosen", messages=(Message("user", text),), template_version="v1")
        for i, text in enumerate(texts)
    ]


def ask_all(asked: list[Question], chat: object, cache: CritiqueCache, **options: object) -> list[Critique]:
    return ask(asked, chat, **{"asked": "m", "sampling": Sampling(), "cache": cache, **options})  # type: ignore[arg-type]


@pytest.fixture
def cache(tmp_path: Path) -> Iterable[CritiqueCache]:
    with CritiqueCache(tmp_path / "calls.sqlite") as opened:
        yield opened


def reply_of(request: ChatRequest) -> str:
    return request.messages[0].content.upper()


def test_answers_come_in_order_and_equal_questions_share_a_call(cache: CritiqueCache) -> None:
    chat, told = ScriptedChat(reply_of), []
    answers = ask_all(questions("b", "a", "b"), chat, cache, on_answer=told.append)
    assert [(each.pair_id, each.text) for each in answers] == [("p0", "B"), ("p1", "A"), ("p2", "B")]
    assert len(chat.calls) == 2
    assert sum(told) == 3


def test_nothing_is_paid_twice_and_what_changes_the_answer_is_in_the_key(cache: CritiqueCache) -> None:
    chat = ScriptedChat(reply_of)
    first = ask_all(questions("a"), chat, cache)
    ledger = Ledger()
    assert ask_all(questions("a"), chat, cache, ledger=ledger) == first
    assert (len(chat.calls), ledger.n_cached) == (1, 1)
    ask_all(questions("a"), chat, cache, sampling=Sampling(seed=1))
    ask_all(questions("a "), chat, cache)
    ask_all(
        [Question(pair_id="p", side="chosen", messages=(Message("user", "a"),), template_version="v2")], chat, cache
    )
    ask_all(questions("a"), ScriptedChat(reply_of, model="other"), cache)
    assert len(chat.calls) == 4 and len(cache) == 5


def test_a_failed_call_is_a_row_and_asked_again_only_on_demand(cache: CritiqueCache) -> None:
    down = ScriptedChat(lambda request: Reply(id=request.id, failure="http 500"))
    blank = ScriptedChat(lambda request: "  \n")
    assert ask_all(questions("a"), down, cache)[0].failure == "http 500"
    assert ask_all(questions("b"), blank, cache)[0].failure == "empty reply"
    chat = ScriptedChat(reply_of)
    assert ask_all(questions("a"), chat, cache)[0].failure == "http 500"
    assert ask_all(questions("a"), chat, cache, retry_failed=True)[0].text == "A"
    assert len(chat.calls) == 1


def test_the_limit_is_kept_and_a_higher_one_goes_on(cache: CritiqueCache) -> None:
    def billed(request: ChatRequest) -> Reply:
        return Reply(id=request.id, text="x", n_prompt_tokens=100_000, n_completion_tokens=0)

    options = {"price": Price(10.0, 10.0), "sampling": Sampling(max_tokens=100_000)}
    asked = questions("a", "b", "c")
    purse = Purse(2.5)
    with pytest.raises(CriticError, match="1 calls are not made"):
        ask_all(asked, ScriptedChat(billed), cache, purse=purse, **options)
    assert purse.spent <= 2.5 and len(cache) == 2
    chat = ScriptedChat(billed)
    assert len(ask_all(asked, chat, cache, purse=Purse(9.0), **options)) == 3
    assert len(chat.calls) == 1
    with pytest.raises(ConfigError, match="no known price"):
        ask_all(asked, chat, cache, purse=Purse(1.0))


@pytest.mark.parametrize("failure", MAYBE_BILLED)
def test_a_call_that_may_be_billed_stays_set_aside(cache: CritiqueCache, failure: str) -> None:
    lost = ScriptedChat(lambda request: Reply(id=request.id, failure=failure))
    purse = Purse(1.0)
    ask_all(questions("a"), lost, cache, price=Price(10.0, 10.0), purse=purse)
    assert purse.spent == 0.0 and purse.left < 1.0


def test_failures_that_were_billed_count_when_they_are_asked_again(cache: CritiqueCache) -> None:
    def empty(request: ChatRequest) -> Reply:
        return Reply(id=request.id, finish_reason="length", n_completion_tokens=12_000)

    options = {"price": Price(0.0, 10.0), "sampling": Sampling(max_tokens=12_000), "retry_failed": True}
    for n_paid in (1, 2):
        purse = Purse(0.25)
        ask_all(questions("a"), ScriptedChat(empty), cache, purse=purse, **options)
        assert purse.spent == pytest.approx(n_paid * 0.12)
    chat = ScriptedChat(empty)
    with pytest.raises(CriticError, match=r"\$0\.2400 spent, \$0\.2400 of it in earlier runs"):
        ask_all(questions("a"), chat, cache, purse=Purse(0.25), **options)
    assert chat.calls == []
    chat, ledger = (
        ScriptedChat(lambda request: Reply(id=request.id, text="x", n_prompt_tokens=9, n_completion_tokens=1000)),
        Ledger(),
    )
    (answer,) = ask_all(questions("a"), chat, cache, purse=Purse(1.0), ledger=ledger, **options)
    assert answer.cost == pytest.approx(0.25)
    assert (ledger.cost, ledger.cost_cached) == (pytest.approx(0.01), pytest.approx(0.24))
    assert ask_all(questions("a"), chat, cache, **options) == [answer]
    assert len(chat.calls) == 1


def test_a_temperature_of_0_is_one_of_0_point_0(cache: CritiqueCache) -> None:
    chat = ScriptedChat(reply_of)
    ask_all(questions("a"), chat, cache, sampling=Sampling(temperature=0, top_p=1))
    ask_all(questions("a"), chat, cache, sampling=Sampling(temperature=0.0, top_p=1.0))
    assert len(chat.calls) == len(cache) == 1


def test_a_chat_that_drops_calls_is_an_error(cache: CritiqueCache) -> None:
    class Silent:
        model = "silent"

        async def stream(self, requests: Iterable[ChatRequest], sampling: Sampling) -> AsyncIterator[Reply]:
            for request in list(requests)[1:]:
                yield Reply(id=request.id, text="x")

    with pytest.raises(CriticError, match="left 1 calls without a reply"):
        ask_all(questions("a", "b"), Silent(), cache)
    assert len(cache) == 1


def test_flags_name_a_critic_or_a_model() -> None:
    settings = ModelFlags(model="m", base_url="http://localhost:1/v1", temperature=0.5).settings(max_tokens=99)
    assert (settings.model, settings.temperature, settings.max_tokens) == ("m", 0.5, 99)
    assert ModelFlags(critic="mine", model="m", max_tokens=7).settings(max_tokens=99).max_tokens == 7
    with pytest.raises(ConfigError, match="which model"):
        ModelFlags().settings(max_tokens=99)
    with pytest.raises(ConfigError, match="no critic is called"):
        ModelFlags(critic="nobody-knows").settings(max_tokens=99)
    with pytest.raises(ConfigError, match="no known price"):
        ModelFlags(model="m", max_cost=1.0).purse(settings)
    priced = ModelFlags(model="m", max_cost=1.0, price_in=1.0, price_out=1.0)
    assert priced.purse(priced.settings(max_tokens=9)) is not None
