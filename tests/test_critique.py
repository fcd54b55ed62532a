"""Stage 1: what the critic is shown, and that nothing is paid for twice."""

import asyncio
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

from critrm.critique import command, critique_pairs, open_chat
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


def test_can_be_called_beside_a_running_event_loop(cache: CritiqueCache) -> None:
    async def notebook() -> list[Critique]:
        return await asyncio.to_thread(critiques_of, make_pairs(1), ScriptedChat(echo), cache)

    assert len(asyncio.run(notebook())) == 2


@pytest.fixture
def pairs_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("CRITRM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr("openai._base_client.INITIAL_RETRY_DELAY", 0.01)
    monkeypatch.setattr("openai._base_client.MAX_RETRY_DELAY", 0.02)
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


def test_open_chat_says_what_does_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    with pytest.raises(ConfigError, match="in this process") as caught:
        open_chat("embedded:SmolLM2-135M-Instruct", base_url="http://me:hunter2@host/v1")
    assert "hunter2" not in str(caught.value)
    with pytest.raises(CriticError, match="OPENAI_API_KEY"):
        open_chat("gpt-4")
    assert open_chat("m", base_url="http://host/v1").model == "m"


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
