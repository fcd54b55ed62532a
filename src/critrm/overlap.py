"""Contamination: prompts of the training data that are in the test data, exactly or nearly.

Exact means equal letters and digits, whatever the case, punctuation and spaces. Near means that the two prompts share
most of their sequences of three words (Jaccard similarity), found with MinHash (Broder, 1997) and then checked. In
scripts that put no spaces between words, such as Chinese, each letter counts as a word.
"""

import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from critrm.dialects import DIALECTS, TURN, Fields, NoPreference
from critrm.errors import ConfigError, DataError
from critrm.store import read_rows, write_records
from critrm.types import PreferencePair

SHINGLE = 3
UNSPACED = re.compile("[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\U00020000-\U0003ffff]")
"""Thai, Lao, Burmese, Khmer, Japanese kana and Chinese characters, in which words are not set apart."""
N_HASHES = 128


@dataclass(frozen=True, slots=True, kw_only=True)
class Match:
    """A test prompt that is in the training data."""

    test: str
    train: str
    similarity: float
    """Jaccard similarity of their word triples; 1 for an exact match."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Overlap:
    """How much of the test data is in the training data, in distinct prompts."""

    n_train: int
    n_test: int
    exact: tuple[Match, ...]
    near: tuple[Match, ...]
    """Test prompts without an exact match, each with the training prompt most like it."""


def normalised(prompt: str) -> str:
    """Letters and digits in lower case, with single spaces between words."""
    return " ".join(re.findall(r"\w+", unicodedata.normalize("NFKC", prompt).casefold()))


def find_overlap(train: Iterable[str], test: Iterable[str], *, threshold: float | None = 0.7) -> Overlap:
    """Find the test prompts that the training prompts hold.

    Args:
        train: training prompts.
        test: test prompts.
        threshold: least similarity of a near duplicate, above 0 and at most 1; None looks for exact ones only, which
            needs no package.

    Raises:
        ConfigError: such a threshold makes no sense.
    """
    if threshold is not None and not 0 < threshold <= 1:
        raise ConfigError(f"the threshold must be above 0 and at most 1, not {threshold}")
    # Prompts without a letter or digit are no evidence of anything.
    known, asked = ({key: text for text in texts if (key := normalised(text))} for texts in (train, test))
    exact = [Match(test=text, train=known[key], similarity=1.0) for key, text in asked.items() if key in known]
    rest = {key: text for key, text in asked.items() if key not in known}
    near = _near(known, rest, threshold) if threshold is not None and known and rest else []
    return Overlap(n_train=len(known), n_test=len(asked), exact=tuple(exact), near=tuple(near))


def _shingles(key: str) -> frozenset[str]:
    words = UNSPACED.sub(r" \g<0> ", key).split()
    return frozenset(" ".join(words[n : n + SHINGLE]) for n in range(max(1, len(words) - SHINGLE + 1)))


def _near(known: Mapping[str, str], asked: Mapping[str, str], threshold: float) -> list[Match]:
    from datasketch import MinHash, MinHashLSH

    def sketch(shingles: frozenset[str]) -> MinHash:
        hashes = MinHash(num_perm=N_HASHES)
        hashes.update_batch([shingle.encode() for shingle in shingles])
        return hashes

    # A little below the threshold, since MinHash is an estimate; what it finds is checked.
    index = MinHashLSH(threshold=max(0.05, threshold - 0.1), num_perm=N_HASHES)
    shingles = {key: _shingles(key) for key in known}
    for key in known:
        index.insert(key, sketch(shingles[key]), check_duplication=False)
    found = []
    for key, text in asked.items():
        own = _shingles(key)
        similarity = {
            other: len(own & shingles[other]) / len(own | shingles[other]) for other in index.query(sketch(own))
        }
        # By name where two are alike, so that the same files give the same report.
        best = max(similarity, key=lambda other: (similarity[other], other), default="")
        if best and similarity[best] >= threshold:
            found.append(Match(test=text, train=known[best], similarity=similarity[best]))
    return found


def read_prompts(path: str | Path) -> list[str]:
    """Read the prompts of any file with prompts; pairs, labels and completions are not needed.

    Taken are the columns `conversation_input`, `instruction` (with `input`), `prompt`, `question` or `input`; else the
    prompt that a dialect of preference pairs finds in the row.

    Raises:
        DataError: a row has no prompt; names file and line.
    """
    prompts = []
    for number, row in read_rows(path):
        prompt = _prompt(row)
        if prompt is None:
            raise DataError(f"no prompt in the columns {sorted(row)}", path=str(path), line=number)
        prompts.append(prompt)
    return prompts


def _prompt(row: Fields) -> str | None:
    if isinstance(row.get("instruction"), str):
        return "\n\n".join(str(row[name]) for name in ("instruction", "input") if row.get(name))
    for name in ("conversation_input", "prompt", "question", "input"):
        if row.get(name):
            return _text(row[name])
    for matches, read in DIALECTS.values():
        if matches(row):
            try:
                return _joined(read(row)["prompt"])
            except NoPreference:
                return ""  # a tie: its prompt trains nobody
            except DataError:
                return None
    return None


def _text(value: Any) -> str | None:
    if isinstance(value, str):
        return " ".join(part for part in TURN.split(value) if part not in ("Human", "Assistant"))
    if isinstance(value, list) and all(
        isinstance(each, dict) and isinstance(each.get("content"), str) for each in value
    ):
        return "\n\n".join(each["content"] for each in value)
    return None


def _joined(messages: Iterable[Any]) -> str:
    return "\n\n".join(message.content for message in messages)


def pair_prompts(pairs: Iterable[PreferencePair]) -> list[str]:
    """The prompts of pairs, whole conversations as one text."""
    return [_joined(pair.prompt) for pair in pairs]


def overlap_warning(train: Sequence[PreferencePair], test: Sequence[PreferencePair], *, name: str = "test") -> str:
    """One sentence if test prompts are in the training pairs word for word; empty if none is. Needs no package."""
    found = find_overlap(pair_prompts(train), pair_prompts(test), threshold=None)
    if not found.exact:
        return ""
    return (
        f"{len(found.exact)} of the {found.n_test} prompts of {name} are in the training pairs, such as "
        f"{found.exact[0].test[:60]!r}: its score will be too high. `critrm overlap` lists them"
    )


def command(train: Path, test: Path, *, threshold: float = 0.7, examples: int = 5, out: Path | None = None) -> None:
    """Find test prompts that are in the training data, exactly or nearly.

    Args:
        train: a file with the training prompts: pairs in any format, or any rows with a prompt.
        test: a file with the test prompts.
        threshold: least similarity, 0 to 1, of a near duplicate (Jaccard similarity of word triples).
        examples: how many of each kind to show.
        out: write all matches here, as JSONL.
    """
    found = find_overlap(read_prompts(train), read_prompts(test), threshold=threshold)
    console = Console()
    table = Table(title=f"{found.n_test} distinct test prompts, {found.n_train} distinct training prompts")
    for title in ("test prompts in the training data", "prompts", "share"):
        table.add_column(title, justify="left" if title.startswith("test") else "right")
    for kind, matches in (("exactly", found.exact), (f"nearly (similarity {threshold:g} or more)", found.near)):
        share = f"{len(matches) / found.n_test:.1%}" if found.n_test else "-"
        table.add_row(kind, str(len(matches)), share)
    console.print(table)
    for title, matches in (("Exact", found.exact), ("Near", found.near)):
        for match in matches[:examples]:
            console.print(Text(f"{title} {match.similarity:.2f}: {match.test[:100]!r}"), soft_wrap=True)
    if out is not None:
        write_records(out, [*found.exact, *found.near])
        console.print(f"Matches: {out}", soft_wrap=True, markup=False)
