"""Does a pair cost the same among 100,000 as among 1,000? Data preparation and scoring, with the memory they take.

    python bench/scaling.py --out scaling.json
    python bench/scaling.py --sizes 1000 10000 100000 200000 --score-up-to 100000

The pairs of a file with their critiques are repeated under new ids, with a number put before each text so that no two
are equal. Preparation is what a training does before its first step: reading pairs and critiques, joining them, and
measuring each arm with the tokenizer. Scoring streams the critiqued arm through a random two-layer Llama with the
embedded model's tokenizer, so that what grows with the number of pairs is not lost in the model's arithmetic. Each
size is a process of its own; memory is the process's peak, above what it had before it read anything.
"""

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

SOURCE = Path(__file__).parents[1] / "src"
MODEL = "embedded:SmolLM2-135M-Instruct"


def peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def write_data(arguments: argparse.Namespace, n: int, folder: Path) -> None:
    """`n` pairs with critiques, as files; in the parent, so that their making is not measured."""
    from critrm.critique_files import read_critiques
    from critrm.preferences import read_pairs

    texts = {(row.pair_id, row.side): row.text for row in read_critiques(arguments.critiques)}
    pairs = [pair for pair in read_pairs(arguments.pairs).pairs if (pair.id, "chosen") in texts]
    with open(folder / "pairs.jsonl", "w") as out, open(folder / "critiques.jsonl", "w") as critiques:
        for i in range(n):
            pair = pairs[i % len(pairs)]
            prompt = [{"role": message.role, "content": f"{i}. {message.content}"} for message in pair.prompt]
            row = {"id": str(i), "prompt": prompt, "chosen": f"{i} {pair.chosen}", "rejected": f"{i} {pair.rejected}"}
            out.write(json.dumps(row) + "\n")
            for side in ("chosen", "rejected"):
                found = {"pair_id": str(i), "side": side, "critique": f"{i} {texts[pair.id, side]}"}
                critiques.write(json.dumps(found) + "\n")


def prepare(folder: Path) -> dict[str, float]:
    from critrm.augment import Budget, augment_pairs, text_encoder, write_augmented
    from critrm.critique_files import read_critiques
    from critrm.models import load_tokenizer
    from critrm.preferences import read_pairs

    encode = text_encoder(load_tokenizer(MODEL))
    encode("warm")
    before, started = peak_mb(), time.perf_counter()
    pairs = read_pairs(folder / "pairs.jsonl").pairs
    critiques = read_critiques(folder / "critiques.jsonl", critic="critic")
    arms = augment_pairs(pairs, {"critic": critiques}, encode=encode, budget=Budget(2048))
    write_augmented(folder / "arms", arms)
    seconds = time.perf_counter() - started
    return {"seconds": seconds, "ms_per_pair": 1000 * seconds / len(pairs), "peak_mb": peak_mb(), "before_mb": before}


def score(folder: Path) -> dict[str, float]:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from critrm.models import load_tokenizer
    from critrm.reward_model import Reads, RewardModel
    from critrm.store import from_json, read_rows
    from critrm.types import CritiquedPair

    tokenizer = load_tokenizer(MODEL)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=4096,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    model = RewardModel.from_backbone(str(folder / "model"), Reads(critic="critic"), seed=0)

    def items() -> Iterator[CritiquedPair]:
        for _, row in read_rows(folder / "arms" / "critic.jsonl"):
            yield from_json(CritiquedPair, row)

    before, started, n = peak_mb(), time.perf_counter(), 0
    for _ in model.score_stream(items()):
        n += 1
    seconds = time.perf_counter() - started
    return {"seconds": seconds, "ms_per_pair": 1000 * seconds / n, "peak_mb": peak_mb(), "before_mb": before}


def worker(what: str, folder: Path) -> dict[str, float]:
    path = os.pathsep.join(filter(None, (str(SOURCE), os.environ.get("PYTHONPATH"))))
    done = subprocess.run(
        [sys.executable, __file__, "--worker", what, "--folder", str(folder)],
        env=os.environ | {"PYTHONPATH": path, "TOKENIZERS_PARALLELISM": "false"},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        sys.exit(f"{what} failed:\n{done.stderr[-3000:]}")
    return dict(json.loads(done.stdout.splitlines()[-1]))


def main() -> None:
    data = Path(os.environ.get("CRITRM_DATA", "../shared/data"))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", default=str(data / "hh-pairs" / "pairs.jsonl"))
    parser.add_argument("--critiques", default=str(data / "critiques" / "frontier-llm.jsonl"))
    parser.add_argument("--sizes", type=int, nargs="+", default=[1000, 10_000, 100_000, 200_000])
    parser.add_argument("--score-up-to", type=int, default=100_000)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--worker", choices=("prepare", "score"), help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        print(json.dumps({"prepare": prepare, "score": score}[arguments.worker](arguments.folder)))
        return
    sys.path.insert(0, str(SOURCE))
    rows: dict[str, Any] = {}
    print("| pairs | preparation, ms a pair | peak MB | scoring, ms a pair | peak MB |")
    print("| ---: | ---: | ---: | ---: | ---: |")
    for n in arguments.sizes:
        with tempfile.TemporaryDirectory() as name:
            write_data(arguments, n, Path(name))
            rows[str(n)] = {"prepare": worker("prepare", Path(name))}
            cells = [f"{rows[str(n)]['prepare'][key]:.2f}" for key in ("ms_per_pair", "peak_mb")]
            if n <= arguments.score_up_to:
                rows[str(n)]["score"] = worker("score", Path(name))
                cells += [f"{rows[str(n)]['score'][key]:.2f}" for key in ("ms_per_pair", "peak_mb")]
            print("|", " | ".join([f"{n:,}", *cells]), "|", flush=True)
    if arguments.out:
        facts = {"machine": platform.platform(), "cpus": os.cpu_count(), "rows": rows}
        arguments.out.write_text(json.dumps(facts, indent=2) + "\n")


if __name__ == "__main__":
    main()
