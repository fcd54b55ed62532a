"""`critrm critique` killed at any moment: nothing that was paid for is lost, and the same command goes on."""

import hashlib
import json
import logging
import os
import random
import re
import resource
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from critrm.critique_cache import CritiqueCache
from scripted_server import Answer, Server, completion, serving

SOURCE = Path(__file__).parents[1] / "src"
CONCURRENCY = 4
LOG = logging.getLogger(__name__)


def write_pairs(path: Path, n: int) -> None:
    rows = [
        {"id": f"p{i}", "prompt": f"Question {i}?", "chosen": f"Yes zq{i}c.", "rejected": f"No zq{i}r."}
        for i in range(n)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def critique_of(text: str) -> str:
    """What the server answers about a completion: a hash of what marks it."""
    mark = re.findall(r"zq\d+[cr]", text)[-1]
    return f"Critique {hashlib.sha256(mark.encode()).hexdigest()}"


def command(folder: Path, url: str, *, out: str = "out.jsonl") -> list[str]:
    words = [sys.executable, "-m", "critrm", "critique", str(folder / "pairs.jsonl"), "--model", "m"]
    words += ["--base-url", url, "--out", str(folder / out), "--cache", str(folder / "cache")]
    return [*words, "--concurrency", str(CONCURRENCY)]


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(SOURCE), "NO_PROXY": "127.0.0.1", "COLUMNS": "200"}


def start(words: list[str], **settings: Any) -> subprocess.Popen[str]:
    pipe = subprocess.PIPE
    return subprocess.Popen(words, env=environment(), stdout=pipe, stderr=subprocess.STDOUT, text=True, **settings)


def check(out: Path, n_pairs: int) -> None:
    """Every completion has its own critique, in order."""
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [(row["pair_id"], row["side"]) for row in rows] == [
        (f"p{i}", side) for i in range(n_pairs) for side in ("chosen", "rejected")
    ]
    for row in rows:
        assert row["text"] == critique_of(f"zq{row['pair_id'][1:]}{row['side'][0]}") and not row["failure"]


@dataclass
class Facts:
    """What happened to one job that was killed again and again."""

    n_kills: int = 0
    n_kills_while_calling: int = 0
    n_in_flight: int = 0
    """Calls under way at the server, over all kills."""
    n_stored: list[int] = field(default_factory=list)
    """Calls in the cache, after each kill."""


def wait_for_a_call(process: subprocess.Popen[str], server: Server, n_before: int) -> None:
    while len(server.bodies) == n_before:
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.01)


def kill_again_and_again(folder: Path, server: Server, *, n_kills: int, seed: int) -> Facts:
    """Start the command and kill it at a random moment, from before its first line to the midst of the calls."""
    facts, moments = Facts(), random.Random(seed)
    started = time.monotonic()
    with start(command(folder, server.url)) as process:  # to learn how long a start takes
        wait_for_a_call(process, server, 0)
        process.kill()
    start_seconds = time.monotonic() - started
    while facts.n_kills < n_kills:
        n_before = len(server.bodies)
        with start(command(folder, server.url)) as process:
            # Every other kill comes while it starts (or, on a quick machine, soon after), the rest amid the calls.
            if facts.n_kills % 2:
                time.sleep(start_seconds * moments.uniform(0.2, 1))
            else:
                wait_for_a_call(process, server, n_before)
                time.sleep(moments.random())
            in_flight = server.n_under_way
            assert process.poll() is None, process.communicate()[0]  # there is work left
            process.kill()
        facts.n_kills += 1
        facts.n_kills_while_calling += len(server.bodies) > n_before
        facts.n_in_flight += in_flight
        with CritiqueCache(folder / "cache") as cache:
            facts.n_stored.append(len(cache))
        # Each answer that was delivered is stored, but for those on their way at a kill (one more for the first).
        assert server.n_answered - facts.n_stored[-1] <= CONCURRENCY * (facts.n_kills + 1)
    return facts


@pytest.mark.parametrize(
    ("n_kills", "n_pairs", "delay"), [(10, 300, 0.1), pytest.param(200, 2500, 0.1, marks=pytest.mark.slow)]
)
def test_kill_9_at_random_moments(tmp_path: Path, n_kills: int, n_pairs: int, delay: float) -> None:
    write_pairs(tmp_path / "pairs.jsonl", n_pairs)
    seconds = delay

    def answer(body: dict[str, Any]) -> Answer:
        return Answer(body=completion(critique_of(body["messages"][-1]["content"])).body, delay=seconds)

    with serving(answer) as server:
        facts = kill_again_and_again(tmp_path, server, n_kills=n_kills, seed=n_kills)
        seconds = 0.0
        with start(command(tmp_path, server.url)) as process:
            output = process.communicate(timeout=300)[0]
        assert process.returncode == 0, output
        n_calls, n_sent, n_answered = 2 * n_pairs, len(server.bodies), server.n_answered
    check(tmp_path / "out.jsonl", n_pairs)
    with CritiqueCache(tmp_path / "cache") as cache:
        assert len(cache) == n_calls
    assert facts.n_stored == sorted(facts.n_stored)
    assert n_calls <= n_answered <= n_sent <= n_calls + CONCURRENCY * (n_kills + 1)
    assert facts.n_kills == n_kills and facts.n_kills_while_calling >= n_kills / 2
    LOG.info(
        "%d kills (%d while calling, %d calls in flight): %d calls sent, %d answered, for %d",
        *(n_kills, facts.n_kills_while_calling, facts.n_in_flight, n_sent, n_answered, n_calls),
    )


def test_two_processes_on_one_cache_at_once(tmp_path: Path) -> None:
    write_pairs(tmp_path / "pairs.jsonl", 100)

    def answer(body: dict[str, Any]) -> Answer:
        return Answer(body=completion(critique_of(body["messages"][-1]["content"])).body, delay=0.005)

    with serving(answer) as server:
        both = [start(command(tmp_path, server.url, out=out)) for out in ("a.jsonl", "b.jsonl")]
        for process in both:
            output = process.communicate(timeout=120)[0]
            assert process.returncode == 0, output
        assert 200 <= server.n_answered <= 400
    for out in ("a.jsonl", "b.jsonl"):
        check(tmp_path / out, 100)
    with CritiqueCache(tmp_path / "cache") as cache:
        assert len(cache) == 200


def test_a_disk_that_fills_up_loses_nothing(tmp_path: Path) -> None:
    write_pairs(tmp_path / "pairs.jsonl", 100)

    def answer(body: dict[str, Any]) -> Answer:
        return completion(critique_of(body["messages"][-1]["content"]))

    def small_disk() -> None:
        # A limit on a file's size fails a write midway, as a full disk does.
        resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))

    with serving(answer) as server:
        with start(command(tmp_path, server.url), preexec_fn=small_disk) as process:
            output = process.communicate(timeout=120)[0]
        assert process.returncode not in (0, None), output
        assert "cache: cannot write" in output and "Traceback" not in output
        with CritiqueCache(tmp_path / "cache") as cache:
            n_stored = len(cache)
        assert 10 < n_stored < 200
        assert server.n_answered - n_stored <= CONCURRENCY
        with start(command(tmp_path, server.url)) as process:
            output = process.communicate(timeout=120)[0]
        assert process.returncode == 0, output
        assert server.n_answered <= 200 + CONCURRENCY
    check(tmp_path / "out.jsonl", 100)
