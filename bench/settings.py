"""What a changed setting does: two grids of a study on the same test pairs, paired pair by pair.

    python bench/settings.py runs/beyond --base as-in-the-paper --out settings.json
    python bench/settings.py runs/frozen --base mixtures --grids critique-first dropout consistent-labels

`critrm study` compares arms within a run; this compares the same arm between runs of other settings: for each test set
and section, accuracy with both, the difference with its 95 % bootstrap interval over pairs and seeds, and p (exact
McNemar for one seed). Only the first draw of the largest size of each grid is compared.
"""

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from critrm.benchmarks import find_benchmark
from critrm.metrics import correctness, paired_difference
from critrm.store import read_rows
from critrm.types import Outcome

Runs = list[list[float]]


def cell(study: Path, grid: str) -> Path:
    """The folder of a grid's first draw of its largest size."""
    cells = {
        int(path.name.removeprefix("pairs-")): path
        for path in study.glob(f"{grid}/*/pairs-*")
        if "draw" not in path.name
    }
    if not cells:
        raise SystemExit(f"{study} has no run of a grid {grid!r}")
    return cells[max(cells)]


def correct(folder: Path, arm: str) -> dict[tuple[str, str], Runs]:
    """(test set, its section, or "all") -> whether each pair was right, one row per seed, in the order of pair ids."""
    found: dict[tuple[str, str], Runs] = {}
    for path in sorted(folder.glob(f"evaluate/{arm}/seed-*/*/*.scores.jsonl")):
        rows = sorted((row for _, row in read_rows(path)), key=lambda row: row["pair_id"])
        sections = find_benchmark(path.name.removesuffix(".scores.jsonl")).sections
        groups = {"all": rows} | {
            name: inside
            for name, subsets in sections.items()
            if (inside := [r for r in rows if r["subset"] in subsets])
        }
        for name, inside in groups.items():
            right = correctness(Outcome(row["outcome"]) for row in inside)
            found.setdefault((path.parent.name, name), []).append(right)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", type=Path)
    parser.add_argument("--base", required=True, help="the grid that the others are compared with")
    parser.add_argument("--grids", nargs="*", default=[], help="the others; all of the study when none is given")
    parser.add_argument("--arm", default="frontier-llm")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    study, base = arguments.study, arguments.base
    others = [path.parents[1].name for path in sorted(study.glob("*/*/pairs-*")) if path.parents[1].name != base]
    reference = correct(cell(study, base), arguments.arm)
    rows: list[dict[str, Any]] = []
    print("| setting | test | section | base | changed | difference | p |")
    print("| --- | --- | --- | ---: | ---: | ---: | ---: |")
    for grid in arguments.grids or dict.fromkeys(others):
        changed = correct(cell(study, grid), arguments.arm)
        for (test, section), runs in reference.items():
            found = paired_difference(changed[test, section], runs)
            if found is None:
                continue
            means = [sum(map(sum, each)) / sum(map(len, each)) for each in (runs, changed[test, section])]
            rows.append(
                {"setting": grid, "test": test, "section": section, "base": means[0], "changed": means[1]}
                | asdict(found)
            )
            interval = f"{found.value:+.3f} [{found.low:+.2f}, {found.high:+.2f}]"
            print(
                f"| {grid} | {test} | {section} | {means[0]:.3f} | {means[1]:.3f} | {interval} | {found.p_value:.2g} |"
            )
    if arguments.out:
        facts = {"base": base, "arm": arguments.arm, "rows": rows}
        arguments.out.write_text(json.dumps(facts, indent=1) + "\n")


if __name__ == "__main__":
    main()
