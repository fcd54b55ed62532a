"""The server's application: its paths, the page at `/`, and errors that say what to do and nothing of the inside."""

import logging
import secrets
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jinja2

from critrm import __version__
from critrm.errors import CritrmError
from critrm.live import LiveRewardModel
from critrm.serving_guard import Guard, Limits
from critrm.serving_logs import Metrics
from critrm.serving_protocols import ErrorDetail, ErrorReply, Health
from critrm.serving_routes import REFUSALS, explain, other_routes, own_routes

if TYPE_CHECKING:
    from fastapi import FastAPI

_log = logging.getLogger("critrm.serve")

PAGE = Path(__file__).with_name("templates") / "playground.html"


def create_app(live: LiveRewardModel, *, name: str, limits: Limits | None = None) -> Guard:
    """The ASGI application; whoever runs it closes `live` afterwards.

    Args:
        live: the reward model and its critic.
        name: what the model is called in replies.
        limits: what clients may ask for; no token is needed by default, and then only this machine is answered.
    """
    from fastapi import Depends, FastAPI
    from fastapi.security import HTTPBearer

    limits, metrics = limits or Limits(), Metrics(live)
    app = FastAPI(
        title="critrm",
        version=__version__,
        description=f"Critique and score: the reward model {name}, critic {live.model.critic}.",
        docs_url=None,  # they load scripts from elsewhere
        redoc_url=None,
    )
    # Checked by the guard; this is for the description.
    needs = [Depends(HTTPBearer(auto_error=False))] if limits.token else []
    app.include_router(own_routes(live, name=name), dependencies=needs)
    app.include_router(other_routes(live, name=name), dependencies=needs)
    _add_plain_routes(app, live, metrics, name=name, limits=limits, dependencies=needs)
    _add_errors(app)
    paths = frozenset(app.openapi()["paths"]) | {"/", "/openapi.json"}
    return Guard(app, limits, metrics=metrics, paths=paths)


def _add_plain_routes(
    app: "FastAPI", live: LiveRewardModel, metrics: Metrics, *, name: str, limits: Limits, dependencies: list[Any]
) -> None:
    from fastapi.responses import HTMLResponse, Response

    @app.get("/health", responses={403: REFUSALS[403]})
    async def health() -> Health:
        """Whether the server can score."""
        return Health(status="ok", model=name, critic=live.model.critic, n_waiting=live.batcher.stats.n_waiting)

    text: dict[int | str, dict[str, Any]] = {200: {"content": {"text/plain": {"schema": {"type": "string"}}}}}

    @app.get(
        "/metrics", response_class=Response, responses={**text, **_some(401, 403, 429, 503)}, dependencies=dependencies
    )
    async def show_metrics() -> Response:
        """Counts for Prometheus."""
        body, media_type = metrics.text()
        return Response(body, media_type=media_type)

    @app.get("/", include_in_schema=False)
    async def playground() -> HTMLResponse:
        nonce = secrets.token_urlsafe(16)
        policy = (
            f"default-src 'none'; script-src 'nonce-{nonce}'; style-src 'nonce-{nonce}'; connect-src 'self'; "
            "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
        )
        page = _page(nonce=nonce, model=name, critic=live.model.critic, needs_token=bool(limits.token))
        return HTMLResponse(page, headers={"content-security-policy": policy})


def _some(*statuses: int) -> dict[int | str, dict[str, Any]]:
    return {status: REFUSALS[status] for status in statuses}


def _page(**values: object) -> str:
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    return environment.from_string(PAGE.read_text(encoding="utf-8")).render(values)


def _add_errors(app: "FastAPI") -> None:
    from fastapi import Request
    from fastapi.exceptions import RequestValidationError
    from fastapi.responses import JSONResponse
    from starlette.exceptions import HTTPException

    def reply(request: Request, status: int, code: str, message: str) -> JSONResponse:
        # A lone surrogate in a field's name cannot be sent.
        message = message.encode("utf-8", "replace").decode("utf-8")
        request_id = request.scope["critrm"]["request_id"]
        error = ErrorReply(error=ErrorDetail(code=code, message=message, request_id=request_id))
        headers = {"retry-after": "5"} if status == 503 else None
        return JSONResponse(error.model_dump(), status_code=status, headers=headers)

    @app.exception_handler(RequestValidationError)
    async def not_valid(request: Request, error: RequestValidationError) -> JSONResponse:
        # Where and what, but not what was sent.
        problems = [f"{'.'.join(map(str, each['loc']))}: {each['msg']}" for each in error.errors()[:10]]
        return reply(request, 422, "request", "; ".join(problems)[:2000])

    @app.exception_handler(HTTPException)
    async def http_error(request: Request, error: HTTPException) -> JSONResponse:
        answer = reply(request, error.status_code, "http", str(error.detail))
        answer.headers.update(error.headers or {})
        return answer

    @app.exception_handler(CritrmError)
    async def critrm_error(request: Request, error: CritrmError) -> JSONResponse:
        status, code, message = explain(error)
        facts = {"request_id": request.scope["critrm"]["request_id"], "reason": str(error)}
        if status != 422:
            _log.warning(f"{code} failed", extra={"facts": facts})
        return reply(request, status, code, message)
