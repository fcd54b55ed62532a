"""Training, side by side: critrm, TRL's RewardTrainer and a plain padded loop; pairs per second and peak memory.

    python bench/training.py --n 8 --steps 6 --repeats 3 --out training.json
    python bench/training.py --pairs RMB.jsonl --critiques none      (other pairs; without a file, no critiques)

Same model, pairs, tokens, precision and pairs per step. The sides take turns, each run in a fresh process; the
table shows medians. Seconds are those of all optimiser steps, without loading, saving and tokenizing. Memory is the
process's peak (on a GPU: what torch allocated there at most).

MFU is the share of the machine's matmul rate (the best that any of the processes measured) that a side's necessary
arithmetic reaches: 6 operations per weight and token that it reads, and attention; padding and activations computed a
second time do not count.
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
SIDES = {
    "critrm": "critrm",
    "critrm-checkpointing": "critrm, gradient_checkpointing",
    "trl": "TRL RewardTrainer, its defaults",
    "trl-plain": "TRL RewardTrainer, no gradient checkpointing",
    "padded": "a plain padded loop",
}


# The sides


def run_critrm(task: dict[str, Any], *, checkpointing: bool) -> float:
    """Seconds of the optimiser steps, like those of the other sides."""
    from critrm.config import TrainConfig
    from critrm.store import read_records
    from critrm.train import train_reward_model
    from critrm.types import CritiquedPair

    config = TrainConfig(
        backbone=task["model"],
        batch_size=task["n"],
        pairs_per_pass=task["per_pass"],
        precision=task["precision"],
        gradient_checkpointing=checkpointing,
        checkpoint_minutes=1000,
    )
    with tempfile.TemporaryDirectory() as out:
        train_reward_model(read_records(task["arm"], CritiquedPair), config, out=out, max_length=task["max_length"])
        lines = (Path(out) / "log.jsonl").read_text().splitlines()
    return next(float(row["train_runtime"]) for row in map(json.loads, lines) if "train_runtime" in row)


def run_trl(task: dict[str, Any], *, checkpointing: bool) -> float:
    import torch
    from datasets import Dataset
    from trl import RewardConfig, RewardTrainer

    from critrm.models import load_tokenizer, resolve

    rows = [
        {"chosen_ids": row["prompt"] + row["chosen"], "rejected_ids": row["prompt"] + row["rejected"]}
        for row in read_tokens(task)
    ]
    with tempfile.TemporaryDirectory() as out:
        arguments = RewardConfig(
            output_dir=out,
            use_cpu=not torch.cuda.is_available(),
            per_device_train_batch_size=task["per_pass"],
            gradient_accumulation_steps=task["n"] // task["per_pass"],
            num_train_epochs=1,
            bf16=task["precision"] == "bf16",
            max_length=task["max_length"],
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
            **({} if checkpointing else {"gradient_checkpointing": False}),
        )
        model = str(resolve(task["model"]))
        trainer = RewardTrainer(
            model=model, args=arguments, train_dataset=Dataset.from_list(rows), processing_class=load_tokenizer(model)
        )
        assert trainer.args.gradient_checkpointing == checkpointing
        return float(trainer.train().metrics["train_runtime"])


def run_padded(task: dict[str, Any]) -> float:
    import torch
    from torch.nn.functional import logsigmoid
    from transformers import AutoModelForSequenceClassification

    from critrm.models import choose_device, resolve

    device = choose_device()
    auto: Any = AutoModelForSequenceClassification
    model = auto.from_pretrained(resolve(task["model"]), num_labels=1, dtype=torch.float32).to(device)
    model.config.pad_token_id = 0
    rows, per_pass = list(read_tokens(task)), task["per_pass"]
    started = time.perf_counter()
    optimizer = torch.optim.AdamW(model.parameters(), lr=8e-5, weight_decay=0.0)
    for step in range(0, len(rows), task["n"]):
        for first in range(step, step + task["n"], per_pass):
            batch = rows[first : first + per_pass]
            texts = [row["prompt"] + row[side] for side in ("chosen", "rejected") for row in batch]
            width = max(map(len, texts))
            ids = torch.tensor([text + [0] * (width - len(text)) for text in texts], device=device)
            ends = torch.tensor([len(text) - 1 for text in texts], device=device)
            mask = (torch.arange(width, device=device) <= ends[:, None]).long()
            with torch.autocast(device, dtype=torch.bfloat16, enabled=task["precision"] == "bf16"):
                hidden = model.base_model(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
                rewards = model.score(hidden[torch.arange(len(ids)), ends]).squeeze(-1).float()
            chosen, rejected = rewards.chunk(2)
            (-logsigmoid(chosen - rejected).sum() / task["n"]).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


def read_tokens(task: dict[str, Any]) -> list[dict[str, list[int]]]:
    return [json.loads(line) for line in Path(task["tokens"]).read_text().splitlines()]


# What a run comes to


def necessary_operations(task: dict[str, Any], *, shared: bool) -> tuple[int, float]:
    """Tokens that are read, and operations forward and backward, with the prompt read once per pair or twice."""
    from transformers import AutoConfig

    from critrm.models import resolve

    config = AutoConfig.from_pretrained(resolve(task["model"]))
    width, n_heads, layers = config.hidden_size, config.num_attention_heads, config.num_hidden_layers
    head = config.to_dict().get("head_dim") or width // n_heads
    queries, keys = n_heads * head, config.num_key_value_heads * head
    weights = layers * (2 * width * queries + 2 * width * keys + 3 * width * config.intermediate_size)
    n_tokens, n_seen = 0, 0.0
    for row in read_tokens(task):
        p, a, b = len(row["prompt"]), len(row["chosen"]), len(row["rejected"])
        n_tokens += p + a + b + (0 if shared else p)
        n_seen += (p + a) ** 2 / 2 + (b * p + b * b / 2 if shared else (p + b) ** 2 / 2)
    # Times three: the backward pass takes two products for each of the forward pass.
    return n_tokens, 3 * (2 * weights * n_tokens + 4 * layers * queries * n_seen)


def work(task: dict[str, Any]) -> dict[str, float]:
    """One side's run, in a process of its own."""
    import torch

    cuda = torch.cuda.is_available()
    device = "cuda" if cuda else "cpu"
    side, rate = task["side"], matmul_rate(task["precision"], device=device)
    if side == "padded":
        seconds = run_padded(task)
    else:
        run = run_critrm if side.startswith("critrm") else run_trl
        seconds = run(task, checkpointing=side in ("critrm-checkpointing", "trl"))
    n_tokens, operations = necessary_operations(task, shared=side.startswith("critrm"))
    peak = torch.cuda.max_memory_allocated() if cuda else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {
        "seconds": seconds,
        "pairs_per_second": task["n"] * task["steps"] / seconds,
        "tokens_per_second": n_tokens / seconds,
        "peak_gb": peak / 1e9,
        "gflops": operations / seconds / 1e9,
        "matmul_gflops": max(rate, matmul_rate(task["precision"], device=device)) / 1e9,
    }


# The parent


def prepare(arguments: argparse.Namespace, folder: Path) -> dict[str, dict[str, Any]]:
    """Choose pairs that no side has to cut, and write each arm as records and as tokens."""
    from critrm.augment import Budget, augment_pairs, segment_pair, text_encoder
    from critrm.critique_files import read_critiques
    from critrm.models import load_tokenizer
    from critrm.preferences import read_pairs
    from critrm.store import write_records
    from critrm.types import NO_CRITIC

    encode, budget = text_encoder(load_tokenizer(arguments.model)), Budget(10**6)
    pairs = read_pairs(arguments.pairs).pairs
    critiques = {} if arguments.critiques == "none" else {"critiques": read_critiques(arguments.critiques)}
    arms = augment_pairs(pairs, critiques).arms
    # Rows of the longest arm decide, so that all arms hold the same pairs.
    chosen: list[int] = []
    for index, item in enumerate(arms["critiques" if critiques else NO_CRITIC]):
        segments = segment_pair(item, encode, budget)
        if len(segments.prompt) + max(map(len, segments.branches)) <= arguments.max_length:
            chosen.append(index)
        if len(chosen) == arguments.n * arguments.steps:
            break
    else:
        sys.exit(f"only {len(chosen)} pairs fit into {arguments.max_length} tokens")
    files = {}
    for name, arm in arms.items():
        cut = [segment_pair(arm[index], encode, budget) for index in chosen]
        files[name] = {"arm": str(folder / f"{name}.jsonl"), "tokens": str(folder / f"{name}.tokens.jsonl")}
        write_records(files[name]["arm"], [arm[index] for index in chosen])
        tokens = [{"prompt": each.prompt, "chosen": each.branches[0], "rejected": each.branches[1]} for each in cut]
        write_records(files[name]["tokens"], tokens)
    return files


def run_worker(task: dict[str, Any]) -> dict[str, float]:
    """Run one side in a fresh process; its last line of output is its result."""
    path = os.pathsep.join(filter(None, (str(SOURCE), os.environ.get("PYTHONPATH"))))
    done = subprocess.run(
        [sys.executable, "-W", "ignore", __file__, "--worker", json.dumps(task)],
        env=os.environ | {"PYTHONPATH": path, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        sys.exit(f"{task['side']} failed:\n{done.stderr[-3000:]}")
    return dict(json.loads(done.stdout.splitlines()[-1]))


def parse() -> argparse.Namespace:
    data = Path(os.environ.get("CRITRM_DATA", "../shared/data"))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="embedded:SmolLM2-135M-Instruct")
    parser.add_argument("--pairs", default=str(data / "hh-pairs" / "pairs.jsonl"))
    parser.add_argument("--critiques", default=str(data / "critiques" / "frontier-llm.jsonl"), help="a file, or none")
    parser.add_argument("--n", type=int, default=8, help="pairs per optimiser step")
    parser.add_argument("--per-pass", type=int, default=0, help="pairs computed at once; all of a step by default")
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--max-length", type=int, default=2048, help="longer pairs are left out")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="bf16")
    parser.add_argument("--sides", default=",".join(SIDES), help="comma separated")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    arguments = parse()
    if arguments.worker:
        print(json.dumps(work(json.loads(arguments.worker))))
        return
    sys.path.insert(0, str(SOURCE))
    sides = arguments.sides.split(",")
    settings = {name: getattr(arguments, name) for name in ("model", "n", "steps", "max_length", "precision")}
    settings["per_pass"] = arguments.per_pass or arguments.n
    runs: dict[str, list[dict[str, float]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        files = prepare(arguments, Path(folder))
        for _ in range(arguments.repeats):
            for arm, paths in files.items():
                for side in sides:
                    result = run_worker({"side": side} | paths | settings)
                    runs.setdefault(f"{side}/{arm}", []).append(result)
                    print(f"{side}/{arm}: {result['pairs_per_second']:.3f} pairs/s", file=sys.stderr, flush=True)
    medians = {
        name: {key: statistics.median(run[key] for run in found) for key in found[0]} for name, found in runs.items()
    }
    limit = max(run["matmul_gflops"] for found in runs.values() for run in found)
    print(f"Matrix products: {limit:.0f} GFLOP/s in {arguments.precision}, the best of all runs\n")
    print("| | critiques | pairs/s | peak GB | tokens/s | MFU |")
    print("| --- | --- | ---: | ---: | ---: | ---: |")
    for name, row in medians.items():
        side, _, arm = name.partition("/")
        cells = (f"{row['pairs_per_second']:.2f}", f"{row['peak_gb']:.1f}", f"{row['tokens_per_second']:.0f}")
        print(
            "|",
            " | ".join((SIDES[side], "no" if arm == "none" else "yes", *cells, f"{row['gflops'] / limit:.0%}")),
            "|",
        )
    if arguments.out:
        facts = {"machine": platform.platform(), "cpus": os.cpu_count(), "settings": settings}
        facts |= {"medians": medians, "runs": runs}
        arguments.out.write_text(json.dumps(facts, indent=2) + "\n")


if __name__ == "__main__":
    main()
