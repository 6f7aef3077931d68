"""This project and transformers + peft, doing the same work on the same machine.

    python benchmarks/compare.py                     the embedded default, and Whisper-base + 135M
    python benchmarks/compare.py --sizes llast-2b    sizes of the paper's systems, on CUDA

The peer is what a capable user writes: sdpa attention, the clips' own states cut out of the 30 s
window, right padding in training and left padding in generation, LoRA merged before generation.
Both get the same weights, LoRA included. Before a case is timed, both must have computed the same.
Then they take turns; the median counts. Next to each time is an estimate of the least that this
machine could need: the arithmetic at the rate of a large matrix product, or the bytes at that of a
large copy, whichever is longer, both measured first. On a GPU whose data sheet is known, MFU and
MBU are the shares of its arithmetic and of its memory's bytes a second that were used. Results go
to a JSON file and a table.
"""

import argparse
import json
import math
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import peft
import torch
import transformers
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers.models.whisper.modeling_whisper import WhisperEncoder as TheirEncoder

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.gpu import NEVER, TOY_ENCODER, TOY_LLM  # noqa: E402
from benchmarks.measure import (  # noqa: E402
    Machine,
    Phase,
    bytes_of,
    made_on,
    measure_machine,
    noise,
    peak_of,
    seconds_of,
    write_below,
)
from data import (  # noqa: E402
    AUDIO_ID,
    IGNORE,
    Batch,
    Example,
    Row,
    group,
    read_corpus,
)
from llama import Llama, LlamaConfig, Tokenizer  # noqa: E402
from llast import LLaST, LLaSTConfig, pick_device  # noqa: E402
from lora import LoRALinear, merge_lora  # noqa: E402
from tools.cost import encoder_flops, llm_flops  # noqa: E402
from tools.plan import GEOMETRY, example_flops  # noqa: E402
from train import PRESETS  # noqa: E402
from translate import SearchOptions, beam_search, translate  # noqa: E402
from whisper_encoder import (  # noqa: E402
    WhisperConfig,
    WhisperEncoder,
    clip_to_mel,
    load_audio,
    log_mel_spectrogram,
    n_states,
)

BASE = WhisperConfig(80, 512, 6, 8, 2048, 1500)  # Whisper-base
SMALL_LLM = LlamaConfig(576, 1536, 30, 9, 3, 64, 49152, 1e-5, 10_000.0, False)  # 135M
SIZES = {
    "toy": (TOY_ENCODER, TOY_LLM, 4, 4),  # only to test the benchmarks
    "base-135m": (BASE, SMALL_LLM, 16, 16),
    "llast-2b": (
        GEOMETRY["whisper-large-v2"], GEOMETRY["TinyLlama-1.1B-Chat-v1.0"], 128, 512,
    ),
    "llast-8b": (GEOMETRY["whisper-large-v2"], GEOMETRY["Llama-2-7b-chat-hf"], 128, 512),
    # 8 of the LLM's 32 layers. Two trainings of the whole model do not fit on one GPU of 80 GB.
    "llast-8b-quarter": (
        GEOMETRY["whisper-large-v2"],
        replace(GEOMETRY["Llama-2-7b-chat-hf"], num_hidden_layers=8), 128, 512,
    ),
}  # fmt: skip
CASES = ["training", "translation"]
PROMPT, ANSWER, EOS = 28, 24, 2  # tokens of a made-up row, the end included in the answer
BOTH = (("30s", "both in 30 s"), ("clip", "ours at own length"))  # windows, and how rows say it
MIXED = (2.0, 3.1, 4.2, 5.0, 6.3, 7.7, 9.4, 12.0)  # seconds of the clips in a training step

# --------------------------------------------------------------------------------- the two systems


def build_ours(size: str, device, dtype) -> LLaST:
    """A LLaST whose LoRA is not new: its B is not 0, so a model without the LoRA would differ.

    "tiny" is the included example. The other sizes get random weights, made on the device.
    """
    torch.manual_seed(0)
    if size == "tiny":
        model = LLaST.fresh(config_of(16, 16), dtype, device)
    else:
        W, L, *ranks = SIZES[size]
        encoder, llm = made_on(device, dtype, WhisperEncoder, W), made_on(device, dtype, Llama, L)
        model = LLaST(config_of(*ranks), encoder, llm, Tokenizer(ROOT / "tiny" / "llama"))
    for name, tensor in model.trained().items():
        if name.endswith("lora_B"):
            tensor.normal_(std=0.01)
    return model


def config_of(encoder_rank: int, llm_rank: int) -> LLaSTConfig:
    return LLaSTConfig(
        str(ROOT / "tiny" / "whisper"), str(ROOT / "tiny" / "llama"), "llama2", "30s",
        encoder_rank, 2.0 * encoder_rank, llm_rank, 2.0 * llm_rank,
        dropout=0.0, directions=("fr-en",),
    )  # fmt: skip


class Peer(nn.Module):
    """The same system out of transformers and peft. It shares the frozen weights with ours.

    If our LoRAs are merged, the peer has the merged weights, too, and no LoRA.
    """

    def __init__(self, ours: LLaST):
        super().__init__()
        W, L = ours.speech_encoder.config, ours.llm.config
        self.encoder = copy_of(ours.speech_encoder, TheirEncoder, transformers.WhisperConfig, W)
        self.llm = copy_of(ours.llm, transformers.LlamaForCausalLM, transformers.LlamaConfig, L)
        # transformers prints a warning for a generation without these two.
        self.llm.generation_config.bos_token_id, self.llm.generation_config.eos_token_id = 1, EOS
        self.window, self.M = W.max_source_positions, W.num_mel_bins
        self.features = transformers.WhisperFeatureExtractor(feature_size=self.M)
        self.projector = nn.Sequential(
            *(nn.Linear(m.in_features, m.out_features) if hasattr(m, "weight") else nn.GELU()
              for m in ours.projector.model)
        )  # fmt: skip
        self.projector.load_state_dict(ours.projector.model.state_dict())
        self.projector.to(ours.device)

    def encode_speech(self, audio: list[Tensor]) -> list[Tensor]:
        waves = [clip.numpy() for clip in audio]
        weight = self.llm.get_input_embeddings().weight
        mel = self.features(
            waves, sampling_rate=16_000, return_tensors="pt", device=str(weight.device)
        ).input_features
        states = self.encoder(mel.to(weight.device, weight.dtype)).last_hidden_state
        n = [n_states(len(clip)) for clip in audio]
        speech = self.projector(states[:, : max(n)].float()).to(weight.dtype)
        return [clip[:k] for clip, k in zip(speech, n, strict=True)]

    def rows(self, audio: list[Tensor], ids: list[Tensor]) -> list[Tensor]:
        embed, rows = self.llm.get_input_embeddings(), []
        for speech, row in zip(self.encode_speech(audio), ids, strict=True):
            words, at = embed(row.clamp(min=0)), row.tolist().index(AUDIO_ID)
            rows.append(torch.cat([words[:at], speech, words[at + 1 :]]))
        return rows

    def forward(self, batch: Batch) -> Tensor:
        weight = self.llm.get_input_embeddings().weight
        # Without autocast, peft would compute its LoRA in float32.
        half = weight.dtype != torch.float32
        with torch.autocast(weight.device.type, weight.dtype, enabled=half):
            return self.loss(batch, weight.device)

    def loss(self, batch: Batch, device) -> Tensor:
        ids = [row[:n].to(device) for row, n in zip(batch.ids, batch.lengths, strict=True)]
        rows = self.rows(batch.audio, ids)
        labels = [
            torch.cat([torch.full((len(row) - n,), IGNORE), label[:n]])
            for row, label, n in zip(rows, batch.labels, batch.lengths, strict=True)
        ]
        mask = pad_sequence([torch.ones(len(row)) for row in rows], batch_first=True)
        return self.llm(
            inputs_embeds=pad_sequence(rows, batch_first=True),
            attention_mask=mask.to(device),
            labels=pad_sequence(labels, batch_first=True, padding_value=IGNORE).to(device),
        ).loss

    @torch.inference_mode()
    def translate(self, audio: list[Tensor], ids: Tensor, most: int, ends=EOS) -> list[list[int]]:
        self.llm.generation_config.eos_token_id = ends
        rows = self.rows(audio, [ids] * len(audio))
        P, device = max(map(len, rows)), rows[0].device
        left = torch.tensor([P - len(row) for row in rows], device=device)
        x = torch.stack([nn.functional.pad(row, (0, 0, P - len(row), 0)) for row in rows])
        mask = (torch.arange(P, device=device) >= left[:, None]).long()
        answers = self.llm.generate(
            inputs_embeds=x, attention_mask=mask, num_beams=5, do_sample=False, max_new_tokens=most,
            length_penalty=1.0, early_stopping=False, eos_token_id=ends, pad_token_id=EOS,
        )  # fmt: skip
        return [row[: row.index(EOS)] if ends and EOS in row else row for row in answers.tolist()]


def copy_of(ours: nn.Module, kind, kind_of_config, config) -> nn.Module:
    """Their module with our frozen weights, and with our LoRA as peft has it."""
    weight = next(ours.parameters())
    settings = kind_of_config(**asdict(config), attn_implementation="sdpa")
    theirs = made_on(weight.device, weight.dtype, kind, settings)
    weights = {k: v for k, v in ours.state_dict().items() if "lora_" not in k}
    theirs.load_state_dict(weights, assign=True)
    loras = {name: layer for name, layer in ours.named_modules() if isinstance(layer, LoRALinear)}
    loras = {name: layer for name, layer in loras.items() if not layer.merged}
    theirs.requires_grad_(False)
    if loras:
        R, alpha = next(
            (len(lora.lora_A), lora.scale * len(lora.lora_A)) for lora in loras.values()
        )
        targets = sorted({name.rpartition(".")[2] for name in loras})
        peft.inject_adapter_in_model(
            peft.LoraConfig(r=R, lora_alpha=alpha, target_modules=targets, lora_dropout=0.0), theirs
        )
    for name, lora in loras.items():
        layer = theirs.get_submodule(name)
        for theirs_of, tensor in ((layer.lora_A, lora.lora_A), (layer.lora_B, lora.lora_B)):
            theirs_of["default"].weight = nn.Parameter(tensor.detach().clone())
    return theirs


# -------------------------------------------------------------------------------------- measuring


@dataclass
class Result:
    """One line of the table: seconds and bytes of ours and of the peer."""

    size: str
    case: str
    ours: float
    peer: float
    spread: float  # of ours: largest minus smallest, as a share of the median
    ours_memory: int
    peer_memory: int
    limit: float | None = None  # seconds, for ours
    mfu: float | None = None  # shares of what the data sheet says, where it is known
    mbu: float | None = None

    @property
    def ratio(self) -> float:
        return self.peer / self.ours


@dataclass
class Bench:
    """Where and how often a model of one size is timed, and what was found."""

    size: str
    device: torch.device
    machine: Machine
    times: int
    save: Callable  # is called after each result, in case the run is stopped
    results: list[Result] = field(default_factory=list)

    def compare(self, case: str, ours, peer, phases: list[Phase], times: int | None = None):
        """Ours and the peer's in turns, after one call of each to warm up."""
        ours(), peer()
        taken = [
            (seconds_of(ours, self.device), seconds_of(peer, self.device))
            for _ in range(times or self.times)
        ]
        mine, theirs = ([pair[i] for pair in taken] for i in range(2))
        middle = statistics.median(mine)
        limit = self.machine.least(phases)
        result = Result(
            self.size, case, middle, statistics.median(theirs), (max(mine) - min(mine)) / middle,
            peak_of(ours, self.device), peak_of(peer, self.device), limit,
        )  # fmt: skip
        if self.machine.sheet_flops and phases:
            flops = sum(phase.times * phase.flops for phase in phases)
            read = sum(phase.times * phase.bytes for phase in phases)
            result.mfu = flops / (middle * self.machine.sheet_flops)
            result.mbu = read / (middle * self.machine.sheet_bytes)
        self.results.append(result)
        print(line_of(result), flush=True)
        self.save()


HEADER = (
    f"{'size':10} {'case':44} {'ours':>9} {'peer':>9} {'ratio':>6} {'memory, MB':>16} "
    f"{'limit':>9} reached"
)


def line_of(r: Result) -> str:
    memory = f"{r.ours_memory / 1e6:,.0f} : {r.peer_memory / 1e6:,.0f}"
    line = (
        f"{r.size:10} {r.case:44} {1e3 * r.ours:7.1f}ms {1e3 * r.peer:7.1f}ms {r.ratio:5.2f}x "
        f"{memory:>16}"
    )
    if r.limit is not None:
        line += f" {1e3 * r.limit:7.1f}ms {r.limit / r.ours:7.0%}"
    if r.mfu is not None:
        line += f"  MFU {r.mfu:.0%}, MBU {r.mbu:.0%}"
    return line


def same(what: str, ours: Tensor, theirs: Tensor, dtype: torch.dtype):
    """Stop if the two have not computed the same; nothing is timed then."""
    tolerance = 1e-3 if dtype == torch.float32 else 5e-2
    distance = (ours.float() - theirs.float()).abs().max() / theirs.float().abs().max()
    if not distance < tolerance:
        raise SystemExit(f"{what}: ours and the peer's differ by {distance:.2g} of the largest")


# -------------------------------------------------------------------------------------- the cases


def row_of(V: int, seed: int) -> tuple[list[int], list[int]]:
    chance = torch.Generator().manual_seed(seed)
    prompt = [1, 5, AUDIO_ID, *torch.randint(9, V, (PROMPT - 3,), generator=chance).tolist()]
    return prompt, [*torch.randint(9, V, (ANSWER - 1,), generator=chance).tolist(), EOS]


def training_batch(V: int, which: list[int]) -> Batch:
    rows = [row_of(V, i) for i in which]
    return Batch(
        [],
        [noise(MIXED[i], i) for i in which],
        torch.tensor([prompt + answer for prompt, answer in rows]),
        torch.tensor([[IGNORE] * PROMPT + answer for _, answer in rows]),
        torch.tensor([PROMPT + ANSWER] * len(rows)),
        [2] * len(rows),
    )


def as_train_groups_them(budget: int) -> list[list[int]]:
    """The clips of a step in the batches that train.py makes of them, by length."""
    rows = [Row(Path(str(i)), "", "", "fr", "en", seconds) for i, seconds in enumerate(MIXED)]
    examples = [Example(row, "st") for row in rows]

    def size_of(example: Example) -> int:
        return math.ceil(50 * example.row.seconds) + PROMPT + ANSWER

    batches = group(examples, size_of, budget, seed=0, epoch=0)
    return [[rows.index(example.row) for example in batch] for batch in batches]


def in_window(model: LLaST, window: str) -> LLaST:
    model.config = replace(model.config, window=window)
    return model


def mel_case(bench: Bench):
    audio, device = noise(10.0, 0), bench.device
    features = transformers.WhisperFeatureExtractor(feature_size=80)

    def ours():
        return log_mel_spectrogram(audio.to(device), 80)

    def peer():
        return features(
            audio.numpy(), sampling_rate=16_000, return_tensors="pt", padding=False,
            device=str(device),
        ).input_features[0]  # fmt: skip

    same("log-mel", ours().cpu(), peer().cpu(), torch.float32)
    bench.compare("log-mel of 10 s", ours, peer, [], 5 * bench.times)


@torch.inference_mode()
def encoder_cases(bench: Bench, ours: LLaST, peer: Peer):
    dtype, audio = ours.speech_encoder.conv1.weight.dtype, noise(5.0, 0)
    mels = {
        window: clip_to_mel(audio, ours.speech_encoder.config.num_mel_bins, window)[None]
        for window in ("30s", "clip")
    }
    mels = {window: mel.to(bench.device, dtype) for window, mel in mels.items()}

    def run(window: str):
        return lambda: ours.speech_encoder(mels[window])

    def theirs():
        return peer.encoder(mels["30s"]).last_hidden_state

    same("encoder", run("30s")(), theirs(), dtype)
    for window, label in BOTH:
        S = mels[window].shape[2] // 2
        phase = encoder_phase(ours, [(S, S)])
        bench.compare(f"encoder, clip of 5 s, {label}", run(window), theirs, [phase])


def encoder_phase(model: LLaST, clips: list[tuple[int, int]]) -> Phase:
    """Clips as (states, states needed)."""
    W, weights = model.speech_encoder.config, bytes_of(model.speech_encoder)
    return Phase(sum(sum(encoder_flops(W, S, n)) for S, n in clips), weights)


def training_cases(bench: Bench, ours: LLaST, peer: Peer):
    V, everything = ours.llm.config.vocab_size, list(range(len(MIXED)))
    together = [training_batch(V, everything)]
    budget = PRESETS["tiny" if bench.device.type == "cpu" else "llast-8b"].batch
    by_length = [training_batch(V, which) for which in as_train_groups_them(budget)]
    n_answer = len(MIXED) * ANSWER

    def step(model: nn.Module, batches: list[Batch]):
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=0.0, fused=True)  # nothing may change between

        def once():
            total = 0.0
            for batch in batches:
                loss = model(batch)
                loss = loss.sum() / n_answer if loss.dim() else loss
                loss.backward()
                total += loss.detach()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            return total

        return once

    counts = [sum(p.numel() for p in m.parameters() if p.requires_grad) for m in (ours, peer)]
    if len(set(counts)) > 1:
        raise SystemExit(f"ours trains {counts[0]:,} parameters, the peer {counts[1]:,}")
    theirs = step(peer, together)
    for window, batches, label in (
        ("30s", together, "both in 30 s"),
        ("30s", by_length, "both in 30 s, ours by length"),
        ("clip", by_length, "ours at own length"),
    ):
        mine = step(in_window(ours, window), batches)
        if window == "30s":
            same("loss", mine(), theirs(), ours.llm.lm_head.weight.dtype)
        phases = [training_phase(ours, window, batch) for batch in batches]
        phases.append(Phase(0, 28 * counts[0]))  # AdamW: weight, gradient, two moments, written too
        bench.compare(f"training step, 8 clips, {label}", mine, theirs, phases)


def training_phase(model: LLaST, window: str, batch: Batch) -> Phase:
    """Without padding and without recomputed activations, counted as tools/plan.py counts."""
    W, L = model.speech_encoder.config, model.llm.config
    ranks = {"encoder_rank": model.config.encoder_rank, "llm_rank": model.config.llm_rank}
    settings = replace(PRESETS["tiny"], **ranks)
    flops = 0.0
    for n in (n_states(len(audio)) for audio in batch.audio):
        S = W.max_source_positions if window == "30s" else n
        flops += example_flops(settings, W, L, S, n, PROMPT + ANSWER - 1, ANSWER)
    return Phase(flops, 2 * bytes_of(model, "embed"))  # forwards and backwards


def translation_cases(bench: Bench, ours: LLaST, peer: Peer):
    prompt, _ = row_of(ours.llm.config.vocab_size, 0)
    ids = torch.tensor(prompt, device=bench.device)
    exact = ours.llm.lm_head.weight.dtype == torch.float32

    @torch.inference_mode()
    def run(model: LLaST, audio: list[Tensor]):
        rows = [
            model.splice(ids, speech, prompt.index(AUDIO_ID))
            for speech in model.encode_speech(audio)
        ]
        answers = beam_search(model.llm, rows, [NEVER], SearchOptions(5, 1.0, ANSWER))
        return [best.ids for best, *_ in answers]

    sizes = (1, 4, 16) if bench.device.type == "cpu" else (1, 32)
    for n in (1,) if bench.size == "toy" else sizes:
        audio = [noise(MIXED[i % len(MIXED)], i) for i in range(n)]

        def theirs(audio=audio):
            return peer.translate(audio, ids, ANSWER, ends=None)

        for window, label in BOTH:
            model = in_window(ours, window)
            if window == "30s" and exact and run(model, audio) != theirs():
                raise SystemExit(f"{n} clips: ours and the peer's beams found other answers")
            bench.compare(
                f"5 beams, {n} clip{'s'[: n > 1]}, {label}",
                lambda model=model, audio=audio: run(model, audio),
                theirs,
                translation_phases(model, window, audio),
            )


def translation_phases(model: LLaST, window: str, audio: list[Tensor]) -> list[Phase]:
    """Encoder, prompts, then steps of 5 beams that go on to the longest answer allowed."""
    W, L, head = model.speech_encoder.config, model.llm.config, bytes_of(model.llm.lm_head)
    states = [n_states(len(clip)) for clip in audio]
    given = [W.max_source_positions] * len(audio) if window == "30s" else states
    prompts = [S + PROMPT - 1 for S in states]
    weights = bytes_of(model.llm.model.layers) + head
    kv = 2 * L.num_hidden_layers * L.num_key_value_heads * L.head_dim
    kv *= model.llm.lm_head.weight.element_size()
    word = 2 * L.hidden_size * L.vocab_size
    middle = ANSWER // 2  # answers of half the length stand for the growing ones
    return [
        encoder_phase(model, list(zip(given, states, strict=True))),
        Phase(sum(sum(llm_flops(L, P, 1)) + word for P in prompts), weights),
        Phase(
            sum(sum(llm_flops(L, 5, 5, P + middle)) + 5 * word for P in prompts),
            weights + sum(P + 5 * middle for P in prompts) * kv,
            times=ANSWER - 1,
        ),
    ]


@torch.inference_mode()
def prefill_case(bench: Bench, ours: LLaST, peer: Peer):
    """The LLM over the speech of 5 s and a prompt; the vocabulary only at the last position."""
    D, dtype = ours.llm.config.hidden_size, ours.llm.lm_head.weight.dtype
    x = torch.randn(1, 250 + PROMPT, D).to(bench.device, dtype)
    last = tuple(torch.tensor([[0], [250 + PROMPT - 1]], device=bench.device))  # row, position

    def mine():
        return ours.llm.logits(ours.llm.hidden(x, selection=last)[0])

    def theirs():
        return peer.llm(inputs_embeds=x, use_cache=True, logits_to_keep=1).logits[:, -1]

    same("prefill", mine(), theirs(), dtype)
    L, weights = ours.llm.config, bytes_of(ours.llm.model.layers) + bytes_of(ours.llm.lm_head)
    phase = Phase(sum(llm_flops(L, 250 + PROMPT, 1)) + 2 * D * L.vocab_size, weights)
    bench.compare("LLM over 5 s of speech and the prompt", mine, theirs, [phase])


def test_set(bench: Bench, ours: LLaST, peer: Peer, n: int):
    """The first n clips of the embedded test set, from files to texts."""
    rows = read_corpus(ROOT / "tiny" / "corpus", "fr", "en")[0]["test"][:n]
    ids = torch.tensor([1, 5, AUDIO_ID, 7], device=bench.device)

    def theirs():
        order = sorted(rows, key=lambda row: row.seconds)
        for start in range(0, len(order), 16):
            audio = [load_audio(row.path) for row in order[start : start + 16]]
            peer.translate(audio, ids, ANSWER)

    for window, label in BOTH:
        model = in_window(ours, window)

        def mine(model=model):
            search = SearchOptions(max_new_tokens=ANSWER)
            translate(model, [row.path for row in rows], search=search)

        bench.compare(f"{n} test clips from file to text, {label}", mine, theirs, [])


def run_size(bench: Bench, dtype: torch.dtype, cases: list[str]):
    ours = build_ours(bench.size, bench.device, dtype)
    if "training" in cases:
        ours.train()
        training_cases(bench, ours, Peer(ours).train())
    if "translation" not in cases:
        return
    merge_lora(ours.eval(), delete_lora=True)
    peer = Peer(ours).eval()
    mel_case(bench)
    encoder_cases(bench, ours, peer)
    prefill_case(bench, ours, peer)
    translation_cases(bench, ours, peer)
    if bench.size == "tiny":
        test_set(bench, ours, peer, 48)


def main():
    device, dtype, reason = pick_device()
    parser = argparse.ArgumentParser(description="This project next to transformers and peft.")
    sizes = ["tiny", "base-135m", *(["llast-2b"] if device.type == "cuda" else [])]
    parser.add_argument("--sizes", nargs="+", choices=["tiny", *SIZES], default=sizes)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=CASES)
    parser.add_argument("--times", type=int, default=5, help="turns; the median counts")
    parser.add_argument("--no-table", action="store_true", help="do not write the table")
    parser.add_argument("--json", type=Path, default=Path(__file__).parent / "results.json")
    args = parser.parse_args()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    warnings.simplefilter("ignore", FutureWarning)  # theirs, about their own names
    torch.manual_seed(0)
    print(f"{reason}, torch {torch.__version__}, transformers {transformers.__version__}, peft "
          f"{peft.__version__}; median of {args.times}\n\n{HEADER}")  # fmt: skip
    machine = measure_machine(device, dtype)
    about = {"device": reason, "torch": torch.__version__, "peft": peft.__version__,
             "transformers": transformers.__version__, "date": time.strftime("%Y-%m-%d"),
             "times": args.times, "machine": machine.__dict__}  # fmt: skip
    results: list[Result] = []

    def save():
        lines = [r.__dict__ | {"ratio": round(r.ratio, 3)} for r in results]
        args.json.write_text(json.dumps(about | {"results": lines}, indent=2) + "\n")
        if not args.no_table:
            write_table(results, about)

    for size in args.sizes:
        run_size(Bench(size, device, machine, args.times, save, results), dtype, args.cases)


def write_table(results: list[Result], about: dict):
    machine = about["machine"]
    lines = [
        f"{about['date']}, {about['device']}, torch {about['torch']}, transformers "
        f"{about['transformers']}, peft {about['peft']}, median of {about['times']}. Measured "
        f"here: {machine['flops'] / 1e9:,.0f} GFLOP/s for a large matrix product, "
        f"{machine['bytes'] / 1e9:,.0f} GB/s read and written by a large copy.\n",
        "| size | case | ours, ms | peer, ms | peer : ours | spread | peak MB, ours : peer "
        "| limit, ms | reached |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for r in results:
        known = r.limit is not None
        lines.append(
            f"| {r.size} | {r.case} | {1e3 * r.ours:,.1f} | {1e3 * r.peer:,.1f} | {r.ratio:.2f} "
            f"| {r.spread:.0%} | {r.ours_memory / 1e6:,.0f} : {r.peer_memory / 1e6:,.0f} "
            f"| {f'{1e3 * r.limit:,.1f}' if known else ''} "
            f"| {f'{r.limit / r.ours:.0%}' if known else ''} |"
        )
    write_below("results", lines)


if __name__ == "__main__":
    main()
