"""Which backbones can be read in packed rows, and the classifier that is put on them (section 3.2).

Any causal language model of transformers whose layers attend: fully, or within a sliding window. Attention is replaced
by `attention.packed_attention` where the backbone lets that be done; elsewhere the backbone's own attention gets a mask
of four dimensions. Each loaded model is tried on a few tokens: one that computes something else in a packed row than in
rows of their own is refused. One that keeps to its sliding window only by the mask that packed rows do without reads
packed rows within the window, and refuses longer texts.

To use a backbone's own attention where it could be replaced: `reward_model.model.set_attn_implementation("eager")`.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from types import MethodType
from typing import Any

import torch
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    MODEL_MAPPING,
    AutoConfig,
    AutoModelForSequenceClassification,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.modeling_layers import GenericForSequenceClassification

from critrm import models
from critrm.attention import PACKED_ATTENTION
from critrm.errors import ModelError
from critrm.row_layout import Group, row_mask
from critrm.store import write_text

_LAYERS = {"full_attention", "sliding_attention"}
_CODE = '''\
"""A scalar head on {model}, for which transformers has none.

Load it with AutoModelForSequenceClassification.from_pretrained(folder, trust_remote_code=True).
"""

from {module} import {base}
from transformers.modeling_layers import GenericForSequenceClassification


class {name}(GenericForSequenceClassification, {base}):
    pass
'''


def load_classifier(
    name: str, *, new_head: bool = False, quantization: Any = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a classifier with one label, in fp32, that also takes packed rows, and its tokenizer.

    Args:
        name: a folder or hub id.
        new_head: put a new head on a language model, drawn with torch's random numbers.
        quantization: hold the weights of matrix products in fewer bits; see `models.four_bits`.

    Raises:
        ModelError: there is no such model, it has no head, or packed rows would change its rewards.
    """
    tokenizer = models.load_tokenizer(name)
    try:
        # Quiet, since transformers warns of a new head, which is the point of `new_head`.
        with models.quiet():
            config = AutoConfig.from_pretrained(name)
            _refuse_layers(name, config)
            model, facts = _classifier_class(config).from_pretrained(
                name, num_labels=1, dtype=torch.float32, output_loading_info=True, quantization_config=quantization
            )
    except (OSError, ValueError, RuntimeError) as error:
        raise ModelError(f"{name}: cannot be loaded as a reward model ({error})") from error
    if not new_head and facts["missing_keys"]:
        raise ModelError(
            f"{name}: no reward model: its weights lack {', '.join(sorted(facts['missing_keys']))}. "
            "A backbone becomes one with `critrm train`."
        )
    for module in model.modules() if quantization else ():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            # On some CPUs bitsandbytes lays weights out anew when it first reads without gradients, and gradients
            # through that layout are wrong without a word.
            module.support_avx512bf16_for_cpu = False
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    model.config.get_text_config().pad_token_id = tokenizer.pad_token_id
    if model._supports_attention_backend:
        model.set_attn_implementation(PACKED_ATTENTION)
    model.forward = MethodType(_packed_forward(type(model)), model)
    _try_packing(name, model)
    if not _keeps_to_window(model):
        model.forward = MethodType(_packed_forward(type(model), within_window=True), model)
    return model, tokenizer


def save_classifier(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Save in full precision, without the packed attention, which only critrm has.

    Where transformers has no such class, its few lines of code go into the folder beside the weights.
    """
    made = type(model)
    ours = made.__module__ == __name__
    if ours:
        model.config.auto_map = {"AutoModelForSequenceClassification": f"classifier.{made.__name__}"}
    with models.quiet():
        model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    if ours:
        base = made.__bases__[1]
        facts = {"model": model.config.model_type, "module": base.__module__, "base": base.__name__}
        write_text(folder / "classifier.py", _CODE.format(name=made.__name__, **facts))


def _classifier_class(config: Any) -> Any:
    """Transformers' own; made here for a language model of which it has no classifier (Cohere's Command models)."""
    kind = type(config)
    if kind in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING or kind not in MODEL_FOR_CAUSAL_LM_MAPPING:
        return AutoModelForSequenceClassification
    model: Any = MODEL_MAPPING[kind]
    base = next(each for each in model.__mro__[1:] if issubclass(each, PreTrainedModel))
    name = kind.__name__.removesuffix("Config") + "ForSequenceClassification"
    return type(name, (GenericForSequenceClassification, base), {"__module__": __name__})


def _refuse_layers(name: str, config: Any) -> None:
    kinds = set(config.get_text_config().to_dict().get("layer_types") or ()) - _LAYERS
    if kinds:
        raise ModelError(
            f"{name}: its layers of kind {', '.join(sorted(kinds))} would carry one completion over into the next in a "
            "packed row. Take a backbone with plain or sliding-window attention."
        )


def _packed_forward(model_type: type[PreTrainedModel], *, within_window: bool = False) -> Callable[..., Any]:
    """The classifier's forward, which also takes a packed row.

    It replaces `forward` on the instance, so that LoRA, DDP, FSDP and autocast, which all wrap or call `forward`, work
    on packed rows as on plain ones. Asked for, packed rows with texts beyond the sliding window are refused.
    """

    def forward(
        self: Any,
        input_ids: torch.Tensor | None = None,
        *,
        score_positions: torch.Tensor | None = None,
        groups: Sequence[Group] = (),
        position_ids: Any = None,
        **plain: Any,
    ) -> Any:
        if score_positions is None:
            return model_type.forward(self, input_ids, position_ids=position_ids, **plain)
        if within_window:
            _refuse_beyond_window(self, position_ids)
        if self.config._attn_implementation == PACKED_ATTENTION:
            # A mask of four dimensions is passed on as it is, so none is built: the groups say who sees whom.
            how = {"attention_mask": position_ids.new_empty(1, 1, 1, 1), "groups": tuple(groups)}
        else:
            how = {"attention_mask": _additive_mask(self, tuple(groups), position_ids)}
        hidden = self.base_model(
            input_ids=input_ids, position_ids=position_ids, use_cache=False, **how
        ).last_hidden_state
        # In 16 bits, close rewards would be ties.
        with torch.autocast(hidden.device.type, enabled=False):
            ends = hidden[0, score_positions].to(next(self.score.parameters()).dtype)
            rewards: torch.Tensor = self.score(ends).squeeze(-1)
        return rewards.float()

    return forward


def _additive_mask(model: PreTrainedModel, groups: tuple[Group, ...], position_ids: torch.Tensor) -> torch.Tensor:
    """(1, 1, n, n) for a backbone's own attention: 0 where a token sees another, else minus infinity."""
    _refuse_beyond_window(model, position_ids)
    device = position_ids.device
    index = torch.arange(position_ids.shape[1], device=device)
    nothing = index.new_zeros(())
    seen = row_mask(groups, device=device)(nothing, nothing, index[:, None], index)
    mask = torch.zeros(seen.shape, dtype=model.dtype, device=device).masked_fill(~seen, float("-inf"))
    return mask[None, None]


def _window_of(model: PreTrainedModel) -> int:
    """How many tokens the layers that have a sliding window see; 0 where none has one."""
    window = model.config.get_text_config().to_dict().get("sliding_window")
    return max(int(window or 0), 0)


def _refuse_beyond_window(model: PreTrainedModel, position_ids: torch.Tensor) -> None:
    window, longest = _window_of(model), int(position_ids.max()) + 1
    if window and longest > window:
        raise ModelError(
            f"{type(model).__name__} would not keep to its sliding window of {window} tokens in a packed row, and "
            f"there is a text of {longest}. Keep --max-length within it."
        )


def _try_packing(name: str, model: Any) -> None:
    """Refuse a model that computes something else in a packed row than in rows of their own, on a few tokens."""
    if model.device.type == "meta":
        return
    try:
        same = _reads_packed_rows(model)
    except (AttributeError, IndexError, TypeError, ValueError, RuntimeError) as error:
        raise ModelError(f"{name}: {type(model).__name__} cannot read packed rows ({error})") from error
    if not same:
        raise ModelError(
            f"{name}: {type(model).__name__} gives other rewards in packed rows than in rows of their own: it reads "
            "more than attention and positions tell. Take another backbone."
        )


def _keeps_to_window(model: Any) -> bool:
    """Whether packed rows keep to the sliding window, tried on a few tokens with a window that is shorter still.

    Some backbones tell their attention of the window, and others (PhiMoE, Qwen2-MoE) only build a mask.
    """
    config, window = model.config.get_text_config(), _window_of(model)
    if not window or model.device.type == "meta" or model.config._attn_implementation != PACKED_ATTENTION:
        return True  # without a window, without weights, or with a mask of ours that refuses such texts
    # Layers look the window up in the config, or have noted it down.
    holders = [config, *(module for module in model.modules() if vars(module).get("sliding_window"))]
    windows = [holder.sliding_window for holder in holders]
    try:
        for holder in holders:
            holder.sliding_window = 2
        return _reads_packed_rows(model)
    finally:
        for holder, own in zip(holders, windows, strict=True):
            holder.sliding_window = own


@torch.no_grad()
def _reads_packed_rows(model: Any) -> bool:
    """Whether a few tokens get the same rewards in a packed row as in rows of their own."""
    prompt, branches = (5, 7), ((11, 13, 17), (19, 23))
    n_tokens = int(model.get_input_embeddings().weight.shape[0])
    rows = [torch.tensor([[token % n_tokens for token in (*prompt, *branch)]]) for branch in branches]
    packed = model(
        torch.cat([rows[0], rows[1][:, len(prompt) :]], dim=1),
        position_ids=torch.tensor([[0, 1, 2, 3, 4, 2, 3]]),
        score_positions=torch.tensor([4, 6]),
        groups=(Group(0, 2, (3, 2)),),
    )
    ends = torch.stack([model.base_model(input_ids=row, use_cache=False).last_hidden_state[0, -1] for row in rows])
    apart = packed - model.score(ends).squeeze(-1)
    scale = ends.norm(dim=-1).max() * model.score.weight.norm()
    # Not-a-number passes: where FSDP loads weights on one rank, the others have none yet.
    return not bool((apart.abs() > 1e-4 * scale).any())
