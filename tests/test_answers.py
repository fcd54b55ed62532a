"""Whatever a server sends, it comes to a text or a reason."""

import json
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime

import httpx2
import openai
import pytest
from hypothesis import given
from hypothesis import strategies as st

from critrm.answers import error_message, fatal_reason, read_body, retry_after
from critrm.endpoints import Access
from critrm.llm import Reply

ACCESS = Access(urls=("http://a.example/v1",), variable="KEY_HERE", key="sk-secret-key")
JSON = st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers() | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=9), inner, max_size=3),
    max_leaves=9,
)
SHAPED = st.fixed_dictionaries(
    {
        "choices": st.lists(
            st.fixed_dictionaries(
                {
                    "message": JSON | st.dictionaries(st.sampled_from(["content", "refusal"]), JSON),
                    "finish_reason": JSON,
                }
            )
            | JSON,
            max_size=2,
        )
        | JSON
    },
    optional={"usage": JSON | st.dictionaries(st.sampled_from(["prompt_tokens", "completion_tokens"]), JSON)},
)


@given(JSON | SHAPED)
def test_any_json_is_a_text_or_a_failure(body: object) -> None:
    reply = Reply(id="x", **read_body(json.dumps(body), ACCESS.words))
    assert bool(reply.text) != bool(reply.failure)
    assert reply.n_prompt_tokens >= 0 and reply.n_completion_tokens >= 0
    (reply.text + reply.failure).encode()


@given(st.text(max_size=50))
def test_any_text_is_a_failure_or_a_text(text: str) -> None:
    assert "failure" in read_body(text, ACCESS.words) or json.loads(text)["choices"]


def test_a_refusal_is_a_failure_with_its_words_and_no_key() -> None:
    message = {"role": "assistant", "content": None, "refusal": "I will not use sk-secret-key."}
    body = {"choices": [{"message": message, "finish_reason": "stop"}], "usage": {"prompt_tokens": 5}}
    facts = read_body(json.dumps(body), ACCESS.words)
    assert (facts["failure"], facts["n_prompt_tokens"]) == ("refusal: I will not use ***.", 5)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"error": {"message": "a"}}, "a"),
        ({"error": "b"}, "b"),
        ({"message": "c"}, "c"),
        ({"detail": [{"msg": "d"}]}, ""),
        ("plain", "plain"),
        ("<html>", ""),
        (None, ""),
    ],
)
def test_the_servers_own_words(body: object, message: str) -> None:
    assert error_message(body) == message


def refused(status: int, *, body: object = None, headers: dict[str, str] | None = None) -> openai.APIStatusError:
    request = httpx2.Request("POST", "http://a.example/v1")
    return openai.APIStatusError("", response=httpx2.Response(status, headers=headers, request=request), body=body)


def test_retry_after_in_seconds_or_as_a_date() -> None:
    date = format_datetime(datetime.now(UTC) + timedelta(seconds=60), usegmt=True)
    for value, low, high in (
        ("2", 2, 2),
        ("0.5", 0.5, 0.5),
        (date, 57, 61),
        ("-3", 0, 0),
        ("nan", 0, 0),
        ("soon", 0, 0),
    ):
        assert low <= retry_after(refused(429, headers={"retry-after": value})) <= high
    assert retry_after(refused(429)) == 0


def test_what_no_other_call_can_get_around() -> None:
    def reason(status: int, body: object = None) -> str:
        return fatal_reason(refused(status, body=body), model="m", access=ACCESS)

    assert "set KEY_HERE" in reason(401) and "set KEY_HERE" in reason(403)
    assert reason(403, {"message": "flagged"}) == ""
    assert "'m'" in reason(404)
    assert "no credit" in reason(402) and "no credit" in reason(429, {"code": "insufficient_quota"})
    assert reason(429) == reason(500) == reason(400) == ""


def _with_logprobs(logprobs):
    choice = {"message": {"content": "Score: 7 \u2713"}, "finish_reason": "stop", "logprobs": logprobs}
    return Reply(id="x", **read_body(json.dumps({"choices": [choice]}), ACCESS.words))


def _token(text, *top, **changes):
    others = [{"token": name, "logprob": logprob, "bytes": None} for name, logprob in top]
    return {"token": text, "logprob": -0.1, "bytes": None, "top_logprobs": others} | changes


def test_token_probabilities_are_read():
    check = [_token("\\xe2\\x9c", bytes=[0x20, 0xE2, 0x9C]), _token("\\x93", bytes=[0x93])]
    reply = _with_logprobs({"content": [_token("Score:"), _token(" 7", (" 7", -0.5), (" 8", 1e-7)), *check]})
    assert [choice.text for choice in reply.choices] == ["Score:", " 7", " ", "\u2713"]
    assert reply.choices[1].likeliest == ((" 7", -0.5), (" 8", 0.0))


@pytest.mark.parametrize(
    "logprobs",
    [
        None,
        {},
        {"content": None},
        {"content": []},
        {"content": [1]},
        {"content": [{"token": " 7"}]},
        {"content": [_token(" 7", (" 7", "x"))]},
        {"content": [_token(" 7", (" 7", float("nan")))]},
        {"content": [_token(" 7", (" 7", 3.0))]},
        {"content": [_token(" 7", bytes=10**12)]},
        {"content": [_token(" 7", bytes=[300])]},
        [[" 7"]],
        "x",
    ],
)
def test_probabilities_in_no_due_form_are_none_and_cost_no_reply(logprobs):
    reply = _with_logprobs(logprobs)
    assert (reply.text, reply.choices) == ("Score: 7 \u2713", ())
