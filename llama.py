"""Llama: a decoder-only transformer with a key/value cache, and its sentencepiece tokenizer.

    ids (B, T) -> embeddings (B, T, D) -> layers of attention and SwiGLU -> logits (B, T, V)

Papers: Llama 2 (2307.09288), rotary positions (2104.09864), grouped-query attention (2305.13245).
Names, and the pairing of rotary dimensions, are those of Hugging Face Llama checkpoints, so weights
load without a table of names. Cached steps equal the full pass: tests/test_llama.py.
"""

import json
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import sentencepiece
import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


class Cache:
    """Keys and values that later positions look back at, of every layer, with room for more.

    A step writes its own behind them in place, so that nothing of what was there is copied.
    """

    def __init__(self, layers: list[tuple[Tensor, Tensor]]):
        self.layers = layers  # keys and values, both (B, Hk, room, Dh)
        self.length = layers[0][0].shape[2]  # positions of the room that are taken

    def reserve(self, n: int):
        """Make room for n more positions, and for more than that, so as to do it rarely."""
        room = self.layers[0][0].shape[2]
        if self.length + n > room:
            more = max(n, room // 2)
            self.replace(lambda x: F.pad(x, (0, 0, 0, more)))

    def keep(self, rows: list[int]):
        """Go on with these rows of the batch, in this order."""
        self.replace(lambda x: x[rows])

    def replace(self, change):
        """Put the changed keys and values in the place of each layer's."""
        for i, (k, v) in enumerate(self.layers):  # in turn, so that no two whole caches are held
            self.layers[i] = change(k), change(v)


@dataclass(frozen=True)
class LlamaConfig:
    """The part of a Llama checkpoint's config.json that shapes the computation."""

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
    def from_json(cls, path):
        """Read config.json; a missing size is an error, and so is a feature that is not built."""
        raw = read_json(Path(path))
        # transformers 5 nests the rotary settings, older files have them at the top
        rope = raw.get("rope_parameters") or {}
        scaling = raw.get("rope_scaling") or rope
        kind = scaling.get("rope_type", scaling.get("type", "default"))
        refused = {
            "model_type": raw.get("model_type", "llama") != "llama",
            "rope_scaling": kind != "default" or "factor" in scaling,
            "attention_bias": raw.get("attention_bias", False),
            "mlp_bias": raw.get("mlp_bias", False),
            "hidden_act": raw.get("hidden_act", "silu") != "silu",
            "sliding_window": raw.get("sliding_window") is not None,
            "partial_rotary_factor": raw.get("partial_rotary_factor", 1.0) != 1.0,
        }
        if any(refused.values()):
            asked = {name: raw.get(name) or scaling for name, bad in refused.items() if bad}
            raise ValueError(f"{path} asks for {asked}, which is not built here")

        heads = raw.get("num_attention_heads")
        raw = {
            # What early Llama configs leave out, with the values that they mean.
            "num_key_value_heads": heads,
            "rope_theta": rope.get("rope_theta", 10_000.0),
            "tie_word_embeddings": False,
        } | {name: value for name, value in raw.items() if value is not None}
        if heads and "hidden_size" in raw:
            raw.setdefault("head_dim", raw["hidden_size"] // heads)
        missing = [name for name in cls.__dataclass_fields__ if raw.get(name) is None]
        if missing:
            raise ValueError(f"{path} has no {missing}; is it the config.json of a Llama model?")
        return cls(**{name: raw[name] for name in cls.__dataclass_fields__})


# --------------------------------------------------------------------------------------- the layers


class RMSNorm(nn.Module):
    """Scale each vector to root mean square 1, then by a learned weight. (..., D) -> (..., D)"""

    def __init__(self, D: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(D))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()  # the mean of squares overflows in half precision
        normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * normed.to(x.dtype)


def rotary_angles(positions: Tensor, Dh: int, theta: float) -> tuple[Tensor, Tensor]:
    """Cosine and sine of each dimension's angle. (B, T) -> two of (B, 1, T, Dh)

    The sine is negative in the first half: a pair (a, b) turns to (a cos - b sin, b cos + a sin).
    """
    frequency = theta ** (-torch.arange(0, Dh, 2, device=positions.device).float() / Dh)
    angle = positions[:, None, :, None] * frequency  # (B, 1, T, Dh/2)
    cos, sin = angle.cos(), angle.sin()
    return torch.cat([cos, cos], dim=-1), torch.cat([-sin, sin], dim=-1)  # (B, 1, T, Dh)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn dimension i together with i + Dh/2 (Meta's own files pair i with i + 1)."""
    other = x.roll(x.shape[-1] // 2, dims=-1)  # at i stands i + Dh/2, and the other way round
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
        """past: keys and values of this layer with room, and how many are taken; or None.

        Returns y, and the keys and values of x.
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
        y = F.scaled_dot_product_attention(
            q, k, v, attn_mask=can_attend, is_causal=past is None, enable_gqa=True
        )  # (B, H, T, Dh)
        y = y.transpose(1, 2).reshape(B, T, -1)
        return self.o_proj(y), present


class MLP(nn.Module):
    """SwiGLU: one projection, gated by another. (..., D) -> (..., D)"""

    def __init__(self, config: LlamaConfig):
        super().__init__()
        D, wide = config.hidden_size, config.intermediate_size
        self.gate_proj = nn.Linear(D, wide, bias=False)
        self.up_proj = nn.Linear(D, wide, bias=False)
        self.down_proj = nn.Linear(wide, D, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class DecoderLayer(nn.Module):
    """Attention, then the MLP; each reads a normed copy and adds to the stream.

    The MLP works on all positions, or on those `asked` for.
    """

    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.self_attn = Attention(config)
        self.mlp = MLP(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, x, cos, sin, past=None, can_attend=None, asked=None):
        y, present = self.self_attn(self.input_layernorm(x), cos, sin, past, can_attend)
        x = x + y
        if asked is not None:
            x = x[asked]  # (n, D)
        return x + self.mlp(self.post_attention_layernorm(x)), present


class Decoder(nn.Module):
    """Everything but the head; a module of its own because the checkpoint calls it `model`."""

    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)


# ---------------------------------------------------------------------------------------- the model


class Llama(nn.Module):
    """A Llama with the checkpoint's names. Called with ids (B, T) it returns logits (B, T, V).

    `embed`, `hidden` and `logits` are its three steps, for callers that put speech between words
    or want logits at a few positions only.
    """

    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.config = config
        self.model = Decoder(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.recompute = False  # keep a layer's input only, and run it again in the backward pass
        self.tie()

    def tie(self):
        """One matrix for reading and writing words, if the checkpoint says so."""
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
        asked: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, Cache]:
        """Embeddings (B, T, D) -> normed states (B, T, D) and the cache with them added.

        Without a cache: plain causal attention over T. With one, `positions` (B, T) say where each
        token stands, and `can_attend` (B, T, past + T) which keys it sees: what was there, then
        the T tokens themselves. None is all, for a single token.

        Where states are not needed everywhere, `asked` holds the rows and the places of n that
        are, and (n, D) comes back. No later layer looks at the others, so the last MLP leaves them
        out: of four layers, a tenth of a training step's arithmetic.
        """
        B, T, D = x.shape
        if cache is None and can_attend is not None:
            raise ValueError("without a cache attention is causal; pad rows on the right instead")
        if cache is not None and (positions is None or (can_attend is None and T > 1)):
            raise ValueError(f"a cached step of {T} tokens needs positions and who sees which")
        if positions is None:
            positions = torch.arange(T, device=x.device)[None]  # (1, T)
        if can_attend is not None:
            can_attend = can_attend[:, None]  # (B, 1, T, past + T)
        cos, sin = rotary_angles(positions, self.config.head_dim, self.config.rope_theta)

        if cache is not None:
            cache.reserve(T)
        grown = []
        for i, layer in enumerate(self.model.layers):
            past = (*cache.layers[i], cache.length) if cache else None
            here = asked if layer is self.model.layers[-1] else None
            given = x, cos, sin, past, can_attend, here
            if self.recompute and torch.is_grad_enabled():
                x, present = checkpoint(layer, *given, use_reentrant=False)
            else:
                x, present = layer(*given)
            grown.append(present)
        if cache is None:
            cache = Cache(grown)
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
        files is left out, by name: it follows from rope_theta.
        """
        folder = Path(folder)
        files = weight_files(folder)
        config = LlamaConfig.from_json(folder / "config.json")
        with torch.device("meta"):
            llama = cls(config)
        weights = {
            name: tensor.to(device, dtype)
            for name, tensor in chain.from_iterable(map(stored_tensors, files))
            if not name.endswith("rotary_emb.inv_freq")
        }
        embedding = weights.get("model.embed_tokens.weight")
        if llama.config.tie_word_embeddings and embedding is not None:
            if not torch.equal(weights.setdefault("lm_head.weight", embedding), embedding):
                raise ValueError(f"{folder}: config.json ties lm_head to embed_tokens; they differ")
        must_match(llama.state_dict(), weights, folder)
        llama.load_state_dict(weights, assign=True)
        llama.tie()
        return llama


# ------------------------------------------------------------------------------------ weight files

# whisper_encoder.py holds the same four functions: either file can be read, or taken away,
# without the other.


def read_json(path: Path) -> dict:
    """The object that a JSON file holds; what is none is an error that names the file."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path} holds no JSON object but {found!r:.40}")
    return found


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a Hugging Face folder: one, or the shards that its index names."""
    if (folder / "model.safetensors").is_file():
        return [folder / "model.safetensors"]
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        raise FileNotFoundError(
            f"{folder} is not a Hugging Face folder with model.safetensors (or its index). Convert "
            f"other weights with: python tools/convert.py whisper|llama {folder} --out NEW_FOLDER"
        )
    shards = sorted(set(read_json(index)["weight_map"].values()))
    absent = [shard for shard in shards if not (folder / Path(shard).name).is_file()]
    if absent:
        raise FileNotFoundError(f"{folder} lacks {absent}, which {index.name} names")
    return [folder / Path(shard).name for shard in shards]


def stored_tensors(file: Path):
    """Every (name, tensor) of a safetensors file, each read when it is needed."""
    try:
        with safe_open(file, "pt") as stored:
            for name in stored.keys():  # noqa: SIM118, it is not a dict
                yield name, stored.get_tensor(name)
    except Exception as error:
        raise ValueError(f"{file} cannot be read as weights, is it cut short? {error!r}") from error


def must_match(wanted: dict[str, Tensor], found: dict[str, Tensor], where):
    """Refuse, with lists, weights that do not have exactly the wanted names and shapes."""
    common = sorted(wanted.keys() & found.keys())
    wrong = {
        "missing": sorted(wanted.keys() - found.keys()),
        "unexpected": sorted(found.keys() - wanted.keys()),
        "of another shape": [
            f"{name} {tuple(found[name].shape)}, not {tuple(wanted[name].shape)}"
            for name in common
            if found[name].shape != wanted[name].shape
        ],
    }
    if any(wrong.values()):
        lists = "; ".join(f"{len(v)} {k}: {', '.join(v[:8])}" for k, v in wrong.items() if v)
        raise ValueError(f"the weights in {where} do not fit the configuration there: {lists}")


# ------------------------------------------------------------------------------------ the tokenizer


class Tokenizer:
    """Text <-> ids through a checkpoint's tokenizer.model.

    `encode` reads its argument as text: "</s>" in it is four ordinary characters. Special tokens
    are put in by their ids, which config.json and added_tokens.json name. Only what the file itself
    has as a "user-defined symbol", as a few have ChatML's, is that symbol in a text, too.
    """

    def __init__(self, folder):
        folder = Path(folder)
        if not (folder / "tokenizer.model").is_file():
            raise FileNotFoundError(
                f"{folder} has no tokenizer.model (a sentencepiece file; Meta's downloads have it "
                f"one folder up, copy it)"
            )
        try:
            model_file = str(folder / "tokenizer.model")
            self.pieces = sentencepiece.SentencePieceProcessor(model_file=model_file)
        except RuntimeError as error:
            raise ValueError(f"{model_file} cannot be read, is it whole? {error}") from error
        files = folder / "added_tokens.json", folder / "config.json"  # Meta's folders have neither
        added, config = (read_json(file) if file.is_file() else {} for file in files)
        self.added: dict[str, int] = added  # beside the pieces
        bos, eos = config.get("bos_token_id"), config.get("eos_token_id")
        bos = self.pieces.bos_id() if bos is None else bos
        eos = self.pieces.eos_id() if eos is None else eos
        self.bos_id: int = bos
        self.eos_ids: list[int] = eos if isinstance(eos, list) else [eos]  # any of them ends text
        self.eos_id: int = self.eos_ids[0]  # the one to learn
        if min(self.bos_id, *self.eos_ids) < 0:
            raise ValueError(f"{folder} names no id for the token that begins or that ends a text")
        self.n_pieces: int = self.pieces.vocab_size()
        self.vocab_size: int = 1 + max(self.n_pieces - 1, *self.added.values(), self.eos_id)

    def encode(self, text: str) -> list[int]:
        return self.pieces.encode(text)

    def decode(self, ids: list[int]) -> str:
        """Ids -> clean text: special tokens dropped, no space at either end."""
        words = [i for i in ids if i < self.n_pieces and not self.pieces.is_control(i)]
        return self.pieces.decode(words).strip()

    def special_id(self, piece: str) -> int:
        """The id of a special token by its name; a tokenizer without it is an error."""
        known = self.added.get(piece, self.pieces.piece_to_id(piece))
        if known == self.pieces.unk_id():
            raise ValueError(
                f"this tokenizer has no {piece} token; choose a template that it was made for"
            )
        return known
