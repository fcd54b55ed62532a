"""What a recipe may say: one frozen section per stage, unknown keys are errors.

name: demo
preferences: {train: {...}, test: {...}}      which pairs
critique: {critics: {...}}                    who writes the critiques
augment: {max_length: 1024}                   how they are put together
train: {backbone: ..., seeds: [0, 1, 2]}      how the reward models are trained
evaluate: {}                                  how they are tested
study: {grids: {...}}                         over which sizes, backbones and settings all this is repeated
"""

import math
import os
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar
from urllib.parse import urlsplit

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_serializer, model_validator

from critrm.errors import ConfigError
from critrm.types import NO_CRITIC, RATINGS

BUNDLED = "bundled:"
"""Prefix of a path to a data file or recipe that the package carries."""


FILE_NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]*$"
"""What names a folder or file of a run."""


class Section(BaseModel):
    """Base of every section: frozen, and a misspelt key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class PairSource(Section):
    """Where pairs come from: a file, a hub id or a bundled file, and which of its rows."""

    path: str
    dialect: str = "auto"
    split: str = ""
    source: str = ""
    subset: str = ""
    limit: int | None = Field(default=None, gt=0)
    skip_bad: bool = False
    id_prefix: str = ""
    """Put before each pair's id: files that only count their rows have the same ids."""
    benchmark: str = "pairs"
    """For test pairs: the benchmark whose sections are computed."""


class PreferencesConfig(Section):
    """Stage 0: the pairs to train on, and the test sets by name."""

    train: PairSource
    test: dict[Annotated[str, Field(pattern=FILE_NAME)], PairSource] = Field(min_length=1)

    @model_validator(mode="after")
    def _not_called_train(self) -> "PreferencesConfig":
        if any(name.lower() == "train" for name in self.test):
            raise ValueError("a test set cannot be called train: that is the training pairs' name")
        return self


class CriticConfig(Section):
    """One critic: a named one with changes, a model that is called, the backbone itself, or a file of critiques."""

    model: str = ""
    """A served model's name, `embedded:NAME`, or `local:FOLDER`. Without one, the critic's name is looked up."""
    base_url: str | tuple[str, ...] | None = None
    """The endpoint, or several of the same model (a list, or with commas between)."""
    key_variable: str | None = Field(default=None, pattern=r"^([A-Z_][A-Z0-9_]*)?$")
    """The environment variable that holds the API key, never the key; empty to send none, OPENAI_API_KEY when None."""
    self_critique: bool = False
    """The critic is the backbone of the reward model (on-policy)."""
    file: str | tuple[str, ...] = ""
    """A file of existing critiques by pair id and side, or several of the same critic, instead of a model."""
    temperature: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    top_p: float = Field(default=1.0, gt=0, le=1)
    max_tokens: int = Field(default=256, gt=0)
    seed: int = 0
    samples: int = Field(default=1, gt=0)
    """Critiques per completion."""
    price_in: float | None = Field(default=None, ge=0, allow_inf_nan=False)
    """US dollars per million tokens read; unknown when None."""
    price_out: float | None = Field(default=None, ge=0, allow_inf_nan=False)
    batch: bool = False
    """Send the calls to the endpoint's Batch API."""
    concurrency: int = Field(default=16, gt=0)
    timeout: float = Field(default=60.0, gt=0)
    """Seconds to wait for an answer."""
    requests_per_minute: float | None = Field(default=None, gt=0)
    tokens_per_minute: float | None = Field(default=None, gt=0)
    template: str = "critique"
    engine: Literal["local", "ray"] = "local"
    """Where the calls are made: this process, or the workers of a Ray cluster."""
    workers: int = Field(default=2, gt=0)
    """Of the ray engine."""

    @model_validator(mode="after")
    def _one_origin(self) -> "CriticConfig":
        if bool(self.model) + bool(self.file) + self.self_critique > 1:
            raise ValueError("give either a model to call, or a file of critiques, or self_critique")
        if (self.price_in is None) != (self.price_out is None):
            raise ValueError("price_in and price_out go together")
        if self.engine == "ray" and self.batch:
            raise ValueError("a batch is one upload: it needs no ray engine")
        return self

    @field_serializer("base_url")
    def _without_secrets(self, value: str | tuple[str, ...] | None) -> list[str] | None:
        """For manifests: a URL's user name, password and query may be keys."""
        urls = value.split(",") if isinstance(value, str) else value
        return None if urls is None else [_plain_url(url) for url in urls]

    @property
    def files(self) -> tuple[str, ...]:
        """The files of existing critiques; none where a model is called."""
        return (self.file,) if isinstance(self.file, str) and self.file else tuple(self.file)

    @property
    def in_process(self) -> bool:
        """Whether the model runs in this process."""
        return self.model.startswith(("embedded:", "local:"))


def _plain_url(url: str) -> str:
    parts = urlsplit(url.strip())
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"


class CritiqueConfig(Section):
    """Stage 1: the critics, by the name their arm gets. The No-Critiques arm is always there."""

    critics: dict[str, CriticConfig] = Field(default_factory=dict)
    mixtures: dict[str, dict[str, Annotated[float, Field(gt=0)]]] = Field(default_factory=dict)
    """More arms, by name: critic -> its share of the pairs. Each pair has the critiques of one of these critics."""
    critics_file: str = ""
    """A file of critics of your own, in the form of `critics.yaml`."""
    max_cost: float | None = Field(default=None, ge=0, allow_inf_nan=False)
    """US dollars that all critics together may cost."""

    @property
    def arms(self) -> tuple[str, ...]:
        """All arms with critiques: the critics' and the mixtures'."""
        return (*self.critics, *self.mixtures)

    @model_validator(mode="after")
    def _mixtures_of_critics(self) -> "CritiqueConfig":
        for name, shares in self.mixtures.items():
            if name in self.critics:
                raise ValueError(f"mixtures: there is a critic called {name!r} already")
            if unknown := set(shares) - set(self.critics):
                raise ValueError(f"mixtures: {name!r} has critics that are not there: {', '.join(sorted(unknown))}")
            if len(shares) < 2 or not math.isclose(sum(shares.values()), 1, abs_tol=1e-6):
                raise ValueError(f"mixtures: {name!r} needs two critics or more, with shares that add up to 1")
        return self


class AugmentConfig(Section):
    """Stage 2: how much a reward model reads of each completion."""

    max_length: int = Field(default=2048, gt=15)
    """Tokens of prompt + completion + critique."""
    drop: tuple[str, ...] = ()
    """Flaws for which a critique is not used, nor its pair in any arm; `critrm quality` lists them."""
    strip_scores: bool = False
    """Take grades that a critique gives away ("8/10") out of its text."""
    consistent_only: bool = False
    """Leave out training pairs that a critic grades against their label; test pairs are never filtered by it."""


class TrainConfig(Section):
    """Stage 3, section 4.4 by default: batch 32, one epoch, Adam, cosine decay to 10 %, 32 warm-up steps, 8e-5."""

    backbone: str
    batch_size: int = Field(default=32, gt=0)
    """Pairs per optimiser step, over all devices."""
    pairs_per_pass: int = Field(default=8, gt=0)
    """Pairs computed at once on one device; memory grows with it, the result does not depend on it."""
    n_epochs: int = Field(default=1, gt=0)
    learning_rates: Annotated[tuple[float, ...], Field(min_length=1)] = (8e-5,)
    """Maximum learning rate; several are tried once per arm on `n_held_out` pairs taken from the training pairs."""
    n_held_out: int = Field(default=0, ge=0)
    n_sweep: int | None = Field(default=None, gt=0)
    """Pairs that the sweep's runs train on; all that are not held out when None."""
    min_learning_rate_share: float = Field(default=0.1, ge=0, le=1)
    warmup_steps: int = Field(default=32, ge=0)
    margins: dict[str, float] | None = Field(
        default={"slightly better": 1 / 3, "better": 2 / 3, "significantly better": 1.0}
    )
    """m(r) of equations 1 and 2 by rating; None is no margin. Pairs without a rating have none."""
    loss: Literal["ranking", "scaled"] = "ranking"
    """The ranking loss minus its margin, as in the paper, or multiplied by it ("scaled": no rating weighs nothing)."""
    center_weight: float = Field(default=0.0, ge=0)
    """Weight of (chosen + rejected)^2, which keeps rewards around 0."""
    lm_weight: float = Field(default=0.0, ge=0)
    """Weight of a language-model loss on the critique's tokens, through the backbone's own head."""
    score_weight: float = Field(default=0.0, ge=0)
    """Weight of the squared distance of rewards from the critic's own scores of the training pairs, standardised."""
    critique_dropout: float = Field(default=0.0, ge=0, lt=1)
    """Share of an arm's pairs that are read without their critiques, so that the model can score without one."""
    critique_first: bool = False
    """The model reads the critique before the completion; the paper has it behind."""
    seeds: Annotated[tuple[int, ...], Field(min_length=1)] = (0,)
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    frozen: bool = False
    """The backbone stays as it was pretrained, and a head is fitted to what it says of each pair: see `frozen_head`."""
    lora_rank: int = Field(default=0, ge=0)
    """0 trains all parameters, as the paper does; otherwise adapters of this rank and the head."""
    load_in_4bit: bool = False
    """The backbone is held in 4 bits while adapters are trained on it (QLoRA); the saved model is in full precision."""
    gradient_checkpointing: bool = False
    """Compute activations a second time instead of keeping them: less memory, slower, the same result."""
    keep: Literal["last", "best"] = "last"
    """Which weights are the model: the last ones, or those with the lowest loss on held-out pairs."""
    checkpoint_minutes: float = Field(default=5.0, ge=0)
    """Least time between two checkpoints; 0 writes one after every step."""
    report_to: tuple[str, ...] = ()
    """Loggers of transformers' Trainer: tensorboard, wandb, ..."""

    def learns_scores_of(self, critic: str) -> bool:
        """Whether an arm's training learns the critic's own scores; no critiques have none."""
        return self.score_weight > 0 and critic != NO_CRITIC

    def of_arm(self, critic: str) -> "TrainConfig":
        """The settings of one arm: those about critiques are at their defaults where there are none."""
        if critic != NO_CRITIC:
            return self
        about_critiques = ("lm_weight", "score_weight", "critique_dropout", "critique_first")
        return self.model_copy(update={name: type(self).model_fields[name].default for name in about_critiques})

    @model_validator(mode="after")
    def _held_out_for_sweep(self) -> "TrainConfig":
        if len(self.learning_rates) > 1 and not self.n_held_out:
            raise ValueError("several learning_rates need n_held_out pairs to choose between them")
        return self

    @model_validator(mode="after")
    def _frozen_alone(self) -> "TrainConfig":
        fields = type(self).model_fields
        others = ("n_epochs", "loss", "center_weight", "lm_weight", "lora_rank", "keep", "report_to")
        given = [name for name in others if getattr(self, name) != fields[name].default]
        if len(self.learning_rates) > 1:
            given.append("several learning_rates")
        if self.frozen and given:
            raise ValueError(f"a frozen backbone has its head fitted, not trained: leave out {', '.join(given)}")
        return self

    @model_validator(mode="after")
    def _adapters_on_4_bits(self) -> "TrainConfig":
        if self.load_in_4bit and not self.lora_rank:
            raise ValueError("load_in_4bit trains adapters on weights that cannot be trained: give a lora_rank")
        if self.load_in_4bit and self.lm_weight:
            raise ValueError("lm_weight reads the backbone's own head, which load_in_4bit does not keep as it is")
        return self

    @model_validator(mode="after")
    def _margins_by_rating(self) -> "TrainConfig":
        unknown = set(self.margins or ()) - set(RATINGS)
        if unknown:
            raise ValueError(f"margins are by rating: {', '.join(RATINGS)}; not {', '.join(sorted(unknown))}")
        return self

    @model_validator(mode="after")
    def _margins_to_scale_by(self) -> "TrainConfig":
        if self.loss == "scaled" and self.margins is None:
            raise ValueError("the scaled loss multiplies by the margins: it cannot go without margins")
        return self


class EvaluateConfig(Section):
    """Stage 4: how a test set is scored, and whether the untrained backbone is asked as well."""

    max_tokens_per_step: int = Field(default=4096, gt=0)
    samples: int = Field(default=1, gt=0)
    """Critiques of a completion whose rewards are averaged; critics with a temperature write so many of test pairs."""
    zero_label: bool = True
    """Lay the untrained backbone's own reading beside each arm, as a null baseline."""


class GridConfig(Section):
    """One grid of a study: every backbone with every number of training pairs; the arms are those of the recipe."""

    sizes: tuple[Annotated[int, Field(gt=0)], ...] = ()
    """Numbers of training pairs, drawn so that a smaller number's pairs are among a larger one's; all when empty."""
    backbones: tuple[str, ...] = ()
    """The recipe's when empty."""
    critics: tuple[str, ...] | None = None
    """Which of the recipe's critics; all when None, and with none the grid has the No-Critiques arm alone."""
    pairs: tuple[PairSource, ...] = ()
    """Training pairs instead of the recipe's, such as more of them without critiques; pairs whose prompt is in a test
    set are left out, and pairs that another source has as well."""
    change: dict[Literal["critique", "augment", "train", "evaluate"], dict[str, Any]] = Field(default_factory=dict)
    """What is different from the recipe's sections in this grid."""


class StudyConfig(Section):
    """Stage 7: the grids by name, and what a human label costs."""

    grids: dict[Annotated[str, Field(pattern=FILE_NAME)], GridConfig] = Field(min_length=1)
    seed: int = 0
    """Of the order in which training pairs are drawn."""
    draws: int = Field(default=1, gt=0)
    """How often they are drawn anew: each number of pairs, but that of all, is run with so many sets of them."""
    n_parameters: dict[str, float] = Field(default_factory=dict)
    """Backbone -> its parameters, for the plan's hours, where neither its files are here nor its name says them."""
    label_price: float | None = Field(default=None, ge=0, allow_inf_nan=False)
    """US dollars that one human preference label costs; exchange rates are in money too where it is given."""


class Recipe(Section):
    """A whole experiment: one section per stage."""

    name: str = Field(pattern=FILE_NAME)
    preferences: PreferencesConfig
    critique: CritiqueConfig = CritiqueConfig()
    augment: AugmentConfig = AugmentConfig()
    train: TrainConfig
    evaluate: EvaluateConfig = EvaluateConfig()
    study: StudyConfig | None = None

    @model_validator(mode="after")
    def _known_critics(self) -> "Recipe":
        for name, grid in (self.study.grids if self.study else {}).items():
            if unknown := set(grid.critics or ()) - set(self.critique.arms):
                raise ValueError(f"study: grid {name!r} names critics that are not there: {', '.join(sorted(unknown))}")
        return self

    @model_validator(mode="after")
    def _scores_to_learn(self) -> "Recipe":
        # Grids of a study may have other critics; each of their cells is a recipe of its own.
        without = [name for name, critic in self.critique.critics.items() if not critic.files]
        if self.train.score_weight and without and not self.study:
            raise ValueError(
                f"train: score_weight learns critics' own scores, and {', '.join(without)} will give none: "
                "`critrm critique` asks for critiques alone. Let `critrm judge --with-critique` write critiques with "
                "scores, and name its verdicts.jsonl as the critic's file"
            )
        return self

    @model_validator(mode="after")
    def _held_out_for_best(self) -> "Recipe":
        if self.train.keep == "best" and not self.train.n_held_out:
            raise ValueError("train: keep: best needs n_held_out pairs to choose by")
        return self


def load_recipe(path: str | Path) -> Recipe:
    """Read a recipe from a YAML file, or `bundled:NAME.yaml`.

    Raises:
        ConfigError: not YAML, an unknown key or a value out of range; names the file and the key.
    """
    return read_yaml(Recipe, data_path(str(path)), what="recipe")


S = TypeVar("S", bound=Section)


def read_yaml(section: type[S], file: Path, *, what: str) -> S:
    """Read a section from a YAML file.

    Args:
        section: what the file has to hold.
        file: the file.
        what: the word for it in messages.

    Raises:
        ConfigError: no such file, not YAML, an unknown key or a value out of range; names the file and the key.
    """
    try:
        values = yaml.safe_load(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{file}: no such {what}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file}: cannot be read ({error})") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{file}: not YAML ({error})") from None
    return validated(section, values, where=str(file), what=what)


def validated(section: type[S], values: Mapping[str, Any], *, where: str, what: str) -> S:
    """Make a section of plain values.

    Raises:
        ConfigError: an unknown key or a value out of range; names `where` and the key.
    """
    try:
        return section.model_validate(values)
    except ValidationError as error:
        problems = "; ".join(
            f"{'.'.join(str(part) for part in problem['loc']) or what}: {problem['msg']}" for problem in error.errors()
        )
        # Without its cause, which shows the values: somebody may have put a key there.
        raise ConfigError(f"{where}: {problems}") from None


def data_path(text: str) -> Path:
    """A path as recipes write it: `bundled:FILE`, and environment variables such as `$CRITRM_DATA`.

    Raises:
        ConfigError: a variable in it is not set, or there is no such bundled file.
    """
    if text.startswith(BUNDLED):
        name = text.removeprefix(BUNDLED)
        folder = "recipes" if name.endswith(".yaml") else "data"
        found = resources.files("critrm") / folder / Path(name).name
        if not found.is_file():
            raise ConfigError(f"{text}: critrm carries no such file")
        return Path(str(found))
    expanded = os.path.expandvars(os.path.expanduser(text))
    if "$" in expanded:
        raise ConfigError(f"{text}: set the environment variable that it names")
    return Path(expanded)
