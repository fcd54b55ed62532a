"""Processes that share a run: nobody does what another is doing, and a killed one's work is taken up."""

import os
import signal
import subprocess
import sys
import textwrap
import time

import pytest

from critrm import work_sharing
from critrm.errors import StorageError
from critrm.work_sharing import claim, share_out

HOLD = """
import sys, time
from pathlib import Path
from critrm.work_sharing import claim
with claim(Path(sys.argv[1])) as is_mine:
    print(is_mine, flush=True)
    time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path):
    """Another process that has claimed `taken`."""
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(HOLD), str(tmp_path / "taken")], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "True\n"
    yield process
    process.kill()
    process.wait()
    process.stdout.close()


def test_a_claim_is_one_process_only_and_ends_with_it(holder, tmp_path):
    with claim(tmp_path / "taken") as is_mine:
        assert not is_mine
    os.kill(holder.pid, signal.SIGKILL)
    holder.wait()
    with claim(tmp_path / "taken") as is_mine:
        assert is_mine
    with claim(tmp_path / "taken") as is_mine:
        assert is_mine, "the end of the block ends the claim"


def test_what_another_does_is_left_to_it(holder, tmp_path):
    done = share_out({tmp_path / "taken": lambda: "other", tmp_path / "free": lambda: "mine"}, wait=False)
    assert done == {tmp_path / "free": "mine"}


def test_it_waits_for_another_and_then_looks_for_itself(holder, tmp_path, monkeypatch):
    monkeypatch.setattr(work_sharing, "POLL_SECONDS", 0.01)
    calls = []

    def free():
        calls.append("free")
        holder.kill()

    tasks = {tmp_path / "taken": lambda: calls.append("taken"), tmp_path / "free": free}
    started = time.monotonic()
    assert list(share_out(tasks)) == list(tasks), "in the order of the tasks"
    assert calls == ["free", "taken"]
    assert time.monotonic() - started < 30


def test_a_task_that_fails_gives_its_claim_back(tmp_path):
    def fail():
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        share_out({tmp_path / "a": fail})
    with claim(tmp_path / "a") as is_mine:
        assert is_mine


def test_a_folder_that_cannot_be_made_is_said(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="file"), claim(tmp_path / "file"):
        pass
