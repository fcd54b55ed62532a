"""Stage 9: critique and score over HTTP, closed by default.

One port speaks our own protocol and those of OpenRLHF, vLLM and LLaMA-Factory; `/` is a page to try it on.
"""

import os
import signal
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Literal

from rich.console import Console

from critrm.errors import ConfigError
from critrm.rl import open_reward_model
from critrm.serving_app import create_app
from critrm.serving_guard import Guard, Limits, is_loopback
from critrm.serving_logs import log_json_lines

TOKEN_VARIABLE = "CRITRM_TOKEN"
REMOTE_RATE = 12_000.0
"""Requests per minute of one address, where the server is open to others."""
DRAIN_SECONDS = 30.0
"""More than a critique may take, for the requests under way when the server is told to stop."""


def run_server(
    app: Guard, *, host: str, port: int, drain: float, on_ready: Callable[[str], None], on_end: Callable[[], None]
) -> None:
    """Serve until SIGTERM or Ctrl-C; requests under way are then answered, new ones are not taken.

    Args:
        app: the application.
        host: where to listen.
        port: 0 takes a free one.
        drain: seconds that requests under way may take at the end.
        on_ready: is told the server's address when it listens.
        on_end: called when the last request is answered.

    Raises:
        ConfigError: the address cannot be used.
    """
    import uvicorn

    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        listening = socket.create_server((host, port), family=family, backlog=2048)
    except OSError as error:
        raise ConfigError(f"cannot listen on {host}:{port}: {error.strerror}. Choose another --port.") from None

    shown = f"[{host}]" if ":" in host else host
    config = uvicorn.Config(
        app,
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        timeout_graceful_shutdown=max(1, round(drain)),
        backlog=2048,
        ws="none",
    )
    # uvicorn drains, and then raises the signal again for whoever handled it before: that it was one is no error.
    before = signal.signal(signal.SIGTERM, lambda *_: None)
    try:
        on_ready(f"http://{shown}:{listening.getsockname()[1]}")
        uvicorn.Server(config).run(sockets=[listening])
    finally:
        signal.signal(signal.SIGTERM, before)
        on_end()


def command(
    run: str,
    *,
    critic: str = "",
    host: str = "127.0.0.1",
    port: int = 8000,
    token_variable: str = TOKEN_VARIABLE,
    on_critic_failure: Literal["raise", "without"] = "raise",
    critic_retries: int = 1,
    critic_seconds: float = 120.0,
    max_cost: float | None = None,
    max_tokens_per_step: int = 4096,
    max_body_mb: float = 8.0,
    max_in_flight: int = 1024,
    requests_per_minute: float | None = None,
    allow_other_critic: bool = False,
    model: str = "",
    critics: Path | None = None,
    base_url: str | None = None,
    key_variable: str | None = None,
    temperature: float | None = None,
    top_p: float | None = None,
    max_tokens: int | None = None,
    seed: int | None = None,
    template: str | None = None,
    concurrency: int | None = None,
    timeout: float | None = None,
    cache: Path | None = None,
    device: str | None = None,
    precision: Literal["auto", "fp32", "bf16"] = "auto",
) -> None:
    """Critique and score over HTTP: one request in, critiques and rewards out; SIGTERM drains.

    Args:
        run: the run's folder, a reward model's folder, or a hub id.
        critic: the critic, which has to be the one of the model's training; none for a model that needs none.
        host: where to listen; anything but this machine needs a token.
        port: the port; 0 takes a free one.
        token_variable: the environment variable that holds the bearer token; no token is asked for when it is empty.
        on_critic_failure: when the critic has failed: answer with an error, or score without critiques, which only a
            model can that was trained with critique_dropout.
        critic_retries: how often a failed call is made again, beyond what the client does by itself.
        critic_seconds: how long a critique may take, retries and waiting included.
        max_cost: US dollars that the critic may cost while the server runs; then its calls are not made, which counts
            as its failure.
        max_tokens_per_step: how many tokens are computed at once; does not change the scores.
        max_body_mb: size of a request.
        max_in_flight: requests that may wait for an answer at once.
        requests_per_minute: of one address, 0 for no limit; 12,000 when others than this machine can ask.
        allow_other_critic: read critiques of another critic than in training.
        model: the critic's served model, `embedded:NAME` or `local:FOLDER`; the named critic's when not given.
        critics: a file of your own critics.
        base_url: the critic's OpenAI-compatible endpoint, or several of the same model with commas between.
        key_variable: the environment variable that holds the critic's key.
        temperature: the critic's sampling, as in training: 0 is greedy.
        top_p: share of the probability that is sampled from.
        max_tokens: length of a critique.
        seed: of the sampling.
        template: Appendix A's `critique`, or a file of your own.
        concurrency: critic calls under way at once; 16 when not given.
        timeout: seconds to wait for one answer of the critic; 60 when not given.
        cache: the file of answered calls; one for all runs when not given.
        device: of the reward model: `cpu`, `cuda`, ...; the best there is when not given.
        precision: of the reward model.
    """
    token = os.environ.get(token_variable, "").strip()
    is_open = not is_loopback(host)
    if is_open and not token:
        raise ConfigError(
            f"--host {host} lets others in: put a token into the environment variable {token_variable} "
            f"(export {token_variable}=$(openssl rand -hex 24)), which clients then send"
        )
    rate = requests_per_minute if requests_per_minute is not None else REMOTE_RATE if is_open else 0.0
    limits = Limits(
        token=token, max_body=int(max_body_mb * 2**20), max_in_flight=max_in_flight, requests_per_minute=rate
    )
    given = {
        "model": model or None,
        "base_url": base_url,
        "key_variable": key_variable,
        "temperature": temperature,
        "top_p": top_p,
        "max_tokens": max_tokens,
        "seed": seed,
        "template": template,
        "concurrency": concurrency,
        "timeout": timeout,
    }
    console = Console()
    live = open_reward_model(
        run,
        critic=critic,
        settings={field: value for field, value in given.items() if value is not None},
        critics=critics,
        on_failure=on_critic_failure,
        retries=critic_retries,
        deadline=critic_seconds,
        max_cost=max_cost,
        cache=cache,
        device=device,
        precision=precision,
        allow_other_critic=allow_other_critic,
        max_tokens_per_step=max_tokens_per_step,
    )
    name = Path(run).parent.name if Path(run).name == "model" else Path(run).name
    log_json_lines()
    run_server(
        create_app(live, name=name, limits=limits),
        host=host,
        port=port,
        drain=critic_seconds + DRAIN_SECONDS,
        on_ready=lambda url: console.print(f"Serving {live.model.name} on {url}", soft_wrap=True, markup=False),
        on_end=live.close,
    )
