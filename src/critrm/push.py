"""To the hub: a reward model, or critiqued pairs, with a card that says what was measured.

Nothing leaves the machine without `--upload`; until then the folder to be uploaded can be read.
"""

import contextlib
import json
import os
import re
import shutil
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from critrm.errors import ConfigError, DataError, ModelError
from critrm.hub_cards import MADE_WITH, model_card, pairs_card
from critrm.hub_facts import (
    HUB_ID,
    critic_facts,
    given_results,
    own_results,
    public_name,
    read_json,
    results_beside,
    run_of,
    training_facts,
)
from critrm.store import disk_errors, read_records, read_rows, write_records, write_text
from critrm.types import CritiquedPair

MODEL_FILES = (
    "config.json",
    "*.safetensors",
    "*.safetensors.index.json",
    "classifier.py",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
)
"""What a classifier consists of; whatever else lies in its folder stays where it is."""


def stage_model(
    model: str, repo: str, *, out: Path, licence: str, critic: str | None = None, evaluations: Iterable[Path] = ()
) -> Path:
    """Put a reward model's files and its card into a folder that can be uploaded.

    Args:
        model: the model's folder, or that of the run that trained it.
        repo: its future owner and name on the hub.
        out: the folder; what lay there before is replaced.
        licence: the hub's name of the licence, such as `apache-2.0`.
        critic: which model of a run that trained several.
        evaluations: folders that `critrm evaluate --out` wrote for this model; those of its run are found.

    Returns:
        `out`.

    Raises:
        ModelError: there is no such model, several, or one whose weights are not in safetensors.
        CriticMismatch: an evaluation is of another model's critic.
        DataError: an evaluation cannot be read, or is of another model.
        StorageError: the disk is full or read-only.
    """
    from critrm.prompts import reward_chat_template
    from critrm.reward_model import model_folder, read_facts

    folder = Path(model_folder(model, critic))
    if not (folder / "config.json").is_file():
        raise ModelError(f"{model}: there is no reward model in it. Give a model's folder, or that of its run.")
    if not list(folder.glob("*.safetensors")):
        raise ModelError(f"{folder}: its weights are not in safetensors, and nothing else is pushed. Save it again.")
    reads = read_facts(str(folder))
    run = run_of(folder)
    results = own_results(folder, run) | given_results(evaluations, folder=folder, reads=reads)
    base_model, shown = public_name(reads.backbone)
    manifest = read_json(folder.parent / "manifest.json")
    card = model_card(
        repo,
        licence=licence,
        reads=reads,
        base_model=base_model,
        training={"backbone": shown} | training_facts(folder.parent, manifest),
        critic=critic_facts(run, reads.critic),
        results=results,
        beside=results_beside(run),
    )
    _clear(out)
    with disk_errors(out):
        for file in _files(folder):
            _put(file, out / file.name)
    write_text(out / "chat_template.jinja", reward_chat_template(reads.cue))
    facts = asdict(reads) | {"backbone": base_model or shown}
    write_text(out / "critrm.json", json.dumps(facts, indent=2) + "\n")
    write_text(out / "README.md", card)
    return out


def stage_pairs(arm: Path, repo: str, *, out: Path, licence: str, split: str = "train") -> Path:
    """Put critiqued pairs and their card into a folder that can be uploaded.

    Args:
        arm: the pairs with critiques, as `critrm augment` wrote them.
        repo: their future owner and name on the hub.
        out: the folder; what lay there before is replaced.
        licence: the hub's name of the licence, such as `cc0-1.0`.
        split: the name of their split.

    Returns:
        `out`.

    Raises:
        DataError: not an arm, or one of several critics.
        StorageError: the disk is full or read-only.
    """
    if "pair" not in next(iter(read_rows(arm)))[1]:
        raise DataError("not an arm that `critrm augment` wrote: augment the pairs with their critiques", path=str(arm))
    items = read_records(arm, CritiquedPair)
    critics = sorted({item.critic for item in items})
    if len(critics) > 1:
        raise DataError(f"pairs of several critics, {critics}: push each by itself", path=str(arm), field="critic")
    run = arm.parents[2] if len(arm.parents) > 2 and (arm.parents[2] / "results.json").is_file() else None
    card = pairs_card(
        repo,
        items,
        licence=licence,
        split=split,
        critic=critic_facts(run, critics[0]),
        beside=results_beside(run),
    )
    _clear(out)
    write_records(out / "data" / f"{split}.jsonl", map(_row, items))
    write_text(out / "README.md", card)
    return out


def upload_folder(folder: Path, repo: str, *, repo_type: str, private: bool) -> str:
    """Make the repository, if it is not there, and put the folder's files into it.

    Returns:
        Its address.

    Raises:
        ConfigError: the hub refuses; the message has its reason, never the token.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError, OfflineModeIsEnabled

    api = HfApi()
    try:
        address = api.create_repo(repo, repo_type=repo_type, private=private, exist_ok=True)
        api.upload_folder(folder_path=folder, repo_id=repo, repo_type=repo_type, commit_message="Add from critrm")
    except LocalTokenNotFoundError:
        raise ConfigError(
            "no token for the hub: put one with write access into HF_TOKEN, or run `hf auth login`"
        ) from None
    except OfflineModeIsEnabled:
        raise ConfigError("HF_HUB_OFFLINE is set: unset it to upload") from None
    except HfHubHTTPError as error:
        status = error.response.status_code
        hint = " Is HF_TOKEN set, with write access?" if status in (401, 403) else ""
        reason = error.server_message or ""
        raise ConfigError(f"the hub refused {repo} (http {status}). {reason}{hint} Nothing is lost: {folder}") from None
    except OSError as error:
        raise ConfigError(f"the hub cannot be reached ({type(error).__name__}). Nothing is lost: {folder}") from None
    return str(address)


def _row(item: CritiquedPair) -> dict[str, object]:
    pair = item.pair
    return {
        "id": pair.id,
        "prompt": [{"role": message.role, "content": message.content} for message in pair.prompt],
        "chosen": [{"role": "assistant", "content": pair.chosen}],
        "rejected": [{"role": "assistant", "content": pair.rejected}],
        "rating": pair.rating,
        "margin": pair.margin,
        "source": pair.source,
        "subset": pair.subset,
        "chosen_critique": item.chosen_critique,
        "rejected_critique": item.rejected_critique,
        "chosen_score": None if item.chosen_score is None else float(item.chosen_score),
        "rejected_score": None if item.rejected_score is None else float(item.rejected_score),
        "critic": item.critic,
    }


def _files(folder: Path) -> list[Path]:
    return sorted({file for pattern in MODEL_FILES for file in folder.glob(pattern) if file.is_file()})


def _put(file: Path, to: Path) -> None:
    """Copy a file; weights, which are large, get a second name where the disk can do that."""
    if file.suffix == ".safetensors":
        with contextlib.suppress(OSError):
            os.link(file.resolve(), to)
            return
    shutil.copyfile(file, to)


def _clear(out: Path) -> None:
    """An empty folder: a new one, or one that holds what was pushed before and nothing else.

    Raises:
        ConfigError: it holds anything else, such as somebody's project or the model itself.
    """
    found = [file for file in out.rglob("*") if not file.is_dir()] if out.is_dir() else []
    card = out / "README.md"
    ours = card.is_file() and MADE_WITH in card.read_text(encoding="utf-8", errors="replace")
    names = (*MODEL_FILES, "README.md", "critrm.json", "chat_template.jinja", "data/*.jsonl")
    if found and not (ours and all(any(file.relative_to(out).match(name) for name in names) for file in found)):
        raise ConfigError(f"--out {out} holds other files: name a new folder")
    with disk_errors(out):
        for file in found:
            file.unlink()
        out.mkdir(parents=True, exist_ok=True)


def command(
    what: str,
    repo: str,
    *,
    license: str,
    critic: str = "",
    evaluation: tuple[Path, ...] = (),
    split: str = "train",
    out: Path | None = None,
    upload: bool = False,
    private: bool = False,
) -> None:
    """Prepare a reward model or critiqued pairs for the hub, with a card; with --upload, put them there.

    Args:
        what: a reward model's folder or that of its run; or pairs with critiques that `critrm augment` wrote (.jsonl).
        repo: owner and name on the hub.
        license: the hub's name of a licence that you may give it, such as apache-2.0. The backbone's and the critic's
            terms count, too.
        critic: which model of a run that trained several.
        evaluation: folders that `critrm evaluate --out` wrote for this model; those of its run are found.
        split: what the pairs are called: train, test, ...
        out: the folder to be uploaded; `push/NAME` when not given.
        upload: put it on the hub. Needs a token with write access in HF_TOKEN, or of `hf auth login`.
        private: make the repository a private one, where it is new.
    """
    if not HUB_ID.fullmatch(repo) or "--" in repo or ".." in repo:
        raise ConfigError(f"{repo!r} is no owner/name of letters, digits, '-', '_' and '.'")
    if not re.fullmatch(r"\w+", split):
        raise ConfigError(f"--split {split!r}: name it with letters, digits and '_'")
    if not re.fullmatch(r"[a-z0-9][a-z0-9.+-]*", license):
        raise ConfigError(f"--license {license!r}: the hub's names are in small letters, such as apache-2.0 or other")
    console, is_data = Console(), Path(what).is_file()
    place = out or Path("push") / repo.partition("/")[2]
    if is_data and (critic or evaluation):
        raise ConfigError("--critic and --evaluation are for reward models; pairs have theirs in the file")
    if is_data:
        stage_pairs(Path(what), repo, out=place, licence=license, split=split)
    else:
        stage_model(what, repo, out=place, licence=license, critic=critic or None, evaluations=evaluation)
    console.print(_files_table(place, repo))
    if not upload:
        console.print(
            f"Nothing was uploaded. Read {place / 'README.md'}, then add --upload.", soft_wrap=True, markup=False
        )
        return
    address = upload_folder(place, repo, repo_type="dataset" if is_data else "model", private=private)
    console.print(f"Uploaded: {address}", soft_wrap=True, markup=False)


def _files_table(folder: Path, repo: str) -> Table:
    table = Table(title=Text(f"For {repo}"))
    table.add_column("file")
    table.add_column("MB", justify="right")
    for file in sorted(each for each in folder.rglob("*") if each.is_file()):
        table.add_row(Text(str(file.relative_to(folder))), f"{file.stat().st_size / 1e6:.2f}")
    return table
