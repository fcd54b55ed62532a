"""What a recipe may say: one frozen section per stage, unknown keys are errors.

name: demo
preferences: {train: {...}, test: {...}}      which pairs
critique: {critics: {...}}                    who writes the critiques
augment: {max_length: 1024}                   how they are put together
train: {backbone: ..., seeds: [0, 1, 2]}      how the reward models are trained
evaluate: {}                                  how they are tested
"""

import os
from importlib import resources
from pathlib import Path
from typing import Annotated, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from critrm.errors import ConfigError

BUNDLED = "bundled:"
"""Prefix of a path to a data file or recipe that the package carries."""


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
    benchmark: str = "pairs"
    """For test pairs: the benchmark whose sections are computed."""


class PreferencesConfig(Section):
    """Stage 0: the pairs to train on, and the test sets by name."""

    train: PairSource
    test: dict[str, PairSource] = Field(min_length=1)


class CriticConfig(Section):
    """One critic: a model that is called, or a file of critiques that is imported."""

    model: str = ""
    """A served model's name, `embedded:NAME`, or `local:FOLDER`."""
    base_url: str | None = None
    file: str = ""
    """A file of existing critiques by pair id and side, instead of a model."""
    temperature: float = Field(default=0.0, ge=0)
    top_p: float = Field(default=1.0, gt=0, le=1)
    max_tokens: int = Field(default=256, gt=0)
    seed: int = 0
    concurrency: int = Field(default=16, gt=0)
    template: str = "critique"

    @model_validator(mode="after")
    def _model_or_file(self) -> "CriticConfig":
        if bool(self.model) == bool(self.file):
            raise ValueError("give either a model to call or a file of critiques")
        return self


class CritiqueConfig(Section):
    """Stage 1: the critics, by the name their arm gets. The No-Critiques arm is always there."""

    critics: dict[str, CriticConfig] = Field(default_factory=dict)


class AugmentConfig(Section):
    """Stage 2: how much a reward model reads of each completion."""

    max_length: int = Field(default=2048, gt=15)
    """Tokens of prompt + completion + critique."""


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
    seeds: Annotated[tuple[int, ...], Field(min_length=1)] = (0,)
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    lora_rank: int = Field(default=0, ge=0)
    """0 trains all parameters, as the paper does; otherwise adapters of this rank and the head."""
    checkpoint_minutes: float = Field(default=5.0, ge=0)
    """Least time between two checkpoints; 0 writes one after every step."""
    report_to: tuple[str, ...] = ()
    """Loggers of transformers' Trainer: tensorboard, wandb, ..."""

    @model_validator(mode="after")
    def _held_out_for_sweep(self) -> "TrainConfig":
        if len(self.learning_rates) > 1 and not self.n_held_out:
            raise ValueError("several learning_rates need n_held_out pairs to choose between them")
        return self


class EvaluateConfig(Section):
    """Stage 4: how many tokens are scored at once."""

    max_tokens_per_step: int = Field(default=4096, gt=0)


class Recipe(Section):
    """A whole experiment: one section per stage."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    preferences: PreferencesConfig
    critique: CritiqueConfig = CritiqueConfig()
    augment: AugmentConfig = AugmentConfig()
    train: TrainConfig
    evaluate: EvaluateConfig = EvaluateConfig()


def load_recipe(path: str | Path) -> Recipe:
    """Read a recipe from a YAML file, or `bundled:NAME.yaml`.

    Raises:
        ConfigError: not YAML, an unknown key or a value out of range; names the file and the key.
    """
    file = data_path(str(path))
    try:
        return Recipe.model_validate(yaml.safe_load(file.read_text(encoding="utf-8")))
    except FileNotFoundError:
        raise ConfigError(f"{file}: no such recipe") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{file}: not YAML ({error})") from None
    except ValidationError as error:
        problems = "; ".join(
            f"{'.'.join(str(part) for part in problem['loc']) or 'recipe'}: {problem['msg']}"
            for problem in error.errors()
        )
        raise ConfigError(f"{file}: {problems}") from None


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
