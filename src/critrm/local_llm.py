"""Chat over a model in this process: the embedded default, or any causal language model of the hub or a folder."""

import asyncio
import itertools
from collections.abc import AsyncIterator, Iterable, Iterator
from typing import Any, cast

from transformers import PreTrainedTokenizerBase

from critrm import models
from critrm.attention import PACKED_ATTENTION
from critrm.encoding import encode_chat
from critrm.errors import ConfigError, ModelError
from critrm.generation import Row, Writer, generate
from critrm.llm import ChatRequest, Reply, Sampling
from critrm.types import TokenChoice

WINDOW = 4096
"""How many requests are drawn and sorted at a time: the two completions of a pair do not come one after the other."""
NEXT_TURN = "\n\nUser:"
"""Where a model without a chat format begins to write the user's part; its reply ends there."""


class LocalChat:
    """A `Chat` that generates with a model in this process."""

    def __init__(self, model: str, *, batch_size: int = 128, device: str | None = None, dtype: str = "auto") -> None:
        """Name the model; its weights are loaded by the first request, so a run that is all cached loads nothing.

        Args:
            model: `embedded:NAME`, a hub id or a folder.
            batch_size: how many replies are written at once.
            device: `cpu`, `cuda`, ...; the best there is when None.
            dtype: `fp32`, `bf16`, or `auto` (bf16 where the hardware computes in it).
        """
        self.model, self.batch_size = model, batch_size
        self._device, self._dtype = device, dtype
        self._writer: Writer | None = None

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
        if self._writer is None:
            self._writer = _load(self.model, self._device, self._dtype)
        writer = self._writer
        rows, too_long = [], []
        for request in window:
            ids = encode_chat(writer.tokenizer, request.messages)
            if len(ids) < writer.context:
                rows.append(Row(request.id, ids, min(sampling.max_tokens, writer.context - len(ids)), sampling.seed))
            else:
                failure = f"prompt of {len(ids)} tokens exceeds the context of {writer.context}"
                too_long.append(Reply(id=request.id, n_prompt_tokens=len(ids), failure=failure))
        if too_long:
            yield too_long
        for finished in generate(writer, rows, sampling=sampling, batch_size=self.batch_size):
            choices = _choices(writer, finished, sampling) if sampling.top_logprobs else {}
            yield [_reply(row, writer.tokenizer, choices.get(row.id, ())) for row in finished]


def _load(name: str, device: str | None, dtype: str) -> Writer:
    device = device or models.choose_device()
    precision = models.choose_precision(device) if dtype == "auto" else dtype
    if precision not in ("fp32", "bf16"):
        raise ConfigError(f"dtype {dtype!r} is none of auto, fp32, bf16")
    model: Any = models.load_causal_lm(name, dtype=cast(models.Precision, precision))
    if not model._supports_attention_backend:
        raise ModelError(f"{name}: its attention cannot be replaced. Serve it (vLLM, say) and name its --base-url.")
    model.set_attn_implementation(PACKED_ATTENTION)
    model.to(device)
    tokenizer = models.load_tokenizer(name)
    named = model.generation_config.eos_token_id
    stop_ids = {tokenizer.eos_token_id, *(named if isinstance(named, list) else [named])} - {None}
    config = model.config.get_text_config().to_dict()
    # Packed attention knows no sliding window, which makes no difference to texts that fit into it.
    context = min(config["max_position_embeddings"], config.get("sliding_window") or config["max_position_embeddings"])
    return Writer(model, tokenizer, context, frozenset(stop_ids))


def _choices(writer: Writer, rows: list[Row], sampling: Sampling) -> dict[str, tuple[TokenChoice, ...]]:
    """The tokens of each reply with their alternatives, and of each digit what would follow a 1 in its place."""
    tokenizer = writer.tokenizer
    asked: list[Row] = []
    places: list[tuple[str, int]] = []
    for row in rows:
        for index, token in enumerate(row.tokens):
            alternatives = [each for each, _ in row.likeliest[index]]
            one = next((each for each in alternatives if _decode(tokenizer, [each]).strip() == "1"), None)
            prompt = [*row.prompt, *row.tokens[:index], *([] if one is None else [one])]
            if one is not None and _decode(tokenizer, [token]).strip().isdecimal() and len(prompt) < writer.context:
                asked.append(Row(str(len(places)), prompt, 1, 0))
                places.append((row.id, index))
    read = [row for done in generate(writer, asked, sampling=sampling, batch_size=len(asked)) for row in done]
    after_one = {places[int(row.id)]: _named(tokenizer, row.likeliest[0]) for row in read}
    return {
        row.id: tuple(
            TokenChoice(piece, _named(tokenizer, likeliest), after_one.get((row.id, index), ()))
            for index, (piece, likeliest) in enumerate(zip(_pieces(tokenizer, row.tokens), row.likeliest, strict=False))
        )
        for row in rows
    }


def _pieces(tokenizer: PreTrainedTokenizerBase, tokens: list[int]) -> list[str]:
    """The text that each token adds to those before it; one in the middle of a character adds none."""
    texts = [""]
    for end in range(1, len(tokens) + 1):
        text = _decode(tokenizer, tokens[:end])
        texts.append(texts[-1] if text.endswith("\ufffd") and end < len(tokens) else text)
    return [text[len(before) :] for before, text in itertools.pairwise(texts)]


def _named(tokenizer: PreTrainedTokenizerBase, likeliest: list[tuple[int, float]]) -> tuple[tuple[str, float], ...]:
    return tuple((_decode(tokenizer, [token]), logprob) for token, logprob in likeliest)


def _decode(tokenizer: PreTrainedTokenizerBase, tokens: list[int]) -> str:
    return str(tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False))


def _reply(row: Row, tokenizer: PreTrainedTokenizerBase, choices: tuple[TokenChoice, ...]) -> Reply:
    text = _decode(tokenizer, row.tokens)
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
        choices=choices,
        failure="" if text.strip() else "the model wrote nothing",
    )
