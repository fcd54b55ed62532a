"""Leaving out one sentence at a time: effects, totals, files that survive a killed run, and a page that is safe."""

import io
import json
import math

import pytest
from rich.console import Console

from critrm import attribute as stage
from critrm.attribute import attribute_sentences, attribute_to_folder, command, read_attributions, total_by_aspect
from critrm.attribution_files import Attribution, SentenceEffect
from critrm.attribution_page import attribution_page, totals_table
from critrm.errors import ConfigError, CriticMismatch, DataError
from critrm.reward_model import Reads, RewardModel
from critrm.store import write_records
from critrm.types import Critique, CritiquedPair, Message, PreferencePair


@pytest.fixture(scope="module")
def model(tiny_model):
    return RewardModel.from_backbone(str(tiny_model), Reads(critic="c", max_length=400), seed=3)


class Scorer:
    """A reward is the plus signs less the minus signs of the critique; counts the pairs it is asked for."""

    name, critic, fingerprint = "known", "c", "f"

    def __init__(self, *, stop_after=None):
        self.n_pairs, self.stop_after = 0, stop_after

    def score_candidates(self, candidates, *, max_tokens_per_step, on_progress):
        for each in candidates:
            if self.n_pairs == self.stop_after:
                raise KeyboardInterrupt
            self.n_pairs += 1
            yield [[float(text.count("+") - text.count("-")) for text in texts] for texts in each.critiques]
            if on_progress:
                on_progress(1)


def item(number=0, chosen="Correct ++. Long -.", rejected="Wrong ---."):
    pair = PreferencePair(id=f"p{number}", prompt=(Message("user", "Q?"),), chosen="A", rejected="B")
    return CritiquedPair(pair=pair, critic="c", chosen_critique=chosen, rejected_critique=rejected)


def test_an_effect_is_the_reward_with_all_minus_the_reward_without(model):
    pair = item(chosen="It is right. It is short. But rude.", rejected="Wrong.")
    chosen, rejected = attribute_sentences(model, [pair])
    without = ["It is short. But rude.", "It is right. But rude.", "It is right. It is short. "]
    rewards = model.score_completions(pair.pair.prompt, ["A"] * 5, critiques=[pair.chosen_critique, "", *without])
    assert chosen.reward == pytest.approx(rewards[0], abs=1e-4)
    assert chosen.reward_without == pytest.approx(rewards[1], abs=1e-4)
    assert [each.effect for each in chosen.sentences] == pytest.approx([rewards[0] - r for r in rewards[2:]], abs=1e-4)
    assert any(abs(each.effect) > 1e-3 for each in chosen.sentences)
    assert rejected.sentences[0].effect == pytest.approx(rejected.reward - rejected.reward_without, abs=1e-4)
    assert "".join(each.text for each in chosen.sentences) == pair.chosen_critique


def test_a_pair_without_a_critique_is_refused():
    with pytest.raises(DataError, match="id p0.*no critique"):
        attribute_sentences(Scorer(), [item(rejected=" ")])


def _attribution(pair_id, *effects, side="chosen"):
    sentences = tuple(SentenceEffect(text="x", aspect="correctness", effect=effect) for effect in effects)
    return Attribution(pair_id=pair_id, side=side, critic="c", reward=0.0, reward_without=0.0, sentences=sentences)


def test_totals_take_a_pairs_sentences_as_one_draw():
    (alone,) = total_by_aspect([_attribution("a", 1.0, 3.0)])
    assert (alone.mean, alone.low, alone.n_sentences, alone.n_pairs) == (2.0, None, 2, 1)
    (apart,) = total_by_aspect([_attribution(str(n), effect) for n, effect in enumerate((1.0, 2.0, 3.0, 6.0))])
    # One sentence each: the textbook interval of a mean, 3.182 standard errors at three degrees of freedom.
    assert (apart.mean, apart.high - apart.mean) == (3.0, pytest.approx(3.1824 * math.sqrt(14 / 3) / 2, rel=1e-3))
    repeated = [_attribution(str(n), *[effect] * 5) for n, effect in enumerate((1.0, 2.0, 3.0, 6.0))]
    (same,) = total_by_aspect(repeated)
    assert (same.low, same.high, same.n_sentences) == (pytest.approx(apart.low), pytest.approx(apart.high), 20)
    (signed,) = total_by_aspect([_attribution("a", 1.0, -1.0), _attribution("b", math.nan)])
    assert (signed.mean, signed.mean_size, signed.n_sentences) == (0.0, 1.0, 2)


def test_the_same_command_goes_on_where_it_was_stopped(tmp_path, monkeypatch):
    monkeypatch.setattr(stage, "PAIRS_PER_SAVE", 2)
    items = [item(n) for n in range(6)]
    with pytest.raises(KeyboardInterrupt):
        attribute_to_folder(Scorer(stop_after=3), items, out=tmp_path)
    assert len(read_attributions(tmp_path / "attribution.jsonl")) == 4
    assert not (tmp_path / "attribution.html").exists()
    model = Scorer()
    totals = attribute_to_folder(model, items, out=tmp_path)
    assert model.n_pairs == 4
    found = read_attributions(tmp_path / "attribution.jsonl")
    assert [(each.pair_id, each.side) for each in found] == [
        (f"p{n}", s) for n in range(6) for s in ("chosen", "rejected")
    ]
    assert [each.effect for each in found[0].sentences] == [2.0, -1.0]
    content = json.loads((tmp_path / "attribution.json").read_text())
    assert [(t["aspect"], t["side"], t["mean"]) for t in content["totals"]] == [
        ("correctness", "chosen", 2.0),
        ("correctness", "rejected", -3.0),
        ("length", "chosen", -1.0),
    ]
    assert totals == total_by_aspect(found)
    changed = Scorer()
    attribute_to_folder(changed, [*items[:5], item(5, chosen="Correct +.")], out=tmp_path)
    assert changed.n_pairs == 1


def test_what_does_not_fit_is_refused(tmp_path, model):
    with pytest.raises(CriticMismatch, match="'c'.*'d'"):
        attribute_to_folder(model, [CritiquedPair(pair=item().pair, critic="d")], out=tmp_path)
    with pytest.raises(DataError, match="two pairs"):
        attribute_to_folder(Scorer(), [item(), item()], out=tmp_path)
    with pytest.raises(DataError, match="no pairs"):
        attribute_to_folder(Scorer(), [], out=tmp_path)
    arm = tmp_path / "none.jsonl"
    write_records(arm, [CritiquedPair(pair=item().pair)])
    with pytest.raises(ConfigError, match="nothing to take apart"):
        command("model", str(arm), out=tmp_path)
    write_records(arm, [item().pair])
    with pytest.raises(ConfigError, match="--critiques"):
        command("model", str(arm), out=tmp_path)
    write_records(arm, [{"pair_id": "p", "side": "chosen", "sentences": []}])
    with pytest.raises(DataError, match=r"none\.jsonl:1.*not an attribution"):
        read_attributions(arm)


def test_a_reward_that_is_no_number_is_null_on_disk(tmp_path):
    class Broken(Scorer):
        def score_candidates(self, candidates, **_):
            return ([[math.nan] * len(texts) for texts in each.critiques] for each in candidates)

    assert attribute_to_folder(Broken(), [item()], out=tmp_path) == []
    assert "NaN" not in (tmp_path / "attribution.jsonl").read_text()
    assert math.isnan(read_attributions(tmp_path / "attribution.jsonl")[0].sentences[0].effect)
    model = Scorer()
    attribute_to_folder(model, [item(), item(1)], out=tmp_path)


def test_the_page_shows_hostile_text_as_text():
    hostile = '</p><script>alert("x")</script> {{ 7 * 7 }} \x00 \u202e abc \ud83d ++.'
    items = [item(0, chosen=hostile), item(1), item(2, chosen="Correct +.")]
    found = attribute_sentences(Scorer(), items)
    page = attribution_page(items, found, total_by_aspect(found), model="m<b>", n_shown=2)
    page.encode()
    assert "<script" not in page
    assert "&lt;script&gt;" in page
    assert "{{ 7 * 7 }}" in page
    assert "m&lt;b&gt;" in page
    assert "://" not in page  # nothing is loaded from elsewhere
    assert page.count("<article>") == 2
    assert "the 2 of 3 pairs" in page
    assert 'class="s up"' in page and 'class="s down"' in page
    assert "prefers-color-scheme: dark" in page


def test_the_table_fits_a_terminal():
    items = [item(n, chosen="Correct ++. Instructions ignored -. Long -. Other.") for n in range(40)]
    console = Console(width=80, file=io.StringIO())
    console.print(totals_table(total_by_aspect(attribute_sentences(Scorer(), items)), critic="c[/]"))
    shown = console.file.getvalue()
    assert "…" not in shown
    assert "c[/]" in shown
    assert "+2.00 [+2.00, +2.00] (40)" in shown


def test_the_command_reads_pairs_with_critiques_and_arms(model, pairs, tmp_path, capsys):
    model.save(tmp_path / "run" / "model")
    write_records(tmp_path / "pairs.jsonl", pairs[:2])
    rows = [
        Critique(key=f"{pair.id}{side}", pair_id=pair.id, side=side, text="Good. Short.", critic="c", prompt_version="")
        for pair in pairs[:2]
        for side in ("chosen", "rejected")
    ]
    write_records(tmp_path / "critiques.jsonl", rows)
    command(
        str(tmp_path / "run"), str(tmp_path / "pairs.jsonl"), critiques=tmp_path / "critiques.jsonl", out=tmp_path / "a"
    )
    assert "attribution.html" in capsys.readouterr().out
    arm = [
        CritiquedPair(pair=p, critic="c", chosen_critique="Good. Short.", rejected_critique="Good. Short.")
        for p in pairs[:2]
    ]
    write_records(tmp_path / "arm.jsonl", arm)
    command(str(tmp_path / "run"), str(tmp_path / "arm.jsonl"), out=tmp_path / "b")
    texts = [(tmp_path / name / "attribution.jsonl").read_text() for name in ("a", "b")]
    assert texts[0] == texts[1]
