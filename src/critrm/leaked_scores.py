"""Grades that a critique gives away in words: "8/10", "rating: 9", "I'd give it a 7 out of 10", "four stars".

A reward model that reads such a critique can copy the grade instead of reading the reasons. Only a verdict on the
response counts: fractions and scores that a critique merely talks about ("7/20 is a margin of 35 %") do not.
"""

import itertools
import re
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")

_VALUE = rf"(?P<value>\d{{1,3}}(?:\.\d+)?|{'|'.join(NUMBERS)})"
_OF = r"\s*(?:/|out\s+of)\s*(?P<of>5|10|100|five|ten)(?![\d/])"
_STARS = r"[\s-]+(?P<stars>stars?)\b"
_SCALE = rf"(?:(?:{_OF})?(?:{_STARS})?(?P<percent>\s*%)?)"
_GRADED = rf"(?:{_OF}(?:\s+stars?)?|{_STARS})"
_NAME = r"(?:scor(?:e|ing)|ratings?|grade|mark)"
_ASPECT = (
    r"accuracy|clarity|coherence|completeness|conciseness|correctness|depth|engagement|factuality|helpfulness|honesty|"
    r"instruction[\s-]following|relevance|truthfulness"
)
# What may stand between "I'd give" or "Score:" and the number.
_FILLER = (
    r"(?:[\s*\"]+(?:it|this|that|the|your|response|answer|reply|completion|last|chatbot['’]s|as|a|an|at|with|of|about|"
    r"around|overall|perhaps|maybe|solid|strong|only|just|score|rating|grade|mark))*[\s*\"]+"
)
# Where a line, a sentence or emphasis begins, with its marks; tried once per run of marks, which may be long.
_START = r"(?<![\s*_#>-])(?:^|(?<=\()|(?<=[.!?])(?=\s)|(?=(?:[^\S\n]|[_#>-])*+[\n*]))[\s*_#>-]*+"
_NEXT = r"(?=[\s*_\"]*(?:[;:,!?)–—-]|\.(?!\d)|$|\b(?:for|because|since|and|but|overall|due|based|on|in)\b))"
_END = r"(?=[\s*_]*(?:[.!?)\n]|$))"

_LEAKS = tuple(
    re.compile(pattern, re.IGNORECASE)
    for pattern in (
        # Score: 8/10; **Overall rating** - 85%; Grade = 7
        rf"{_START}(?:(?:my|the|overall|final|total)\s+)*{_NAME}[*_\"]*\s*[:=–—-]+[\s*_\[(]*{_VALUE}{_SCALE}\]*",
        # my overall score is 7; the final rating would be 8 out of 10
        rf"\b(?:my|overall|final)\s+{_NAME}\s+(?:is|would\s+be)\s+(?:a\s+)?{_VALUE}{_SCALE}(?![\d.]*\d)",
        # I'd give it a 7; I would rate this response 8/10; we score it four stars
        rf"\b(?:I|we)(?:['’]d|['’]ll|\s+would|\s+will|\s+can)?(?:\s+only|\s+probably|\s+overall)?"
        rf"\s+(?:give|rate|score|grade|award|assign|mark){_FILLER}{_VALUE}{_SCALE}{_NEXT}",
        # meets the criteria for a score of 5
        rf"\ba\s+{_NAME}\s+of\s+(?P<value>10|\d(?:\.\d+)?|{'|'.join(NUMBERS)})(?!\d){_SCALE}",
        # deserves an 8/10; rated 4 out of 5 stars; scores 9/10; a solid 8/10
        rf"\b(?:deserves?|merits?|earns?|rated|rates|scored|scores|solid|strong|worth){_FILLER}{_VALUE}{_GRADED}",
        # Overall: 8/10; verdict - four stars; clarity: 9/10; or a sentence of its own
        rf"\b(?:overall|verdict|{_ASPECT})[\s*_]*[:,–—-]+\s*{_VALUE}{_GRADED}",
        rf"{_START}{_VALUE}{_GRADED}{_END}",
        # 8 on a scale of 1 to 10; on a scale of 1 to 10, this is a 7
        rf"{_VALUE}\s+on\s+a\s+scale\s+(?:of|from)\s+[01]\s*(?:to|-|–)\s*(?P<of>5|10|100)\b",
        rf"\bon\s+a\s+scale\s+(?:of|from)\s+[01]\s*(?:to|-|–)\s*(?P<of>5|10|100)\b(?:(?!\bwith\b)[^.!?\n\d]){{0,60}}?\b{_VALUE}\b",
        # a four-star response
        rf"\b{_VALUE}-(?P<stars>star)\s+(?:response|answer|reply)\b",
        # Auto-J's [[7]], Prometheus' [RESULT] 4
        rf"\[\[{_VALUE}\]\]",
        rf"\[(?P<stars>RESULT)\][\s(]*{_VALUE}",
    )
)
_PICTURED = re.compile(r"[★⭐]{1,5}☆{0,5}")
_SENTENCE_END = re.compile(r"[.!?][\"'”’)*]*\s+|\n\s*")
_CLAUSE = re.compile(r"\s*[,;(]\s*(?:(?:so|and|but|because|since|as)\s+)?|\s+[–—-]\s+|\s+(?:because|since|although)\s+")


@dataclass(frozen=True, slots=True)
class Leak:
    """One grade found in a text."""

    start: int
    end: int
    value: float
    """0 to 1, as a share of the best grade."""


def find_leaks(text: str) -> list[Leak]:
    """The grades in a critique, in their order and without overlaps."""
    found = sorted(_all_leaks(text), key=lambda leak: (leak.start, -leak.end))
    kept: list[Leak] = []
    for leak in found:
        if not kept or leak.start >= kept[-1].end:
            kept.append(leak)
    return kept


def _all_leaks(text: str) -> Iterator[Leak]:
    for pattern in _LEAKS:
        for match in pattern.finditer(text):
            value = _share(match.groupdict())
            if value is not None:
                start = match.end() - len(match.group().lstrip(" \t\r\n*_#>-"))
                yield Leak(start, match.end(), value)
    for match in _PICTURED.finditer(text):
        yield Leak(match.start(), match.end(), (len(match.group()) - match.group().count("☆")) / 5)


def _share(groups: dict[str, str | None]) -> float | None:
    value = _number(groups["value"] or "")
    if groups.get("of"):
        best = _number(groups["of"] or "")
    elif groups.get("percent"):
        best = 100.0
    elif groups.get("stars"):
        best = 5.0
    else:  # "rating: 9" names no scale
        best = 10.0 if value <= 10 else 100.0
    return value / best if value <= best else None


def _number(word: str) -> float:
    word = word.lower()
    return float(NUMBERS.index(word)) if word in NUMBERS else float(word)


def leaked_score(text: str) -> float | None:
    """The grade that a critique gives away, 0 to 1; the last one where there are several, None without any."""
    leaks = find_leaks(text)
    return leaks[-1].value if leaks else None


def strip_scores(text: str) -> str:
    """A critique without its grades: the clause that holds one goes, or the sentence where little else is left.

    Text without a grade comes back as it is. Nothing may be left.
    """
    edit = _without
    while leaks := find_leaks(text):
        text = "".join(edit(part, inside) if inside else part for part, inside in _parts(text, leaks))
        text = re.sub(r"\n{3,}", "\n\n", text).strip()
        edit = _nothing  # what is left may read as a grade once more; then the whole sentence goes, so that this ends
    return text


def cut_sentences(text: str) -> list[str]:
    """Sentences and lines, each with the space after it; put together they are the text."""
    ends = [match.end() for match in _SENTENCE_END.finditer(text)]
    return [text[start:end] for start, end in itertools.pairwise([0, *ends, len(text)]) if start < end]


def _parts(text: str, leaks: list[Leak]) -> Iterator[tuple[str, list[Leak]]]:
    """Sentences with their leaks, placed from the part's start; lines that share a leak are one part."""
    waiting = deque(leaks)
    inside: list[Leak] = []
    start = end = 0
    for sentence in cut_sentences(text):
        end += len(sentence)
        while waiting and waiting[0].start < end:
            inside.append(waiting.popleft())
        if not inside or inside[-1].end <= end:
            yield text[start:end], [Leak(leak.start - start, leak.end - start, leak.value) for leak in inside]
            start, inside = end, []


def _without(sentence: str, leaks: list[Leak]) -> str:
    whole = sentence.rstrip()
    space = sentence[len(whole) :]
    end_mark = whole[-1] if whole[-1] in ".!?" else "."
    body = whole.rstrip(".!?")
    for start, end, joint in reversed(_cuts(body, leaks)):
        left, right = body[:start], body[end:]
        body = left + (joint if left and right else "") + right
    # Brackets and emphasis that opened around a grade have lost their other half; those around words have not.
    marks = "" if re.search(r"[(*_]\w", body) else "()*_"
    body = body.strip(f" ,;:-–—\n{marks}")
    if len(re.findall(r"\w+", body)) < 3:
        return _nothing(sentence, leaks)
    return body[0].upper() + body[1:].rstrip(".!?") + end_mark + space


def _nothing(sentence: str, leaks: list[Leak]) -> str:
    return "\n" if "\n" in sentence[len(sentence.rstrip()) :] else ""


def _cuts(body: str, leaks: list[Leak]) -> list[tuple[int, int, str]]:
    """What goes from a sentence, from where to where, and what joins the ends; in order and without overlaps."""
    breaks = [match.span() for match in _CLAUSE.finditer(body)]
    cuts: list[tuple[int, int, str]] = []
    for leak in leaks:
        start, end, joint = _cut(body, leak, breaks)
        while cuts and cuts[-1][1] >= start:  # two grades in one clause
            before = cuts.pop()
            start, end, joint = min(start, before[0]), max(end, before[1]), joint or before[2]
        cuts.append((start, end, joint))
    return cuts


def _cut(body: str, leak: Leak, breaks: list[tuple[int, int]]) -> tuple[int, int, str]:
    if leak.start and body[leak.start - 1] + body[leak.end : leak.end + 1] == "()":
        return len(body[: leak.start - 1].rstrip()), leak.end + 1, ""
    if _PICTURED.match(body[leak.start : leak.end]):
        return leak.start, leak.end, ""
    start = max((span[0] for span in breaks if span[1] <= leak.start), default=0)
    end = min((span[1] for span in breaks if span[0] >= leak.end), default=len(body))
    return start, end, ", "
