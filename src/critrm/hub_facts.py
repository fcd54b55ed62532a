"""What a hub card says of a reward model: its results, training and critic, and nothing of this machine."""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from critrm.errors import CriticMismatch, DataError
from critrm.models import EMBEDDED, PREFIX
from critrm.score_files import read_result
from critrm.store import file_name, read_rows
from critrm.types import NO_CRITIC, EvalResult

if TYPE_CHECKING:
    from critrm.reward_model import Reads

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
CRITIC_FACTS = ("model", "template", "temperature", "top_p", "max_tokens", "samples")
TRAINING_FACTS = (
    "batch_size",
    "n_epochs",
    "learning_rate",
    "loss",
    "lora_rank",
    "frozen",
    "critique_dropout",
    "critique_first",
    "lm_weight",
    "score_weight",
    "seed",
)


def read_json(path: Path) -> dict[str, Any] | None:
    """The object that a JSON file holds; None where there is no such file."""
    return next(iter(read_rows(path)))[1] if path.is_file() else None


def results_beside(run: Path | None) -> dict[str, Any] | None:
    """The results of a run, over its arms and seeds, when it is finished."""
    results = read_json(run / "results.json") if run else None
    return results and results | {"backbone": public_name(results["backbone"])[1]}


def run_of(folder: Path) -> Path | None:
    """The run that trained `RUN/train/ARM/seed-N/model`, if it was one."""
    parents = folder.resolve().parents
    if folder.name != "model" or len(parents) < 4 or not (parents[3] / "evaluate").is_dir():
        return None
    return parents[3]


def own_results(folder: Path, run: Path | None) -> dict[str, EvalResult]:
    """What the model's own run evaluated it on, by test set; nothing without a run."""
    if run is None:
        return {}
    arm, seed = folder.resolve().parts[-3:-1]
    files = sorted((run / "evaluate" / arm / seed).glob("*/*.json"))
    return {file.parent.name: read_result(file) for file in files if _is_result(file)}


def _is_result(file: Path) -> bool:
    return file.name.count(".") == 1 and file.name != "manifest.json"


def given_results(evaluations: Iterable[Path], *, folder: Path, reads: "Reads") -> dict[str, EvalResult]:
    """The results in folders that `critrm evaluate --out` wrote.

    Raises:
        DataError: a folder holds no result, or one of another model.
        CriticMismatch: a result is with critiques that the model does not read.
    """
    found = {}
    for place in evaluations:
        files = [file for file in sorted(place.glob("*.json")) if _is_result(file)]
        if not files:
            raise DataError("no result in it: name a folder that `critrm evaluate --out` wrote", path=str(place))
        for file in files:
            result = read_result(file)
            if result.critic != reads.critic and not (result.critic == NO_CRITIC and reads.critique_dropout):
                raise CriticMismatch(
                    f"{file}: with critiques by {result.critic!r}, the reward model reads those by {reads.critic!r}"
                )
            if Path(result.model).resolve() != folder.resolve():
                raise DataError(f"this is the result of {result.model}, not of {folder}", path=str(file), field="model")
            found[place.name if len(files) == 1 else file.stem] = result
    return found


def public_name(backbone: str) -> tuple[str, str]:
    """A backbone's hub id, if it has one, and what can be told of its name: no folder of this machine."""
    if backbone.startswith(PREFIX):
        embedded = EMBEDDED.get(backbone.removeprefix(PREFIX))
        return (
            (embedded.hub_id, f"{embedded.hub_id}, quantized ({embedded.file.split('.')[-2]})")
            if embedded
            else ("", "")
        )
    if HUB_ID.fullmatch(backbone) and not Path(backbone).exists():
        return backbone, backbone
    return "", Path(backbone).name or "not recorded"


def training_facts(folder: Path, manifest: Mapping[str, Any] | None) -> dict[str, Any]:
    """Settings of the training, as far as they are recorded."""
    if manifest is None:
        return {}
    config = manifest["config"]
    facts = {name: config[name] for name in TRAINING_FACTS if config.get(name) not in (None, 0.0, "")}
    row = read_json(folder / "result.jsonl") or {}
    pairs = {"pairs": row["n_pairs"], "tokens": row["n_tokens"]} if "n_pairs" in row else {}
    versions = {name: manifest["versions"].get(name) for name in ("transformers", "torch")}
    notes = {f"note {i}": note for i, note in enumerate(manifest["notes"], 1)}
    return {**pairs, **facts, **{name: version for name, version in versions.items() if version}, **notes}


def critic_facts(run: Path | None, critic: str) -> dict[str, Any]:
    """What the run knows of its critic; no address and no file of this machine."""
    if run is None or critic == NO_CRITIC:
        return {}
    file = run / "critique" / f"{file_name(critic)}.jsonl"
    versions = sorted({row.get("prompt_version") or "" for _, row in read_rows(file)} - {""}) if file.is_file() else []
    facts = {"prompt_version": ", ".join(versions)} if versions else {}
    config = (read_json(run / "manifest.json") or {}).get("config", {})
    settings = config.get("critique", {}).get("critics", {}).get(critic, {})
    if settings.get("file"):
        return facts | {"critiques": "imported from a file"}
    shown = {name: settings[name] for name in CRITIC_FACTS if settings.get(name) not in (None, "")}
    if str(shown.get("model", "")).startswith("local:"):
        shown["model"] = Path(shown["model"].removeprefix("local:")).name
    if "template" in shown:
        shown["template"] = Path(shown["template"]).name
    return facts | shown
