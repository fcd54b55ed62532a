"""Embedded generation speed: critrm's LocalChat against transformers.generate as a user would write it, and llama.cpp.

    python bench/generation.py --pairs hh-pairs/pairs.jsonl --n 256 --rounds 3 --out generation.json
    python bench/generation.py --pairs hh-pairs/pairs.jsonl --llama http://127.0.0.1:8080/v1   (a running llama-server)

The prompts are real critique prompts, both completions of each pair, in the order of the file. All sides decode
greedily, at most --max-tokens each, in this process and in bf16 (llama.cpp: in its own process and format, and from
the second round on with the prompts that it still has in its cache). They take turns, so that whatever else the
machine does slows all of them; the table shows medians. Loading is not counted.
"""

import argparse
import asyncio
import importlib.metadata
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Column, Table

from critrm.llm import Chat, ChatRequest, Sampling
from critrm.preferences import read_pairs
from critrm.prompts import critique_messages
from critrm.types import SIDES

MODEL = "embedded:SmolLM2-135M-Instruct"
Write = Callable[[Sequence[ChatRequest]], int]
"""Answers all requests; gives the number of tokens written."""


def prompts(pairs: str, n: int) -> list[ChatRequest]:
    """The first n critique prompts."""
    found = read_pairs(pairs, limit=(n + 1) // 2).pairs
    places = [(pair, side) for pair in found for side in SIDES][:n]
    return [
        ChatRequest(id=f"{pair.id} {side}", messages=critique_messages(pair.prompt, pair.completion(side)))
        for pair, side in places
    ]


def chat_writer(chat: Chat, sampling: Sampling) -> Write:
    """Have a `Chat` answer."""

    async def collect(requests: Sequence[ChatRequest]) -> int:
        n_tokens = n_replies = 0
        async for reply in chat.stream(requests, sampling):
            if reply.failure:
                raise SystemExit(f"{chat.model} failed: {reply.failure}")
            n_tokens, n_replies = n_tokens + reply.n_completion_tokens, n_replies + 1
        assert n_replies == len(requests)
        return n_tokens

    return lambda requests: asyncio.run(collect(requests))


def transformers_writer(folder: str, sampling: Sampling, *, batch_size: int) -> Write:
    """Transformers as its documentation shows it: batches in the order of arrival, padded on the left."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token

    def write(requests: Sequence[ChatRequest]) -> int:
        n_tokens = 0
        for start in range(0, len(requests), batch_size):
            conversations = [
                [{"role": message.role, "content": message.content} for message in request.messages]
                for request in requests[start : start + batch_size]
            ]
            inputs = tokenizer.apply_chat_template(
                conversations, add_generation_prompt=True, padding=True, return_tensors="pt", return_dict=True
            )
            written = model.generate(
                **inputs, max_new_tokens=sampling.max_tokens, do_sample=False, pad_token_id=tokenizer.pad_token_id
            )
            tokenizer.batch_decode(written[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
            n_tokens += _n_written(written[:, inputs["input_ids"].shape[1] :].tolist(), tokenizer.eos_token_id)
        return n_tokens

    return write


def _n_written(rows: list[list[int]], eos: int) -> int:
    """Tokens before the end of each text; the padding behind it is no text."""
    return sum(row.index(eos) if eos in row else len(row) for row in rows)


def measure(sides: dict[str, Write], requests: Sequence[ChatRequest], *, n_rounds: int) -> dict[str, Any]:
    """Seconds and tokens of all sides, in turn, several times."""
    for write in sides.values():
        write(requests[:2])  # loads the model
    runs: dict[str, list[dict[str, float]]] = {side: [] for side in sides}
    for i in range(n_rounds):
        # Every other round the other way round: no side always comes first.
        for side in list(sides)[:: 1 if i % 2 == 0 else -1]:
            started = time.perf_counter()
            n_tokens = sides[side](requests)
            seconds = time.perf_counter() - started
            runs[side].append({"seconds": seconds, "tokens": n_tokens, "tokens_per_second": n_tokens / seconds})
    medians = {side: statistics.median(run["tokens_per_second"] for run in found) for side, found in runs.items()}
    first, *others = medians
    return {
        "tokens_per_second": medians,
        "critrm_is_faster_by": {other: medians[first] / medians[other] for other in others},
        # Of each round by itself, since a busy machine's speed changes from round to round.
        "median_ratio_within_rounds": {
            other: statistics.median(
                ours["tokens_per_second"] / theirs["tokens_per_second"]
                for ours, theirs in zip(runs[first], runs[other], strict=True)
            )
            for other in others
        },
        "runs": runs,
    }


def machine() -> dict[str, Any]:
    """Where the numbers come from."""
    import torch

    cpu = Path("/proc/cpuinfo")
    lines = cpu.read_text().splitlines() if cpu.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return {
        "cpu": names[0] if names else platform.processor(),
        "n_cpus": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "load_before": os.getloadavg(),
        "python": platform.python_version(),
        "versions": {name: importlib.metadata.version(name) for name in ("torch", "transformers")},
    }


def show(found: dict[str, Any]) -> None:
    """The medians as a table."""
    table = Table("", *(Column(name, justify="right") for name in ("tokens/s", "critrm is faster by", "tokens")))
    for side, rate in found["tokens_per_second"].items():
        ratio = found["critrm_is_faster_by"].get(side, 1.0)
        table.add_row(side, f"{rate:.1f}", f"{ratio:.2f}x", f"{found['runs'][side][0]['tokens']:,}")
    Console().print(table)


def arguments_of(words: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", required=True, help="preference pairs, for example hh-pairs/pairs.jsonl")
    parser.add_argument("--n", type=int, default=256, help="prompts")
    parser.add_argument("--max-tokens", type=int, default=96)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batch-size", type=int, default=8, help="of transformers.generate")
    parser.add_argument("--model", default=MODEL)
    parser.add_argument("--llama", default="", help="base URL of a running llama-server with the same model")
    parser.add_argument("--llama-concurrency", type=int, default=8, help="its --parallel")
    parser.add_argument("--threads", type=int, default=0, help="torch threads; its own choice when 0")
    parser.add_argument("--out", type=Path, help="where the numbers go, as JSON")
    return parser.parse_args(words)


def main() -> None:
    """Measure, show and write."""
    import torch

    from critrm.llm import OpenAIChat
    from critrm.local_llm import LocalChat
    from critrm.models import resolve

    arguments = arguments_of()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    facts = machine()
    sampling = Sampling(max_tokens=arguments.max_tokens)
    folder = str(resolve(arguments.model))
    sides = {
        "critrm: LocalChat": chat_writer(LocalChat(folder, device="cpu", dtype="bf16"), sampling),
        f"transformers.generate, batches of {arguments.batch_size}": transformers_writer(
            folder, sampling, batch_size=arguments.batch_size
        ),
    }
    if arguments.llama:
        llama = OpenAIChat("m", base_url=arguments.llama, concurrency=arguments.llama_concurrency, timeout=600)
        sides["llama.cpp's server"] = chat_writer(llama, sampling)
    found = measure(sides, prompts(arguments.pairs, arguments.n), n_rounds=arguments.rounds)
    show(found)
    if arguments.out:
        settings = {name: value for name, value in vars(arguments).items() if name not in ("out", "pairs")}
        text = json.dumps({"machine": facts, "settings": settings, **found}, indent=1)
        arguments.out.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
