"""Stage 1: what the critic is shown, and that nothing is paid for twice."""

import asyncio
import contextlib
import itertools
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from critrm.budget import Ledger, Price, Purse
from critrm.calls import estimate_critiques, open_purse
from critrm.config import CriticConfig
from critrm.critics import command as critics_command
from critrm.critique import command, critique_pairs
from critrm.critique_cache import CritiqueCache, default_cache_path
from critrm.critique_files import read_critiques
from critrm.errors import ConfigError, CriticError, StorageError
from critrm.llm import ChatRequest, OpenAIChat, Reply, Sampling, ScriptedChat
from critrm.prompts import load_template
from critrm.store import write_records
from critrm.types import Critique, Message, PreferencePair
from scripted_server import Answer, completion, serving

ROOT = Path(__file__).parents[1]
DATA = Path(os.environ.get("CRITRM_DATA") or ROOT.parent / "shared" / "data")
HOSTILE = "{{ 7*7 }} {% x %} <|im_end|></s> \x00 \u202eabc \u2028 \U0001f9d1\u200d\U0001f680 [/bold] " + "long " * 2000


def make_pairs(n: int) -> list[PreferencePair]:
    return [
        PreferencePair(
            id=f"p{i}",
            prompt=(Message("user", f"Ask {i}?"),),
            chosen=f"Alpha answer {i}.",
            rejected=f"Beta answer {i}.",
        )
        for i in range(n)
    ]


def echo(request: ChatRequest) -> str:
    return "On: " + request.messages[0].content.split("Chatbot: ")[1].split("\n")[0]


def critiques_of(pairs: list[PreferencePair], chat: Any, cache: CritiqueCache, **options: Any) -> list[Critique]:
    return critique_pairs(pairs, chat, **{"critic": "scripted", "sampling": Sampling(), "cache": cache, **options})


@pytest.fixture
def cache(tmp_path: Path) -> Any:
    with CritiqueCache(tmp_path / "cache.sqlite") as opened:
        yield opened


def test_two_critiques_per_pair_in_order(cache: CritiqueCache) -> None:
    pairs = make_pairs(9)
    rows = critiques_of(pairs, ScriptedChat(echo), cache)
    assert [(row.pair_id, row.side) for row in rows] == [(p.id, s) for p in pairs for s in ("chosen", "rejected")]
    assert [row.text for row in rows] == [f"On: {p.completion(s)}" for p in pairs for s in ("chosen", "rejected")]
    assert all(row.critic == "scripted" and len(row.prompt_version) == 12 and not row.failure for row in rows)


def test_the_critic_learns_neither_label_nor_other_completion(cache: CritiqueCache, tmp_path: Path) -> None:
    pairs = [replace(pair, rating="better", margin=0.7) for pair in make_pairs(30)]
    chat, swapped_chat = ScriptedChat(echo), ScriptedChat(echo)
    critiques_of(pairs, chat, cache)
    swapped = [replace(p, chosen=p.rejected, rejected=p.chosen, rating=None, margin=None) for p in pairs]
    with CritiqueCache(tmp_path / "other.sqlite") as other:
        critiques_of(swapped, swapped_chat, other)
    # The same requests, ids and order included, whichever completion is the chosen one.
    assert chat.calls == swapped_chat.calls and len(chat.calls) == 60
    sides = []
    for call in chat.calls:
        shown = call.id + "".join(message.role + message.content for message in call.messages)
        assert "chosen" not in shown and "rejected" not in shown and "better" not in shown
        assert ("Alpha" in shown) != ("Beta" in shown)
        sides.append("Alpha" in shown)
    assert sides != sorted(sides) and sides != [True, False] * 30


def test_a_second_run_makes_no_call(cache: CritiqueCache) -> None:
    pairs = make_pairs(5)
    first = critiques_of(pairs, ScriptedChat(echo), cache)
    silent = ScriptedChat(echo)
    assert critiques_of(pairs, silent, cache) == first
    assert silent.calls == []


@pytest.mark.parametrize(
    "change",
    [
        {"sampling": Sampling(temperature=0.1)},
        {"sampling": Sampling(seed=1)},
        {"sampling": Sampling(max_tokens=8)},
        {"sampling": Sampling(top_p=0.5)},
        {"template": "{{ conversation }}\nChatbot: {{ response }}\nBe brief."},
        {"template": "{# renders as before, but it is another template #}" + load_template("critique").source},
        {"model": "another"},
    ],
)
def test_whatever_determines_a_reply_is_in_its_key(
    cache: CritiqueCache, tmp_path: Path, change: dict[str, Any]
) -> None:
    critiques_of(make_pairs(2), ScriptedChat(echo), cache)
    change = dict(change)
    model = change.pop("model", "scripted")
    if "template" in change:
        own = tmp_path / "own.md"
        own.write_text(change["template"])
        change = {"template": own}
    again = ScriptedChat(echo, model=model)
    critiques_of(make_pairs(2), again, cache, **change)
    assert len(again.calls) == 4


def test_the_critics_name_is_not_in_the_key(cache: CritiqueCache) -> None:
    critiques_of(make_pairs(2), ScriptedChat(echo), cache)
    again = ScriptedChat(echo)
    assert {row.critic for row in critiques_of(make_pairs(2), again, cache, critic="renamed")} == {"renamed"}
    assert again.calls == []


def test_identical_completions_share_one_call(cache: CritiqueCache) -> None:
    (pair,) = make_pairs(1)
    twins = [pair, replace(pair, id="twin"), replace(pair, id="swap", chosen=pair.rejected, rejected=pair.chosen)]
    chat, told = ScriptedChat(echo), []
    rows = critiques_of(twins, chat, cache, on_reply=lambda row, cached: told.append((row.pair_id, row.side)))
    assert len(chat.calls) == 2 and len(rows) == 6
    assert sorted(told) == sorted((row.pair_id, row.side) for row in rows)
    assert rows[4].text == rows[1].text == "On: Beta answer 0."


def test_pairs_with_one_id_keep_their_own_critiques(cache: CritiqueCache) -> None:
    pairs = [replace(pair, id="same") for pair in make_pairs(3)]
    rows = critiques_of(pairs, ScriptedChat(echo), cache)
    assert [row.text for row in rows] == [f"On: {p.completion(s)}" for p in pairs for s in ("chosen", "rejected")]


def test_hostile_text_passes(cache: CritiqueCache, tmp_path: Path) -> None:
    pair = PreferencePair(
        id=HOSTILE, prompt=(Message("user", HOSTILE),), chosen="x " + HOSTILE, rejected="y " + HOSTILE
    )
    chat = ScriptedChat(lambda request: HOSTILE)
    rows = critiques_of([pair], chat, cache)
    assert all(f"User: {HOSTILE}\n\nChatbot: " in call.messages[0].content for call in chat.calls)
    assert all(HOSTILE + "\n\nPlease provide" in call.messages[0].content for call in chat.calls)
    write_records(tmp_path / "rows.jsonl", rows)
    assert read_critiques(tmp_path / "rows.jsonl") == rows == critiques_of([pair], chat, cache)
    assert rows[0].text == HOSTILE.strip() and len(chat.calls) == 2


def test_a_failed_call_is_a_row_and_is_asked_again_only_on_request(cache: CritiqueCache, tmp_path: Path) -> None:
    def answer(request: ChatRequest) -> Reply | str:
        text = echo(request)
        if text.endswith("Alpha answer 1."):
            return Reply(id=request.id, failure="http 500")
        return " \n" if text.endswith("Beta answer 2.") else text

    rows = critiques_of(make_pairs(4), ScriptedChat(answer), cache)
    reasons = {(row.pair_id, row.side): row.failure for row in rows if row.failure}
    assert reasons == {("p1", "chosen"): "http 500", ("p2", "rejected"): "empty reply"}
    assert [row.text for row in rows if row.failure] == ["", ""]
    silent = ScriptedChat(echo)
    assert critiques_of(make_pairs(4), silent, cache) == rows and silent.calls == []
    mended = critiques_of(make_pairs(4), silent, cache, retry_failed=True)
    assert len(silent.calls) == 2 and not any(row.failure for row in mended)
    assert critiques_of(make_pairs(4), ScriptedChat(answer), cache, retry_failed=True) == mended
    write_records(tmp_path / "rows.jsonl", rows)
    assert read_critiques(tmp_path / "rows.jsonl") == rows


def test_every_reply_is_stored_before_it_is_counted(cache: CritiqueCache) -> None:
    sizes = []
    critiques_of(make_pairs(3), ScriptedChat(echo), cache, on_reply=lambda row, cached: sizes.append(len(cache)))
    assert sizes == [1, 2, 3, 4, 5, 6]


@settings(max_examples=25, deadline=None)
@given(n_pairs=st.integers(1, 8), stops=st.lists(st.integers(0, 12), max_size=4))
def test_an_interrupted_run_goes_on(n_pairs: int, stops: list[int]) -> None:
    pairs, n_calls = make_pairs(n_pairs), 0

    def stop_at(limit: int) -> Callable[[ChatRequest], str]:
        n_left = limit

        def answer(request: ChatRequest) -> str:
            nonlocal n_left, n_calls
            if n_left == 0:
                raise KeyboardInterrupt
            n_left, n_calls = n_left - 1, n_calls + 1
            return echo(request)

        return answer

    with tempfile.TemporaryDirectory() as folder:
        for stop in stops:
            with CritiqueCache(Path(folder) / "c.sqlite") as cache:
                try:
                    critiques_of(pairs, ScriptedChat(stop_at(stop)), cache)
                except KeyboardInterrupt:
                    continue
        with CritiqueCache(Path(folder) / "c.sqlite") as cache:
            rows = critiques_of(pairs, ScriptedChat(stop_at(-1)), cache)
    assert n_calls == 2 * n_pairs
    assert [row.text for row in rows] == [f"On: {p.completion(s)}" for p in pairs for s in ("chosen", "rejected")]


class _Forgetful(ScriptedChat):
    """Answers only the first request."""

    async def stream(self, requests: Any, sampling: Sampling) -> Any:
        async for reply in super().stream(requests, sampling):
            yield reply
            return


def test_a_request_left_unanswered_is_never_silent(cache: CritiqueCache) -> None:
    with pytest.raises(CriticError, match="left 3 calls without a reply"):
        critiques_of(make_pairs(2), _Forgetful(echo), cache)
    chat = ScriptedChat(echo)
    critiques_of(make_pairs(2), chat, cache)
    assert len(chat.calls) == 3


def test_a_full_disk_ends_the_run_and_the_calls_under_way(
    cache: CritiqueCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_: Critique) -> None:
        raise StorageError("disk full")

    monkeypatch.setattr(cache, "put", full)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with serving(lambda _: completion("ok")) as server, pytest.raises(StorageError):
        critiques_of(make_pairs(20), OpenAIChat("m", base_url=server.url, concurrency=4), cache)
    assert len(server.bodies) < 40


def test_samples_are_drawn_apart_and_more_of_them_ask_only_for_the_new_ones(cache: CritiqueCache) -> None:
    class Seeded(ScriptedChat):
        async def stream(self, requests: Any, sampling: Sampling) -> Any:
            async for reply in super().stream(requests, sampling):
                yield replace(reply, text=f"{reply.text} ({sampling.seed})")

    pairs, options = make_pairs(3), {"sampling": Sampling(temperature=0.7, seed=5)}
    chat = Seeded(echo)
    two = critiques_of(pairs, chat, cache, samples=2, **options)
    assert [(row.pair_id, row.sample, row.side) for row in two] == [
        (pair.id, sample, side) for pair in pairs for sample in range(2) for side in ("chosen", "rejected")
    ]
    assert [row.text for row in two[:4]] == [f"On: {x} answer 0. ({y})" for y in (5, 6) for x in ("Alpha", "Beta")]
    assert len({row.key for row in two}) == 12
    four = critiques_of(pairs, chat, cache, samples=4, **options)
    assert len(chat.calls) == 24 and len(four) == 24
    assert [row for row in four if row.sample < 2] == two
    # Sample 1 of seed 5 is sample 0 of seed 6.
    later = critiques_of(pairs, chat, cache, samples=1, sampling=Sampling(temperature=0.7, seed=6))
    assert len(chat.calls) == 24 and {row.sample for row in later} == {0}


def test_samples_of_the_greedy_reply_are_refused(cache: CritiqueCache) -> None:
    with pytest.raises(ConfigError, match="3 times the same one"):
        critiques_of(make_pairs(1), ScriptedChat(echo), cache, samples=3)


def test_a_call_costs_its_tokens_once(cache: CritiqueCache) -> None:
    (pair,) = make_pairs(1)
    twins = [pair, replace(pair, id="twin")]

    def answer(request: ChatRequest) -> Reply:
        return Reply(id=request.id, text="Good.", n_prompt_tokens=1000, n_completion_tokens=100)

    ledger, price = Ledger(), Price(10.0, 30.0)
    rows = critiques_of(twins, ScriptedChat(answer), cache, price=price, ledger=ledger)
    assert [row.cost for row in rows] == pytest.approx([0.013] * 4)
    assert (ledger.n_calls, ledger.cost) == (2, pytest.approx(0.026))
    again = Ledger()
    assert critiques_of(twins, ScriptedChat(answer), cache, price=price, ledger=again) == rows
    assert (again.n_calls, again.n_cached, again.cost, again.cost_cached) == (0, 2, 0.0, pytest.approx(0.026))


def test_an_endpoint_that_reports_no_usage_is_not_free(cache: CritiqueCache) -> None:
    rows = critiques_of(make_pairs(1), ScriptedChat(lambda _: "x" * 400), cache, price=Price(10.0, 30.0))
    assert all(row.cost > 100 * 30 / 1e6 and row.n_completion_tokens == 0 for row in rows)


class _Wide(ScriptedChat):
    """Draws several requests before it answers, as served models do."""

    width = 5

    async def stream(self, requests: Any, sampling: Sampling) -> Any:
        source = iter(requests)
        while drawn := list(itertools.islice(source, self.width)):
            async for reply in super().stream(drawn, sampling):
                yield reply


@settings(max_examples=40, deadline=None)
@given(
    limit=st.floats(0, 0.05),
    width=st.integers(1, 9),
    usage=st.lists(st.tuples(st.integers(0, 90), st.integers(0, 100), st.booleans()), min_size=1, max_size=9),
)
def test_no_run_spends_more_than_its_limit(limit: float, width: int, usage: list[tuple[int, int, bool]]) -> None:
    spent: list[float] = []
    price = Price(10.0, 30.0)

    def answer(request: ChatRequest) -> Reply:
        n_read, n_written, late = usage[len(spent) % len(usage)]
        spent.append(price.cost(n_read, n_written))
        if late:
            return Reply(id=request.id, failure="timeout")
        return Reply(id=request.id, text="x", n_prompt_tokens=n_read, n_completion_tokens=n_written)

    chat, pairs, options = _Wide(answer), make_pairs(6), {"sampling": Sampling(max_tokens=100), "price": price}
    chat.width = width
    with tempfile.TemporaryDirectory() as folder, CritiqueCache(Path(folder) / "c.sqlite") as cache:
        with contextlib.suppress(CriticError):
            critiques_of(pairs, chat, cache, purse=Purse(limit), **options)
        assert sum(spent) <= limit + 1e-6
        assert len(cache) == len(spent)
        critiques_of(pairs, chat, cache, purse=Purse(1e9), **options)
    assert len(spent) == 12


class _Empty:
    """Thinks until max_tokens run out: billed, and no answer."""

    def __init__(self) -> None:
        self.chat = ScriptedChat(self.answer)

    def answer(self, request: ChatRequest) -> Reply:
        return Reply(id=request.id, finish_reason="length", n_prompt_tokens=0, n_completion_tokens=1000)


def test_failures_that_were_billed_count_when_they_are_asked_again(cache: CritiqueCache) -> None:
    """Each attempt makes two calls of $0.03."""
    pairs, config = make_pairs(1), CriticConfig(model="scripted", price_in=0, price_out=30, max_tokens=1000)
    options = {"sampling": Sampling(max_tokens=1000), "price": Price(0.0, 30.0), "retry_failed": True}
    n_paid = 0
    for _ in range(4):
        chat, purse = _Empty().chat, Purse(0.13)
        with contextlib.suppress(CriticError):
            critiques_of(pairs, chat, cache, purse=purse, **options)
        n_paid += len(chat.calls)
        assert purse.spent == pytest.approx(n_paid * 0.03)
    assert n_paid == 4
    purse = open_purse(0.13, [(pairs, config)], cache=cache)
    assert purse and purse.spent == purse.spent_before == pytest.approx(0.12)
    found = estimate_critiques(pairs, config, critic="scripted", cache=cache, retry_failed=True)
    assert (found.n_calls, found.n_cached, found.paid) == (2, 0, pytest.approx(0.12))


def test_an_answer_carries_the_cost_of_the_failures_before_it(cache: CritiqueCache) -> None:
    pairs, options = make_pairs(1), {"sampling": Sampling(max_tokens=1000), "price": Price(0.0, 30.0)}
    critiques_of(pairs, _Empty().chat, cache, **options)
    chat = ScriptedChat(lambda request: Reply(id=request.id, text="Good.", n_prompt_tokens=9, n_completion_tokens=100))
    ledger, told = Ledger(), []
    options |= {"retry_failed": True, "on_reply": lambda row, cached: told.append(row.cost)}
    rows = critiques_of(pairs, chat, cache, ledger=ledger, purse=Purse(9.0), **options)
    assert [row.cost for row in rows] == told == pytest.approx([0.033] * 2)
    assert (ledger.n_calls, ledger.cost, ledger.cost_cached) == (2, pytest.approx(0.006), pytest.approx(0.06))
    purse = Purse(9.0)
    assert critiques_of(pairs, chat, cache, purse=purse, **options) == rows
    assert purse.spent == pytest.approx(0.066) and len(chat.calls) == 2


def test_a_run_ends_below_what_its_estimate_says_at_most(cache: CritiqueCache) -> None:
    config = CriticConfig(model="scripted", price_in=10, price_out=30, max_tokens=50, samples=2, temperature=1)
    chat = ScriptedChat(lambda request: Reply(id=request.id, text="x", n_prompt_tokens=400, n_completion_tokens=50))
    found = estimate_critiques(make_pairs(4), config, critic="scripted", cache=cache)
    assert found.n_calls == 16 and found.cost and found.most_cost and found.cost < found.most_cost
    purse = Purse(found.most_cost)
    options = {"sampling": Sampling(max_tokens=50, temperature=1), "samples": 2, "price": Price(10, 30)}
    assert len(critiques_of(make_pairs(4), chat, cache, purse=purse, **options)) == 16
    assert purse.spent <= found.most_cost
    other = estimate_critiques(
        [replace(p, chosen=p.chosen + "!") for p in make_pairs(1)], config, critic="scripted", cache=cache
    )
    assert (other.n_calls, other.n_cached) == (2, 2)


def test_a_limit_needs_a_price(cache: CritiqueCache) -> None:
    with pytest.raises(ConfigError, match="no known price"):
        critiques_of(make_pairs(1), ScriptedChat(echo), cache, purse=Purse(1.0))


def test_can_be_called_beside_a_running_event_loop(cache: CritiqueCache) -> None:
    async def notebook() -> list[Critique]:
        return await asyncio.to_thread(critiques_of, make_pairs(1), ScriptedChat(echo), cache)

    assert len(asyncio.run(notebook())) == 2


@pytest.fixture
def pairs_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("CRITRM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr("critrm.endpoints.FIRST_DELAY", 0.01)
    write_records(tmp_path / "pairs.jsonl", make_pairs(6))
    return tmp_path / "pairs.jsonl"


def test_command_writes_critiques_and_their_manifest(pairs_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = pairs_file.parent / "out" / "critiques.jsonl"
    with serving(lambda _: completion("Fine.")) as server:
        command(str(pairs_file), model="m[/x]", out=out, base_url=server.url, limit=4)
        assert len(server.bodies) == 8
        command(str(pairs_file), model="m[/x]", out=out, base_url=server.url, limit=4)
        assert len(server.bodies) == 8
    assert [r.text for r in read_critiques(out)] == ["Fine."] * 8
    assert {r.critic for r in read_critiques(out)} == {"m[/x]"}
    manifest = json.loads((out.parent / "critiques.jsonl.manifest.json").read_text())
    assert manifest["config"]["model"] == "m[/x]" and list(manifest["inputs"]) == [str(pairs_file)]
    assert "written" in capsys.readouterr().out
    assert default_cache_path() == pairs_file.parent / "cache" / "critiques.sqlite" and default_cache_path().is_file()


def test_command_lists_failures_by_reason(pairs_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def answer(body: dict[str, Any]) -> Answer:
        text = body["messages"][0]["content"]
        refusal = Answer(status=400, body=json.dumps({"error": {"message": f"[/red] bad {len(text)} {text[:9]}"}}))
        return refusal if "Alpha" in text else completion("Fine.")

    out = pairs_file.parent / "c.jsonl"
    with serving(answer) as server:
        command(str(pairs_file), model="m", out=out, base_url=server.url)
    shown = " ".join(capsys.readouterr().out.split())
    assert shown.count("failed: http 400: [/red] bad") == 1 and "--retry-failed" in shown
    assert sum(bool(r.failure) for r in read_critiques(out)) == 6


def test_command_fails_if_nothing_was_answered(pairs_file: Path) -> None:
    out = pairs_file.parent / "c.jsonl"
    failing = pytest.raises(CriticError, match=r"http 500.*--retry-failed")
    with serving(lambda _: Answer(status=500)) as server, failing:
        command(str(pairs_file), model="m", out=out, base_url=server.url)
    with serving(lambda _: completion("Fine.")) as server:
        command(str(pairs_file), model="m", out=out, base_url=server.url, retry_failed=True)
    assert not any(r.failure for r in read_critiques(out))


def test_command_takes_a_named_critic_with_its_price(pairs_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = pairs_file.parent / "c.jsonl"
    monkeypatch.setenv("OPENAI_API_KEY", "sk-named")
    with serving(lambda _: completion("Fine.")) as server:
        monkeypatch.setenv("OPENAI_BASE_URL", server.url)
        command(str(pairs_file), critic="gpt-4-turbo", max_tokens=99, out=out, limit=2)
    body, headers = server.bodies[0], server.headers[0]
    assert (body["model"], body["max_tokens"], body["temperature"]) == ("gpt-4-0125-preview", 99, 0.0)
    assert headers["authorization"] == "Bearer sk-named"
    rows = read_critiques(out)
    assert {row.critic for row in rows} == {"gpt-4-turbo"}
    assert [row.cost for row in rows] == pytest.approx([(11 * 10 + 7 * 30) / 1e6] * 4)
    manifest = json.loads((out.parent / "c.jsonl.manifest.json").read_text())
    assert manifest["cost"] == pytest.approx(4 * 320 / 1e6)
    ledger = manifest["config"]["ledger"]
    assert (ledger["calls"], ledger["cached"], ledger["tokens_in"], ledger["tokens_out"]) == (4, 0, 44, 28)
    assert manifest["config"]["model"] == "gpt-4-0125-preview"


def test_command_without_a_critic_says_how_to_name_one(pairs_file: Path) -> None:
    out = pairs_file.parent / "c.jsonl"
    with pytest.raises(ConfigError, match="--critic .*--model or --self-critique"):
        command(str(pairs_file), out=out)
    with pytest.raises(ConfigError, match="no critic is called 'gtp-4'"):
        command(str(pairs_file), critic="gtp-4", out=out)
    with pytest.raises(ConfigError, match="top_p"):
        command(str(pairs_file), model="m", base_url="http://host/v1", top_p=7.0, out=out)
    with pytest.raises(ConfigError, match=r"no known price.*--price-in"):
        command(str(pairs_file), model="m", base_url="http://host/v1", max_cost=1.0, out=out)
    with pytest.raises(ConfigError, match="--max-cost"):
        command(str(pairs_file), model="m", base_url="http://host/v1", max_cost=float("nan"), out=out)


def test_a_dry_run_needs_no_key_and_calls_nobody(
    pairs_file: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.setenv("COLUMNS", "140")
    out = pairs_file.parent / "c.jsonl"
    with serving(lambda _: completion("Fine.")) as server:
        monkeypatch.setenv("OPENAI_BASE_URL", server.url)
        command(str(pairs_file), critic="gpt-4-turbo", out=out, dry_run=True, max_cost=5.0)
        assert server.bodies == []
        shown = capsys.readouterr().out
        line = next(line for line in shown.splitlines() if line.startswith("gpt-4-turbo ")).split()
        assert line[1:3] == ["12", "0"] and line[4] == line[5] == f"{12 * 256:,}"
        assert "4 characters a token" in shown and "max_tokens" in shown and "$5.00" in shown
        command(str(pairs_file), critic="gpt-4-turbo", out=out, limit=3)
        capsys.readouterr()
        command(str(pairs_file), critic="gpt-4-turbo", out=out, dry_run=True)
        assert len(server.bodies) == 6
    shown = capsys.readouterr().out
    line = next(line for line in shown.splitlines() if line.startswith("gpt-4-turbo ")).split()
    assert line[1:6] == ["6", "6", str(6 * 11), str(6 * 7), f"{6 * 256:,}"]
    assert "the answers cached so far" in shown
    assert not out.with_name("d.jsonl").exists()


def test_a_named_critic_that_needs_no_key_or_is_elsewhere_is_sent_none(
    pairs_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-for-openai-only")
    with serving(lambda _: completion("Fine.")) as server:
        for critic, model in (("mixtral-8x7b-instruct", ""), ("gpt-4-turbo", ""), ("mine", "m")):
            out = pairs_file.parent / f"{critic}.jsonl"
            command(str(pairs_file), critic=critic, model=model, base_url=server.url, out=out, limit=1)
    sent = ["sk-for-openai-only" in str(headers) for headers in server.headers]
    assert sent == [False] * 4 + [True] * 2, "only a model that the user names may need OpenAI's key"


def test_max_cost_stops_the_command_and_a_higher_one_goes_on(pairs_file: Path) -> None:
    out = pairs_file.parent / "c.jsonl"
    with serving(lambda _: completion("Fine.")) as server:
        flags: dict[str, Any] = {"base_url": server.url, "price_in": 1000.0, "price_out": 1000.0, "max_tokens": 7}
        with CritiqueCache(default_cache_path()) as empty:
            most = estimate_critiques(
                make_pairs(6), CriticConfig(model="m", **flags), critic="m", cache=empty
            ).most_cost
        assert most
        # A call costs 11 + 7 tokens, $0.018, and may cost far more: five are paid, a sixth still has room.
        limit = most / 12 + 5.5 * 0.018
        for _ in range(2):
            with pytest.raises(CriticError, match=r"\$0\.1080 spent.*6 calls are not made yet.*--max-cost"):
                command(str(pairs_file), model="m", out=out, max_cost=limit, **flags)
            assert len(server.bodies) == 6 and not out.exists()
        command(str(pairs_file), model="m", out=out, max_cost=limit + 1, **flags)
        assert len(server.bodies) == 12
    assert len(read_critiques(out)) == 12
    ledger = json.loads((out.parent / "c.jsonl.manifest.json").read_text())["config"]["ledger"]
    assert (ledger["calls"], ledger["cached"]) == (6, 6)
    assert ledger["cost"] == ledger["cost_cached"] == pytest.approx(6 * 0.018)


def test_command_draws_samples_from_the_backbone_itself(pairs_file: Path, tiny_model: Path) -> None:
    out = pairs_file.parent / "c.jsonl"
    flags: dict[str, Any] = {"temperature": 0.7, "max_tokens": 4, "limit": 1, "max_cost": 0.0}
    command(str(pairs_file), self_critique=str(tiny_model), critic="self", samples=2, out=out, **flags)
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    places = [(row["sample"], row["side"]) for row in rows]
    assert places == [(0, "chosen"), (0, "rejected"), (1, "chosen"), (1, "rejected")]
    assert {row["critic"] for row in rows} == {"self"}
    manifest = json.loads((out.parent / "c.jsonl.manifest.json").read_text())
    assert manifest["seeds"] == [0, 1] and manifest["config"]["model"] == f"local:{tiny_model}"


def test_the_key_is_written_nowhere(
    pairs_file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], caplog: Any
) -> None:
    key, out = "sk-do-not-show-5c1a", pairs_file.parent / "c.jsonl"
    caplog.set_level("DEBUG")
    monkeypatch.setenv("OPENAI_API_KEY", key)
    monkeypatch.setenv("CO_API_KEY", key)
    said = []

    def answer(_: dict[str, Any]) -> Answer:
        # A server that echoes the key.
        n = len(server.bodies)
        error = json.dumps({"error": {"message": f"the key {key} is slow today"}})
        return Answer(status=400, body=error) if n % 3 == 0 else completion("Fine.")

    with serving(answer) as server:
        monkeypatch.setenv("OPENAI_BASE_URL", server.url)
        command(str(pairs_file), critic="gpt-4-turbo", out=out)
        command(str(pairs_file), critic="gpt-4-turbo", out=out, dry_run=True)
        with pytest.raises(CriticError) as stopped:
            command(str(pairs_file), critic="gpt-4-turbo", out=out, seed=1, max_cost=0.0)
        said.append(str(stopped.value))
    refusal = Answer(status=401, body=json.dumps({"error": {"message": f"wrong key {key}"}}))
    with serving(lambda _: refusal) as server, pytest.raises(CriticError) as refused:
        command(str(pairs_file), critic="command-r", base_url=server.url, key_variable="CO_API_KEY", out=out)
    assert server.headers[0]["authorization"] == f"Bearer {key}"
    critics_command()
    said += [str(refused.value), repr(refused.value.__cause__), *capsys.readouterr(), caplog.text]
    assert not any(key in text for text in said)
    files = [path for path in pairs_file.parent.rglob("*") if path.is_file()]
    assert len(files) >= 4 and not any(key.encode() in path.read_bytes() for path in files)


def test_kill_9_then_the_same_command(pairs_file: Path) -> None:
    n_pairs, concurrency, enough = 40, 4, threading.Event()
    write_records(pairs_file, make_pairs(n_pairs))
    out = pairs_file.parent / "c.jsonl"

    def answer(_: dict[str, Any]) -> Answer:
        if len(server.bodies) >= n_pairs:
            enough.set()
        return Answer(body=completion("Fine.").body, delay=0.02)

    with serving(answer) as server:
        verb = [sys.executable, "-m", "critrm", "critique", str(pairs_file), "--out", str(out), "--model", "m"]
        verb += ["--base-url", server.url, "--concurrency", str(concurrency)]
        environment = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
        killed = subprocess.Popen(verb, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        assert enough.wait(60)
        killed.kill()
        killed.wait()
        time.sleep(0.1)
        assert not out.exists() and len(server.bodies) < 2 * n_pairs
        done = subprocess.run(verb, env=environment, capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 0, done.stderr
        assert len(server.bodies) <= 2 * n_pairs + concurrency
    assert len(read_critiques(out)) == 2 * n_pairs
