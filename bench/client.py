"""What a call costs: critrm's client, a bare openai loop and distilabel against one instantly answering local server.

    python bench/client.py --calls 20000 --concurrency 256 --out client.json
    python bench/client.py --peer-python PEER-VENV/bin/python      (a venv with distilabel[openai] and requests)

The server answers at once from a process of its own, so all that is left is the client's work. The sides take turns,
each run in a fresh process; the table shows medians. CPU is that of the client's processes, imports not counted.
Last, calls that are answered without any server show whether memory grows with their number.
"""

import argparse
import asyncio
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

SOURCE = Path(__file__).parents[1] / "src"
PROMPT = "Write a critique of this response. " * 30
ANSWER = "The response is correct and to the point, but it gives no source for its second claim. " * 5
SIDES = {
    "critrm": "critrm: OpenAIChat.stream",
    "stored": "critrm, every answer stored in the cache",
    "bare": "openai: AsyncOpenAI with a semaphore",
    "distilabel": "distilabel: OpenAILLM, by 256",
    "pipeline": "distilabel: a pipeline of TextGeneration",
}
PEERS = ("distilabel", "pipeline")


# The server


class Instant(asyncio.Protocol):
    """Just enough HTTP: every request gets the same completion over a connection that is kept."""

    response = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """A client has come."""
        self.transport, self.received = transport, b""

    def data_received(self, data: bytes) -> None:
        """Answer each request that is complete."""
        self.received += data
        while (end := self.received.find(b"\r\n\r\n")) >= 0:
            head = self.received[:end].lower()
            start = head.find(b"content-length:")
            length = int(head[start + 15 :].split(b"\r\n", 1)[0]) if start >= 0 else 0
            if len(self.received) < end + 4 + length:
                return
            self.received = self.received[end + 4 + length :]
            self.transport.write(self.response)  # type: ignore[attr-defined]


async def serve() -> None:
    """Answer until killed; the first line written is the port."""
    choice = {"index": 0, "message": {"role": "assistant", "content": ANSWER}, "finish_reason": "stop"}
    usage = {"prompt_tokens": 220, "completion_tokens": 95, "total_tokens": 315}
    body = {"id": "x", "object": "chat.completion", "created": 1, "model": "m", "choices": [choice], "usage": usage}
    data = json.dumps(body).encode()
    head = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n" % len(data)
    Instant.response = head + data
    server = await asyncio.get_running_loop().create_server(Instant, "127.0.0.1", 0, backlog=4096)
    sys.stdout.write(f"{server.sockets[0].getsockname()[1]}\n")
    sys.stdout.flush()
    await server.serve_forever()


# The sides: each answers `calls` calls, and returns how many


async def run_critrm(url: str, calls: int, concurrency: int, *, store: str = "", fake: bool = False) -> int:
    """A reply at a time, as `critrm critique` takes them."""
    import contextlib

    from critrm.critique_cache import CritiqueCache
    from critrm.llm import ChatRequest, OpenAIChat, Reply, Sampling, _Answer
    from critrm.types import Critique, Message

    async def answer(self: Any, endpoint: Any, request: ChatRequest, sampling: Any) -> _Answer:
        await asyncio.sleep(0)
        return _Answer(Reply(id=request.id, text=ANSWER + request.id))

    if fake:
        OpenAIChat._call = answer  # type: ignore[method-assign]
    chat = OpenAIChat("m", base_url=url, concurrency=concurrency)
    requests = (ChatRequest(id=str(i), messages=(Message("user", f"{PROMPT}{i}"),)) for i in range(calls))
    n = 0
    with CritiqueCache(store) if store else contextlib.nullcontext() as cache:
        async for reply in chat.stream(requests, Sampling()):
            n += not reply.failure
            if cache:
                facts = {"pair_id": "p", "side": "chosen", "critic": "m", "prompt_version": "v"}
                cache.put(Critique(key=reply.id, text=reply.text, **facts))
    return n


async def run_bare(url: str, calls: int, concurrency: int) -> int:
    """What one writes without a framework."""
    import openai

    slots = asyncio.Semaphore(concurrency)
    async with openai.AsyncOpenAI(base_url=url) as client:

        async def ask(i: int) -> str | None:
            async with slots:
                messages: Any = [{"role": "user", "content": f"{PROMPT}{i}"}]
                reply = await client.chat.completions.create(
                    model="m", messages=messages, temperature=0.0, top_p=1.0, seed=0, max_tokens=256
                )
                return reply.choices[0].message.content

        return sum(bool(text) for text in await asyncio.gather(*(ask(i) for i in range(calls))))


def _distilabel(url: str) -> Any:
    from distilabel.models import OpenAILLM

    options = {"max_new_tokens": 256, "temperature": 0.0}
    return OpenAILLM(model="m", base_url=url, api_key="k", generation_kwargs=options)


def run_distilabel(url: str, calls: int, concurrency: int) -> int:
    """The class that talks to the server, without the pipeline around it."""
    llm = _distilabel(url)
    llm.load()
    n = 0
    for first in range(0, calls, concurrency):
        numbers = range(first, min(first + concurrency, calls))
        inputs = [[{"role": "user", "content": f"{PROMPT}{i}"}] for i in numbers]
        n += sum(bool(output["generations"][0]) for output in llm.generate_outputs(inputs=inputs))
    return n


def run_pipeline(url: str, calls: int, concurrency: int) -> int:
    """As its users run it."""
    from distilabel.pipeline import Pipeline
    from distilabel.steps import LoadDataFromDicts
    from distilabel.steps.tasks import TextGeneration

    with Pipeline() as pipeline:
        rows = [{"instruction": f"{PROMPT}{i}"} for i in range(calls)]
        load = LoadDataFromDicts(data=rows, batch_size=concurrency)
        load >> TextGeneration(llm=_distilabel(url), input_batch_size=concurrency)
    found = pipeline.run(use_cache=False)
    return sum(bool(row["generation"]) for row in found["default"]["train"])


def run_side(side: str, url: str, calls: int, concurrency: int) -> None:
    """One timed run in this process; the last line written is what it took."""
    with tempfile.TemporaryDirectory() as folder:
        sides: dict[str, Callable[[], Awaitable[int] | int]] = {
            "critrm": lambda: run_critrm(url, calls, concurrency),
            "stored": lambda: run_critrm(url, calls, concurrency, store=f"{folder}/cache"),
            "fake": lambda: run_critrm(url, calls, concurrency, fake=True),
            "bare": lambda: run_bare(url, calls, concurrency),
            "distilabel": lambda: run_distilabel(url, calls, concurrency),
            "pipeline": lambda: run_pipeline(url, calls, concurrency),
        }
        if side in PEERS:
            import distilabel.models
            import distilabel.pipeline  # noqa: F401
        else:
            import openai  # noqa: F401
        started, cpu = time.perf_counter(), _cpu_seconds()
        result = sides[side]()
        n = result if isinstance(result, int) else asyncio.run(_wait(result))
        facts = {"seconds": time.perf_counter() - started, "cpu_seconds": _cpu_seconds() - cpu, "n": n}
    kind = resource.RUSAGE_CHILDREN if side == "pipeline" else resource.RUSAGE_SELF
    facts["peak_mb"] = resource.getrusage(kind).ru_maxrss / 1024
    sys.stdout.write(json.dumps(facts) + "\n")


async def _wait(result: Awaitable[int]) -> int:
    return await result


def _cpu_seconds() -> float:
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


# Taking turns


def timed(side: str, url: str, *, calls: int, concurrency: int, python: str) -> dict[str, float]:
    """Run one side in a fresh process."""
    words = [python, __file__, "--side", side, "--url", url, "--calls", str(calls), "--concurrency", str(concurrency)]
    environment = {**os.environ, "PYTHONPATH": str(SOURCE), "OPENAI_API_KEY": "k", "NO_PROXY": "127.0.0.1"}
    environment["HF_HUB_OFFLINE"] = "1"
    done = subprocess.run(words, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise SystemExit(f"{side} failed:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    facts: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    if facts.pop("n") != calls:
        raise SystemExit(f"{side} answered too few calls")
    return facts | {"calls_per_second": calls / facts["seconds"], "cpu_ms": 1000 * facts["cpu_seconds"] / calls}


def machine() -> dict[str, object]:
    """Where the numbers come from."""
    import importlib.metadata

    cpu = Path("/proc/cpuinfo")
    names = [line.split(":", 1)[1].strip() for line in cpu.read_text().splitlines() if line.startswith("model name")]
    return {
        "cpu": names[0] if names else platform.processor(),
        "n_cpus": os.cpu_count(),
        "load_before": os.getloadavg(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "openai": importlib.metadata.version("openai"),
    }


def measure(url: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """All sides in turn, several times; then memory."""
    sides = [side for side in SIDES if arguments.peer_python or side not in PEERS]
    runs: dict[str, list[dict[str, float]]] = {side: [] for side in sides}
    common = {"concurrency": arguments.concurrency, "python": sys.executable}
    for _ in range(arguments.rounds):
        for side in sides:
            python = arguments.peer_python if side in PEERS else sys.executable
            run = timed(side, url, calls=arguments.calls, concurrency=arguments.concurrency, python=python)
            runs[side].append(run)
    memory = {f"critrm {n:,}": timed("critrm", url, calls=n, **common)["peak_mb"] for n in {2000, arguments.calls}}
    memory |= {f"no server {n:,}": timed("fake", url, calls=n, **common)["peak_mb"] for n in (2000, arguments.flat)}
    medians = {
        side: {name: statistics.median(run[name] for run in found) for name in found[0]} for side, found in runs.items()
    }
    return {"medians": medians, "runs": runs, "peak_mb": memory}


def show(found: dict[str, Any]) -> None:
    """The medians as a table."""
    from rich.console import Console
    from rich.table import Column, Table

    names = ("calls/s", "CPU ms per call", "critrm is faster by", "peak MB")
    table = Table("", *(Column(name, justify="right") for name in names))
    ours = found["medians"]["critrm"]["calls_per_second"]
    for side, median in found["medians"].items():
        rate = median["calls_per_second"]
        cells = (f"{rate:,.0f}", f"{median['cpu_ms']:.2f}", f"{ours / rate:.2f}x", f"{median['peak_mb']:.0f}")
        table.add_row(SIDES[side], *cells)
    console = Console()
    console.print(table)
    console.print("Peak MB: " + ", ".join(f"{name} calls: {mb:.0f}" for name, mb in sorted(found["peak_mb"].items())))


def arguments_of(words: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calls", type=int, default=20_000)
    parser.add_argument("--concurrency", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--flat", type=int, default=400_000, help="calls without a server, for the memory")
    parser.add_argument("--peer-python", default="", help="the Python of a venv with distilabel")
    parser.add_argument("--out", type=Path, help="where the numbers go, as JSON")
    parser.add_argument("--side", default="", help=argparse.SUPPRESS)
    parser.add_argument("--url", default="", help=argparse.SUPPRESS)
    return parser.parse_args(words)


def main() -> None:
    """Measure, show and write."""
    arguments = arguments_of()
    if arguments.side == "serve":
        asyncio.run(serve())
    elif arguments.side:
        run_side(arguments.side, arguments.url, arguments.calls, arguments.concurrency)
    else:
        facts = machine()
        server = subprocess.Popen([sys.executable, __file__, "--side", "serve"], stdout=subprocess.PIPE, text=True)
        try:
            found = measure(f"http://127.0.0.1:{int(server.stdout.readline())}/v1", arguments)  # type: ignore[union-attr]
        finally:
            server.kill()
            server.wait()
        show(found)
        if arguments.out:
            settings = {name: getattr(arguments, name) for name in ("calls", "concurrency", "rounds", "flat")}
            text = json.dumps({"machine": facts, "settings": settings, **found}, indent=1)
            arguments.out.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
