"""The field's column dialects: each a plain function from a row to the fields of a preference pair."""

import re
from collections import Counter
from collections.abc import Callable
from typing import Any

from critrm.errors import DataError
from critrm.types import SIDES, Message, Role

Fields = dict[str, Any]
TIE = "tie"
NO_MAJORITY = "no majority"
NOT_UNANIMOUS = "not unanimous"
ROLES: tuple[Role, ...] = ("system", "user", "assistant")
SPEAKERS: dict[str, Role] = {"Human": "user", "Assistant": "assistant"}
TURN = re.compile(r"(?:^|\n\n)(?:## )?(Human|Assistant):")


class NoPreference(Exception):
    """Neither completion is preferred: counted with its reason, and never an error."""


def bad_field(field: str, reason: str) -> DataError:
    """The error of one field; the reader adds file and line."""
    return DataError(reason, field=field)


def text_field(row: Fields, field: str) -> str:
    """A field that has to be text."""
    return checked_text(row.get(field), field)


def checked_text(value: object, field: str) -> str:
    """A value that has to be text that can be encoded."""
    if not isinstance(value, str):
        raise bad_field(field, "missing" if value is None else f"must be text, not {type(value).__name__}")
    try:
        value.encode()
    except UnicodeEncodeError:
        # Half an emoji, cut by another tool: no tokenizer and no endpoint takes it.
        raise bad_field(field, "not valid Unicode text (a lone surrogate)") from None
    return value


def _messages(value: object, field: str) -> tuple[Message, ...]:
    """A conversation: message lists as they are, `Human:` / `Assistant:` texts by turns, other text as one turn."""
    if isinstance(value, str):
        turns = _transcript(checked_text(value, field)) or (Message("user", value),)
        # TRL's explicit prompts end with an open `Assistant:`.
        return turns[:-1] if turns[-1] == Message("assistant", "") else turns
    if not isinstance(value, (list, tuple)):
        raise bad_field(field, "missing" if value is None else "must be text or a list of messages")
    found = []
    for item in value:
        if not isinstance(item, dict) or item.get("role") not in ROLES:
            raise bad_field(field, "each message needs a role (system, user or assistant) and a content")
        if not isinstance(item.get("content"), str):
            raise bad_field(field, "each message needs a content that is text")
        found.append(Message(ROLES[ROLES.index(item["role"])], checked_text(item["content"], field)))
    return tuple(found)


def literal_messages(value: object, field: str) -> tuple[Message, ...]:
    """As `_messages`, but text is one turn whatever it says: a benchmark's prompt is not to be taken apart."""
    return (Message("user", checked_text(value, field)),) if isinstance(value, str) else _messages(value, field)


def _transcript(text: str) -> tuple[Message, ...]:
    """The turns of a text that starts with `Human:`; empty for any other text."""
    parts = TURN.split(text.lstrip("\n"))
    if len(parts) < 3 or parts[0].strip() or parts[1] != "Human":
        return ()
    # Spaces and line ends around a turn are the transcript's, not the turn's.
    return tuple(
        Message(SPEAKERS[role], said.strip(" \n")) for role, said in zip(parts[1::2], parts[2::2], strict=True)
    )


def _own(row: Fields) -> Fields:
    completions: Fields = {side: _completion(row.get(side), side) for side in SIDES}
    return {"prompt": _messages(row.get("prompt"), "prompt"), **completions}


def _rewardbench(row: Fields) -> Fields:
    return {"prompt": literal_messages(row.get("prompt"), "prompt"), **{side: text_field(row, side) for side in SIDES}}


def _completion(value: Any, field: str) -> str:
    """Text, or a list of one assistant message."""
    if isinstance(value, str):
        return checked_text(value, field)
    messages = _messages(value, field)
    if len(messages) != 1 or messages[0].role != "assistant":
        raise bad_field(field, "must be text or a list of one assistant message")
    return messages[0].content


def _implicit(row: Fields) -> Fields:
    """TRL's implicit prompt: both conversations whole; what they share is the prompt, a `prompt` column repeats it."""
    return _shared_prompt(*(literal_messages(row.get(side), side) for side in SIDES))


def _hh(row: Fields) -> Fields:
    """HH-RLHF: two transcripts with one prompt."""
    return _shared_prompt(*(_transcript(text_field(row, side)) for side in SIDES))


def _shared_prompt(chosen: tuple[Message, ...], rejected: tuple[Message, ...]) -> Fields:
    for field, messages in (("chosen", chosen), ("rejected", rejected)):
        if not messages or messages[-1].role != "assistant":
            raise bad_field(field, "must be a conversation that ends with the assistant's turn")
    if chosen[:-1] != rejected[:-1]:
        raise bad_field("rejected", "prompts differ: its conversation is not the chosen one's up to the last turn")
    return {"prompt": chosen[:-1], "chosen": chosen[-1].content, "rejected": rejected[-1].content}


def _dsp(row: Fields) -> Fields:
    texts, scores = row.get("text"), row.get("score")
    if not isinstance(texts, list) or len(texts) != 2:
        raise bad_field("text", "must be a list of two transcripts")
    if not isinstance(scores, list) or len(scores) != 2:
        raise bad_field("score", "must be a list of two numbers")
    order = (0, 1) if _first_is_better(scores[0], scores[1], "score") else (1, 0)
    return _hh({"chosen": texts[order[0]], "rejected": texts[order[1]]})


def _first_is_better(first: object, second: object, field: str) -> bool:
    if not isinstance(first, (int, float)) or not isinstance(second, (int, float)):
        raise bad_field(field, "must be numbers")
    if first == second:
        raise NoPreference(TIE)
    return first > second


def _by_label(prompt: str, first: str, second: str, label: object, field: str) -> Fields:
    if label not in (1, 2, "1", "2") or isinstance(label, bool):
        raise bad_field(field, f"must be 1 or 2: {label!r:.40}")
    chosen, rejected = (first, second) if label in (1, "1") else (second, first)
    return {"prompt": (Message("user", prompt),), "chosen": chosen, "rejected": rejected}


def _llmbar(row: Fields) -> Fields:
    return _by_label(
        text_field(row, "input"), text_field(row, "output_1"), text_field(row, "output_2"), row.get("label"), "label"
    )


def _auto_j(row: Fields) -> Fields:
    label = row.get("label")
    if isinstance(label, bool) or label not in (0, 1, 2):
        raise bad_field("label", f"must be 0, 1 or (a tie) 2, not {label!r:.60}")
    if label == 2:
        raise NoPreference("tie")
    first, second = text_field(row, "response 1"), text_field(row, "response 2")
    fields = _by_label(text_field(row, "prompt"), first, second, label + 1, "label")
    return fields | {"subset": row.get("scenario", "")}


def _pandalm_by(rule: str) -> Callable[[Fields], Fields]:
    """PandaLM by a rule of how its three annotators decide: `majority`, `unanimous` or `first`; 0 is a tie."""

    def read(row: Fields) -> Fields:
        votes = [row.get(f"annotator{n}") for n in (1, 2, 3)]
        if any(vote not in (0, 1, 2) for vote in votes):
            raise bad_field("annotator1", f"the annotators' votes must be 0, 1 or 2: {votes!r:.60}")
        label, count = (votes[0], 3) if rule == "first" else Counter(votes).most_common(1)[0]
        if count < (3 if rule == "unanimous" else 2):
            raise NoPreference(NOT_UNANIMOUS if count == 2 else NO_MAJORITY)
        if label == 0:
            raise NoPreference(TIE)
        given = text_field(row, "input") if row.get("input") else ""
        prompt = text_field(row, "instruction") + (f"\n\n{given}" if given else "")
        fields = _by_label(
            prompt, _pandalm_text(row, "response1"), _pandalm_text(row, "response2"), label, "annotator1"
        )
        return fields | {"source": f"pandalm-{rule}"}

    return read


def _pandalm_text(row: Fields, field: str) -> str:
    # The release lost the quotes of six answers "True".
    return str(row[field]) if isinstance(row.get(field), bool) else text_field(row, field)


def _judgebench(row: Fields) -> Fields:
    """JudgeBench: `A>B` or `B>A`; the source's name tells the subset."""
    label = row.get("label")
    if label not in ("A>B", "B>A"):
        raise bad_field("label", f"must be 'A>B' or 'B>A': {label!r:.40}")
    first, second = text_field(row, "response_A"), text_field(row, "response_B")
    fields = _by_label(text_field(row, "question"), first, second, 1 if label == "A>B" else 2, "label")
    own = {"id": row["pair_id"]} if row.get("pair_id") else {}
    return fields | own | {"subset": row.get("source"), "source": row.get("response_model")}


def _ultrafeedback(row: Fields) -> Fields:
    """UltraFeedback, binarised: TRL's columns, and two scores beside them or in `metadata`."""
    scores = _scores(row)
    if not _first_is_better(scores.get("score_chosen"), scores.get("score_rejected"), "score_chosen"):
        raise bad_field("score_chosen", "lower than score_rejected")
    return _implicit(row) if _is_implicit(row) else _own(row)


def _scores(row: Fields) -> Fields:
    beside = row.get("metadata")
    return row | beside if isinstance(beside, dict) else row


def _is_implicit(row: Fields) -> bool:
    chosen, prompt = row.get("chosen"), row.get("prompt")
    # Some sets hold whole conversations and repeat their first message as the text `prompt`.
    repeats = isinstance(prompt, str) and isinstance(chosen, list) and len(chosen) > 1
    return isinstance(chosen, list) and "rejected" in row and (prompt is None or repeats)


def _rmb(row: Fields) -> Fields:
    answers = {}
    for side, column in (("chosen", "chosen"), ("rejected", "reject")):
        value = row.get(column)
        if not isinstance(value, dict):
            raise bad_field(column, "must be an object with an answer")
        answers[side] = text_field(value, "answer")
    prompt = literal_messages(row.get("conversation_input"), "conversation_input")
    return {"prompt": prompt, "subset": row.get("category_path"), **answers}


DIALECTS: dict[str, tuple[Callable[[Fields], bool], Callable[[Fields], Fields]]] = {
    "llmbar": (lambda row: "output_1" in row and "label" in row, _llmbar),
    "pandalm": (lambda row: "response1" in row and "annotator1" in row, _pandalm_by("majority")),
    # The same columns by another rule: only when asked for.
    "pandalm-unanimous": (lambda row: False, _pandalm_by("unanimous")),
    "pandalm-first": (lambda row: False, _pandalm_by("first")),
    "auto-j": (lambda row: "response 1" in row and "label" in row, _auto_j),
    "judgebench": (lambda row: "response_A" in row and "question" in row, _judgebench),
    "dsp": (lambda row: "text" in row and "score" in row, _dsp),
    "rmb": (lambda row: "conversation_input" in row and "reject" in row, _rmb),
    "ultrafeedback": (
        lambda row: "chosen" in row and "score_chosen" in _scores(row),
        _ultrafeedback,
    ),
    "trl-implicit": (_is_implicit, _implicit),
    "rewardbench": (lambda row: "prompt" in row and "chosen_model" in row and "subset" in row, _rewardbench),
    "critrm": (lambda row: "prompt" in row and "chosen" in row and "rejected" in row, _own),
    "hh": (lambda row: isinstance(row.get("chosen"), str) and "prompt" not in row and "rejected" in row, _hh),
}
"""Name -> how a row of it is recognised, and how it is read. `critrm` also reads TRL's explicit prompts."""
