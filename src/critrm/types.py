"""The records that flow between the stages: frozen, no torch, no I/O.

    PreferencePair -> Critique -> CritiquedPair -> Score -> Outcome -> EvalResult

Stages talk through files of these records (`store.py` reads and writes them).
"""

from dataclasses import asdict, dataclass, field
from enum import StrEnum
from typing import Any, Literal

Role = Literal["system", "user", "assistant"]
Side = Literal["chosen", "rejected"]
Rating = Literal["slightly better", "better", "significantly better"]

SIDES: tuple[Side, Side] = ("chosen", "rejected")
RATINGS: tuple[Rating, ...] = ("slightly better", "better", "significantly better")

NO_CRITIC = "none"
"""The critic's name of the No-Critiques arm (section 3.2)."""


class Outcome(StrEnum):
    """What one comparison came to; all that metrics reads."""

    RIGHT = "right"
    WRONG = "wrong"
    TIE = "tie"
    UNSCORED = "unscored"


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a conversation, in the ecosystem's chat format."""

    role: Role
    content: str


@dataclass(frozen=True, slots=True, kw_only=True)
class PreferencePair:
    """One human preference: a prompt and two completions (section 4.1, Appendix B)."""

    id: str
    prompt: tuple[Message, ...]
    """The conversation so far; ends with the user's turn."""
    chosen: str
    rejected: str
    rating: Rating | None = None
    """How much better the chosen completion is, on the paper's three-point scale."""
    margin: float | None = None
    """A margin given as a number by the data; it overrides the rating's."""
    source: str = ""
    subset: str = ""
    split: str = ""

    def completion(self, side: Side) -> str:
        """The completion of one side."""
        return self.chosen if side == "chosen" else self.rejected


@dataclass(frozen=True, slots=True, kw_only=True)
class Critique:
    """One answered (or failed) call to a critic about one completion (section 3.1)."""

    key: str
    """The cache's key: content hash of critic, sampling, template and messages sent; empty for imported critiques."""
    pair_id: str
    side: Side
    sample: int = 0
    """Which of the critic's critiques of this completion, from 0; more than one is asked for with `samples`."""
    text: str
    critic: str
    prompt_version: str
    """Content hash of the template; empty for imported critiques."""
    n_prompt_tokens: int = 0
    n_completion_tokens: int = 0
    cost: float = 0.0
    """US dollars; 0 where the critic has no price."""
    seconds: float = 0.0
    finish_reason: str = ""
    score: float | None = None
    """The critic's own rating, on the scale of the file that it comes from. A reward model may learn from it, and never
    reads it."""
    failure: str = ""
    """Why there is no text; empty for a critique that can be used."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CritiquedPair:
    """A preference pair with a critique of each completion; every arm comes out of this record."""

    pair: PreferencePair
    critic: str = NO_CRITIC
    chosen_critique: str = ""
    rejected_critique: str = ""
    chosen_score: float | None = None
    """The critic's own score of the completion, where it gave one; a target of training, and nothing that is read."""
    rejected_score: float | None = None

    def content(self, *, with_scores: bool = False) -> dict[str, Any]:
        """What content hashes of reward models cover; the scores, too, of a training that learns from them."""
        found = asdict(self)
        if not with_scores:
            del found["chosen_score"], found["rejected_score"]
        return found

    def critique(self, side: Side) -> str:
        """The critique of one side; empty in the No-Critiques arm."""
        return self.chosen_critique if side == "chosen" else self.rejected_critique


@dataclass(frozen=True, slots=True)
class Score:
    """What a reward model says about one pair: two logits."""

    pair_id: str
    chosen: float
    rejected: float

    @property
    def outcome(self) -> Outcome:
        """Right only if chosen is strictly higher (section 4.1); not-a-number is unscored."""
        if self.chosen != self.chosen or self.rejected != self.rejected:
            return Outcome.UNSCORED
        if self.chosen == self.rejected:
            return Outcome.TIE
        return Outcome.RIGHT if self.chosen > self.rejected else Outcome.WRONG


@dataclass(frozen=True, slots=True)
class TokenChoice:
    """One token of a reply, and what else the model might have written there."""

    text: str
    """What the token adds to the reply; empty in the middle of a character."""
    likeliest: tuple[tuple[str, float], ...]
    """The likeliest tokens and the logarithms of their probabilities."""
    after_one: tuple[tuple[str, float], ...] = ()
    """Of a digit, where it is known: the likeliest tokens behind a `1` in its place, which tell 1 from 10."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """What a judge says about one completion (section 5.3); `judge.verdict_scores` puts a pair's two together."""

    pair_id: str
    side: Side
    likert: float | None
    """The rating, 0 to 10; None is unscored."""
    judge: str
    rating: float | None = None
    """The rating as the reply has it, where `likert` is the expected one; else None."""
    critique: str = ""
    """What the judge wrote before the rating, or the critique that it was given; empty for a rating alone."""
    critic: str = ""
    """Who wrote the critique: the judge, or the critic whose critique it was given; empty for a rating alone."""
    reply: str = ""
    """The judge's whole reply; empty for a failed call and for a recorded rating."""
    unscored: str = ""
    """Why there is no rating."""
    key: str = ""
    """The call's key in the cache."""
    n_prompt_tokens: int = 0
    n_completion_tokens: int = 0
    cost: float = 0.0
    """US dollars; 0 where the judge has no price."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Interval:
    """An estimate in [0, 1] with the ends of its 95 % interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Tally:
    """Outcomes counted, and the strict accuracy they give."""

    n_right: int
    n_wrong: int
    n_tie: int
    n_unscored: int
    accuracy: Interval | None
    """Right over all scored pairs, ties counted as not right; None when no pair was scored."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EvalResult:
    """One benchmark scored by one reward model: one JSON file."""

    benchmark: str
    model: str
    critic: str
    overall: Tally
    subsets: dict[str, Tally]
    sections: dict[str, float] = field(default_factory=dict)
    """Section name -> accuracy weighted over its subsets; empty where the benchmark has no sections."""
    headline: str = "accuracy"
    """What the headline number is."""
    headline_value: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class RunManifest:
    """What produced a folder of results; written beside them."""

    command: str
    config: dict[str, object]
    versions: dict[str, str]
    seeds: tuple[int, ...]
    inputs: dict[str, str]
    """Input path -> sha256 of its bytes."""
    started: str
    """UTC, ISO 8601."""
    seconds: float
    cost: float = 0.0
    notes: tuple[str, ...] = ()
    """Things a reader should know, such as a warm-up scaled down."""
