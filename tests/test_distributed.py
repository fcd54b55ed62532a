"""Several processes: what `torchrun` and `accelerate launch` start gives what one process gives (gloo, on the CPU)."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from critrm.reward_model import RewardModel
from critrm.store import write_records
from critrm.types import RATINGS, CritiquedPair, Message, PreferencePair

pytestmark = pytest.mark.slow

SHARDED = """
# accelerate shards on accelerators only; told that these processes are some, it shards on the CPU as well.
from accelerate.state import DistributedType, PartialState

plain_init = PartialState.__init__


def init(self, *args, **kwargs):
    plain_init(self, *args, **kwargs)
    if self.distributed_type == DistributedType.MULTI_CPU:
        self.distributed_type = DistributedType.MULTI_GPU


PartialState.__init__ = init
from critrm import train
from critrm.cli import main

plain_whole = train.whole_model


def whole(reward_model, trainer, **kwargs):
    kinds = {type(parameter).__name__ for parameter in trainer.model_wrapped.parameters()}
    assert kinds == {"DTensor"}, kinds
    return plain_whole(reward_model, trainer, **kwargs)


train.whole_model = whole
main()
"""


@pytest.fixture(scope="module")
def arm(tmp_path_factory):
    """27 pairs: neither steps of 8 nor two processes come out even."""
    path = tmp_path_factory.mktemp("arm") / "arm.jsonl"
    write_records(
        path,
        [
            CritiquedPair(
                pair=PreferencePair(
                    id=f"pair-{n}",
                    prompt=(Message("user", f"What is {n} plus {n}? " * (1 + n % 3)),),
                    chosen=f"{n} plus {n} is {2 * n}.",
                    rejected=f"I think {2 * n + 1}",
                    rating=RATINGS[n % 3],
                ),
                critic="c",
                chosen_critique="good " * (1 + n % 5),
                rejected_critique="bad",
                chosen_score=n % 5,
                rejected_score=None if n % 7 == 0 else 1,
            )
            for n in range(27)
        ],
    )
    return path


@pytest.fixture(scope="module")
def run(arm, tiny_model):
    """Train in processes of their own; returns what they printed."""

    def start(launcher: list[str], out: Path, *flags: str, **variables: str) -> str:
        arguments = [
            "train", arm, "--backbone", tiny_model, "--out", out, "--batch-size", 8, "--pairs-per-pass", 2,
            "--learning-rate", 0.005, "--precision", "fp32", "--n-epochs", 2, "--checkpoint-minutes", 0, *flags,
        ]  # fmt: skip
        source = Path(__file__).parents[1] / "src"
        path = os.pathsep.join(filter(None, (str(source), os.environ.get("PYTHONPATH"))))
        done = subprocess.run(
            [sys.executable, "-W", "ignore", *launcher, *map(str, arguments)],
            env=os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "COLUMNS": "200"} | variables,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout

    return start


ONE = ["-m", "critrm"]
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
ACCELERATE = [
    "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2", "--num_machines", "1",
    "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0",
]  # fmt: skip
LOSSES = ("--center-weight", "0.1", "--lm-weight", "0.1", "--score-weight", "0.5", "--critique-dropout", "0.2")


def _curve(out: Path) -> list[float]:
    rows = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [row["loss"] for row in rows if "loss" in row]


def _same(out: Path, other: Path) -> None:
    assert _curve(out) == pytest.approx(_curve(other), rel=1e-5)
    weights, others = (load_file(folder / "model" / "model.safetensors") for folder in (out, other))
    assert weights.keys() == others.keys()
    for name, tensor in weights.items():
        # Adam's first steps divide by the gradient's size: what is 0 but for rounding moves all the same.
        torch.testing.assert_close(others[name], tensor, atol=5e-4, rtol=1e-3)


@pytest.mark.parametrize("launcher", [TORCHRUN, ACCELERATE], ids=["torchrun", "accelerate"])
def test_two_processes_give_the_loss_curve_of_one(launcher, run, tmp_path):
    run(ONE, tmp_path / "one", *LOSSES)
    printed = run([*launcher, "-m", "critrm"], tmp_path / "two", *LOSSES)
    _same(tmp_path / "one", tmp_path / "two")
    assert printed.count("Reward model:") == 1  # the first process speaks for both
    assert printed.count("mean loss") == 1
    assert sorted(path.name for path in (tmp_path / "two").iterdir()) == sorted(
        path.name for path in (tmp_path / "one").iterdir()
    )


@pytest.mark.parametrize("flags", [(), ("--lora-rank", "4")], ids=["whole", "adapters"])
def test_sharded_weights_give_the_loss_curve_of_one_process_and_a_model_that_loads(flags, run, tmp_path):
    run(ONE, tmp_path / "one", *flags)
    script = tmp_path / "sharded.py"
    script.write_text(SHARDED)
    run(
        [*TORCHRUN, str(script)],
        tmp_path / "two",
        *flags,
        ACCELERATE_USE_FSDP="true",
        FSDP_VERSION="2",
        FSDP_AUTO_WRAP_POLICY="TRANSFORMER_BASED_WRAP",
    )
    _same(tmp_path / "one", tmp_path / "two")
    assert RewardModel.load(tmp_path / "two" / "model").critic == "c"


def test_accelerate_itself_refuses_to_shard_on_the_cpu(run, tmp_path):
    with pytest.raises(AssertionError, match="You can only use one of `--cpu`"):
        run([*ACCELERATE, "--use_fsdp", "-m", "critrm"], tmp_path / "two")
