"""Attention over rows in which completions share their prompt.

A packed row is a sequence of groups, each `prompt, branch 1, branch 2, ...`, laid end to end without padding. A branch
attends to its own group's prompt and to itself, never to another branch or group, and its positions go on from the
prompt's end: every branch therefore computes exactly what a row of its own (`prompt + branch`) would.

The function is handed to transformers through its `AttentionInterface`, so any backbone that passes keyword arguments
down to its attention layers can use it.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

PACKED_ATTENTION = "critrm_packed"
"""The name under which transformers finds `packed_attention`."""


@dataclass(frozen=True, slots=True)
class Group:
    """Where one prompt and its branches lie in a packed row: lengths in tokens."""

    start: int
    n_prompt: int
    n_branches: tuple[int, ...]


def packed_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    groups: tuple[Group, ...] = (),
    **plain: Any,
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
        groups: the row's layout.
        **plain: what else the backbone passes to ordinary attention.

    Returns:
        (1, n_tokens, n_heads, head_dim), and None for the attention weights.
    """
    if not groups and query.shape[2] == 1 and query.device.type == "cpu":
        return _attend_next(query, key, value, attention_mask, scaling), None
    if not groups:
        output, _ = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **plain
        )
        return output, None
    # Under autocast, rotary embeddings leave queries and keys in fp32; the values say what is computed in.
    query, key = query.to(value.dtype), key.to(value.dtype)
    outputs = []
    for group in groups:
        prompt_end = group.start + group.n_prompt
        first_end = prompt_end + group.n_branches[0]
        # Prompt and first branch are one ordinary causal sequence.
        outputs.append(_attend(query, key, value, slice(group.start, first_end), None, scaling, dropout))
        begin = first_end
        for length in group.n_branches[1:]:
            branch = slice(begin, begin + length)
            outputs.append(_attend(query, key, value, branch, slice(group.start, prompt_end), scaling, dropout))
            begin += length
    return torch.cat(outputs, dim=2).transpose(1, 2).contiguous(), None


def _attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    own: slice,
    prompt: slice | None,
    scaling: float | None,
    dropout: float,
) -> torch.Tensor:
    """Causal attention of the tokens `own`, which also see all of `prompt`."""
    q, k, v = query[:, :, own], key[:, :, own], value[:, :, own]
    mask = None
    if prompt is not None:
        k = torch.cat([key[:, :, prompt], k], dim=2)
        v = torch.cat([value[:, :, prompt], v], dim=2)
        mask = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).tril(k.shape[2] - q.shape[2])
    if q.device.type == "cpu" and q.dtype == torch.bfloat16:
        return _attend_folded(q, k, v, scaling, dropout)
    return functional.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=mask is None, scale=scaling, dropout_p=dropout, enable_gqa=True
    )


def _attend_folded(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scaling: float | None, dropout: float
) -> torch.Tensor:
    """The same as two matrix products: the CPU's bf16 kernel of `scaled_dot_product_attention` is slow backward.

    The query heads that share a key head are folded into its rows, so that keys and values are never repeated.
    """
    (_, n_heads, n, dim), (_, n_key_heads, m, _) = q.shape, k.shape
    rows = q.reshape(n_key_heads, n_heads // n_key_heads * n, dim)
    logits = torch.bmm(rows, k[0].transpose(1, 2)).view(n_key_heads, -1, n, m)
    hidden = torch.full((n, m), float("-inf"), dtype=logits.dtype, device=q.device).triu(m - n + 1)
    logits = torch.add(hidden, logits, alpha=scaling if scaling is not None else dim**-0.5)
    weights = functional.softmax(logits, dim=-1, dtype=torch.float32).to(v.dtype)
    weights = functional.dropout(weights, p=dropout)
    return torch.bmm(weights.view(n_key_heads, -1, m), v[0]).view(1, n_heads, n, dim)


def _attend_next(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None, scaling: float | None
) -> torch.Tensor:
    """Attention of one new token per row, as two matrix products: twice as fast on CPUs as the fused kernel.

    Args:
        q: (n_rows, n_heads, 1, head_dim).
        k: (n_rows, n_key_heads, width, head_dim).
        v: like `k`.
        mask: what is added to the logits, (n_rows, 1, 1, width), or True where a key is seen.
        scaling: factor on the dot products.
    """
    n_rows, n_heads, _, dim = q.shape
    q = q.view(n_rows, k.shape[1], n_heads // k.shape[1], dim)
    logits = torch.matmul(q, k.transpose(2, 3)) * (scaling if scaling is not None else dim**-0.5)
    if mask is not None:
        logits = logits.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else logits + mask
    weights = functional.softmax(logits, dim=-1, dtype=torch.float32).to(v.dtype)
    return torch.matmul(weights, v).view(n_rows, n_heads, 1, dim).transpose(1, 2)


AttentionInterface.register(PACKED_ATTENTION, packed_attention)
AttentionMaskInterface.register(PACKED_ATTENTION, sdpa_mask)
