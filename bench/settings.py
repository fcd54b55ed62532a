"""What a changed setting does: grids of a study, each arm with itself, on the same test pairs.

    python bench/settings.py studies/beyond --base as-in-the-paper --out settings.json
    python bench/settings.py studies/frozen --base mixtures --grids critique-first dropout consistent-labels

`critrm study` compares arms with one setting; this compares the settings. For each arm, test set and group of pairs:
accuracy with both, the difference with its 95 % bootstrap interval over pairs and runs (seeds and draws), and p (exact
McNemar for one run each). Of each grid its largest size is compared.
"""

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from critrm.metrics import correctness, paired_difference
from critrm.report_data import Report, ReportCell, read_report
from critrm.results import groups_of


def compare(report: Report, base: ReportCell, changed: ReportCell) -> list[dict[str, Any]]:
    """One row for each arm that both have, each test set and each of its groups."""
    rows = []
    for test, pairs in report.pairs.items():
        for arm in (arm for arm in base.scores[test] if arm in changed.scores[test]):
            for group, (_, ids) in groups_of(pairs, report.benchmarks[test]).items():
                before, after = (
                    [correctness(scores[pair_id].outcome for pair_id in ids) for scores in cell.scores[test][arm]]
                    for cell in (base, changed)
                )
                found = paired_difference(after, before)
                assert found is not None  # a reward model scores every pair
                means = {"base": _mean(before), "changed": _mean(after)}
                rows.append({"setting": changed.grid, "arm": arm, "test": test, "group": group} | means | asdict(found))
    return rows


def _mean(runs: list[list[float]]) -> float:
    return sum(map(sum, runs)) / sum(map(len, runs))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", type=Path, help="the folder of a finished study")
    parser.add_argument("--base", required=True, help="the grid that the others are compared with")
    parser.add_argument("--grids", nargs="*", default=[], help="the others; all of the study when none is given")
    parser.add_argument("--out", type=Path, help="where the numbers go, as JSON")
    arguments = parser.parse_args()
    report = read_report(arguments.study)
    largest = {cell.grid: cell for cell in sorted(report.cells, key=lambda cell: cell.n_train)}
    if unknown := {arguments.base, *arguments.grids} - set(largest):
        raise SystemExit(f"{arguments.study} has no grid {', '.join(sorted(unknown))}; it has {', '.join(largest)}")
    grids = arguments.grids or [grid for grid in largest if grid != arguments.base]
    rows = [row for grid in grids for row in compare(report, largest[arguments.base], largest[grid])]
    print("| setting | arm | test | group | base | changed | difference | p |")
    print("| --- | --- | --- | --- | ---: | ---: | ---: | ---: |")
    for row in rows:
        names = " | ".join(row[key] for key in ("setting", "arm", "test", "group"))
        difference = f"{row['value']:+.3f} [{row['low']:+.2f}, {row['high']:+.2f}]"
        print(f"| {names} | {row['base']:.3f} | {row['changed']:.3f} | {difference} | {row['p_value']:.2g} |")
    if arguments.out:
        arguments.out.write_text(json.dumps({"base": arguments.base, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
