"""The zero-label reading: a language model as a reward model without a single preference (a null baseline as well).

After what it reads comes `CUE`, and the reward is how much likelier the next word is one of `GOOD` than one of `BAD`:
the difference of their log-probabilities. It reads what a reward model would (prompt, completion and critique), or the
critique alone, which costs less.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

import torch
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from critrm import models
from critrm.attention import PACKED_ATTENTION
from critrm.augment import Tokens, text_encoder
from critrm.baselines import UNTRAINED_ALONE, UNTRAINED_WHOLE
from critrm.batching import EncodedTree, encode_pair, memory_advice, pack_trees, token_batches
from critrm.benchmarks import level_identical
from critrm.encoding import beginning
from critrm.errors import ConfigError, DataError, ModelError
from critrm.reward_model import Reads
from critrm.score_files import saved_scores, score_row
from critrm.store import content_hash, write_records
from critrm.types import NO_CRITIC, SIDES, CritiquedPair, Score

PREFIX = "zero-label:"
ALONE_PREFIX = "zero-label-alone:"
"""Where a reward model is asked for, these and a backbone's name: it reads all there is, or the critique alone."""
CUE = "\n\nOverall, the quality of the response is"
GOOD = ("good", "excellent", "great", "high", "strong")
BAD = ("poor", "bad", "terrible", "low", "weak")

PAIRS_PER_SAVE = 64
"""Readings are on disk after so many pairs; a killed run loses at most these."""

_Path = tuple[int, ...]


class ZeroLabelModel:
    """An untrained language model that scores critiqued pairs as a `RewardModel` does."""

    scores_without_critiques = True

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        name: str,
        critic: str = NO_CRITIC,
        critique_only: bool = False,
        max_length: int | None = None,
    ) -> None:
        """Args as those of `load`, after a loaded language model in fp32, its tokenizer and its name.

        Raises:
            ConfigError: critiques alone are to be read where there are none.
            DataError: the tokenizer tells no good word from the bad ones.
        """
        if critique_only and critic == NO_CRITIC:
            raise ConfigError(f"{ALONE_PREFIX}{name} reads critiques alone: give them, or take {PREFIX}{name}")
        self.model, self.tokenizer, self.critique_only = model, tokenizer, critique_only
        self.name = (ALONE_PREFIX if critique_only else PREFIX) + name
        self._encode, self._bos = text_encoder(tokenizer), beginning(tokenizer)
        self._cue = self._encode(CUE)
        self._paths = _word_paths(self._encode, name)
        # Where a word is told by its second token, that one's probability is looked up after the first.
        starts = {path[:n] for paths in self._paths for path in paths for n in range(len(path))}
        self._starts = sorted(starts, key=lambda start: (len(start), start))
        context = int(model.config.get_text_config().to_dict().get("max_position_embeddings") or 2048)
        room = min(max_length or context, context) - len(self._cue) - max(map(len, self._starts))
        self.reads = Reads(critic=critic, max_length=room, backbone=name)
        self.packs = _reads_packed_rows(model)

    @classmethod
    def load(
        cls,
        backbone: str,
        *,
        critic: str = NO_CRITIC,
        critique_only: bool = False,
        max_length: int | None = None,
        device: str | None = None,
    ) -> Self:
        """Load an untrained language model, in fp32: in 16 bits, close readings would be ties.

        Args:
            backbone: a folder, a hub id or `embedded:NAME`.
            critic: whose critiques it is about to read.
            critique_only: read the critique alone.
            max_length: tokens, the question at the end included; the model's context when None.
            device: `cpu`, `cuda`, ...; the best there is when None.

        Raises:
            ModelError: there is no such model, or it is no language model.
            ConfigError: critiques alone are to be read where there are none.
            DataError: the tokenizer tells no good word from the bad ones.
        """
        tokenizer, model = models.load_tokenizer(backbone), models.load_causal_lm(backbone)
        made_as = model.config.architectures or [""]
        if made_as[0].endswith("ForSequenceClassification"):
            raise ModelError(f"{backbone}: a classifier, which predicts no words. Name the backbone it was made of.")
        torch.nn.Module.to(model, device or models.choose_device())  # transformers' own `to` is not typed
        return cls(model, tokenizer, name=backbone, critic=critic, critique_only=critique_only, max_length=max_length)

    @property
    def critic(self) -> str:
        """Whose critiques it reads."""
        return self.reads.critic

    @property
    def n_special(self) -> int:
        """How many of `reads.max_length` tokens are not text."""
        return len(self._bos)

    @property
    def fingerprint(self) -> str:
        """A hash of the weights' sums and of what is read and asked: one fingerprint, the same scores."""
        sums = [float(parameter.detach().double().sum()) for parameter in self.model.parameters()]
        return content_hash(_asked(self.reads.max_length), self.critique_only, sums)

    def encode(self, item: CritiquedPair) -> EncodedTree:
        """Tokenize one pair: what is read of each completion, the cue, and the beginnings of split words."""
        if self.critique_only:
            n_text = self.reads.max_length - len(self._bos)
            prompt = self._bos
            # Of a long critique the end, where the judgement stands.
            texts = [self._encode(item.critique(side).strip())[-n_text:] for side in SIDES]
        else:
            pair = encode_pair(item, self._encode, bos=self._bos, budget=self.reads.budget)
            prompt, texts = pair.prompt, list(pair.branches)
        starts = tuple(list(start) for start in self._starts)
        return EncodedTree(prompt, tuple((text + self._cue, starts) for text in texts), ())

    @torch.inference_mode()
    def score(
        self,
        pairs: Sequence[CritiquedPair],
        *,
        max_tokens_per_step: int = 4096,
        on_progress: Callable[[int], None] | None = None,
    ) -> list[Score]:
        """Read both completions of each pair: log P(a good word) - log P(a bad word) as their rewards.

        Args:
            pairs: critiqued pairs, whose ids are unique.
            max_tokens_per_step: how many tokens are computed at once; does not change the scores.
            on_progress: called with the number of pairs done in each step.

        Returns:
            One score per pair, in the given order; not-a-number where the critique is empty that alone is read.

        Raises:
            ModelError: memory does not suffice for so many tokens at once.
        """
        encoded = [self.encode(item) for item in pairs]
        number = {id(tree): n for n, tree in enumerate(encoded)}
        found = [(float("nan"), float("nan"))] * len(encoded)
        for batch in token_batches(encoded, max_tokens_per_step=max_tokens_per_step):
            with memory_advice("Lower --max-tokens-per-step."):
                logits = (_packed_logits if self.packs else _plain_logits)(self.model, batch)
                rewards = self._rewards(logits.float()).view(-1, 2).tolist()
            for tree, (chosen, rejected) in zip(batch, rewards, strict=True):
                found[number[id(tree)]] = (chosen, rejected)
            if on_progress:
                on_progress(len(batch))
        return [
            Score(item.pair.id, *both)
            if not self.critique_only or all(item.critique(side).strip() for side in SIDES)
            else Score(item.pair.id, float("nan"), float("nan"))
            for item, both in zip(pairs, found, strict=True)
        ]

    def _rewards(self, logits: torch.Tensor) -> torch.Tensor:
        """From logits (n_texts * n_starts, n_vocabulary), in the order of texts, to (n_texts,)."""
        log_p = logits.log_softmax(-1).view(-1, len(self._starts), logits.shape[-1])
        place = {start: n for n, start in enumerate(self._starts)}

        def any_of(paths: Sequence[_Path]) -> torch.Tensor:
            words = [
                torch.stack([log_p[:, place[path[:n]], token] for n, token in enumerate(path)]).sum(0) for path in paths
            ]
            return torch.stack(words).logsumexp(0)

        good, bad = self._paths
        return any_of(good) - any_of(bad)


def _word_paths(encode: Callable[[str], Tokens], name: str) -> tuple[tuple[_Path, ...], tuple[_Path, ...]]:
    good, bad = ([tuple(encode(f" {word}")) for word in words] for words in (GOOD, BAD))
    paths = telling_paths(good, bad), telling_paths(bad, good)
    if not all(paths):
        raise DataError(f"{name}: its tokenizer does not tell the words {GOOD} from {BAD}")
    return paths


def reading_direction(backbone: str) -> torch.Tensor:
    """(hidden_size,) along which a backbone's hidden state behind `CUE` speaks for a good word and against a bad one.

    The mean of the output embeddings of `GOOD`, minus that of `BAD`. Words that their first token does not tell are
    left out; where that leaves none (a tokenizer of bytes), it is 0.

    Raises:
        ModelError: there is no such model, or it is no language model.
        DataError: the tokenizer tells no good word from the bad ones.
    """
    paths = _word_paths(text_encoder(models.load_tokenizer(backbone)), backbone)
    # transformers has no types for it
    embeddings: Any = models.load_causal_lm(backbone).get_output_embeddings()  # type: ignore[no-untyped-call]
    weight: torch.Tensor = embeddings.weight.detach().float()
    good, bad = ([path[0] for path in words if len(path) == 1] for words in paths)
    return weight[good].mean(0) - weight[bad].mean(0) if good and bad else torch.zeros(weight.shape[1])


def telling_paths(words: Sequence[_Path], others: Sequence[_Path]) -> tuple[_Path, ...]:
    """The fewest tokens of each word that no word of the opposite list begins with; words without such are left out.

    Example: [(1,), (2, 3), (2, 4)] against [(2, 5)] gives (1,), (2, 3) and (2, 4); against [(6,)] (1,) and (2,).
    """
    paths: dict[_Path, None] = {}
    for word in words:
        beginnings = (word[:n] for n in range(1, len(word) + 1))
        path = next((each for each in beginnings if all(other[: len(each)] != each for other in others)), None)
        if path is not None:
            paths[path] = None
    return tuple(paths)


def _packed_logits(model: Any, trees: Sequence[EncodedTree]) -> torch.Tensor:
    """(n_ends, n_vocabulary) in the order of the trees' ends; prompts are read once, and only ends get logits."""
    batch, device = pack_trees(trees), model.device
    logits: torch.Tensor = model(
        input_ids=batch.input_ids.to(device),
        position_ids=batch.position_ids.to(device),
        # A mask of four dimensions is passed on as it is, so none is built: the groups say who sees whom.
        attention_mask=torch.empty(1, 1, 1, 1, device=device),
        groups=batch.groups,
        use_cache=False,
        logits_to_keep=batch.score_positions.to(device),
    ).logits[0]
    return logits


def _plain_logits(model: Any, trees: Sequence[EncodedTree]) -> torch.Tensor:
    """The same, text by text, for models that cannot read packed rows."""
    rows: list[Tokens] = [
        tree.prompt + text + twig for tree in trees for text, twigs in tree.branches for twig in twigs
    ]
    ends = [
        model(input_ids=torch.tensor([row], device=model.device), use_cache=False, logits_to_keep=1).logits[0, -1]
        for row in rows
    ]
    return torch.stack(ends)


@torch.inference_mode()
def _reads_packed_rows(model: Any) -> bool:
    """Whether a model's attention can be replaced, and a few tokens come to the same in a packed row and on their own.

    Where they do not, the model reads more than attention tells (it is recurrent, say).
    """
    if not model._supports_attention_backend:
        return False
    n_tokens = int(model.get_input_embeddings().weight.shape[0])
    tokens = [[n % n_tokens for n in ids] for ids in ((5, 7), (11, 13, 17), (19, 23))]
    tree = EncodedTree(tokens[0], ((tokens[1], ([],)), (tokens[2], ([],))), ())
    own = model.config._attn_implementation
    plain = _plain_logits(model, [tree])
    model.set_attn_implementation(PACKED_ATTENTION)
    apart = (_packed_logits(model, [tree]) - plain).abs().max()
    if bool(apart <= 1e-3 * plain.abs().max()):
        return True
    model.set_attn_implementation(own)
    return False


def _asked(max_length: int) -> str:
    return content_hash(CUE, GOOD, BAD, max_length)


def zero_label_scores(
    items: Sequence[CritiquedPair],
    *,
    backbone: str,
    max_length: int | None = None,
    max_tokens_per_step: int = 4096,
    path: str | Path | None = None,
    console: Console | None = None,
) -> dict[str, list[Score]]:
    """An arm's zero-label readings, by their names in `baselines.ZERO_LABEL_NULLS`.

    Without critiques there is only that of the whole text.

    Args:
        items: the test pairs of one critic.
        backbone: the untrained backbone of the arm's reward model.
        max_length: how many tokens it may read of a completion; the model's context when None.
        max_tokens_per_step: how many tokens are computed at once; does not change the scores.
        path: a file of rewards, one row per pair and reading; what is there for the same backbone, pair and critiques
            is not computed again, and new ones are saved every 64 pairs.
        console: gets the progress bar; none is shown when None.

    Returns:
        For each reading one score per pair, in their order.

    Raises:
        ModelError: the backbone cannot be loaded, or is no language model.
        DataError: the tokenizer tells no good word from the bad ones.
    """
    critic = items[0].critic if items else NO_CRITIC
    names = (UNTRAINED_WHOLE,) if critic == NO_CRITIC else (UNTRAINED_ALONE, UNTRAINED_WHOLE)
    asked = _asked(max_length or 0)
    keys = {
        (name, i): content_hash(asked, backbone, name, item.content()) for name in names for i, item in enumerate(items)
    }
    known = saved_scores(Path(path)) if path else {}
    todo = {name: [i for i in range(len(items)) if keys[name, i] not in known] for name in names}

    def save() -> None:
        done = [(name, i) for name, i in keys if keys[name, i] in known]
        if path:
            write_records(path, [{**score_row(known[keys[at]], "", keys[at]), "reading": at[0]} for at in done])

    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*columns, console=console or Console(quiet=True), disable=not any(todo.values())) as progress:
        model: ZeroLabelModel | None = None
        for name, missing in todo.items():
            task = progress.add_task(f"{escape(critic)}: {name}", total=len(missing), visible=bool(missing))
            step = functools.partial(progress.advance, task)
            for start in range(0, len(missing), PAIRS_PER_SAVE):
                model = model or ZeroLabelModel.load(backbone, critic=critic, max_length=max_length)
                model.critique_only = name == UNTRAINED_ALONE
                part = missing[start : start + PAIRS_PER_SAVE]
                found = [items[i] for i in part]
                scores = model.score(found, max_tokens_per_step=max_tokens_per_step, on_progress=step)
                levelled = level_identical([item.pair for item in found], scores)
                known |= {keys[name, i]: score for i, score in zip(part, levelled, strict=True)}
                save()
    # A kept row may be of a pair that had another id.
    return {
        name: [replace(known[keys[name, i]], pair_id=item.pair.id) for i, item in enumerate(items)] for name in names
    }
