"""Attention over packed rows, in which completions share their prompt (`row_layout`).

It is handed to transformers through its `AttentionInterface`, so any backbone that passes keyword arguments down to its
attention layers can use it. How it is computed depends on the hardware (`choose_kernel`).
"""

import itertools
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

import torch
from torch.nn import functional
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from critrm.errors import ModelError
from critrm.row_layout import Group as Group
from critrm.row_layout import pieces_of, row_mask, segments_of

PACKED_ATTENTION = "critrm_packed"
"""The name under which transformers finds `packed_attention`."""

Kernel = Literal["pieces", "varlen", "flex"]
KERNEL: Kernel | None = None
"""Set it to compute packed rows in one way on any hardware: `critrm.attention.KERNEL = "flex"`."""

QUERY_BLOCK = 256
"""So many queries at a time where logits are written out."""

# What backbones tell their attention that changes nothing here: positions are in the rotated queries already.
_HARMLESS = {"is_causal", "position_ids", "use_cache", "cache_position", "output_attentions", "output_hidden_states"}


@dataclass(frozen=True, slots=True)
class _Asked:
    """What attention of a packed row has to compute; see `packed_attention`."""

    groups: tuple[Group, ...]
    scaling: float
    window: int | None
    softcap: float | None
    dropout: float


def packed_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    groups: tuple[Group, ...] = (),
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """Attend within each group of a packed row; without groups it is ordinary attention under `attention_mask`.

    Args:
        module: the attention layer.
        query: (1, n_heads, n_tokens, head_dim).
        key: (1, n_key_value_heads, n_tokens, head_dim).
        value: like `key`.
        attention_mask: unused where groups say who sees whom.
        scaling: factor on the dot products; 1 / sqrt(head_dim) when None.
        dropout: probability of dropping an attention weight.
        sliding_window: how many positions a token sees, its own included; all when None. Without groups, the mask
            says so.
        softcap: logits become softcap * tanh(logits / softcap) where it is given.
        groups: the row's layout.
        **others: what else the backbone passes to its attention; only what changes nothing is accepted.

    Returns:
        (1, n_tokens, n_heads, head_dim), and None for the attention weights.

    Raises:
        ModelError: the backbone needs something that is not computed here, such as attention sinks.
    """
    _refuse_unknown(module, others)
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    if not groups:
        if softcap or (query.shape[2] == 1 and query.device.type == "cpu"):
            return _attend_plainly(query, key, value, attention_mask, scaling, softcap), None
        output, _ = sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, **others)
        return output, None
    asked = _Asked(groups, scaling, sliding_window, softcap, dropout)
    attend = {"pieces": _by_pieces, "varlen": _by_varlen, "flex": _by_flex}
    return attend[KERNEL or choose_kernel(value, softcap=softcap, dropout=dropout)](query, key, value, asked), None


def choose_kernel(value: torch.Tensor, *, softcap: float | None = None, dropout: float = 0.0) -> Kernel:
    """The way to compute packed rows that suits the hardware; `KERNEL` overrides it.

    `pieces`: one product of matrices or `scaled_dot_product_attention` after the other; everything, everywhere.
    `varlen`: torch's FlashAttention for sequences of unequal length; 16 bits on NVIDIA GPUs since Ampere.
    `flex`: torch's FlexAttention, which compiles a kernel for the row's block mask; other work on GPUs.
    """
    if value.device.type != "cuda" or dropout:
        return "pieces"
    half, ampere = (
        value.dtype in (torch.bfloat16, torch.float16),
        torch.cuda.get_device_capability(value.device) >= (8,),
    )
    return "varlen" if half and ampere and not softcap and value.shape[-1] <= 256 else "flex"


def _refuse_unknown(module: torch.nn.Module, others: dict[str, Any]) -> None:
    unknown = [name for name, given in others.items() if name not in _HARMLESS and given is not None]
    # Most attention layers of transformers say whether they look ahead; those that say nothing do not.
    if False in (others.get("is_causal"), getattr(module, "is_causal", True)):
        unknown.append("is_causal=False")
    if unknown:
        raise ModelError(
            f"{type(module).__name__} asks its attention for {', '.join(sorted(unknown))}, which packed rows do not "
            'compute. `reward_model.model.set_attn_implementation("eager")` uses the backbone\'s own attention, slower.'
        )


def _by_pieces(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, asked: _Asked) -> torch.Tensor:
    folded = bool(asked.softcap) or (query.device.type == "cpu" and value.dtype == torch.bfloat16)
    if folded:
        query = query * asked.scaling  # once, on the smallest tensor there is
    # Under autocast, rotary embeddings leave queries and keys in fp32; the values say what is computed in.
    query, key = query.to(value.dtype), key.to(value.dtype)
    # Split once: the gradient of a slice is a whole row of zeros, that of a split is one concatenation.
    lengths = [segment.length for segment in segments_of(asked.groups)]
    q, k, v = (torch.split_with_sizes(tensor, lengths, dim=2) for tensor in (query, key, value))
    outputs = []
    for piece in pieces_of(asked.groups):
        seen = piece.before + piece.own
        inputs = (_join(q, piece.own), _join(k, seen), _join(v, seen))
        outputs.append((_attend_folded if folded else _attend_fused)(*inputs, asked))
    return torch.cat(outputs, dim=2).transpose(1, 2).contiguous()


def _join(parts: tuple[torch.Tensor, ...], numbers: tuple[int, ...]) -> torch.Tensor:
    return parts[numbers[0]] if len(numbers) == 1 else torch.cat([parts[number] for number in numbers], dim=2)


def _hidden(n: int, like: torch.Tensor, window: int | None) -> torch.Tensor:
    """(n, m) for m keys `like` (..., m, head_dim): minus infinity where one of the last n sees no key, else 0."""
    m = like.shape[2]
    # Few sizes and windows, so that all pieces and layers share what is stored.
    size, window = 1 << (m - 1).bit_length(), window if window is not None and window < m else None
    return _stored_hidden(size, window, like.dtype, like.device)[m - n : m, :m]


@lru_cache(maxsize=8)
def _stored_hidden(size: int, window: int | None, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    # Scoring must not leave an inference tensor behind: training could not use it.
    with torch.inference_mode(False), torch.no_grad():
        seen = torch.ones(size, size, dtype=torch.bool, device=device).tril()
        if window is not None:
            seen = seen.triu(1 - window)
        return torch.zeros(size, size, dtype=dtype, device=device).masked_fill(~seen, float("-inf"))


def _attend_fused(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, asked: _Asked) -> torch.Tensor:
    n, m = q.shape[2], k.shape[2]
    plain = n == m and (asked.window is None or asked.window >= m)
    mask = None if plain else _hidden(n, k, asked.window)
    how: dict[str, Any] = {"scale": asked.scaling, "dropout_p": asked.dropout, "enable_gqa": True}
    return functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=plain, **how)


def _attend_folded(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, asked: _Asked) -> torch.Tensor:
    """Attention as matrix products: the CPU's bf16 kernel of `scaled_dot_product_attention` is slow backward.

    The query heads that share a key head are folded into its rows, so that keys and values are never repeated. Queries
    come scaled, and are taken in blocks, so that keys which come after a block are left out.
    """
    (n_heads, n, dim), (n_key_heads, m, _) = q.shape[1:], k.shape[1:]
    outputs, seen = [], m - n
    for start in range(0, n, QUERY_BLOCK):
        block = q[:, :, start : start + QUERY_BLOCK]
        seen += block.shape[2]
        keys, values = k[:, :, :seen], v[:, :, :seen]
        rows = block.reshape(n_key_heads, -1, dim)
        logits = torch.bmm(rows, keys[0].transpose(1, 2)).view(n_key_heads, n_heads // n_key_heads, -1, seen)
        if asked.softcap:
            logits = asked.softcap * torch.tanh(logits / asked.softcap)
        # In place: nothing needs the logits as they were, and a copy is a pass over the largest tensor there is.
        logits = logits.add_(_hidden(block.shape[2], keys, asked.window))
        # In 16 bits too, softmax sums and exponentiates in fp32.
        weights = functional.dropout(functional.softmax(logits, dim=-1), p=asked.dropout)
        outputs.append(torch.bmm(weights.view(n_key_heads, -1, seen), values[0]).view(1, n_heads, -1, v.shape[-1]))
    return torch.cat(outputs, dim=2)


@lru_cache(maxsize=8)
def _sequences(groups: tuple[Group, ...], device: torch.device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, int]:
    """A row's pieces as sequences of unequal length.

    Returns:
        The keys' tokens, piece by piece; where pieces end among queries and among these keys, both (n_pieces + 1,)
        int32; and the largest number of keys.
    """
    segments, query_ends, key_ends = segments_of(groups), [0], [0]
    keys: list[int] = []
    for piece in pieces_of(groups):
        for number in piece.before + piece.own:
            keys += range(segments[number].start, segments[number].start + segments[number].length)
        query_ends.append(query_ends[-1] + sum(segments[number].length for number in piece.own))
        key_ends.append(len(keys))
    widest = max(end - start for start, end in itertools.pairwise(key_ends))
    with torch.inference_mode(False):
        queries, seen = (torch.tensor(ends, dtype=torch.int32, device=device) for ends in (query_ends, key_ends))
        return torch.tensor(keys, device=device), queries, seen, widest


def _by_varlen(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, asked: _Asked) -> torch.Tensor:
    from torch.nn.attention.varlen import varlen_attn

    keys, query_ends, key_ends, widest = _sequences(asked.groups, value.device)
    # (n_tokens, n_heads, head_dim); a causal sequence with fewer queries than keys is aligned at its end.
    q, k, v = (tensor[0].transpose(0, 1).to(value.dtype) for tensor in (query, key, value))
    seen = (-1, 0) if asked.window is None else (asked.window - 1, 0)
    how: dict[str, Any] = {"scale": asked.scaling, "window_size": seen, "enable_gqa": True}
    output: Any = varlen_attn(q, k[keys], v[keys], query_ends, key_ends, widest, widest, **how)
    return torch.unsqueeze(output, 0)


@lru_cache(maxsize=8)
def _block_mask(groups: tuple[Group, ...], window: int | None, n_tokens: int, device: torch.device) -> Any:
    from torch.nn.attention.flex_attention import create_block_mask

    with torch.inference_mode(False):
        mask = row_mask(groups, window=window, device=device)
        # Compiled, the blocks are found without a mask of n_tokens x n_tokens.
        return create_block_mask(mask, None, None, n_tokens, n_tokens, device, _compile=device.type == "cuda")


@lru_cache(maxsize=1)
def _compiled_flex_attention() -> Any:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention)


def _by_flex(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, asked: _Asked) -> torch.Tensor:
    from torch.nn.attention.flex_attention import flex_attention

    softcap = asked.softcap or 0.0

    def capped(score: torch.Tensor, *_: torch.Tensor) -> torch.Tensor:
        return softcap * torch.tanh(score / softcap)

    attend: Any = _compiled_flex_attention() if value.device.type == "cuda" else flex_attention
    mask = _block_mask(asked.groups, asked.window, query.shape[2], value.device)
    how = {"score_mod": capped if softcap else None, "block_mask": mask, "scale": asked.scaling, "enable_gqa": True}
    output: torch.Tensor = attend(query.to(value.dtype), key.to(value.dtype), value, **how)
    return output.transpose(1, 2).contiguous()


def _attend_plainly(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None,
    scaling: float,
    softcap: float | None,
) -> torch.Tensor:
    """Attention of ordinary rows as two matrix products.

    For one new token per row that is twice as fast on CPUs as the fused kernel, which in turn knows no soft cap.

    Args:
        q: (n_rows, n_heads, n, head_dim).
        k: (n_rows, n_key_heads, width, head_dim).
        v: like `k`.
        mask: what is added to the logits, (n_rows, 1, n, width), or True where a key is seen; causal when None.
        scaling: factor on the dot products.
        softcap: see `packed_attention`.
    """
    (n_rows, n_heads, n, dim), (_, n_key_heads, width, _) = q.shape, k.shape
    q = q.reshape(n_rows, n_key_heads, n_heads // n_key_heads * n, dim)
    logits = torch.matmul(q, k.transpose(2, 3)) * scaling
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    logits = logits.view(n_rows, n_key_heads, -1, n, width)
    if mask is None and n > 1:
        mask = _hidden(n, k, None)[None, None]
    if mask is not None:
        mask = mask[:, :, None]
        # Not minus infinity: a padding token that sees nobody would become not-a-number, and spread.
        hidden = torch.finfo(logits.dtype).min
        logits = logits.masked_fill(~mask, hidden) if mask.dtype == torch.bool else logits + mask
    weights = functional.softmax(logits, dim=-1, dtype=torch.float32).to(v.dtype)
    weights = weights.view(n_rows, n_key_heads, -1, width)
    return torch.matmul(weights, v).view(n_rows, n_heads, n, v.shape[-1]).transpose(1, 2)


AttentionInterface.register(PACKED_ATTENTION, packed_attention)
AttentionMaskInterface.register(PACKED_ATTENTION, sdpa_mask)
