"""Replies written many at a time are those written alone, whatever their prompts have in common."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from critrm import models
from critrm.attention import PACKED_ATTENTION
from critrm.generation import Row, Writer, generate
from critrm.llm import Sampling

GREEDY = Sampling(max_tokens=6)


@pytest.fixture(scope="module")
def writer(tiny_model) -> Writer:
    model = models.load_causal_lm(str(tiny_model))
    model.set_attn_implementation(PACKED_ATTENTION)
    return Writer(model, models.load_tokenizer(str(tiny_model)), 256, frozenset({2, 7, 11}))


def written(writer: Writer, prompts: list[list[int]], *, batch_size: int) -> list[list[int]]:
    rows = [Row(str(i), prompt, GREEDY.max_tokens, GREEDY.seed) for i, prompt in enumerate(prompts)]
    done = [row for pack in generate(writer, rows, sampling=GREEDY, batch_size=batch_size) for row in pack]
    assert sorted(int(row.id) for row in done) == list(range(len(prompts)))
    return [row.tokens for row in sorted(done, key=lambda row: int(row.id))]


def plainly(writer: Writer, prompt: list[int]) -> list[int]:
    """Greedy decoding without a cache, as the definition has it."""
    ids, reply = list(prompt), []
    for _ in range(GREEDY.max_tokens):
        logits = writer.model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1]
        ids.append(int(logits.argmax()))
        if ids[-1] in writer.stop_ids:
            break
        reply.append(ids[-1])
    return reply


def test_prompts_that_begin_alike_get_the_replies_they_get_alone(writer):
    head = list(range(20, 60))
    prompts = [
        head + [3, 4, 5],
        head + [3, 4, 5],  # twice the same
        head,  # the beginning of the others
        head + list(range(100, 130)),
        list(range(200, 260)) + [9],
        list(range(200, 260)) + [8, 8],
        [77],
        [77, 78],
    ]
    alone = [plainly(writer, prompt) for prompt in prompts]
    assert len({tuple(reply) for reply in alone}) > 4
    for batch_size in (1, 3, 64):
        assert written(writer, prompts, batch_size=batch_size) == alone


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.lists(st.integers(20, 23), min_size=1, max_size=40), min_size=1, max_size=10),
    st.integers(1, 12),
)
def test_any_prompts_in_any_batch(writer, prompts, batch_size):
    assert written(writer, prompts, batch_size=batch_size) == [plainly(writer, prompt) for prompt in prompts]


def test_the_common_beginning_is_read_once(writer, monkeypatch):
    read = []
    forward = writer.model.forward

    def counted(*args, **kwargs):
        read.append(kwargs["input_ids"].numel())
        return forward(*args, **kwargs)

    monkeypatch.setattr(writer.model, "forward", counted)
    head = list(range(20, 100))
    others = [list(range(200, 290))]
    written(writer, [head + [3] * 10, head + [4] * 10, *others], batch_size=8)
    assert read[0] == 80 + 10 + 10 + 90
