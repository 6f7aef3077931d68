"""Print what a training run needs: parameters, memory, steps, time and downloads.

    python tools/plan.py llast-8b --lang fr
    python tools/plan.py llast-8b --gpus 8             with several GPUs: train.py and torchrun

It needs no weights. Sizes: B clips in a batch, S states in the encoder, P positions in the LLM,
Da the width of the encoder, D the width of the LLM.
"""

import argparse
import math
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))  # the repository's folder

from data import CACHE_BYTES, n_positions, parse_directions, read_corpus
from llama import Llama, LlamaConfig
from llast import LLaST
from tools.cost import encoder_flops, llm_flops, projector_flops
from train import (
    DOWNLOADS,
    PRESETS,
    Preset,
    download_command,
    model_config,
    print_parts,
    short,
    with_flags,
)
from train import build_parser as train_parser
from whisper_encoder import SAMPLE_RATE, WhisperConfig, WhisperEncoder, n_states

GEOMETRY = {  # config.json of public checkpoints, by the name of the folder
    "whisper-base": WhisperConfig(80, 512, 6, 8, 2048, 1500),
    "whisper-small": WhisperConfig(80, 768, 12, 12, 3072, 1500),
    "whisper-large-v2": WhisperConfig(80, 1280, 32, 20, 5120, 1500),
    "whisper-large-v3": WhisperConfig(128, 1280, 32, 20, 5120, 1500),
    "SmolLM2-135M-Instruct": LlamaConfig(576, 1536, 30, 9, 3, 64, 49152, 1e-5, 100_000.0, True),
    "Llama-3.2-1B-Instruct": LlamaConfig(
        2048, 8192, 16, 32, 8, 64, 128256, 1e-5, 500_000.0, True, factor=32.0
    ),
    "Llama-3.1-8B-Instruct": LlamaConfig(
        4096, 14336, 32, 32, 8, 128, 128256, 1e-5, 500_000.0, False, factor=8.0
    ),
    "TinyLlama-1.1B-Chat-v1.0": LlamaConfig(
        2048, 5632, 22, 32, 4, 64, 32000, 1e-5, 10_000.0, False
    ),
    "Llama-2-7b-chat-hf": LlamaConfig(4096, 11008, 32, 32, 32, 128, 32000, 1e-5, 10_000.0, False),
    "Llama-2-13b-chat-hf": LlamaConfig(5120, 13824, 40, 40, 40, 128, 32000, 1e-5, 10_000.0, False),
    # No preset uses these two. The paper asks whether a larger LLM would translate better.
    "llama-30b": LlamaConfig(6656, 17920, 60, 52, 52, 128, 32000, 1e-6, 10_000.0, False),
    "Llama-2-70b-chat-hf": LlamaConfig(8192, 28672, 80, 64, 8, 128, 32000, 1e-5, 10_000.0, False),
}
COVOST_TRAIN = {  # rows and hours of CoVoST-2's train split, by the language that is spoken
    "fr": (207_374, 264), "de": (127_834, 184), "es": (79_015, 113), "ca": (95_854, 136),
    "it": (31_698, 44), "ru": (12_112, 18), "zh-CN": (7_085, 10), "pt": (9_158, 10),
    "fa": (53_949, 49), "et": (1_782, 3), "mn": (2_067, 3), "nl": (7_108, 7), "tr": (3_966, 4),
    "ar": (2_283, 2), "sv-SE": (2_160, 2), "lv": (2_337, 2), "sl": (1_843, 2), "ta": (1_358, 2),
    "ja": (1_119, 1), "id": (1_243, 1), "cy": (1_241, 2), "en": (289_430, 430),
}  # fmt: skip
TEXT, ANSWER = 60, 30  # assumed tokens of a row: prompt and answer, and only the answer
CLIPS = 16  # in one batch of a translation
FLOPS, SHARE = 989e12, 0.4  # of an H100 in bf16 (data sheet), and the assumed share of it


def geometry(base: Path, kind):
    """The configuration of a checkpoint: from its folder if it exists, or as it was published."""
    if (base / "config.json").is_file():
        return kind.from_json(base / "config.json")
    if base.name not in GEOMETRY:
        raise FileNotFoundError(
            f"{base} has no config.json; download it, or choose one of {', '.join(GEOMETRY)}"
        )
    return GEOMETRY[base.name]


def count_examples(settings: Preset, clips: int | None) -> tuple[list[tuple[str, int, int]], float]:
    """(direction, rows to translate, rows to transcribe) of an epoch, and mean seconds of a clip.

    They are read from the corpus if it exists. Otherwise they are the numbers of CoVoST-2. If
    `clips` is a number, only the first `clips` clips of each direction are counted. A clip that is
    translated into several languages is transcribed once.
    """
    counts, seconds, sources = [], 0.0, set()
    for source, target in parse_directions(settings.lang):
        if settings.data.is_dir():
            rows = read_corpus(settings.data, source, target)[0]["train"][:clips]
            if not rows:
                raise ValueError(
                    f"the {source}-{target} corpus in {settings.data} has no usable train clips; "
                    "name another one with --data"
                )
            n, mean = len(rows), sum(row.seconds for row in rows) / len(rows)
            share = sum(bool(row.sentence.strip()) for row in rows) / n
        else:
            n, hours = COVOST_TRAIN[source]
            mean, share = 3600 * hours / n, 1.0
            n = min(n, clips or n)
        n_asr = 0 if source in sources else round(settings.asr * share * n)
        counts.append((f"{source}-{target}", n, n_asr))
        sources.add(source)
        seconds += n * mean
    return counts, seconds / sum(n for _, n, _ in counts)


def lora_size(settings: Preset, Wc: WhisperConfig, Lc: LlamaConfig) -> tuple[int, int, int]:
    """LoRA parameters of one layer: in the encoder, in the LLM's attention, in the LLM's MLP."""
    Da, D, kv = Wc.d_model, Lc.hidden_size, Lc.num_key_value_heads * Lc.head_dim
    q = Lc.num_attention_heads * Lc.head_dim
    encoder = settings.encoder_rank * (4 * 2 * Da + 2 * (Da + Wc.encoder_ffn_dim))
    attention = settings.llm_rank * (2 * (D + q) + 2 * (D + kv))
    mlp = settings.llm_rank * 3 * (D + Lc.intermediate_size)
    return encoder, attention, mlp


def activation_bytes(settings, Wc: WhisperConfig, Lc: LlamaConfig, B: int, S: int, P: int) -> int:
    """Bytes that the forward pass keeps for the backward pass, in bf16, of B clips.

    Counted line by line in SelfAttention, Attention, MLP and LoRALinear; the dropout of LoRALinear
    keeps a mask of one byte and a copy of its input. A recomputed layer keeps only its input, plus
    the activations of the one layer that is computed again. The last layer of the encoder computes
    fewer states in a 30 s window; this is ignored here.
    """
    D, H, F = Lc.hidden_size, Lc.num_attention_heads, Lc.intermediate_size
    q, kv = H * Lc.head_dim, Lc.num_key_value_heads * Lc.head_dim
    Da, Fe = Wc.d_model, Wc.encoder_ffn_dim
    if settings.dropout:  # each matrix keeps its input: seven per LLM layer, six per encoder layer
        attention, mlp, encoder = 3 * (3 * D + q), 3 * (2 * D + F), 3 * (5 * Da + Fe)
    else:  # matrices with the same input keep it once; attention keeps the input of o_proj anyway
        attention, mlp, encoder = 2 * D, 2 * (D + F), 2 * (2 * Da + Fe)
    attention += 4 * D + 4 * (q + kv) + 4 * H + 2 * 4 * settings.llm_rank
    mlp += 4 * D + 6 * F + 2 * 3 * settings.llm_rank
    encoder += 4 * Da + 8 * Da + 2 * Fe
    encoder += 4 * Wc.encoder_attention_heads + 2 * 6 * settings.encoder_rank
    in_encoder, *in_llm = (2 * n for n in lora_size(settings, Wc, Lc))  # LoRA's weights in bf16
    encoder, llm = B * S * encoder + in_encoder, B * P * (attention + mlp) + sum(in_llm)
    encoder_again, llm_again = settings.recompute == "all", settings.recompute != "none"
    kept = Wc.encoder_layers * (2 * B * S * Da if encoder_again else encoder)
    kept += Lc.num_hidden_layers * (2 * B * P * D if llm_again else llm)
    largest = max(encoder_again * encoder, llm_again * llm)
    if not llm_again:  # the last MLP of the LLM computes only the answers
        kept -= B * (P - ANSWER) * mlp
    logits = B * ANSWER * 10 * Lc.vocab_size  # in bf16, in float32, and their gradient
    return kept + largest + logits


def translation_bytes(settings: Preset, Wc: WhisperConfig, Lc: LlamaConfig, S: int, P: int) -> int:
    """Bytes that a translation of CLIPS clips needs in addition to the weights, in bf16.

    This is the maximum of three moments: a layer of the encoder; the prefill in the next-to-last
    layer of the LLM, with the keys and values of the earlier layers; a beam step, with the KV cache
    and the logits.
    """
    F, D, kv = Lc.intermediate_size, Lc.hidden_size, Lc.num_key_value_heads * Lc.head_dim
    encoder = 2 * CLIPS * S * (2 * Wc.encoder_ffn_dim + 3 * Wc.d_model)
    position = 2 * 2 * kv  # keys and values, of one layer
    prompts = CLIPS * P * ((Lc.num_hidden_layers - 1) * position + 2 * (3 * F + 6 * D))
    room = P  # positions for which the cache has memory; it grows as in llama.Cache
    while room < P + settings.beams * (ANSWER - 1):
        room += max(settings.beams, room // 2)
    groups = Lc.num_attention_heads // Lc.num_key_value_heads
    keys = P + settings.beams * (ANSWER - 1)
    mask = 3 * groups * settings.beams * keys  # as bool, and in bf16 for the kernel
    steps = CLIPS * (
        Lc.num_hidden_layers * position * room + 14 * settings.beams * Lc.vocab_size + mask
    )
    return max(encoder, prompts, steps)


def example_flops(
    settings: Preset, Wc: WhisperConfig, Lc: LlamaConfig, S: int, n: int, text: int, answer: int
) -> float:
    """Multiplications and additions of one training example.

    S states in the encoder, n of them in the LLM, `text` tokens, `answer` of them with a loss.
    A frozen matrix costs a forward pass and the gradient of its input. A trained matrix also costs
    the gradient of its weight. The backward pass of attention is 2.5 times its forward pass.
    """
    convolutions, in_encoder, attention = encoder_flops(Wc, S, n)
    P = n + text
    in_llm, causal = llm_flops(Lc, P, n_mlp=answer)
    in_encoder_layer, in_attention, in_mlp = lora_size(settings, Wc, Lc)
    keys_and_values = settings.encoder_rank * 4 * Wc.d_model
    encoder_lora = 2 * S * Wc.encoder_layers * in_encoder_layer
    encoder_lora -= 2 * (S - n) * (in_encoder_layer - keys_and_values)
    llm_lora = 2 * P * Lc.num_hidden_layers * (in_attention + in_mlp) - 2 * (P - answer) * in_mlp
    frozen = in_encoder + in_llm + 2 * answer * Lc.hidden_size * Lc.vocab_size
    trained = encoder_lora + llm_lora + projector_flops(Wc, Lc, n)
    again = in_llm + causal + llm_lora if settings.recompute != "none" else 0
    again += in_encoder + attention + encoder_lora if settings.recompute == "all" else 0
    # Nothing before the first layer is trained, so its q, k and v need no gradient of their input.
    first = 2 * S * 3 * Wc.d_model**2
    return convolutions + 2 * frozen - first + 3.5 * (attention + causal) + 3 * trained + again


def print_plan(settings: Preset, clips: int | None, gpus: int = 1):
    """Print parameters, memory, steps, time and downloads of a training run on `gpus` GPUs."""
    Wc, Lc = geometry(settings.encoder, WhisperConfig), geometry(settings.llm, LlamaConfig)
    with torch.device("meta"):
        model = LLaST(model_config(settings), WhisperEncoder(Wc), Llama(Lc), tokenizer=None)
    counts, seconds = count_examples(settings, clips)
    print_parts(model)
    n_st, n_asr = print_examples(settings, counts)

    n_samples = math.ceil(seconds * SAMPLE_RATE)
    n, P = n_states(n_samples), n_positions(n_samples, TEXT + 1)  # AUDIO_ID is one more id
    S = Wc.max_source_positions if settings.window == "30s" else n
    B = max(1, settings.batch // P)
    print_memory(settings, model, gpus, B, S, P)
    decoded = min(CACHE_BYTES, 4 * SAMPLE_RATE * seconds * n_st)
    print(f"    {'main memory: decoded clips':29}{decoded / 1e9:6.2f}")

    flops = example_flops(settings, Wc, Lc, S, n, TEXT, ANSWER)
    hours = (n_st + n_asr) * settings.epochs * flops / (gpus * FLOPS * SHARE) / 3600
    steps = math.ceil((n_st + n_asr) / (B * settings.accumulate * gpus))
    several = f" x {gpus} GPUs" if gpus > 1 else ""
    devices = f"{gpus} H100, without the time to send" if gpus > 1 else "one H100"
    print(
        f"\na row       {seconds:.1f} s on average: {S} states in the encoder, {n} + {TEXT} "
        f"(assumed) positions in the LLM\n"
        f"a step      {B} rows x {settings.accumulate} batches{several}\n"
        f"an epoch    {n_st + n_asr:,} rows in {steps:,} steps\n"
        f"arithmetic  {flops / 1e9:,.0f} GFLOP a row\n"
        f"time        {f'{hours:.1f} h' if hours > 0.1 else 'less than 0.1 h'} for "
        f"{settings.epochs} epoch{'s'[: settings.epochs > 1]} at {SHARE:.0%} of "
        f"{FLOPS / 1e12:.0f} TFLOP/s ({devices}; by formula, not measured)"
    )
    print_downloads(settings)


def print_examples(settings: Preset, counts: list[tuple[str, int, int]]) -> tuple[int, int]:
    """Print the rows of each direction. -> rows to translate, rows to transcribe"""
    n_st, n_asr = sum(st for _, st, _ in counts), sum(asr for *_, asr in counts)
    origin = f"in {short(settings.data)}" if settings.data.is_dir() else "of CoVoST-2"
    print(f"\n{'direction':12}{'translate':>12}{'transcribe':>12}   training rows {origin}")
    for direction, st, asr in [*counts, ("all", n_st, n_asr)]:
        print(f"{direction:12}{st:12,}{asr:12,}")
    return n_st, n_asr


def layer_bytes(model: LLaST) -> list[int]:
    """Bytes of the frozen weights of each layer, in bfloat16. --shard divides these weights."""
    layers = (*model.speech_encoder.layers, *model.llm.model.layers)
    frozen = [[p for p in layer.parameters() if not p.requires_grad] for layer in layers]
    return [2 * sum(p.numel() for p in parameters) for parameters in frozen]


def sent_bytes(settings: Preset, trained: int, layers: list[int], gpus: int, shard: bool) -> float:
    """Bytes that one GPU sends to others in one step, if they are connected as a ring.

    To sum the gradients, a GPU sends each number twice, except its own share: first to be added,
    then as a part of the result. With --shard, the weights of a layer are collected twice for each
    batch, for the forward and the backward pass. A GPU passes on all of them except one share.
    """
    gradients = 2 * 4 * trained
    weights = 2 * settings.accumulate * sum(layers) if shard else 0
    return (gpus - 1) / gpus * (gradients + weights)


def print_memory(settings: Preset, model: LLaST, gpus: int, B: int, S: int, P: int):
    """Print the memory of each GPU that training needs, and that translation needs.

    With several GPUs, also print it with --shard, and the bytes that a GPU sends in a step.
    """
    Wc, Lc = model.speech_encoder.config, model.llm.config
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    frozen = 2 * sum(p.numel() for p in model.parameters() if not p.requires_grad)
    layers = layer_bytes(model)
    # One layer is in use. PyTorch has also received the next one, and keeps what it received of
    # this one a little longer.
    gathered = 3 * max(layers)
    memory = {
        "frozen weights, bfloat16": (frozen, frozen - sum(layers) + sum(layers) / gpus),
        "collected layers, estimated": (0, gathered),
        "LoRA and projector, float32": (4 * trained, 4 * trained),
        "gradients, float32": (4 * trained, 4 * trained),
        "two averages of AdamW": (8 * trained, 8 * trained),
        "activations, estimated": (activation_bytes(settings, Wc, Lc, B, S, P),) * 2,
    }
    memory["all"] = tuple(map(sum, zip(*memory.values(), strict=True)))
    if gpus == 1:
        print("\nmemory on one GPU                    GB")
        del memory["collected layers, estimated"]
    else:
        print(f"\n{f'memory on each of {gpus} GPUs':33}{'GB':>6}   with --shard")
        sizes = [sent_bytes(settings, trained, layers, gpus, shard) for shard in (False, True)]
        memory["a GPU sends in each step"] = tuple(sizes)
    for label, sizes in memory.items():
        columns = [f"{size / 1e9:{width}.2f}" for size, width in zip(sizes, (6, 15), strict=True)]
        print(f"    {label:29}{''.join(columns[: 1 if gpus == 1 else 2])}")
    projector = sum(p.numel() for p in model.projector.parameters())
    largest = max(Wc.d_model * Wc.encoder_ffn_dim, Lc.hidden_size * Lc.intermediate_size)
    loading = frozen + 4 * trained + 16 * largest  # LoRA is in memory until it is merged
    merged = frozen + 4 * projector + translation_bytes(settings, Wc, Lc, S, P - ANSWER)
    print(f"    {f'to translate {CLIPS} such clips':29}{max(loading, merged) / 1e9:6.2f}")


def print_downloads(settings: Preset):
    """Print for the models and the corpus whether they exist, or the command that gets them."""
    print("\nwhat must exist                       and how to get it")
    for base in (settings.encoder, settings.llm):
        how = download_command(base) if base.name in DOWNLOADS else "(only planned, see README.md)"
        print(f"    {short(base):34}{'(exists)' if base.exists() else how}")
    command = "python tools/prepare.py covost2 --common-voice CV --covost COVOST"
    command += f" --lang {settings.lang} --out {short(settings.data)}"
    print(f"    {short(settings.data):34}{'(exists)' if settings.data.exists() else command}")


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Print what a training run needs. No weights are necessary.",
        epilog="It also takes all options of train.py.",
    )
    parser.add_argument("preset", choices=PRESETS, help="defaults of the other options")
    parser.add_argument("--gpus", type=int, default=1, help="number of GPUs, one process on each")
    return parser


def main(argv: list[str] | None = None) -> int:
    sys.stdout.reconfigure(errors="backslashreplace")  # escape what stdout cannot encode
    ours, others = build_parser().parse_known_args(argv)
    args = train_parser().parse_args(["--preset", ours.preset, *others])
    try:
        if ours.gpus < 1:
            raise ValueError(f"--gpus is {ours.gpus}; it must be at least 1")
        print_plan(with_flags(PRESETS[ours.preset], args), args.clips, ours.gpus)
    except (ValueError, OSError) as error:
        print(f"plan.py: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
