"""Llama: a decoder-only transformer with a key/value cache, and its sentencepiece tokenizer.

    ids (B, T) -> embeddings (B, T, D) -> layers of attention and SwiGLU -> logits (B, T, V)

Papers: Llama 2 (2307.09288), rotary positions (2104.09864), grouped-query attention (2305.13245).
Names, and the pairs of rotary dimensions, are those of Hugging Face Llama checkpoints, so weights
load without a table of names. Cached steps give the same states as one full pass, and both give
those of transformers: tests/test_llama.py.

Sizes: B batch, T tokens, L keys of all tokens so far, D width, H query heads, Hk key/value heads,
G query heads for each key/value head, Dh head width, V vocabulary.
"""

import re
from dataclasses import dataclass, fields
from pathlib import Path
from typing import get_origin

import sentencepiece
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from whisper_encoder import must_match, read_json, read_tensors, weight_files


class Cache:
    """Keys and values of every layer, for the positions that later tokens attend to.

    The tensors have room for more positions than they hold. A step writes its keys and values into
    the free room, so the earlier ones are not copied.
    """

    def __init__(self, layers: list[tuple[Tensor, Tensor]]):
        self.layers = layers  # keys and values, both (B, Hk, room, Dh)
        self.length = layers[0][0].shape[2]  # number of positions that are filled

    def reserve(self, n: int):
        """Make room for n more positions. Usually it makes more, so that this is rarely needed."""
        room = self.layers[0][0].shape[2]
        if self.length + n > room:
            more = max(n, room // 2)
            self.replace(lambda x: F.pad(x, (0, 0, 0, more)))

    def keep(self, rows: list[int]):
        """Keep only these rows of the batch, in this order."""
        self.replace(lambda x: x[rows])

    def replace(self, change):
        """Replace the keys and values of each layer by changed ones."""
        for i, (k, v) in enumerate(self.layers):  # one by one: never two whole caches in memory
            self.layers[i] = change(k), change(v)


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

    @classmethod
    def from_json(cls, path) -> "LlamaConfig":
        """Read config.json. A wrong or missing value is an error, and so is an unknown feature."""
        path = Path(path)
        raw = {name: value for name, value in read_json(path).items() if value is not None}
        for name in ("rope_parameters", "rope_scaling"):
            # transformers 5 writes the rotary settings into an object of their own. If a value is
            # there and also at the top, transformers uses the inner one.
            inner = raw.get(name, {})
            if not isinstance(inner, dict):
                raise ValueError(f"{path}: {name} must be an object, found {inner!r:.60}")
            raw |= {key: value for key, value in inner.items() if value is not None}
        other = {name: raw[name] for name, value in BUILT.items() if raw.get(name, value) != value}
        if other:
            raise ValueError(f"{path} asks for {other!r:.200}, which is not built here")

        # Early configurations leave these out.
        raw = {"rope_theta": 10_000.0, "tie_word_embeddings": False} | raw
        D, H = raw.get("hidden_size"), raw.get("num_attention_heads")
        raw.setdefault("num_key_value_heads", H)
        if type(D) is int and type(H) is int and H > 0:
            raw.setdefault("head_dim", D // H)
        config = check_fields(cls, raw, path)
        groups_fit = config.num_attention_heads % config.num_key_value_heads == 0
        if not groups_fit or config.head_dim % 2 or config.num_hidden_layers > 1000:
            raise ValueError(
                f"{path}: num_key_value_heads must divide num_attention_heads, head_dim must be "
                f"even, and there can be at most 1000 layers; found {config}"
            )
        return config


def check_fields(cls, values: dict, path: Path, lowest: float = 1e-12):
    """An instance of the dataclass `cls`, if each JSON value has the type of its field.

    A number must be at least `lowest`; the default refuses 0. The upper limits refuse sizes that no
    model has, before anything of such a size is built.
    """
    types = {int: (int,), float: (int, float), bool: (bool,), str: (str,), tuple: (tuple,)}
    highest = {int: 10**6, float: 10**12}
    for field in fields(cls):
        value, kind = values.get(field.name), get_origin(field.type) or field.type
        fits = type(value) in types[kind]
        if not fits or kind in highest and not lowest <= value <= highest[kind]:
            wanted = f"{field.name} ({kind.__name__})"
            raise ValueError(f"{path} has no valid {wanted}, found {value!r:.40}; is it complete?")
    return cls(**{field.name: values[field.name] for field in fields(cls)})


BUILT = {  # features of config.json with the only value that is computed here; None means absent
    "model_type": "llama", "hidden_act": "silu", "attention_bias": False, "mlp_bias": False,
    "rope_type": "default", "type": "default", "factor": None, "partial_rotary_factor": 1.0,
    "sliding_window": None,
}  # fmt: skip


# --------------------------------------------------------------------------------------- the layers


class RMSNorm(nn.Module):
    """Divide each vector by its root mean square, multiply by a weight. (..., D) -> (..., D)"""

    def __init__(self, D: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(D))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()  # in half precision the mean of squares overflows
        normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * normed.to(x.dtype)


def rotary_angles(positions: Tensor, Dh: int, theta: float) -> tuple[Tensor, Tensor]:
    """Cosine and sine of the angle of each dimension. (B, T) -> two tensors (B, 1, T, Dh)

    A pair (a, b) becomes (a cos - b sin, b cos + a sin). The sine of the first half has the minus.
    """
    frequency = theta ** (-torch.arange(0, Dh, 2, device=positions.device).float() / Dh)
    angle = positions[:, None, :, None] * frequency  # (B, 1, T, Dh/2)
    cos, sin = angle.cos(), angle.sin()
    return torch.cat([cos, cos], dim=-1), torch.cat([-sin, sin], dim=-1)  # (B, 1, T, Dh)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate each pair of dimensions i and i + Dh/2. (B, H, T, Dh) -> (B, H, T, Dh)"""
    other = x.roll(x.shape[-1] // 2, dims=-1)  # the other dimension of each pair
    return torch.addcmul(x * cos, other, sin).to(x.dtype)


class Attention(nn.Module):
    """Grouped-query attention: H query heads share Hk key/value heads. (B, T, D) -> (B, T, D)"""

    def __init__(self, config: LlamaConfig):
        super().__init__()
        D, H, Hk = config.hidden_size, config.num_attention_heads, config.num_key_value_heads
        self.Dh = config.head_dim
        self.q_proj = nn.Linear(D, H * self.Dh, bias=False)
        self.k_proj = nn.Linear(D, Hk * self.Dh, bias=False)
        self.v_proj = nn.Linear(D, Hk * self.Dh, bias=False)
        self.o_proj = nn.Linear(H * self.Dh, D, bias=False)

    def forward(self, x, cos, sin, past=None, can_attend=None):
        """past: keys and values of this layer, and how many positions of them are filled; or None.

        can_attend: mask (B, 1, G T, L) over all L keys; or None. Returns y, and keys and values
        of x.
        """
        B, T, D = x.shape
        q = self.q_proj(x).view(B, T, -1, self.Dh).transpose(1, 2)  # (B, H, T, Dh)
        k = self.k_proj(x).view(B, T, -1, self.Dh).transpose(1, 2)  # (B, Hk, T, Dh)
        v = self.v_proj(x).view(B, T, -1, self.Dh).transpose(1, 2)  # (B, Hk, T, Dh)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        present = k, v
        if past is not None:
            keys, values, n = past
            keys[:, :, n : n + T], values[:, :, n : n + T] = present
            k, v = keys[:, :, : n + T], values[:, :, : n + T]
        if can_attend is not None:
            # Of the fast kernels of CUDA, flash takes no mask and memory-efficient takes no
            # grouped heads: with both, only the slow math kernel is left. So make the G heads of a
            # group G times as many queries of one head. Then keys are read once per group, too.
            q = q.reshape(B, k.shape[1], -1, self.Dh)  # (B, Hk, G*T, Dh)
        y = F.scaled_dot_product_attention(
            q, k, v, attn_mask=can_attend, is_causal=past is None, enable_gqa=can_attend is None
        )
        y = y.reshape(B, -1, T, self.Dh)  # (B, H, T, Dh)
        y = y.transpose(1, 2).reshape(B, T, -1)
        return self.o_proj(y), present


class MLP(nn.Module):
    """SwiGLU: one projection multiplied by the SiLU of another. (..., D) -> (..., D)"""

    def __init__(self, config: LlamaConfig):
        super().__init__()
        D, wide = config.hidden_size, config.intermediate_size
        self.gate_proj = nn.Linear(D, wide, bias=False)
        self.up_proj = nn.Linear(D, wide, bias=False)
        self.down_proj = nn.Linear(wide, D, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class DecoderLayer(nn.Module):
    """Attention, then the MLP. Each reads a normed copy of x and adds its result to x.

    With a selection (rows, positions), the MLP is computed only there, and (n, D) is returned.
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
    """Everything except the head. It is a module because checkpoints call it `model`."""

    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)


# ---------------------------------------------------------------------------------------- the model


class Llama(nn.Module):
    """A Llama with the names of the checkpoint: ids (B, T) -> logits (B, T, V).

    `embed`, `hidden` and `logits` are its three steps. Callers use them to put speech between words
    and to compute logits only at a few positions.
    """

    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.config = config
        self.model = Decoder(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.recompute = False  # activation checkpointing: keep only the input of each layer
        self.tie()

    def tie(self):
        """Use one matrix for the embeddings and the head if the configuration says so."""
        if self.config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    def embed(self, ids: Tensor) -> Tensor:
        """(B, T) -> (B, T, D)"""
        return self.model.embed_tokens(ids)

    def hidden(
        self,
        x: Tensor,
        cache: Cache | None = None,
        positions: Tensor | None = None,
        can_attend: Tensor | None = None,
        selection: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, Cache]:
        """Embeddings (B, T, D) -> normed states (B, T, D), and the cache with these T tokens added.

        Without a cache: causal attention over the T tokens. With a cache: `positions` (B, T) is the
        position of each token, and `can_attend` (B, T, L) is true for the keys that it attends to,
        first those in the cache, then those of the T tokens. A single token may leave it out: then
        it attends to all keys.

        With a `selection` (row and position of n states), only these are returned, (n, D). No layer
        follows the last one, so its MLP can leave out all other positions.
        """
        B, T, D = x.shape
        if cache is None and can_attend is not None:
            raise ValueError("can_attend needs a cache; without one, pad rows on the right")
        if cache is not None and (positions is None or (can_attend is None and T > 1)):
            raise ValueError(f"a step of {T} tokens with a cache needs positions and can_attend")
        if positions is None:
            positions = torch.arange(T, device=x.device)[None]  # (1, T)
        if can_attend is not None:
            G = self.config.num_attention_heads // self.config.num_key_value_heads
            can_attend = can_attend[:, None].repeat(1, 1, G, 1)  # (B, 1, G*T, L)
        cos, sin = rotary_angles(positions, self.config.head_dim, self.config.rope_theta)

        if cache is not None:
            cache.reserve(T)
        layers = []
        for i, layer in enumerate(self.model.layers):
            past = (*cache.layers[i], cache.length) if cache else None
            last = selection if layer is self.model.layers[-1] else None
            inputs = x, cos, sin, past, can_attend, last
            if self.recompute and torch.is_grad_enabled():
                x, present = checkpoint(layer, *inputs, use_reentrant=False)
            else:
                x, present = layer(*inputs)
            layers.append(present)
        if cache is None:
            cache = Cache(layers)
        else:
            cache.length += T
        return self.model.norm(x), cache

    def logits(self, hidden: Tensor) -> Tensor:
        """(..., D) -> (..., V)"""
        return self.lm_head(hidden)

    def forward(self, ids: Tensor) -> Tensor:
        hidden, _ = self.hidden(self.embed(ids))
        return self.logits(hidden)

    @classmethod
    def from_pretrained(cls, folder, dtype: torch.dtype = torch.float32, device="cpu") -> "Llama":
        """Read a Hugging Face folder of Llama with safetensors.

        Every tensor must be there with its shape, and no other. Only `rotary_emb.inv_freq` of old
        files is left out, because it follows from rope_theta.
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
        must_match(expected, stored, folder)
        # safetensors maps files into memory, so each tensor is read here, not before.
        weights = {name: tensor.to(device, dtype) for name, tensor in stored.items()}
        embedding = weights["model.embed_tokens.weight"]
        head = weights.setdefault("lm_head.weight", embedding)
        if config.tie_word_embeddings and not torch.equal(head, embedding):
            raise ValueError(f"{folder}: config.json ties lm_head to embed_tokens, but they differ")
        llama.load_state_dict(weights, assign=True)
        llama.tie()
        return llama


# ------------------------------------------------------------------------------------ the tokenizer

TOKENIZER_FILES = ("tokenizer.model", "tokenizer_config.json", "added_tokens.json")


def read_pieces(file: Path) -> sentencepiece.SentencePieceProcessor:
    """The sentencepiece model in tokenizer.model. For other tokenizers, an error names the kind."""
    if not file.is_file():
        other = file.with_name("tokenizer.json").is_file()
        hint = " (its tokenizer.json has another format)" if other else ""
        raise FileNotFoundError(f"{file.parent} has no tokenizer.model of sentencepiece{hint}")
    try:
        return sentencepiece.SentencePieceProcessor(model_file=str(file))
    except RuntimeError as error:
        # Llama 3 has a text with this name: base64 tokens with their ranks.
        is_llama3 = re.match(rb"[A-Za-z0-9+/]+=* \d+\s", file.read_bytes())
        reason = (
            "it is that of Llama 3; use a model with a Llama 2 tokenizer" if is_llama3 else error
        )
        raise ValueError(f"{file} cannot be read as a sentencepiece model: {reason}") from error


class Tokenizer:
    """Text <-> ids with the tokenizer.model of a checkpoint.

    `encode` reads its argument as text: "</s>" in it is four ordinary characters. Special tokens
    are inserted by their ids, which the JSON files of the folder name. The only exception is a
    "user-defined symbol" of tokenizer.model: some models have ChatML tokens of this kind.
    """

    def __init__(self, folder):
        folder = Path(folder)
        self.pieces = read_pieces(folder / "tokenizer.model")
        names = ("config.json", "tokenizer_config.json", "added_tokens.json")
        files = [folder / name for name in names]
        config, settings, added = (read_json(file) if file.is_file() else {} for file in files)
        try:
            tokens = settings.get("added_tokens_decoder", {})
            added |= {token["content"]: int(i) for i, token in tokens.items()}
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f'{files[1]}: added_tokens_decoder must map ids to objects with "content", found '
                f"{tokens!r:.60}"
            ) from error
        self.added: dict[str, int] = added  # tokens that are not in tokenizer.model, such as ChatML
        bos, eos = config.get("bos_token_id"), config.get("eos_token_id")
        self.bos_id: int = self.pieces.bos_id() if bos is None else bos
        eos = self.pieces.eos_id() if eos is None else eos
        self.eos_ids: list[int] = eos if isinstance(eos, list) else [eos]  # each ends a text
        ids = [self.bos_id, *self.eos_ids, *self.added.values()]
        if not self.eos_ids or not all(type(i) is int and i >= 0 for i in ids):
            raise ValueError(
                f"{folder}: ids of special tokens must be whole numbers from 0 on; found "
                f"bos_token_id {bos!r:.40}, eos_token_id {eos!r:.40}, added {self.added!r:.60}"
            )
        self.eos_id: int = self.eos_ids[0]  # the one to learn
        self.n_pieces: int = self.pieces.vocab_size()

    def encode(self, text: str) -> list[int]:
        return self.pieces.encode(text)

    def decode(self, ids: list[int]) -> str:
        """Ids -> text without special tokens and without spaces at its ends."""
        words = [i for i in ids if i < self.n_pieces and not self.pieces.is_control(i)]
        return self.pieces.decode(words).strip()

    def special_id(self, piece: str) -> int:
        """The id of a special token. An error if the tokenizer does not have it."""
        token_id = self.added.get(piece, self.pieces.piece_to_id(piece))
        if token_id == self.pieces.unk_id():
            raise ValueError(f"this tokenizer has no {piece} token; choose another template")
        return token_id
