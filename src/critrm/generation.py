"""Writes replies with a language model: many at once, reading what prompts have in common once.

Made for CPUs, where reading the prompt costs as much as writing the reply: prompts are read without padding, what
several of them begin with (the two completions of a pair have one conversation) is read once, rows that are done
give their place in the batch to waiting ones, and each core writes rows of its own.
"""

import hashlib
import itertools
import queue
import random
import threading
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from transformers import Cache, DynamicCache, PreTrainedModel, PreTrainedTokenizerBase
from transformers.cache_utils import DynamicLayer

from critrm.cores import n_side_by_side, sharing_cores
from critrm.llm import Sampling
from critrm.row_layout import Group

_KeyValue = tuple[torch.Tensor, torch.Tensor]

READ_TOKENS = 2048
"""About how many prompt tokens are read at a time."""
MIN_SHARED = 16
"""So many more tokens in common than all prompts have make it worth reading them once."""
MAX_CACHED_TOKENS = 65_536
"""Bound on rows x width of the key-value caches: 1.5 GB for SmolLM2-135M in bf16."""
MIN_ROWS = 16
"""A thread is worth starting for so many rows."""
REFILL_BELOW = 0.75
"""The batch is packed anew when fewer of its rows than this are still being written."""


@dataclass(frozen=True, slots=True)
class Writer:
    """A language model, and what has to be known to write with it."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    context: int
    """How many tokens prompt and reply may have together."""
    stop_ids: frozenset[int]


class Row:
    """One reply being written."""

    def __init__(self, id: str, prompt: list[int], max_tokens: int, seed: int) -> None:
        """Args: the request's id, the prompt's tokens, how long the reply may be, and the seed of its sampling."""
        self.id, self.prompt, self.max_tokens = id, prompt, max_tokens
        self.family = 0
        """Rows of one family have prompts that begin alike."""
        self.tokens: list[int] = []
        self.likeliest: list[list[tuple[int, float]]] = []
        """Of each token drawn, if asked for: the likeliest tokens and their log-probabilities."""
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


def generate(writer: Writer, rows: list[Row], *, sampling: Sampling, batch_size: int) -> Iterator[list[Row]]:
    """Write the replies of all rows, `batch_size` at a time, and yield rows as they are done.

    On a CPU several threads write, each with some of the rows. Which rows are written together depends on nothing but
    the rows and the number of threads.
    """
    n = max(1, min(n_side_by_side(writer.model.device), len(rows) // MIN_ROWS))
    shares = _deal(_order(rows), n)
    if len(shares) == 1:
        yield from _generate(writer, shares[0], sampling, batch_size, MAX_CACHED_TOKENS)
    else:
        size, n_tokens = -(-batch_size // n), MAX_CACHED_TOKENS // n
        yield from _side_by_side([_generate(writer, share, sampling, size, n_tokens) for share in shares])


def _generate(
    writer: Writer, rows: list[Row], sampling: Sampling, batch_size: int, max_cached_tokens: int
) -> Iterator[list[Row]]:
    waiting = deque(rows)
    live: list[Row] = []
    while waiting or live:
        width = max(row.n_seen + row.max_tokens for row in (*live, *itertools.islice(waiting, 1)))
        n_places = max(1, min(batch_size, max_cached_tokens // width))
        joining = [waiting.popleft() for _ in range(min(len(waiting), max(0, n_places - len(live))))]
        for families in _portions(joining):
            _read_prompts(writer, families, sampling)
        live += joining
        _write(writer, [row for row in live if not row.finish_reason], sampling)
        yield [row for row in live if row.finish_reason]
        live = [row for row in live if not row.finish_reason]


def _deal(rows: list[Row], n: int) -> list[list[Row]]:
    """Rows in `_order` in up to n parts of about as many tokens; a family larger than a part is cut."""
    parts: list[list[Row]] = [[] for _ in range(n)]
    n_tokens, largest = [0] * n, -(-len(rows) // n)
    for _, group in itertools.groupby(rows, key=lambda row: row.family):
        family = list(group)
        for start in range(0, len(family), largest):
            chunk, least = family[start : start + largest], n_tokens.index(min(n_tokens))
            parts[least] += chunk
            n_tokens[least] += sum(len(row.prompt) + row.max_tokens for row in chunk)
    return [part for part in parts if part] or [[]]


def _side_by_side(streams: list[Iterator[list[Row]]]) -> Iterator[list[Row]]:
    """What all streams yield, each of them computed in a thread of its own with its share of the cores."""
    found: queue.SimpleQueue[list[Row] | Exception | None] = queue.SimpleQueue()
    stop = threading.Event()

    def run(stream: Iterator[list[Row]]) -> None:
        try:
            for rows in stream:
                found.put(rows)
                if stop.is_set():
                    break
        except Exception as error:
            found.put(error)
        found.put(None)

    with sharing_cores(len(streams)) as pool:
        for stream in streams:
            pool.submit(run, stream)
        try:
            n_running = len(streams)
            while n_running:
                rows = found.get()
                if isinstance(rows, Exception):
                    raise rows
                if rows is None:
                    n_running -= 1
                else:
                    yield rows
        finally:
            stop.set()


def _order(rows: list[Row]) -> list[Row]:
    """Families of rows whose prompts begin alike, side by side; the family with the longest prompt first.

    A row that joins a batch thus hardly ever makes it wider than those before it did.
    """
    families: list[list[Row]] = []
    n_family = 0
    rows = sorted(rows, key=lambda row: row.prompt)
    # What all have in common (the chat template's head) makes no family.
    n_head = _n_common(rows[0].prompt, rows[-1].prompt) if rows else 0
    for row in rows:
        n_common = _n_common(families[-1][-1].prompt, row.prompt) if families else 0
        if families and n_common >= max(n_family, min(n_head + MIN_SHARED, len(row.prompt) // 2)):
            families[-1].append(row)
            n_family = n_common
        else:
            families.append([row])
            n_family = 0
    families.sort(key=lambda family: -max(len(row.prompt) for row in family))
    for number, family in enumerate(families):
        for row in family:
            row.family = number
    return [row for family in families for row in family]


def _n_common(first: list[int], second: list[int]) -> int:
    """How many tokens two prompts have in common from the beginning."""
    n = min(len(first), len(second))
    return next((i for i in range(n) if first[i] != second[i]), n)


def _portions(rows: list[Row]) -> Iterator[list[list[Row]]]:
    """The families of some rows, in portions of about READ_TOKENS tokens."""
    portion: list[list[Row]] = []
    n_tokens = 0
    for _, family in itertools.groupby(rows, key=lambda row: row.family):
        portion.append(list(family))
        n_tokens += sum(len(row.prompt) for row in portion[-1])
        if n_tokens >= READ_TOKENS:
            yield portion
            portion, n_tokens = [], 0
    if portion:
        yield portion


@torch.inference_mode()
def _read_prompts(writer: Writer, families: list[list[Row]], sampling: Sampling) -> None:
    """Fill the rows' caches and draw their first tokens; what prompts have in common is read once."""
    ids, positions, group, places = _lay_out(families)
    device = writer.model.device
    cache = DynamicCache()
    logits = writer.model(
        input_ids=torch.tensor([ids], device=device),
        position_ids=torch.tensor([positions], device=device),
        # A mask of four dimensions is passed on as it is, so none is built: the groups say who sees whom.
        attention_mask=torch.empty(1, 1, 1, 1, device=device),
        groups=(group,),
        past_key_values=cache,
        use_cache=True,
        logits_to_keep=torch.tensor([parts[-1].stop - 1 for _, parts in places], device=device),
    ).logits[0]
    layers = [(keys[0], values[0]) for keys, values, _ in cache]
    rows = [row for row, _ in places]
    for (row, parts), token in zip(places, _draw(logits, rows, sampling), strict=True):
        row.cache = [
            (torch.cat([k[:, part] for part in parts], dim=1), torch.cat([v[:, part] for part in parts], dim=1))
            for k, v in layers
        ]
        row.add(token, writer.stop_ids)


_Places = list[tuple[Row, tuple[slice, ...]]]
"""Each row, and where the parts of its prompt lie in a packed row."""


def _lay_out(families: list[list[Row]]) -> tuple[list[int], list[int], Group, _Places]:
    """Token ids, positions and the group of a packed row: the head of all prompts, then families, then their rows."""
    prompts = [row.prompt for family in families for row in family]
    # At least its last token is each row's own, since what follows it is what is drawn; and one each family's.
    n_shared = [
        min(_n_common(min(each), max(each)), *(len(prompt) - 1 for prompt in each))
        for each in ([row.prompt for row in family] for family in families)
    ]
    n_head = max(0, min(_n_common(min(prompts), max(prompts)), *(n - 1 for n in n_shared)))
    ids, positions = prompts[0][:n_head], list(range(n_head))
    places: _Places = []
    for n_family, family in zip(n_shared, families, strict=True):
        start = len(ids)
        ids += family[0].prompt[n_head:n_family]
        positions += range(n_head, n_family)
        for row in family:
            row.started = time.monotonic()
            parts = slice(0, n_head), slice(start, start + n_family - n_head)
            places.append((row, (*parts, slice(len(ids), len(ids) + len(row.prompt) - n_family))))
            ids += row.prompt[n_family:]
            positions += range(n_family, len(row.prompt))
    branches = tuple(n - n_head for n in n_shared)
    twigs = tuple(tuple(len(row.prompt) - n for row in family) for n, family in zip(n_shared, families, strict=True))
    return ids, positions, Group(0, n_head, branches, twigs), places


@torch.inference_mode()
def _write(writer: Writer, rows: list[Row], sampling: Sampling) -> None:
    """Go on with all rows, token by token, until so many are done that a new pack is better."""
    n_enough = REFILL_BELOW * len(rows)
    if not rows:
        return
    layers, mask = _pack(rows)
    cache = Cache(layers=list(layers))
    column = max(row.n_seen for row in rows)
    n_live = len(rows)
    while n_live and n_live >= n_enough:
        mask[..., column] = 0
        column += 1
        logits = writer.model(
            input_ids=torch.tensor([[row.tokens[-1]] for row in rows], device=mask.device),
            attention_mask=mask,
            position_ids=torch.tensor([[row.n_seen] for row in rows], device=mask.device),
            past_key_values=cache,
            use_cache=True,
        ).logits[:, -1]
        for row, token in zip(rows, _draw(logits, rows, sampling), strict=True):
            # A finished row goes through the model until the next pack; what it says then is dropped.
            if not row.finish_reason:
                row.add(token, writer.stop_ids)
        n_live = sum(not row.finish_reason for row in rows)
    for i, row in enumerate(rows):
        seen = slice(column - row.n_seen, column)
        row.cache = (
            []
            if row.finish_reason
            else [(layer.all_keys[i, :, seen], layer.all_values[i, :, seen]) for layer in layers]
        )


class _RoomyLayer(DynamicLayer):  # type: ignore[no-untyped-call]
    """Keys and values of one layer with room for the tokens to come.

    Growing them by concatenation copies all of them for every token, which takes longer than attending to them.
    Attention reads the whole width; the mask hides what is not written yet.
    """

    def __init__(self, keys: torch.Tensor, values: torch.Tensor, n_seen: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.all_keys, self.all_values, self.n_seen = keys, values, n_seen
        self.dtype, self.device, self.is_initialized = keys.dtype, keys.device, True

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *_: Any, **__: Any) -> _KeyValue:
        """Put one token's keys and values into the next free column."""
        self.all_keys[:, :, self.n_seen] = key_states[:, :, 0]
        self.all_values[:, :, self.n_seen] = value_states[:, :, 0]
        self.n_seen += 1
        return self.all_keys, self.all_values

    def get_seq_length(self) -> int:
        """How many columns are filled."""
        return self.n_seen


def _pack(rows: list[Row]) -> tuple[list[_RoomyLayer], torch.Tensor]:
    """One cache of all rows, by layer, padded on the left, and its mask of shape (n_rows, 1, 1, width).

    The mask is 0 where a row has a token, and minus infinity elsewhere.
    """
    n_seen = max(row.n_seen for row in rows)
    width = n_seen + max(row.max_tokens - len(row.tokens) for row in rows)
    layers = []
    for _ in range(len(rows[0].cache)):
        # Taken from the rows layer by layer: what is packed is not kept twice.
        layer = [row.cache.pop(0) for row in rows]
        keys, values = (_pad([pair[side] for pair in layer], n_seen, width) for side in (0, 1))
        layers.append(_RoomyLayer(keys, values, n_seen))
    mask = layers[0].all_keys.new_full((len(rows), 1, 1, width), float("-inf"))
    for i, row in enumerate(rows):
        mask[i, ..., n_seen - row.n_seen : n_seen] = 0
    return layers, mask


def _pad(tensors: list[torch.Tensor], n_seen: int, width: int) -> torch.Tensor:
    n_heads, _, dim = tensors[0].shape
    # Not left uninitialised: what the mask hides still takes part in the products, and 0 x NaN is NaN.
    out = tensors[0].new_zeros(len(tensors), n_heads, width, dim)
    for row, tensor in zip(out, tensors, strict=True):
        row[:, n_seen - tensor.shape[1] : n_seen] = tensor
    return out


def _draw(logits: torch.Tensor, rows: list[Row], sampling: Sampling) -> list[int]:
    """The next token of each row from (n_rows, n_vocabulary) logits.

    Above temperature 0: by inverting the cumulative distribution, so that each row needs one random number.
    """
    if sampling.top_logprobs:
        # Of the model itself: neither sharpened by the temperature nor cut by top_p.
        found = logits.float().log_softmax(-1).topk(min(sampling.top_logprobs, logits.shape[-1]))
        for row, values, ids in zip(rows, found.values.tolist(), found.indices.tolist(), strict=True):
            row.likeliest.append(list(zip(ids, values, strict=True)))
    if sampling.temperature <= 0:
        # `argmax` takes four times as long in 16 bits; both take the first of several.
        return list(logits.max(-1).indices.tolist())
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
    places = torch.searchsorted(cumulated, points)
    chosen = places if order is None else order.gather(-1, places)
    return [int(token) for token in chosen[:, 0]]
