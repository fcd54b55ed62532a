"""A judge's reply -> its rating on the Likert scale of 0 to 10 (section 5.3), or why it has none.

The rating stands at the end of a reply, behind a label: `Score: 7`, `Rating: **7**/10`. Only the last label counts, so
a score that the judge quotes from the response is not taken for its own. A number alone is a rating too, and so are a
last sentence such as `I would give it 8.5/10` and a reply that begins with the rating and then gives reasons. Anything
else is unscored: never a middle grade, never a guess.
"""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

from critrm.types import TokenChoice

BEST = 10.0
NO_PROBABILITIES = "no usable token probabilities at the rating"
NOT_WHOLE = "a rating that is no whole number has no expected score"

_GRADES = {str(grade): grade for grade in range(int(BEST) + 1)}
_AROUND = " \t*_`\"'"
"""What a grade's token may hold beside the grade."""
_LEAST_SHARE = 0.5
"""A place where less of the probability is on grades was not where the model was about to write one."""
_LEAST_ONE = 0.005
"""So much on `1` may count as 1 where nobody knows how much of it is 10: at most 0.045 points of a mean."""

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
    start: int = -1
    """Where the rating's first digit is in the reply without the spaces around it; -1 where there is none."""


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


def expected_rating(reply: str, choices: Sequence[TokenChoice], *, cut: bool = False) -> float | None:
    """The mean of the grades 0 to 10 by the probabilities that a judge gave them where it wrote its rating.

    That is sum(p_i * i) / sum(p_i) over the tokens that are grades. Where 10 is two tokens, `1` has the probability of
    both; how much is either's shows in the tokens behind it.

    Args:
        reply: the whole reply.
        choices: its tokens, with the likeliest alternatives of each.
        cut: the reply was cut at its length limit.

    Returns:
        0 to 10; None where the reply has no rating or no whole one, no probabilities came, they are mostly not on
        grades, or much is on a `1` that nobody can tell from 10.
    """
    rating = read_rating(reply, cut=cut)
    place = "".join(choice.text for choice in choices).find(reply.strip())
    if rating.likert is None or place < 0:
        return None
    ends = list(accumulate(len(choice.text) for choice in choices))
    index = next(i for i, end in enumerate(ends) if end > place + rating.start)
    written = choices[index].text.strip(_AROUND)
    if written not in (f"{rating.likert:g}", "1" if rating.likert == BEST else ""):
        return None
    shares = _shares(choices[index].likeliest)
    if shares[1] > 0 and not shares[10]:
        following = choices[index].after_one
        if written == "1" and not following:
            following = choices[index + 1].likeliest if index + 1 < len(choices) else ()
        if following:
            shares[1], shares[10] = _split_one(shares[1], following)
        elif written == "1" or shares[1] > _LEAST_ONE:
            return None
    total = sum(shares)
    return sum(grade * share for grade, share in enumerate(shares)) / total if total >= _LEAST_SHARE else None


def _shares(likeliest: Sequence[tuple[str, float]]) -> list[float]:
    """The probability of each grade, from the tokens that are one."""
    shares = [0.0] * (int(BEST) + 1)
    for text, logprob in likeliest:
        grade = _GRADES.get(text.strip(_AROUND))
        if grade is not None:
            shares[grade] += math.exp(logprob)
    return shares


def _split_one(share: float, following: Sequence[tuple[str, float]]) -> tuple[float, float]:
    """How much of a `1` is 1 and how much 10, by what follows it; 11 to 19 are neither."""
    digits = sum(math.exp(logprob) for text, logprob in following if text[:1].isdecimal())
    zero = sum(math.exp(logprob) for text, logprob in following if text.startswith("0"))
    return share * max(0.0, 1 - digits), share * zero


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
            return _checked(found, text[:start].strip(), cut=cut, offset=len(text) - len(sentence))
    return Rating(None, "no score", text)


def _checked(found: re.Match[str], before: str, *, cut: bool, offset: int = 0) -> Rating:
    if cut:
        return Rating(None, "cut at max_tokens", before)
    if found["of"] is not None and float(found["of"]) != BEST:
        return Rating(None, f"a scale to {found['of']}, not to 10", before)
    value = float(found["value"].replace("−", "-"))
    if not 0 <= value <= BEST:
        return Rating(None, "out of range", before)
    return Rating(value, "", before, offset + found.start("value"))
