"""Llama: a decoder-only transformer with a key/value cache, and its sentencepiece tokenizer.

    ids (B, T) -> embeddings (B, T, D) -> layers of attention and SwiGLU -> logits (B, T, V)

Papers: Llama 2 (2307.09288), rotary positions (2104.09864), grouped-query attention (2305.13245).
Names, and the pairing of rotary dimensions, are those of Hugging Face Llama checkpoints, so weights
load without a table of names. Cached steps equal the full pass: tests/test_llama.py.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import sentencepiece
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

Cache = list[tuple[Tensor, Tensor]]  # keys and values of each layer, both (B, Hk, past, Dh)


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
    max_position_embeddings: int  # positions seen in pretraining

    @classmethod
    def from_json(cls, path):
        """Read config.json; a missing size is an error, and so is a feature that is not built."""
        raw = json.loads(Path(path).read_text())
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
        }
        if any(refused.values()):
            asked = {name: raw.get(name, scaling) for name, bad in refused.items() if bad}
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
    """Cosine and sine of the angle of each pair of dimensions. (B, T) -> two of (B, 1, T, Dh)"""
    frequency = theta ** (-torch.arange(0, Dh, 2, device=positions.device).float() / Dh)
    angle = positions[:, None, :, None] * frequency  # (B, 1, T, Dh/2)
    angle = torch.cat([angle, angle], dim=-1)  # (B, 1, T, Dh)
    return angle.cos(), angle.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn dimension i together with i + Dh/2 (Meta's own files pair i with i + 1)."""
    first, second = x.chunk(2, dim=-1)
    return (x * cos + torch.cat([-second, first], dim=-1) * sin).to(x.dtype)


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
        """past: keys and values of this layer so far, or None. Returns y and both with x added."""
        B, T, D = x.shape
        q = self.q_proj(x).view(B, T, -1, self.Dh).transpose(1, 2)  # (B, H, T, Dh)
        k = self.k_proj(x).view(B, T, -1, self.Dh).transpose(1, 2)  # (B, Hk, T, Dh)
        v = self.v_proj(x).view(B, T, -1, self.Dh).transpose(1, 2)  # (B, Hk, T, Dh)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        if past is not None:
            k = torch.cat([past[0], k], dim=2)
            v = torch.cat([past[1], v], dim=2)
        y = F.scaled_dot_product_attention(
            q, k, v, attn_mask=can_attend, is_causal=past is None, enable_gqa=True
        )  # (B, H, T, Dh)
        y = y.transpose(1, 2).reshape(B, T, -1)
        return self.o_proj(y), (k, v)


class MLP(nn.Module):
    """SwiGLU: one projection, gated by another. (B, T, D) -> (B, T, D)"""

    def __init__(self, config: LlamaConfig):
        super().__init__()
        D, wide = config.hidden_size, config.intermediate_size
        self.gate_proj = nn.Linear(D, wide, bias=False)
        self.up_proj = nn.Linear(D, wide, bias=False)
        self.down_proj = nn.Linear(wide, D, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class DecoderLayer(nn.Module):
    """Attention, then the MLP; each reads a normed copy and adds to the stream."""

    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.self_attn = Attention(config)
        self.mlp = MLP(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, x, cos, sin, past=None, can_attend=None):
        y, present = self.self_attn(self.input_layernorm(x), cos, sin, past, can_attend)
        x = x + y
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
    ) -> tuple[Tensor, Cache]:
        """Embeddings (B, T, D) -> normed states (B, T, D) and the cache with them added.

        Without a cache: plain causal attention over T. With one: T is 1, `positions` (B, 1) says
        where each row stands and `can_attend` (B, past + 1) which keys are real (None: all).
        """
        B, T, D = x.shape
        if cache is not None and (T != 1 or positions is None):
            raise ValueError(f"a cached step takes 1 token with its positions, got {T} tokens")
        if cache is None and can_attend is not None:
            raise ValueError("without a cache attention is causal; pad rows on the right instead")
        if positions is None:
            positions = torch.arange(T, device=x.device)[None]  # (1, T)
        if can_attend is not None:
            can_attend = can_attend[:, None, None]  # (B, 1, 1, past + 1)
        cos, sin = rotary_angles(positions, self.config.head_dim, self.config.rope_theta)

        grown = []
        for i, layer in enumerate(self.model.layers):
            x, present = layer(x, cos, sin, cache[i] if cache else None, can_attend)
            grown.append(present)
        return self.model.norm(x), grown

    def logits(self, hidden: Tensor) -> Tensor:
        """(..., D) -> (..., V)"""
        return self.lm_head(hidden)

    def forward(self, ids: Tensor) -> Tensor:
        hidden, _ = self.hidden(self.embed(ids))
        return self.logits(hidden)

    @classmethod
    def from_pretrained(cls, folder, dtype: torch.dtype = torch.float32) -> "Llama":
        """Read a Hugging Face Llama folder: config.json and model.safetensors, every tensor of it.

        Only `rotary_emb.inv_freq` of old files is left out, by name: it follows from rope_theta.
        """
        folder = Path(folder)
        for name in ("config.json", "model.safetensors"):
            if not (folder / name).is_file():
                raise FileNotFoundError(f"{folder} has no {name}; a Llama folder must have it")
        with torch.device("meta"):
            llama = cls(LlamaConfig.from_json(folder / "config.json"))
        weights = {
            name: tensor.to(dtype)
            for name, tensor in load_file(folder / "model.safetensors").items()
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

    `encode` reads its argument as text and nothing else: "</s>" in it is four ordinary characters.
    Special tokens are put in by their ids, which config.json names.
    """

    def __init__(self, folder):
        folder = Path(folder)
        if not (folder / "tokenizer.model").is_file():
            raise FileNotFoundError(f"{folder} has no tokenizer.model (a sentencepiece file)")
        model_file = str(folder / "tokenizer.model")
        self.pieces = sentencepiece.SentencePieceProcessor(model_file=model_file)
        config = json.loads((folder / "config.json").read_text())
        bos, eos = config.get("bos_token_id"), config.get("eos_token_id")
        bos = self.pieces.bos_id() if bos is None else bos
        eos = self.pieces.eos_id() if eos is None else eos
        self.bos_id: int = bos
        self.eos_ids: list[int] = eos if isinstance(eos, list) else [eos]  # any of them ends text
        self.eos_id: int = self.eos_ids[0]  # the one to learn
        self.vocab_size: int = self.pieces.vocab_size()

    def encode(self, text: str) -> list[int]:
        return self.pieces.encode(text)

    def decode(self, ids: list[int]) -> str:
        """Ids -> clean text: special tokens dropped, no space at either end."""
        words = [i for i in ids if i < self.vocab_size and not self.pieces.is_control(i)]
        return self.pieces.decode(words).strip()
