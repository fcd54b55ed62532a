"""A conversation that comes as one string, taken apart: RL trainers send what they have decoded, template and all.

Known are the chat formats that most models are trained with, and critrm's own plain form. Flat text cannot say where a
turn ends if a turn spells the format's own marks; send messages where you can.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass

from critrm.errors import DataError
from critrm.types import Message, Role


@dataclass(frozen=True, slots=True)
class _Format:
    """How a chat format marks who speaks."""

    name: str
    header: re.Pattern[str]
    """What stands before a turn; its group is the speaker."""


FORMATS = (
    _Format("ChatML", re.compile(r"<\|im_start\|>(system|user|assistant)(?:\n|$)")),
    _Format("Llama 3", re.compile(r"<\|start_header_id\|>(system|user|assistant)<\|end_header_id\|>\n{0,2}")),
    _Format("Llama 4", re.compile(r"<\|header_start\|>(system|user|assistant)<\|header_end\|>\n{0,2}")),
    _Format("Gemma", re.compile(r"<start_of_turn>(system|user|model)(?:\n|$)")),
    _Format("Phi, Zephyr", re.compile(r"<\|(system|user|assistant)\|>\n?")),
    _Format("DeepSeek", re.compile(r"<｜(User|Assistant)｜>")),
    _Format("Mistral", re.compile(r" ?(\[/?INST\]) ?")),
    # Texts without control tokens: the speaker stands at the beginning of a paragraph.
    _Format("plain", re.compile(r"(?:^|\n\n)(System|User|Chatbot):(?: |$)?")),
    _Format("Human and Assistant", re.compile(r"(?:^|\n\n)(System|Human|Assistant):(?: |$)?")),
    _Format("User and Assistant", re.compile(r"(?:^|\n\n)(System|User|Assistant):(?: |$)?")),
)
_ROLES: dict[str, Role] = {
    "system": "system",
    "user": "user",
    "human": "user",
    "[inst]": "user",
    "assistant": "assistant",
    "model": "assistant",
    "chatbot": "assistant",
    "[/inst]": "assistant",
}
_BEGINNING = re.compile(r"(?:\s|<\|?[\w▁ ]{1,30}\|?>|<｜[\w▁]{1,40}｜>|\[PAD\])*")
"""Padding, and what a tokenizer puts before every text."""
_ENDS = (
    *("<|im_end|>", "<|eot_id|>", "<|eot|>", "<|end|>", "<|return|>", "<end_of_turn>", "</s>", "<eos>"),
    *("<|endoftext|>", "<|end_of_text|>", "<｜end▁of▁sentence｜>"),
    *("<|pad|>", "<pad>", "[PAD]", "<|finetune_right_pad_id|>"),
)
"""What ends a turn or fills up a row."""


def split_flat(text: str) -> tuple[tuple[Message, ...], str]:
    """A conversation in one string as its prompt and the completion that ends it.

    Raises:
        DataError: the text has no chat format known here, or does not end in a reply.
    """
    turns = read_turns(text)
    if not turns:
        names = ", ".join(each.name for each in FORMATS)
        raise DataError(
            f"one string in no chat format known here ({names}), so where the response begins cannot be told: send "
            "`messages`, or the prompts beside the texts where the protocol has them"
        )
    if turns[-1].role != "assistant" or len(turns) == 1:
        raise DataError("the text does not end in a reply to somebody: there is nothing to score")
    return turns[:-1], turns[-1].content


def split_query(query: str, prompt: str) -> tuple[tuple[Message, ...], str]:
    """A query (prompt and response in one string) by its prompt.

    Args:
        query: prompt and response, as a trainer decoded them.
        prompt: the prompt alone; with its chat template or plain.

    Raises:
        DataError: the query does not begin with the prompt, and has no chat format known here.
    """
    for start in dict.fromkeys((prompt, prompt.strip(), _without_beginning(prompt))):
        at = 0 if query.startswith(start) else _n_beginning(query)
        if start and query.startswith(start, at):
            return _with_response(prompt, query[at + len(start) :])
    if read_turns(query):
        return split_flat(query)
    raise DataError("the query does not begin with its prompt, so where the response begins cannot be told")


def _with_response(prompt: str, response: str) -> tuple[tuple[Message, ...], str]:
    response = _without_ends(response).removeprefix(" ")
    turns = read_turns(prompt) or (Message("user", prompt),)
    if turns[-1].role == "assistant":
        # The template's invitation to speak, or the beginning of the reply, which then belongs to it.
        turns, response = turns[:-1], turns[-1].content + response
    if not turns:
        raise DataError("the prompt holds no message of anybody")
    return turns, response


def read_turns(text: str) -> tuple[Message, ...]:
    """The messages of a conversation in one string; none where its format is not known."""
    start = _n_beginning(text)
    for each in FORMATS:
        # A control token at the very beginning is matched by `_BEGINNING` too.
        found = list(each.header.finditer(text))
        if found and (found[0].start() <= start):
            ends = [*(match.start() for match in found[1:]), len(text)]
            return tuple(_turns((match[1], text[match.end() : end]) for match, end in zip(found, ends, strict=True)))
    return ()


def _turns(parts: Iterable[tuple[str, str]]) -> Iterable[Message]:
    for speaker, content in parts:
        yield Message(_ROLES[speaker.lower()], _without_ends(content))


def _without_ends(text: str) -> str:
    """The text without the marks at its end, nor the space between and before them; as it is where there are none."""
    kept = end = len(text)
    while end:
        while end and text[end - 1].isspace():
            end -= 1
        mark = next((mark for mark in _ENDS if text.endswith(mark, 0, end)), "")
        if not mark:
            break
        end -= len(mark)
        kept = end
    while kept < len(text) and kept and text[kept - 1].isspace():
        kept -= 1
    return text[:kept]


def _n_beginning(text: str) -> int:
    match = _BEGINNING.match(text)
    return match.end() if match else 0


def _without_beginning(text: str) -> str:
    return text[_n_beginning(text) :]
