"""Checks a backbone, its tokenizer and a data set before money is spent on them (sections 3.2, 4.1 and 4.2).

Each check is a function that returns findings; a finding says what is so and what to do about it. The checks are those
whose absence has cost the field's users a run: a padding token that hides the last token, a beginning-of-sequence token
that is there twice, a chat template that writes today's date, rewards that change with the batch.
"""

import json
import math
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from rich.console import Console
from rich.table import Table
from rich.text import Text

from critrm.augment import Budget, augment_pairs, segment_pair, text_encoder
from critrm.critique_files import read_critiques
from critrm.errors import ConfigError, DataError
from critrm.models import load_tokenizer
from critrm.preferences import read_pairs
from critrm.store import write_text
from critrm.types import NO_CRITIC, RATINGS, SIDES, Critique, CritiquedPair, Message, PreferencePair, Side

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from critrm.reward_model import RewardModel

Verdict = Literal["good", "note", "warning", "problem"]
MARKS: dict[Verdict, str] = {"good": "green", "note": "cyan", "warning": "yellow", "problem": "red"}

_Rewards = dict[tuple[str, Side], float]
"""Pair id and side -> reward."""

TOLERANCE = 1e-4
"""Rewards of one text may differ by so much in fp32, relative to the largest, before a check fails."""
N_SCORED = 4
"""Pairs that the model's checks score."""
TOO_MANY_CUT = 0.05
"""More pairs cut than this share is worth a warning."""
MUCH_LONGER = 0.65
"""A chosen completion that is the longer one more often than this invites a length bias."""


@dataclass(frozen=True, slots=True)
class Finding:
    """What a check found, and what to do about it."""

    check: str
    verdict: Verdict
    what: str
    advice: str = ""


def check_tokenizer(tokenizer: "PreTrainedTokenizerBase") -> list[Finding]:
    """Padding, the beginning-of-sequence token, and the chat template."""
    return [*_padding(tokenizer), *_doubled_bos(tokenizer), *_dated_template(tokenizer)]


def _padding(tokenizer: "PreTrainedTokenizerBase") -> Iterator[Finding]:
    check = "padding token"
    if tokenizer.pad_token_id is None:
        yield Finding(check, "note", "there is none", "critrm saves the end token as padding; rows never end in it.")
    elif tokenizer.pad_token_id == tokenizer.eos_token_id:
        yield Finding(
            check,
            "note",
            f"it is the end token {tokenizer.eos_token!r}",
            "Do not append an end token to what is scored: transformers would score the token before it.",
        )
    else:
        yield Finding(check, "good", f"{tokenizer.pad_token!r}, apart from the end token {tokenizer.eos_token!r}")


def _doubled_bos(tokenizer: "PreTrainedTokenizerBase") -> Iterator[Finding]:
    check = "beginning-of-sequence token"
    bos = tokenizer.bos_token_id
    if bos is None or not tokenizer.chat_template:
        yield Finding(check, "good", "nothing that could be doubled")
        return
    rendered = tokenizer.apply_chat_template([{"role": "user", "content": "Hello"}], tokenize=False)
    if tokenizer.encode(str(rendered))[:2] == [bos, bos]:
        yield Finding(
            check,
            "warning",
            "the chat template and the tokenizer both write one",
            "critrm writes it once. Elsewhere, encode a rendered chat with add_special_tokens=False.",
        )
    else:
        yield Finding(check, "good", "written once")


def _dated_template(tokenizer: "PreTrainedTokenizerBase") -> Iterator[Finding]:
    check = "chat template"
    template = tokenizer.chat_template
    text = template if isinstance(template, str) else json.dumps(template)
    if not template:
        yield Finding(
            check, "note", "there is none", "Prompts are written as `User:` and `Chatbot:` text (Appendix A)."
        )
    elif "strftime_now" in text:
        yield Finding(
            check,
            "warning",
            "it writes today's date",
            "Critiques by this model change from day to day; give it a template with a fixed date.",
        )
    else:
        yield Finding(check, "good", "the same every day")


def check_reward_model(model: "RewardModel", items: Sequence[CritiquedPair]) -> list[Finding]:
    """Rewards do not depend on the batch, padding or order, and survive saving and plain transformers.

    Args:
        model: a reward model, or a backbone under a new head, in fp32.
        items: pairs to score; the first few are used.
    """
    items = list(items[:N_SCORED])
    together = _rewards(model, items, max_tokens_per_step=1 << 20)
    scale = max(map(abs, together.values())) or 1.0
    return [
        _same(
            "rewards and the batch",
            together,
            _rewards(model, items, max_tokens_per_step=1),
            scale,
            "Pairs in one batch change each other's rewards: the attention of this architecture is not supported.",
        ),
        _same(
            "rewards and the order",
            together,
            _rewards(model, items[::-1], max_tokens_per_step=1 << 20),
            scale,
            "The order of the pairs changes their rewards: is some dropout left on?",
        ),
        _same(
            "rewards and padding",
            together,
            _padded_rewards(model, items),
            scale,
            "Plain transformers gives other rewards to a padded batch: do not serve this model with padding.",
        ),
        _reloaded(model, items, together, scale),
    ]


def _rewards(model: "RewardModel", items: Sequence[CritiquedPair], *, max_tokens_per_step: int) -> _Rewards:
    scores = model.score(items, max_tokens_per_step=max_tokens_per_step)
    return {(score.pair_id, side): getattr(score, side) for score in scores for side in SIDES}


def _padded_rewards(model: "RewardModel", items: Sequence[CritiquedPair]) -> _Rewards:
    """Plain transformers on one right-padded batch of whole rows."""
    import torch

    rows = [pair.prompt + branch for pair in map(model.encode, items) for branch in pair.branches]
    width, pad = max(map(len, rows)), model.model.config.pad_token_id
    device = model.model.device
    ids = torch.tensor([row + [pad] * (width - len(row)) for row in rows], device=device)
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows], device=device)
    with torch.inference_mode():
        logits = model.model(input_ids=ids, attention_mask=mask).logits
    places = [(item.pair.id, side) for item in items for side in SIDES]
    return dict(zip(places, logits[:, 0].tolist(), strict=True))


def _same(check: str, expected: _Rewards, found: _Rewards, scale: float, advice: str) -> Finding:
    differences = [abs(reward - found[place]) / scale for place, reward in expected.items()]
    n_bad = sum(not math.isfinite(difference) for difference in differences)
    if n_bad:
        what = f"{n_bad} of {len(differences)} rewards are not finite numbers"
        return Finding(check, "problem", what, "The weights are damaged, or something overflows: look for NaN in them.")
    apart = max(differences)
    if apart <= TOLERANCE:
        return Finding(check, "good", f"the same to {apart:.0e}")
    return Finding(check, "problem", f"they differ by {apart:.1e} of the largest reward", advice)


def _reloaded(model: "RewardModel", items: Sequence[CritiquedPair], expected: _Rewards, scale: float) -> Finding:
    from critrm.reward_model import RewardModel

    with tempfile.TemporaryDirectory() as folder:
        model.save(folder)
        again = RewardModel.load(folder, device="cpu", precision="fp32")
        found = _rewards(again, items, max_tokens_per_step=1 << 20)
    advice = "The head or the weights are lost on disk: do not train this backbone before that is mended."
    return _same("saved and loaded", expected, found, scale, advice)


def check_pairs(pairs: Sequence[PreferencePair]) -> list[Finding]:
    """Contradictions, repeated prompts, ratings and length."""
    return [*_contradictions(pairs), _ratings(pairs), _lengths(pairs)]


def _contradictions(pairs: Sequence[PreferencePair]) -> Iterator[Finding]:
    seen = {(pair.prompt, pair.chosen, pair.rejected) for pair in pairs}
    n_contrary = sum((pair.prompt, pair.rejected, pair.chosen) in seen for pair in pairs)
    n_repeated = len(pairs) - len(seen)
    if n_contrary:
        what = f"{n_contrary} pairs are there a second time with the opposite label"
        yield Finding("labels", "warning", what, "Decide which label holds, or remove both.")
    else:
        yield Finding("labels", "good", "no pair contradicts another")
    if n_repeated:
        what = f"{n_repeated} of {len(pairs)} are copies"
        yield Finding(
            "copies", "warning", what, "Remove them: they count twice, and may fall on both sides of a split."
        )
    else:
        yield Finding("copies", "good", "no pair is there twice")


def _ratings(pairs: Sequence[PreferencePair]) -> Finding:
    check = "ratings and margins"
    counts = Counter(pair.rating for pair in pairs if pair.rating)
    n_margins = sum(pair.margin is not None for pair in pairs)
    parts = [f"{counts[rating]} {rating}" for rating in RATINGS if counts[rating]]
    parts += [f"{n_margins} with a margin of their own"] * bool(n_margins)
    if not parts:
        advice = "Equation 1 is used without a margin; nothing is lost but the margin."
        return Finding(check, "note", "the pairs carry none", advice)
    n_none = sum(pair.rating is None and pair.margin is None for pair in pairs)
    if n_none:
        return Finding(
            check, "warning", f"{', '.join(parts)}, {n_none} without", "Pairs without a rating have margin 0."
        )
    return Finding(check, "good", ", ".join(parts))


def _lengths(pairs: Sequence[PreferencePair]) -> Finding:
    check = "length"
    unequal = [pair for pair in pairs if len(pair.chosen) != len(pair.rejected)]
    share = sum(len(pair.chosen) > len(pair.rejected) for pair in unequal) / len(unequal) if unequal else 0.5
    what = f"the chosen completion is the longer one in {share:.0%} of the pairs"
    if max(share, 1 - share) > MUCH_LONGER:
        advice = "A reward model may learn length. Compare with the longer-wins baseline, and test on matched lengths."
        return Finding(check, "warning", what, advice)
    return Finding(check, "good", what)


def check_lengths(
    arm: Sequence[CritiquedPair], encode: Callable[[str], list[int]], *, max_length: int
) -> list[Finding]:
    """How many pairs of an arm are cut to the token budget, by segment, and how many become identical by it."""
    cut, n_identical = Counter[str](), 0
    for item in arm:
        segments = segment_pair(item, encode, Budget(max_length))
        for name, n in zip(("prompt", "completion", "critique"), segments.n_cut, strict=True):
            cut[name] += n > 0
        n_identical += segments.completions[0] == segments.completions[1]
    check = f"{max_length} tokens, critic {arm[0].critic}"
    findings = []
    for name, n in cut.items():
        share = n / len(arm)
        if share:
            verdict: Verdict = "warning" if share > TOO_MANY_CUT or name == "critique" else "note"
            advice = "Train with a longer --max-length, or ask the critic for less."
            findings.append(Finding(check, verdict, f"{name} cut in {n} of {len(arm)} pairs ({share:.0%})", advice))
    if n_identical:
        what = f"{n_identical} pairs become identical when cut"
        advice = "They are dropped from all arms. Train with a longer --max-length."
        findings.append(Finding(check, "warning", what, advice))
    return findings or [Finding(check, "good", "nothing is cut")]


def check_critics(
    pairs: Sequence[PreferencePair], critiques: Sequence[Critique], *, trained_with: str = ""
) -> list[Finding]:
    """Each critic's share of the pairs, and whether it is the one that a reward model was trained with."""
    findings, covered = [], []
    for critic in sorted({row.critic for row in critiques}):
        rows = _first_sample([row for row in critiques if row.critic == critic])
        places = {(row.pair_id, row.side) for row in rows if not row.failure and row.text.strip()}
        covered.append({pair.id for pair in pairs if all((pair.id, side) in places for side in SIDES)})
        n_both = len(covered[-1])
        what = f"critiques of both completions for {n_both} of {len(pairs)} pairs"
        if n_both == len(pairs):
            findings.append(Finding(f"critic {critic}", "good", what))
        else:
            advice = "Pairs without both are dropped from all arms: run `critrm critique` again with --retry-failed."
            findings.append(Finding(f"critic {critic}", "warning" if n_both else "problem", what, advice))
        if trained_with and critic != trained_with:
            advice = "Train and test critiques have to come from one critic (section 4.2)."
            what = f"the reward model was trained with critiques by {trained_with!r}"
            findings.append(Finding(f"critic {critic}", "problem", what, advice))
    if all(covered) and covered and not set.intersection(*covered):
        what = f"no pair has critiques by all {len(covered)}"
        findings.append(Finding("critics", "problem", what, "The arms share their pairs: none would be left."))
    return findings


def _first_sample(critiques: Sequence[Critique]) -> list[Critique]:
    """What an arm is made of where a critic was asked several times."""
    first = min((row.sample for row in critiques), default=0)
    return [row for row in critiques if row.sample == first]


def command(
    *,
    backbone: str = "",
    model: Path | None = None,
    pairs: str = "",
    critiques: tuple[Path, ...] = (),
    max_length: int | None = None,
    split: str = "",
    load_model: bool = True,
    out: Path | None = None,
) -> None:
    """Check a backbone or reward model, its tokenizer and a data set before money is spent.

    Args:
        backbone: the language model to be trained: hub id, folder, or `embedded:NAME`.
        model: a reward model's folder, instead of a backbone.
        pairs: the preference pairs to be used.
        critiques: files of critiques of these pairs.
        max_length: tokens of prompt + completion + critique that are to be read, 2048 when not given; a reward model
            says itself how many it reads.
        split: only pairs of this split.
        load_model: also load the weights and score a few pairs; otherwise only the tokenizer is looked at.
        out: write the findings there, as JSON.
    """
    if (backbone and model) or not (backbone or model or pairs):
        raise ConfigError("name what to check: --backbone or --model, and --pairs")
    if critiques and not pairs:
        raise ConfigError("--critiques are looked at together with the pairs that they are of: give --pairs, too")
    if model and max_length is not None:
        raise ConfigError("--model says itself how many tokens it reads: leave --max-length out")
    reads = _reads_of(model)
    name = str(model or backbone)
    found = read_pairs(pairs, split=split, skip_bad=True) if pairs else None
    rows = [row for path in critiques for row in read_critiques(path)]
    findings: list[Finding] = []
    arms: dict[str, tuple[CritiquedPair, ...]] = {}
    if found:
        n_bad = len(found.skipped)
        advice = "See them with `critrm preferences`."
        findings.append(
            Finding("rows", "warning", f"{n_bad} cannot be used", advice)
            if n_bad
            else Finding("rows", "good", f"{len(found.pairs)} pairs")
        )
        findings += check_pairs(found.pairs)
        arms = _arms(found.pairs, rows)
    if name:
        n_read = int(reads.get("max_length") or max_length or 2048)
        findings += _model_findings(name, arms, model=model, max_length=n_read, load_model=load_model)
    if found:
        findings += check_critics(found.pairs, rows, trained_with=str(reads.get("critic", "")))
    console = Console()
    console.print(findings_table(findings))
    if out is not None:
        write_text(out, json.dumps([asdict(finding) for finding in findings], indent=2, ensure_ascii=False) + "\n")
        console.print(f"Findings: {out}", soft_wrap=True, markup=False)
    if any(finding.verdict == "problem" for finding in findings):
        raise ConfigError("there are problems: see the table")


def _arms(pairs: Sequence[PreferencePair], rows: Sequence[Critique]) -> dict[str, tuple[CritiquedPair, ...]]:
    """The No-Critiques arm and one of each critic, each with all the pairs that the critic covers."""
    arms = augment_pairs(pairs, {}).arms
    for critic in sorted({row.critic for row in rows}):
        first = _first_sample([row for row in rows if row.critic == critic])
        try:
            arms[critic] = augment_pairs(pairs, {critic: first}, sample=first[0].sample).arms[critic]
        except DataError:
            continue  # it covers no pair, which `check_critics` reports
    return arms


def _model_findings(
    name: str,
    arms: dict[str, tuple[CritiquedPair, ...]],
    *,
    model: Path | None,
    max_length: int,
    load_model: bool,
) -> list[Finding]:
    tokenizer = load_tokenizer(name)
    findings = check_tokenizer(tokenizer)
    for arm in arms.values():
        findings += check_lengths(arm, text_encoder(tokenizer), max_length=max_length)
    if load_model:
        from critrm.reward_model import Reads, RewardModel

        loaded = (
            RewardModel.load(model, device="cpu", precision="fp32")
            if model
            else RewardModel.from_backbone(name, Reads(max_length=max_length, backbone=name), seed=0)
        )
        items = [CritiquedPair(pair=item.pair) for item in arms.get(NO_CRITIC, _SAMPLE)]
        findings += check_reward_model(loaded, items)
    return findings


def _reads_of(model: Path | None) -> dict[str, Any]:
    """What a reward model reads (`reward_model.Reads`), looked up without torch."""
    facts = model / "critrm.json" if model else None
    if not facts or not facts.is_file():
        return {}
    loaded: dict[str, Any] = json.loads(facts.read_text(encoding="utf-8"))
    return loaded


_SAMPLE = tuple(
    CritiquedPair(
        pair=PreferencePair(
            id=f"sample-{i}", prompt=(Message("user", f"Why is the sky {colour}?"),), chosen="Air. " * i, rejected="No."
        )
    )
    for i, colour in enumerate(("blue", "red in the evening", "black at night", "grey"), 1)
)
"""Scored when no pairs are given."""


def findings_table(findings: Sequence[Finding]) -> Table:
    """The findings for the terminal."""
    table = Table(title="critrm doctor", show_lines=False)
    for title in ("check", "", "finding", "what to do"):
        table.add_column(title)
    for finding in findings:
        mark = Text(finding.verdict, style=MARKS[finding.verdict])
        table.add_row(Text(finding.check), mark, Text(finding.what), Text(finding.advice))
    return table
