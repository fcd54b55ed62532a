"""Chat with a model in this process: the embedded default, or any local folder or hub id."""

import asyncio
import hashlib
import itertools
import time
from collections.abc import AsyncIterator, Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import torch
from transformers import DynamicCache

from critrm import models
from critrm.llm import ChatRequest, Reply, Sampling

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

WINDOW = 512
"""Requests that are sorted by length at a time, so that batches are even and memory is bounded."""


@dataclass(slots=True)
class _Row:
    """One request while it is answered."""

    request: ChatRequest
    prompt: list[int]
    generator: torch.Generator
    tokens: list[int] = field(default_factory=list)
    finish_reason: str = ""


class LocalChat:
    """Answers chat requests with a causal language model; loaded when the first request comes."""

    def __init__(self, model: str, *, batch_size: int = 32, device: str | None = None, precision: Literal["auto", "fp32", "bf16"] = "auto") -> None:
        """Say which model; nothing is loaded yet.

        Args:
            model: `embedded:NAME`, a folder or a hub id.
            batch_size: requests answered at once.
            device: the best there is when None.
            precision: `fp32`, `bf16`, or `auto`: bf16 where the hardware computes in it.
        """
        self.model = model
        self.batch_size, self.device, self.precision = batch_size, device or models.choose_device(), precision
        self._loaded: tuple[PreTrainedModel, PreTrainedTokenizerBase] | None = None

    def _load(self) -> "tuple[PreTrainedModel, PreTrainedTokenizerBase]":
        if self._loaded is None:
            precision = models.choose_precision(self.device) if self.precision == "auto" else self.precision
            model = models.load_causal_lm(self.model, dtype=precision)
            model.to(self.device)  # type: ignore[arg-type]
            self._loaded = model, models.load_tokenizer(self.model)
        return self._loaded

    async def stream(self, requests: Iterable[ChatRequest], sampling: Sampling) -> AsyncIterator[Reply]:
        """Yield a reply per request, batch by batch; the longest prompts of each window come first.

        Raises:
            ModelError: the model cannot be loaded.
        """
        source = iter(requests)
        while window := list(itertools.islice(source, WINDOW)):
            model, tokenizer = await asyncio.to_thread(self._load)
            context = min(int(model.config.max_position_embeddings), int(tokenizer.model_max_length))
            rows = []
            for request in window:
                prompt = models.encode_chat(tokenizer, request.messages)
                if len(prompt) + 1 > context:
                    reason = f"the prompt of {len(prompt)} tokens exceeds the context of {context}"
                    yield Reply(id=request.id, failure=reason)
                else:
                    rows.append(_Row(request, prompt, _generator(request, sampling)))
            rows.sort(key=lambda row: -len(row.prompt))
            for start in range(0, len(rows), self.batch_size):
                batch = rows[start : start + self.batch_size]
                started = time.perf_counter()
                await asyncio.to_thread(self._generate, batch, sampling, context)
                seconds = (time.perf_counter() - started) / len(batch)
                for row in batch:
                    yield self._reply(row, tokenizer, seconds)

    def _reply(self, row: _Row, tokenizer: "PreTrainedTokenizerBase", seconds: float) -> Reply:
        text: Any = tokenizer.decode(row.tokens, skip_special_tokens=True)
        return Reply(
            id=row.request.id,
            text=text.strip(),
            n_prompt_tokens=len(row.prompt),
            n_completion_tokens=len(row.tokens),
            finish_reason=row.finish_reason,
            seconds=seconds,
            failure="" if text.strip() else "empty reply",
        )

    @torch.inference_mode()
    def _generate(self, batch: list[_Row], sampling: Sampling, context: int) -> None:
        """Fill in the rows' tokens. Rows that are finished leave the batch, so that the rest go faster."""
        model, tokenizer = self._load()
        ends = _end_tokens(model, tokenizer)
        width = max(len(row.prompt) for row in batch)
        pads = [width - len(row.prompt) for row in batch]
        ids = torch.tensor([[0] * pad + row.prompt for pad, row in zip(pads, batch, strict=True)], device=self.device)
        mask = torch.tensor([[0] * pad + [1] * (width - pad) for pad in pads], device=self.device)
        cache, alive = DynamicCache(), list(batch)
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        for _ in range(sampling.max_tokens):
            logits = model(
                input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=cache, logits_to_keep=1
            ).logits[:, -1]
            chosen = _choose(logits, alive, sampling)
            for row, token in zip(alive, chosen, strict=True):
                _append(row, token, ends, sampling, context)
            going = [index for index, row in enumerate(alive) if not row.finish_reason]
            if not going:
                return
            ids = torch.tensor([[chosen[index]] for index in going], device=self.device)
            positions = positions[going, -1:] + 1
            mask = mask[going]
            if len(going) < len(alive):
                cache.batch_select_indices(torch.tensor(going, device=self.device))
                alive = [alive[index] for index in going]
            mask = torch.cat([mask, mask.new_ones(len(going), 1)], dim=1)


def _append(row: _Row, token: int, ends: set[int], sampling: Sampling, context: int) -> None:
    if token in ends:
        row.finish_reason = "stop"
        return
    row.tokens.append(token)
    if len(row.tokens) == sampling.max_tokens or len(row.prompt) + len(row.tokens) == context:
        row.finish_reason = "length"


def _generator(request: ChatRequest, sampling: Sampling) -> torch.Generator:
    """A stream of random numbers of the request's own, so that a reply does not depend on its neighbours."""
    digest = hashlib.sha256(f"{sampling.seed} {request.id}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))


def _choose(logits: torch.Tensor, rows: list[_Row], sampling: Sampling) -> list[int]:
    """The next token of each row; greedy at temperature 0, else from the most likely ones that hold `top_p`."""
    if sampling.temperature == 0:
        found: list[int] = logits.argmax(-1).tolist()
        return found
    shares = torch.softmax(logits.float().cpu() / sampling.temperature, dim=-1)
    ordered, tokens = shares.sort(dim=-1, descending=True)
    ordered[ordered.cumsum(-1) - ordered >= sampling.top_p] = 0.0
    return [
        int(tokens[index, torch.multinomial(ordered[index], 1, generator=row.generator)])
        for index, row in enumerate(rows)
    ]


def _end_tokens(model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase") -> set[int]:
    configured = model.generation_config.eos_token_id if model.generation_config is not None else None
    listed = configured if isinstance(configured, list) else [configured]
    return {token for token in [*listed, tokenizer.eos_token_id] if token is not None}
