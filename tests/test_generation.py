"""Replies written many at a time are those written alone, whatever their prompts have in common."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from critrm import generation, models
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


class TestSeveralThreads:
    """On a CPU with several cores, rows are written by several threads."""

    @pytest.fixture(autouse=True)
    def three_threads(self, monkeypatch):
        monkeypatch.setattr(generation, "MIN_ROWS", 2)
        before = torch.get_num_threads()
        torch.set_num_threads(3)
        yield
        torch.set_num_threads(before)

    @settings(max_examples=15, deadline=None)
    @given(
        st.lists(st.lists(st.integers(20, 23), min_size=1, max_size=40), min_size=6, max_size=14),
        st.integers(1, 12),
    )
    def test_the_replies_are_those_of_one(self, writer, prompts, batch_size):
        assert written(writer, prompts, batch_size=batch_size) == [plainly(writer, prompt) for prompt in prompts]

    def test_each_thread_has_its_share_of_cores_and_rows_and_others_keep_theirs(self, writer, monkeypatch):
        seen = {}
        forward = writer.model.forward

        def watched(*args, **kwargs):
            seen.setdefault(threading.current_thread(), set()).add(torch.get_num_threads())
            return forward(*args, **kwargs)

        monkeypatch.setattr(writer.model, "forward", watched)
        written(writer, [[20 + i, 30, 31] for i in range(9)], batch_size=9)
        assert len(seen) == 3
        assert set.union(*seen.values()) == {1}
        assert torch.get_num_threads() == 3
        with ThreadPoolExecutor(1) as pool:
            assert pool.submit(torch.get_num_threads).result() == 3

    def test_what_fails_in_one_of_them_is_raised_and_ends_the_others(self, writer, monkeypatch):
        forward = writer.model.forward

        def failing(*args, **kwargs):
            if 99 in kwargs["input_ids"]:
                raise RuntimeError("no more memory")
            return forward(*args, **kwargs)

        monkeypatch.setattr(writer.model, "forward", failing)
        with pytest.raises(RuntimeError, match="no more memory"):
            written(writer, [*([20 + i, 30] for i in range(8)), [99, 30]], batch_size=3)
        assert not any(thread.name.startswith("critrm-core") for thread in threading.enumerate())

    def test_who_listens_no_longer_ends_them(self, writer):
        rows = [Row(str(i), [20 + i, 30], GREEDY.max_tokens, GREEDY.seed) for i in range(40)]
        stream = generate(writer, rows, sampling=GREEDY, batch_size=3)
        assert next(stream)
        stream.close()
        assert not any(thread.name.startswith("critrm-core") for thread in threading.enumerate())
        assert any(not row.finish_reason for row in rows)
