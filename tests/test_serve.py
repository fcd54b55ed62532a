import asyncio
import io
import json
import logging
import os
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path

import httpx2
import pytest
from starlette.testclient import TestClient

from critrm.critique_cache import CritiqueCache
from critrm.errors import ConfigError
from critrm.live import LiveRewardModel
from critrm.llm import Reply, ScriptedChat
from critrm.reward_model import Reads, RewardModel
from critrm.serve import command, run_server
from critrm.serving_app import create_app
from critrm.serving_guard import Limits
from critrm.serving_logs import log_json_lines
from critrm.serving_protocols import sigmoid
from live_parts import READS, critique_of, make_critic, offline, scripted_critic
from scripted_server import completion, serving

SRC = Path(__file__).parents[1] / "src"
ASK = "What is 2 plus 2?"
CHATML = "<|im_start|>user\nWhat is 2 plus 2?<|im_end|>\n<|im_start|>assistant\n"
HOSTILE = "<|im_end|>{{ 7*7 }}\0\u202e🙂</script><script>alert(1)</script>"


@pytest.fixture(scope="session")
def model(tiny_model) -> RewardModel:
    return RewardModel.from_backbone(str(tiny_model), READS, seed=0)


@pytest.fixture
def cache(tmp_path):
    with CritiqueCache(tmp_path / "critiques.sqlite") as store:
        yield store


@pytest.fixture
def live(model, cache):
    with LiveRewardModel(model, critic=make_critic(scripted_critic(), cache)) as running:
        yield running


@pytest.fixture
def client(live) -> TestClient:
    return TestClient(create_app(live, name="my-run"), base_url="http://localhost")


def critiques(*texts: str) -> list[str]:
    return [critique_of(f"Chatbot: {text}\n\nPlease") for text in texts]


def expected(model, *texts: str) -> list[float]:
    return offline(model, texts, critiques(*texts))


def close(values):
    return pytest.approx(values, abs=1e-4)


# The protocols


def test_score(client, model):
    reply = client.post("/v1/score", json={"prompt": ASK, "completions": ["4.", "5.", HOSTILE]})
    assert reply.status_code == 200
    body = reply.json()
    assert [each["reward"] for each in body["results"]] == close(expected(model, "4.", "5.", HOSTILE))
    assert [each["critique"] for each in body["results"]] == critiques("4.", "5.", HOSTILE)
    assert [each["index"] for each in body["results"]] == [0, 1, 2]
    assert (body["model"], body["id"]) == ("my-run", reply.headers["x-request-id"])
    again = client.post("/v1/score", json={"prompt": [{"role": "user", "content": ASK}], "completions": ["4."]})
    assert again.json()["results"][0] == body["results"][0] | {
        "cached": True,
        "reward": close(expected(model, "4.")[0]),
    }


def test_score_with_given_critiques(client, model):
    body = {"prompt": ASK, "completions": ["4.", "5."], "critiques": ["Right.", "Wrong."]}
    results = client.post("/v1/score", json=body).json()["results"]
    assert [each["reward"] for each in results] == close(offline(model, ["4.", "5."], ["Right.", "Wrong."]))


def test_compare(client, model):
    body = client.post("/v1/compare", json={"prompt": ASK, "completions": ["4.", "5."]}).json()
    first, second = expected(model, "4.", "5.")
    assert body["preferred"] == int(second > first)
    assert body["probability"] == close(sigmoid(first - second))
    level = client.post("/v1/compare", json={"prompt": ASK, "completions": ["4.", "4."]}).json()
    assert (level["preferred"], level["probability"]) == (None, 0.5)


def test_stream(client, model):
    reply = client.post("/v1/score/stream", json={"prompt": ASK, "completions": ["4.", "5."]})
    lines = [json.loads(line) for line in reply.text.splitlines()]
    assert reply.headers["content-type"] == "application/x-ndjson"
    assert [line["critique"] for line in lines[:2]] == critiques("4.", "5.")
    assert [each["reward"] for each in lines[2]["results"]] == close(expected(model, "4.", "5."))


def test_attribute(client):
    body = {"prompt": ASK, "completion": "4.", "critique": "It is right. It is short."}
    found = client.post("/v1/attribute", json=body).json()
    assert [each["text"] for each in found["sentences"]] == ["It is right. ", "It is short."]
    assert all(each["effect"] for each in found["sentences"])


def test_openrlhf(client, model):
    queries = [CHATML + "4.<|im_end|>", CHATML + "5.<|im_end|>"]
    body = {"query": queries, "prompts": [CHATML, CHATML], "labels": ["", ""]}
    reply = client.post("/get_reward", json=body).json()
    assert reply["rewards"] == reply["scores"] == close(expected(model, "4.", "5."))
    assert reply["critiques"] == critiques("4.", "5.")
    assert reply["extra_logs"]["critique_words"] == [float(len(text.split())) for text in reply["critiques"]]
    assert reply["extra_logs"]["critique_failed"] == [0.0, 0.0]
    with_texts = client.post("/get_reward", json=body | {"text_logs": True}).json()
    assert with_texts["extra_logs"]["critiques"] == reply["critiques"]
    plain = client.post("/get_reward", json={"query": [ASK + " 4."], "prompts": [ASK]}).json()
    assert plain["rewards"] == close(expected(model, "4."))
    assert client.post("/get_reward", json={"query": queries}).json()["rewards"] == close(reply["rewards"])


def test_openrlhf_as_its_trainer_reads_it(client):
    """`torch.tensor([value])` for the first entry of each log; texts there would end the training."""
    import torch

    reply = client.post("/get_reward", json={"query": [CHATML + "4."], "prompts": [CHATML], "labels": [""]}).json()
    for values in reply["extra_logs"].values():
        torch.tensor([float(values[0])])


def test_vllm(client, model):
    rewards = expected(model, "4.", "5.")
    texts = [CHATML + "4.<|im_end|>", CHATML + "5."]
    classified = client.post("/classify", json={"model": "x", "input": texts}).json()
    assert [row["probs"] for row in classified["data"]] == [[close(sigmoid(reward))] for reward in rewards]
    assert classified["data"][1] | {"probs": []} == {"index": 1, "label": "LABEL_0", "probs": [], "num_classes": 1}
    assert (classified["object"], classified["model"]) == ("list", "my-run")
    raw = client.post("/classify", json={"input": texts[0], "use_activation": False}).json()
    assert raw["data"][0]["probs"] == close(rewards[:1])
    pooled = client.post("/pooling", json={"input": texts}).json()
    assert [row["data"] for row in pooled["data"]] == [[close(reward)] for reward in rewards]
    messages = [{"role": "user", "content": [{"type": "text", "text": ASK}]}, {"role": "assistant", "content": "4."}]
    assert client.post("/pooling", json={"messages": messages}).json()["data"][0]["data"] == close(rewards[:1])


def test_llama_factory(client, model):
    body = {"model": "rm", "messages": [CHATML + "4.<|im_end|>", "User: What is 2 plus 2?\n\nChatbot: 5."]}
    reply = client.post("/v1/score/evaluation", json=body).json()
    assert reply["scores"] == close(expected(model, "4.", "5."))
    assert (reply["object"], reply["model"]) == ("score.evaluation", "rm")


@pytest.mark.parametrize(
    ("path", "body", "words"),
    [
        ("/v1/score", {"prompt": ASK}, "completions: Field required"),
        ("/v1/score", {"prompt": ASK, "completions": []}, "at least 1"),
        ("/v1/score", {"prompt": ASK, "completions": ["a"], "critque": []}, "critque: Extra inputs"),
        ("/v1/score", {"prompt": ASK, "completions": ["a"], "critiques": ["a", "b"]}, "critiques of 2"),
        ("/v1/score", {"prompt": [{"role": "tool", "content": ""}], "completions": ["a"]}, "'system', 'user'"),
        ("/v1/score", {"prompt": "\ud800", "completions": ["a"]}, "unicode"),
        ("/v1/score", {"prompt": ASK, "completions": ["a"], "\ud800": 1}, "unicode"),
        ("/v1/score", {"prompt": ASK, "completions": ["a" * 300_000]}, "at most 262144"),
        ("/v1/compare", {"prompt": ASK, "completions": ["a"]}, "at least 2"),
        ("/v1/attribute", {"prompt": ASK, "completion": "a", "critique": " "}, "no critique"),
        ("/v1/attribute", {"prompt": ASK, "completion": "a", "critique": "A b. " * 129}, "129 sentences"),
        ("/get_reward", {"query": ["text"]}, "no chat format"),
        ("/get_reward", {"query": ["text"], "prompts": ["other"]}, "does not begin with its prompt"),
        ("/get_reward", {"query": ["text"], "prompts": []}, "at least 1"),
        ("/get_reward", {"query": ["text"], "prompts": ["a", "b"]}, "as many prompts"),
        ("/classify", {"input": ["text"]}, "send `messages`"),
        ("/classify", {}, "either `input` or `messages`"),
        ("/pooling", {"messages": [{"role": "user", "content": "a"}] * 2}, "the assistant's"),
        ("/v1/score/evaluation", {"messages": [CHATML.partition("<|im_start|>assistant")[0]]}, "not end in a reply"),
    ],
)
def test_what_cannot_be_scored_is_said(client, path, body, words):
    reply = client.post(path, content=json.dumps(body), headers={"content-type": "application/json"})
    error = reply.json()["error"]
    assert reply.status_code == 422, error
    assert words in error["message"]
    assert error["request_id"] == reply.headers["x-request-id"]


@pytest.mark.parametrize(
    ("content", "status"),
    [(b"{", 422), (b"[" * 200_000, 400), (b'{"prompt": ' + b"9" * 5000 + b"}", 400), (b"\xff", 400), (b"null", 422)],
)
def test_bodies_that_are_no_json(client, content, status):
    reply = client.post("/v1/score", content=content, headers={"content-type": "application/json"})
    assert reply.status_code == status
    assert reply.json()["error"]["message"]


def test_only_json_is_taken(client):
    """A form or a text can be sent by any web page without asking."""
    body = json.dumps({"prompt": ASK, "completions": ["4."]})
    assert client.post("/v1/score", content=body, headers={"content-type": "text/plain"}).status_code == 422
    assert client.post("/v1/score", content=body).status_code == 422
    assert client.get("/v1/score").status_code == 405
    assert client.get("/nothing").json()["error"]["code"] == "http"


# A critic that fails


def failing_client(model, cache, failure: str, **options) -> TestClient:
    chat = ScriptedChat(lambda request: Reply(id=request.id, failure=failure))
    running = LiveRewardModel(model, critic=make_critic(chat, cache, retries=0), **options)
    return TestClient(create_app(running, name="my-run"), base_url="http://localhost")


def test_a_failed_critic_is_an_error_and_no_zero(model, cache):
    client = failing_client(model, cache, "http 500: at inner.host")
    for path, body in {
        "/v1/score": {"prompt": ASK, "completions": ["4."]},
        "/get_reward": {"query": [CHATML + "4."], "prompts": [CHATML]},
        "/classify": {"input": CHATML + "4."},
    }.items():
        reply = client.post(path, json=body)
        assert (reply.status_code, reply.json()["error"]["code"]) == (503, "critic")
        assert int(reply.headers["retry-after"]) > 0
        assert "http 500" in reply.text and "inner.host" not in reply.text
    streamed = client.post("/v1/score/stream", json={"prompt": ASK, "completions": ["4."]})
    lines = [json.loads(line) for line in streamed.text.splitlines()]
    assert lines[0] == {"index": 0, "critique": "", "failure": "http 500"}
    assert lines[1]["error"]["code"] == "critic"
    assert "inner.host" not in streamed.text


def test_without_critique_where_the_policy_says_so(model, cache):
    client = failing_client(model, cache, "timeout", on_failure="without")
    (result,) = client.post("/v1/score", json={"prompt": ASK, "completions": ["4."]}).json()["results"]
    assert result["reward"] == close(offline(model, ["4."], [""])[0])
    assert (result["critic"], result["critique"], result["failure"]) == ("none", "", "timeout")
    rewards = client.post("/get_reward", json={"query": [CHATML + "4."], "prompts": [CHATML]}).json()
    assert rewards["extra_logs"]["critique_failed"] == [1.0]
    assert "critrm_completions_without_critique_total 2.0" in client.get("/metrics").text


def test_a_broken_model_is_503(tiny_model, caplog):
    broken = RewardModel.from_backbone(str(tiny_model), Reads(), seed=0)
    broken.model.score.weight.data.fill_(float("nan"))
    with LiveRewardModel(broken) as running:
        client = TestClient(create_app(running, name="m"), base_url="http://localhost")
        reply = client.post("/v1/score", json={"prompt": ASK, "completions": ["4."]})
    assert (reply.status_code, reply.json()["error"]["code"]) == (503, "model")
    assert str(tiny_model) not in reply.text


# Many at once


def test_concurrent_clients_get_their_own_answers(model, live):
    app = create_app(live, name="my-run")
    texts = [f"It is {i}." for i in range(60)]

    async def run():
        transport = httpx2.ASGITransport(app=app)
        async with httpx2.AsyncClient(transport=transport, base_url="http://localhost") as client:
            calls = [client.post("/v1/score", json={"prompt": ASK, "completions": [text]}) for text in texts]
            return await asyncio.gather(*calls)

    replies = asyncio.run(run())
    rewards = [reply.json()["results"][0]["reward"] for reply in replies]
    assert rewards == close(expected(model, *texts))
    assert live.batcher.stats.n_batches <= 30, "requests that wait are computed together"
    assert len({reply.headers["x-request-id"] for reply in replies}) == len(texts)


# What it says about itself


def test_health_and_metrics(client):
    assert client.get("/health").json() == {"status": "ok", "model": "my-run", "critic": "scripted", "n_waiting": 0}
    client.post("/v1/score", json={"prompt": ASK, "completions": ["4.", "5."]})
    client.post("/v1/score", json={"prompt": ASK, "completions": ["4."]})
    client.get("/no/such/path")
    text = client.get("/metrics").text
    for line in (
        'critrm_requests_total{path="/v1/score",status="200"} 2.0',
        'critrm_requests_total{path="other",status="404"} 1.0',
        'critrm_request_seconds_count{path="/v1/score"} 2.0',
        "critrm_completions_scored_total 3.0",
        'critrm_critiques_total{result="answered"} 2.0',
        'critrm_critiques_total{result="cached"} 1.0',
        "critrm_prompts_waiting 0.0",
    ):
        assert line in text.splitlines()


def test_logs_are_json_lines_without_texts_and_secrets(live, monkeypatch):
    for name in ("critrm", "uvicorn"):
        logger = logging.getLogger(name)
        monkeypatch.setattr(logger, "handlers", logger.handlers)
        monkeypatch.setattr(logger, "propagate", logger.propagate)
        monkeypatch.setattr(logger, "level", logger.level)
    stream = io.StringIO()
    log_json_lines(stream)
    client = TestClient(create_app(live, name="m", limits=Limits(token="top-secret")), base_url="http://rm.example.org")
    body = {"prompt": "private question", "completions": ["4."]}
    client.post("/v1/score", json=body, headers={"authorization": "Bearer guessed-wrong"})
    client.post("/v1/score?token=in-the-url", json=body, headers={"authorization": "Bearer top-secret"})
    client.post("/v1/score", json={"prompt": "private question"}, headers={"authorization": "Bearer top-secret"})
    rows = [json.loads(line) for line in stream.getvalue().splitlines()]
    requests = [row for row in rows if row["event"] == "request"]
    assert [row["status"] for row in requests] == [401, 200, 422]
    assert requests[1] | {"seconds": 0, "time": "", "request_id": "", "client": ""} == {
        "time": "",
        "level": "info",
        "logger": "critrm.serve",
        "event": "request",
        "request_id": "",
        "method": "POST",
        "path": "/v1/score",
        "status": 200,
        "seconds": 0,
        "client": "",
        "completions": 1,
        "cached": 0,
        "critic_failures": 0,
    }
    for secret in ("top-secret", "guessed-wrong", "in-the-url", "private question"):
        assert secret not in stream.getvalue()


def test_the_page_loads_nothing_from_elsewhere(model):
    strange = RewardModel(model.model, model.tokenizer, Reads(critic="<b>evil</b>", critique_dropout=0.1), name="x")
    with LiveRewardModel(strange) as running:
        page = TestClient(create_app(running, name="<script>alert(1)</script>"), base_url="http://localhost").get("/")
    assert "<script>alert" not in page.text and "<b>evil" not in page.text
    assert "http://" not in page.text and "https://" not in page.text
    policy = page.headers["content-security-policy"]
    assert "default-src 'none'" in policy and "unsafe" not in policy
    nonce = policy.partition("nonce-")[2].partition("'")[0]
    assert page.text.count(f'nonce="{nonce}"') == 2


# Fuzzing from its own description


def test_fuzz(live):
    """What the description allows, and what it does not: never a 5xx, and always an answer that it describes."""
    import schemathesis
    from hypothesis import HealthCheck, given, settings
    from schemathesis.generation import GenerationMode
    from schemathesis.specs.openapi.checks import (
        content_type_conformance,
        response_schema_conformance,
        status_code_conformance,
    )

    app = create_app(live, name="m", limits=Limits(token="secret-token"))
    headers = {"authorization": "Bearer secret-token"}
    schema = schemathesis.openapi.from_asgi("/openapi.json", app, headers=headers)
    checks = [
        schemathesis.checks.not_a_server_error,
        content_type_conformance,
        response_schema_conformance,
        status_code_conformance,
    ]
    seen = set()
    limits = settings(max_examples=10, deadline=None, database=None, suppress_health_check=list(HealthCheck))

    def fuzz(operation, mode):
        @limits
        @given(case=operation.as_strategy(generation_mode=mode))
        def answers(case):
            reply = case.call(headers=headers)
            case.validate_response(reply, checks=checks, headers=headers)
            seen.add((case.path, reply.status_code))

        answers()

    for result in schema.get_all_operations():
        operation = result.ok()
        fuzz(operation, GenerationMode.POSITIVE)
        if operation.method.upper() == "POST":
            fuzz(operation, GenerationMode.NEGATIVE)
    paths = {"/v1/score", "/v1/score/stream", "/v1/compare", "/v1/attribute", "/get_reward", "/classify", "/pooling"}
    assert {path for path, _ in seen} == paths | {"/v1/score/evaluation", "/health", "/metrics"}
    assert ("/v1/score", 200) in seen
    assert ("/v1/score", 422) in seen


# The command


def test_others_are_let_in_with_a_token_only(monkeypatch):
    monkeypatch.delenv("CRITRM_TOKEN", raising=False)
    for host in ("0.0.0.0", "::", "192.168.1.2"):
        with pytest.raises(ConfigError, match="CRITRM_TOKEN"):
            command("unused", host=host)


def test_a_port_in_use_is_said(live):
    import socket

    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(ConfigError, match="--port"):
        app = create_app(live, name="m")
        port = taken.getsockname()[1]
        run_server(app, host="127.0.0.1", port=port, drain=1, on_ready=lambda url: None, on_end=lambda: None)


def post(url: str, body: object, token: str = "") -> dict:
    headers = {"content-type": "application/json"} | ({"authorization": f"Bearer {token}"} if token else {})
    request = urllib.request.Request(url, data=json.dumps(body).encode(), headers=headers)
    with urllib.request.urlopen(request, timeout=120) as reply:
        return json.load(reply)


def test_sigterm_drains(tmp_path, model):
    """The real command: requests under way are answered, then the process ends well."""
    model.save(tmp_path / "run" / "model")
    asked, go_on = threading.Event(), threading.Event()

    def answer(body):
        asked.set()
        go_on.wait(60)
        return completion("Good. Right.")

    with serving(answer) as critic:
        words = ["serve", str(tmp_path / "run"), "--critic", "scripted", "--model", "m", "--base-url", critic.url]
        words += ["--port", "0", "--key-variable", "", "--cache", str(tmp_path / "cache.sqlite"), "--precision", "fp32"]
        environment = {**os.environ, "PYTHONPATH": str(SRC), "CRITRM_TOKEN": "top-secret", "COLUMNS": "500"}
        process = subprocess.Popen(
            [sys.executable, "-m", "critrm", *words],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
        )
        try:
            line = process.stdout.readline()
            assert "http://127.0.0.1:" in line, line + process.stderr.read()
            url = line.split()[-1]
            replies = []
            body = {"prompt": ASK, "completions": ["4."]}
            threads = [
                threading.Thread(target=lambda: replies.append(post(f"{url}/v1/score", body, "top-secret")))
                for _ in range(3)
            ]
            for thread in threads:
                thread.start()
            assert asked.wait(60)
            time.sleep(0.5)
            process.send_signal(signal.SIGTERM)
            time.sleep(0.5)
            with pytest.raises(urllib.error.URLError):
                post(f"{url}/v1/score", body, "top-secret")
            go_on.set()
            for thread in threads:
                thread.join(60)
            out, log = process.communicate(timeout=60)
        finally:
            process.kill()
    assert process.returncode == 0, log
    rewards = [reply["results"][0]["reward"] for reply in replies]
    assert rewards == close(offline(model, ["4."], ["Good. Right."]) * 3)
    assert len(critic.bodies) == 1
    rows = [json.loads(line) for line in log.splitlines()]
    assert sum(row["event"] == "request" for row in rows) == 3
    assert "top-secret" not in out + log
