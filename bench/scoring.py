"""Scoring, side by side: critrm and RewardBench's own loop; pairs per second and peak memory.

    python bench/scoring.py --n 64 --repeats 3 --out scoring.json
    python bench/scoring.py --critiques none --pairs RMB.jsonl      (other pairs; none: the No-Critiques arm)

RewardBench's loop, as its `rewardbench` command has it: a plain AutoModelForSequenceClassification, no_grad, 8 texts at
a time in the order in which they come, padded on the right to the longest, chosen texts and rejected ones apart. Same
model, pairs, texts and precision. The sides take turns, each run in a fresh process; the table shows medians. Seconds
include tokenizing, not loading; CPU seconds tell a busy machine from a slow side. Memory is the process's peak (on a
GPU: what torch allocated there at most).

MFU is the share of the machine's matmul rate, measured in the same process, that a side's necessary arithmetic reaches:
2 operations per weight and token that it reads, and attention; padding is not counted.
"""

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from machine import matmul_rate

SOURCE = Path(__file__).parents[1] / "src"
SIDES = {"critrm": "critrm", "rewardbench": "RewardBench's loop"}
Scored = tuple[float, float, list[tuple[float, float]]]
"""Seconds, seconds of all CPU cores, and the rewards of each pair."""


# The sides


def run_critrm(task: dict[str, Any]) -> Scored:
    from critrm.reward_model import RewardModel
    from critrm.store import read_records
    from critrm.types import CritiquedPair

    model = RewardModel.load(task["model_folder"], precision=task["precision"])
    items = read_records(task["arm"], CritiquedPair)
    model.score(items[:1])
    started, cpu = time.perf_counter(), time.process_time()
    scores = model.score(items, max_tokens_per_step=task["max_tokens_per_step"])
    rewards = [(score.chosen, score.rejected) for score in scores]
    return time.perf_counter() - started, time.process_time() - cpu, rewards


def run_rewardbench(task: dict[str, Any]) -> Scored:
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    from critrm.models import choose_device
    from critrm.prompts import reward_segments
    from critrm.store import read_records
    from critrm.types import SIDES as BOTH
    from critrm.types import CritiquedPair

    dtype = torch.bfloat16 if task["precision"] == "bf16" else torch.float32
    model = AutoModelForSequenceClassification.from_pretrained(task["model_folder"], dtype=dtype).eval()
    model.to(choose_device())
    tokenizer = AutoTokenizer.from_pretrained(task["model_folder"], padding_side="right")
    texts = [
        ["".join(reward_segments(item.pair.prompt, item.pair.completion(side), item.critique(side))) for side in BOTH]
        for item in read_records(task["arm"], CritiquedPair)
    ]

    def rewards(batch: list[str]) -> list[float]:
        cut = {"truncation": True, "max_length": task["max_length"]}
        inputs = tokenizer(batch, padding=True, return_tensors="pt", **cut).to(model.device)
        with torch.no_grad():
            return [float(reward) for reward in model(**inputs).logits[:, 0].float().cpu()]

    rewards(texts[0])
    started, cpu, found = time.perf_counter(), time.process_time(), []
    for first in range(0, len(texts), task["batch_size"]):
        batch = texts[first : first + task["batch_size"]]
        chosen, rejected = (rewards([text[side] for text in batch]) for side in range(2))
        found += list(zip(chosen, rejected, strict=True))
    return time.perf_counter() - started, time.process_time() - cpu, found


# What a run comes to


def necessary_operations(task: dict[str, Any], *, shared: bool) -> tuple[int, float]:
    """Tokens that are read, and operations, with the prompt read once per pair or twice."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(task["model_folder"])
    width, n_heads, layers = config.hidden_size, config.num_attention_heads, config.num_hidden_layers
    head = config.head_dim or width // n_heads
    queries, keys = n_heads * head, config.num_key_value_heads * head
    weights = layers * (2 * width * queries + 2 * width * keys + 3 * width * config.intermediate_size)
    n_tokens, n_seen = 0, 0.0
    for p, a, b in task["lengths"]:
        n_tokens += p + a + b + (0 if shared else p)
        n_seen += (p + a) ** 2 / 2 + (b * p + b * b / 2 if shared else (p + b) ** 2 / 2)
    return n_tokens, 2 * weights * n_tokens + 4 * layers * queries * n_seen


def work(task: dict[str, Any]) -> dict[str, Any]:
    """One side's run, in a process of its own."""
    import torch

    cuda = torch.cuda.is_available()
    rate = matmul_rate(task["precision"], device="cuda" if cuda else "cpu")
    shared = task["side"] == "critrm"
    seconds, cpu_seconds, rewards = (run_critrm if shared else run_rewardbench)(task)
    n_tokens, operations = necessary_operations(task, shared=shared)
    peak = torch.cuda.max_memory_allocated() if cuda else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    figures = {
        "seconds": seconds,
        "cpu_seconds": cpu_seconds,
        "pairs_per_second": len(rewards) / seconds,
        "tokens_per_second": n_tokens / seconds,
        "peak_gb": peak / 1e9,
        "matmul_gflops": rate / 1e9,
        "mfu": operations / seconds / rate,
    }
    return {"figures": figures, "rewards": rewards}


# The parent


def prepare(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Put a head on the backbone, choose pairs that no side has to cut, and write both."""
    from critrm.augment import augment_pairs
    from critrm.critique_files import read_critiques
    from critrm.preferences import read_pairs
    from critrm.reward_model import Reads, RewardModel
    from critrm.store import write_records
    from critrm.types import NO_CRITIC

    reads = Reads(max_length=arguments.max_length, backbone=arguments.model)
    model = RewardModel.from_backbone(arguments.model, reads, seed=0)
    model.save(folder / "model")
    critiques = {} if arguments.critiques == "none" else {"critiques": read_critiques(arguments.critiques)}
    arms = augment_pairs(read_pairs(arguments.pairs).pairs, critiques).arms
    chosen, lengths = [], []
    for item in arms["critiques" if critiques else NO_CRITIC]:
        if len(chosen) == arguments.n:
            break
        encoded = model.encode(item)
        sizes = (len(encoded.prompt), *map(len, encoded.branches))
        if sizes[0] + max(sizes[1:]) < arguments.max_length:
            chosen.append(item)
            lengths.append(sizes)
    write_records(folder / "arm.jsonl", chosen)
    return {"model_folder": str(folder / "model"), "arm": str(folder / "arm.jsonl"), "lengths": lengths}


def run_worker(task: dict[str, Any]) -> dict[str, Any]:
    """Run one side in a fresh process; its last line of output is its result."""
    path = os.pathsep.join(filter(None, (str(SOURCE), os.environ.get("PYTHONPATH"))))
    done = subprocess.run(
        [sys.executable, "-W", "ignore", __file__, "--worker"],
        env=os.environ | {"PYTHONPATH": path, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"},
        input=json.dumps(task),
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        sys.exit(f"{task['side']} failed:\n{done.stderr[-3000:]}")
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def parse() -> argparse.Namespace:
    data = Path(os.environ.get("CRITRM_DATA", "../shared/data"))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="embedded:SmolLM2-135M-Instruct")
    parser.add_argument("--pairs", default=str(data / "hh-pairs" / "pairs.jsonl"))
    parser.add_argument("--critiques", default=str(data / "critiques" / "frontier-llm.jsonl"), help="a file, or none")
    parser.add_argument("--n", type=int, default=64, help="pairs")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--batch-size", type=int, default=8, help="texts at a time in RewardBench's loop")
    parser.add_argument("--max-tokens-per-step", type=int, default=4096, help="tokens at a time in critrm")
    parser.add_argument("--max-length", type=int, default=2048, help="longer pairs are left out")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="bf16")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args()


def summarise(runs: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    medians = {
        side: {key: statistics.median(run["figures"][key] for run in found) for key in found[0]["figures"]}
        for side, found in runs.items()
    }
    ours, theirs = (runs[side][0]["rewards"] for side in SIDES)
    margins = [(a - b, c - d) for (a, b), (c, d) in zip(ours, theirs, strict=True)]
    ratios = [
        a["figures"]["pairs_per_second"] / b["figures"]["pairs_per_second"]
        for a, b in zip(runs["critrm"], runs["rewardbench"], strict=True)
    ]
    return {
        "medians": medians,
        "ratio": statistics.median(ratios),
        "ratio_of_each_round": ratios,
        "largest_difference_of_margins": max(abs(mine - true) for mine, true in margins),
        "spread_of_margins": statistics.pstdev(true for _, true in margins),
        "same_bits_each_time": all(run["rewards"] == ours for run in runs["critrm"]),
    }


def main() -> None:
    arguments = parse()
    if arguments.worker:
        print(json.dumps(work(json.load(sys.stdin))))
        return
    sys.path.insert(0, str(SOURCE))
    names = ("model", "n", "precision", "batch_size", "max_tokens_per_step", "max_length")
    settings = {name: getattr(arguments, name) for name in names}
    runs: dict[str, list[dict[str, Any]]] = {side: [] for side in SIDES}
    with tempfile.TemporaryDirectory() as folder:
        task = prepare(arguments, Path(folder)) | settings
        for _ in range(arguments.repeats):
            for side, found in runs.items():
                found.append(run_worker(task | {"side": side}))
                print(f"{side}: {found[-1]['figures']['pairs_per_second']:.3f} pairs/s", file=sys.stderr, flush=True)
    facts = summarise(runs)
    print("| | pairs/s | CPU s | peak GB | tokens/s | MFU |")
    print("| --- | ---: | ---: | ---: | ---: | ---: |")
    for side, row in facts["medians"].items():
        cells = [f"{row[key]:.2f}" for key in ("pairs_per_second", "cpu_seconds", "peak_gb")]
        cells.append(f"{row['tokens_per_second']:.0f}")
        print("|", " | ".join((SIDES[side], *cells, f"{row['mfu']:.0%}")), "|")
    print(f"\ncritrm / RewardBench's loop: {facts['ratio']:.2f} (median of {arguments.repeats} rounds)")
    if arguments.out:
        machine = {"platform": platform.platform(), "cpus": os.cpu_count(), "python": platform.python_version()}
        figures = {side: [run["figures"] for run in found] for side, found in runs.items()}
        facts |= {"machine": machine, "settings": settings, "lengths": task["lengths"], "runs": figures}
        arguments.out.write_text(json.dumps(facts, indent=2) + "\n")


if __name__ == "__main__":
    main()
