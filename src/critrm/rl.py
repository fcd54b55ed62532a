"""Reward functions for RL trainers in this process: TRL, verl, OpenRLHF, each in the form that its trainer calls.

All of them are thin: they turn what the trainer passes into a prompt and completions, and let a `LiveRewardModel`
critique and score. A failed critic never becomes a number. The live model's policy decides: the failure is raised after
its retries, or all completions of that call are scored without critiques and said to be.

    live = open_reward_model("runs/my-model", critic="gpt-4.1-mini")
    GRPOTrainer(..., reward_funcs=trl_reward(live))     # TRL
    compute_score = verl_reward(live)                   # verl: in the file that custom_reward_function.path names
    reward_func = openrlhf_reward(live)                 # OpenRLHF: in the file that remote_rm_url names
"""

import asyncio
import threading
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from critrm.config import CriticConfig, validated
from critrm.critics import complete_critic, load_critics
from critrm.critique_cache import CritiqueCache, default_cache_path
from critrm.dialects import literal_messages
from critrm.errors import DataError
from critrm.live import LiveRewardModel, LiveScore, OnFailure
from critrm.live_critic import LiveCritic
from critrm.types import Message

T = TypeVar("T")
Prompt = tuple[Message, ...]

END_TOKENS = (
    "<|im_end|>",
    "<|endoftext|>",
    "<|eot_id|>",
    "<|end_of_text|>",
    "<|END_OF_TURN_TOKEN|>",
    "<end_of_turn>",
    "<eos>",
    "</s>",
)
"""What ends a policy's reply, in the text that OpenRLHF hands over."""
TEMPLATE_MARKS = ("<|im_start|>", "<|start_header_id|>", "<|START_OF_TURN_TOKEN|>", "<start_of_turn>", "[INST]")
"""Signs of a chat template in a prompt."""


def open_reward_model(
    run: str | Path,
    *,
    critic: str = "",
    settings: Mapping[str, Any] | None = None,
    critics: str | Path | None = None,
    on_failure: OnFailure = "raise",
    retries: int = 2,
    deadline: float = 120.0,
    max_cost: float | None = None,
    cache: str | Path | None = None,
    device: str | None = None,
    precision: str = "auto",
    allow_other_critic: bool = False,
    max_tokens_per_step: int = 4096,
) -> LiveRewardModel:
    """A reward model and its critic, ready for the functions below.

    Args:
        run: the reward model's folder, the folder of its run, or a hub id.
        critic: the critic's name; empty for a model that scores without critiques.
        settings: what is to be set of the critic, such as `model` and `base_url` (the keys of a recipe's critic).
        critics: a file of your own critics.
        on_failure: `raise`, or `without` for a model trained with critique dropout.
        retries: how often a failed critic call is made again, beyond what the client does by itself.
        deadline: seconds that a critique may take, retries included.
        max_cost: US dollars that the critic's calls may cost; then they fail as if the critic did.
        cache: the file of answered calls; one for all runs of this user when not given.
        device: of the reward model.
        precision: `fp32`, `bf16` or `auto`.
        allow_other_critic: read critiques of another critic than in training.
        max_tokens_per_step: how many tokens are computed at once.

    Raises:
        ModelError: the reward model cannot be loaded.
        ConfigError: no such critic, or one is missing.
        CriticMismatch: the reward model was trained with another critic.
    """
    from critrm.reward_model import RewardModel

    opened = None
    if critic:
        given = validated(CriticConfig, dict(settings or {}), where=f"critic {critic}", what="settings")
        complete = complete_critic(critic, given, critics=load_critics(critics))
        store = CritiqueCache(cache or default_cache_path())
        opened = LiveCritic.open(
            complete, critic=critic, cache=store, deadline=deadline, retries=retries, max_cost=max_cost
        )
    model = RewardModel.load(run, critic=critic or None, device=device, precision=precision)
    return LiveRewardModel(
        model,
        critic=opened,
        on_failure=on_failure,
        allow_other_critic=allow_other_critic,
        max_tokens_per_step=max_tokens_per_step,
    )


async def score_rows(live: LiveRewardModel, prompts: Sequence[Prompt], completions: Sequence[str]) -> list[LiveScore]:
    """Score rows of one prompt and one completion each; rows with one prompt are scored together.

    So a prompt is read once, and where the critic fails for one completion of a group, all are scored alike.
    """
    groups: dict[Prompt, list[int]] = {}
    for i, prompt in enumerate(prompts):
        groups.setdefault(prompt, []).append(i)
    calls = [live.score(prompt, [completions[i] for i in rows]) for prompt, rows in groups.items()]
    found = await asyncio.gather(*calls)
    by_row = {
        i: score
        for rows, scores in zip(groups.values(), found, strict=True)
        for i, score in zip(rows, scores, strict=True)
    }
    return [by_row[i] for i in range(len(prompts))]


def trl_reward(live: LiveRewardModel) -> Callable[..., Awaitable[list[float]]]:
    """An asynchronous reward function for TRL's `GRPOTrainer` (and `RLOOTrainer`).

    Takes plain and conversational data sets. In the trainer's log, `critrm/without_critique` is the share of
    completions that were scored without one because the critic failed; the completions table gets the critiques.
    """

    async def critrm_reward(
        prompts: Sequence[Any],
        completions: Sequence[Any],
        *,
        log_extra: Callable[[str, list[Any]], None] | None = None,
        log_metric: Callable[[str, float], None] | None = None,
        **columns: Any,
    ) -> list[float]:
        rows = [_reply(prompt, completion) for prompt, completion in zip(prompts, completions, strict=True)]
        scores = await score_rows(live, [prompt for prompt, _ in rows], [text for _, text in rows])
        if log_extra and any(score.critique for score in scores):
            log_extra("critique", [score.critique for score in scores])
        if log_metric:
            log_metric("critrm/without_critique", sum(_went_without(live, score) for score in scores) / len(scores))
        return [score.reward for score in scores]

    return critrm_reward


def verl_reward(live: LiveRewardModel, *, prompt_key: str = "prompt") -> Callable[..., Awaitable[dict[str, Any]]]:
    """An asynchronous `compute_score` for verl, which calls it once per response, many at a time.

    verl passes no prompt: the data's `extra_info` has to hold it, as text or messages.

    Args:
        live: the reward model and its critic.
        prompt_key: where in `extra_info`.
    """

    async def compute_score(
        data_source: str, solution_str: str, ground_truth: Any = None, extra_info: Any = None, **kwargs: Any
    ) -> dict[str, Any]:
        prompt = _verl_prompt(extra_info, prompt_key)
        (score,) = await live.score(prompt, [solution_str])
        return _verl_score(live, score)

    return compute_score


def verl_batch_reward(live: LiveRewardModel, *, prompt_key: str = "prompt") -> Callable[..., list[dict[str, Any]]]:
    """A `compute_score` for verl's `batch` reward manager: all responses of a step in one call.

    Responses to one prompt are then scored together, see `score_rows`. Args as of `verl_reward`.
    """
    background = _Background()

    def compute_score(
        data_sources: Sequence[str],
        solution_strs: Sequence[str],
        ground_truths: Sequence[Any] = (),
        extra_infos: Sequence[Any] = (),
        **kwargs: Any,
    ) -> list[dict[str, Any]]:
        prompts = [_verl_prompt(extra_info, prompt_key) for extra_info in extra_infos]
        if len(prompts) != len(solution_strs):
            raise DataError(f"{len(prompts)} extra_infos of {len(solution_strs)} responses", field="extra_infos")
        return [_verl_score(live, score) for score in background.run(score_rows(live, prompts, list(solution_strs)))]

    return compute_score


def openrlhf_reward(
    live: LiveRewardModel, *, prompt_in_label: bool = False, end_tokens: Iterable[str] = END_TOKENS
) -> Callable[..., dict[str, Any]]:
    """A `reward_func(queries, prompts, labels)` for OpenRLHF; calls from several threads are scored together.

    Args:
        live: the reward model and its critic.
        prompt_in_label: the labels are the prompts (text or messages) without a chat template: with
            `apply_chat_template`, name the prompts' column as the label key, too.
        end_tokens: what the policy ends a reply with; cut off, since the reward model knows nothing of it.
    """
    background, ends = _Background(), tuple(end_tokens)

    def reward_func(
        queries: Sequence[str], prompts: Sequence[str], labels: Sequence[Any] = (), **kwargs: Any
    ) -> dict[str, Any]:
        import torch

        texts = [_without_end(_behind(query, prompt), ends) for query, prompt in zip(queries, prompts, strict=True)]
        asked = (
            [_messages(each, "labels") for each in labels] if prompt_in_label else [_plain(each) for each in prompts]
        )
        if len(asked) != len(texts):
            raise DataError(f"{len(asked)} labels of {len(texts)} queries", field="labels")
        scores = background.run(score_rows(live, asked, texts))
        rewards = torch.tensor([score.reward for score in scores])
        without = torch.tensor([float(_went_without(live, score)) for score in scores])
        # Dynamic filtering wants scores between 0 and 1.
        return {"rewards": rewards, "scores": rewards.sigmoid(), "extra_logs": {"without_critique": without}}

    return reward_func


class _Background:
    """An event loop in a thread of its own, for trainers that call and wait; it ends with the process."""

    def __init__(self) -> None:
        self._loop: asyncio.AbstractEventLoop | None = None
        self._lock = threading.Lock()

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        with self._lock:
            if self._loop is None:
                self._loop = asyncio.new_event_loop()
                threading.Thread(target=self._loop.run_forever, name="critrm-reward", daemon=True).start()
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()


def _reply(prompt: Any, completion: Any) -> tuple[Prompt, str]:
    """A row of TRL's: texts, or messages of which the last is the reply and those before it belong to the prompt."""
    messages = _messages(prompt, "prompt")
    if isinstance(completion, str):
        return messages, completion
    said = _messages(completion, "completion")
    if not said or said[-1].role != "assistant":
        raise DataError("must be text, or messages that end with the assistant's", field="completion")
    return messages + said[:-1], said[-1].content


def _messages(value: Any, field: str) -> Prompt:
    """Text or messages in the ecosystem's chat format, whose content may be a list of text parts."""
    if isinstance(value, str):
        return literal_messages(value, field)
    if not isinstance(value, Iterable):
        raise DataError(f"must be text or a list of messages, not {type(value).__name__}", field=field)
    # Parquet files give arrays; and a key such as `tool_calls: None` is nobody's.
    found = [dict(each) if isinstance(each, Mapping) else each for each in value]
    for message in found:
        if isinstance(message, dict) and isinstance(message.get("content"), Iterable):
            message["content"] = _joined(message["content"], field)
    return literal_messages(found, field)


def _joined(content: Any, field: str) -> str:
    if isinstance(content, str):
        return content
    parts = list(content)
    if not all(isinstance(part, Mapping) and isinstance(part.get("text"), str) for part in parts):
        raise DataError("a message holds something else than text, which a reward model cannot read", field=field)
    return "".join(part["text"] for part in parts)


def _verl_prompt(extra_info: Any, key: str) -> Prompt:
    value = extra_info.get(key) if isinstance(extra_info, Mapping) else None
    if value is None:
        reason = "missing: verl passes no prompt, so the data's extra_info has to hold it, as text or messages"
        raise DataError(reason, field=f"extra_info.{key}")
    return _messages(value, f"extra_info.{key}")


def _verl_score(live: LiveRewardModel, score: LiveScore) -> dict[str, Any]:
    without = float(_went_without(live, score))
    return {"score": score.reward, "critique": score.critique, "without_critique": without}


def _went_without(live: LiveRewardModel, score: LiveScore) -> bool:
    """Whether a completion was scored without a critique although there is a critic."""
    return live.critic is not None and not score.critique


def _plain(prompt: str) -> Prompt:
    for mark in TEMPLATE_MARKS:
        if mark in prompt:
            raise DataError(
                f"holds {mark!r}, the mark of a chat template, which the reward model would read as text: name the "
                "prompts' column as the label key and use openrlhf_reward(..., prompt_in_label=True)",
                field="prompts",
            )
    return (Message("user", prompt),)


def _behind(query: str, prompt: str) -> str:
    """The reply in a query, which is a prompt and a reply; OpenRLHF cuts the beginning of prompts that are too long."""
    if query.startswith(prompt):
        return query[len(prompt) :]
    start = -1
    while (start := prompt.find(query[:20], start + 1)) > 0:
        if query.startswith(prompt[start:]):
            return query[len(prompt) - start :]
    raise DataError("does not begin with its prompt", field="queries")


def _without_end(text: str, ends: tuple[str, ...]) -> str:
    while (bare := text.rstrip()).endswith(ends):
        text = bare.removesuffix(next(end for end in ends if bare.endswith(end)))
    return text
