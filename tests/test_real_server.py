"""The command line against a real OpenAI-compatible server with a real model: `transformers serve`, SmolLM2."""

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from contextlib import contextmanager
from pathlib import Path

import pytest

from critrm.critique import critique_pairs
from critrm.critique_cache import CritiqueCache
from critrm.llm import Sampling
from critrm.preferences import read_pairs
from critrm.store import read_records
from critrm.types import Critique

pytestmark = pytest.mark.slow

MAX_TOKENS = 40
SERVE = "from transformers.cli.transformers import main; main()"


@contextmanager
def transformers_serve(model: Path, log: Path):
    """Run the server for the length of a `with` block; gives its base URL."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    arguments = [
        "serve",
        str(model),
        "--host",
        "127.0.0.1",
        "--port",
        str(port),
        "--device",
        "cpu",
        "--dtype",
        "float32",
    ]
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    with log.open("w") as output:
        command = [sys.executable, "-c", SERVE, *arguments]
        server = subprocess.Popen(command, env=environment, stdout=output, stderr=subprocess.STDOUT)
        try:
            wait_until_ready(f"http://127.0.0.1:{port}/health", server, log)
            yield f"http://127.0.0.1:{port}/v1"
        finally:
            server.send_signal(signal.SIGINT)
            try:
                server.wait(timeout=20)
            except subprocess.TimeoutExpired:
                server.kill()
                server.wait()


def wait_until_ready(url: str, server: subprocess.Popen, log: Path) -> None:
    until = time.monotonic() + 180
    while time.monotonic() < until:
        assert server.poll() is None, f"the server ended:\n{log.read_text()[-2000:]}"
        try:
            with urllib.request.urlopen(url, timeout=5):
                return
        except (urllib.error.URLError, TimeoutError, ConnectionError):
            time.sleep(0.5)
    pytest.fail(f"the server was not ready in time:\n{log.read_text()[-2000:]}")


def run_critique(pairs: Path, model: Path, url: str, folder: Path, out: str) -> list[Critique]:
    command = [sys.executable, "-m", "critrm", "critique", str(pairs), "--model", str(model), "--base-url", url]
    command += ["--critic", "smol", "--limit", "3", "--max-tokens", str(MAX_TOKENS), "--temperature", "0"]
    command += ["--concurrency", "2", "--timeout", "300", "--cache", str(folder / "cache.sqlite")]
    done = subprocess.run([*command, "--out", str(folder / out)], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    return list(read_records(folder / out, Critique))


def n_equal_words(first: str, second: str) -> int:
    """How many words two texts have in common from the beginning."""
    words = list(zip(first.split(), second.split(), strict=False))
    return next((i for i, (a, b) in enumerate(words) if a != b), len(words))


def test_critiques_of_a_real_server(smollm2, data_dir, tmp_path):
    pytest.importorskip("fastapi", reason="`transformers serve` needs fastapi (pip install 'transformers[serving]')")
    pytest.importorskip("uvicorn", reason="`transformers serve` needs uvicorn (pip install 'transformers[serving]')")
    pairs, log = data_dir / "hh-pairs" / "pairs.jsonl", tmp_path / "server.log"
    with transformers_serve(smollm2, log) as url:
        rows = run_critique(pairs, smollm2, url, tmp_path, "first.jsonl")
    assert log.read_text().count("POST /v1/chat/completions") == 6
    assert [row.failure for row in rows] == [""] * 6
    assert all(len(row.text.split()) >= 5 for row in rows)
    assert all(0 < row.n_completion_tokens <= MAX_TOKENS and row.n_prompt_tokens > 50 for row in rows)
    assert {row.finish_reason for row in rows} <= {"stop", "length"}

    # The server is gone: every critique comes from the cache.
    assert run_critique(pairs, smollm2, url, tmp_path, "second.jsonl") == rows

    embedded = embedded_critiques(pairs, smollm2, tmp_path)
    # Read by the same tokenizer and chat template. Greedy texts part where two tokens are nearly as likely, which
    # rounding decides; before that they are the same.
    assert [row.n_prompt_tokens for row in rows] == [row.n_prompt_tokens for row in embedded]
    n_equal = sum(row.text == other.text for row, other in zip(rows, embedded, strict=True))
    common = [n_equal_words(row.text, other.text) for row, other in zip(rows, embedded, strict=True)]
    assert min(common) >= 3, common
    assert n_equal >= 3, common


def embedded_critiques(pairs: Path, model: Path, folder: Path) -> list[Critique]:
    from critrm.local_llm import LocalChat

    chat = LocalChat(str(model), device="cpu", dtype="fp32")
    with CritiqueCache(folder / "embedded.sqlite") as cache:
        sampling = Sampling(max_tokens=MAX_TOKENS)
        return critique_pairs(read_pairs(str(pairs), limit=3).pairs, chat, critic="e", sampling=sampling, cache=cache)
