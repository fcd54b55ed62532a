import asyncio
import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from critrm.errors import ConfigError, ModelError
from critrm.llm import ChatRequest, Reply, Sampling
from critrm.local_llm import LocalChat
from critrm.types import Message

GREEDY = Sampling(max_tokens=12)
DRAWN = Sampling(temperature=1.0, top_p=0.9, max_tokens=12, seed=3)


def requests(n: int = 8) -> list[ChatRequest]:
    return [
        ChatRequest(id=f"r{i}", messages=(Message("user", f"{i} " + "the sea is blue. " * (i * 3 % 7)),))
        for i in range(n)
    ]


def answers(chat: LocalChat, asked: list[ChatRequest], sampling: Sampling) -> dict[str, Reply]:
    async def collect() -> list[Reply]:
        return [reply async for reply in chat.stream(asked, sampling)]

    replies = asyncio.run(collect())
    assert len(replies) == len(asked)
    return {reply.id: reply for reply in replies}


def texts(replies: dict[str, Reply]) -> dict[str, tuple[str, int, str]]:
    return {key: (reply.text, reply.n_completion_tokens, reply.finish_reason) for key, reply in sorted(replies.items())}


def local(folder: Path, *, batch_size: int = 8) -> LocalChat:
    return LocalChat(str(folder), batch_size=batch_size, device="cpu", dtype="fp32")


@pytest.fixture(scope="module")
def stopping_model(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with more stop tokens, so that its replies end at different lengths."""
    folder = tmp_path_factory.mktemp("stopping") / "model"
    shutil.copytree(tiny_model, folder)
    path = folder / "generation_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"eos_token_id": [2, *range(3, 400, 12)]}))
    return folder


@pytest.mark.parametrize("sampling", [GREEDY, DRAWN], ids=["greedy", "drawn"])
def test_replies_do_not_depend_on_batch_size_or_order(stopping_model: Path, sampling: Sampling) -> None:
    alone = answers(local(stopping_model, batch_size=1), requests(), sampling)
    # The test would be empty if every reply had one length.
    assert len({reply.n_completion_tokens for reply in alone.values()}) > 2
    assert texts(answers(local(stopping_model, batch_size=3), requests(), sampling)) == texts(alone)
    assert texts(answers(local(stopping_model), requests()[::-1], sampling)) == texts(alone)
    assert texts(answers(local(stopping_model), requests()[2:5], sampling)) == texts(
        {key: alone[key] for key in ("r2", "r3", "r4")}
    )


def test_greedy_replies_are_those_of_transformers_generate(tiny_model: Path) -> None:
    import torch

    from critrm import models
    from critrm.encoding import encode_chat

    tokenizer, model = models.load_tokenizer(str(tiny_model)), models.load_causal_lm(str(tiny_model))
    ours = answers(local(tiny_model), requests(), GREEDY)
    for request in requests():
        ids = torch.tensor([encode_chat(tokenizer, request.messages)])
        out = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=12)
        expected = tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)
        assert ours[request.id].text == expected.strip()
        assert ours[request.id].n_prompt_tokens == ids.shape[1]


def test_the_seed_and_top_p_change_what_is_drawn(tiny_model: Path) -> None:
    first = texts(answers(local(tiny_model), requests(), DRAWN))
    other_seed = Sampling(temperature=1.0, top_p=0.9, max_tokens=12, seed=4)
    assert texts(answers(local(tiny_model), requests(), other_seed)) != first
    # A nucleus of one token is greedy.
    narrow = Sampling(temperature=1.0, top_p=1e-6, max_tokens=12)
    assert texts(answers(local(tiny_model), requests(), narrow)) == texts(
        answers(local(tiny_model), requests(), GREEDY)
    )


def test_sampling_follows_the_models_probabilities(tiny_model: Path) -> None:
    import torch

    from critrm import models
    from critrm.encoding import encode_chat

    tokenizer, model = models.load_tokenizer(str(tiny_model)), models.load_causal_lm(str(tiny_model))
    message = Message("user", "heads or tails?")
    ids = torch.tensor([encode_chat(tokenizer, [message])])
    with torch.inference_mode():
        probabilities = (model(ids).logits[0, -1] / 4).softmax(-1)
    chat, drawn = local(tiny_model), []
    for seed in range(300):
        sampling = Sampling(temperature=4.0, max_tokens=1, seed=seed)
        drawn.append(answers(chat, [ChatRequest(id="x", messages=(message,))], sampling)["x"].text)
    likeliest = tokenizer.decode(probabilities.argmax()).strip()
    # The decoded, stripped texts of several tokens may coincide: add their probabilities up.
    expected = sum(
        float(p)
        for i, p in enumerate(probabilities)
        if tokenizer.decode(i, skip_special_tokens=True).strip() == likeliest
    )
    found = drawn.count(likeliest) / len(drawn)
    assert abs(found - expected) < 4 * (expected * (1 - expected) / len(drawn)) ** 0.5


def test_a_reply_stops_at_any_of_the_models_stop_tokens_or_at_its_length(
    stopping_model: Path, tiny_model: Path
) -> None:
    stopped = answers(local(stopping_model), requests(), GREEDY)
    full = answers(local(tiny_model), requests(), GREEDY)
    assert {reply.finish_reason for reply in stopped.values()} == {"stop", "length"}
    assert sum(reply.n_completion_tokens for reply in stopped.values()) < sum(
        reply.n_completion_tokens for reply in full.values()
    )
    for key, reply in stopped.items():
        assert full[key].text.startswith(reply.text)
        assert (reply.finish_reason == "stop") == (reply.n_completion_tokens < 12)
        assert reply.seconds > 0


def test_a_prompt_longer_than_the_context_is_a_failed_reply_and_the_rest_go_on(tiny_model: Path) -> None:
    long = ChatRequest(id="long", messages=(Message("user", "x" * 50_000),))
    replies = answers(local(tiny_model), [long, *requests(2)], GREEDY)
    tokens = replies["long"].n_prompt_tokens
    assert tokens > 1024
    assert replies["long"].failure == f"prompt of {tokens} tokens exceeds the context of 1024"
    assert not replies["long"].text
    assert not replies["r0"].failure


def test_a_reply_ends_where_the_context_does(tiny_model: Path) -> None:
    from critrm import models
    from critrm.encoding import encode_chat

    tokenizer = models.load_tokenizer(str(tiny_model))
    bare = len(encode_chat(tokenizer, [Message("user", "\0")]))
    near = ChatRequest(id="near", messages=(Message("user", "\0" * (1024 - bare + 1 - 5)),))
    reply = answers(local(tiny_model), [near], GREEDY)["near"]
    assert (reply.n_prompt_tokens, reply.n_completion_tokens, reply.finish_reason) == (1019, 5, "length")


def test_a_reply_without_text_is_a_failure(tiny_model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_model, folder)
    path = folder / "generation_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"eos_token_id": list(range(400))}))
    reply = answers(local(folder), requests(1), GREEDY)["r0"]
    assert (reply.text, reply.failure, reply.finish_reason) == ("", "the model wrote nothing", "stop")


def test_requests_are_drawn_window_by_window(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("critrm.local_llm.WINDOW", 3)
    drawn: list[str] = []

    def lazily():
        for request in requests():
            drawn.append(request.id)
            yield request

    async def first_only() -> Reply:
        stream = local(tiny_model).stream(lazily(), GREEDY)
        reply = await anext(stream)
        await stream.aclose()
        return reply

    asyncio.run(first_only())
    assert len(drawn) == 3


def test_the_event_loop_stays_free(tiny_model: Path) -> None:
    async def both() -> tuple[int, int]:
        ticks, at_reply = 0, 0

        async def tick() -> None:
            nonlocal ticks
            while True:
                ticks += 1
                await asyncio.sleep(0.001)

        ticker = asyncio.create_task(tick())
        async for _ in local(tiny_model).stream(requests(), Sampling(max_tokens=64)):
            at_reply = at_reply or ticks
        ticker.cancel()
        return ticks, at_reply

    ticks, at_reply = asyncio.run(both())
    assert at_reply > 3
    assert ticks >= at_reply


def test_a_model_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"no config\.json"):
        answers(local(tmp_path), requests(1), GREEDY)
    with pytest.raises(ConfigError, match="fp64"):
        answers(LocalChat(str(tmp_path), device="cpu", dtype="fp64"), requests(1), GREEDY)


def test_nothing_asked_loads_nothing() -> None:
    assert answers(LocalChat("embedded:nothing"), [], GREEDY) == {}


def test_alternatives_come_with_the_models_own_probabilities_whatever_the_sampling(tiny_model: Path) -> None:
    import torch

    from critrm import models
    from critrm.encoding import encode_chat

    tokenizer, model = models.load_tokenizer(str(tiny_model)), models.load_causal_lm(str(tiny_model))
    drawn = answers(local(tiny_model), requests(3), replace(DRAWN, temperature=2.0))
    found = answers(local(tiny_model), requests(3), replace(DRAWN, temperature=2.0, top_logprobs=5))
    assert texts(found) == texts(drawn), "asking for them changes no reply"
    for request in requests(3):
        reply = found[request.id]
        assert not drawn[request.id].choices
        assert len(reply.choices) == reply.n_completion_tokens
        assert "".join(choice.text for choice in reply.choices).strip() == reply.text
        ids = torch.tensor([encode_chat(tokenizer, request.messages)])
        with torch.inference_mode():
            best = model(ids).logits[0, -1].log_softmax(-1).topk(5)
        first = reply.choices[0].likeliest
        assert [name for name, _ in first] == [tokenizer.decode(i, skip_special_tokens=True) for i in best.indices]
        assert [logprob for _, logprob in first] == pytest.approx(best.values.tolist(), abs=1e-3)


def test_a_digit_has_what_would_follow_a_one_in_its_place(tiny_model: Path) -> None:
    sampling = Sampling(temperature=5.0, max_tokens=40, top_logprobs=400)
    choices = [
        choice for reply in answers(local(tiny_model), requests(4), sampling).values() for choice in reply.choices
    ]
    digits = [choice for choice in choices if choice.text.strip().isdecimal()]
    assert digits and len(digits) < len(choices)
    assert [choice for choice in choices if choice.after_one] == digits
    for choice in digits:
        assert sum(math.exp(logprob) for _, logprob in choice.after_one) == pytest.approx(1.0, abs=1e-3)


@pytest.mark.slow
def test_the_embedded_model_answers(smollm2: Path) -> None:
    asked = [ChatRequest(id="a", messages=(Message("user", "What is the capital of France?"),))]
    reply = answers(LocalChat(str(smollm2)), asked, Sampling(max_tokens=32))["a"]
    assert "Paris" in reply.text
    assert reply.finish_reason == "stop"
