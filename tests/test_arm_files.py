"""Arms that `critrm augment` wrote, read again: what is one, whose it is, and what it was made of."""

from dataclasses import replace

import pytest

from critrm.arm_files import only_critic, read_arm, read_training_arm, refuse_shared, with_dropped
from critrm.augment import augment_pairs, write_augmented
from critrm.critique_files import read_critiques
from critrm.errors import CriticMismatch, DataError
from critrm.preferences import read_pairs
from critrm.store import write_records


@pytest.fixture(scope="module")
def arms(data_dir):
    pairs = read_pairs(data_dir / "hh-pairs" / "pairs.jsonl").pairs[:40]
    known = {pair.id for pair in pairs[:30]}
    critiques = [row for row in read_critiques(data_dir / "critiques" / "frontier-llm.jsonl") if row.pair_id in known]
    return pairs, augment_pairs(pairs, {"frontier-llm": critiques})


@pytest.fixture
def folder(arms, tmp_path):
    write_augmented(tmp_path, arms[1])
    return tmp_path


def test_an_arm_comes_back_as_it_was(arms, folder):
    for critic, items in arms[1].arms.items():
        assert read_arm(str(folder / f"{critic}.jsonl")) == items
        assert only_critic(items) == critic


def test_other_files_and_hub_ids_are_no_arms(data_dir, folder):
    (folder / "torn.jsonl").write_text('{"pair": {')
    for path in (data_dir / "hh-pairs" / "pairs.jsonl", folder / "torn.jsonl", folder, "allenai/reward-bench"):
        assert read_arm(str(path)) is None


def test_a_damaged_arm_names_its_line(folder):
    path = folder / "frontier-llm.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text(lines[0] + '{"pair": {"id": "x"}, "critic": "frontier-llm"}\n')
    with pytest.raises(DataError, match=r"frontier-llm.jsonl:2: not a CritiquedPair"):
        read_arm(str(path))


def test_a_training_arm_is_of_the_same_critic_and_shares_no_pair(arms, folder):
    train = {critic: items[:20] for critic, items in arms[1].arms.items()}
    test = arms[1].arms["frontier-llm"][20:]
    for critic, items in train.items():
        write_records(folder / f"train-{critic}.jsonl", items)
    assert read_training_arm(str(folder / "train-frontier-llm.jsonl"), test) == train["frontier-llm"]
    with pytest.raises(CriticMismatch, match="'none'.*'frontier-llm'"):
        read_training_arm(str(folder / "train-none.jsonl"), test)
    with pytest.raises(DataError, match=f"1 of the 11 test pairs.*{train['none'][-1].pair.id!r}"):
        read_training_arm(str(folder / "train-frontier-llm.jsonl"), arms[1].arms["frontier-llm"][19:])
    with pytest.raises(DataError, match="not an arm"):
        read_training_arm(str(folder / "augment.json"), test)
    refuse_shared((), test)


def test_pairs_of_several_critics_or_none_have_no_critic(arms):
    for items in ((), (arms[1].arms["none"][0], arms[1].arms["frontier-llm"][0])):
        with pytest.raises(DataError, match="one critic"):
            only_critic(items)


def test_dropped_pairs_of_lists_that_an_arm_has_are_put_back(arms, tmp_path):
    items = [
        replace(item, pair=replace(item.pair, id=f"list#{i}"))
        for i, item in enumerate(arms[1].arms["frontier-llm"][:2])
    ]
    facts = tmp_path / "augment.json"
    facts.write_text('{"dropped_pairs": {"list#2": "no critique", "other#0": "no critique"}}')
    assert [pair.id for pair in with_dropped(items, facts)] == ["list#0", "list#1", "list#2"]
    assert [pair.id for pair in with_dropped(items, tmp_path / "missing.json")] == ["list#0", "list#1"]
