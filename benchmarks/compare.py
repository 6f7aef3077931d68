"""This project and transformers + peft, doing the same work on the same machine.

    python benchmarks/compare.py                     the embedded default, and Whisper-base + 135M
    python benchmarks/compare.py --sizes llast-2b    geometry of the paper's systems, on CUDA

The peer is what a capable user writes: sdpa attention, the clips' own states cut out of the 30 s
window, right padding in training and left padding in generation, LoRA merged before generation.
Both get the same weights, LoRA included. Before a case is timed, both must have computed the same.
Then they take turns; the median counts. Results go to a JSON file and a table.
"""

import argparse
import ctypes
import gc
import json
import math
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path

import peft
import torch
import transformers
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers.models.whisper.modeling_whisper import WhisperEncoder as TheirEncoder

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from data import (  # noqa: E402
    AUDIO_ID,
    IGNORE,
    Batch,
    Example,
    Row,
    group,
    load_audio,
    read_corpus,
)
from llama import Llama, LlamaConfig  # noqa: E402
from llast import LLaST, LLaSTConfig, export, pick_device  # noqa: E402
from lora import merge_lora  # noqa: E402
from train import PRESETS, PUBLIC  # noqa: E402
from translate import beam_search, translate  # noqa: E402
from whisper_encoder import (  # noqa: E402
    WhisperConfig,
    WhisperEncoder,
    clip_to_mel,
    log_mel_spectrogram,
    n_states,
)

BASE = WhisperConfig(80, 512, 6, 8, 2048, 1500)  # Whisper-base
SMALL_LLM = LlamaConfig(576, 1536, 30, 9, 3, 64, 49152, 1e-5, 10_000.0, False)  # 135M
SIZES = {
    "base-135m": (BASE, SMALL_LLM, 16, 16),
    "llast-2b": (
        PUBLIC["whisper-large-v2"][2], PUBLIC["TinyLlama-1.1B-Chat-v1.0"][2], 128, 512,
    ),
    "llast-8b": (PUBLIC["whisper-large-v2"][2], PUBLIC["Llama-2-7b-chat-hf"][2], 128, 512),
}  # fmt: skip
PROMPT, ANSWER, EOS = 28, 24, 2  # tokens of a made-up row, the end included in the answer
MIXED = (2.0, 3.1, 4.2, 5.0, 6.3, 7.7, 9.4, 12.0)  # seconds of the clips in a training step

# --------------------------------------------------------------------------------- the two systems


def random_bases(folder: Path, W: WhisperConfig, L: LlamaConfig, dtype: torch.dtype):
    """Two Hugging Face folders with random weights of the scale that trained ones have."""
    torch.manual_seed(0)
    for name, module, config in (
        ("whisper", WhisperEncoder(W), W.__dict__ | {"model_type": "whisper"}),
        ("llama", Llama(L), L.__dict__ | {"model_type": "llama", "eos_token_id": EOS}),
    ):
        (folder / name).mkdir()
        prefix = "model.encoder." if name == "whisper" else ""
        weights = {f"{prefix}{k}": v.to(dtype) for k, v in module.state_dict().items()}
        save_file(weights, folder / name / "model.safetensors", {"format": "pt"})
        (folder / name / "config.json").write_text(json.dumps(config))
    tokenizer = (ROOT / "tiny" / "llama" / "tokenizer.model").read_bytes()
    (folder / "llama" / "tokenizer.model").write_bytes(tokenizer)


def build_ours(config: LLaSTConfig, device, dtype) -> LLaST:
    """A LLaST whose LoRA is no longer fresh, so that a LoRA left out would be noticed."""
    model = LLaST.fresh(config, dtype, device)
    chance = torch.Generator().manual_seed(1)
    for name, tensor in model.trained().items():
        if name.endswith("lora_B"):
            tensor.copy_(0.01 * torch.randn(tensor.shape, generator=chance))
    return model


class Peer(nn.Module):
    """The same system out of transformers and peft."""

    def __init__(self, ours: LLaST, folder: Path, merged: bool):
        super().__init__()
        config, device, dtype = ours.config, ours.device, ours.llm.lm_head.weight.dtype
        how = {"dtype": dtype, "attn_implementation": "sdpa"}
        shape = transformers.WhisperConfig.from_pretrained(config.encoder, **how)
        encoder = TheirEncoder(shape).to(dtype)  # from_pretrained would look for all of Whisper
        encoder.load_state_dict(WhisperEncoder.from_pretrained(config.encoder, dtype).state_dict())
        llm = transformers.LlamaForCausalLM.from_pretrained(config.llm, **how)
        # Their WhisperModel has an attribute `encoder`; to load the adapter, so has this.
        holder = nn.Module()
        holder.encoder = encoder
        adapter = peft.LoraConfig.from_pretrained(str(folder / "encoder-lora"))
        adapter.inference_mode = merged
        encoder = peft.PeftModel(holder, adapter)
        llm = peft.PeftModel.from_pretrained(llm, folder / "llm-lora", is_trainable=not merged)
        weights = peft.load_peft_weights(str(folder / "encoder-lora"))
        peft.set_peft_model_state_dict(encoder, weights)
        if merged:
            encoder, llm = encoder.merge_and_unload(), llm.merge_and_unload()
        self.encoder = encoder.encoder if merged else encoder.base_model.model.encoder
        self.llm, self.window = llm, ours.speech_encoder.config.max_source_positions
        self.M = ours.speech_encoder.config.num_mel_bins
        self.features = transformers.WhisperFeatureExtractor(feature_size=self.M)
        self.projector = nn.Sequential(
            *(nn.Linear(m.in_features, m.out_features) if hasattr(m, "weight") else nn.GELU()
              for m in ours.projector.model)
        )  # fmt: skip
        self.projector.load_state_dict(ours.projector.model.state_dict())
        self.to(device)

    def encode_speech(self, audio: list[Tensor]) -> list[Tensor]:
        waves = [clip.numpy() for clip in audio]
        mel = self.features(waves, sampling_rate=16_000, return_tensors="pt").input_features
        weight = self.llm.get_input_embeddings().weight
        states = self.encoder(mel.to(weight.device, weight.dtype)).last_hidden_state
        n = [n_states(len(clip)) for clip in audio]
        speech = self.projector(states[:, : max(n)].float()).to(weight.dtype)
        return [clip[:k] for clip, k in zip(speech, n, strict=True)]

    def rows(self, audio: list[Tensor], ids: list[Tensor]) -> list[Tensor]:
        embed, rows = self.llm.get_input_embeddings(), []
        for heard, row in zip(self.encode_speech(audio), ids, strict=True):
            words, at = embed(row.clamp(min=0)), row.tolist().index(AUDIO_ID)
            rows.append(torch.cat([words[:at], heard, words[at + 1 :]]))
        return rows

    def forward(self, batch: Batch) -> Tensor:
        device = self.llm.get_input_embeddings().weight.device
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
    def translate(self, audio: list[Tensor], ids: Tensor, most: int) -> list[list[int]]:
        rows = self.rows(audio, [ids] * len(audio))
        P, device = max(map(len, rows)), rows[0].device
        left = torch.tensor([P - len(row) for row in rows], device=device)
        x = torch.stack([nn.functional.pad(row, (0, 0, P - len(row), 0)) for row in rows])
        mask = (torch.arange(P, device=device) >= left[:, None]).long()
        found = self.llm.generate(
            inputs_embeds=x, attention_mask=mask, num_beams=5, do_sample=False, max_new_tokens=most,
            length_penalty=1.0, early_stopping=False, eos_token_id=EOS, pad_token_id=EOS,
        )  # fmt: skip
        return [row[: row.index(EOS)] if EOS in row else row for row in found.tolist()]


def adapters(ours: LLaST, folder: Path):
    """Both LoRAs as peft reads them. `export` merges, so it gets a copy."""
    ours.save_pretrained(folder / "run")
    export(LLaST.from_pretrained(folder / "run"), folder / "out")
    return folder / "out"


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

    @property
    def ratio(self) -> float:
        return self.peer / self.ours


def peak_of(work, device) -> int:
    """Bytes that a piece of work needs on top of what is there before it."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew
    before = memory_line("VmRSS")
    work()
    return memory_line("VmHWM") - before


def memory_line(name: str) -> int:
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return 1024 * int(lines[name].split()[0])


def seconds_of(work, device) -> float:
    began = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began


def compare(size: str, case: str, ours, peer, device, times: int) -> Result:
    """Ours and the peer's in turns, after one call of each to warm up."""
    ours(), peer()
    taken = [(seconds_of(ours, device), seconds_of(peer, device)) for _ in range(times)]
    mine, theirs = ([pair[i] for pair in taken] for i in range(2))
    middle = statistics.median(mine)
    memory = peak_of(ours, device), peak_of(peer, device)
    result = Result(
        size, case, middle, statistics.median(theirs), (max(mine) - min(mine)) / middle, *memory
    )
    print(line_of(result), flush=True)
    return result


HEADER = f"{'size':10} {'case':44} {'ours':>9} {'peer':>9} {'ratio':>6} {'memory, MB':>16}"


def line_of(r: Result) -> str:
    memory = f"{r.ours_memory / 1e6:,.0f} : {r.peer_memory / 1e6:,.0f}"
    return (
        f"{r.size:10} {r.case:44} {1e3 * r.ours:7.1f}ms {1e3 * r.peer:7.1f}ms {r.ratio:5.2f}x "
        f"{memory:>16}"
    )


def same(what: str, ours: Tensor, theirs: Tensor, dtype: torch.dtype):
    """Stop if the two have not computed the same; nothing is timed then."""
    tolerance = 1e-3 if dtype == torch.float32 else 5e-2
    distance = (ours.float() - theirs.float()).abs().max() / theirs.float().abs().max()
    if not distance < tolerance:
        raise SystemExit(f"{what}: ours and the peer's differ by {distance:.2g} of the largest")


# -------------------------------------------------------------------------------------- the cases


def noise(seconds: float, seed: int) -> Tensor:
    """A clip that is never silent."""
    chance = torch.Generator().manual_seed(seed)
    return 0.1 * torch.randn(round(16_000 * seconds), generator=chance)


def row_of(V: int, seed: int) -> tuple[list[int], list[int]]:
    chance = torch.Generator().manual_seed(seed)
    prompt = [1, 5, AUDIO_ID, *torch.randint(9, V, (PROMPT - 3,), generator=chance).tolist()]
    return prompt, [*torch.randint(9, V, (ANSWER - 1,), generator=chance).tolist(), EOS]


def training_batch(V: int, which: list[int]) -> Batch:
    rows = [row_of(V, i) for i in which]
    return Batch(
        [noise(MIXED[i], i) for i in which],
        torch.tensor([prompt + answer for prompt, answer in rows]),
        torch.tensor([[IGNORE] * PROMPT + answer for _, answer in rows]),
        torch.tensor([PROMPT + ANSWER] * len(rows)),
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


def mel_case(size: str, device, times: int) -> Result:
    audio = noise(10.0, 0)
    features = transformers.WhisperFeatureExtractor(feature_size=80)

    def ours():
        return log_mel_spectrogram(audio.to(device), 80)

    def peer():
        return features(
            audio.numpy(), sampling_rate=16_000, return_tensors="pt", padding=False,
            device=str(device),
        ).input_features[0]  # fmt: skip

    same("log-mel", ours().cpu(), peer().cpu(), torch.float32)
    return compare(size, "log-mel of 10 s", ours, peer, device, 5 * times)


@torch.inference_mode()
def encoder_cases(size: str, ours: LLaST, peer: Peer, device, times: int) -> list[Result]:
    dtype, audio = ours.speech_encoder.conv1.weight.dtype, noise(5.0, 0)
    mels = {
        window: clip_to_mel(audio, ours.speech_encoder.config.num_mel_bins, window)[None]
        for window in ("30s", "clip")
    }
    mels = {window: mel.to(device, dtype) for window, mel in mels.items()}

    def run(window: str):
        return lambda: ours.speech_encoder(mels[window])

    def theirs():
        return peer.encoder(mels["30s"]).last_hidden_state

    same("encoder", run("30s")(), theirs(), dtype)
    return [
        compare(size, f"encoder, clip of 5 s, {label}", run(window), theirs, device, times)
        for window, label in (("30s", "both in 30 s"), ("clip", "ours at its length"))
    ]


def training_cases(size: str, ours: LLaST, peer: Peer, device, times: int) -> list[Result]:
    V, everything = ours.llm.config.vocab_size, list(range(len(MIXED)))
    together = [training_batch(V, everything)]
    budget = PRESETS["tiny" if device.type == "cpu" else "llast-8b"].batch
    by_length = [training_batch(V, which) for which in as_train_groups_them(budget)]
    asked = len(MIXED) * ANSWER

    def step(model: nn.Module, batches: list[Batch]):
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=0.0, fused=True)  # nothing may change between

        def once():
            total = 0.0
            for batch in batches:
                loss = model(batch)
                loss = loss.sum() / asked if loss.dim() else loss
                loss.backward()
                total += loss.detach()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            return total

        return once

    counts = [sum(p.numel() for p in m.parameters() if p.requires_grad) for m in (ours, peer)]
    if len(set(counts)) > 1:
        raise SystemExit(f"ours trains {counts[0]:,} parameters, the peer {counts[1]:,}")
    cases, theirs = [], step(peer, together)
    for window, batches, label in (
        ("30s", together, "both in 30 s"),
        ("30s", by_length, "both in 30 s, ours by length"),
        ("clip", by_length, "ours at their lengths"),
    ):
        mine = step(in_window(ours, window), batches)
        if window == "30s":
            same("loss", mine(), theirs(), ours.llm.lm_head.weight.dtype)
        case = f"training step, 8 clips, {label}"
        cases.append(compare(size, case, mine, theirs, device, times))
    return cases


def translation_cases(size: str, ours: LLaST, peer: Peer, device, times: int) -> list[Result]:
    prompt, _ = row_of(ours.llm.config.vocab_size, 0)
    ids = torch.tensor(prompt, device=device)
    exact = ours.llm.lm_head.weight.dtype == torch.float32

    @torch.inference_mode()
    def run(model: LLaST, audio: list[Tensor]):
        rows = [model.splice(ids, heard) for heard in model.encode_speech(audio)]
        found = beam_search(model.llm, rows, [EOS], 5, 1.0, ANSWER)
        return [best.ids for best, *_ in found]

    cases = []
    for n, window, label in (
        (1, "30s", "both in 30 s"),
        (1, "clip", "ours at its length"),
        (4, "30s", "both in 30 s"),
        (16, "clip", "ours at their lengths"),
    ):
        audio = [noise(MIXED[i % len(MIXED)], i) for i in range(n)]
        model = in_window(ours, window)
        if window == "30s" and exact and run(model, audio) != peer.translate(audio, ids, ANSWER):
            raise SystemExit(f"{n} clips: ours and the peer's beams found other answers")
        cases.append(
            compare(
                size, f"5 beams, {n} clip{'s'[: n > 1]}, {label}",
                lambda model=model, audio=audio: run(model, audio),
                lambda audio=audio: peer.translate(audio, ids, ANSWER), device, times,
            )
        )  # fmt: skip
    return cases


@torch.inference_mode()
def prefill_case(size: str, ours: LLaST, peer: Peer, device, times: int) -> Result:
    """The LLM over the speech of 5 s and a prompt; the vocabulary only at the last position."""
    D, dtype = ours.llm.config.hidden_size, ours.llm.lm_head.weight.dtype
    x = torch.randn(1, 250 + PROMPT, D).to(device, dtype)

    def mine():
        return ours.llm.logits(ours.llm.hidden(x)[0][:, -1])

    def theirs():
        return peer.llm(inputs_embeds=x, use_cache=True, logits_to_keep=1).logits[:, -1]

    same("prefill", mine(), theirs(), dtype)
    return compare(size, "LLM over 5 s of speech and the prompt", mine, theirs, device, times)


def test_set(ours: LLaST, peer: Peer, device, n: int) -> Result:
    """The first n clips of the embedded test set from files to texts, one pass each."""
    rows = read_corpus(ROOT / "tiny" / "corpus", "fr", "en")[0]["test"][:n]
    ids = torch.tensor([1, 5, AUDIO_ID, 7], device=device)

    def mine():
        translate(in_window(ours, "clip"), [row.path for row in rows], max_new_tokens=ANSWER)

    def theirs():
        order = sorted(rows, key=lambda row: row.seconds)
        for start in range(0, len(order), 16):
            audio = [load_audio(row.path) for row in order[start : start + 16]]
            peer.translate(audio, ids, ANSWER)

    case = f"{n} test clips from file to text, ours at their lengths"
    return compare("tiny", case, mine, theirs, device, 1)


def run_size(size: str, device, dtype, times: int) -> list[Result]:
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        if size == "tiny":
            bases, ranks = (ROOT / "tiny" / "whisper", ROOT / "tiny" / "llama"), (16, 16)
        else:
            W, L, *ranks = SIZES[size]
            random_bases(folder, W, L, dtype)
            bases = folder / "whisper", folder / "llama"
        config = LLaSTConfig(
            *map(str, bases), "llama2", "30s", ranks[0], 2.0 * ranks[0], ranks[1], 2.0 * ranks[1],
            dropout=0.0, directions=("fr-en",),
        )  # fmt: skip
        ours = build_ours(config, device, dtype)
        out = adapters(ours, folder)
        results = [mel_case(size, device, times)]
        ours.train()
        peer = Peer(ours, out, merged=False).train()
        results += training_cases(size, ours, peer, device, times)
        del peer
        merge_lora(ours.eval())
        peer = Peer(ours, out, merged=True).eval()
        results += encoder_cases(size, ours, peer, device, times)
        results.append(prefill_case(size, ours, peer, device, times))
        results += translation_cases(size, ours, peer, device, times)
        if size == "tiny":
            results.append(test_set(ours, peer, device, 48))
        return results


def main():
    device, dtype, reason = pick_device()
    parser = argparse.ArgumentParser(description="This project beside transformers and peft.")
    sizes = ["tiny", "base-135m"] if device.type == "cpu" else ["tiny", *SIZES]
    parser.add_argument("--sizes", nargs="+", choices=["tiny", *SIZES], default=sizes)
    parser.add_argument("--times", type=int, default=5, help="turns; the median counts")
    parser.add_argument("--json", type=Path, default=Path(__file__).parent / "results.json")
    args = parser.parse_args()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.manual_seed(0)
    print(f"{reason}, torch {torch.__version__}, transformers {transformers.__version__}, peft "
          f"{peft.__version__}; median of {args.times}\n\n{HEADER}")  # fmt: skip
    results = [r for size in args.sizes for r in run_size(size, device, dtype, args.times)]
    about = {"device": reason, "torch": torch.__version__, "peft": peft.__version__,
             "transformers": transformers.__version__, "date": time.strftime("%Y-%m-%d"),
             "times": args.times}  # fmt: skip
    lines = [r.__dict__ | {"ratio": round(r.ratio, 3)} for r in results]
    args.json.write_text(json.dumps(about | {"results": lines}, indent=2) + "\n")
    write_table(results, about)


def write_table(results: list[Result], about: dict):
    """Put the results into README.md, below what stands there for good."""
    page = Path(__file__).parent / "README.md"
    above, mark, _ = page.read_text().partition("<!-- results -->\n")
    rows = [
        f"{about['date']}, {about['device']}, torch {about['torch']}, transformers "
        f"{about['transformers']}, peft {about['peft']}, median of {about['times']}:\n",
        "| size | case | ours, ms | peer, ms | peer : ours | spread | peak MB, ours : peer |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for r in results:
        rows.append(
            f"| {r.size} | {r.case} | {1e3 * r.ours:,.1f} | {1e3 * r.peer:,.1f} | {r.ratio:.2f} "
            f"| {r.spread:.0%} | {r.ours_memory / 1e6:,.0f} : {r.peer_memory / 1e6:,.0f} |"
        )
    page.write_text(above + mark + "\n".join(rows) + "\n")


if __name__ == "__main__":
    main()
