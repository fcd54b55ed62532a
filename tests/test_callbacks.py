"""Advice when memory or disk run out; checkpoints by time are tested where runs are killed (test_train)."""

import errno
from types import SimpleNamespace

import pytest
import torch

from critrm.callbacks import TimedCheckpoints, failure_advice
from critrm.errors import ModelError, StorageError


def _out_of_memory():
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nGPU 0 has a total capacity of ...")


def _no_memory_for_a_fork():
    raise OSError(errno.ENOMEM, "Cannot allocate memory")


FAILURES = {
    "cpu": lambda: torch.empty(1 << 60, dtype=torch.uint8),  # what the allocator says itself
    "cuda": _out_of_memory,
    "python": lambda: bytearray(1 << 62),
    "fork": _no_memory_for_a_fork,
}


@pytest.mark.parametrize("kind", FAILURES)
def test_out_of_memory_says_what_to_do(kind, tmp_path):
    with pytest.raises(ModelError, match="memory ran out") as caught, failure_advice(tmp_path):
        FAILURES[kind]()
    message = str(caught.value)
    assert "\n" not in message
    for remedy in ("pairs_per_pass", "gradient_checkpointing", "precision", "max_length", "same command"):
        assert remedy in message


def test_a_full_disk_says_so_and_other_errors_pass_unchanged(tmp_path):
    with pytest.raises(StorageError, match="Free space"), failure_advice(tmp_path):
        raise OSError(errno.ENOSPC, "No space left on device")
    with pytest.raises(StorageError, match="Free space"), failure_advice(tmp_path):
        raise RuntimeError("[enforce fail at inline_container.cc] PytorchStreamWriter failed writing file")
    with pytest.raises(RuntimeError, match="shapes"), failure_advice(tmp_path):
        raise RuntimeError("shapes cannot be multiplied")


def test_checkpoints_are_asked_for_when_time_has_passed_and_not_at_the_end(monkeypatch):
    now = [0.0]
    monkeypatch.setattr("critrm.callbacks.time.monotonic", lambda: now[0])
    callback, asked = TimedCheckpoints(1.0), []
    for step, moment in enumerate((30, 61, 90, 122, 300), 1):
        now[0] = moment
        control = SimpleNamespace(should_save=False)
        callback.on_step_end(None, SimpleNamespace(global_step=step, max_steps=5), control)
        asked.append(control.should_save)
    assert asked == [False, True, False, True, False]
