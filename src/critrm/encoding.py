"""Texts and conversations to token ids, so that what people and models wrote is always data, never control tokens."""

import functools
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

from jinja2 import TemplateError

from critrm.errors import ModelError
from critrm.types import Message

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def encode_text(tokenizer: "PreTrainedTokenizerBase", text: str) -> list[int]:
    """Token ids of a user's or model's text: nothing is added, and text that spells a control token stays text."""
    ids: list[int] = []
    start = 0
    pattern = _tags(tokenizer)
    # A token such as <think>, which is not marked as special, would be found in the text: it is cut in two.
    cuts = [match.start() + 1 for match in pattern.finditer(text)] if pattern else []
    for end in (*cuts, len(text)):
        if end > start:
            ids += tokenizer.encode(text[start:end], add_special_tokens=False, split_special_tokens=True)
        start = end
    return ids


def beginning(tokenizer: "PreTrainedTokenizerBase") -> list[int]:
    """The token that the tokenizer puts before every text, if it does."""
    bos = tokenizer.bos_token_id
    return [bos] if bos is not None and tokenizer.encode("a")[:1] == [bos] else []


@functools.lru_cache(maxsize=8)
def _tags(tokenizer: "PreTrainedTokenizerBase") -> re.Pattern[str] | None:
    """Finds the tokenizer's added tokens that are not marked as special; runs of spaces among them are plain text."""
    added = (token for token in tokenizer.added_tokens_decoder.values() if not token.special)
    names = sorted((token.content for token in added if len(token.content.strip()) > 1), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, names))) if names else None


def encode_chat(
    tokenizer: "PreTrainedTokenizerBase", messages: Sequence[Message], *, generation_prompt: bool = True
) -> list[int]:
    """Token ids of a conversation in the tokenizer's chat format; without one, as `User:` / `Chatbot:` text.

    Only the template's own control tokens become control tokens. A message that spells one (`<|im_end|>`) is encoded
    as the characters it consists of, and never passes through the template's engine.

    Args:
        tokenizer: the model's.
        messages: the conversation.
        generation_prompt: end with what starts the assistant's next turn.

    Raises:
        ModelError: the chat template refuses the conversation, for example because its roles do not alternate.
    """
    if not tokenizer.chat_template:
        # One piece of plain text, so that only what the tokenizer always adds (a BOS) is added.
        text = render_plain(messages, generation_prompt=generation_prompt)
        return list(tokenizer.encode(text, split_special_tokens=True))
    rows = [{"role": message.role, "content": f"(critrm:{i})"} for i, message in enumerate(messages)]
    try:
        rendered = str(tokenizer.apply_chat_template(rows, tokenize=False, add_generation_prompt=generation_prompt))
    except TemplateError as error:
        raise ModelError(f"{tokenizer.name_or_path}: the chat template refuses the conversation ({error}).") from error
    pieces = re.split(r"\(critrm:(\d+)\)", rendered)
    if {int(i) for i in pieces[1::2]} != set(range(len(messages))):
        raise ModelError(f"{tokenizer.name_or_path}: the chat template drops messages.")
    ids: list[int] = []
    for position, piece in enumerate(pieces):
        # Odd positions hold the number of the message that goes there.
        text = messages[int(piece)].content if position % 2 else piece
        if text:
            ids += encode_text(tokenizer, text) if position % 2 else tokenizer.encode(text, add_special_tokens=False)
    return ids


def render_plain(messages: Sequence[Message], *, generation_prompt: bool = True) -> str:
    """The paper's `User:` / `Chatbot:` text (Appendix A), for models without a chat format."""
    names = {"user": "User: ", "assistant": "Chatbot: ", "system": ""}
    turns = [names[message.role] + message.content for message in messages]
    return "\n\n".join([*turns, "Chatbot:"] if generation_prompt else turns)
