"""What a study has to run: its grids as recipes, each over nested sets of training pairs (sections 4 and 5.2)."""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from critrm.benchmarks import read_source
from critrm.config import PairSource, Recipe, validated
from critrm.errors import ConfigError, DataError
from critrm.overlap import normalised, pair_prompts
from critrm.store import content_hash, file_name, write_records
from critrm.types import PreferencePair


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """One run of a study: a grid's settings, a backbone, and a number of training pairs."""

    grid: str
    backbone: str
    n_train: int
    draw: int
    """Which of the study's draws of training pairs, from 0."""
    recipe: Recipe
    folder: Path
    family: str
    """Cells of one family differ in their training pairs alone, and share the learning rates of the largest."""

    @property
    def arms(self) -> tuple[str, ...]:
        """The critics of the cell's arms, besides no critiques."""
        return self.recipe.critique.arms


def plan_study(recipe: Recipe, *, out: str | Path, short: bool = False) -> list[Cell]:
    """The cells of a study, those first whose learning rates others take over; writes each grid's training pairs.

    Of several draws the first one's cells come first, so that a study that is stopped has whole curves of some.

    Args:
        recipe: with a `study`.
        out: the study's folder; a grid's pairs, in the order in which they are drawn, are in `pairs/<grid>.jsonl`, the
            next draw's in `pairs/<grid>-draw-2.jsonl`.
        short: allow sizes that are larger than the number of pairs: for estimates.

    Raises:
        ConfigError: the recipe has no study, or its grids do not fit its sections.
        DataError: pairs cannot be read, or are fewer than a size asks for.
    """
    if recipe.study is None:
        raise ConfigError(f"the recipe {recipe.name!r} has no study section: add one with its grids")
    out = Path(out)
    test_prompts = {
        normalised(prompt)
        for source in recipe.preferences.test.values()
        for prompt in pair_prompts(read_source(source).pairs)
    }
    cells = []
    for name, grid in recipe.study.grids.items():
        pairs = _read(grid.pairs or [recipe.preferences.train])
        if grid.pairs:
            # Sources may hold the same pairs under other ids.
            pairs = list({(pair.prompt, pair.chosen, pair.rejected): pair for pair in reversed(pairs)}.values())[::-1]
            prompts = pair_prompts(pairs)
            pairs = [
                pair for pair, prompt in zip(pairs, prompts, strict=True) if normalised(prompt) not in test_prompts
            ]
        paths = [out / "pairs" / f"{name}{_suffix(draw)}.jsonl" for draw in range(recipe.study.draws)]
        for draw, path in enumerate(paths):
            order = list(pairs)
            random.Random(recipe.study.seed + draw).shuffle(order)
            write_records(path, order)
        for size in grid.sizes or (len(pairs),):
            if size > len(pairs) and not short:
                raise DataError(
                    f"there are {len(pairs)} training pairs, and grid {name!r} asks for {size}", path=str(paths[0])
                )
            for backbone in grid.backbones or (recipe.train.backbone,):
                # Of all pairs there is one set, however often they are drawn.
                cells += [
                    _cell(recipe, name, backbone=backbone, size=size, draw=draw, pairs=path, out=out)
                    for draw, path in enumerate(paths if size < len(pairs) else paths[:1])
                ]
    cells.sort(key=lambda cell: (-cell.draw, len(cell.arms), cell.n_train), reverse=True)
    asked: set[str] = set()
    for number, cell in enumerate(cells):
        # What a backbone says before any label does not depend on the training pairs: it is asked once.
        if cell.backbone in asked:
            evaluate = cell.recipe.evaluate.model_copy(update={"zero_label": False})
            cells[number] = replace(cell, recipe=cell.recipe.model_copy(update={"evaluate": evaluate}))
        asked.add(cell.backbone)
    return cells


def _read(sources: Sequence[PairSource]) -> list[PreferencePair]:
    pairs: dict[str, PreferencePair] = {}
    for source in sources:
        for pair in read_source(source, for_training=True).pairs:
            if pairs.setdefault(pair.id, pair) is not pair:
                raise DataError("two of the sources have a pair with this id", path=source.path, field=f"id {pair.id}")
    return list(pairs.values())


def _suffix(draw: int) -> str:
    return f"-draw-{draw + 1}" if draw else ""


def _cell(recipe: Recipe, grid_name: str, *, backbone: str, size: int, draw: int, pairs: Path, out: Path) -> Cell:
    assert recipe.study is not None
    grid = recipe.study.grids[grid_name]
    values = recipe.model_dump()
    values["study"] = None
    values["preferences"]["train"] = {"path": str(pairs), "limit": size}
    values["train"]["backbone"] = backbone
    if grid.critics is not None:
        for kind in ("critics", "mixtures"):
            all_of_them = values["critique"][kind]
            values["critique"][kind] = {name: all_of_them[name] for name in grid.critics if name in all_of_them}
    values = _merged(values, dict(grid.change))
    values["name"] = f"{recipe.name}-{grid_name}-{size}"
    found = validated(Recipe, values, where=f"{recipe.name}, grid {grid_name}", what="recipe")
    if found.train.backbone != backbone:
        raise ConfigError(f"grid {grid_name!r} changes the backbone: list it under the grid's backbones instead")
    return Cell(
        grid=grid_name,
        backbone=backbone,
        n_train=size,
        draw=draw,
        recipe=found,
        folder=out / grid_name / file_name(backbone.rsplit("/", 1)[-1]) / f"pairs-{size}{_suffix(draw)}",
        family=content_hash(backbone, grid.change),
    )


def _merged(values: Mapping[str, Any], change: Mapping[Any, Any]) -> dict[str, Any]:
    """Values with some of them changed, at any depth."""
    merged = dict(values)
    for key, value in change.items():
        old = merged.get(key)
        merged[key] = _merged(old, value) if isinstance(old, Mapping) and isinstance(value, Mapping) else value
    return merged
