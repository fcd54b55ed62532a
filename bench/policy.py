"""Does a policy get better? Best-of-n selection and a short GRPO run, before and after, read by somebody else.

    python bench/policy.py --run runs/hh-llmbar --reader runs/demo/train/none/seed-0/model --out runs/policy

The policy, the critic and the rewards' backbone are all the embedded SmolLM2-135M-Instruct. Two rewards: the arm
trained without critiques, and the arm trained with a frontier model's critiques, which here reads critiques that
SmolLM2 writes live (another critic than in training: the frontier model is not there to ask).

Readers, none of which is ever optimised: a reward model trained without critiques on other pairs (`--reader`), and the
zero-label reading of the untrained backbone. Length stands beside them, since a policy that only grew longer has
learnt the reward's bias. Prompts are those of the HH test pairs; GRPO takes prompts of the training pairs. Intervals
are paired bootstraps over prompts. Everything is kept in --out, and the same command goes on.
"""

import argparse
import asyncio
import json
import os
import random
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import torch

from critrm.live import LiveRewardModel
from critrm.llm import ChatRequest, Sampling
from critrm.local_llm import LocalChat
from critrm.models import load_tokenizer, resolve
from critrm.preferences import read_pairs
from critrm.result_tables import markdown_table
from critrm.reward_model import RewardModel
from critrm.rl import open_reward_model, trl_reward
from critrm.store import read_rows, write_records, write_text
from critrm.types import NO_CRITIC, CritiquedPair, Message, PreferencePair
from critrm.zero_label import ZeroLabelModel

BACKBONE = "embedded:SmolLM2-135M-Instruct"
CRITIC = {"model": BACKBONE, "max_tokens": 48}
REWARDS = {"none": "no critiques", "frontier-llm": "frontier-trained, live self-critiques"}
Prompt = tuple[Message, ...]
Rows = list[dict[str, Any]]


def kept(path: Path, make: Callable[[], Rows]) -> Rows:
    """The rows of a file; made and written when there is none."""
    if not path.is_file():
        write_records(path, make())
    return [row for _, row in read_rows(path)]


def open_reward(run: Path, arm: str, *, seed: int, cache: Path) -> LiveRewardModel:
    folder = run / "train" / arm / f"seed-{seed}" / "model"
    if arm == "none":
        return open_reward_model(folder)
    return open_reward_model(
        folder, critic="self", settings=CRITIC, cache=cache, allow_other_critic=True, deadline=3600
    )


def prompts_of(path: Path, split: str, n: int) -> list[PreferencePair]:
    """Pairs with short single prompts, drawn once: a small policy and a CPU."""
    found = [
        pair for pair in read_pairs(path, split=split, source="hh-helpful-base").pairs
        if len(pair.prompt) == 1 and len(pair.prompt[0].content) < 400
    ]  # fmt: skip
    unique = list({pair.prompt: pair for pair in found}.values())
    return random.Random(0).sample(unique, min(n, len(unique)))


def write_responses(policy: str, pairs: Sequence[PreferencePair], *, n: int, max_tokens: int) -> Rows:
    """`n` responses to each prompt, sampled at temperature 1."""
    chat = LocalChat(policy)

    async def ask(seed: int) -> list[str]:
        sampling = Sampling(temperature=1.0, top_p=0.95, max_tokens=max_tokens, seed=seed)
        requests = [ChatRequest(id=pair.id, messages=pair.prompt) for pair in pairs]
        texts = {reply.id: reply.text async for reply in chat.stream(requests, sampling)}
        return [texts[pair.id] for pair in pairs]

    by_seed = [asyncio.run(ask(seed)) for seed in range(n)]
    return [{"id": pair.id, "responses": [texts[i] for texts in by_seed]} for i, pair in enumerate(pairs)]


def rewards_of(live: LiveRewardModel, pairs: Sequence[PreferencePair], responses: Rows) -> list[list[float]]:
    async def all_of_them() -> list[list[float]]:
        calls = [live.score(pair.prompt, row["responses"]) for pair, row in zip(pairs, responses, strict=True)]
        return [[score.reward for score in scores] for scores in await asyncio.gather(*calls)]

    return asyncio.run(all_of_them())


def readings(reader: Path, pairs: Sequence[PreferencePair], responses: Rows) -> dict[str, list[list[float]]]:
    """What each independent reader says of every response, and its words."""
    asked = [(pair, row["responses"]) for pair, row in zip(pairs, responses, strict=True)]
    model = RewardModel.load(reader)
    by_model = [model.score_completions(pair.prompt, texts) for pair, texts in asked]
    del model
    items = [
        # The zero-label reading scores pairs: a response stands on both sides.
        CritiquedPair(pair=PreferencePair(id=f"{pair.id}#{k}", prompt=pair.prompt, chosen=text, rejected=text))
        for pair, texts in asked
        for k, text in enumerate(texts)
    ]
    untrained = ZeroLabelModel.load(BACKBONE, critic=NO_CRITIC, critique_only=False)
    scores = {score.pair_id: score.chosen for score in untrained.score(items)}
    zero = [[scores[f"{pair.id}#{k}"] for k in range(len(texts))] for pair, texts in asked]
    words = [[float(len(text.split())) for text in texts] for _, texts in asked]
    return {"reader": by_model, "zero-label": zero, "words": words}


def read_policy(args: argparse.Namespace, policy: str, name: str) -> tuple[list[PreferencePair], Rows, dict[str, Any]]:
    """The test prompts, a policy's responses to them, and what the readers say."""
    pairs = prompts_of(args.pairs, "test", args.prompts)
    responses = kept(
        args.out / f"responses-{name}.jsonl", lambda: write_responses(policy, pairs, n=args.n, max_tokens=args.tokens)
    )
    seen = kept(args.out / f"readings-{name}.jsonl", lambda: [{"by": readings(args.reader, pairs, responses)}])
    return pairs, responses, seen[0]["by"]


def own_rewards(args: argparse.Namespace, arm: str, name: str, pairs: Sequence[PreferencePair], rows: Rows) -> Rows:
    """What the reward that is optimised says of a policy's responses."""

    def score() -> Rows:
        with open_reward(args.run, arm, seed=args.seed, cache=args.out / "critiques.sqlite") as live:
            return [{"rewards": row} for row in rewards_of(live, pairs, rows)]

    return [row["rewards"] for row in kept(args.out / f"rewards-{arm}-of-{name}.jsonl", score)]


def difference(after: Sequence[float], before: Sequence[float]) -> dict[str, float]:
    """Mean difference over prompts with its paired bootstrap interval."""
    delta = np.asarray(after) - np.asarray(before)
    rng = np.random.default_rng(0)
    means = delta[rng.integers(0, len(delta), (10_000, len(delta)))].mean(axis=1)
    low, high = np.quantile(means, [0.025, 0.975])
    return {"value": float(delta.mean()), "low": float(low), "high": float(high), "spread": float(np.std(before))}


def best_of_n(args: argparse.Namespace) -> dict[str, Any]:
    """Each reward's choice among n responses against their mean, in the eyes of the readers."""
    pairs, responses, seen = read_policy(args, BACKBONE, "before")
    found = {}
    for arm in REWARDS:
        best = [int(np.argmax(row)) for row in own_rewards(args, arm, "before", pairs, responses)]
        found[arm] = {
            name: difference([row[i] for row, i in zip(rows, best, strict=True)], means(rows))
            for name, rows in seen.items()
        }
    # What a choice by length alone, and by chance, would give.
    words = seen["words"]
    longest = [int(np.argmax(row)) for row in words]
    found["longest"] = {
        name: difference([row[i] for row, i in zip(rows, longest, strict=True)], means(rows))
        for name, rows in seen.items()
    }
    return {"prompts": len(pairs), "n": args.n, "tokens": args.tokens, "by": found}


def means(rows: Sequence[Sequence[float]]) -> list[float]:
    return [float(np.mean(row)) for row in rows]


def train_policy(args: argparse.Namespace, arm: str) -> Path:
    """A short GRPO run against one reward; the policy's folder."""
    folder = args.out / f"policy-{arm}"
    if (folder / "log.json").is_file():
        return folder
    import datasets
    from transformers import AutoModelForCausalLM
    from trl import GRPOConfig, GRPOTrainer

    started, live = time.time(), open_reward(args.run, arm, seed=args.seed, cache=args.out / "critiques.sqlite")
    config = GRPOConfig(
        output_dir=str(args.out / "grpo"),
        per_device_train_batch_size=args.group * 2,
        num_generations=args.group,
        max_completion_length=args.tokens,
        max_steps=args.steps,
        learning_rate=args.learning_rate,
        temperature=1.0,
        top_p=0.95,
        beta=0.02,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        use_cpu=not torch.cuda.is_available(),
        bf16=torch.cuda.is_available(),
        seed=0,
    )
    pairs = prompts_of(args.pairs, "train", 400)
    data = [{"prompt": [{"role": m.role, "content": m.content} for m in pair.prompt]} for pair in pairs]
    policy = AutoModelForCausalLM.from_pretrained(resolve(BACKBONE), dtype=torch.float32)
    trainer = GRPOTrainer(
        model=policy,
        reward_funcs=trl_reward(live),
        args=config,
        train_dataset=datasets.Dataset.from_list(data),
        processing_class=load_tokenizer(BACKBONE),
    )
    trainer.train()
    live.close()
    policy.save_pretrained(folder)
    load_tokenizer(BACKBONE).save_pretrained(folder)
    steps = [row for row in trainer.state.log_history if "reward" in row]
    curve = {name: [row.get(name) for row in steps] for name in ("reward", "completions/mean_length", "kl")}
    write_text(folder / "log.json", json.dumps({"seconds": time.time() - started, **curve}) + "\n")
    return folder


def grpo(args: argparse.Namespace) -> dict[str, Any]:
    """The policy before and after, on prompts that neither it nor the rewards were trained on."""
    pairs, before, seen = read_policy(args, BACKBONE, "before")
    found = {}
    for arm in REWARDS:
        folder = train_policy(args, arm)
        log = json.loads((folder / "log.json").read_text(encoding="utf-8"))
        _, after, read = read_policy(args, str(folder), arm)
        own = [own_rewards(args, arm, name, pairs, rows) for name, rows in ((arm, after), ("before", before))]
        found[arm] = {"its own reward": difference(means(own[0]), means(own[1]))}
        found[arm] |= {name: difference(means(read[name]), means(seen[name])) for name in seen}
        third = max(1, len(log["reward"]) // 3)
        # The first and the last third of the steps.
        ends = {
            name: [float(np.mean(log[key][:third])), float(np.mean(log[key][-third:]))]
            for name, key in (("reward", "reward"), ("tokens", "completions/mean_length"))
        }
        found[arm]["training"] = {"seconds": round(log["seconds"]), **ends}
    return {"prompts": len(pairs), "steps": args.steps, "group": args.group, "by": found}


def cell(found: dict[str, float], digits: int = 3) -> str:
    return f"{found['value']:+.{digits}f} [{found['low']:+.{digits}f}, {found['high']:+.{digits}f}]"


def tables(results: dict[str, Any]) -> str:
    """The results in Markdown."""
    titles = ["reward", "reader", "zero-label", "words"]
    names = REWARDS | {"longest": "the longest response"}
    by = results["best_of_n"]["by"]
    rows = [
        [names[arm], cell(row["reader"]), cell(row["zero-label"]), cell(row["words"], 1)] for arm, row in by.items()
    ]
    lines = [f"## Best of {results['best_of_n']['n']}: the chosen response against the mean", ""]
    lines += markdown_table(titles, rows)
    if "grpo" in results:
        rows = [
            [names[arm], *(cell(row[name]) for name in ("its own reward", "reader", "zero-label"))]
            + [cell(row["words"], 1), str(row["training"]["seconds"])]
            for arm, row in results["grpo"]["by"].items()
        ]
        lines += ["", f"## After {results['grpo']['steps']} steps of GRPO, against before", ""]
        lines += markdown_table(["reward", "its own reward", *titles[1:], "seconds"], rows)
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, required=True, help="folder of `critrm run bundled:hh-llmbar.yaml`")
    parser.add_argument("--reader", type=Path, required=True, help="a reward model that reads no critiques")
    parser.add_argument("--pairs", type=Path, default=Path(os.environ.get("CRITRM_DATA", "")) / "hh-pairs/pairs.jsonl")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--prompts", type=int, default=60)
    parser.add_argument("--n", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=96)
    parser.add_argument("--steps", type=int, default=0, help="of GRPO; none when 0")
    parser.add_argument("--group", type=int, default=4)
    parser.add_argument("--learning-rate", type=float, default=5e-6)
    parser.add_argument("--seed", type=int, default=0, help="which seed of the run's reward models")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    results: dict[str, Any] = {"best_of_n": best_of_n(args)}
    if args.steps:
        results["grpo"] = grpo(args)
    write_text(args.out / "policy.json", json.dumps(results, indent=2) + "\n")
    write_text(args.out / "policy.md", tables(results))
    print(tables(results))


if __name__ == "__main__":
    main()
