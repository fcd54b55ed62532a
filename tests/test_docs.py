"""README and docs against the program: every command parses, those marked fast run, links and the file tree are true.

In a Markdown page
* a `critrm ...` line of any bash block has to parse against the real command line, and `make x` names a real target;
* a bash block whose first line is `# runs: fast` is executed in a folder with `pairs.jsonl` and `critiques.jsonl`;
* a python block is executed in that folder, unless its first line is `# runs: no (why)`; then it has to compile.
"""

import contextlib
import os
import re
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

import critrm
from critrm import cli

ROOT = Path(__file__).parents[1]
PACKAGE = Path(critrm.__file__).parent
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])
FENCE = re.compile(r"^```(\w+)[^\n]*\n(.*?)^```\s*$", re.MULTILINE | re.DOTALL)
ASSIGNMENT = re.compile(r"[A-Za-z_]\w*=.*")


@dataclass(frozen=True)
class Block:
    """A fenced block of a page."""

    page: Path
    line: int
    language: str
    text: str

    @property
    def mark(self) -> str:
        match = re.match(r"# runs: (\w+)(?: \(.+\))?\n", self.text)
        return match[1] if match else ""

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def blocks(page: Path) -> list[Block]:
    text = page.read_text(encoding="utf-8")
    return [Block(page, text.count("\n", 0, m.start()) + 1, m[1], m[2]) for m in FENCE.finditer(text)]


ALL_BLOCKS = [block for page in PAGES for block in blocks(page)]
BASH = [block for block in ALL_BLOCKS if block.language in ("bash", "sh", "shell", "console")]
PYTHON = [block for block in ALL_BLOCKS if block.language == "python"]


def commands(block: Block) -> list[list[str]]:
    """The simple commands of a bash block: continuations joined, pipes, lists and redirections cut off."""
    found = []
    for line in block.text.replace("\\\n", " ").splitlines():
        lexer = shlex.shlex(line.removeprefix("$ "), posix=True, punctuation_chars="|&;<>")
        lexer.whitespace_split = True
        words: list[str] = []
        redirected = False
        for word in [*lexer, ";"]:
            if set(word) <= set("|&;"):
                found.append(words)
                words, redirected = [], False
            elif set(word) <= set("<>"):
                redirected = True
            elif not redirected and (words or not ASSIGNMENT.fullmatch(word)):
                words.append(word)
    return [words for words in found if words]


def critrm_commands() -> list:
    cases = []
    for block in BASH:
        for number, words in enumerate(commands(block)):
            name = words[0].rsplit("/", 1)[-1]
            if name == "critrm":
                cases.append(pytest.param(words[1:], id=f"{block}[{number}] {' '.join(words)[:60]}"))
    return cases


@pytest.fixture
def sandbox(tmp_path, monkeypatch) -> Path:
    """A folder with a few of the bundled pairs and their critiques, a `critrm` on the path and an empty cache."""
    for name, source, n_rows in (("pairs", "mini-pairs", 12), ("critiques", "mini-frontier-llm", 24)):
        lines = (PACKAGE / "data" / f"{source}.jsonl").read_text(encoding="utf-8").split("\n")[:n_rows]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    program = tmp_path / "bin" / "critrm"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m critrm "$@"\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("PYTHONPATH", str(PACKAGE.parent))
    monkeypatch.setenv("CRITRM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("tokens", critrm_commands())
def test_every_critrm_command_parses(tokens, sandbox):
    if "--help" in tokens or "--version" in tokens:
        with pytest.raises(SystemExit) as stop:
            cli.app(tokens)
        assert not stop.value.code
        return
    cli.app.parse_args(tokens, exit_on_error=False, print_error=False)


@pytest.mark.parametrize("block", BASH, ids=str)
def test_every_make_target_exists(block):
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for words in commands(block):
        if words[0] == "make":
            named = {word for word in words[1:] if "=" not in word and not word.startswith("-")}
            assert named <= targets


@pytest.mark.parametrize("block", [block for block in BASH if block.mark == "fast"], ids=str)
def test_fast_commands_run(block, sandbox):
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", block.text], capture_output=True, text=True, timeout=120, cwd=sandbox
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("block", PYTHON, ids=str)
def test_python_examples_run(block, sandbox):
    code = compile(block.text, str(block), "exec")
    if block.mark != "no":
        with contextlib.redirect_stdout(None):
            exec(code, {"__name__": "__main__"})


@pytest.mark.parametrize("block", [*BASH, *PYTHON], ids=str)
def test_marks_are_known_and_give_a_reason_for_not_running(block):
    first = block.text.split("\n", 1)[0]
    if "runs:" in first:
        assert re.fullmatch(r"# runs: (fast|no \(.+\))", first)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_to_files_lead_somewhere(page):
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if "://" not in target and not target.startswith(("#", "mailto:")):
            assert (page.parent / target.partition("#")[0]).exists(), target


def test_file_tree_in_readme_is_the_file_tree():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    tree = next(block.text for block in blocks(ROOT / "README.md") if "src/critrm/" in block.text)
    package = {path.name for path in PACKAGE.glob("*.py")} - {"__init__.py", "__main__.py"}
    listed = set(re.findall(r"^  (\w+\.py) ", tree, re.MULTILINE)) - {"__init__.py", "__main__.py"}
    assert listed == package
    for folder in (path for path in PACKAGE.iterdir() if path.is_dir() and path.name != "__pycache__"):
        assert f"  {folder.name}/ " in tree
    assert "make demo" in readme


def test_map_names_every_stage_module_and_its_files():
    page = (ROOT / "docs" / "index.md").read_text(encoding="utf-8")
    for verb, (target, _) in cli.VERBS.items():
        module = target.partition(":")[0].removeprefix("critrm.")
        row = next((line for line in page.splitlines() if f"`critrm {verb}`" in line), None)
        assert row, f"docs/index.md has no row for `critrm {verb}`"
        assert f"`{module}.py`" in row
        assert f"`test_{module}.py`" in row
    for test in re.findall(r"`(test_\w+\.py)`", page):
        assert (ROOT / "tests" / test).exists(), test


def test_every_page_is_on_the_map():
    page = (ROOT / "docs" / "index.md").read_text(encoding="utf-8")
    for path in (ROOT / "docs").glob("*.md"):
        assert path.name == "index.md" or f"]({path.name})" in page, path.name


def test_continuous_integration_runs_the_test_command_of_the_readme():
    assert "make test" in (ROOT / "README.md").read_text(encoding="utf-8")
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    assert {"make check", "make test"} <= set(script.read_text().splitlines())


def test_changelog_has_the_version():
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert "## [Unreleased]" in changelog or f"## [{critrm.__version__}]" in changelog
