"""The Batch API: every call is sent once, whatever is killed when, and every call gets its reply."""

import asyncio
import json
import re
import threading
from collections.abc import Iterator
from contextlib import aclosing, contextmanager
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from critrm import batch_llm
from critrm.batch_llm import BatchChat
from critrm.critique import command
from critrm.critique_files import read_critiques
from critrm.errors import ConfigError, CriticError, StorageError
from critrm.llm import ChatRequest, Reply, Sampling
from critrm.store import write_records
from critrm.types import Message, PreferencePair

KEY = "sk-very-secret"


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("openai._base_client.INITIAL_RETRY_DELAY", 0.01)
    monkeypatch.setattr("openai._base_client.MAX_RETRY_DELAY", 0.02)
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


class BatchServer:
    """A provider with files and batches. A batch ends as `status` once `ready` is set."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.batches: dict[str, dict[str, Any]] = {}
        self.ready = True
        self.status = "completed"
        self.refuse: dict[str, int] = {}
        """Path -> the status that it is refused with."""
        self.lose_next_batch = False
        """Make the batch, but break the connection off instead of saying so."""
        self.n_polls = 0

    def texts_sent(self) -> list[str]:
        files = [self.files[batch["input_file_id"]] for batch in self.batches.values()]
        lines = [json.loads(line) for file in files for line in file.split(b"\n") if line]
        return [line["body"]["messages"][0]["content"] for line in lines]

    def post(self, path: str, body: bytes) -> object:
        if path == "/v1/files":
            # The part of the form that is the file.
            data = re.search(rb'filename="[^"]*\.jsonl".*?\r\n\r\n(.*?)\r\n--', body, re.DOTALL)[1]
            file_id = f"file-{len(self.files)}"
            self.files[file_id] = data
            return {"id": file_id, "object": "file", "bytes": len(data), "filename": "x", "purpose": "batch"}
        asked = json.loads(body)
        assert (asked["endpoint"], asked["completion_window"]) == ("/v1/chat/completions", "24h")
        batch_id = f"batch-{len(self.batches)}"
        self.batches[batch_id] = {
            "id": batch_id,
            "object": "batch",
            "endpoint": asked["endpoint"],
            "input_file_id": asked["input_file_id"],
            "completion_window": "24h",
            "status": "in_progress",
            "created_at": 10**10,
        }
        if self.lose_next_batch:
            self.lose_next_batch = False
            raise ConnectionResetError
        return self.batches[batch_id]

    def get(self, path: str) -> object:
        name = path.split("?")[0].split("/")
        if path.startswith("/v1/files"):
            return self.files[name[3]]
        if len(name) == 3:
            return {"object": "list", "data": list(self.batches.values())[::-1], "has_more": False}
        self.n_polls += 1
        batch = self.batches[name[3]]
        if self.ready and batch["status"] == "in_progress":
            self.end(batch)
        return batch

    def end(self, batch: dict[str, Any]) -> None:
        """Answer by the text: those with an exclamation mark fail, those with a question mark are left out."""
        batch["status"] = self.status
        if self.status == "failed":
            batch["errors"] = {"object": "list", "data": [{"code": "bad", "message": "line 3 is too long"}]}
            return
        output, errors = [], []
        for line in self.files[batch["input_file_id"]].split(b"\n")[::-1]:
            if not line:
                continue
            row = json.loads(line)
            text = row["body"]["messages"][0]["content"]
            result: dict[str, Any] = {"id": "x", "custom_id": row["custom_id"], "response": None, "error": None}
            if "!" in text:
                body = {"error": {"message": f"cannot, {KEY}"}}
                errors.append(result | {"response": {"status_code": 400, "body": body}})
            elif "?" in text:
                continue
            elif self.status == "expired" and "late" in text:
                errors.append(result | {"error": {"code": "batch_expired", "message": "This request was too late."}})
            else:
                choice = {"message": {"role": "assistant", "content": f"To {text}"}, "finish_reason": "stop"}
                usage = {"prompt_tokens": 11, "completion_tokens": 7}
                body = {"choices": [choice], "usage": usage}
                output.append(result | {"response": {"status_code": 200, "body": body}})
        for name, rows in (("output_file_id", output), ("error_file_id", errors)):
            if rows:
                file_id = f"{batch['id']}-{name}"
                self.files[file_id] = "".join(json.dumps(row) + "\n" for row in rows).encode() + b"\n not JSON"
                batch[name] = file_id


@contextmanager
def serving() -> Iterator[tuple[BatchServer, str]]:
    provider = BatchServer()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def answer(self) -> None:
            body = self.rfile.read(int(self.headers.get("content-length") or 0))
            status = next((code for path, code in provider.refuse.items() if self.path.startswith(path)), 200)
            try:
                found = provider.post(self.path, body) if self.command == "POST" and status == 200 else None
                found = provider.get(self.path) if self.command == "GET" and status == 200 else found
            except KeyError:
                status, found = 404, None
            except ConnectionResetError:
                self.close_connection = True
                return
            found = {"error": {"message": f"no, {KEY}"}} if status != 200 else found
            data = found if isinstance(found, bytes) else json.dumps(found).encode()
            self.send_response(status)
            self.send_header("content-type", "application/json")
            self.send_header("content-length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        do_GET = do_POST = answer

        def log_message(self, *_: object) -> None:
            pass

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    http.daemon_threads = True
    thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield provider, f"http://127.0.0.1:{http.server_address[1]}/v1"
    finally:
        http.shutdown()
        http.server_close()
        thread.join()


@pytest.fixture
def server() -> Iterator[tuple[BatchServer, str]]:
    with serving() as running:
        yield running


def chat_at(url: str, folder: Path, **settings: Any) -> BatchChat:
    return BatchChat("m", base_url=url, state=folder / "state" / "batches.json", poll_seconds=0.01, **settings)


def requests(texts: list[str]) -> Iterator[ChatRequest]:
    return (ChatRequest(id=f"id-{i}", messages=(Message("user", text),)) for i, text in enumerate(texts))


def ask(chat: BatchChat, texts: list[str]) -> dict[str, Reply]:
    async def collect() -> dict[str, Reply]:
        return {reply.id: reply async for reply in chat.stream(requests(texts), Sampling(max_tokens=5))}

    return asyncio.run(collect())


def abandon(chat: BatchChat, texts: list[str], *, after: int | float) -> int:
    """Stop like a kill: after so many replies, or so many seconds of waiting."""

    async def begin() -> int:
        n = 0
        async with aclosing(chat.stream(requests(texts), Sampling(max_tokens=5))) as stream:
            async for _ in stream:
                n += 1
                if n == after:
                    break
        return n

    async def for_a_while() -> int:
        try:
            return await asyncio.wait_for(begin(), None if isinstance(after, int) else after)
        except TimeoutError:
            return 0

    return asyncio.run(for_a_while())


def noted(folder: Path) -> list[dict[str, Any]]:
    return json.loads((folder / "state" / "batches.json").read_text())["batches"]


TEXTS = [f"text {i}" for i in range(9)]


def test_every_request_gets_its_reply_and_the_state_is_struck_out(server, tmp_path) -> None:
    provider, url = server
    hostile = "{{ x }} <|im_end|> \x00 \u202eabc \u2028 \U0001f9d1\u200d\U0001f680"
    texts = [*TEXTS, "bad!", "none?", hostile, TEXTS[0], "half \ud83d"]
    replies = ask(chat_at(url, tmp_path), texts)
    assert len(replies) == len(texts)
    for i, text in enumerate(TEXTS):
        reply = replies[f"id-{i}"]
        assert (reply.text, reply.failure, reply.finish_reason) == (f"To {text}", "", "stop")
        assert (reply.n_prompt_tokens, reply.n_completion_tokens) == (11, 7)
    assert replies["id-9"].failure == "http 400: cannot, ***"
    assert replies["id-10"].failure == "batch completed without an answer to this call"
    assert replies["id-11"].text == f"To {hostile}"
    assert replies["id-12"].text == "To text 0"  # asked twice, sent once
    assert "surrogate" in replies["id-13"].failure
    assert len(provider.batches) == 1 and noted(tmp_path) == []
    line = json.loads(provider.files["file-0"].split(b"\n")[0])
    assert (line["method"], line["url"]) == ("POST", "/v1/chat/completions")
    assert line["body"] == {
        "model": "m",
        "messages": [{"role": "user", "content": "text 0"}],
        "temperature": 0.0,
        "top_p": 1.0,
        "seed": 0,
        "max_tokens": 5,
    }


@pytest.mark.parametrize("limit", [{"MAX_REQUESTS": 4}, {"MAX_BYTES": 1000}])
def test_many_requests_become_several_batches(server, tmp_path, monkeypatch, limit) -> None:
    provider, url = server
    for name, value in limit.items():
        monkeypatch.setattr(batch_llm, name, value)
    replies = ask(chat_at(url, tmp_path), TEXTS)
    assert sorted(reply.text for reply in replies.values()) == sorted(f"To {text}" for text in TEXTS)
    assert len(provider.batches) == 3
    assert all(len(file) <= 1000 for name, file in provider.files.items() if name.startswith("file"))


def test_after_a_kill_between_submission_and_result_nothing_is_sent_again(server, tmp_path, monkeypatch) -> None:
    provider, url = server
    monkeypatch.setattr(batch_llm, "MAX_REQUESTS", 4)
    provider.ready = False
    assert abandon(chat_at(url, tmp_path), TEXTS, after=0.5) == 0
    assert provider.n_polls > 0
    (first, *_) = batches = noted(tmp_path)
    assert [batch["id"] for batch in batches] == ["batch-0", "batch-1", "batch-2"]
    assert len(first["sha256"]) == 64 and len(first["requests"]) == 4
    provider.ready = True
    replies = ask(chat_at(url, tmp_path), TEXTS)
    assert len(replies) == 9 and not any(reply.failure for reply in replies.values())
    assert sorted(provider.texts_sent()) == TEXTS
    assert noted(tmp_path) == []


def test_after_a_kill_between_replies_only_what_is_new_is_sent(server, tmp_path, monkeypatch) -> None:
    provider, url = server
    monkeypatch.setattr(batch_llm, "MAX_REQUESTS", 4)
    assert abandon(chat_at(url, tmp_path), TEXTS, after=6) == 6
    # The first batch is over; of the second one a reply has been stored, and perhaps not the last one taken.
    assert {batch["id"]: len(batch["requests"]) for batch in noted(tmp_path)} == {"batch-1": 3, "batch-2": 1}
    # The caller has stored some and asks for the rest, and for more.
    replies = ask(chat_at(url, tmp_path), [*TEXTS[4:], "new"])
    assert {reply.text for reply in replies.values()} == {f"To {text}" for text in [*TEXTS[4:], "new"]}
    assert len(provider.batches) == 4
    assert noted(tmp_path) == []


def test_a_batch_that_is_partly_wanted_keeps_its_other_answers(server, tmp_path) -> None:
    provider, url = server
    provider.ready = False
    assert abandon(chat_at(url, tmp_path), TEXTS, after=0.3) == 0
    provider.ready = True
    for wanted in (TEXTS[:2], TEXTS[1:4]):
        n_noted = len(noted(tmp_path)[0]["requests"])
        # The first of the second lot has been handed over: the caller lost it, or asks a failed call again.
        replies = ask(chat_at(url, tmp_path), wanted)
        assert [replies[f"id-{i}"].text for i in range(len(wanted))] == [f"To {text}" for text in wanted]
        assert len(noted(tmp_path)[0]["requests"]) == n_noted - 2
    assert len(provider.texts_sent()) == 10 and len(noted(tmp_path)) == 1
    replies = ask(chat_at(url, tmp_path), TEXTS[4:])
    assert {reply.text for reply in replies.values()} == {f"To {text}" for text in TEXTS[4:]}
    assert len(provider.texts_sent()) == 10 and noted(tmp_path) == []


def test_a_job_that_ends_later_brings_no_batch_back(server, tmp_path) -> None:
    provider, url = server
    provider.ready = False
    assert abandon(chat_at(url, tmp_path), TEXTS, after=0.3) == 0

    async def both() -> None:
        few, all_of_them = (
            chat_at(url, tmp_path).stream(requests(texts), Sampling(max_tokens=5)) for texts in (TEXTS[:2], TEXTS)
        )
        provider.ready = True
        await anext(few)
        assert len([reply async for reply in all_of_them]) == 9
        assert len([reply async for reply in few]) == 1

    asyncio.run(both())
    assert len(provider.batches) == 1 and noted(tmp_path) == []


def test_results_that_the_provider_has_deleted_become_rows(server, tmp_path) -> None:
    provider, url = server
    ask(chat_at(url, tmp_path), ["x"])
    provider.ready = False
    abandon(chat_at(url, tmp_path), TEXTS, after=0.3)
    provider.ready = True
    ask(chat_at(url, tmp_path), TEXTS[:1])
    del provider.files["batch-1-output_file_id"]
    with pytest.raises(CriticError, match="404"):  # a passing fault must not lose what is paid for
        ask(chat_at(url, tmp_path), TEXTS[1:])
    path = tmp_path / "state" / "batches.json"
    path.write_text(re.sub(r'"submitted": [0-9.]+', '"submitted": 1.0', path.read_text()))
    failures = {reply.failure for reply in ask(chat_at(url, tmp_path), TEXTS[1:]).values()}
    assert failures == {"batch completed without an answer to this call"}
    assert noted(tmp_path) == []


@pytest.mark.parametrize("made", [True, False])
def test_a_kill_while_the_batch_is_being_made(server, tmp_path, made) -> None:
    provider, url = server
    if made:
        provider.lose_next_batch = True
    else:
        provider.refuse = {"/v1/batches": 500}
    with pytest.raises(CriticError, match=r"batches\.json"):
        ask(chat_at(url, tmp_path), TEXTS)
    assert [batch["id"] for batch in noted(tmp_path)] == [""]
    provider.refuse = {}
    replies = ask(chat_at(url, tmp_path), TEXTS)
    assert len(replies) == 9 and not any(reply.failure for reply in replies.values())
    assert len(provider.batches) == 1
    assert len([name for name in provider.files if name.startswith("file")]) == 1


@pytest.mark.parametrize(
    ("status", "failure"),
    [
        ("failed", "batch failed: line 3 is too long"),
        ("cancelled", "batch cancelled without an answer to this call"),
        ("expired", "batch: This request was too late."),
    ],
)
def test_batches_that_do_not_complete_become_rows_with_reasons(server, tmp_path, status, failure) -> None:
    provider, url = server
    provider.status = status
    replies = ask(chat_at(url, tmp_path), ["in time", "late" if status == "expired" else "late?"])
    assert replies["id-1"].failure == failure
    assert replies["id-0"].text == ("" if status == "failed" else "To in time")
    assert noted(tmp_path) == []
    provider.status = "completed"
    assert ask(chat_at(url, tmp_path), ["late"])["id-0"].text == "To late"  # may be tried again


def test_a_batch_that_the_provider_forgot_becomes_rows(server, tmp_path) -> None:
    provider, url = server
    provider.ready = False
    abandon(chat_at(url, tmp_path), TEXTS, after=0.3)
    provider.batches.clear()
    assert {reply.failure for reply in ask(chat_at(url, tmp_path), TEXTS).values()} == {
        "batch: the endpoint does not know it any more"
    }
    assert noted(tmp_path) == []


def test_a_passing_fault_while_polling_ends_nothing(server, tmp_path, monkeypatch) -> None:
    provider, url = server
    polled = provider.get
    n = 0

    def get(path: str) -> object:
        nonlocal n
        n += "batches" in path
        if n in (1, 2, 3, 4, 5, 6):
            raise ConnectionResetError
        return polled(path)

    monkeypatch.setattr(provider, "get", get)
    assert len(ask(chat_at(url, tmp_path), TEXTS)) == 9


@pytest.mark.parametrize(
    ("refuse", "reason"),
    [
        ({"/v1/files": 401}, "set OPENAI_API_KEY"),
        ({"/v1/files": 404}, "no Batch API"),
        ({"/v1/batches": 400}, r"refuses the batch \(http 400: no, \*\*\*\)"),
        ({"/v1/batches/": 403}, "set OPENAI_API_KEY"),
        ({"/v1/batches/": 500}, "http 500"),
    ],
)
def test_an_endpoint_that_takes_no_batches_says_what_to_do(server, tmp_path, monkeypatch, refuse, reason) -> None:
    provider, url = server
    monkeypatch.setattr(batch_llm, "MAX_FAILED_POLLS", 2)
    provider.refuse = refuse
    with pytest.raises(CriticError, match=reason) as caught:
        ask(chat_at(url, tmp_path), TEXTS)
    assert KEY not in str(caught.value) and caught.value.__suppress_context__


def test_settings_and_states_that_cannot_work(tmp_path, monkeypatch) -> None:
    with pytest.raises(ConfigError, match="one base URL"):
        chat_at("http://a.example/v1,http://b.example/v1", tmp_path)
    chat = chat_at("http://127.0.0.1:1/v1", tmp_path)
    assert KEY not in repr(chat)
    with pytest.raises(CriticError, match=r"not reached \(connection refused\).*same command again"):
        ask(chat, ["x"])
    for damaged in ("", "[]", "{", '{"batches": [3]}', '{"batches": [{"id": "x"}]}'):
        (tmp_path / "state").mkdir(exist_ok=True)
        (tmp_path / "state" / "batches.json").write_text(damaged)
        with pytest.raises(StorageError, match=r"batches\.json: cannot be read"):
            ask(chat, ["x"])
    monkeypatch.delenv("OPENAI_API_KEY")
    with pytest.raises(CriticError, match="OTHER_KEY"):
        BatchChat("m", state=tmp_path / "x", key_variable="OTHER_KEY")


def test_the_command_sends_one_batch_and_the_same_command_again_sends_none(
    server: tuple[BatchServer, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("critrm.critics.BatchChat", partial(BatchChat, poll_seconds=0.01))
    provider, url = server
    pairs = [
        PreferencePair(id=f"p{i}", prompt=(Message("user", "Hello"),), chosen=f"Good {i}.", rejected=f"Bad {i}.")
        for i in range(3)
    ]
    write_records(tmp_path / "pairs.jsonl", pairs)
    for _ in range(2):
        command(
            str(tmp_path / "pairs.jsonl"),
            model="m",
            base_url=url,
            key_variable="OPENAI_API_KEY",
            batch=True,
            out=tmp_path / "critiques.jsonl",
            cache=tmp_path / "cache.sqlite",
        )
        assert len(provider.batches) == 1 and len(provider.texts_sent()) == 6
    rows = read_critiques(tmp_path / "critiques.jsonl")
    assert len(rows) == 6 and not any(row.failure for row in rows)
    assert all(pairs[i // 2].completion(row.side) in row.text for i, row in enumerate(rows))
