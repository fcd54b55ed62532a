"""The public names, and what loading them costs."""

import ast
import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

import critrm

HEAVY = {
    "accelerate",
    "datasets",
    "matplotlib",
    "openai",
    "pandas",
    "peft",
    "pyarrow",
    "scipy",
    "torch",
    "transformers",
}
SOURCE = Path(critrm.__file__)


def loaded_by(code: str) -> set[str]:
    """The top-level packages that a fresh interpreter holds after running the code."""
    report = (
        "\nimport json, sys\nprint(json.dumps(sorted({n.partition('.')[0] for n in sys.modules})), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code + report], capture_output=True, text=True, timeout=60, check=True)
    return set(json.loads(done.stderr))


def type_checker_names() -> list[str]:
    """The names imported under TYPE_CHECKING: what mypy and an editor see."""
    block = next(node for node in ast.parse(SOURCE.read_text()).body if isinstance(node, ast.If))
    return [name.name for node in block.body if isinstance(node, ast.ImportFrom) for name in node.names]


def test_names_are_sorted_and_seen_alike_by_type_checkers_and_at_run_time():
    assert critrm.__all__ == sorted(critrm.__all__)
    assert sorted(type_checker_names()) == critrm.__all__
    assert sorted(critrm._HOME) == critrm.__all__


@pytest.mark.parametrize("name", critrm.__all__)
def test_name_can_be_imported_from_where_type_checkers_find_it(name):
    value = getattr(critrm, name)
    assert value.__name__ == name
    assert value.__module__ == f"critrm.{critrm._HOME[name]}"
    assert name in dir(critrm)


def test_no_public_name_hides_a_module():
    modules = {path.stem for path in SOURCE.parent.iterdir() if path.suffix == ".py" or path.is_dir()}
    assert not modules & set(critrm.__all__)


def test_every_error_is_public():
    tree = {cls.__name__ for cls in critrm.CritrmError.__subclasses__()} | {"CritrmError"}
    assert tree <= set(critrm.__all__)


def test_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = critrm.nothing


@pytest.mark.parametrize(
    "code",
    [
        "import critrm",
        "from critrm import CritrmError, Critique, CritiqueCache, OpenAIChat, PreferencePair, ScriptedChat",
        "import critrm.metrics, critrm.prompts",
        "import critrm.cli\ntry: critrm.cli.app(['--help'])\nexcept SystemExit: pass",
        "import critrm.cli\ntry: critrm.cli.app(['models', '--help'])\nexcept SystemExit: pass",
    ],
    ids=["import", "records and llm", "bottom layer", "help", "models help"],
)
def test_loads_nothing_heavy(code):
    assert not loaded_by(code) & HEAVY


def test_import_is_measured(record_property):
    # Measured for the record, not asserted: a busy machine is no defect.
    start = time.perf_counter()
    loaded_by("import critrm.cli")
    record_property("import_critrm_cli_seconds", round(time.perf_counter() - start, 3))
