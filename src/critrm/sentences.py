"""Critiques cut into sentences, losslessly, and what each sentence is about.

Put together, the sentences are the text: whatever is said of a sentence is said of a stretch of the critique as the
reward model reads it. An abbreviation, the number of a list's item and code do not end a sentence.
"""

import re
from collections.abc import Iterator

from critrm.leaked_scores import cut_sentences

OTHER = "other"
"""The aspect of a sentence with none of the words."""

ASPECTS: dict[str, str] = {
    "instruction following": """
        instruct ask request constrain require format follow ignor obey specif omit exactly adher
        comply complie fulfil limit prompt task off-topic demand
    """,
    "correctness": """
        correct incorrect accura inaccura true false fact factual error erroneous mistake wrong
        right valid invalid contradict consisten inconsisten hallucinat fabricat invent misstat
        misread logic reasoning calculat bug arithmetic verif truth untru
    """,
    "honesty": """
        honest dishonest admit overconfid uncertain hedg caveat acknowledg disclos transparen
        mislead deceptive
    """,
    "helpfulness": """
        helpful unhelpful useful useless usable practical actionable relevan irrelevan answer
        address complet incomplet thorough insight vague generic example missing lack
    """,
    "safety": """
        harmf harmless harms unsafe safe danger risk toxic offensive hate illegal unethical ethic
        privacy refus declin appropriate inappropriate biased discriminat
    """,
    "style": """
        clear unclear clarity structur organi tone style readab fluent grammar spelling polite
        wording phras coheren confus warm friendly natural
    """,
    "length": """
        concise brief short long length verbose wordy padding rambl repeti repeat redundan
        detail depth terse succinct filler elaborat
    """,
}
"""Aspect -> how its words begin: those of the critics' templates (correctness holds truthfulness), and three more."""

_PATTERNS = {
    aspect: re.compile(rf"\b(?:{'|'.join(map(re.escape, words.split()))})\w*", re.IGNORECASE)
    for aspect, words in ASPECTS.items()
}
_CODE = re.compile(r"```.*?(?:```|\Z)|`[^`\n]+`", re.DOTALL)
_ALWAYS_GOES_ON = re.compile(
    r"(?:\b(?:e\.\s?g|i\.\s?e|cf|vs|Dr|Mrs?|Ms|Prof|St|Fig|Eq|approx|incl|resp)"
    # George W. and J. K., but not `Option B.`
    r"|\b(?!Option|Answer|Choice|Plan|Part|Step|Class|Group|Team|Type|Grade|Response|Vitamin)[A-Z]\w*\.?\s[A-Z])\.$"
)
_MAY_GO_ON = re.compile(r"\b(?:etc|al|No|Nos|p|pp|vol|ca|est|[ap]\.m|U\.S|U\.K)\.$")
_ITEM = re.compile(r"\s*[-*•(]*(?:\d{1,3}|[a-zA-Z]|[ivx]{1,4})[.)]+$")
_CJK_END = re.compile(r"(?<=[。！？])(?![。！？”’」』）])")


def split_sentences(text: str) -> tuple[str, ...]:
    """Sentences and lines, each with the space after it; put together they are the text.

    Only a text without any word or sign gives a sentence without one.
    """
    code = [match.span() for match in _CODE.finditer(text)]
    sentences: list[str] = []
    start = end = 0
    for piece in _pieces(text):
        end += len(piece)
        said = text[start:end].rstrip()
        in_code = any(first < end < last for first, last in code)
        if end < len(text) and (in_code or not re.search(r"\w", said) or _goes_on(said, text[end:])):
            continue
        sentences.append(text[start:end])
        start = end
    if len(sentences) > 1 and not re.search(r"\w", sentences[-1]):
        last = sentences.pop()
        sentences[-1] += last
    return tuple(sentences)


def _pieces(text: str) -> Iterator[str]:
    for piece in cut_sentences(text):
        yield from (part for part in _CJK_END.split(piece) if part)


def _goes_on(said: str, rest: str) -> bool:
    """Whether what ends here is not yet a sentence."""
    if _ITEM.fullmatch(said) or _ALWAYS_GOES_ON.search(said):
        return True
    return bool(_MAY_GO_ON.search(said)) and bool(re.match(r"[a-z0-9(]", rest))


def aspect_of(sentence: str) -> str:
    """The aspect that most words of a sentence are of; the first of `ASPECTS` where two are level, else `other`."""
    counts = {aspect: len(pattern.findall(sentence)) for aspect, pattern in _PATTERNS.items()}
    best = max(counts, key=lambda aspect: counts[aspect])
    return best if counts[best] else OTHER
