"""The field's files in which responses come with critiques: each dialect a plain function from a row to a `Group`."""

import itertools
import math
import re
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from critrm.dialects import DIALECTS, Fields, bad_field, checked_text, text_field
from critrm.types import Message


@dataclass(frozen=True, slots=True)
class Response:
    """A response with its critiques."""

    text: str
    critiques: tuple[str, ...]
    """One per sample."""
    scores: tuple[float | None, ...]
    """The critic's grade beside each critique, on the file's own scale."""
    grade: float
    """What responses to one prompt are compared by."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """Responses to one prompt, or some of them."""

    prompt: tuple[Message, ...]
    responses: tuple[Response, ...]
    critic: str = ""
    key: str = ""
    """Rows with one response each belong together when prompt and key are the same; empty: a row is whole."""
    is_pair: bool = False
    """The file says which is chosen (the first), and the pair's id is the row's."""
    has_samples: bool = False
    """Equal responses are one, each of their critiques a sample, and the mean of their scores its grade."""

    def __post_init__(self) -> None:
        """Merge responses that came apart, also those that `dataclasses.replace` brings together."""
        if self.has_samples:
            object.__setattr__(self, "responses", _merged(self.responses))


def _merged(responses: Sequence[Response]) -> tuple[Response, ...]:
    found: dict[str, Response] = {}
    for response in responses:
        text = response.text.strip()  # as `pairs_of` compares them
        if text in found:
            critiques, scores = found[text].critiques + response.critiques, found[text].scores + response.scores
            # Exact, so that equal scores give equal grades however many there are.
            grade = statistics.mean(score for score in scores if score is not None)
            response = replace(found[text], critiques=critiques, scores=scores, grade=grade)
        found[text] = response
    return tuple(found.values())


def pairs_of(responses: Sequence[Response]) -> Iterator[tuple[int, int]]:
    """Positions (better, worse) of each two responses that differ in text and grade."""
    for first, second in itertools.combinations(range(len(responses)), 2):
        a, b = responses[first], responses[second]
        if a.grade != b.grade and a.text.strip() != b.text.strip():
            yield (first, second) if a.grade > b.grade else (second, first)


def _column(row: Fields, *names: str) -> str:
    """The first of several names that the row has; the first name where it has none."""
    return next((name for name in names if row.get(name) is not None), names[0])


def _number(value: Any, field: str) -> float:
    """A grade; files of the field write them as numbers or as text."""
    try:
        found = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        found = math.nan
    if not math.isfinite(found):
        raise bad_field(
            field, "missing: it tells which response is better" if value is None else f"no number: {value!r:.60}"
        )
    return found


def _texts(value: Any, field: str) -> tuple[str, ...]:
    """A critique, or a list of several by the same critic; none of them empty."""
    found = tuple(checked_text(each, field) for each in (value if isinstance(value, list) else [value]))
    if not found or not all(text.strip() for text in found):
        raise bad_field(field, "empty: every response needs a critique")
    return found


def _user(text: str) -> tuple[Message, ...]:
    return (Message("user", text),)


CLOUD_NAMES = ("feedback", "critique", "critiques")


def _cloud(row: Fields) -> Group:
    """CLoud: a preference pair in any dialect, with `chosen_feedback` and `rejected_feedback` (text or a list).

    What `critrm push` makes is such a file, too, and names a critic, whose own `chosen_score` and `rejected_score` are.
    """
    name = next((name for name, (matches, _) in DIALECTS.items() if matches(row)), "critrm")
    fields = DIALECTS[name][1](row)
    responses, critic = [], _critic(row, "critic")
    for side, grade in (("chosen", 1.0), ("rejected", 0.0)):
        column = _column(row, *(f"{side}_{name}" for name in CLOUD_NAMES))
        critiques = _texts(row.get(column), column)
        # Without a critic's name, nobody knows whose scores these are.
        name = f"{side}_score"
        score = _number(row[name], name) if critic and row.get(name) is not None else None
        responses.append(Response(fields[side], critiques, (score,) * len(critiques), grade))
    return Group(prompt=fields["prompt"], responses=tuple(responses), critic=critic, is_pair=True)


def _critic(row: Fields, *names: str) -> str:
    found = row.get(_column(row, *names))
    return found if isinstance(found, str) else ""


def _ultrafeedback(row: Fields) -> Group:
    """UltraFeedback: `completions`, each with a `critique` and its `overall_score`, or rationales by aspect."""
    completions = row["completions"]
    if not isinstance(completions, list) or not all(isinstance(each, dict) for each in completions):
        raise bad_field("completions", "must be a list of objects")
    responses = []
    for each in completions:
        aspects = each.get("annotations") or {}
        if not isinstance(aspects, dict):
            raise bad_field("annotations", "must be an object of aspects, each with a Rating and a Rationale")
        graded = _graded(aspects, "Rating")
        if each.get("critique") is not None:
            text = text_field(each, "critique")
        else:
            reasons = (text_field(found, "Rationale") for found in graded.values())
            text = "\n".join(
                f"{name.replace('_', ' ').capitalize()}: {reason}" for name, reason in zip(graded, reasons, strict=True)
            )
        if each.get("overall_score") is not None:
            grade = _number(each["overall_score"], "overall_score")
        else:
            grade = _mean([_number(found["Rating"], "Rating") for found in graded.values()], "overall_score")
        responses.append(Response(text_field(each, "response"), _texts(text, "critique"), (grade,), grade))
    return Group(prompt=_user(text_field(row, "instruction")), responses=tuple(responses))


def _graded(aspects: Fields, rating: str) -> Fields:
    """The aspects that apply; for others the judges of the field write "N/A"."""
    return {
        name: found
        for name, found in aspects.items()
        if isinstance(found, dict) and found.get(rating) not in (None, "", "N/A")
    }


def _mean(values: Sequence[float], field: str) -> float:
    if not values:
        raise bad_field(field, "missing: it tells which response is better")
    return math.fsum(values) / len(values)


def _distilabel(row: Fields) -> Group:
    """distilabel: `generations` with `ratings` and `rationales` in parallel; a judge's unparsable answer is null."""
    names = {
        "texts": _column(row, "generations"),
        "ratings": _column(row, "ratings", "rating"),
        "reasons": _column(row, "rationales", "rationale", "critiques", "feedback"),
    }
    columns: Fields = {kind: row.get(name) for kind, name in names.items()}
    if not isinstance(columns["texts"], list):
        raise bad_field(names["texts"], "must be a list of texts")
    for kind, name in names.items():
        if not isinstance(columns[kind], list) or len(columns[kind]) != len(row["generations"]):
            raise bad_field(name, f"must be a list with one item per generation ({len(row['generations'])})")
    responses = []
    for text, rating, reason in zip(*columns.values(), strict=True):
        if text is not None and rating is not None and reason is not None:
            grade = _number(rating, names["ratings"])
            reasons = _texts(reason, names["reasons"])
            responses.append(Response(checked_text(text, names["texts"]), reasons, (grade,) * len(reasons), grade))
    prompt = text_field(row, _column(row, "instruction", "input", "prompt"))
    return Group(prompt=_user(prompt), responses=tuple(responses), critic=_critic(row, "model_name"))


PROMETHEUS = re.compile(
    r"###\s*The instruction to evaluate:\s*\n(?P<prompt>.*?)\n+###\s*Response to evaluate:\s*\n(?P<response>.*?)"
    r"\n+###\s*Reference Answer.*?\n###\s*Score Rubrics:\s*\n(?P<rubric>.*?)(?:\n+###\s*Feedback:|$)",
    re.DOTALL,
)


def _prometheus(row: Fields) -> Group:
    """Prometheus: its evaluation sets (GPT-4's feedback three times over), Feedback and Preference Collection."""
    if "gpt4_feedback" in row:
        found = PROMETHEUS.search(text_field(row, "instruction"))
        if found is None:
            raise bad_field("instruction", "not in Prometheus' template: it lacks the response or the score rubric")
        feedbacks, scores = _texts(row["gpt4_feedback"], "gpt4_feedback"), _many(row.get("gpt4_score"), "gpt4_score")
        if len(feedbacks) != len(scores):
            raise bad_field("gpt4_score", f"{len(scores)} scores for {len(feedbacks)} feedbacks")
        grade = _mean(scores, "gpt4_score")
        response = Response(found["response"], feedbacks, tuple(scores), grade)
        return Group(prompt=_user(found["prompt"]), responses=(response,), key=found["rubric"], critic="gpt-4")
    prompt = _user(text_field(row, "orig_instruction"))
    if "orig_response_A" in row:
        both = tuple(_original(row, f"_{letter}") for letter in "AB")
        return Group(prompt=prompt, responses=both)
    return Group(prompt=prompt, responses=(_original(row, ""),), key=str(row.get("orig_criteria") or "feedback"))


def _original(row: Fields, end: str) -> Response:
    grade = _number(row.get(f"orig_score{end}"), f"orig_score{end}")
    feedback = _texts(row.get(f"orig_feedback{end}"), f"orig_feedback{end}")
    return Response(text_field(row, f"orig_response{end}"), feedback, (grade,), grade)


def _many(value: Any, field: str) -> list[float]:
    return [_number(each, field) for each in (value if isinstance(value, list) else [value])]


def _just_eval(row: Fields) -> Group:
    """just-eval: one response, with a reason and a score by aspect."""
    if not isinstance(row["parsed_result"], dict):
        raise bad_field("parsed_result", "must be an object of aspects, each with a reason and a score")
    aspects = _graded(row["parsed_result"], "score")
    grade = _mean([_number(each["score"], "score") for each in aspects.values()], "parsed_result")
    text = "\n".join(f"{name.capitalize()}: {text_field(each, 'reason')}" for name, each in aspects.items())
    response = Response(text_field(row, "output_cand"), _texts(text, "parsed_result"), (grade,), grade)
    key = f"{row.get('mode')} {_critic(row, 'judge')}"
    return Group(prompt=_user(text_field(row, "input")), responses=(response,), key=key, critic=_critic(row, "judge"))


RESPONSE_NAMES = ("response", "answer", "output", "completion")
FEEDBACK_NAMES = ("feedback", "critique")


def _feedback(row: Fields) -> Group:
    """One response, its feedback (text or a list) and its rating, under the names that files commonly use.

    Only one critic's ratings are compared; its rows on one response are samples.
    """
    rating = _column(row, "rating", "score", "grade")
    grade = _number(row.get(rating), rating)
    column = _column(row, *FEEDBACK_NAMES)
    critiques = _texts(row.get(column), column)
    text = text_field(row, _column(row, *RESPONSE_NAMES))
    prompt = text_field(row, _column(row, "prompt", "question", "instruction", "input"))
    response = Response(text, critiques, (grade,) * len(critiques), grade)
    critic = _critic(row, "critic")
    return Group(prompt=_user(prompt), responses=(response,), key=f"feedback {critic}", critic=critic, has_samples=True)


CRITIQUE_DIALECTS: dict[str, tuple[Callable[[Fields], bool], Callable[[Fields], Group]]] = {
    "cloud": (lambda row: "chosen" in row and any(f"chosen_{name}" in row for name in CLOUD_NAMES), _cloud),
    "ultrafeedback": (lambda row: "completions" in row and "instruction" in row, _ultrafeedback),
    "distilabel": (lambda row: isinstance(row.get("generations"), list), _distilabel),
    "prometheus": (lambda row: "gpt4_feedback" in row or "orig_instruction" in row, _prometheus),
    "just-eval": (lambda row: "output_cand" in row and "parsed_result" in row, _just_eval),
    "feedback": (
        lambda row: any(name in row for name in FEEDBACK_NAMES) and any(name in row for name in RESPONSE_NAMES),
        _feedback,
    ),
}
"""Name -> how a row of it is recognised, and how it is read."""
