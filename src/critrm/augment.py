"""Stage 2: pairs and critiques become critiqued pairs, one pair set for all arms (section 3.2).

Every arm (No-Critiques and one per critic) holds the same pairs in the same order; only the critique differs. A pair
that cannot be used in one arm is dropped from all of them, and counted by its reason.
"""

import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from critrm.critique_files import read_critiques
from critrm.encoding import beginning, encode_text
from critrm.errors import ConfigError, DataError
from critrm.models import load_tokenizer
from critrm.preferences import read_pairs
from critrm.prompts import reward_segments
from critrm.quality import check_critiques, find_contradictions, gate_critiques
from critrm.store import file_name, refuse_same_folders, write_records, write_text
from critrm.types import NO_CRITIC, SIDES, Critique, CritiquedPair, PreferencePair, Side

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Tokens = list[int]


@dataclass(frozen=True, slots=True)
class Budget:
    """How many tokens a reward model reads per completion, in which order, and what keeps a share of them."""

    max_length: int = 2048
    """Prompt + completion + critique, in tokens."""
    min_share: float = 0.25
    """The prompt and the completion each keep at least this share of `max_length` before the critique is touched."""
    critique_first: bool = False
    """The critique stands before the completion, not behind it."""


@dataclass(frozen=True, slots=True)
class Segments:
    """The tokens of one pair, by segment, after trimming to the budget."""

    prompt: Tokens
    completions: tuple[Tokens, Tokens]
    critiques: tuple[Tokens, Tokens]
    n_cut: tuple[int, int, int]
    """Tokens cut from the prompt, the completions and the critiques."""
    critique_first: bool = False

    @property
    def branches(self) -> tuple[Tokens, Tokens]:
        """What follows the shared prompt: completion and critique of the chosen, then of the rejected side."""
        parts = (self.critiques, self.completions) if self.critique_first else (self.completions, self.critiques)
        return (parts[0][0] + parts[1][0], parts[0][1] + parts[1][1])


@dataclass(frozen=True, slots=True)
class Augmented:
    """The arms, over one set of pairs, and what it took to get there."""

    arms: dict[str, tuple[CritiquedPair, ...]]
    """Critic's name -> critiqued pairs; always holds the No-Critiques arm."""
    dropped: dict[str, str]
    """Pair id -> why it is in no arm."""
    trimmed: dict[str, dict[str, int]]
    """Critic's name -> segment -> how many pairs had it cut to the budget."""

    def summary(self) -> dict[str, object]:
        """Counts of kept, trimmed and dropped pairs, dropped by reason."""
        n_kept = len(self.arms[NO_CRITIC])
        return {"kept": n_kept, "dropped": dict(Counter(self.dropped.values())), "trimmed": self.trimmed}


def segment_pair(item: CritiquedPair, encode: Callable[[str], Tokens], budget: Budget) -> Segments:
    """Tokenize a critiqued pair by segments and trim it to the budget.

    The beginning of the prompt goes first, then the end of a completion, the critique last: it is the signal.

    Args:
        item: the pair with its critiques.
        encode: text to token ids, without special tokens; text that spells one stays text.
        budget: how long prompt + completion + critique may be.
    """
    order = {"critique_first": budget.critique_first}
    texts = [
        reward_segments(item.pair.prompt, item.pair.completion(side), item.critique(side), **order) for side in SIDES
    ]
    prompt = encode(texts[0][0])
    completions, critiques = [encode(text[1]) for text in texts], [encode(text[2]) for text in texts]
    floor = int(budget.max_length * budget.min_share)

    excess = max(len(prompt) + len(y) + len(c) for y, c in zip(completions, critiques, strict=True)) - budget.max_length
    n_prompt = min(len(prompt), max(floor, len(prompt) - max(excess, 0)))
    n_cut = [len(prompt) - n_prompt, 0, 0]
    prompt = prompt[len(prompt) - n_prompt :]
    for side in range(2):
        room = budget.max_length - n_prompt - len(critiques[side])
        n_kept = min(len(completions[side]), max(floor, room))
        n_cut[1] += len(completions[side]) - n_kept
        completions[side] = completions[side][:n_kept]
        room = budget.max_length - n_prompt - n_kept
        n_cut[2] += max(len(critiques[side]) - room, 0)
        critiques[side] = critiques[side][:room]
    return Segments(
        prompt,
        (completions[0], completions[1]),
        (critiques[0], critiques[1]),
        (n_cut[0], n_cut[1], n_cut[2]),
        budget.critique_first,
    )


def augment_pairs(
    pairs: Sequence[PreferencePair],
    critiques: Mapping[str, Sequence[Critique]],
    *,
    encode: Callable[[str], Tokens] | None = None,
    budget: Budget | None = None,
    sample: int = 0,
    drop: Sequence[str] = (),
    strip_scores: bool = False,
    consistent_only: bool = False,
) -> Augmented:
    """Join pairs with the critiques of each critic and keep the pairs that every arm can use.

    Args:
        pairs: the preference pairs.
        critiques: critic's name -> its critiques; failed ones count as missing.
        encode: tokenizer function; given, pairs that become identical within the budget are dropped, and cuts counted.
        budget: the token budget; `Budget()` when None.
        sample: which of a critic's critiques of the same completion the arms hold.
        drop: flaws of `quality.REASONS` for which a critique is not used, nor its pair in any arm.
        strip_scores: take grades that a critique gives away ("8/10") out of its text.
        consistent_only: leave out pairs that a critic grades against their label; says that these are training pairs.

    Raises:
        ConfigError: a critic has the name of the No-Critiques arm, there is no such flaw, or `consistent_only` is asked
            for pairs of another split than training.
        DataError: a critic has critiques of none of the pairs, or no pair is left.
    """
    if NO_CRITIC in critiques:
        raise ConfigError(f"a critic cannot be called {NO_CRITIC!r}: that is the No-Critiques arm")
    refuse_same_folders(critiques)
    dropped: dict[str, str] = {}
    joined: dict[str, list[CritiquedPair | None]] = {}
    for critic, rows in critiques.items():
        rows = [row for row in rows if row.sample == sample]
        if consistent_only:
            for pair_id in find_contradictions(pairs, rows, split="train"):
                dropped.setdefault(pair_id, f"critique by {critic} contradicts the label")
        joined[critic] = _join(pairs, critic, usable_critiques(pairs, rows, drop, strip_scores), dropped)
    trimmed: dict[str, dict[str, int]] = {}
    if encode is not None:
        budget = budget or Budget()
        trimmed[NO_CRITIC] = _measure((CritiquedPair(pair=pair) for pair in pairs), encode, budget, dropped)
        for critic, arm in joined.items():
            trimmed[critic] = _measure(filter(None, arm), encode, budget, dropped)
    arms = {NO_CRITIC: tuple(CritiquedPair(pair=pair) for pair in pairs if pair.id not in dropped)}
    if not arms[NO_CRITIC]:
        raise DataError(f"no pair is left of {len(pairs)}: {dict(Counter(dropped.values()))}")
    for critic, arm in joined.items():
        arms[critic] = tuple(item for item in arm if item and item.pair.id not in dropped)
    return Augmented(arms, dropped, trimmed)


def usable_critiques(
    pairs: Sequence[PreferencePair], critiques: Sequence[Critique], drop: Sequence[str], strip_scores: bool
) -> Sequence[Critique]:
    """One critic's critiques as `augment_pairs` takes them: flawed ones failed, grades they give away taken out."""
    if not (drop or strip_scores):
        return critiques
    return gate_critiques(critiques, check_critiques(pairs, critiques), drop=drop, strip_scores=strip_scores)


def _join(
    pairs: Sequence[PreferencePair], critic: str, rows: Sequence[Critique], dropped: dict[str, str]
) -> list[CritiquedPair | None]:
    """The pairs in their order with their critiques, None where one is missing: `dropped` learns why."""
    usable: dict[Side, dict[str, Critique]] = {side: {} for side in SIDES}
    for row in rows:
        if not row.failure and row.text.strip():
            usable[row.side][row.pair_id] = row
    failures = {(row.pair_id, row.side): row.failure for row in rows if row.failure}
    arm: list[CritiquedPair | None] = []
    for pair in pairs:
        chosen, rejected = (usable[side].get(pair.id) for side in SIDES)
        if chosen and rejected:
            arm.append(
                CritiquedPair(
                    pair=pair,
                    critic=critic,
                    chosen_critique=chosen.text,
                    rejected_critique=rejected.text,
                    chosen_score=chosen.score,
                    rejected_score=rejected.score,
                )
            )
            continue
        arm.append(None)
        reason = f"no critique by {critic} of " + ("one side" if chosen or rejected else "both sides")
        failure = next((failures[pair.id, side] for side in SIDES if (pair.id, side) in failures), "")
        if failure:
            # By kind: "http 500: ..." differs from row to row.
            reason = f"critique by {critic}: " + failure.removeprefix("quality: ").partition(":")[0]
        dropped.setdefault(pair.id, reason)
    if not any(arm):
        raise DataError(
            f"the critiques by {critic!r} cover none of the {len(pairs)} pairs on both sides: "
            f"{dict(Counter(dropped.values()))} "
            f"(pair ids such as {rows[0].pair_id if rows else '-'!r}; expected such as {pairs[0].id!r})",
            field="pair_id",
        )
    return arm


def _measure(
    arm: Iterable[CritiquedPair], encode: Callable[[str], Tokens], budget: Budget, dropped: dict[str, str]
) -> dict[str, int]:
    n_trimmed = Counter({"prompt": 0, "completion": 0, "critique": 0})
    for item in arm:
        segments = segment_pair(item, encode, budget)
        if segments.completions[0] == segments.completions[1]:
            dropped.setdefault(item.pair.id, "completions identical within the token budget")
        for name, n_cut in zip(("prompt", "completion", "critique"), segments.n_cut, strict=True):
            n_trimmed[name] += n_cut > 0
    return dict(n_trimmed)


def text_encoder(tokenizer: "PreTrainedTokenizerBase") -> Callable[[str], Tokens]:
    """A tokenizer as a plain function from text to ids, special tokens neither added nor recognised.

    Text of a user or model that spells a control token (`<|im_end|>`) is encoded as the characters it consists of.
    """
    return lambda text: encode_text(tokenizer, text)


def command(
    pairs: Path,
    *,
    out: Path,
    critiques: tuple[Path, ...] = (),
    backbone: str = "",
    max_length: int = 2048,
    split: str = "",
    skip_bad: bool = False,
    allow_empty: bool = False,
    sample: int = 0,
    drop: str = "",
    strip_scores: bool = False,
    consistent_only: bool = False,
) -> None:
    """Join pairs and critiques into arms that share one set of pairs.

    Args:
        pairs: the preference pairs, in any dialect that `critrm preferences` reads.
        out: folder that gets one `<critic>.jsonl` per arm and `augment.json` with the counts.
        critiques: critique files, one per critic; the critic's name is the file's unless its rows say otherwise.
        backbone: the model to be trained; given, texts are measured with its tokenizer.
        max_length: tokens of prompt + completion + critique that the reward model reads.
        split: only pairs of this split.
        skip_bad: leave out rows that cannot be read instead of stopping at the first.
        allow_empty: keep empty completions and identical pairs, as the published counts of benchmarks do.
        sample: which of a critic's critiques of the same completion to use.
        drop: flaws for which a critique is not used, comma separated; `critrm quality` lists them.
        strip_scores: take grades that a critique gives away ("8/10") out of its text.
        consistent_only: for training pairs only: leave out those that a critic grades against their label.
    """
    named: dict[str, list[Critique]] = {}
    for path in critiques:
        for row in read_critiques(path):
            named.setdefault(row.critic, []).append(row)
    encode, budget = None, Budget(max_length)
    if backbone:
        tokenizer = load_tokenizer(backbone)
        encode, budget = text_encoder(tokenizer), Budget(max_length - len(beginning(tokenizer)))
    found = read_pairs(pairs, split=split, skip_bad=skip_bad, allow_empty=allow_empty).pairs
    augmented = augment_pairs(
        found,
        named,
        encode=encode,
        budget=budget,
        sample=sample,
        drop=tuple(reason.strip() for reason in drop.split(",") if reason.strip()),
        strip_scores=strip_scores,
        consistent_only=consistent_only,
    )
    write_augmented(out, augmented)
    table = Table(title=f"{len(augmented.arms[NO_CRITIC])} pairs in each arm, {len(augmented.dropped)} dropped")
    table.add_column("arm or reason")
    table.add_column("pairs", justify="right")
    for reason, count in Counter(augmented.dropped.values()).items():
        table.add_row(f"dropped: {reason}", str(count))
    for critic, arm in augmented.arms.items():
        cuts = ", ".join(f"{n} {name}s cut" for name, n in augmented.trimmed.get(critic, {}).items() if n)
        table.add_row(critic + (f" ({cuts})" if cuts else ""), str(len(arm)))
    Console().print(table)


def write_augmented(folder: Path, augmented: Augmented) -> None:
    """Write one JSONL file per arm, and the counts with the dropped pairs' reasons."""
    for critic, arm in augmented.arms.items():
        write_records(folder / f"{file_name(critic)}.jsonl", arm)
    facts = augmented.summary() | {"dropped_pairs": augmented.dropped}
    write_text(folder / "augment.json", json.dumps(facts, indent=2, ensure_ascii=False) + "\n")
