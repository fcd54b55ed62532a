"""What is sent and answered over HTTP: our own requests, and those of the tools that reward models are used with.

The other tools' fields are theirs: OpenRLHF's `remote_rm_url` client, vLLM's pooling API, LLaMA-Factory's score API.
Fields that a protocol has and that mean nothing here are ignored, as the tools themselves do.
"""

import math
import time
import uuid
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from critrm.flat_text import split_flat, split_query
from critrm.live import LiveScore
from critrm.types import Message, Role

MAX_COMPLETIONS = 256
"""Of one prompt in one request, and texts in one request of the other protocols."""
MAX_MESSAGES = 1024
MAX_CHARACTERS = 2**18
"""Of one text: more than any model reads, and little enough that no text holds the others up."""

Prompt = tuple[Message, ...]
Text = Annotated[str, Field(max_length=MAX_CHARACTERS)]


class _Request(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore")


class _OwnRequest(BaseModel):
    """Of our own protocol: a misspelt field is an error, not a silent default."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class ChatMessage(_OwnRequest):
    """One turn of a conversation."""

    role: Role
    content: Text

    def message(self) -> Message:
        """The record."""
        return Message(self.role, self.content)


class TextPart(_Request):
    """A part of a message's content, as chat APIs have it; only text can be scored."""

    type: Literal["text"]
    text: Text


class ChatTurn(_Request):
    """One turn as chat APIs have it."""

    role: Role
    content: Text | Annotated[list[TextPart], Field(max_length=MAX_MESSAGES)]

    def message(self) -> Message:
        """The record; parts are put together."""
        content = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return Message(self.role, content)


Messages = Annotated[list[ChatMessage], Field(min_length=1, max_length=MAX_MESSAGES)]
Texts = Annotated[list[Text], Field(min_length=1, max_length=MAX_COMPLETIONS)]
PROMPT_EXAMPLE = "What is the capital of France?"


class _WithPrompt(_OwnRequest):
    prompt: Text | Messages = Field(
        description="The user's message, or the conversation so far.", examples=[PROMPT_EXAMPLE]
    )

    def messages(self) -> Prompt:
        """The conversation so far."""
        if isinstance(self.prompt, str):
            return (Message("user", self.prompt),)
        return tuple(each.message() for each in self.prompt)


class ScoreRequest(_WithPrompt):
    """Completions of one prompt, to be critiqued and scored."""

    completions: Texts = Field(examples=[["Paris.", "I think it is Lyon."]])
    critiques: Texts | None = Field(
        default=None, description="One of each completion, by the critic of the model's training: none is then asked."
    )


class CompareRequest(_WithPrompt):
    """Two completions of one prompt, to be compared."""

    completions: Annotated[list[Text], Field(min_length=2, max_length=2)] = Field(
        examples=[["Paris.", "I think it is Lyon."]]
    )
    critiques: Annotated[list[Text], Field(min_length=2, max_length=2)] | None = None


class AttributeRequest(_WithPrompt):
    """A completion and its critique, to be taken apart."""

    completion: Text
    critique: Text


class Scored(BaseModel):
    """What became of one completion."""

    index: int
    """Its place in the request."""
    reward: float
    critique: str
    """What the reward model read; empty where it read none."""
    critic: str
    """Who wrote it; `none` where the reward model read none."""
    cached: bool
    failure: str
    """Why there is no critique, where one was asked for."""

    @classmethod
    def of(cls, index: int, score: LiveScore) -> "Scored":
        """From the record."""
        return cls(
            index=index,
            reward=score.reward,
            critique=score.critique,
            critic=score.critic,
            cached=score.cached,
            failure=score.failure,
        )


class ScoreReply(BaseModel):
    """The completions' rewards, in the order of the request."""

    id: str
    model: str
    results: list[Scored]


class CompareReply(ScoreReply):
    """Two rewards, and which is higher."""

    preferred: int | None
    """0 or 1; null for equal rewards."""
    probability: float
    """That the first one is better, by the Bradley-Terry model (equation 1's sigmoid)."""


class Effect(BaseModel):
    """A sentence, and what it did to the reward."""

    text: str
    aspect: str
    effect: float
    """The reward with the whole critique minus the reward without this sentence."""


class AttributeReply(BaseModel):
    """A critique, sentence by sentence."""

    id: str
    model: str
    reward: float
    reward_without: float
    """Without any critique."""
    sentences: list[Effect]


class ErrorDetail(BaseModel):
    """What went wrong."""

    code: str
    message: str
    request_id: str


class ErrorReply(BaseModel):
    """Every answer that is no success."""

    error: ErrorDetail


class Health(BaseModel):
    """Whether the server can score."""

    status: Literal["ok"]
    model: str
    critic: str
    n_waiting: int
    """Prompts that the model has not scored yet."""


class OpenrlhfRequest(_Request):
    """What OpenRLHF sends to `--remote_rm_url`."""

    query: Texts = Field(description="Prompt and response in one string, chat template included.")
    prompts: Texts | None = Field(default=None, description="The prompts alone, in the same order.")
    labels: Any = None
    text_logs: bool = Field(
        default=False,
        description="Put the critiques' texts into `extra_logs`, too. OpenRLHF's trainer makes a tensor of each entry "
        "of `extra_logs`, so it has to be false there; the texts are always in `critiques`.",
    )

    @model_validator(mode="after")
    def _one_prompt_each(self) -> "OpenrlhfRequest":
        if self.prompts is not None and len(self.prompts) != len(self.query):
            raise ValueError("there must be as many prompts as queries")
        return self

    def items(self) -> list[tuple[Prompt, str]]:
        """Each query's prompt and completion.

        Raises:
            DataError: where the response begins cannot be told.
        """
        if self.prompts is None:
            return [split_flat(query) for query in self.query]
        return [split_query(query, prompt) for query, prompt in zip(self.query, self.prompts, strict=True)]


class OpenrlhfReply(BaseModel):
    """What OpenRLHF reads."""

    rewards: list[float]
    scores: list[float]
    extra_logs: dict[str, list[float] | list[str]]
    critiques: list[str]

    @classmethod
    def of(cls, found: Sequence[LiveScore], *, text_logs: bool) -> "OpenrlhfReply":
        """From the records."""
        rewards, critiques = [each.reward for each in found], [each.critique for each in found]
        logs: dict[str, list[float] | list[str]] = {
            "critique_words": [float(len(text.split())) for text in critiques],
            "critique_failed": [float(bool(each.failure)) for each in found],
        }
        if text_logs:
            logs["critiques"] = critiques
        return cls(rewards=rewards, scores=rewards, extra_logs=logs, critiques=critiques)


class PoolRequest(_Request):
    """What vLLM's `/classify` and `/pooling` take: texts, or one conversation that ends in the reply to score."""

    model: str | None = None
    input: Text | Texts | None = Field(default=None, description="Conversations, each as one string in a chat format.")
    messages: Annotated[list[ChatTurn], Field(min_length=2, max_length=MAX_MESSAGES)] | None = None
    use_activation: bool | None = Field(
        default=None, description="The sigmoid of the reward instead of the reward: by default for /classify only."
    )

    @model_validator(mode="after")
    def _one_of_them(self) -> "PoolRequest":
        if (self.input is None) == (self.messages is None):
            raise ValueError("give either `input` or `messages`")
        if self.messages is not None and self.messages[-1].role != "assistant":
            raise ValueError("the last message has to be the assistant's: it is what is scored")
        return self

    def items(self) -> list[tuple[Prompt, str]]:
        """Each conversation's prompt and completion.

        Raises:
            DataError: where the response begins cannot be told.
        """
        if self.messages is not None:
            *prompt, last = (each.message() for each in self.messages)
            return [(tuple(prompt), last.content)]
        texts = [self.input] if isinstance(self.input, str) else self.input or []
        return [split_flat(text) for text in texts]

    def values(self, found: Sequence[LiveScore], *, default: bool) -> list[float]:
        """The rewards, or their sigmoids."""
        active = default if self.use_activation is None else self.use_activation
        return [sigmoid(each.reward) if active else each.reward for each in found]


class Classified(BaseModel):
    """One text's class, of which a reward model has one."""

    index: int
    label: str = "LABEL_0"
    probs: list[float]
    num_classes: int = 1


class Pooled(BaseModel):
    """One text's reward."""

    index: int
    object: Literal["pooling"] = "pooling"
    data: list[float]


def _now() -> int:
    return int(time.time())


class ClassifyReply(BaseModel):
    """As vLLM's `/classify`."""

    id: str = Field(default_factory=lambda: f"classify-{uuid.uuid4().hex}")
    object: Literal["list"] = "list"
    created: int = Field(default_factory=_now)
    model: str
    data: list[Classified]


class PoolingReply(BaseModel):
    """As vLLM's `/pooling`."""

    id: str = Field(default_factory=lambda: f"pool-{uuid.uuid4().hex}")
    object: Literal["list"] = "list"
    created: int = Field(default_factory=_now)
    model: str
    data: list[Pooled]


class EvaluationRequest(_Request):
    """What LLaMA-Factory's reward API takes."""

    model: str = ""
    messages: Texts = Field(description="Conversations, each as one string in a chat format.")
    max_length: int | None = Field(default=None, description="Ignored: the model's own length is used.")


class EvaluationReply(BaseModel):
    """As LLaMA-Factory's reward API."""

    id: str
    object: Literal["score.evaluation"] = "score.evaluation"
    model: str
    scores: list[float]


def sigmoid(value: float) -> float:
    """Without overflow."""
    return 1 / (1 + math.exp(-value)) if value >= 0 else math.exp(value) / (1 + math.exp(value))
