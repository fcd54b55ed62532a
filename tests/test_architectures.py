"""Packed rewards and gradients are those of plain transformers on rows of their own, for the backbones people use."""

import random

import pytest
import torch
import transformers
from transformers import AutoModelForSequenceClassification, AutoTokenizer
from transformers.dynamic_module_utils import get_class_from_dynamic_module

from critrm.batching import EncodedPair, pack
from critrm.errors import ModelError
from critrm.reward_model import Reads, RewardModel

SIZES = {
    "vocab_size": 400,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,
}
WINDOW = 11  # far shorter than the texts below
ARCHITECTURES = {
    "Llama": {},
    "Qwen2": {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1},
    "Qwen3": {},
    # A cap that bends the logits, and a scale that is not 1 / sqrt(head_dim).
    "Gemma2": {"sliding_window": WINDOW, "attn_logit_softcapping": 2.0, "query_pre_attn_scalar": 5},
    "Gemma3Text": {"sliding_window": WINDOW, "sliding_window_pattern": 2, "query_pre_attn_scalar": 5},
    "Mistral": {"sliding_window": WINDOW},
    "Cohere": {},
    "Cohere2": {"sliding_window": WINDOW, "sliding_window_pattern": 2},
}
LACKING = ("Cohere", "Cohere2")
"""transformers has no classifier for them."""


def _backbone(name, folder, tiny_model, **settings):
    """A folder with a small random language model of some architecture."""
    config = getattr(transformers, f"{name}Config")(**SIZES | settings, pad_token_id=2, bos_token_id=1, eos_token_id=2)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        getattr(transformers, f"{name.removesuffix('Text')}ForCausalLM")(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(folder)
    return folder


def _pairs(seed=0):
    rng = random.Random(seed)

    def tokens(n):
        return [rng.randrange(3, 250) for _ in range(n)]

    shapes = [(20, 25, 1), (3, 30, 40), (1, 2, 3), (40, 1, 9)]
    return [EncodedPair(str(i), tokens(p), (tokens(a), tokens(b))) for i, (p, a, b) in enumerate(shapes)]


def _separately(plain, pairs):
    return torch.stack(
        [
            torch.cat([plain(torch.tensor([pair.prompt + branch])).logits[0] for branch in pair.branches])
            for pair in pairs
        ]
    )


def _apart(mine, true):
    return float((mine - true).detach().norm() / true.detach().norm())


def _assert_same(model, plain, pairs):
    rewards, expected = model.rewards(pack(pairs)), _separately(plain, pairs)
    assert float(((rewards - expected).abs().max() / expected.abs().max()).detach()) < 1e-5
    rewards.pow(2).sum().backward()
    expected.pow(2).sum().backward()
    gradients = {name: parameter.grad for name, parameter in plain.named_parameters()}
    for name, parameter in model.model.named_parameters():
        assert _apart(parameter.grad, gradients[name]) < 1e-5, name


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_rewards_and_gradients_are_those_of_plain_transformers(name, tiny_model, tmp_path, monkeypatch):
    _backbone(name, tmp_path / "backbone", tiny_model, **ARCHITECTURES[name])
    model = RewardModel.from_backbone(str(tmp_path / "backbone"), Reads(), seed=0)
    model.save(tmp_path / "model")
    if name in LACKING:
        monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
        monkeypatch.syspath_prepend(str(tmp_path / "modules"))
        # What `trust_remote_code=True` loads where critrm has not added the class to transformers.
        auto = get_class_from_dynamic_module(f"classifier.{name}ForSequenceClassification", str(tmp_path / "model"))
    else:
        auto = AutoModelForSequenceClassification
    plain = auto.from_pretrained(tmp_path / "model").eval()
    assert not type(plain).__module__.startswith("critrm")
    assert plain.config.num_labels == 1
    _assert_same(model, plain, _pairs())
    again = RewardModel.load(tmp_path / "model", precision="fp32")
    assert torch.equal(again.rewards(pack(_pairs())), model.rewards(pack(_pairs())))


def test_the_sliding_window_and_the_cap_matter_in_these_tests(tiny_model, tmp_path):
    with_both = RewardModel.from_backbone(
        str(_backbone("Gemma2", tmp_path / "a", tiny_model, **ARCHITECTURES["Gemma2"])), Reads(), seed=0
    )
    for change in ({"sliding_window": 200}, {"attn_logit_softcapping": None}):
        settings = ARCHITECTURES["Gemma2"] | change
        other = RewardModel.from_backbone(
            str(_backbone("Gemma2", tmp_path / "b", tiny_model, **settings)), Reads(), seed=0
        )
        assert _apart(other.rewards(pack(_pairs())), with_both.rewards(pack(_pairs()))) > 1e-3


def test_padded_rows_of_a_capped_model_are_read_as_by_its_own_attention(tiny_model, tmp_path):
    _backbone("Gemma2", tmp_path / "backbone", tiny_model, **ARCHITECTURES["Gemma2"])
    model = RewardModel.from_backbone(str(tmp_path / "backbone"), Reads(), seed=0)
    rows = [pair.prompt + pair.branches[0] for pair in _pairs()]
    ids = torch.tensor([[2] * (50 - len(row)) + row for row in rows])
    with torch.no_grad():
        padded = model.model(input_ids=ids, attention_mask=(ids != 2).long()).logits[:, 0]
        expected = model.rewards(pack(_pairs()))[:, 0]
    torch.testing.assert_close(padded, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_a_backbone_may_use_its_own_attention_under_a_mask(attention, tiny_model, tmp_path):
    model = RewardModel.from_backbone(str(tiny_model), Reads(), seed=0)
    model.save(tmp_path)
    model.model.set_attn_implementation(attention)
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path).eval()
    _assert_same(model, plain, _pairs())


def test_a_backbone_whose_attention_cannot_be_replaced_gets_a_mask(tiny_model, tmp_path):
    settings = {"partial_rotary_factor": 0.5}
    sizes = {name: value for name, value in SIZES.items() if name != "head_dim"}
    config = transformers.StableLmConfig(**sizes | settings, pad_token_id=2, bos_token_id=1, eos_token_id=2)
    transformers.StableLmForCausalLM(config).save_pretrained(tmp_path / "backbone")
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(tmp_path / "backbone")
    model = RewardModel.from_backbone(str(tmp_path / "backbone"), Reads(), seed=0)
    assert not model.model._supports_attention_backend
    model.save(tmp_path / "model")
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path / "model").eval()
    _assert_same(model, plain, _pairs())


def test_a_window_is_kept_or_refused_under_a_backbones_own_attention(tiny_model, tmp_path):
    _backbone("Mistral", tmp_path, tiny_model, sliding_window=20)
    model = RewardModel.from_backbone(str(tmp_path), Reads(), seed=0)
    short = [EncodedPair("a", [3, 4], ([5, 6], [7]))]
    expected = model.rewards(pack(short))
    model.model.set_attn_implementation("eager")
    torch.testing.assert_close(model.rewards(pack(short)), expected)
    with pytest.raises(ModelError, match="window of 20 tokens.*--max-length"):
        model.rewards(pack(_pairs()))


MASK_ONLY = {
    "Phimoe": {"sliding_window": 20, "num_local_experts": 2, "num_experts_per_tok": 1},
    "Qwen2Moe": {
        "use_sliding_window": True, "sliding_window": 20, "max_window_layers": 3, "num_experts": 2,
        "num_experts_per_tok": 1, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16,
    },
}  # fmt: skip
"""They build a mask of the sliding window, and tell their attention nothing of it."""


@pytest.mark.parametrize("name", MASK_ONLY)
def test_a_window_that_only_the_mask_knows_is_not_exceeded(name, tiny_model, tmp_path):
    _backbone(name, tmp_path / "backbone", tiny_model, **MASK_ONLY[name])
    model = RewardModel.from_backbone(str(tmp_path / "backbone"), Reads(), seed=0)
    assert model.model.config.sliding_window == 20
    model.save(tmp_path / "model")
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path / "model").eval()
    short = [EncodedPair("a", [3, 4], ([5, 6] * 9, [7])), EncodedPair("b", [8] * 10, ([9], [5] * 10))]
    with torch.no_grad():
        torch.testing.assert_close(model.rewards(pack(short)), _separately(plain, short), atol=1e-5, rtol=1e-5)
    with pytest.raises(ModelError, match="window of 20 tokens.*text of 49.*--max-length"):
        model.rewards(pack(_pairs()))


def test_the_trial_of_a_window_leaves_the_model_as_it_was(tiny_model, tmp_path):
    for name in ("Gemma2", "Mistral", "Qwen2"):
        _backbone(name, tmp_path / name, tiny_model, **ARCHITECTURES[name])
        model = RewardModel.from_backbone(str(tmp_path / name), Reads(), seed=0).model
        assert model.config.sliding_window == WINDOW
        noted = {vars(module).get("sliding_window") for module in model.modules()}
        assert noted == ({None} if name == "Mistral" else {None, WINDOW})


REFUSED = {
    # Position is told by a bias that counts places in the row.
    "Bloom": ({"n_layer": 2, "n_head": 4, "hidden_size": 32, "vocab_size": 400}, "packed rows"),
    "Jamba": (SIZES | {"use_mamba_kernels": False, "mamba_dt_rank": 4}, "packed row"),
    "Qwen3Next": (
        SIZES | {"layer_types": ["linear_attention", "full_attention", "full_attention"]},
        "linear_attention",
    ),
    # A learned sink takes part in each softmax.
    "GptOss": (SIZES | {"num_local_experts": 2, "num_experts_per_tok": 1}, "s_aux.*set_attn_implementation"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_packed_rows_would_change_is_refused(name, tiny_model, tmp_path):
    settings, message = REFUSED[name]
    config = getattr(transformers, f"{name}Config")(**settings, pad_token_id=2, bos_token_id=1, eos_token_id=2)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        getattr(transformers, f"{name}ForCausalLM")(config).save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=message):
        RewardModel.from_backbone(str(tmp_path), Reads(), seed=0)
