"""Packed rows compute what separate rows would: outputs and gradients, over random layouts, by every kernel."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from critrm import attention
from critrm.attention import Group, choose_kernel, packed_attention
from critrm.errors import ModelError
from critrm.row_layout import segments_of
from test_row_layout import SHAPES, groups_of

HEADS = st.sampled_from([(4, 4), (4, 2), (6, 2)])
SETTINGS = st.fixed_dictionaries(
    {"sliding_window": st.none() | st.integers(1, 20), "softcap": st.none() | st.just(3.0), "scaling": st.just(0.4)}
)
LAYER = torch.nn.Identity()


def _paths(groups):
    """Each way from a prompt to a leaf as the tokens of a row of its own."""
    segments = segments_of(groups)
    tokens = [list(range(segment.start, segment.start + segment.length)) for segment in segments]
    return [
        [token for number in (*segment.before, i) for token in tokens[number]] for i, segment in enumerate(segments)
    ]


def _reference(query, key, value, groups, *, scaling=None, sliding_window=None, softcap=None):
    """Each path as a row of its own, by the definition of attention."""
    out = torch.zeros(1, query.shape[1], query.shape[2], value.shape[3], dtype=query.dtype)
    repeat = query.shape[1] // key.shape[1]
    for rows in _paths(groups):
        k, v = (tensor[:, :, rows].repeat_interleave(repeat, 1) for tensor in (key, value))
        logits = query[:, :, rows] @ k.transpose(-1, -2) * (scaling or query.shape[-1] ** -0.5)
        if softcap:
            logits = softcap * (logits / softcap).tanh()
        distance = torch.arange(len(rows))[:, None] - torch.arange(len(rows))
        hidden = (distance < 0) | (distance >= (sliding_window or len(rows) + 1))
        out[:, :, rows] = logits.masked_fill(hidden, float("-inf")).softmax(-1) @ v
    return out.transpose(1, 2)


def _random(n, heads, seed, **options):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(1, heads[i > 0], n, 16, generator=generator, **options) for i in range(3)]


@given(SHAPES, HEADS, SETTINGS, st.integers(0, 100), st.integers(1, 300))
@settings(max_examples=60, deadline=None)
def test_packed_attention_equals_rows_of_their_own(shapes, heads, given_settings, seed, block):
    groups, n = groups_of(shapes)
    inputs = _random(n, heads, seed, dtype=torch.float64)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention, "QUERY_BLOCK", block)
        packed, weights = packed_attention(LAYER, *inputs, None, groups=groups, **given_settings)
    assert weights is None
    torch.testing.assert_close(packed, _reference(*inputs, groups, **given_settings))


@given(SHAPES, HEADS, SETTINGS, st.integers(0, 100))
@settings(max_examples=10, deadline=None)
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_flex_attention_equals_rows_of_their_own(shapes, heads, given_settings, seed):
    groups, n = groups_of(shapes)
    inputs = _random(n, heads, seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention, "KERNEL", "flex")
        packed, _ = packed_attention(LAYER, *inputs, None, groups=groups, **given_settings)
    torch.testing.assert_close(packed, _reference(*inputs, groups, **given_settings), atol=1e-5, rtol=1e-4)


def _varlen_on_cpu(q, k, v, q_ends, k_ends, max_q, max_k, *, scale, window_size, enable_gqa):
    """torch's kernel needs a GPU: this is its documentation, causal sequences aligned at their ends."""
    assert enable_gqa
    assert max_q >= int(q_ends.diff().max())
    assert max_k == int(k_ends.diff().max())
    outputs = []
    for i in range(len(q_ends) - 1):
        own, seen = slice(q_ends[i], q_ends[i + 1]), slice(k_ends[i], k_ends[i + 1])
        n, m = own.stop - own.start, seen.stop - seen.start
        distance = torch.arange(m - n, m)[:, None] - torch.arange(m)
        bound = window_size[0] if window_size[0] >= 0 else m
        mask = (distance >= -window_size[1]) & (distance <= bound)
        piece = [tensor.transpose(0, 1)[None] for tensor in (q[own], k[seen], v[seen])]
        attended = torch.nn.functional.scaled_dot_product_attention(*piece, mask, scale=scale, enable_gqa=True)
        outputs.append(attended[0].transpose(0, 1))
    return torch.cat(outputs)


@given(SHAPES, HEADS, SETTINGS, st.integers(0, 100))
@settings(max_examples=30, deadline=None)
def test_sequences_of_unequal_length_equal_rows_of_their_own(shapes, heads, given_settings, seed):
    groups, n = groups_of(shapes)
    given_settings = given_settings | {"softcap": None}
    inputs = _random(n, heads, seed, dtype=torch.float64)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention, "KERNEL", "varlen")
        patch.setattr("torch.nn.attention.varlen.varlen_attn", _varlen_on_cpu)
        packed, _ = packed_attention(LAYER, *inputs, None, groups=groups, **given_settings)
    torch.testing.assert_close(packed, _reference(*inputs, groups, **given_settings))


@pytest.mark.gpu
@pytest.mark.parametrize("kernel", ["varlen", "flex", "pieces"])
@pytest.mark.parametrize("window", [None, 40])
def test_gpu_kernels_agree_with_the_cpu(kernel, window, monkeypatch):
    groups, n = groups_of([(70, [(50, [30, 1]), (90, [])]), (1, [(1, []), (200, [])])])
    exact = [x.requires_grad_() for x in _random(n, (6, 2), 0)]
    expected = _reference(*exact, groups, sliding_window=window)
    expected.pow(2).sum().backward()
    half = [x.detach().cuda().bfloat16().requires_grad_() for x in exact]
    monkeypatch.setattr(attention, "KERNEL", kernel)
    packed, _ = packed_attention(LAYER, *half, None, groups=groups, sliding_window=window)
    packed.float().pow(2).sum().backward()
    for mine, true in ((packed, expected), *((h.grad, e.grad) for h, e in zip(half, exact, strict=True))):
        assert (mine.float().cpu() - true).norm() < 0.02 * true.norm()


@pytest.mark.parametrize("shape", [(5, []), (5, [2, 3])])
@pytest.mark.parametrize("block", [3, 256])
def test_in_bf16_outputs_and_gradients_are_those_of_fp32_to_rounding(shape, block, monkeypatch):
    """2 % by norm: five times bf16's rounding of 0.4 % (2^-8), since q, k, v, weights and output are rounded each."""
    monkeypatch.setattr(attention, "QUERY_BLOCK", block)
    groups, n = groups_of([(7, [shape, (6, []), (1, [])]), (2, [(1, []), (3, [1])])])
    exact = [x.requires_grad_() for x in _random(n, (6, 2), 1)]
    expected, _ = packed_attention(LAYER, *exact, None, groups=groups)
    expected.pow(2).sum().backward()
    half = [x.detach().bfloat16().requires_grad_() for x in exact]
    packed, _ = packed_attention(LAYER, *half, None, groups=groups)
    packed.float().pow(2).sum().backward()
    for mine, true in ((packed, expected), *((h.grad, e.grad) for h, e in zip(half, exact, strict=True))):
        assert (mine.float() - true).norm() < 0.02 * true.norm()


def test_scoring_first_does_not_keep_training_from_using_what_is_stored():
    groups, n = groups_of([(3, [(61, []), (7, [])])])
    inputs = [x.bfloat16() for x in _random(n, (4, 2), 0)]
    with torch.inference_mode():
        packed_attention(LAYER, *inputs, None, groups=groups)
    inputs[0].requires_grad_()
    packed_attention(LAYER, *inputs, None, groups=groups)[0].sum().backward()
    assert inputs[0].grad is not None


def test_the_kernel_is_chosen_by_the_hardware():
    assert choose_kernel(torch.zeros(1, dtype=torch.bfloat16)) == "pieces"


@pytest.mark.parametrize("unknown", [{"s_aux": torch.zeros(4)}, {"position_bias": 1}, {"is_causal": False}])
@pytest.mark.parametrize("groups", [(), (Group(0, 2, (1, 1)),)])
def test_what_is_not_computed_is_refused(unknown, groups):
    with pytest.raises(ModelError, match=f"{next(iter(unknown))}.*set_attn_implementation"):
        packed_attention(LAYER, *_random(4, (4, 2), 0), None, groups=groups, **unknown)


def test_what_changes_nothing_is_accepted():
    groups, inputs = (Group(0, 2, (1, 1)),), _random(4, (4, 2), 0)
    plain, _ = packed_attention(LAYER, *inputs, None, groups=groups)
    told, _ = packed_attention(
        LAYER, *inputs, None, groups=groups, position_ids=torch.arange(4), use_cache=False, s_aux=None, is_causal=True
    )
    assert torch.equal(plain, told)
