"""Llama: a decoder-only transformer with a key/value cache, and its tokenizer.

    ids (B, T) -> embeddings (B, T, D) -> layers of attention and SwiGLU -> logits (B, T, V)

Papers: Llama 2 (2307.09288), Llama 3 (2407.21783), rotary positions (2104.09864), grouped-query
attention (2305.13245), byte-pair encoding (1508.07909).
The modules have the names of Hugging Face checkpoints, so weights load without renaming. Rotary
positions use the Hugging Face order: dimension i is paired with dimension i + Dh/2. One pass over
all tokens and several passes with a cache give the same states, and transformers gives the same
states, too: see tests/test_llama.py. A tokenizer splits a text into frequent words and parts of
words ("pieces"), and each piece has an id. Llama 2 uses the library sentencepiece. Llama 3 and
SmolLM2 use byte-level byte-pair encoding, which is written out at the end of this file.

Sizes: B batch, T tokens of this call (in LLaST this includes the speech, see P in llast.py),
L keys in the cache and in this call, D width, H query heads, Hk key/value heads, G query heads for
each key/value head, Dh head width, V vocabulary.
"""

import math
import re
import unicodedata
from dataclasses import dataclass, fields
from functools import lru_cache
from itertools import groupby, pairwise
from pathlib import Path
from typing import get_origin

import sentencepiece
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from whisper_encoder import check_tensors, read_json, read_tensors, weight_files


class Cache:
    """Keys and values of every layer, for the positions that later tokens attend to.

    The tensors are longer than needed. New keys and values are written into the unused part, so the
    old ones are not copied at each step.
    """

    def __init__(self, layers: list[tuple[Tensor, Tensor]]):
        self.layers = layers  # keys and values, both (B, Hk, capacity, Dh)
        # The number of used positions. At first all are used; `reserve` adds unused ones.
        self.length = layers[0][0].shape[2]

    def reserve(self, n: int):
        """Make the tensors longer if n more positions do not fit.

        They grow by at least half of their length, so this copy is rare.
        """
        capacity = self.layers[0][0].shape[2]
        if self.length + n > capacity:
            more = max(n, capacity // 2)
            self.apply_to_all(lambda x: F.pad(x, (0, 0, 0, more)))

    def keep(self, rows: list[int]):
        """Keep only these rows of the batch, in this order."""
        self.apply_to_all(lambda x: x[rows])

    def apply_to_all(self, change):
        """Replace the keys and the values of each layer by change(keys) and change(values)."""
        # One layer at a time, so that memory never holds two complete caches.
        for i, (k, v) in enumerate(self.layers):
            self.layers[i] = change(k), change(v)


# These settings of config.json have only one supported value. None: the setting must be missing.
SUPPORTED_VALUES = {
    "model_type": "llama", "hidden_act": "silu", "attention_bias": False, "mlp_bias": False,
    "rope_type": "default", "type": "default", "partial_rotary_factor": 1.0, "sliding_window": None,
}  # fmt: skip


@dataclass(frozen=True)
class LlamaConfig:
    """The values in config.json of a Llama checkpoint that change what is computed."""

    hidden_size: int  # D
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int  # H
    num_key_value_heads: int  # Hk, divides H
    head_dim: int  # Dh
    vocab_size: int  # V
    rms_norm_eps: float
    rope_theta: float
    tie_word_embeddings: bool
    # The next four fields make slow rotary positions slower ("rope_type": "llama3", see
    # scale_frequency). With these defaults they change nothing.
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192

    @classmethod
    def from_json(cls, path) -> "LlamaConfig":
        """Read config.json. Raise ValueError for a wrong, missing or unsupported value."""
        path = Path(path)
        # JSON null means the same as a missing value.
        raw = {name: value for name, value in read_json(path).items() if value is not None}
        for name in ("rope_parameters", "rope_scaling"):
            # transformers 5 stores rope_theta inside `rope_parameters`. If rope_theta is also
            # outside, transformers uses the inner value, so do the same here.
            inner = raw.get(name, {})
            if not isinstance(inner, dict):
                raise ValueError(f"{path}: {name} must be an object, found {inner!r:.60}")
            raw |= {key: value for key, value in inner.items() if value is not None}
        scaling = {field.name: field.default for field in fields(cls)[-4:]}  # the defaults
        if raw.get("rope_type") == "llama3":
            scaling = {"rope_type": "llama3"}  # the four values are required
        supported = (SUPPORTED_VALUES | scaling).items()
        unsupported = {k: raw[k] for k, value in supported if raw.get(k, value) != value}
        if unsupported:
            raise ValueError(f"{path}: not supported: {unsupported!r:.200}; use another model")

        # Old config.json files do not have the first two values.
        raw = {"rope_theta": 10_000.0, "tie_word_embeddings": False} | scaling | raw
        D, H = raw.get("hidden_size"), raw.get("num_attention_heads")
        raw.setdefault("num_key_value_heads", H)
        # check_fields below reports wrong types. This division must not fail before that.
        if type(D) is int and type(H) is int and H > 0:
            raw.setdefault("head_dim", D // H)
        config = check_fields(cls, raw, path)
        H, Hk = config.num_attention_heads, config.num_key_value_heads
        fits = H % Hk == 0 and config.head_dim % 2 == 0 and config.num_hidden_layers <= 1000
        if not fits or config.low_freq_factor >= config.high_freq_factor:
            raise ValueError(
                f"{path}: num_key_value_heads must divide num_attention_heads, head_dim must be "
                f"even, low_freq_factor below high_freq_factor, at most 1000 layers; found {config}"
            )
        return config


def check_fields(cls, values: dict, path: Path, lowest: float = 1e-12):
    """Build the dataclass `cls` from JSON values.

    Raise ValueError if a value has the wrong type, is smaller than `lowest`, or is larger than in
    any real model. By default 0 is too small. A size that is far too large would otherwise fail
    later, without the name of the file.
    """
    types = {int: (int,), float: (int, float), bool: (bool,), str: (str,), tuple: (tuple,)}
    highest = {int: 10**6, float: 10**12}
    for field in fields(cls):
        kind = get_origin(field.type) or field.type  # tuple[str, ...] becomes tuple
        value, limits = values.get(field.name), ""
        is_valid = type(value) in types[kind]
        if kind in highest:
            limits = f" from {lowest:g} to {highest[kind]:,}"
            is_valid = is_valid and lowest <= value <= highest[kind]
        if not is_valid:
            wanted = f"{field.name} ({kind.__name__}{limits})"
            raise ValueError(f"{path} has no valid {wanted}, found {value!r:.40}; copy it again")
    return cls(**{field.name: values[field.name] for field in fields(cls)})


# --------------------------------------------------------------------------------------- the layers

# On some GPUs, PyTorch would choose the attention kernel of cuDNN. It prepares every new shape, and
# this takes much longer than the attention itself. Here most batches, and all steps of a
# translation, have new shapes.
torch.backends.cuda.enable_cudnn_sdp(False)


class RMSNorm(nn.Module):
    """Divide each vector by its root mean square, multiply by a weight. (..., D) -> (..., D)

    It is a LayerNorm that does not subtract the mean and has no bias, so it computes less.
    """

    def __init__(self, D: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(D))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        # x / sqrt(mean(x^2) + eps) * weight. On a GPU this is one kernel, and written as a formula
        # it would be eight. Numbers in half precision are squared and summed in float32.
        return F.rms_norm(x, x.shape[-1:], self.weight, self.eps)


def rotary_angles(positions: Tensor, config: LlamaConfig) -> tuple[Tensor, Tensor]:
    """Cosine and sine of the angle of each dimension, in float32. (B, T) -> two of (B, 1, T, Dh)

    Attention itself does not know the order of the tokens. Rotary positions add it: each pair of
    dimensions of a query or key is rotated by an angle that is proportional to its position. So the
    score of a query and a key depends only on the distance between their positions, and on their
    content. A pair (a, b) becomes (a cos - b sin, b cos + a sin). The returned sine is negative in
    the first half of the dimensions, because a gets -b sin.
    """
    # The angle from one position to the next. Early pairs rotate fast, late pairs slowly.
    pair = torch.arange(0, config.head_dim, 2, device=positions.device) / config.head_dim  # (Dh/2,)
    frequency = scale_frequency(config.rope_theta**-pair, config)  # (Dh/2,)
    angle = positions[:, None, :, None] * frequency  # (B, 1, T, Dh/2)
    cos, sin = angle.cos(), angle.sin()
    return torch.cat([cos, cos], dim=-1), torch.cat([-sin, sin], dim=-1)  # (B, 1, T, Dh)


def scale_frequency(frequency: Tensor, config: LlamaConfig) -> Tensor:
    """Make the slow pairs slower, so that long texts need no new angles. (Dh/2,) -> (Dh/2,)

    Llama 3.1 was first trained on texts of up to original_max_position_embeddings tokens, later on
    texts that are longer by about `factor`. A pair that made only a part of a turn in a short text
    becomes slower by `factor`. A pair that made several turns has used all angles and stays as it
    is. A pair between these two limits becomes a little slower.
    """
    turns = config.original_max_position_embeddings * frequency / (2 * math.pi)
    low, high = config.low_freq_factor, config.high_freq_factor
    unchanged = ((turns - low) / (high - low)).clamp(0, 1)  # 1: unchanged, 0: slower by `factor`
    return torch.lerp(frequency / config.factor, frequency, unchanged)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate each pair of dimensions i and i + Dh/2. (B, H, T, Dh) -> (B, H, T, Dh)"""
    other = x.roll(x.shape[-1] // 2, dims=-1)  # the other dimension of each pair
    return torch.addcmul(x * cos, other, sin).to(x.dtype)  # x * cos + other * sin


class Attention(nn.Module):
    """Grouped-query attention: H query heads share Hk key/value heads. (B, T, D) -> (B, T, D)

    A smaller Hk makes the key/value cache smaller.
    """

    def __init__(self, config: LlamaConfig):
        super().__init__()
        D, H, Hk = config.hidden_size, config.num_attention_heads, config.num_key_value_heads
        self.Dh = config.head_dim
        self.q_proj = nn.Linear(D, H * self.Dh, bias=False)
        self.k_proj = nn.Linear(D, Hk * self.Dh, bias=False)
        self.v_proj = nn.Linear(D, Hk * self.Dh, bias=False)
        self.o_proj = nn.Linear(H * self.Dh, D, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, past=None, can_attend=None):
        """Return (y, (keys of x, values of x)).

        past: None, or (keys, values, n): the cache of this layer and its number n of used
        positions. can_attend: None, or the result of as_bias (B, 1, G*T, L): where a query may
        attend to a key. Llama.hidden lists how the two are used together.
        """
        B, T, D = x.shape
        q = self.q_proj(x).view(B, T, -1, self.Dh).transpose(1, 2)  # (B, H, T, Dh)
        k = self.k_proj(x).view(B, T, -1, self.Dh).transpose(1, 2)  # (B, Hk, T, Dh)
        v = self.v_proj(x).view(B, T, -1, self.Dh).transpose(1, 2)  # (B, Hk, T, Dh)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        present = k, v  # Llama.hidden builds a new cache from it, if there is none yet
        if past is not None:
            keys, values, n = past
            keys[:, :, n : n + T], values[:, :, n : n + T] = present
            k, v = keys[:, :, : n + T], values[:, :, : n + T]
        if x.device.type == "cpu" and torch.is_grad_enabled():
            # On a CPU, the backward pass of attention is much slower in bfloat16 than in float32.
            q, k, v = q.float(), k.float(), v.float()
        if can_attend is not None:
            # On a GPU, PyTorch has fast attention kernels. FlashAttention does not support a mask,
            # and the memory-efficient kernel does not support enable_gqa. With both, PyTorch uses a
            # slow kernel. So avoid enable_gqa: the T queries of the G heads that share one key head
            # become G*T queries of this head. This also reads the keys only once per group.
            q = q.reshape(B, k.shape[1], -1, self.Dh)  # (B, Hk, G*T, Dh)
        # With a cache, is_causal is False: there is a mask, or a single token attends to all keys.
        y = F.scaled_dot_product_attention(
            q, k, v, attn_mask=can_attend, is_causal=past is None, enable_gqa=can_attend is None
        )
        y = y.reshape(B, -1, T, self.Dh).to(x.dtype)  # (B, H, T, Dh)
        y = y.transpose(1, 2).reshape(B, T, -1)
        return self.o_proj(y), present


def as_bias(can_attend: Tensor, dtype: torch.dtype) -> Tensor:
    """Turn a mask into numbers that attention adds to its scores: 0 for True, -inf for False.

    Attention would do this itself, but in every layer again. The kernel on a GPU needs rows whose
    length in memory is a multiple of 8. Otherwise it would also copy the mask in every layer.
    """
    L = can_attend.shape[-1]
    bias = torch.zeros(*can_attend.shape[:-1], L + (-L) % 8, dtype=dtype, device=can_attend.device)
    return bias[..., :L].masked_fill_(~can_attend, -torch.inf)


class MLP(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x)). (..., D) -> (..., D)

    The gate decides for each hidden dimension how much of up(x) is used.
    """

    def __init__(self, config: LlamaConfig):
        super().__init__()
        D, hidden_width = config.hidden_size, config.intermediate_size
        self.gate_proj = nn.Linear(D, hidden_width, bias=False)
        self.up_proj = nn.Linear(D, hidden_width, bias=False)
        self.down_proj = nn.Linear(hidden_width, D, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class DecoderLayer(nn.Module):
    """Attention, then the MLP. Each reads a normalized copy of x and adds its result to x.

    If `selection` = (rows, positions) is given, the MLP is computed only for these n states, and
    only these are returned, (n, D). The other arguments are those of Attention.forward.
    """

    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.self_attn = Attention(config)
        self.mlp = MLP(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, x, cos, sin, past=None, can_attend=None, selection=None):
        y, present = self.self_attn(self.input_layernorm(x), cos, sin, past, can_attend)
        x = x + y
        if selection is not None:
            x = x[selection]  # (n, D)
        return x + self.mlp(self.post_attention_layernorm(x)), present


class Decoder(nn.Module):
    """Embeddings, layers and last norm. It has no forward: Llama.hidden runs its parts.

    It is a module only because names in checkpoints begin with `model.`.
    """

    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)


# ---------------------------------------------------------------------------------------- the model


class Llama(nn.Module):
    """A Llama with the names of the checkpoint: ids (B, T) -> logits (B, T, V).

    `embed`, `hidden` and `logits` are its three steps. They can be called one by one: LLaST puts
    speech embeddings between token embeddings, and computes logits only where they are needed.
    """

    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.config = config
        self.model = Decoder(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.recompute = False  # activation checkpointing: keep only the input of each layer
        self.tie_weights()

    def tie_weights(self):
        """If the configuration says so, use one matrix for embeddings and head. It saves V * D."""
        if self.config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    def embed(self, ids: Tensor) -> Tensor:
        """(B, T) -> (B, T, D)"""
        return self.model.embed_tokens(ids)

    def hidden(
        self, x: Tensor, cache: Cache | None = None, positions=None, can_attend=None, selection=None
    ) -> tuple[Tensor, Cache]:
        """Embeddings (B, T, D) -> normalized states of the last layer (B, T, D), and the cache.

        A given cache is changed in place and returned: the T tokens are added to it. Without one, a
        new cache is returned, and a token attends to itself and the tokens before it (causal).

        use                 cache  positions        can_attend         result
        training, prefill   None   None: 0 to T-1   None (causal)      (B, T, D) or (n, D)
        one new token       yes    (B, 1)           None (all keys)    (B, 1, D)
        T new tokens        yes    (B, T)           (B, T, L)          (B, T, D)

        positions: the position of each token. can_attend: True where token t may attend to key l.
        The L keys are the keys in the cache, then the T new keys. selection: (rows, positions) of n
        states. Only these are returned, (n, D). This saves work: after the last attention, no other
        state is needed.
        """
        B, T, D = x.shape
        if cache is None and can_attend is not None:
            raise ValueError("can_attend has no cache; leave it out and pad the rows on the right")
        if cache is not None and positions is None:
            raise ValueError("positions are missing; with a cache, give the position of each token")
        if cache is not None and can_attend is None and T > 1:
            raise ValueError(f"can_attend is missing; {T} new tokens with a cache need it")
        if positions is None:
            positions = torch.arange(T, device=x.device)[None]  # (1, T)
        if can_attend is not None:
            G = self.config.num_attention_heads // self.config.num_key_value_heads
            # One copy of the mask for each of the G heads, in the order of q in Attention.forward.
            can_attend = can_attend[:, None].repeat(1, 1, G, 1)  # (B, 1, G*T, L)
            can_attend = as_bias(can_attend, x.dtype)  # (B, 1, G*T, L)
        cos, sin = rotary_angles(positions, self.config)

        if cache is not None:
            cache.reserve(T)
        layers = []
        for i, layer in enumerate(self.model.layers):
            past = (*cache.layers[i], cache.length) if cache is not None else None
            layer_selection = selection if layer is self.model.layers[-1] else None
            inputs = x, cos, sin, past, can_attend, layer_selection
            if self.recompute and torch.is_grad_enabled():
                x, present = checkpoint(layer, *inputs, use_reentrant=False)
            else:
                x, present = layer(*inputs)
            layers.append(present)
        if cache is None:
            cache = Cache(layers)  # in training the caller does not use it
        else:
            cache.length += T
        return self.model.norm(x), cache

    def logits(self, states: Tensor) -> Tensor:
        """(..., D) -> (..., V)"""
        return self.lm_head(states)

    def forward(self, ids: Tensor) -> Tensor:
        states, _ = self.hidden(self.embed(ids))
        return self.logits(states)

    @classmethod
    def from_pretrained(cls, folder, dtype: torch.dtype = torch.float32, device="cpu") -> "Llama":
        """Read a Hugging Face folder of Llama with safetensors.

        The files must contain exactly the expected tensors. Old files also have
        `rotary_emb.inv_freq`. It is ignored, because it is computed from rope_theta.
        """
        folder = Path(folder)
        stored = {k: v for file in weight_files(folder) for k, v in read_tensors(file).items()}
        stored = {k: v for k, v in stored.items() if not k.endswith("rotary_emb.inv_freq")}
        config = LlamaConfig.from_json(folder / "config.json")
        with torch.device("meta"):
            llama = cls(config)
        expected = llama.state_dict()
        if config.tie_word_embeddings and "lm_head.weight" not in stored:
            del expected["lm_head.weight"]
        check_tensors(expected, stored, folder)
        # read_tensors does not read the tensors, it only maps the files into memory. So `to` reads
        # one tensor at a time, if the type or the device changes. Other tensors are read later.
        weights = {name: tensor.to(device, dtype) for name, tensor in stored.items()}
        embedding = weights["model.embed_tokens.weight"]
        # A tied checkpoint may have no lm_head. Then the embedding becomes the head.
        head = weights.setdefault("lm_head.weight", embedding)
        if config.tie_word_embeddings and not torch.equal(head, embedding):
            raise ValueError(f"{folder}: config.json ties lm_head to embed_tokens, but they differ")
        llama.load_state_dict(weights, assign=True)
        llama.tie_weights()
        return llama


# ------------------------------------------------------------------------------------ the tokenizer

# The files of the two kinds of tokenizer. The first file has the pieces. llast.py computes the
# fingerprint of an LLM from its weights, its config.json and these files.
SENTENCEPIECE_FILES = ("tokenizer.model", "tokenizer_config.json", "added_tokens.json")
BYTE_PAIR_FILES = ("tokenizer.json", "generation_config.json")


def tokenizer_files(folder: Path) -> list[Path]:
    """Return the files that Tokenizer reads in a folder, besides config.json.

    If a folder has both kinds, tokenizer.model is read. In folders of Llama 2, tokenizer.json has
    the same pieces in another format.
    """
    for names in (SENTENCEPIECE_FILES, BYTE_PAIR_FILES):
        if (folder / names[0]).is_file():
            return [folder / name for name in names]
    raise FileNotFoundError(f"{folder} has no tokenizer.model or tokenizer.json; download one")


def load_sentencepiece(file: Path) -> sentencepiece.SentencePieceProcessor:
    """Load tokenizer.model. Raise ValueError if the file has another format."""
    try:
        return sentencepiece.SentencePieceProcessor(model_file=str(file))
    except RuntimeError as error:
        # In Llama 3, tokenizer.model is a text file. Each line has a token in base64 and a number.
        reason = f"{error}; copy the file again"
        if re.match(rb"[A-Za-z0-9+/]+=* \d+\s", file.read_bytes()):
            reason = "it has the format of Llama 3; remove it, and download tokenizer.json instead"
        raise ValueError(f"{file} cannot be read as a sentencepiece model: {reason}") from error


# The other kind is byte-level byte-pair encoding (BPE). An example with the pieces of SmolLM2:
#
#   step 1   split the text into words                "Où 12 ?"  ->  "Où", " ", "1", "2", " ?"
#   step 2   write bytes as printable characters           "Où"  ->  "OÃ¹", because ù has two bytes
#   step 3   merge neighbours, the lowest rank first  O, Ã, ¹    ->  O, Ã¹
#   step 4   look up the ids                          O, Ã¹      ->  63, 45586
#
# A merge such as (Ã, ¹) was learned from text: the pair of neighbours that was most frequent became
# the merge with rank 0, then the next pair was counted, and so on. A rare word has more pieces than
# a frequent one, in the worst case its single bytes. So there are no unknown words.

# Step 1. Each pattern matches the whole text, part after part. \p{L} is a letter, \p{N} a number.
DIGITS = r"\p{N}|[^\p{N}]+"
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LLAMA3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
LLAMA3 += r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
# Each "pre_tokenizer" that is supported in tokenizer.json, and its patterns. SmolLM2 makes a word
# of every digit, Llama 3 of up to three digits.
BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
PRE_TOKENIZERS = (
    ([{"type": "Digits", "individual_digits": True}, BYTES | {"use_regex": True}], [DIGITS, GPT2]),
    ([{"type": "Split", "pattern": {"Regex": LLAMA3}, "behavior": "Isolated", "invert": False},
      BYTES | {"use_regex": False}], [LLAMA3]),
)  # fmt: skip
SPACES = "\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"


@lru_cache
def character_classes() -> dict[str, str]:
    r"""Return the characters of \p{L}, \p{N}, \s and \S, as they are written inside [...] for re.

    re does not know \p, and its \s has four more control characters: U+001C to U+001F. Letters and
    numbers are those of the Unicode version of this Python.
    """
    ranges = dict.fromkeys("CLMNPSZ", "")  # first letters of Unicode's categories
    for kind, group in groupby(map(chr, range(0x110000)), lambda c: unicodedata.category(c)[0]):
        characters = list(group)
        ranges[kind] += f"{characters[0]}-{characters[-1]}"
    return {r"\p{L}": ranges["L"], r"\p{N}": ranges["N"], r"\s": SPACES, r"\S": f"^{SPACES}"}


@lru_cache
def compile_pattern(pattern: str) -> re.Pattern:
    """Compile a pattern for re, with the characters of each class."""
    parts = re.split(r"(\[.*?\])", pattern)  # every second part has the form [...]
    for name, characters in character_classes().items():
        parts[::2] = [part.replace(name, f"[{characters}]") for part in parts[::2]]
        parts[1::2] = [part.replace(name, characters) for part in parts[1::2]]
    return re.compile("".join(parts))


# Step 2. Parts of a character, spaces and line breaks cannot be printed.
def byte_characters() -> list[str]:
    """Return a character for each byte 0 to 255: that of Latin-1 or, if it is invisible, another.

    For example, a space is "Ġ". tokenizer.json writes its pieces in this way.
    """
    others = map(chr, range(256, 512))
    return [c if c.isprintable() and c != " " else next(others) for c in map(chr, range(256))]


BYTE_CHARACTERS = byte_characters()
BYTE_OF = {character: byte for byte, character in enumerate(BYTE_CHARACTERS)}


class BytePairs:
    """Text <-> ids by byte-level BPE.

    vocab: the id of each piece. merges: pairs of pieces that become one piece, in the order of
    their rank. patterns: how to split a text into words. ignore_merges: a word that is in the
    vocabulary becomes one piece, even if no merges lead to it.
    """

    def __init__(self, vocab: dict[str, int], merges, patterns, ignore_merges=False):
        self.vocab, self.ignore_merges = vocab, ignore_merges
        self.piece_of = {i: piece for piece, i in vocab.items()}
        self.ranks = {(a, b): rank for rank, (a, b) in enumerate(merges)}
        self.patterns = [compile_pattern(pattern) for pattern in patterns]
        # Words repeat, so remember the pieces of the latest ones.
        self.split_word = lru_cache(maxsize=50_000)(self.split_word)

    def vocab_size(self) -> int:
        return max(self.piece_of, default=-1) + 1

    def encode(self, text: str) -> list[int]:
        words = [text]
        for pattern in self.patterns:
            words = [word for part in words for word in pattern.findall(part)]
        return [self.vocab[piece] for word in words for piece in self.split_word(word)]

    def split_word(self, word: str) -> list[str]:
        """Return the pieces of one word (steps 2 and 3).

        A byte that is not in the vocabulary is left out, as in the library tokenizers. SmolLM2 has
        no piece for 21 bytes: rare control characters, and bytes that hardly occur in UTF-8.
        """
        characters = "".join(BYTE_CHARACTERS[byte] for byte in word.encode())
        if self.ignore_merges and characters in self.vocab:
            return [characters]
        pieces = [character for character in characters if character in self.vocab]
        while len(pieces) > 1:
            pairs = enumerate(pairwise(pieces))
            rank, i = min((self.ranks.get(pair, math.inf), i) for i, pair in pairs)
            if rank == math.inf:
                break
            pieces[i : i + 2] = [pieces[i] + pieces[i + 1]]
        return pieces

    def decode(self, ids: list[int]) -> str:
        """Ids -> text. Ids of other tokens are left out. Bytes that are not UTF-8 become U+FFFD."""
        characters = "".join(self.piece_of.get(i, "") for i in ids)
        return bytes(BYTE_OF[character] for character in characters).decode(errors="replace")


def load_byte_pairs(file: Path) -> tuple[BytePairs, dict[str, int]]:
    """Load tokenizer.json. -> pieces, ids of all tokens by name

    Raise ValueError if the file is damaged, or has a setting that is not supported.
    """
    raw = read_json(file)
    try:
        patterns, model = check_settings(raw), raw["model"]
        special = {token["content"]: token["id"] for token in raw["added_tokens"]}
        vocab = {piece: i for piece, i in model["vocab"].items() if piece not in special}
        if wrong := [piece for piece in vocab if not set(piece) <= BYTE_OF.keys()]:
            raise ValueError(f"the piece {wrong[0]!r} does not consist of bytes")
        # Old files write a merge as "a b", new files as ["a", "b"].
        merges = [m.split(" ") if isinstance(m, str) else m for m in model["merges"]]
        if wrong := [(a, b) for a, b in merges if not {a, b, a + b} <= vocab.keys()]:
            raise ValueError(f"the merge {wrong[0]} has a piece that is not in the vocabulary")
        return BytePairs(vocab, merges, patterns, model.get("ignore_merges")), vocab | special
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        problem = f"{file} cannot be read as byte-level BPE of Llama 3 or SmolLM2: {error!s:.300}"
        raise ValueError(f"{problem}; copy the file again, or use another LLM") from error


def check_settings(raw: dict) -> list[str]:
    """Return the patterns of a tokenizer.json. Raise ValueError for an unsupported setting."""
    # In "model", null, false and "" switch a setting off.
    others = {"vocab", "merges", "ignore_merges"}
    settings = {k: v for k, v in raw["model"].items() if v and k not in others}
    settings |= {"normalizer": raw["normalizer"], "decoder": (raw["decoder"] or {}).get("type")}
    supported = {"type": "BPE", "normalizer": None, "decoder": "ByteLevel"}
    if settings != supported:
        raise ValueError(f"its settings must be {supported}, found {settings}")
    for steps, patterns in PRE_TOKENIZERS:
        if raw["pre_tokenizer"] == {"type": "Sequence", "pretokenizers": steps}:
            return patterns
    raise ValueError(f"its pre_tokenizer is not supported: {raw['pre_tokenizer']}")


class Tokenizer:
    """Text <-> ids with the tokenizer of a checkpoint, of either kind.

    For `encode`, "</s>" in a text is four ordinary characters, not the end token. A prompt gets its
    special tokens by id (`special_id`). The files of the folder contain these ids.
    Exception: if tokenizer.model declares a token as "user-defined symbol", `encode` gives its id
    wherever a text contains it. Some models declare their ChatML tokens in this way.
    """

    def __init__(self, folder):
        folder = Path(folder)
        self.file, *others = tokenizer_files(folder)
        config, generation = read_optional(folder / "config.json"), {}
        if self.file.suffix == ".json":
            self.pieces, self.id_of = load_byte_pairs(self.file)
            generation = read_optional(*others)
        else:
            self.pieces = load_sentencepiece(self.file)
            self.id_of = named_tokens(self.pieces, *others)
            defaults = {"bos_token_id": self.pieces.bos_id(), "eos_token_id": self.pieces.eos_id()}
            config = defaults | config
        self.bos_id: int = config.get("bos_token_id")
        # Generation stops at any end token. Each of the two files can have one or a list of them.
        ends = [file.get("eos_token_id", []) for file in (config, generation)]
        eos_ids = [i for end in ends for i in (end if isinstance(end, list) else [end])]
        ids = [self.bos_id, *eos_ids, *self.id_of.values()]
        if (wrong := [i for i in ids if type(i) is not int or i < 0]) or not eos_ids:
            names = "bos_token_id, eos_token_id and the ids of all tokens"
            raise ValueError(f"{folder}: {names} must be integers >= 0, found {wrong!r:.60}")
        self.eos_ids: list[int] = list(dict.fromkeys(eos_ids))
        self.eos_id: int = self.eos_ids[0]  # training puts this one at the end of an answer
        self.n_pieces: int = self.pieces.vocab_size()  # without added tokens

    def encode(self, text: str) -> list[int]:
        return self.pieces.encode(text)

    def decode(self, ids: list[int]) -> str:
        """Ids -> text without special tokens, and without spaces at the beginning and the end."""
        return self.pieces.decode([i for i in ids if i < self.n_pieces]).strip()

    def special_id(self, token: str) -> int:
        """Return the id of a special token. Raise ValueError if the tokenizer does not have it."""
        if token not in self.id_of:
            raise ValueError(f"this tokenizer has no {token} token; choose another template")
        return self.id_of[token]


def read_optional(file: Path) -> dict:
    """Read a JSON object without its null values. A missing file has no values."""
    raw = read_json(file) if file.is_file() else {}
    return {name: value for name, value in raw.items() if value is not None}


def named_tokens(pieces, settings: Path, added: Path) -> dict[str, int]:
    """Return the ids of the tokens that have a name: pieces of tokenizer.model and added tokens.

    Added tokens are, for example, <|im_start|> and <|im_end|>: ChatML marks the start and the end
    of each message of a chat with them.
    """
    named = {pieces.id_to_piece(i): i for i in range(pieces.vocab_size())} | read_optional(added)
    tokens = read_optional(settings).get("added_tokens_decoder", {})
    try:
        return named | {token["content"]: int(i) for i, token in tokens.items()}
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        message = 'added_tokens_decoder must map ids to objects with "content"'
        raise ValueError(f"{settings}: {message}, found {tokens!r:.60}") from error
