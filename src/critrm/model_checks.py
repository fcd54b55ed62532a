"""Checks of a tokenizer and of a reward model, or of the backbone that one is to be made of (section 3.2).

They are those whose absence has cost the field's users a run: a padding token that hides the last token, a
beginning-of-sequence token that is there twice, a chat template that writes today's date, rewards that change with the
batch.
"""

import json
import math
import tempfile
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from critrm.findings import Finding
from critrm.types import SIDES, CritiquedPair, Side

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from critrm.reward_model import RewardModel

_Rewards = dict[tuple[str, Side], float]
"""Pair id and side -> reward."""

TOLERANCE = 1e-4
"""Rewards of one text may differ by so much in fp32, relative to the largest, before a check fails."""
N_SCORED = 4
"""Pairs that the model's checks score."""


def check_tokenizer(tokenizer: "PreTrainedTokenizerBase") -> list[Finding]:
    """Padding, the beginning-of-sequence token, and the chat template."""
    return [*_padding(tokenizer), *_doubled_bos(tokenizer), *_dated_template(tokenizer)]


def _padding(tokenizer: "PreTrainedTokenizerBase") -> Iterator[Finding]:
    check = "padding token"
    if tokenizer.pad_token_id is None:
        yield Finding(check, "note", "there is none", "critrm saves the end token as padding; rows never end in it.")
    elif tokenizer.pad_token_id == tokenizer.eos_token_id:
        yield Finding(
            check,
            "note",
            f"it is the end token {tokenizer.eos_token!r}",
            "Do not append an end token to what is scored: transformers would score the token before it.",
        )
    else:
        yield Finding(check, "good", f"{tokenizer.pad_token!r}, apart from the end token {tokenizer.eos_token!r}")


def _doubled_bos(tokenizer: "PreTrainedTokenizerBase") -> Iterator[Finding]:
    check = "beginning-of-sequence token"
    bos = tokenizer.bos_token_id
    if bos is None or not tokenizer.chat_template:
        yield Finding(check, "good", "nothing that could be doubled")
        return
    rendered = tokenizer.apply_chat_template([{"role": "user", "content": "Hello"}], tokenize=False)
    if tokenizer.encode(str(rendered))[:2] == [bos, bos]:
        yield Finding(
            check,
            "warning",
            "the chat template and the tokenizer both write one",
            "critrm writes it once. Elsewhere, encode a rendered chat with add_special_tokens=False.",
        )
    else:
        yield Finding(check, "good", "written once")


def _dated_template(tokenizer: "PreTrainedTokenizerBase") -> Iterator[Finding]:
    check = "chat template"
    template = tokenizer.chat_template
    text = template if isinstance(template, str) else json.dumps(template)
    if not template:
        yield Finding(
            check, "note", "there is none", "Prompts are written as `User:` and `Chatbot:` text (Appendix A)."
        )
    elif "strftime_now" in text:
        yield Finding(
            check,
            "warning",
            "it writes today's date",
            "Critiques by this model change from day to day; give it a template with a fixed date.",
        )
    else:
        yield Finding(check, "good", "the same every day")


def check_reward_model(model: "RewardModel", items: Sequence[CritiquedPair]) -> list[Finding]:
    """Rewards do not depend on the batch, padding or order, and survive saving and plain transformers.

    Args:
        model: a reward model, or a backbone under a new head, in fp32.
        items: pairs to score; the first few are used.
    """
    items = list(items[:N_SCORED])
    together = _rewards(model, items, max_tokens_per_step=1 << 20)
    scale = max(map(abs, together.values())) or 1.0
    return [
        _same(
            "rewards and the batch",
            together,
            _rewards(model, items, max_tokens_per_step=1),
            scale,
            "Pairs in one batch change each other's rewards: the attention of this architecture is not supported.",
        ),
        _same(
            "rewards and the order",
            together,
            _rewards(model, items[::-1], max_tokens_per_step=1 << 20),
            scale,
            "The order of the pairs changes their rewards: is some dropout left on?",
        ),
        _same(
            "rewards and padding",
            together,
            _padded_rewards(model, items),
            scale,
            "Plain transformers gives other rewards to a padded batch: do not serve this model with padding.",
        ),
        _reloaded(model, items, together, scale),
    ]


def _rewards(model: "RewardModel", items: Sequence[CritiquedPair], *, max_tokens_per_step: int) -> _Rewards:
    scores = model.score(items, max_tokens_per_step=max_tokens_per_step)
    return {(score.pair_id, side): getattr(score, side) for score in scores for side in SIDES}


def _padded_rewards(model: "RewardModel", items: Sequence[CritiquedPair]) -> _Rewards:
    """Plain transformers on one right-padded batch of whole rows."""
    import torch

    rows = [pair.prompt + branch for pair in map(model.encode, items) for branch in pair.branches]
    width, pad = max(map(len, rows)), model.model.config.pad_token_id
    device = model.model.device
    ids = torch.tensor([row + [pad] * (width - len(row)) for row in rows], device=device)
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows], device=device)
    with torch.inference_mode():
        logits = model.model(input_ids=ids, attention_mask=mask).logits
    places = [(item.pair.id, side) for item in items for side in SIDES]
    return dict(zip(places, logits[:, 0].tolist(), strict=True))


def _same(check: str, expected: _Rewards, found: _Rewards, scale: float, advice: str) -> Finding:
    differences = [abs(reward - found[place]) / scale for place, reward in expected.items()]
    n_bad = sum(not math.isfinite(difference) for difference in differences)
    if n_bad:
        what = f"{n_bad} of {len(differences)} rewards are not finite numbers"
        return Finding(check, "problem", what, "The weights are damaged, or something overflows: look for NaN in them.")
    apart = max(differences)
    if apart <= TOLERANCE:
        return Finding(check, "good", f"the same to {apart:.0e}")
    return Finding(check, "problem", f"they differ by {apart:.1e} of the largest reward", advice)


def _reloaded(model: "RewardModel", items: Sequence[CritiquedPair], expected: _Rewards, scale: float) -> Finding:
    from critrm.reward_model import RewardModel

    with tempfile.TemporaryDirectory() as folder:
        model.save(folder)
        again = RewardModel.load(folder, device="cpu", precision="fp32")
        found = _rewards(again, items, max_tokens_per_step=1 << 20)
    advice = "The head or the weights are lost on disk: do not train this backbone before that is mended."
    return _same("saved and loaded", expected, found, scale, advice)
