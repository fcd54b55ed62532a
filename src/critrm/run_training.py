"""The trainings of a run: each arm with each seed trained and evaluated, shared out among processes."""

import functools
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

from critrm.augment import Augmented
from critrm.averaging import SampleAveraged, Samples, samples_of
from critrm.evaluate import evaluate
from critrm.readings import FrozenRewardModel, Readings
from critrm.reward_model import RewardModel
from critrm.runs import TRAIN, Run, Sets
from critrm.store import content_hash, disk_errors, file_name, mark_stage_done, stage_is_done, write_text
from critrm.sweep import choose_learning_rate, split_held_out
from critrm.train import run_facts, train_reward_model
from critrm.types import Critique, CritiquedPair, PreferencePair
from critrm.work_sharing import share_out


def learning_rates_of(run: Run, train: Augmented, given: Mapping[str, float]) -> dict[str, float]:
    """Each arm's learning rate: the one given, the only one of the recipe, or the best on held-out pairs (section 4.4).

    Args:
        run: the run.
        train: the arms of the training pairs.
        given: arm -> learning rate, for arms that choose none.
    """
    config = run.recipe.train

    def choose(arm: Sequence[CritiquedPair], folder: Path) -> float:
        if rate := given.get(arm[0].critic):
            return rate
        if len(config.learning_rates) == 1:
            return config.learning_rates[0]
        with run.timed("learning rates"):
            return choose_learning_rate(
                arm, config, out=folder, max_length=run.recipe.augment.max_length, console=run.console
            )

    folders = {critic: run.out / TRAIN / file_name(critic) for critic in train.arms}
    rates = share_out(
        {folder: functools.partial(choose, train.arms[critic], folder) for critic, folder in folders.items()}
    )
    return {critic: rates[folder] for critic, folder in folders.items()}


def train_and_evaluate_all(
    run: Run,
    sets: Sets,
    augmented: Mapping[str, Augmented],
    critiques: Mapping[str, Sequence[Critique]],
    rates: Mapping[str, float],
    *,
    wait: bool,
) -> bool:
    """Train and evaluate each arm with each seed, as far as no other process does.

    Args:
        run: the run.
        sets: the training pairs and test sets, as read.
        augmented: their arms.
        critiques: critic -> its critiques.
        rates: arm -> learning rate.
        wait: for what other processes are at.

    Returns:
        Whether all are trained and evaluated; not where others are at it and it is not waited for them.
    """
    tasks = {
        run.out / "evaluate" / file_name(critic) / f"seed-{seed}": functools.partial(
            _train_and_evaluate, run, sets, augmented, critiques, critic, seed=seed, rate=rates[critic]
        )
        for seed in run.recipe.train.seeds
        for critic in augmented[TRAIN].arms
    }
    return len(share_out(tasks, wait=wait)) == len(tasks)


def _train_and_evaluate(
    run: Run,
    sets: Mapping[str, Sequence[PreferencePair]],
    augmented: Mapping[str, Augmented],
    critiques: Mapping[str, Sequence[Critique]],
    critic: str,
    *,
    seed: int,
    rate: float,
) -> None:
    folder = run.out / "evaluate" / file_name(critic) / f"seed-{seed}"
    config = run.recipe.train.of_arm(critic)
    facts = run_facts(config, seed=seed, rate=rate, max_length=run.recipe.augment.max_length)
    arm: Sequence[CritiquedPair] = augmented[TRAIN].arms[critic]
    held_out: Sequence[CritiquedPair] = ()
    if config.keep == "best":
        arm, held_out = split_held_out(arm, config.n_held_out)
        facts["n_held_out"] = config.n_held_out
    learnt = config.learns_scores_of(critic)  # those of the training pairs; test pairs' are read by nobody
    data = {
        name: [item.content(with_scores=learnt and name == TRAIN) for item in found.arms[critic]]
        for name, found in augmented.items()
    }
    benchmarks = {name: source.benchmark for name, source in run.recipe.preferences.test.items()}
    samples = _samples(run, sets, critiques.get(critic, ()))
    averaged = [sorted((*place, texts) for place, texts in samples.items())] if samples else []
    fingerprint = content_hash(facts, data, benchmarks, *averaged)
    if stage_is_done(folder, fingerprint) or _taken_over(run, folder, fingerprint):
        return
    # From here on the folder holds another run's results in part.
    (folder / "done.json").unlink(missing_ok=True)
    with run.timed(f"train {critic}"):
        result = train_reward_model(
            arm,
            config,
            held_out=held_out,
            out=run.out / TRAIN / file_name(critic) / f"seed-{seed}",
            seed=seed,
            learning_rate=rate,
            max_length=run.recipe.augment.max_length,
            readings=run.readings,
            console=run.console,
        )
    for note in result.notes:
        run.console.print(f"[yellow]Note:[/] {note}", highlight=False)
    with run.timed(f"evaluate {critic}"):
        model = _load(run, result.folder, samples)
        for name, source in run.recipe.preferences.test.items():
            evaluate(
                model,
                augmented[name].arms[critic],
                whole=sets[name],
                benchmark=source.benchmark,
                out=folder / name,
                max_tokens_per_step=run.recipe.evaluate.max_tokens_per_step,
                console=run.console,
            )
    mark_stage_done(folder, fingerprint, n_train_tokens=result.n_tokens, train_loss=result.loss, notes=result.notes)


def _taken_over(run: Run, folder: Path, fingerprint: str) -> bool:
    """Whether another cell of the study has trained and evaluated the very same; its folders are copied then.

    Where grids change what only critiques have, their arms without critiques are one and the same.
    """
    if run.study is None:
        return False
    arm = folder.relative_to(run.out / "evaluate")
    not_work = shutil.ignore_patterns("done.json", ".claim")
    for marker in run.study.glob(f"*/*/*/evaluate/{arm}/done.json"):
        cell = marker.parents[3]
        if cell == run.out or not stage_is_done(marker.parent, fingerprint):
            continue
        shutil.rmtree(run.out / TRAIN / arm, ignore_errors=True)
        (folder / "done.json").unlink(missing_ok=True)
        for stage in (TRAIN, "evaluate"):
            source, target = cell / stage / arm, run.out / stage / arm
            with disk_errors(target):
                shutil.copytree(source, target, ignore=not_work, dirs_exist_ok=True)
            # Last, as the process may be killed in between.
            write_text(target / "done.json", (source / "done.json").read_text(encoding="utf-8"))
        run.console.print(f"taken over from {cell.relative_to(run.study)}: {arm}", highlight=False, markup=False)
        return True
    return False


def _load(run: Run, folder: Path, samples: Samples) -> RewardModel | SampleAveraged:
    if samples:
        return SampleAveraged(RewardModel.load(folder), samples)
    if not run.recipe.train.frozen:
        return RewardModel.load(folder)
    frozen = FrozenRewardModel.load(folder)
    frozen.readings = Readings(run.readings)
    return frozen


def _samples(run: Run, sets: Mapping[str, Sequence[PreferencePair]], critiques: Sequence[Critique]) -> Samples:
    """Where rewards are averaged over samples: all critiques of each test completion; else nothing."""
    config = run.recipe.augment
    if run.recipe.evaluate.samples == 1 or not any(row.sample for row in critiques):
        return {}
    pairs = [pair for name, found in sets.items() if name != TRAIN for pair in found]
    return samples_of(
        pairs,
        critiques,
        n_samples=run.recipe.evaluate.samples,
        drop=config.drop,
        strip_scores=config.strip_scores,
    )
