"""The command line: the table of verbs, and how errors reach a person."""

import importlib
import inspect
import subprocess
import sys
import types

import docstring_parser
import pytest

from critrm import cli
from critrm.errors import CritrmError, DataError

GROUPS = {"models": cli.MODEL_VERBS, "cache": cli.CACHE_VERBS}
TARGETS = [target for verbs in (cli.VERBS, *GROUPS.values()) for target, _ in verbs.values()]


def run(monkeypatch, *argv, raises=None):
    """Run `critrm argv`, with every verb replaced by one that raises; returns the exit code."""
    monkeypatch.setattr(sys, "argv", ["critrm", *argv])
    if raises is not None:
        module = types.ModuleType("critrm_scripted")

        def command() -> None:
            raise raises

        module.command = command
        monkeypatch.setitem(sys.modules, "critrm_scripted", module)
        monkeypatch.setitem(cli.VERBS, "critique", ("critrm_scripted:command", "Raises."))
        monkeypatch.setattr(cli, "app", cli._make_app())
    with pytest.raises(SystemExit) as stop:
        cli.main()
    return stop.value.code or 0


def test_version(monkeypatch, capsys):
    import critrm

    assert run(monkeypatch, "--version") == 0
    assert capsys.readouterr().out.strip() == critrm.__version__


def test_help_lists_every_verb_with_its_summary(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "160")
    assert run(monkeypatch, "--help") == 0
    out = capsys.readouterr().out
    for verb, (_, summary) in cli.VERBS.items():
        assert f" {verb} " in out
        assert summary in out


@pytest.mark.parametrize("target", TARGETS)
def test_target_exists_in_its_stage(target):
    module, _, function = target.partition(":")
    assert callable(getattr(importlib.import_module(module), function))


@pytest.mark.parametrize("verb", [*cli.VERBS, *(f"{group} {verb}" for group in GROUPS for verb in GROUPS[group])])
def test_every_verb_has_help(verb, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "160")
    assert run(monkeypatch, *verb.split(), "--help") == 0
    out = capsys.readouterr().out
    assert out.startswith(f"Usage: critrm {verb}")
    assert '[default: ""]' not in out


@pytest.mark.parametrize("target", TARGETS)
def test_every_option_is_explained(target):
    module, _, name = target.partition(":")
    function = getattr(importlib.import_module(module), name)
    explained = {item.arg_name for item in docstring_parser.parse(function.__doc__).params if item.description}
    assert explained == set(inspect.signature(function).parameters)


def test_error_is_one_red_message_without_traceback(monkeypatch, capsys):
    error = DataError("malformed JSON [/red] [bold]", path="/a/very/long/" + "path/" * 40 + "pairs.jsonl", line=7)
    assert run(monkeypatch, "critique", raises=error) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err == f"{error}\n"


def test_every_deliberate_error_is_caught(monkeypatch, capsys):
    for error_type in CritrmError.__subclasses__():
        assert run(monkeypatch, "critique", raises=error_type("what to do")) == 2
    assert "Traceback" not in capsys.readouterr().err


def test_interrupt_says_how_to_go_on(monkeypatch, capsys):
    assert run(monkeypatch, "critique", raises=KeyboardInterrupt()) == 130
    assert capsys.readouterr().err == "Interrupted. Run the same command again to go on.\n"


def test_missing_extra_says_what_to_install(monkeypatch, capsys):
    error = ModuleNotFoundError("No module named 'transformers'", name="transformers.trainer")
    assert run(monkeypatch, "critique", raises=error) == 2
    assert "pip install 'critrm[train]'" in capsys.readouterr().err


def test_unknown_verb_is_named_even_where_extras_are_missing(monkeypatch, capsys):
    monkeypatch.setattr(cli, "app", _raising(ImportError("No module named 'torch'")))
    assert run(monkeypatch, "critiqe") == 2
    assert capsys.readouterr().err.startswith("Unknown command 'critiqe'. There are: preferences, critics, critique,")


def test_other_import_errors_and_defects_keep_their_traceback(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["critrm", "critique"])
    for error in (ModuleNotFoundError("No module named 'x'", name="x"), RuntimeError("a defect")):
        monkeypatch.setattr(cli, "app", _raising(error))
        with pytest.raises(type(error)):
            cli.main()


def _raising(error):
    def app(tokens) -> None:
        raise error

    return app


def test_unknown_verb_and_option_are_usage_errors(monkeypatch, capsys):
    assert run(monkeypatch, "critiqe") == 2
    assert "critique" in capsys.readouterr().err
    assert run(monkeypatch, "--nonsense") == 2


def test_closed_pipe_is_quiet():
    code = "import sys, critrm.cli as c; sys.argv[1:] = ['--help']; c.main()"
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.close()
    assert process.stderr.read() == b""
    process.stderr.close()
    process.wait(timeout=30)


def test_runs_as_a_module():
    done = subprocess.run([sys.executable, "-m", "critrm", "--version"], capture_output=True, text=True, timeout=30)
    assert (done.returncode, done.stderr) == (0, "")
