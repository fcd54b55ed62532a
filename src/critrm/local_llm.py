"""Chat over a model in this process: the embedded default, or any causal language model of the hub or a folder.

Made for CPUs, where reading the prompt costs as much as writing the reply: every prompt is read alone, so no work goes
into padding, and rows that are done give their place in the batch to waiting ones.
"""

import asyncio
import hashlib
import itertools
import random
import time
from collections import deque
from collections.abc import AsyncIterator, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, cast

import torch
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from critrm import models
from critrm.errors import ConfigError
from critrm.llm import ChatRequest, Reply, Sampling

_KeyValue = tuple[torch.Tensor, torch.Tensor]

WINDOW = 512
"""How many requests are drawn and sorted by length at a time."""
MAX_CACHED_TOKENS = 65_536
"""Bound on rows x width of the key-value cache: 1.5 GB for SmolLM2-135M in bf16."""
REFILL_BELOW = 0.75
"""The batch is packed anew when fewer of its rows than this are still being written."""
NEXT_TURN = "\n\nUser:"
"""Where a model without a chat format begins to write the user's part; its reply ends there."""


class LocalChat:
    """A `Chat` that generates with a model in this process."""

    def __init__(self, model: str, *, batch_size: int = 32, device: str | None = None, dtype: str = "auto") -> None:
        """Name the model; its weights are loaded by the first request, so a run that is all cached loads nothing.

        Args:
            model: `embedded:NAME`, a hub id or a folder.
            batch_size: how many replies are written at once.
            device: `cpu`, `cuda`, ...; the best there is when None.
            dtype: `fp32`, `bf16`, or `auto` (bf16 where the hardware computes in it).
        """
        self.model, self.batch_size = model, batch_size
        self._device, self._dtype = device, dtype
        self._loaded: _Loaded | None = None

    async def stream(self, requests: Iterable[ChatRequest], sampling: Sampling) -> AsyncIterator[Reply]:
        """Yield one reply per request, longest prompts of each window first.

        A prompt that leaves no room in the context is a failed reply.

        Raises:
            ModelError: the model cannot be loaded, or its chat template refuses a conversation.
        """
        pending = iter(requests)
        while window := list(itertools.islice(pending, WINDOW)):
            # Generation runs in a thread, one pack of replies at a time: the event loop stays free, Ctrl-C is heard.
            packs = self._answer(window, sampling)
            while (replies := await asyncio.to_thread(next, packs, None)) is not None:
                for reply in replies:
                    yield reply

    def _answer(self, window: list[ChatRequest], sampling: Sampling) -> Iterator[list[Reply]]:
        if self._loaded is None:
            self._loaded = _load(self.model, self._device, self._dtype)
        loaded = self._loaded
        rows, too_long = [], []
        for request in window:
            ids = models.encode_chat(loaded.tokenizer, request.messages)
            if len(ids) < loaded.context:
                rows.append(_Row(request.id, ids, min(sampling.max_tokens, loaded.context - len(ids)), sampling.seed))
            else:
                failure = f"prompt of {len(ids)} tokens exceeds the context of {loaded.context}"
                too_long.append(Reply(id=request.id, n_prompt_tokens=len(ids), failure=failure))
        if too_long:
            yield too_long
        for finished in _generate(loaded, rows, sampling=sampling, batch_size=self.batch_size):
            yield [_reply(row, loaded.tokenizer) for row in finished]


@dataclass(frozen=True, slots=True)
class _Loaded:
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    context: int
    """How many tokens prompt and reply may have together."""
    stop_ids: frozenset[int]


def _load(name: str, device: str | None, dtype: str) -> _Loaded:
    device = device or models.choose_device()
    precision = models.choose_precision(device) if dtype == "auto" else dtype
    if precision not in ("fp32", "bf16"):
        raise ConfigError(f"dtype {dtype!r} is none of auto, fp32, bf16")
    model: Any = models.load_causal_lm(name, dtype=cast(models.Precision, precision))
    model.to(device)
    tokenizer = models.load_tokenizer(name)
    named = model.generation_config.eos_token_id
    stop_ids = {tokenizer.eos_token_id, *(named if isinstance(named, list) else [named])} - {None}
    context = model.config.get_text_config().max_position_embeddings
    return _Loaded(model, tokenizer, context, frozenset(stop_ids))


class _Row:
    """One reply being written."""

    def __init__(self, id: str, prompt: list[int], max_tokens: int, seed: int) -> None:
        self.id, self.prompt, self.max_tokens = id, prompt, max_tokens
        self.tokens: list[int] = []
        self.finish_reason = ""
        self.started, self.seconds = time.monotonic(), 0.0
        # Drawn per row from what is asked, so that a reply does not depend on its neighbours in the batch.
        self.random = random.Random(hashlib.sha256(repr((seed, prompt)).encode()).digest())
        self.cache: list[_KeyValue] = []
        """Per layer (n_heads, n_seen, head_dim) keys and values, while the row is not packed."""

    @property
    def n_seen(self) -> int:
        """How many tokens are in the cache: all but the last one drawn."""
        return len(self.prompt) + len(self.tokens) - 1

    def add(self, token: int, stop_ids: frozenset[int]) -> None:
        """Take the next token; afterwards `finish_reason` says whether it was the last."""
        if token in stop_ids:
            self.finish_reason = "stop"
        else:
            self.tokens.append(token)
            self.finish_reason = "length" if len(self.tokens) >= self.max_tokens else ""
        self.seconds = time.monotonic() - self.started


def _generate(loaded: _Loaded, rows: list[_Row], *, sampling: Sampling, batch_size: int) -> Iterator[list[_Row]]:
    """Write the replies of all rows, and yield rows as they are done.

    Longest first: a row that joins a batch never makes it wider than those before it did.
    """
    waiting = deque(sorted(rows, key=lambda row: -len(row.prompt)))
    live: list[_Row] = []
    while waiting or live:
        width = max(row.n_seen + row.max_tokens for row in (*live, *itertools.islice(waiting, 1)))
        n_places = max(1, min(batch_size, MAX_CACHED_TOKENS // width))
        while waiting and len(live) < n_places:
            live.append(waiting.popleft())
            _read_prompt(loaded, live[-1], sampling)
        _write(loaded, [row for row in live if not row.finish_reason], sampling)
        yield [row for row in live if row.finish_reason]
        live = [row for row in live if not row.finish_reason]


@torch.inference_mode()
def _read_prompt(loaded: _Loaded, row: _Row, sampling: Sampling) -> None:
    """Fill a row's cache and draw its first token."""
    row.started = time.monotonic()
    ids = torch.tensor([row.prompt], device=loaded.model.device)
    cache = DynamicCache()
    logits = loaded.model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits[:, -1]
    row.cache = [(keys[0], values[0]) for keys, values, _ in cache]
    row.add(_draw(logits, [row], sampling)[0], loaded.stop_ids)


@torch.inference_mode()
def _write(loaded: _Loaded, rows: list[_Row], sampling: Sampling) -> None:
    """Go on with all rows, token by token, until so many are done that a new pack is better."""
    n_enough = REFILL_BELOW * len(rows)
    if not rows:
        return
    cache, mask = _pack(rows)
    n_live = len(rows)
    while n_live and n_live >= n_enough:
        ids = torch.tensor([[row.tokens[-1]] for row in rows], device=mask.device)
        positions = torch.tensor([[row.n_seen] for row in rows], device=mask.device)
        mask = torch.cat([mask, mask.new_ones(len(rows), 1)], dim=1)
        logits = loaded.model(
            input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True
        ).logits[:, -1]
        for row, token in zip(rows, _draw(logits, rows, sampling), strict=True):
            # A finished row goes through the model until the next pack; what it says then is dropped.
            if not row.finish_reason:
                row.add(token, loaded.stop_ids)
        n_live = sum(not row.finish_reason for row in rows)
    for i, row in enumerate(rows):
        row.cache = [] if row.finish_reason else [(k[i, :, -row.n_seen :], v[i, :, -row.n_seen :]) for k, v, _ in cache]


def _pack(rows: list[_Row]) -> tuple[DynamicCache, torch.Tensor]:
    """One cache of all rows, padded on the left, and its mask of shape (n_rows, width)."""
    width = max(row.n_seen for row in rows)
    packed = []
    for layer in zip(*(row.cache for row in rows), strict=True):
        packed.append(tuple(_pad_left([pair[side] for pair in layer], width) for side in (0, 1)))
    device = packed[0][0].device
    mask = torch.tensor([[0] * (width - row.n_seen) + [1] * row.n_seen for row in rows], device=device)
    for row in rows:
        row.cache = []
    return DynamicCache(packed), mask


def _pad_left(tensors: list[torch.Tensor], width: int) -> torch.Tensor:
    n_heads, _, dim = tensors[0].shape
    out = tensors[0].new_zeros(len(tensors), n_heads, width, dim)
    for row, tensor in zip(out, tensors, strict=True):
        row[:, width - tensor.shape[1] :] = tensor
    return out


def _draw(logits: torch.Tensor, rows: list[_Row], sampling: Sampling) -> list[int]:
    """The next token of each row from (n_rows, n_vocabulary) logits.

    Above temperature 0: by inverting the cumulative distribution, so that each row needs one random number.
    """
    if sampling.temperature <= 0:
        return [int(token) for token in logits.argmax(-1)]
    probabilities = (logits.float() / sampling.temperature).softmax(-1)
    order = None
    if sampling.top_p < 1:
        # Sorting the whole vocabulary takes as long as the model does; nearly always the nucleus is far smaller.
        largest, order = probabilities.topk(min(1024, probabilities.shape[-1]))
        if bool((largest.sum(-1) < sampling.top_p).any()):
            largest, order = probabilities.sort(descending=True)
        before = largest.cumsum(-1) - largest
        probabilities = largest * (before < sampling.top_p)
    cumulated = probabilities.cumsum(-1)
    points = torch.tensor([[row.random.random()] for row in rows], device=logits.device) * cumulated[:, -1:]
    found = torch.searchsorted(cumulated, points)
    chosen = found if order is None else order.gather(-1, found)
    return [int(token) for token in chosen[:, 0]]


def _reply(row: _Row, tokenizer: PreTrainedTokenizerBase) -> Reply:
    text = str(tokenizer.decode(row.tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False))
    reason = row.finish_reason
    if not tokenizer.chat_template and NEXT_TURN in text:
        text, reason = text.partition(NEXT_TURN)[0], "stop"
    return Reply(
        id=row.id,
        text=text.strip(),
        n_prompt_tokens=len(row.prompt),
        n_completion_tokens=len(row.tokens),
        finish_reason=reason,
        seconds=row.seconds,
        failure="" if text.strip() else "the model wrote nothing",
    )
