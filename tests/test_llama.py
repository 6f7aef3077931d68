"""Llama computes what transformers computes, with a cache and without; its tokenizer reads text."""

import json
import math
import random
import re
import shutil
import unicodedata
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

import llama as llama_file
import make_golden
import toys
from llama import Llama, LlamaConfig, RMSNorm, Tokenizer, rotary_angles, rotate, tokenizer_files
from make_golden import GOLDEN, LLAMAS, SMALL
from toys import FAULTS, INTEGERS, LLAMA, TINY, llama_folder, made_up, peak_memory, shard
from train import WEIGHTS
from translate import SearchOptions, beam_search

TOY = toys.llama_config(**SMALL)


def assert_close(ours, theirs, atol):
    torch.testing.assert_close(ours, torch.as_tensor(theirs), rtol=0, atol=atol)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return llama_folder(tmp_path_factory.mktemp("toys") / "llama", **SMALL)


@pytest.fixture(scope="module")
def llama(folder):
    return Llama.from_pretrained(folder).requires_grad_(False)


def rewrite_config(folder, **changes):
    """Change entries of config.json; None takes one away."""
    raw = json.loads((folder / "config.json").read_text()) | changes
    raw = {k: v for k, v in raw.items() if v is not None}
    (folder / "config.json").write_text(json.dumps(raw))
    return folder / "config.json"


# ------------------------------------------------------------------------------------------- parity


@pytest.mark.parametrize("name", LLAMAS)
def test_logits_equal_the_golden_file(tmp_path, name):
    llama = Llama.from_pretrained(llama_folder(tmp_path / "llama", **LLAMAS[name]))
    with torch.no_grad():
        assert_close(llama(make_golden.ids()), np.load(GOLDEN)[f"llama {name}"], 5e-5)


@pytest.mark.parametrize("name", LLAMAS)
def test_logits_equal_transformers(tmp_path, name):
    pytest.importorskip("transformers", reason="the reference is not installed")
    folder = llama_folder(tmp_path / "llama", **LLAMAS[name])
    with torch.no_grad():
        ours = Llama.from_pretrained(folder)(make_golden.ids())
    assert_close(ours, make_golden.their_logits(folder), 5e-5)


def test_a_folder_that_transformers_wrote_loads(folder, tmp_path, llama):
    transformers = pytest.importorskip("transformers", reason="the reference is not installed")
    transformers.LlamaForCausalLM.from_pretrained(folder).save_pretrained(tmp_path)
    assert Llama.from_pretrained(tmp_path).config == llama.config
    assert torch.equal(Llama.from_pretrained(tmp_path)(make_golden.ids()), llama(make_golden.ids()))


def slow_attention(q, k, v, can_attend):
    """The textbook four lines. (B, H, T, Dh) x3 -> (B, H, T, Dh)"""
    score = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])  # (B, H, T, T)
    score = score.masked_fill(~can_attend, float("-inf"))
    weight = score.softmax(dim=-1)  # (B, H, T, T)
    return weight @ v


@pytest.mark.parametrize("n_kv", (6, 3, 1))
def test_attention_is_the_textbook_attention_with_repeated_keys(tmp_path, n_kv):
    folder = llama_folder(tmp_path / "llama", **SMALL, num_key_value_heads=n_kv)
    attention = Llama.from_pretrained(folder).requires_grad_(False).model.layers[0].self_attn
    B, T, Dh = 2, 5, LLAMA["head_dim"]
    x = made_up("x", (B, T, LLAMA["hidden_size"]), 1.0)
    cos, sin = rotary_angles(torch.arange(T)[None], TOY)

    q, k, v = (
        proj(x).unflatten(-1, (-1, Dh)).transpose(1, 2)
        for proj in (attention.q_proj, attention.k_proj, attention.v_proj)
    )
    k, v = (y.repeat_interleave(6 // n_kv, dim=1) for y in (k, v))  # head h reads group h // share
    past_and_self = torch.ones(T, T, dtype=torch.bool).tril()
    y = slow_attention(rotate(q, cos, sin), rotate(k, cos, sin), v, past_and_self)
    y = attention.o_proj(y.transpose(1, 2).flatten(2))  # (B, T, D)
    assert_close(attention(x, cos, sin)[0], y, 1e-5)


def test_a_rotation_is_a_complex_product_of_dimension_i_and_i_plus_half():
    x = made_up("x", (1, 1, 4, 6), 1.0)
    position = torch.tensor([[0, 1, 5, 900]])
    ours = rotate(x, *rotary_angles(position, TOY))

    turn = torch.tensor([10_000.0 ** (-i / 3) for i in range(3)])
    angle = position[0][:, None] * turn  # (T, Dh/2)
    turned = torch.complex(x[..., :3], x[..., 3:]) * torch.polar(torch.ones(4, 3), angle)
    assert_close(ours, torch.cat([turned.real, turned.imag], dim=-1), 1e-5)
    assert torch.equal(ours[:, :, 0], x[:, :, 0])  # position 0 does not turn


def test_a_norm_does_not_overflow_in_half_precision():
    x = torch.full((1, 4), 1000.0, dtype=torch.float16)  # its square is beyond float16
    norm = RMSNorm(4, 1e-5).half()
    assert torch.equal(norm(x), torch.ones(1, 4, dtype=torch.float16))


# ---------------------------------------------------------------------------------------- the cache


def test_embed_hidden_and_logits_compose_to_the_forward_pass(llama):
    ids = make_golden.ids()
    hidden, cache = llama.hidden(llama.embed(ids))
    assert hidden.shape == (2, 9, LLAMA["hidden_size"])
    assert torch.equal(llama.logits(hidden), llama(ids))
    assert [k.shape for k, v in cache.layers] == [(2, 3, 9, 6)] * 2 and cache.length == 9


@pytest.mark.parametrize("recompute", [False, True])
def test_a_selection_of_states_equals_those_of_the_full_pass(llama, recompute, monkeypatch):
    x = llama.embed(make_golden.ids()).detach().requires_grad_()
    selection = torch.tensor([1, 0, 0, 1]), torch.tensor([8, 3, 0, 5])
    monkeypatch.setattr(llama, "recompute", recompute)
    results = []
    for hidden in (llama.hidden(x)[0][selection], llama.hidden(x, selection=selection)[0]):
        assert hidden.shape == (4, LLAMA["hidden_size"])
        results.append((hidden, torch.autograd.grad((hidden**3).sum(), x)[0]))
    (states, gradient), (same, again) = results
    assert_close(same, states, 1e-5)
    assert_close(again / gradient.abs().max(), gradient / gradient.abs().max(), 1e-6)


def test_a_token_never_attends_to_later_tokens(llama):
    ids = make_golden.ids()
    other = ids.clone()
    other[:, 5:] = 9
    assert torch.equal(llama(ids)[:, :5], llama(other)[:, :5])
    assert not torch.equal(llama(ids)[:, 5:], llama(other)[:, 5:])


def test_cached_steps_equal_the_full_pass(llama):
    ids = make_golden.ids()
    hidden, cache = llama.hidden(llama.embed(ids[:, :4]))
    steps = [hidden]
    for t in range(4, ids.shape[1]):
        positions = torch.full((2, 1), t)
        hidden, cache = llama.hidden(llama.embed(ids[:, t : t + 1]), cache, positions)
        steps.append(hidden)
    assert_close(llama.logits(torch.cat(steps, dim=1)), llama(ids), 1e-5)


def test_cached_steps_equal_the_full_pass_for_rows_of_different_lengths(llama):
    prompts = [[1, 66, 5, 5, 17], [1, 8], [1, 33, 2, 60]]
    answers = torch.tensor([[40, 3, 22], [60, 0, 12], [5, 7, 9]])
    lengths = torch.tensor([len(prompt) for prompt in prompts])
    ids = torch.tensor([prompt + [64] * (5 - len(prompt)) for prompt in prompts])  # 64 is padding

    _, cache = llama.hidden(llama.embed(ids))
    can_attend = torch.arange(5) < lengths[:, None]  # (B, past)
    steps = []
    for t in range(3):
        # A row continues at the position after its prompt. Its keys are behind the padding.
        can_attend = torch.cat([can_attend, torch.ones(3, 1, dtype=torch.bool)], dim=1)
        x = llama.embed(answers[:, t : t + 1])
        hidden, cache = llama.hidden(x, cache, (lengths + t)[:, None], can_attend[:, None])
        steps.append(llama.logits(hidden))
    cached = torch.cat(steps, dim=1)  # (B, 3, V)

    for row, prompt in enumerate(prompts):
        single = llama(torch.tensor([prompt + answers[row].tolist()]))[0, len(prompt) :]
        assert_close(cached[row], single, 1e-5)


def test_each_token_of_a_step_attends_to_its_own_past(llama):
    """Two answers to one prompt, token by token in one row: as if each had a row of its own."""
    prompt, answers = [1, 66, 5, 17], torch.tensor([[40, 3, 22], [60, 9, 12]])
    _, cache = llama.hidden(llama.embed(torch.tensor([prompt])))
    can_attend = torch.ones(1, 2, len(prompt), dtype=torch.bool)  # (B, W, past)
    steps = []
    for t in range(3):
        can_attend = torch.cat([can_attend, torch.eye(2, dtype=torch.bool)[None]], dim=2)
        positions = torch.full((1, 2), len(prompt) + t)
        x = llama.embed(answers[:, t][None])
        hidden, cache = llama.hidden(x, cache, positions, can_attend)
        steps.append(llama.logits(hidden)[0])
    together = torch.stack(steps, dim=1)  # (2, 3, V)
    for answer, logits in zip(answers, together):
        single = llama(torch.tensor([prompt + answer.tolist()]))[0, len(prompt) :]
        assert_close(logits, single, 1e-5)


def test_a_cache_keeps_only_the_named_rows(llama):
    ids = torch.tensor([[1, 66, 5], [1, 8, 9], [1, 33, 2]])
    _, cache = llama.hidden(llama.embed(ids))
    cache.keep([2, 0])
    positions = torch.full((2, 1), 3)
    hidden, _ = llama.hidden(llama.embed(torch.tensor([[7], [7]])), cache, positions)
    for row, prompt in zip(hidden, ([1, 33, 2, 7], [1, 66, 5, 7])):
        assert_close(llama.logits(row)[0], llama(torch.tensor([prompt]))[0, -1], 1e-5)


@pytest.mark.parametrize("n_kv", (6, 3, 1))
def test_a_mask_gives_the_same_states_as_causal_attention(tmp_path, n_kv):
    """With a mask the query heads of a group become queries of one head."""
    folder = llama_folder(tmp_path / "llama", **SMALL, num_key_value_heads=n_kv)
    llama, ids = Llama.from_pretrained(folder).requires_grad_(False), make_golden.ids()
    B, T = ids.shape
    expected, _ = llama.hidden(llama.embed(ids))  # (B, T, D)
    first, cache = llama.hidden(llama.embed(ids[:, :4]))
    can_attend = torch.ones(B, T, T, dtype=torch.bool).tril()[:, 4:]
    positions = torch.arange(4, T).expand(B, -1)
    second, _ = llama.hidden(llama.embed(ids[:, 4:]), cache, positions, can_attend)
    assert_close(torch.cat([first, second], dim=1), expected, 1e-5)


def test_attention_never_has_a_mask_together_with_grouped_heads(llama, monkeypatch):
    """CUDA has no fast kernel for both. Without a mask, flash takes grouped heads."""
    calls, attend = [], F.scaled_dot_product_attention

    def watch(q, k, v, attn_mask=None, is_causal=False, enable_gqa=False):
        calls.append((attn_mask is not None, is_causal, enable_gqa))
        assert attn_mask is None or q.shape[1] == k.shape[1] == 3 and q.shape[2] == 2 * 2
        return attend(q, k, v, attn_mask=attn_mask, is_causal=is_causal, enable_gqa=enable_gqa)

    monkeypatch.setattr(F, "scaled_dot_product_attention", watch)
    x = llama.embed(make_golden.ids())
    _, cache = llama.hidden(x)
    llama.hidden(x[:, :1], cache, torch.full((2, 1), 9))
    can_attend = torch.ones(2, 2, 12, dtype=torch.bool)
    llama.hidden(x[:, :2], cache, torch.full((2, 2), 10), can_attend)
    assert calls[::2] == [(False, True, True), (False, False, True), (True, False, False)]


def test_attention_in_training_on_a_cpu_is_computed_in_float32(folder, monkeypatch):
    dtypes, attend = [], F.scaled_dot_product_attention

    def watch(q, k, v, **options):
        dtypes.append((q.dtype, k.dtype, v.dtype))
        return attend(q, k, v, **options)

    monkeypatch.setattr(F, "scaled_dot_product_attention", watch)
    llama = Llama.from_pretrained(folder, torch.bfloat16)
    assert llama(make_golden.ids()).dtype == torch.bfloat16
    assert dtypes == [(torch.float32,) * 3] * 2


@pytest.mark.parametrize(
    "T, positions, missing",
    ((2, torch.tensor([[4, 5]]), "can_attend is"), (1, None, "positions are")),
)
def test_a_step_with_a_cache_needs_positions_and_a_mask(llama, T, positions, missing):
    _, cache = llama.hidden(llama.embed(torch.tensor([[1, 2, 3, 4]])))
    with pytest.raises(ValueError, match=f"{missing} missing"):
        llama.hidden(llama.embed(torch.tensor([[5, 6]])[:, :T]), cache, positions)


# --------------------------------------------------------------------------------------- the config


def test_rope_theta_is_read_from_the_top(tmp_path):
    path = rewrite_config(llama_folder(tmp_path / "llama", **SMALL), rope_theta=500_000.0)
    assert LlamaConfig.from_json(path).rope_theta == 500_000.0


def test_rope_theta_is_read_from_rope_parameters(tmp_path):
    rope = {"rope_theta": 500_000.0, "rope_type": "default"}
    folder = llama_folder(tmp_path / "llama", **SMALL)
    path = rewrite_config(folder, rope_theta=None, rope_parameters=rope)
    assert LlamaConfig.from_json(path).rope_theta == 500_000.0


@pytest.mark.parametrize(
    "change, message",
    (
        ({"rope_scaling": {"rope_type": "default", "factor": 8.0}}, "'factor': 8.0"),
        ({"rope_parameters": {"rope_theta": 1e4, "rope_type": "yarn"}}, "rope_type.*yarn"),
        (
            {"rope_scaling": {}, "rope_parameters": {"rope_type": "dynamic", "factor": 8.0}},
            "rope_type.*dynamic",
        ),
        ({"attention_bias": True}, "'attention_bias': True"),
        ({"mlp_bias": True}, "'mlp_bias': True"),
        ({"hidden_act": "gelu"}, "'hidden_act': 'gelu'"),
        ({"model_type": "mistral"}, "'model_type': 'mistral'"),
        ({"sliding_window": 4096}, "'sliding_window': 4096"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "'type': 'linear'"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "'partial_rotary_factor': 0.5"),
    ),
)
def test_a_feature_that_is_not_built_is_an_error_that_names_it(tmp_path, change, message):
    folder = llama_folder(tmp_path / "llama", **SMALL)
    with pytest.raises(ValueError, match=f"not supported: .*{message}.*; use another"):
        LlamaConfig.from_json(rewrite_config(folder, **change))


@pytest.mark.parametrize(
    "name",
    (
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "vocab_size",
        "rms_norm_eps",
    ),
)
def test_a_missing_size_is_named(tmp_path, name):
    folder = llama_folder(tmp_path / "llama", **SMALL)
    with pytest.raises(ValueError, match=f"config.json has no valid {name} .*found None; copy"):
        LlamaConfig.from_json(rewrite_config(folder, **{name: None}))


def test_values_that_early_configs_leave_out_get_their_defaults(tmp_path):
    absent = ("num_key_value_heads", "head_dim", "rope_theta", "tie_word_embeddings")
    folder = llama_folder(tmp_path / "llama", **SMALL)
    config = LlamaConfig.from_json(rewrite_config(folder, **dict.fromkeys(absent)))
    assert config.num_key_value_heads == config.num_attention_heads == 6
    assert config.head_dim == 36 // 6
    assert config.rope_theta == 10_000.0
    assert config.tie_word_embeddings is False


@pytest.mark.parametrize("name", ("rope_parameters", "rope_scaling"))
def test_an_inner_rope_theta_replaces_the_one_at_the_top(tmp_path, name):
    folder = llama_folder(tmp_path / "llama", **SMALL)
    path = rewrite_config(folder, rope_theta=10_000.0, **{name: {"rope_theta": 500_000.0}})
    assert LlamaConfig.from_json(path).rope_theta == 500_000.0


@pytest.mark.parametrize("name", ("rope_parameters", "rope_scaling"))
def test_an_inner_rope_theta_gives_the_logits_of_transformers(tmp_path, name):
    pytest.importorskip("transformers", reason="the reference is not installed")
    folder = llama_folder(tmp_path / "llama", **SMALL)
    rewrite_config(folder, **{name: {"rope_theta": 7.0, "rope_type": "default"}})
    with torch.no_grad():
        ours = Llama.from_pretrained(folder)(make_golden.ids())
    assert_close(ours, make_golden.their_logits(folder), 5e-5)


SCALED = dict(
    rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
    original_max_position_embeddings=16,
)  # fmt: skip
NOT_SIZES = ("8", 8.5, True, [8], {}, 0, -8, 10**9, 10**400, float("nan"))
NOT_NUMBERS = ("8", True, [8], {}, 0, -8, 10**400, float("nan"), float("inf"))


@pytest.mark.parametrize("name", LlamaConfig.__dataclass_fields__)
def test_a_value_of_another_type_or_size_is_an_error_that_names_it(tmp_path, name):
    path = llama_folder(tmp_path / "llama", **SMALL) / "config.json"
    right = json.loads(path.read_text()) | SCALED
    kind = LlamaConfig.__dataclass_fields__[name].type
    for value in {int: NOT_SIZES, float: NOT_NUMBERS, bool: ("true", 1, [])}[kind]:
        path.write_text(json.dumps(right | {name: value}))
        with pytest.raises(ValueError, match=f"config.json has no valid {name} "):
            LlamaConfig.from_json(path)


@pytest.mark.parametrize("name", ("rope_parameters", "rope_scaling"))
@pytest.mark.parametrize("value", ("linear", 2, ["linear"]))
def test_rotary_settings_must_be_an_object(tmp_path, name, value):
    folder = llama_folder(tmp_path / "llama", **SMALL)
    with pytest.raises(ValueError, match=f"config.json: {name} must be an object, found"):
        LlamaConfig.from_json(rewrite_config(folder, **{name: value}))


@pytest.mark.parametrize(
    "change", ({"num_key_value_heads": 4}, {"head_dim": 5}, SCALED | {"high_freq_factor": 1.0})
)
def test_sizes_that_do_not_go_together_are_an_error(tmp_path, change):
    folder = llama_folder(tmp_path / "llama", **SMALL)
    with pytest.raises(ValueError, match="must divide num_attention_heads, head_dim must"):
        LlamaConfig.from_json(rewrite_config(folder, **change))


def test_a_million_layers_are_refused_before_they_are_built(tmp_path):
    folder = llama_folder(tmp_path / "llama", **SMALL)
    rewrite_config(folder, num_hidden_layers=10**6)
    with pytest.raises(ValueError, match="at most 1000 layers; found .*num_hidden_layers=1000000"):
        Llama.from_pretrained(folder)


# ------------------------------------------------------------------------------------------ loading


def with_weights(folder, change, new):
    """A copy of `folder` at `new` with changed weights."""
    shutil.copytree(folder, new)
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, new / "model.safetensors")
    return new


def test_every_tensor_of_the_folder_is_loaded(folder, llama):
    stored, loaded = load_file(folder / "model.safetensors"), llama.state_dict()
    assert stored.keys() == loaded.keys()
    assert all(torch.equal(stored[name], loaded[name]) for name in stored)


def test_inv_freq_of_old_files_is_ignored(folder, tmp_path):
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    old = with_weights(folder, lambda w: w.update({name: torch.ones(3)}), tmp_path / "llama")
    assert name not in Llama.from_pretrained(old).state_dict()


def test_a_tied_model_loads_without_a_head_and_stays_tied(tmp_path):
    folder = llama_folder(tmp_path / "llama", **SMALL, tie_word_embeddings=True)
    assert "lm_head.weight" not in load_file(folder / "model.safetensors")
    llama = Llama.from_pretrained(folder)
    assert llama.lm_head.weight is llama.model.embed_tokens.weight
    assert sum(weight is llama.lm_head.weight for weight in llama.parameters()) == 1


def test_a_tied_model_without_embeddings_is_an_error_that_names_them(tmp_path):
    folder = llama_folder(tmp_path / "llama", **SMALL, tie_word_embeddings=True)
    name = "model.embed_tokens.weight"
    broken = with_weights(folder, lambda w: w.pop(name), tmp_path / "broken")
    with pytest.raises(ValueError, match=name):
        Llama.from_pretrained(broken)


def test_half_precision_is_kept_from_the_file_to_the_logits(folder):
    llama = Llama.from_pretrained(folder, torch.bfloat16)
    assert {weight.dtype for weight in llama.parameters()} == {torch.bfloat16}
    assert llama(make_golden.ids()).dtype == torch.bfloat16


def test_a_llama_in_shards_is_the_same(folder, llama, tmp_path):
    sharded = Llama.from_pretrained(shard(shutil.copytree(folder, tmp_path / "llama")))
    for name, tensor in llama.state_dict().items():
        assert torch.equal(sharded.state_dict()[name], tensor), name


@pytest.mark.parametrize("fault", FAULTS | INTEGERS)
@pytest.mark.parametrize("tied", (False, True))
def test_one_faulty_tensor_is_an_error_that_names_it(tmp_path, fault, tied):
    broken = llama_folder(tmp_path / "llama", num_hidden_layers=1, tie_word_embeddings=tied)
    weights = load_file(broken / "model.safetensors")
    for name in weights:
        faulty = dict(weights)
        (FAULTS | INTEGERS)[fault](faulty, name)
        save_file(faulty, broken / "model.safetensors")
        with pytest.raises(ValueError, match=rf"{fault}: {re.escape(name)}"):
            Llama.from_pretrained(broken)


def test_the_tensors_of_a_missing_shard_are_named(folder, tmp_path):
    sharded = shard(shutil.copytree(folder, tmp_path / "llama"))
    (sharded / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(ValueError, match="missing: model.layers.1.self_attn"):
        Llama.from_pretrained(sharded)


def test_shards_beside_a_whole_file_are_not_read(folder, llama, tmp_path):
    both = shutil.copytree(folder, tmp_path / "llama")
    save_file({"x": torch.ones(1)}, both / "model-00001-of-00001.safetensors")
    assert Llama.from_pretrained(both).config == llama.config


def test_a_file_that_was_cut_short_is_named(folder, tmp_path):
    cut = shutil.copytree(folder, tmp_path / "llama")
    whole = (cut / "model.safetensors").read_bytes()
    for keep in (0, 5, len(whole) // 2, len(whole) - 9):
        (cut / "model.safetensors").write_bytes(whole[:keep])
        with pytest.raises(ValueError, match="model.safetensors cannot be read"):
            Llama.from_pretrained(cut)


def test_another_file_of_weights_names_the_command_that_converts_it(tmp_path):
    with pytest.raises(FileNotFoundError, match=f"convert.py .*llama {tmp_path} --out"):
        Llama.from_pretrained(tmp_path)


def test_a_file_that_is_not_json_is_named(folder, tmp_path):
    broken = shutil.copytree(folder, tmp_path / "llama")
    for text in ("<html>", "[" * 200_000):
        (broken / "config.json").write_text(text)
        with pytest.raises(ValueError, match="llama/config.json is not JSON"):
            Llama.from_pretrained(broken)


LLAMA3_CONFIG = dict(
    vocab_size=128256, rms_norm_eps=1e-5, rope_theta=500000.0, bos_token_id=128000,
    eos_token_id=[128001, 128008, 128009], rope_scaling=dict(rope_type="llama3", factor=32.0,
    low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=8192),
)  # fmt: skip
PUBLISHED = {  # what their config.json says, as far as it shapes the computation
    "TinyLlama-1.1B-Chat": (dict(hidden_size=2048, intermediate_size=5632, num_hidden_layers=22,
        num_attention_heads=32, num_key_value_heads=4, vocab_size=32000, rms_norm_eps=1e-5,
        rope_theta=10000.0, max_position_embeddings=2048), 1_100_048_384),
    "Llama-2-7b": (dict(hidden_size=4096, intermediate_size=11008, num_hidden_layers=32,
        num_attention_heads=32, vocab_size=32000, rms_norm_eps=1e-5), 6_738_415_616),
    "Llama-2-13b": (dict(hidden_size=5120, intermediate_size=13824, num_hidden_layers=40,
        num_attention_heads=40, num_key_value_heads=40, vocab_size=32000, rms_norm_eps=1e-5),
        13_015_864_320),
    "open_llama_3b": (dict(hidden_size=3200, intermediate_size=8640, num_hidden_layers=26,
        num_attention_heads=32, vocab_size=32000, rms_norm_eps=1e-6), 3_426_473_600),
    "Yi-6B": (dict(hidden_size=4096, intermediate_size=11008, num_hidden_layers=32,
        num_attention_heads=32, num_key_value_heads=4, vocab_size=64000, rms_norm_eps=1e-5,
        rope_theta=5e6), 6_061_035_520),
    "EuroLLM-1.7B": (dict(hidden_size=2048, intermediate_size=5632, num_hidden_layers=24,
        num_attention_heads=16, num_key_value_heads=8, vocab_size=128000, rms_norm_eps=1e-5,
        rope_theta=10000.0, eos_token_id=4), 1_656_850_432),
    "EuroLLM-9B": (dict(hidden_size=4096, intermediate_size=12288, num_hidden_layers=42,
        num_attention_heads=32, num_key_value_heads=8, head_dim=128, vocab_size=128000,
        rms_norm_eps=1e-5, rope_theta=10000.0, eos_token_id=4), 9_152_319_488),
    "SmolLM2-135M": (dict(hidden_size=576, intermediate_size=1536, num_hidden_layers=30,
        num_attention_heads=9, num_key_value_heads=3, vocab_size=49152, rms_norm_eps=1e-5,
        rope_theta=100000.0, tie_word_embeddings=True), 134_515_008),
    "Llama-3.2-1B": (dict(hidden_size=2048, intermediate_size=8192, num_hidden_layers=16,
        num_attention_heads=32, num_key_value_heads=8, head_dim=64, tie_word_embeddings=True,
        **LLAMA3_CONFIG), 1_235_814_400),
    "Llama-3.1-8B": (dict(hidden_size=4096, intermediate_size=14336, num_hidden_layers=32,
        num_attention_heads=32, num_key_value_heads=8, **LLAMA3_CONFIG
        | dict(rope_scaling=LLAMA3_CONFIG["rope_scaling"] | dict(factor=8.0))), 8_030_261_248),
    "TowerInstruct-7B": (dict(hidden_size=4096, intermediate_size=11008, num_hidden_layers=32,
        num_attention_heads=32, num_key_value_heads=32, vocab_size=32007, rms_norm_eps=1e-5,
        rope_theta=10000.0, eos_token_id=32005), 6_738_472_960),
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_geometry_is_built_with_its_number_of_parameters(tmp_path, name):
    config, n = PUBLISHED[name]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with torch.device("meta"):
        llama = Llama(LlamaConfig.from_json(tmp_path / "config.json"))
    assert sum(p.numel() for p in llama.parameters()) == n


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="no /proc on this system")
def test_loading_never_holds_two_copies(tmp_path):
    """From float32 files to bfloat16: the peak is little more than the bfloat16 weights."""
    sizes = dict(num_hidden_layers=24, hidden_size=384, intermediate_size=1040, head_dim=64,
                 num_key_value_heads=6, vocab_size=68)  # fmt: skip
    big = shard(llama_folder(tmp_path / "big", **sizes))
    Llama.from_pretrained(llama_folder(tmp_path / "warm"), torch.bfloat16)
    with peak_memory() as peak:
        llama = Llama.from_pretrained(big, torch.bfloat16)
    size = sum(weight.nbytes for weight in llama.parameters())
    largest = max(2 * weight.nbytes for weight in llama.parameters())
    assert peak() < 1.25 * size + 4 * largest


# ------------------------------------------------------------------------------------ the tokenizer


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return Tokenizer(llama_folder(tmp_path_factory.mktemp("toys") / "llama"))


@pytest.mark.parametrize(
    "text",
    (
        "Où est passée la garçonnière de l'évêque ?",
        "Größere Füße heißen Übermaß: 12,5 %!",
        "¿Cómo está el niño? ¡Ñandú!",
        "It's a test, isn't it?",
        "merci 🙂 bien",
    ),
)
def test_decoding_the_ids_of_a_text_gives_the_text(tokenizer, text):
    ids = tokenizer.encode(text)
    assert not {tokenizer.bos_id, *tokenizer.eos_ids} & set(ids)
    assert tokenizer.decode(ids) == text


@pytest.mark.parametrize("text", ("</s>", "<s>", "a </s> b", "<unk>"))
def test_a_special_token_in_the_text_is_text(tokenizer, text):
    ids = tokenizer.encode(text)
    assert all(not tokenizer.pieces.is_control(i) for i in ids)
    assert tokenizer.decode(ids) == text


def test_decoding_drops_special_ids_and_ids_beyond_the_vocabulary(tokenizer):
    ids = tokenizer.encode("merci bien")
    beyond = tokenizer.n_pieces
    framed = [tokenizer.bos_id, *ids, tokenizer.eos_id, beyond, beyond + 700]
    assert tokenizer.decode(framed) == "merci bien"
    assert tokenizer.decode([]) == ""


def test_special_ids_are_those_of_the_config(tmp_path):
    several = llama_folder(tmp_path / "several", bos_token_id=7, eos_token_id=[5, 2])
    tokenizer = Tokenizer(several)
    assert tokenizer.bos_id == 7
    assert tokenizer.eos_ids == [5, 2]
    assert tokenizer.eos_id == 5


def test_without_special_ids_in_the_config_those_of_the_tokenizer_are_used(tmp_path):
    folder = llama_folder(tmp_path / "llama")
    rewrite_config(folder, bos_token_id=None, eos_token_id=None)
    tokenizer = Tokenizer(folder)
    assert (tokenizer.bos_id, tokenizer.eos_ids) == (1, [2])


def test_a_folder_without_a_tokenizer_is_an_error_that_names_it(tmp_path):
    folder = llama_folder(tmp_path / "llama")
    (folder / "tokenizer.model").unlink()
    message = "has no tokenizer.model or tokenizer.json; download one"
    with pytest.raises(FileNotFoundError, match=message):
        Tokenizer(folder)


def test_a_tokenizer_in_the_other_format_of_llama_3_is_an_error_that_names_the_right_file(tmp_path):
    folder = llama_folder(tmp_path / "llama")
    (folder / "tokenizer.model").write_text("IQ== 0\nIg== 1\nIw== 2\n")
    with pytest.raises(ValueError, match="Llama 3; remove it, and download tokenizer.json"):
        Tokenizer(folder)


# ---------------------------------------------------------------------------------- byte-level BPE

BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
SPLITS = {  # name: the steps of "pre_tokenizer", ignore_merges
    "SmolLM2": (
        [{"type": "Digits", "individual_digits": True}, BYTE_LEVEL | {"use_regex": True}], False,
    ),
    "Llama 3": (
        [{"type": "Split", "pattern": {"Regex": llama_file.LLAMA3}, "behavior": "Isolated",
          "invert": False}, BYTE_LEVEL | {"use_regex": False}], True,
    ),
}  # fmt: skip
MERGES = [("l", "l"), ("Ġ", "ll"), ("a", "b"), ("b", "c"), ("ab", "c"), ("Ã", "¹"), ("Ġ", "Ġ")]
TEXTS = (
    "Où 12 ans ?", "Là-bas,  345 élèves!\n\n", "it's IT'S we'll WE'LL '\u017f", "e\u0301 \u00e9",
    "", "日本語、テキスト。", "Привет, мир", "مرحبا 123 בוקר", "தமிழ் ไทย", "🙂👩\u200d👧 a",
    "\t\r\n x\r\n", " a  b   c ", "\u00a0\u2003\u3000x", "\x1c\x1d\x85\u200b", "²½Ⅷ٣४",
    "</s><|im_end|><|endoftext|>", "x" * 300,
)  # fmt: skip


def bpe_json(split: str, **changes) -> dict:
    """The content of a tokenizer.json with all bytes, a few merges and two special tokens."""
    steps, ignore_merges = SPLITS[split]
    pieces = ["<|begin|>", "<|im_end|>", *llama_file.BYTE_CHARACTERS]
    pieces += [a + b for a, b in MERGES] + ["Ġxyz"]
    special = [{"id": i, "content": pieces[i], "special": True} for i in (0, 1)]
    model = {"type": "BPE", "dropout": None, "unk_token": None, "ignore_merges": ignore_merges}
    model |= {"vocab": {piece: i for i, piece in enumerate(pieces)}, "merges": MERGES}
    raw = {"normalizer": None, "added_tokens": special, "decoder": BYTE_LEVEL | {"use_regex": True}}
    raw |= {"pre_tokenizer": {"type": "Sequence", "pretokenizers": steps}, "model": model}
    model |= {name: value for name, value in changes.items() if name not in raw}
    return raw | {name: value for name, value in changes.items() if name in raw}


def bpe_folder(folder, split="SmolLM2", **changes):
    llama_folder(folder, **SMALL, bos_token_id=0, eos_token_id=1)
    (folder / "tokenizer.model").unlink()
    (folder / "tokenizer.json").write_text(json.dumps(bpe_json(split, **changes)))
    return folder


def words_of(text: str, split: str) -> list[str]:
    words = [text]
    for pattern in dict(zip(SPLITS, ([llama_file.DIGITS, llama_file.GPT2], [llama_file.LLAMA3])))[
        split
    ]:
        words = [w for part in words for w in llama_file.compile_pattern(pattern).findall(part)]
    return words


@pytest.mark.parametrize(
    ("split", "text", "words"),
    (
        ("SmolLM2", "Où 1234 ?", ["Où", " ", "1", "2", "3", "4", " ?"]),
        ("Llama 3", "Où 1234 ?", ["Où", " ", "123", "4", " ?"]),
        ("SmolLM2", "it's  IT'S", ["it", "'s", " ", " IT", "'", "S"]),
        ("Llama 3", "it's  IT'S", ["it", "'s", " ", " IT", "'S"]),
        ("SmolLM2", "a\n\nb", ["a", "\n", "\n", "b"]),
        ("Llama 3", "a\n\nb", ["a", "\n\n", "b"]),
        ("SmolLM2", "a\x1cb", ["a", "\x1c", "b"]),  # re calls this white space, Unicode does not
    ),
)
def test_a_text_is_split_into_words(split, text, words):
    assert words_of(text, split) == words


@pytest.mark.parametrize("split", SPLITS)
def test_the_words_of_a_text_are_the_whole_text(split):
    for text in TEXTS:
        assert "".join(words_of(text, split)) == text


def test_every_byte_has_its_own_printable_character():
    assert len(set(llama_file.BYTE_CHARACTERS)) == 256
    assert all(c.isprintable() and c != " " for c in llama_file.BYTE_CHARACTERS)
    assert llama_file.BYTE_CHARACTERS[ord("a")] == "a" and llama_file.BYTE_CHARACTERS[32] == "Ġ"


@pytest.mark.parametrize(
    ("word", "pieces"),
    (
        (" lll", ["Ġll", "l"]),  # of two places for the merge l + l, the left one
        ("abc", ["abc"]),
        ("bcab", ["bc", "ab"]),
        ("aabcc", ["a", "abc", "c"]),  # a + b has a lower rank than b + c
        ("ù", ["Ã¹"]),
        (" xyz", ["Ġ", "x", "y", "z"]),
    ),
)
def test_the_merge_with_the_lowest_rank_is_applied_first(tmp_path, word, pieces):
    tokenizer = Tokenizer(bpe_folder(tmp_path / "llama"))
    assert tokenizer.pieces.split_word(word) == pieces


def test_with_ignore_merges_a_word_of_the_vocabulary_is_one_piece(tmp_path):
    tokenizer = Tokenizer(bpe_folder(tmp_path / "llama", "Llama 3"))
    assert tokenizer.pieces.split_word(" xyz") == ["Ġxyz"]
    assert tokenizer.pieces.split_word(" xyzz") == ["Ġ", "x", "y", "z", "z"]


@pytest.mark.parametrize("split", SPLITS)
def test_decoding_without_strip_gives_the_text_back(tmp_path, split):
    tokenizer = Tokenizer(bpe_folder(tmp_path / "llama", split))
    for text in TEXTS:
        ids = tokenizer.encode(text)
        assert tokenizer.pieces.decode(ids) == text
        assert tokenizer.decode(ids) == text.strip()
        assert not {0, 1} & set(ids)  # a special token in a text is text


def test_ids_that_are_not_text_are_left_out_and_broken_characters_are_marked(tmp_path):
    tokenizer = Tokenizer(bpe_folder(tmp_path / "llama"))
    first, second = tokenizer.pieces.split_word("ab")[0], tokenizer.encode("é")
    assert first == "ab"
    assert tokenizer.decode([0, *second, 1, 9999]) == "é"
    assert tokenizer.decode(second[:1] + tokenizer.encode("a")) == "\ufffda"


def test_a_byte_without_a_piece_is_left_out(tmp_path):
    raw = bpe_json("SmolLM2")
    raw["model"]["vocab"].pop("Ą")  # byte 4
    (bpe_folder(tmp_path / "llama") / "tokenizer.json").write_text(json.dumps(raw))
    tokenizer = Tokenizer(tmp_path / "llama")
    assert tokenizer.decode(tokenizer.encode("a\x04b")) == "ab"


def test_merges_of_old_and_new_files_give_the_same_ids(tmp_path):
    old = Tokenizer(bpe_folder(tmp_path / "old", merges=[f"{a} {b}" for a, b in MERGES]))
    new = Tokenizer(bpe_folder(tmp_path / "new"))
    assert [old.encode(text) for text in TEXTS] == [new.encode(text) for text in TEXTS]


def test_end_tokens_are_those_of_both_files(tmp_path):
    folder = bpe_folder(tmp_path / "llama")
    (folder / "generation_config.json").write_text('{"eos_token_id": [1, 0], "bos_token_id": null}')
    tokenizer = Tokenizer(folder)
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.eos_ids) == (0, 1, [1, 0])
    assert tokenizer.special_id("<|im_end|>") == 1
    with pytest.raises(ValueError, match=r"no <\|eot_id\|> token; choose another template"):
        tokenizer.special_id("<|eot_id|>")


def test_with_both_tokenizers_in_a_folder_tokenizer_model_is_read(tmp_path):
    folder = bpe_folder(tmp_path / "llama")
    assert Tokenizer(folder).file == folder / "tokenizer.json"
    shutil.copy(TINY / "llama" / "tokenizer.model", folder)
    assert Tokenizer(folder).file == folder / "tokenizer.model"
    assert [file.name for file in tokenizer_files(folder)][0] == "tokenizer.model"


@pytest.mark.parametrize(
    ("changes", "message"),
    (
        ({"type": "Unigram"}, "'type': 'Unigram'"),
        ({"type": "WordPiece"}, "'type': 'WordPiece'"),
        ({"byte_fallback": True, "unk_token": "<unk>"}, "'byte_fallback': True"),
        ({"dropout": 0.1}, "'dropout': 0.1"),
        ({"normalizer": {"type": "NFC"}}, "'normalizer': {'type': 'NFC'}"),
        ({"decoder": None}, "'decoder': None"),
        ({"pre_tokenizer": None}, "pre_tokenizer is not supported: None"),
        ({"pre_tokenizer": {"type": "Metaspace"}}, "pre_tokenizer is not supported: .*Metaspace"),
        ({"merges": [["a", "q"]]}, r"the merge \('a', 'q'\) has a piece that is not in"),
        ({"merges": ["a b c"]}, "too many values"),
        ({"vocab": {"a b": 1}}, "the piece 'a b' does not consist of bytes"),
        ({"vocab": []}, "has no attribute 'items'"),
        ({"added_tokens": [{"id": 3}]}, "content"),
        ({"model": None}, "has no attribute 'items'"),
    ),
)
def test_a_tokenizer_json_of_another_kind_is_an_error_that_names_it(tmp_path, changes, message):
    folder = bpe_folder(tmp_path / "llama", **changes)
    with pytest.raises(
        ValueError, match=f"tokenizer.json cannot be read as byte.*{message}.*; copy"
    ):
        Tokenizer(folder)


@pytest.mark.parametrize("value", (-1, "2", 2.5, None))
def test_ids_in_tokenizer_json_are_integers_from_0(tmp_path, value):
    folder = bpe_folder(
        tmp_path / "llama", vocab=bpe_json("SmolLM2")["model"]["vocab"] | {"a": value}
    )
    with pytest.raises(ValueError, match="ids of all tokens must be integers >= 0, found"):
        Tokenizer(folder)


# ------------------------------------------------------ byte-level BPE as in the library tokenizers


WHOLE_WORD = " qzxqzx"  # trained_bpe adds it to the vocabulary; no merges lead to it


def random_texts(n: int) -> list[str]:
    """Texts in many scripts: TEXTS, and random pieces of them with random characters between."""
    rng = random.Random(0)
    alphabets = [
        "aàéîöüßñçāčșžæøŵģķļŀ",
        "ÀÉÜŠĞİ",
        "abcdefgh '",
        "бвгдеёжөү",
        "ابتثجپچژگ",
        "日本語中文字か",
        "தமிழ்",
        "🙂🎉👍🏽",
        "0123456789²٣",
        " \t\n\r\u00a0",
        ".,;:!?-—«»\"'()",
        "\u0301\u0308\u200d",
        "אבג",
        "ნოქ",
    ]
    texts = list(TEXTS) + [unicodedata.normalize("NFD", text) for text in TEXTS]
    while len(texts) < n:
        parts = [rng.choice(TEXTS)[: rng.randrange(9)]]
        for _ in range(rng.randrange(1, 12)):
            alphabet = rng.choice(alphabets)
            parts.append("".join(rng.choice(alphabet) for _ in range(rng.randrange(1, 6))))
            words = "", " ", "'s", "'LL", "'re", "<|im_end|>", "</s>", "the", WHOLE_WORD
            parts.append(rng.choice(words))
        texts.append("".join(parts))
    return texts


def trained_bpe(folder: Path, split: str) -> Path:
    """A tokenizer.json that the library trains on the included corpus, in a folder of its own."""
    tokenizers = pytest.importorskip("tokenizers", reason="the reference is not installed")
    raw = bpe_json(split)
    empty = json.dumps(
        raw | {"model": raw["model"] | {"vocab": {}, "merges": []}, "added_tokens": []}
    )
    theirs = tokenizers.Tokenizer.from_str(empty)
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=1200, special_tokens=["<|begin|>", "<|im_end|>"], show_progress=False,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    table = (TINY / "corpus" / "fr" / "fr-en.tsv").read_text(encoding="utf-8")
    texts = [text.replace(WHOLE_WORD, "") for text in random_texts(500)]
    theirs.train_from_iterator(texts + table.splitlines(), trainer)
    raw = json.loads(theirs.to_str())
    raw["model"]["vocab"][WHOLE_WORD.replace(" ", "Ġ")] = theirs.get_vocab_size()
    bpe_folder(folder)
    (folder / "tokenizer.json").write_text(json.dumps(raw))
    return folder


def real_smollm2() -> Path:
    weights = WEIGHTS / "SmolLM2-135M-Instruct"
    if not (weights / "tokenizer.json").is_file():
        pytest.skip(f"the public weights are not in {weights}")
    return weights


@pytest.mark.parametrize("kind", (*SPLITS, "real SmolLM2"))
def test_ids_and_texts_equal_those_of_the_library_tokenizers(tmp_path, kind):
    tokenizers = pytest.importorskip("tokenizers", reason="the reference is not installed")
    folder = real_smollm2() if "real" in kind else trained_bpe(tmp_path / "llama", kind)
    ours = Tokenizer(folder)
    theirs = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    theirs.encode_special_tokens = True  # special tokens in a text are text
    rng, n_exact = random.Random(1), 0
    for text in random_texts(2000):
        ids = ours.encode(text)
        assert ids == theirs.encode(text, add_special_tokens=False).ids, text
        if {llama_file.BYTE_CHARACTERS[byte] for byte in text.encode()} <= ours.pieces.vocab.keys():
            assert ours.pieces.decode(ids) == text
            n_exact += 1
        anything = [rng.randrange(ours.n_pieces) for _ in range(8)]  # often not valid UTF-8
        assert ours.pieces.decode(anything) == theirs.decode(anything, skip_special_tokens=True)
    assert n_exact >= (1000 if "real" in kind else 2000)  # SmolLM2 has no piece for some bytes


@pytest.mark.parametrize("name", (r"\p{L}", r"\p{N}", r"\s", r"\S"))
def test_character_classes_equal_those_of_regex(name):
    regex = pytest.importorskip("regex", reason="the reference is not installed")
    ours = re.compile(f"[{llama_file.character_classes()[name]}]")
    theirs = regex.compile(name)
    # regex may know a newer version of Unicode. Skip characters that Python's version does not.
    known = [c for c in map(chr, range(0x110000)) if unicodedata.category(c) not in ("Cn", "Cs")]
    assert [c for c in known if bool(ours.match(c)) != bool(theirs.match(c))] == []


@torch.no_grad()
def assert_equals_transformers(folder: Path, prompts: list[list[int]], eos_ids: list[int]):
    """The same logits, and the same answers with one beam and with five."""
    transformers = pytest.importorskip("transformers", reason="the reference is not installed")
    theirs = transformers.LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ours = Llama.from_pretrained(folder)
    for ids in (torch.tensor([prompt]) for prompt in prompts):
        assert_close(ours(ids), theirs(ids).logits, 5e-4)
        for beams in (1, 5):
            [[best, *_]] = beam_search(
                ours, [ours.embed(ids[0])], eos_ids, SearchOptions(beams, 1.0, 12)
            )
            answer = theirs.generate(ids, max_new_tokens=12, num_beams=beams, do_sample=False)[0]
            answer = answer[len(ids[0]) :].tolist()
            assert best.ids == [i for i in answer if i not in eos_ids]


def test_the_public_smollm2_equals_transformers():
    folder = real_smollm2()
    tokenizer = Tokenizer(folder)
    texts = "The capital of France is", "Où est la gare ?", "1 2 3 4"
    assert_equals_transformers(folder, [tokenizer.encode(t) for t in texts], tokenizer.eos_ids)


def test_a_small_llama_with_the_settings_of_llama_3_equals_transformers(tmp_path):
    folder = llama_folder(tmp_path / "llama", **LLAMA3_CONFIG, tie_word_embeddings=True)
    prompts = [[128000, 1, 77, 128006, 5], [9, 100_000, 3], [128000, 40, 41]]
    assert_equals_transformers(folder, prompts, LLAMA3_CONFIG["eos_token_id"])


def test_added_tokens_are_read_from_either_file(tmp_path):
    folder = llama_folder(tmp_path / "llama")
    tokens = {
        "1300": {"content": "<|im_start|>"},
        "1301": {"content": "<|im_end|>", "lstrip": True},
    }
    (folder / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": tokens}))
    (folder / "added_tokens.json").write_text('{"<|pad|>": 1302}')
    tokenizer = Tokenizer(folder)
    assert tokenizer.special_id("<|im_start|>") == 1300
    assert tokenizer.special_id("<|im_end|>") == 1301
    assert tokenizer.special_id("<|pad|>") == 1302


@pytest.mark.parametrize(
    "tokens", (7, [], {"x": {"content": "<|im_end|>"}}, {"7": "<|im_end|>"}, {"7": {}})
)
def test_added_tokens_of_another_form_are_an_error_that_names_the_file(tmp_path, tokens):
    folder = llama_folder(tmp_path / "llama")
    (folder / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": tokens}))
    with pytest.raises(ValueError, match="tokenizer_config.json: added_tokens_decoder must map"):
        Tokenizer(folder)


@pytest.mark.parametrize("content", (b"", b"version https://git-lfs.github.com/spec/v1\n"))
def test_a_damaged_tokenizer_is_an_error_that_names_it(tmp_path, content):
    folder = llama_folder(tmp_path / "llama")
    (folder / "tokenizer.model").write_bytes(content)
    with pytest.raises(
        ValueError, match="llama/tokenizer.model cannot be read as a sentencepiece model"
    ):
        Tokenizer(folder)


@pytest.mark.parametrize("value", (-1, "2", 2.0, True, {}, [], [2, "x"], [2, -1]))
def test_special_ids_are_integers_from_0(tmp_path, value):
    folder = llama_folder(tmp_path / "llama")
    for name, good in (("bos_token_id", 1), ("eos_token_id", 2)):
        with pytest.raises(ValueError, match="ids of all tokens must be integers >= 0"):
            Tokenizer(rewrite_config(folder, **{name: value}).parent)
        rewrite_config(folder, **{name: good})
    (folder / "added_tokens.json").write_text(json.dumps({"<|im_end|>": value}))
    with pytest.raises(ValueError, match="ids of all tokens must be integers >= 0"):
        Tokenizer(folder)


@pytest.mark.parametrize("name", ("config.json", "tokenizer_config.json", "added_tokens.json"))
def test_a_file_without_a_json_object_is_an_error_that_names_it(tmp_path, name):
    folder = llama_folder(tmp_path / "llama")
    for text, message in (
        ("{", "is not JSON"),
        ("[7]", r"must contain a JSON object, found \[7\]"),
    ):
        (folder / name).write_text(text)
        with pytest.raises(ValueError, match=f"llama/{name} {message}"):
            Tokenizer(folder)
