"""A judge's reply -> its rating on the Likert scale of 0 to 10 (section 5.3), or why it has none.

The rating stands at the end of a reply, behind a label: `Score: 7`, `Rating: **7**/10`. Only the last label counts, so
a score that the judge quotes from the response is not taken for its own. A number alone is a rating too, and so are a
last sentence such as `I would give it 8.5/10` and a reply that begins with the rating and then gives reasons. Anything
else is unscored: never a middle grade, never a guess.
"""

import re
from dataclasses import dataclass

BEST = 10.0

# At the beginning of a line or sentence: `Score:`, `**Final rating** (0-10):`, `My overall score is`. Not behind `>` or
# inside quotation marks: such a score is somebody else's.
_LABEL = re.compile(
    r"(?:^[ \t*_#\"'`\[(-]*|(?<=[.!?)*_][ \t])[*_]*)(?:(?:my|the|overall|final|total|likert)\s+){0,3}"
    r"(?:score|rating|grade)\b[*_]*(?:[ \t]*\([^()\n]{0,40}\))?[*_\"'` \t]*"
    r"(?:[:=]|\bis\b|\bwould\s+be\b|$)[*_\"'` \t]*",
    re.IGNORECASE | re.MULTILINE,
)
# One number to the end of its line or sentence: `7`, `**7**/10.`, `8 out of 10 (very good)`.
_NUMBER = re.compile(
    r"\s*[*_#\"'`\[({<]*(?P<value>[-+−]?[0-9]{1,9}(?:\.[0-9]{1,9})?)[*_`]*"
    r"(?:\s*\(?(?:/|(?:out\s+)?of\b)\s*[*_`]*(?P<of>[0-9]{1,9}))?(?:[ \t]+points?\b)?"
    r"[*_\"'`\])}>]*(?:[ \t]*\([^()0-9\n]*\))?[ \t*_\"'`\])}>]*(?:$|[.!][*_\"'`)]*(?=\s|$))",
    re.IGNORECASE | re.MULTILINE,
)
_OF_TEN = re.compile(
    r"(?P<value>[0-9]{1,9}(?:\.[0-9]{1,9})?)[*_`]*\s*(?:/|out\s+of)\s*(?P<of>[0-9]{1,9})[*_)\].!]*$", re.I
)
_GIVES = re.compile(r"\b(?:give|rate|rating|score|grade|deserve|award|assign|overall)", re.IGNORECASE)
# Reasons behind a score may begin with a list, `1. Helpfulness`, but not with a number of their own.
_ANOTHER = re.compile(r"\A\W*[0-9]+(?![0-9]*[.)]\s*[^\W\d])|^\W*[0-9.]+\W*$|[0-9]\s*(?:/|out\s+of)\s*10\b", re.M | re.I)


@dataclass(frozen=True, slots=True)
class Rating:
    """What was read in a reply."""

    likert: float | None
    """0 to 10; None is unscored."""
    unscored: str = ""
    """Why there is none."""
    before: str = ""
    """The text before the rating."""


def read_rating(reply: str, *, cut: bool = False) -> Rating:
    """Read the rating in a judge's reply; never raises.

    Args:
        reply: the whole reply.
        cut: the reply was cut at its length limit, so that a number at its very end may lack digits.
    """
    text = reply.strip()
    labels = list(_LABEL.finditer(text))
    if not labels:
        return _without_label(text, cut=cut)
    before = text[: labels[-1].start()].strip()
    found = _NUMBER.match(text, labels[-1].end())
    if found is None:
        return Rating(None, "no single number after the label", before)
    rest = text[found.end() :].strip()
    if before and re.search(r"\w", rest):
        return Rating(None, "the score is not at the end", before)
    if _ANOTHER.search(rest):
        return Rating(None, "more than one score", before)
    return _checked(found, before, cut=cut and not rest)


def _without_label(text: str, *, cut: bool) -> Rating:
    """A number alone, or a last sentence that gives so many points out of ten."""
    if found := _NUMBER.fullmatch(text):
        return _checked(found, "", cut=cut)
    start = max((match.end() for match in re.finditer(r"[.!?]\s|\n", text)), default=0)
    sentence = text[start:].lstrip()
    found = _OF_TEN.search(sentence)
    n_numbers = len(re.findall(r"[0-9]+(?:\.[0-9]+)?", sentence))
    if found and n_numbers == 2 and not sentence.startswith(">"):
        before = sentence[: found.start()].strip(" *_([")
        if not before or _GIVES.search(before):
            return _checked(found, text[:start].strip(), cut=cut)
    return Rating(None, "no score", text)


def _checked(found: re.Match[str], before: str, *, cut: bool) -> Rating:
    if cut:
        return Rating(None, "cut at max_tokens", before)
    if found["of"] is not None and float(found["of"]) != BEST:
        return Rating(None, f"a scale to {found['of']}, not to 10", before)
    value = float(found["value"].replace("−", "-"))
    if not 0 <= value <= BEST:
        return Rating(None, "out of range", before)
    return Rating(value, "", before)
