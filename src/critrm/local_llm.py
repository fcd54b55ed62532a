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
            yield [_reply(row, writer.tokenizer) for row in finished]


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


def _reply(row: Row, tokenizer: PreTrainedTokenizerBase) -> Reply:
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
