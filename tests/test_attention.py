"""Packed rows compute what separate rows would: rewards and gradients, over random layouts."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from critrm.attention import Group, packed_attention

LAYOUTS = st.lists(
    st.tuples(st.integers(1, 9), st.lists(st.integers(1, 7), min_size=1, max_size=3)), min_size=1, max_size=3
)


def _reference(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, groups: list[Group]) -> torch.Tensor:
    """Each branch as a row of its own, by the definition of attention."""
    out = torch.zeros_like(query)
    repeat = query.shape[1] // key.shape[1]
    for group in groups:
        prompt = list(range(group.start, group.start + group.n_prompt))
        begin = group.start + group.n_prompt
        for length in group.n_branches:
            rows = prompt + list(range(begin, begin + length))
            k, v = (tensor[:, :, rows].repeat_interleave(repeat, 1) for tensor in (key, value))
            logits = query[:, :, rows] @ k.transpose(-1, -2) / query.shape[-1] ** 0.5
            logits = logits.masked_fill(torch.ones(len(rows), len(rows)).triu(1).bool(), float("-inf"))
            out[:, :, rows] = logits.softmax(-1) @ v
            begin += length
    return out.transpose(1, 2)


def _layout(shape: list[tuple[int, list[int]]]) -> tuple[list[Group], int]:
    groups, n = [], 0
    for n_prompt, branches in shape:
        groups.append(Group(n, n_prompt, tuple(branches)))
        n += n_prompt + sum(branches)
    return groups, n


@given(LAYOUTS, st.sampled_from([(4, 4), (4, 2), (6, 2)]), st.integers(0, 100))
@settings(max_examples=40, deadline=None)
def test_packed_attention_equals_rows_of_their_own(shape, heads, seed):
    groups, n = _layout(shape)
    generator = torch.Generator().manual_seed(seed)
    query, key, value = (torch.randn(1, heads[i > 0], n, 8, generator=generator, dtype=torch.float64) for i in range(3))
    packed, weights = packed_attention(torch.nn.Identity(), query, key, value, None, groups=tuple(groups))
    assert weights is None
    torch.testing.assert_close(packed, _reference(query, key, value, groups))


@pytest.mark.parametrize("n_branches", [(5,), (5, 1), (3, 4, 6)])
def test_the_folded_bf16_path_agrees_with_fp32_and_has_gradients(n_branches):
    groups, n = _layout([(7, list(n_branches)), (2, [1, 3])])
    query, key, value = (torch.randn(1, heads, n, 8, requires_grad=True) for heads in (6, 2, 2))
    exact, _ = packed_attention(torch.nn.Identity(), query, key, value, None, groups=tuple(groups))
    half, _ = packed_attention(
        torch.nn.Identity(), *(x.bfloat16() for x in (query, key, value)), None, groups=tuple(groups)
    )
    torch.testing.assert_close(half.float(), exact, atol=0.05, rtol=0.05)
    half.float().pow(2).sum().backward()
    in_half = [x.grad.clone() for x in (query, key, value)]
    for x in (query, key, value):
        x.grad = None
    exact.pow(2).sum().backward()
    for mine, true in zip(in_half, (query, key, value), strict=True):
        assert (mine - true.grad).norm() < 0.05 * true.grad.norm()
