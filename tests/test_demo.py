"""The demo, whole and for real: the embedded model writes critiques, three reward models are trained and compared."""

import json

import pytest

from critrm.demo import command
from critrm.errors import ConfigError


@pytest.mark.slow
def test_the_quick_demo_ends_with_a_table_and_resumes(smollm2, tmp_path, capsys):
    command(out=tmp_path / "demo", quick=True)
    out = capsys.readouterr().out
    for expected in ("An example of smollm2", "An example of frontier-llm", "Strict accuracy", "What it took"):
        assert expected in out
    results = json.loads((tmp_path / "demo-quick" / "results.json").read_text())
    assert list(results["learning_rates"]) == ["none", "smollm2", "frontier-llm"]
    models = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.safetensors")}
    command(out=tmp_path / "demo", quick=True)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.safetensors")} == models


def test_no_resume_refuses_a_folder_in_use(tmp_path):
    with pytest.raises(ConfigError, match="--no-resume"):
        command(out=tmp_path, resume=False)
