"""Stage 7: the whole experiment over grids of backbones, critics, training sizes and seeds (sections 5.1 and 5.2).

Each cell of a grid is a run of its own, in a folder of its own; what is finished is skipped. Processes that run the
same study in the same folder share its trainings, on one machine or on several with one file system.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from critrm.config import Recipe, load_recipe
from critrm.errors import ConfigError, CritrmError
from critrm.pipeline import share_run
from critrm.runs import LEARNING_RATES
from critrm.store import write_text
from critrm.study_estimate import estimate_study, estimate_tables
from critrm.study_plan import Cell, plan_study
from critrm.study_results import exchange_table, study_results, write_study
from critrm.work_sharing import POLL_SECONDS, claim

SECONDS_TO_LOOK_AGAIN = 30.0
"""At most so often a process that waits for others looks whether one was killed and has left something to do."""


def run_study(recipe: Recipe, *, out: str | Path, console: Console | None = None) -> dict[str, Any]:
    """Run every cell of a study that no other process does, wait for the others', and return its results.

    Args:
        recipe: with a `study`.
        out: the study's folder.
        console: where progress is shown; nowhere when None.

    Raises:
        CritrmError: as `run_recipe` and `plan_study` say.
    """
    out, console = Path(out), console or Console(quiet=True)
    with claim(out, wait=True):
        cells = plan_study(recipe, out=out)
    done: dict[Path, dict[str, Any]] = {}
    while len(done) < len(cells):
        before, started = len(done), time.monotonic()
        for number, cell in enumerate(cells, 1):
            rates = _family_rates(cell, cells)
            if cell.folder in done or rates is None:
                continue
            console.rule(f"{number} of {len(cells)}: {cell.grid}, {cell.n_train} pairs, {cell.backbone}")
            shared: dict[str, Any] = {"learning_rates": rates, "study": out}
            results = share_run(cell.recipe, out=cell.folder, **shared, wait=False, console=console)
            if results is not None:
                done[cell.folder] = results
        if len(done) == before:
            _wait_for_others(cells, look_seconds=time.monotonic() - started)
    with claim(out, wait=True):
        found = study_results(recipe, cells)
        write_study(out, found)
    return found


def _wait_for_others(cells: Sequence[Cell], *, look_seconds: float) -> None:
    """Until another process has got further, or may have been killed.

    Looking again reads all pairs again: of a core that others could use it takes a tenth at most.
    """

    def progress() -> list[int]:
        found = [n_trained(cell) + (cell.folder / LEARNING_RATES).is_file() for cell in cells]
        results = (cell.folder / "results.json" for cell in cells)
        return found + [path.stat().st_mtime_ns for path in results if path.is_file()]

    before, started = progress(), time.monotonic()
    patience = max(SECONDS_TO_LOOK_AGAIN, 10 * look_seconds)
    while progress() == before and time.monotonic() - started < patience:
        time.sleep(POLL_SECONDS)


def _family_rates(cell: Cell, cells: Sequence[Cell]) -> dict[str, float] | None:
    """The learning rates that a cell takes over; none of its family's first cell, and None until that has chosen."""
    first = next(each for each in cells if each.family == cell.family)
    if first is cell:
        return {}
    path = first.folder / LEARNING_RATES
    try:
        rates: dict[str, float] = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    return rates


def command(
    recipe: str,
    *,
    out: Path | None = None,
    workers: Annotated[int, Parameter(negative=())] = 1,
    engine: str = "local",
    dry_run: bool = False,
    tflops: float | None = None,
) -> None:
    """Run the grids of a recipe's study: what is a critique worth? The same command resumes an interrupted study.

    Args:
        recipe: a YAML file with a `study` section, or `bundled:NAME.yaml`.
        out: the study's folder; `studies/NAME` when not given.
        workers: processes that share the work: one per GPU, each sees one of them.
        engine: `local` starts the workers here, `ray` on a cluster whose machines all see the folder.
        dry_run: print the plan with estimated hours and cost, and run nothing.
        tflops: for the plan: what a worker computes, in TFLOP/s; this machine's is measured when not given.
    """
    loaded, console = load_recipe(recipe), Console()
    out = (out or Path("studies") / loaded.name).absolute()
    if engine not in ("local", "ray"):
        raise ConfigError(f"the engine is local or ray, not {engine!r}")
    if dry_run:
        for table in estimate_tables(estimate_study(loaded, out=out, tflops=tflops), workers=workers):
            console.print(table)
        return
    if engine == "ray":
        _on_ray(loaded, out=out, workers=workers, console=console)
    elif workers > 1:
        _in_processes(recipe, out=out, workers=workers, console=console)
    found = run_study(loaded, out=out, console=console)
    console.print(exchange_table(found))
    console.print(f"Study folder: {out}\nIts tables and figures: critrm report {out}", soft_wrap=True)


def _in_processes(recipe: str, *, out: Path, workers: int, console: Console) -> None:
    """Have worker processes do the work, each with one of the GPUs; raises when one fails."""
    import torch

    n_gpus = torch.cuda.device_count()
    threads = max(1, (os.cpu_count() or 1) // workers)
    running = []
    for number in range(workers):
        environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
        if n_gpus:
            environment["CUDA_VISIBLE_DEVICES"] = str(number % n_gpus)
        log = out / f"worker-{number}.log"
        write_text(log, "")
        command = [sys.executable, "-m", "critrm", "study", recipe, "--out", str(out)]
        with open(log, "a", encoding="utf-8") as file:
            running.append(subprocess.Popen(command, env=environment, stdout=file, stderr=subprocess.STDOUT))
    try:
        _watch(running, load_recipe(recipe), out=out, console=console)
    finally:
        for process in running:
            process.terminate()
        for process in running:
            process.wait()


def _watch(running: Sequence["subprocess.Popen[bytes]"], recipe: Recipe, *, out: Path, console: Console) -> None:
    with claim(out, wait=True):
        cells = plan_study(recipe, out=out)
    total = sum(len(cell.recipe.train.seeds) * (1 + len(cell.arms)) for cell in cells)
    columns = (TextColumn("trainings"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        bar = progress.add_task("", total=total)
        while any(process.poll() is None for process in running):
            progress.update(bar, completed=sum(n_trained(cell) for cell in cells))
            time.sleep(POLL_SECONDS)
    for number, process in enumerate(running):
        if process.returncode:
            log = out / f"worker-{number}.log"
            last = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-1:]
            raise CritrmError(f"worker {number} failed: {''.join(last)} (all it said is in {log})")


def n_trained(cell: Cell) -> int:
    """How many of a cell's trainings are finished and evaluated."""
    return len(list(cell.folder.glob("evaluate/*/seed-*/done.json")))


def _on_ray(recipe: Recipe, *, out: Path, workers: int, console: Console) -> None:
    """Have tasks of a Ray cluster share the work, each with one GPU where the cluster has any."""
    import ray as untyped_ray

    ray: Any = untyped_ray
    ray.init(ignore_reinit_error=True, log_to_driver=False)
    n_gpus = 1 if ray.cluster_resources().get("GPU") else 0
    console.print(f"{workers} workers of the cluster share the work; what is finished lies in {out}", soft_wrap=True)
    task = ray.remote(num_gpus=n_gpus, max_retries=3)(run_study)
    ray.get([task.remote(recipe, out=str(out)) for _ in range(workers)])
