"""The server's paths: each a request in, `LiveRewardModel` asked, and the reply in the form that its protocol has."""

import asyncio
import json
from collections.abc import AsyncIterator, Sequence
from typing import TYPE_CHECKING, Any

from critrm.errors import CriticError, CritrmError, DataError
from critrm.flat_text import split_flat
from critrm.live import LiveRewardModel, LiveScore
from critrm.rl import score_rows
from critrm.serving_protocols import (
    AttributeReply,
    AttributeRequest,
    Classified,
    ClassifyReply,
    CompareReply,
    CompareRequest,
    Effect,
    ErrorReply,
    EvaluationReply,
    EvaluationRequest,
    OpenrlhfReply,
    OpenrlhfRequest,
    Pooled,
    PoolingReply,
    PoolRequest,
    Prompt,
    Scored,
    ScoreReply,
    ScoreRequest,
    sigmoid,
)

if TYPE_CHECKING:
    from fastapi import APIRouter

REFUSALS: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorReply, "description": text}
    for status, text in {
        400: "The body cannot be read.",
        401: "The token is missing or wrong.",
        403: "The server answers to localhost only.",
        408: "The request did not arrive in time.",
        413: "The request is too large.",
        422: "The request does not say what to score.",
        429: "Too many requests from this address.",
        503: "The critic failed, the model cannot score this, or too many requests wait; try again.",
    }.items()
}


def own_routes(live: LiveRewardModel, *, name: str) -> "APIRouter":
    """`/v1/score`, `/v1/compare` and what the playground needs besides."""
    from fastapi import APIRouter, Request
    from fastapi.responses import StreamingResponse

    router = APIRouter(responses=REFUSALS, tags=["critrm"])

    @router.post("/v1/score")
    async def score(body: ScoreRequest, request: Request) -> ScoreReply:
        """Critique and reward completions of one prompt."""
        found = await live.score(body.messages(), body.completions, critiques=body.critiques)
        _note(request, found)
        return ScoreReply(id=_id(request), model=name, results=_results(found))

    lines: dict[int | str, dict[str, Any]] = {
        200: {"content": {"application/x-ndjson": {"schema": {"type": "string"}}}}
    }

    @router.post("/v1/score/stream", response_class=StreamingResponse, responses={**REFUSALS, **lines})
    async def score_stream(body: ScoreRequest, request: Request) -> StreamingResponse:
        """The same as JSON lines: each critique as it comes (`index`, `critique`, `failure`), then `results`."""
        return StreamingResponse(_lines(live, body, _id(request)), media_type="application/x-ndjson")

    @router.post("/v1/compare")
    async def compare(body: CompareRequest, request: Request) -> CompareReply:
        """Critique two completions of one prompt, and say which is better."""
        found = await live.score(body.messages(), body.completions, critiques=body.critiques)
        _note(request, found)
        difference = found[0].reward - found[1].reward
        return CompareReply(
            id=_id(request),
            model=name,
            results=_results(found),
            preferred=None if difference == 0 else int(difference < 0),
            probability=sigmoid(difference),
        )

    @router.post("/v1/attribute")
    async def attribute(body: AttributeRequest, request: Request) -> AttributeReply:
        """What each sentence of a critique does to the reward."""
        found = await live.attribute(body.messages(), body.completion, critique=body.critique)
        effects = [Effect(text=each.text, aspect=each.aspect, effect=each.effect) for each in found.sentences]
        return AttributeReply(
            id=_id(request),
            model=name,
            reward=found.reward,
            reward_without=found.reward_without,
            sentences=effects,
        )

    return router


def other_routes(live: LiveRewardModel, *, name: str) -> "APIRouter":
    """The paths of OpenRLHF, vLLM and LLaMA-Factory."""
    from fastapi import APIRouter, Request

    router = APIRouter(responses=REFUSALS, tags=["other tools"])

    @router.post("/get_reward")
    async def get_reward(body: OpenrlhfRequest, request: Request) -> OpenrlhfReply:
        """OpenRLHF's remote reward model."""
        found = await _score_each(live, body.items(), request)
        return OpenrlhfReply.of(found, text_logs=body.text_logs)

    @router.post("/classify")
    async def classify(body: PoolRequest, request: Request) -> ClassifyReply:
        """As vLLM classifies with a model of one label: by default the sigmoid of the reward."""
        values = body.values(await _score_each(live, body.items(), request), default=True)
        return ClassifyReply(model=name, data=[Classified(index=i, probs=[value]) for i, value in enumerate(values)])

    @router.post("/pooling")
    async def pooling(body: PoolRequest, request: Request) -> PoolingReply:
        """As vLLM pools with a reward model: the reward."""
        values = body.values(await _score_each(live, body.items(), request), default=False)
        return PoolingReply(model=name, data=[Pooled(index=i, data=[value]) for i, value in enumerate(values)])

    @router.post("/v1/score/evaluation")
    async def evaluation(body: EvaluationRequest, request: Request) -> EvaluationReply:
        """LLaMA-Factory's reward API."""
        found = await _score_each(live, [split_flat(text) for text in body.messages], request)
        return EvaluationReply(id=_id(request), model=body.model or name, scores=[each.reward for each in found])

    return router


async def _score_each(live: LiveRewardModel, items: Sequence[tuple[Prompt, str]], request: Any) -> list[LiveScore]:
    found = await score_rows(live, [prompt for prompt, _ in items], [completion for _, completion in items])
    _note(request, found)
    return found


async def _lines(live: LiveRewardModel, body: ScoreRequest, request_id: str) -> AsyncIterator[str]:
    events: asyncio.Queue[dict[str, object] | None] = asyncio.Queue()

    def heard(index: int, text: str, failure: str) -> None:
        events.put_nowait({"index": index, "critique": text, "failure": failure.partition(":")[0]})

    call = live.score(
        body.messages(),
        body.completions,
        critiques=body.critiques,
        on_critique=lambda index, critique: heard(index, critique.text, critique.failure),
    )
    task = asyncio.create_task(call)
    task.add_done_callback(lambda _: events.put_nowait(None))
    try:
        while (event := await events.get()) is not None:
            yield json.dumps(event) + "\n"
        yield json.dumps({"results": [each.model_dump() for each in _results(await task)]}) + "\n"
    except CritrmError as error:
        status, code, message = explain(error)
        yield json.dumps({"error": {"code": code, "message": message, "request_id": request_id}}) + "\n"
    finally:
        task.cancel()


def explain(error: CritrmError) -> tuple[int, str, str]:
    """The HTTP status, code and words for an error: nothing about the server's files and hosts."""
    if isinstance(error, DataError):
        return 422, "data", str(error)
    if isinstance(error, CriticError):
        return 503, "critic", str(error)
    return 503, "model", "the reward model cannot score this now; the server's log says why"


def _results(found: Sequence[LiveScore]) -> list[Scored]:
    return [Scored.of(i, each) for i, each in enumerate(found)]


def _id(request: Any) -> str:
    return str(request.scope["critrm"]["request_id"])


def _note(request: Any, found: Sequence[LiveScore]) -> None:
    """For the request's line in the log."""
    request.scope["critrm"]["facts"] |= {
        "completions": len(found),
        "cached": sum(each.cached for each in found),
        "critic_failures": sum(bool(each.failure) for each in found),
    }
