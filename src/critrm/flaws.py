"""What can be wrong with a critique: one plain function per flaw, from text to bool.

They are meant to be sure rather than complete: each was tried on thousands of critiques of a strong and of a very weak
critic, and of the strong one's none is flagged.
"""

import re
import unicodedata
from collections import Counter
from collections.abc import Sequence

ECHO_WORDS = 8
"""Length of the word sequences that count as copied."""
ECHO_SHARE = 0.5
LOOP_SHARE = 0.5
OPENING_WORDS = 12
OPENING_SHARE = 0.05
"""An opening is boiler-plate when it begins so many of a critic's critiques, and at least three."""

_CANNOT = (
    r"(?:cannot|can['’]?t|can\s+not|won['’]?t|will\s+not|do(?:n['’]t|\s+not)\s+have\s+(?:the\s+ability|access)|"
    r"(?:(?:am|are|['’]m|['’]re)\s+)?(?:not\s+(?:able|allowed|capable|comfortable|designed|equipped|programmed)|unable)"
    r"(?:\s+(?:to|of|with))?)"
)
_CRITIQUE = (  # "give this response full marks" and "tell whether it is right" are no refusals
    r"(?:\s+(?:you|any|an?|the|this|that|my|such|more|further|kind|sort|of|response|answer|it|detailed|fair|honest|proper|"
    r"specific|useful|personal))*\s+(?:critiqu|feedback|assessment|evaluation|review|judge?ment|opinion|analysis)\w*"
    r"(?!\s+(?:an?|full|high|top|more|much|many)\b)"
)
_TASK = (
    r"(?:answer|assist|complet|comply|continu|creat|critiqu|discuss|do(?:ing)?\b|engag|evaluat|fulfil|generat|offer|"
    r"provid|satisfy|support|writ|help(?!\s+(?:but|feeling|finding|noticing|thinking|wondering)\b)|"
    rf"(?:giv(?:e|ing)|tell(?:ing)?\s+you){_CRITIQUE})"
)
_REFUSES = re.compile(rf"\b(?:I|we)\s*(?:\w+ly\s+|just\s+)?{_CANNOT}\s+(?:\w+ly\s+)?{_TASK}", re.IGNORECASE)
_QUOTED = re.compile(r"\"[^\"]*\"|“[^”]*”")
_SPEAKER = r"(?:User|Chatbot|System|Human|Assistant)\s*:"
_FIRST_TURN = re.compile(rf"\W*{_SPEAKER}")
_TURN = re.compile(rf"^[^\w\n]*{_SPEAKER}", re.MULTILINE)
_ENDS = re.compile(r"[.!?。！？؟।…][\"'”’»)\]*_`」』】]*\s*$")


_JUDGING_WORDS = """
about accur actua answe appro asked aspec assis bette brief chatb clear close compl conci conta conve corre
could criti depth detai direc enoug entir examp excel expla factu follo furth gener given great helpf helps
hones howev impro incor infor insig instr irrel lacks lengt menti messa missi model needs offer other overa
overl parag perfe pleas point preci previ promp provi quali quest reall relev reply reque respo right sente
short shoul simpl since speci state still struc sugge their there these thing think thoug topic truth under
usefu vague value where which while witho wordy would write wrong
"""
_JUDGING = frozenset(_JUDGING_WORDS.split())
"""How the words of judging begin, by their first five letters."""


def is_refusal(text: str) -> bool:
    """The critic declines to write a critique, in its first sentences and in the first person."""
    return bool(_REFUSES.search(_QUOTED.sub("", text)[:300]))


def is_dialogue(text: str) -> bool:
    """The critic plays on the conversation (`User:`, `Chatbot:`) instead of judging it."""
    return bool(_FIRST_TURN.match(text)) or len(_TURN.findall(text)) >= 2


def is_echo(text: str, *shown: str) -> bool:
    """Half of the critique or more is copied, in sequences of eight words, from what the critic was shown."""
    return copied_share(text, *shown) >= ECHO_SHARE


def copied_share(text: str, *shown: str) -> float:
    """Share of a critique's words that lie in a sequence of `ECHO_WORDS` words of the shown texts; 0 to 1."""
    words = _words(text)
    n = min(ECHO_WORDS, len(words))
    if n < 4:
        return 0.0
    known = {each for source in shown for each in _sequences(_words(source), n)}
    copied = {i + k for i, each in enumerate(_sequences(words, n)) if each in known for k in range(n)}
    return len(copied) / len(words)


def is_loop(text: str) -> bool:
    """Half of the critique or more repeats itself, in sequences of eight words."""
    sequences = _sequences(_words(text), ECHO_WORDS)
    return len(sequences) >= ECHO_WORDS and 1 - len(set(sequences)) / len(sequences) >= LOOP_SHARE


def is_truncated(text: str, finish_reason: str = "") -> bool:
    """The call ran into its token limit and the text breaks off within a sentence."""
    return finish_reason == "length" and not _ENDS.search(text)


def is_generic(text: str) -> bool:
    """The critique fits any response: it has no number and no word of five letters or more but those of judging."""
    words = _words(text)
    return not any((len(word) >= 5 and word[:5] not in _JUDGING) or word.isdigit() for word in words)


def find_boilerplate(texts: Sequence[str]) -> list[bool]:
    """Which of a critic's critiques, of different completions, are the same text, or share a long opening.

    Args:
        texts: one critic's critiques; those of one completion should be given once.

    A whole text must come three times; an opening of `OPENING_WORDS` words in `OPENING_SHARE` of the texts too.
    """
    words = [_words(text) for text in texts]
    wholes = Counter(tuple(each) for each in words)
    openings = Counter(tuple(each[:OPENING_WORDS]) for each in words if len(each) >= OPENING_WORDS)
    least = max(3.0, OPENING_SHARE * len(texts))
    return [wholes[tuple(each)] >= 3 or openings[tuple(each[:OPENING_WORDS])] >= least for each in words]


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())


def _sequences(words: list[str], n: int) -> list[tuple[str, ...]]:
    return list(zip(*(words[start:] for start in range(n)), strict=False))


# Frequent words that hardly occur in the other languages of the table.
_STOP_WORDS = {
    "English": "the and of to is that it this for with are was response but",
    "German": "der die und ist nicht das ein eine zu auf mit für von den dem sich auch",
    "French": "le la les est une des et dans pour que qui pas sur avec cette du il elle",
    "Spanish": "el la los las es una en y que del por para con no su se más pero",
    "Italian": "il è una di che non per con del della gli sono anche più questo alla",
    "Portuguese": "o os as é uma em não que da para com se mais mas resposta dos",
    "Dutch": "de het een en van is niet dat op te zijn voor met maar ook deze",
}
_STOP_SETS = {name: frozenset(words.split()) for name, words in _STOP_WORDS.items()}
UNREADABLE = "unreadable"


def guess_language(text: str) -> str:
    """The language of a text by its stop words, else its script (`CYRILLIC`), `unreadable`, or "" where unsure."""
    letters = [letter for letter in text if letter.isalpha()]
    if len(text.strip()) and len(letters) < 0.3 * len(text.replace(" ", "")) or text.count("\ufffd") > len(text) / 50:
        return UNREADABLE
    scripts = Counter(unicodedata.name(letter, "?").partition(" ")[0] for letter in letters[:2000])
    script, count = scripts.most_common(1)[0] if scripts else ("", 0)
    if script != "LATIN":
        return script if count >= 20 and count > len(letters[:2000]) / 2 else ""
    words = _words(text)
    found = {name: [word for word in words if word in stops] for name, stops in _STOP_SETS.items()}
    best, second = sorted(found, key=lambda name: len(found[name]), reverse=True)[:2]
    enough = len(found[best]) >= max(0.12 * len(words), 1.5 * len(found[second])) and len(set(found[best])) >= 4
    return best if enough else ""
