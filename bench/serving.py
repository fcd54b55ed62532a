"""The server under load: critrm serve, a plain FastAPI endpoint and offline scoring; then critics that fail.

    python bench/serving.py --model runs/x/model --pairs arms/x.jsonl --out serving.json
    python bench/serving.py ... --clients 50 200 500 --seconds 120 --critics steady fail hang restart

Clients on kept connections ask, wait for the answer, and ask again; each request is one pair (a prompt, two
completions, their critiques). Every answer is checked against the offline reward of exactly what the answer says was
read; `wrong` are those that differ, `lost` are requests without an answer, `refused` those that the server answered
with an error, as its policy says. Take pairs that fit the model's length: the plain endpoint cuts others differently.

`plain` is what one writes first: an endpoint with AutoModelForSequenceClassification that scores one request at a time;
it is asked by the first number of clients, since more only wait longer.
`offline` is RewardModel.score over the same pairs. Throughput is pairs per second; memory is the server's resident set,
every second. The clients are a process of their own on the same machine, and cost the server what they compute.

With --critics the server asks a critic, a local server that answers at once and each completion differently: `steady`
under all numbers of clients; and under the first of them one that fails 20 % of its calls, hangs for a third of the
time, or is killed and started again.
"""

import argparse
import asyncio
import json
import math
import os
import platform
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from machine import matmul_rate

SOURCE = Path(__file__).parents[1] / "src"
TOLERANCE = {"fp32": 2e-3, "bf16": 0.15}
"""How far a reward may be from the offline one: rows are packed differently, which rounds differently."""
CRITICS = ("steady", "fail", "hang", "restart")
PATIENCE = 900.0
"""Seconds that a client waits for an answer before it is lost: many clients of a slow machine wait long."""
PERIOD = 6.0
"""Seconds after which a critic that hangs or is killed is itself again, and the other way round."""


# The critic


def critique_of(text: str) -> str:
    """Depends on what is asked, so that a mixed-up answer shows."""
    return f"The response has {len(text)} characters. It is {'helpful' if len(text) % 2 else 'of little use'}."


async def serve_critic(port: int, kind: str) -> None:
    """An OpenAI-compatible endpoint that answers at once, except as its kind says."""
    started = time.monotonic()

    async def client(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                length = int(head.lower().partition(b"content-length:")[2].split(b"\r\n", 1)[0])
                asked = json.loads(await reader.readexactly(length))["messages"][0]["content"]
                phase = int((time.monotonic() - started) / PERIOD)
                if kind == "hang" and phase % 3 == 1:
                    await asyncio.sleep(3600)
                status, body = "200 OK", _completion(critique_of(asked))
                if kind == "fail" and os.urandom(1)[0] < 256 * 0.2:
                    status, body = "500 Internal Server Error", b'{"error": {"message": "as asked"}}'
                head = f"HTTP/1.1 {status}\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
                writer.write(head.encode() + body)
                await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError):
            writer.close()

    server = await asyncio.start_server(client, "127.0.0.1", port, backlog=2048, limit=2**24)
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    await server.serve_forever()


def _completion(text: str) -> bytes:
    choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}
    usage = {"prompt_tokens": 100, "completion_tokens": 20, "total_tokens": 120}
    return json.dumps({"id": "x", "object": "chat.completion", "choices": [choice], "usage": usage}).encode()


@contextmanager
def critic(kind: str) -> Iterator[str]:
    """Run the critic; `restart` kills it and starts it again, for as long as it is wanted."""
    port, ended = _free_port(), threading.Event()
    words = [sys.executable, __file__, "--side", "critic", "--port", str(port), "--kind", kind]

    def start() -> subprocess.Popen[str]:
        process = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)
        process.stdout.readline()  # type: ignore[union-attr]
        return process

    running = [start()]

    def trouble() -> None:
        while not ended.wait(PERIOD):
            running[0].kill()
            running[0].wait()
            if not ended.wait(PERIOD / 3):
                running[0] = start()

    thread = threading.Thread(target=trouble)
    if kind == "restart":
        thread.start()
    try:
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        ended.set()
        if kind == "restart":
            thread.join()
        running[0].kill()
        running[0].wait()


# The plain endpoint


def serve_plain(arguments: argparse.Namespace) -> None:
    """One request at a time, padded, as the tutorials have it."""
    import torch
    import uvicorn
    from fastapi import FastAPI
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    from critrm.models import choose_device
    from critrm.prompts import reward_segments
    from critrm.types import Message

    dtype = torch.bfloat16 if arguments.precision == "bf16" else torch.float32
    model = AutoModelForSequenceClassification.from_pretrained(arguments.model, dtype=dtype).eval().to(choose_device())
    tokenizer = AutoTokenizer.from_pretrained(arguments.model, padding_side="right")
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    app, lock = FastAPI(), threading.Lock()

    @app.get("/health")
    def health() -> dict[str, str]:
        return {"status": "ok"}

    @app.post("/v1/score")
    def score(body: dict[str, Any]) -> dict[str, Any]:
        prompt = tuple(Message(**each) for each in body["prompt"])
        given = body.get("critiques") or [""] * len(body["completions"])
        texts = ["".join(reward_segments(prompt, y, c)) for y, c in zip(body["completions"], given, strict=True)]
        with lock, torch.no_grad():
            cut = {"truncation": True, "max_length": arguments.max_length}
            inputs = tokenizer(texts, padding=True, return_tensors="pt", **cut).to(model.device)
            rewards = model(**inputs).logits[:, 0].float().cpu().tolist()
        return {"results": [{"reward": r, "critique": c} for r, c in zip(rewards, given, strict=True)]}

    uvicorn.run(app, port=arguments.port, log_level="warning")


# The clients


async def load(task: dict[str, Any]) -> dict[str, Any]:
    """So many clients for so many seconds; returns seconds per answer, and each answer."""
    bodies = [json.dumps(body).encode() for body in task["bodies"]]
    until = time.monotonic() + task["seconds"]
    found: dict[str, Any] = {"seconds": [], "answers": [], "statuses": Counter(), "lost": 0}
    numbers = iter(range(10**9))
    started = time.monotonic()
    await asyncio.gather(*(_client(task["port"], bodies, numbers, until, found) for _ in range(task["clients"])))
    return found | {"took": time.monotonic() - started}


async def _client(port: int, bodies: list[bytes], numbers: Iterator[int], until: float, found: dict[str, Any]) -> None:
    writer: asyncio.StreamWriter | None = None
    while time.monotonic() < until:
        number = next(numbers) % len(bodies)
        started = time.monotonic()
        try:
            if writer is None:
                reader, writer = await asyncio.open_connection("127.0.0.1", port)
            head = f"POST /v1/score HTTP/1.1\r\nhost: localhost\r\ncontent-length: {len(bodies[number])}\r\n"
            writer.write(head.encode() + b"content-type: application/json\r\n\r\n" + bodies[number])
            async with asyncio.timeout(PATIENCE):
                head_found = await reader.readuntil(b"\r\n\r\n")
                length = int(head_found.lower().partition(b"content-length:")[2].split(b"\r\n", 1)[0])
                body = await reader.readexactly(length)
        except (OSError, asyncio.IncompleteReadError, TimeoutError):
            found["lost"] += 1
            if writer:
                writer.close()
            writer = None
            continue
        status = int(head_found.split(b" ", 2)[1])
        found["statuses"][str(status)] += 1
        if status == 200:
            found["seconds"].append(time.monotonic() - started)
            results = json.loads(body)["results"]
            found["answers"].append([number, *((each["reward"], each["critique"]) for each in results)])
    if writer:
        writer.close()


# Servers, and measuring them


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port: int = taken.getsockname()[1]
        return port


@contextmanager
def server(words: list[str], port: int, log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """Run a server until the block ends, then have it drain."""
    with log.open("wb") as out:
        process = subprocess.Popen([sys.executable, *words], stdout=out, stderr=out, env=_environment())
    try:
        until = time.monotonic() + 300
        while not _is_up(port):
            if process.poll() is not None or time.monotonic() > until:
                raise SystemExit(f"the server did not start:\n{log.read_text()[-2000:]}")
            time.sleep(0.2)
        yield process
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()


def _is_up(port: int) -> bool:
    try:
        with socket.create_connection(("127.0.0.1", port), timeout=1):
            return True
    except OSError:
        return False


def _environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(SOURCE), "HF_HUB_OFFLINE": "1", "NO_PROXY": "127.0.0.1", "CRITRM_TOKEN": ""}


def measured(process: subprocess.Popen[bytes], port: int, bodies: list[Any], *, clients: int, seconds: float) -> Any:
    """The load's result, and the server's memory meanwhile, in MB."""
    memory: list[float] = []
    ended = threading.Event()

    def watch() -> None:
        page = os.sysconf("SC_PAGE_SIZE")
        while not ended.wait(1.0):
            resident = int(Path(f"/proc/{process.pid}/statm").read_text().split()[1])
            memory.append(resident * page / 2**20)

    thread = threading.Thread(target=watch)
    thread.start()
    with tempfile.TemporaryDirectory() as folder:
        task = Path(folder) / "task.json"
        task.write_text(json.dumps({"port": port, "bodies": bodies, "clients": clients, "seconds": seconds}))
        words = [sys.executable, __file__, "--side", "load", "--task", str(task)]
        found = json.loads(subprocess.run(words, check=True, capture_output=True, env=_environment()).stdout)
    ended.set()
    thread.join()
    return found | {"memory": memory}


def summary(found: dict[str, Any], check: Callable[[list[Any]], bool]) -> dict[str, float]:
    """Throughput, latency, and how many answers were not what they should be."""
    seconds = sorted(found["seconds"]) or [math.nan]
    memory = found["memory"] or [math.nan]
    half = len(memory) // 2
    return {
        "pairs_per_second": len(found["answers"]) / found["took"],
        "p50_ms": 1000 * seconds[len(seconds) // 2],
        "p99_ms": 1000 * seconds[min(len(seconds) - 1, int(0.99 * len(seconds)))],
        "answers": len(found["answers"]),
        "wrong": sum(not check(answer) for answer in found["answers"]),
        "lost": found["lost"],
        "refused": sum(n for status, n in found["statuses"].items() if status != "200"),
        "memory_mb": memory[-1],
        # From the first half, in which caches fill, to the second.
        "memory_growth_mb": max(memory[half:]) - max(memory[: half or None]),
    }


class Offline:
    """The rewards that answers are checked against, and offline throughput."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        from critrm.reward_model import RewardModel
        from critrm.store import read_records
        from critrm.types import CritiquedPair

        self.model = RewardModel.load(arguments.model, precision=arguments.precision)
        self.items = read_records(arguments.pairs, CritiquedPair)[: arguments.n]
        self.steps = {"max_tokens_per_step": arguments.max_tokens_per_step}
        self.tolerance = TOLERANCE[arguments.precision]
        self.known: dict[tuple[int, int, str], float] = {}

    def pairs_per_second(self, repeats: int) -> float:
        """Of RewardModel.score, loading left out; the median."""
        self.model.score(self.items[:2], **self.steps)
        rates = []
        for _ in range(repeats):
            started = time.perf_counter()
            n_scored = len(self.model.score(self.items, **self.steps))
            rates.append(n_scored / (time.perf_counter() - started))
        return statistics.median(rates)

    def check(self, answer: list[Any]) -> bool:
        """Whether an answer's rewards are the offline ones of what it says was read."""
        number, *results = answer
        item = self.items[number]
        good = len(results) == 2
        for side, (reward, critique) in enumerate(results):
            if (number, side, critique) not in self.known:
                text = (item.pair.chosen, item.pair.rejected)[side]
                (offline,) = self.model.score_completions(item.pair.prompt, [text], critiques=[critique])
                self.known[number, side, critique] = offline
            good = good and abs(reward - self.known[number, side, critique]) <= self.tolerance
        return good

    def bodies(self, *, critiques: bool) -> list[dict[str, Any]]:
        """One request per pair, with or without its critiques."""
        bodies = []
        for item in self.items:
            prompt = [{"role": each.role, "content": each.content} for each in item.pair.prompt]
            body: dict[str, Any] = {"prompt": prompt, "completions": [item.pair.chosen, item.pair.rejected]}
            if critiques and item.chosen_critique:
                body["critiques"] = [item.chosen_critique, item.rejected_critique]
            bodies.append(body)
        return bodies


def serve_words(arguments: argparse.Namespace, port: int, *more: str) -> list[str]:
    """The command line of critrm's server."""
    words = ["-m", "critrm", "serve", arguments.model, "--port", str(port), "--precision", arguments.precision]
    return [*words, "--max-tokens-per-step", str(arguments.max_tokens_per_step), *more]


def measure(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Offline, then both servers under the same load, then the critics."""
    offline = Offline(arguments)
    reads = offline.model.critic
    rows: dict[str, Any] = {"offline": {"pairs_per_second": offline.pairs_per_second(arguments.repeats)}}
    seconds, name = arguments.seconds, ["--critic", reads, "--model", "m", "--key-variable", ""]
    # Its critiques are in the requests; the critic is named because the model reads one, and never asked.
    silent = [] if reads == "none" else [*name, "--base-url", "http://127.0.0.1:9/v1"]
    for side in arguments.sides:
        for clients in arguments.clients[: None if side == "critrm" else 1]:
            port = _free_port()
            words = serve_words(arguments, port, *silent)
            if side == "plain":
                words = [__file__, *_flags(arguments), "--side", "plain", "--port", str(port)]
                words += ["--max-length", str(offline.model.reads.max_length)]
            with server(words, port, folder / f"{side}-{clients}.log") as process:
                bodies = offline.bodies(critiques=True)
                measured(process, port, bodies, clients=min(clients, 8), seconds=min(2.0, seconds))
                found = measured(process, port, bodies, clients=clients, seconds=seconds)
            rows[f"{side} {clients}"] = summary(found, offline.check)
    for kind in arguments.critics if reads != "none" else ():
        for clients in arguments.clients[: None if kind == "steady" else 1]:
            with critic(kind) as url:
                port = _free_port()
                more = [*name, "--base-url", url, "--cache", str(folder / f"{kind}-{clients}.sqlite"), "--timeout", "3"]
                more += ["--critic-seconds", "30", "--concurrency", "64"]
                with server(serve_words(arguments, port, *more), port, folder / f"{kind}-{clients}.log") as process:
                    bodies = offline.bodies(critiques=False)
                    found = measured(process, port, bodies, clients=clients, seconds=seconds)
            rows[f"{kind} critic {clients}"] = summary(found, offline.check)
    return rows


def _flags(arguments: argparse.Namespace) -> list[str]:
    return ["--model", arguments.model, "--pairs", arguments.pairs, "--precision", arguments.precision]


def show(rows: dict[str, Any]) -> None:
    """The rows as a table."""
    from rich import box
    from rich.console import Console
    from rich.table import Column, Table

    names = ("pairs\n/s", "share", "p50\ns", "p99\ns", "an-\nswers", "wrong, lost,\nrefused", "MB", "MB\ngrown")
    numbers = (Column(name, justify="right", no_wrap=True) for name in names)
    side = Column("side, clients", no_wrap=True)
    table = Table(side, *numbers, box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    base = rows["offline"]["pairs_per_second"]
    for name, row in rows.items():
        rate = row["pairs_per_second"]
        cells = [f"{rate:,.1f}", f"{rate / base:.0%}"]
        if len(row) > 1:
            cells += [f"{row[key] / 1000:.3g}" for key in ("p50_ms", "p99_ms")]
            cells += [f"{row['answers']:,}", f"{row['wrong']}, {row['lost']}, {row['refused']}"]
            cells += [f"{row['memory_mb']:,.0f}", f"{row['memory_growth_mb']:+,.0f}"]
        table.add_row(name, *cells)
    Console().print(table)
    Console().print("share: of offline throughput. grown: from the load's first half to its second.")


def arguments_of(words: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="", help="a reward model's folder")
    parser.add_argument("--pairs", default="", help="an arm that `critrm augment` wrote, with the model's critic")
    parser.add_argument("--n", type=int, default=256, help="pairs")
    parser.add_argument("--clients", type=int, nargs="+", default=[50, 200, 500])
    parser.add_argument("--sides", nargs="+", choices=("critrm", "plain"), default=["critrm", "plain"])
    parser.add_argument("--seconds", type=float, default=120.0, help="of each load")
    parser.add_argument("--critics", nargs="*", choices=CRITICS, default=[])
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--max-tokens-per-step", type=int, default=4096)
    parser.add_argument("--repeats", type=int, default=3, help="of offline scoring")
    parser.add_argument("--out", type=Path, help="where the numbers go, as JSON")
    parser.add_argument("--side", default="", help=argparse.SUPPRESS)
    parser.add_argument("--port", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("--kind", default="", help=argparse.SUPPRESS)
    parser.add_argument("--task", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--max-length", type=int, default=2048, help=argparse.SUPPRESS)
    return parser.parse_args(words)


def machine(precision: str) -> dict[str, object]:
    """Where the numbers come from."""
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    name = torch.cuda.get_device_name() if device == "cuda" else platform.processor()
    facts = {"device": name, "n_cpus": os.cpu_count(), "load_before": os.getloadavg(), "torch": torch.__version__}
    return facts | {"matmul_tflops": round(matmul_rate(precision, device=device) / 1e12, 3)}


def main() -> None:
    """Measure, show and write."""
    arguments = arguments_of()
    if arguments.side == "critic":
        asyncio.run(serve_critic(arguments.port, arguments.kind))
    elif arguments.side == "plain":
        serve_plain(arguments)
    elif arguments.side == "load":
        sys.stdout.write(json.dumps(asyncio.run(load(json.loads(arguments.task.read_text())))))
    else:
        facts = machine(arguments.precision)
        with tempfile.TemporaryDirectory() as folder:
            rows = measure(arguments, Path(folder))
        show(rows)
        if arguments.out:
            names = ("n", "clients", "seconds", "critics", "precision", "max_tokens_per_step", "repeats")
            settings = {name: getattr(arguments, name) for name in names}
            text = json.dumps({"machine": facts, "settings": settings, "rows": rows}, indent=1)
            arguments.out.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
