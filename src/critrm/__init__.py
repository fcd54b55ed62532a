"""Reward models that read critiques: the public names, loaded when they are first used."""

import importlib
from typing import TYPE_CHECKING

__version__ = "0.1.0"

__all__ = [
    "ConfigError",
    "CriticError",
    "CriticMismatch",
    "Critique",
    "CritiqueCache",
    "CritiquedPair",
    "CritrmError",
    "DataError",
    "EvalResult",
    "LiveRewardModel",
    "LocalChat",
    "Message",
    "ModelError",
    "OpenAIChat",
    "Outcome",
    "PreferencePair",
    "RewardModel",
    "Sampling",
    "Score",
    "ScriptedChat",
    "StorageError",
    "attribute_sentences",
    "augment_pairs",
    "critique_pairs",
    "open_reward_model",
    "rank_completions",
    "read_critiques",
    "read_pairs",
    "run_recipe",
    "run_study",
    "train_reward_model",
]

if TYPE_CHECKING:
    from critrm.attribute import attribute_sentences
    from critrm.augment import augment_pairs
    from critrm.critique import critique_pairs
    from critrm.critique_cache import CritiqueCache
    from critrm.critique_files import read_critiques
    from critrm.errors import ConfigError, CriticError, CriticMismatch, CritrmError, DataError, ModelError, StorageError
    from critrm.live import LiveRewardModel
    from critrm.llm import OpenAIChat, Sampling, ScriptedChat
    from critrm.local_llm import LocalChat
    from critrm.pipeline import run_recipe
    from critrm.preferences import read_pairs
    from critrm.rank import rank_completions
    from critrm.reward_model import RewardModel
    from critrm.rl import open_reward_model
    from critrm.study import run_study
    from critrm.train import train_reward_model
    from critrm.types import Critique, CritiquedPair, EvalResult, Message, Outcome, PreferencePair, Score
else:
    _HOME = {
        "ConfigError": "errors",
        "CriticError": "errors",
        "CriticMismatch": "errors",
        "Critique": "types",
        "CritiqueCache": "critique_cache",
        "CritiquedPair": "types",
        "CritrmError": "errors",
        "DataError": "errors",
        "EvalResult": "types",
        "LiveRewardModel": "live",
        "LocalChat": "local_llm",
        "Message": "types",
        "ModelError": "errors",
        "OpenAIChat": "llm",
        "Outcome": "types",
        "PreferencePair": "types",
        "RewardModel": "reward_model",
        "Sampling": "llm",
        "Score": "types",
        "ScriptedChat": "llm",
        "StorageError": "errors",
        "attribute_sentences": "attribute",
        "augment_pairs": "augment",
        "critique_pairs": "critique",
        "open_reward_model": "rl",
        "rank_completions": "rank",
        "read_critiques": "critique_files",
        "read_pairs": "preferences",
        "run_recipe": "pipeline",
        "run_study": "study",
        "train_reward_model": "train",
    }

    # Lazy (PEP 562), so that `import critrm` costs milliseconds and a core install needs no torch.
    def __getattr__(name: str) -> object:
        if name not in _HOME:
            raise AttributeError(f"module 'critrm' has no attribute {name!r}")
        value = getattr(importlib.import_module(f"critrm.{_HOME[name]}"), name)
        globals()[name] = value  # found directly from now on
        return value

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__})
