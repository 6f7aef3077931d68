"""What a training run would take: parameters, memory, steps, time and downloads."""

import argparse
import math
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))  # the repository, whatever the folder is

from data import CACHE_BYTES, parse_directions, read_corpus
from llama import Llama, LlamaConfig
from llast import LLaST
from tools.cost import encoder_flops, llm_flops, projector_flops
from train import PRESETS, Preset, fetch, model_config, print_parts, short, with_flags
from train import build_parser as train_parser
from whisper_encoder import SAMPLE_RATE, WhisperConfig, WhisperEncoder

GEOMETRY = {  # config.json of the checkpoints in train.PUBLIC
    "whisper-large-v2": WhisperConfig(80, 1280, 32, 20, 5120, 1500),
    "TinyLlama-1.1B-Chat-v1.0": LlamaConfig(
        2048, 5632, 22, 32, 4, 64, 32000, 1e-5, 10_000.0, False
    ),
    "Llama-2-7b-chat-hf": LlamaConfig(4096, 11008, 32, 32, 32, 128, 32000, 1e-5, 10_000.0, False),
    "Llama-2-13b-chat-hf": LlamaConfig(5120, 13824, 40, 40, 40, 128, 32000, 1e-5, 10_000.0, False),
}
COVOST_TRAIN = {  # CoVoST-2's training rows and hours by language spoken; English has 15 targets
    "fr": (207_374, 264), "de": (127_834, 184), "es": (79_015, 113), "ca": (95_854, 136),
    "it": (31_698, 44), "ru": (12_112, 18), "zh-CN": (7_085, 10), "pt": (9_158, 10),
    "fa": (53_949, 49), "et": (1_782, 3), "mn": (2_067, 3), "nl": (7_108, 7), "tr": (3_966, 4),
    "ar": (2_283, 2), "sv-SE": (2_160, 2), "lv": (2_337, 2), "sl": (1_843, 2), "ta": (1_358, 2),
    "ja": (1_119, 1), "id": (1_243, 1), "cy": (1_241, 2), "en": (289_430, 430),
}  # fmt: skip
TEXT, ANSWER = 60, 30  # tokens assumed in a row: prompt and answer, and the answer alone
CLIPS = 16  # translated at once
FLOPS, SHARE = 989e12, 0.4  # an H100's bf16 rate by its data sheet, and the share counted on


def geometry(base: Path, kind):
    """The configuration of a checkpoint: its own if it is there, else as it was published."""
    if (base / "config.json").is_file():
        return kind.from_json(base / "config.json")
    if base.name not in GEOMETRY:
        known = ", ".join(GEOMETRY)
        raise FileNotFoundError(
            f"a plan needs a config.json, and {base} has none; without one, only {known} are known"
        )
    return GEOMETRY[base.name]


def mix(settings: Preset, most: int | None) -> tuple[list[tuple[str, int, int]], float]:
    """(direction, rows to translate, rows to transcribe) of an epoch, and the seconds of a clip.

    From the corpus if it is there, else as CoVoST-2 has them; `most` clips of each direction.
    """
    rows, seconds, heard = [], 0.0, set()
    for source, target in parse_directions(settings.lang):
        if settings.data.is_dir():
            found = read_corpus(settings.data, source, target)[0]["train"]
            found = found[:most]
            if not found:
                raise ValueError(f"the {source}-{target} corpus in {settings.data} has no clips")
            n, mean = len(found), sum(row.seconds for row in found) / len(found)
            share = sum(bool(row.sentence.strip()) for row in found) / n
        else:
            n, hours = COVOST_TRAIN[source]
            mean, share = 3600 * hours / n, 1.0
            n = min(n, most or n)
        asr = 0 if source in heard else round(settings.asr * share * n)
        rows.append((f"{source}-{target}", n, asr))
        heard.add(source)
        seconds += n * mean
    return rows, seconds / sum(n for _, n, _ in rows)


def lora_size(settings: Preset, Wc: WhisperConfig, Lc: LlamaConfig) -> tuple[int, int, int]:
    """Parameters of the LoRA in a layer of the encoder, in the LLM's attention and in its MLP."""
    Da, D, kv = Wc.d_model, Lc.hidden_size, Lc.num_key_value_heads * Lc.head_dim
    q = Lc.num_attention_heads * Lc.head_dim
    encoder = settings.encoder_rank * (4 * 2 * Da + 2 * (Da + Wc.encoder_ffn_dim))
    attention = settings.llm_rank * (2 * (D + q) + 2 * (D + kv))
    mlp = settings.llm_rank * 3 * (D + Lc.intermediate_size)
    return encoder, attention, mlp


def activation_bytes(settings, Wc: WhisperConfig, Lc: LlamaConfig, B: int, S: int, P: int) -> int:
    """What the backward pass needs of the forward pass, in bf16: B clips of S states, P positions.

    Counted line by line in SelfAttention, Attention, MLP and LoRALinear, whose dropout keeps a mask
    of one byte and a copy of its input. A recomputed layer leaves its input, and one is open.
    What the last layer of the encoder leaves out of a 30 s window is not taken off.
    """
    D, H, F = Lc.hidden_size, Lc.num_attention_heads, Lc.intermediate_size
    q, kv = H * Lc.head_dim, Lc.num_key_value_heads * Lc.head_dim
    Da, Fe = Wc.d_model, Wc.encoder_ffn_dim
    if settings.dropout:  # for each of the seven, and of the six
        attention, mlp, encoder = 3 * (3 * D + q), 3 * (2 * D + F), 3 * (5 * Da + Fe)
    else:  # one for all that read it; the output projection's is kept by attention already
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
    if not llm_again:  # the last MLP of the LLM works on answers alone
        kept -= B * (P - ANSWER) * mlp
    logits = B * ANSWER * 10 * Lc.vocab_size  # in bf16, in float32, and their gradient
    return kept + largest + logits


def translation_bytes(settings: Preset, Wc: WhisperConfig, Lc: LlamaConfig, S: int, P: int) -> int:
    """What it takes to translate CLIPS at once beside the weights, in bf16.

    The most of three: a layer of the encoder; the last layer but one that reads the prompts, with
    the keys and values so far; the steps, with room for more of them and the logits.
    """
    F, D, kv = Lc.intermediate_size, Lc.hidden_size, Lc.num_key_value_heads * Lc.head_dim
    encoder = 2 * CLIPS * S * (2 * Wc.encoder_ffn_dim + 3 * Wc.d_model)
    position = 2 * 2 * kv  # keys and values, of one layer
    prompts = CLIPS * P * ((Lc.num_hidden_layers - 1) * position + 2 * (3 * F + 6 * D))
    room = P  # it grows as llama.Cache lets it grow
    while room < P + settings.beams * (ANSWER - 1):
        room += max(settings.beams, room // 2)
    groups, keys = (
        Lc.num_attention_heads // Lc.num_key_value_heads,
        P + settings.beams * (ANSWER - 1),
    )
    mask = 3 * groups * settings.beams * keys  # as bool, and in bf16 for the kernel
    steps = CLIPS * (
        Lc.num_hidden_layers * position * room + 14 * settings.beams * Lc.vocab_size + mask
    )
    return max(encoder, prompts, steps)


def example_flops(
    settings: Preset, Wc: WhisperConfig, Lc: LlamaConfig, S: int, heard: int, text: int, answer: int
) -> float:
    """Multiplications and additions of one training example.

    S states in the encoder, `heard` of them for the LLM, `text` tokens, `answer` of them to learn.
    A frozen matrix costs a forward pass and the gradient of its input; a trained one that of its
    weight as well. Attention's backward pass is 2.5 times its forward pass.
    """
    convolutions, in_encoder, attention = encoder_flops(Wc, S, heard)
    P = heard + text
    in_llm, causal = llm_flops(Lc, P, asked=answer)
    in_encoder_layer, in_attention, in_mlp = lora_size(settings, Wc, Lc)
    keys_and_values = settings.encoder_rank * 4 * Wc.d_model
    encoder_lora = 2 * S * Wc.encoder_layers * in_encoder_layer
    encoder_lora -= 2 * (S - heard) * (in_encoder_layer - keys_and_values)
    llm_lora = 2 * P * Lc.num_hidden_layers * (in_attention + in_mlp) - 2 * (P - answer) * in_mlp
    frozen = in_encoder + in_llm + 2 * answer * Lc.hidden_size * Lc.vocab_size
    trained = encoder_lora + llm_lora + projector_flops(Wc, Lc, heard)
    again = in_llm + causal + llm_lora if settings.recompute != "none" else 0
    again += in_encoder + attention + encoder_lora if settings.recompute == "all" else 0
    # No gradient goes on from the convolutions, nor from the first layer's q, k and v.
    stays = 2 * S * 3 * Wc.d_model**2
    return convolutions + 2 * frozen - stays + 3.5 * (attention + causal) + 3 * trained + again


def print_plan(settings: Preset, clips: int | None):
    """What training would take: parameters, memory, steps, time and downloads."""
    Wc, Lc = geometry(settings.encoder, WhisperConfig), geometry(settings.llm, LlamaConfig)
    with torch.device("meta"):
        model = LLaST(model_config(settings), WhisperEncoder(Wc), Llama(Lc), tokenizer=None)
    rows, seconds = mix(settings, clips)
    trained, frozen = print_parts(model)["all"]
    heard = math.ceil(50 * seconds)  # 50 states a second
    P, S = heard + TEXT, Wc.max_source_positions if settings.window == "30s" else heard
    B = max(1, settings.batch // P)
    where = f"in {short(settings.data)}" if settings.data.is_dir() else "of CoVoST-2"
    print(f"{'direction':12}{'translate':>12}{'transcribe':>12}   training rows {where}")
    for direction, st, asr in rows:
        print(f"{direction:12}{st:12,}{asr:12,}")
    n = sum(st + asr for _, st, asr in rows)
    steps = math.ceil(n / (B * settings.accumulate))
    print(f"{'all':12}{sum(r[1] for r in rows):12,}{sum(r[2] for r in rows):12,}\n")

    memory = {
        "frozen weights, bfloat16": 2 * frozen,
        "LoRA and projector, float32": 4 * trained,
        "gradients, float32": 4 * trained,
        "optimizer's two moments": 8 * trained,
        "activations, estimated": activation_bytes(settings, Wc, Lc, B, S, P),
    }
    print("memory on one GPU                    GB")
    for label, size in (memory | {"all": sum(memory.values())}).items():
        print(f"    {label:29}{size / 1e9:6.2f}")
    projector = sum(p.numel() for p in model.projector.parameters())
    largest = max(Wc.d_model * Wc.encoder_ffn_dim, Lc.hidden_size * Lc.intermediate_size)
    loading = 2 * frozen + 4 * trained + 16 * largest  # LoRA beside the weights, until it is merged
    merged = 2 * frozen + 4 * projector + translation_bytes(settings, Wc, Lc, S, P - ANSWER)
    print(f"    {f'to translate {CLIPS} such clips':29}{max(loading, merged) / 1e9:6.2f}")
    decoded = min(CACHE_BYTES, 4 * SAMPLE_RATE * seconds * sum(row[1] for row in rows))
    print(f"    {'main memory: decoded clips':29}{decoded / 1e9:6.2f}")
    flops = example_flops(settings, Wc, Lc, S, heard, TEXT, ANSWER)
    hours = n * settings.epochs * flops / (FLOPS * SHARE) / 3600
    lasts = f"{hours:.1f} h" if hours > 0.1 else "less than 0.1 h"
    print(
        f"\na row       {seconds:.1f} s on average: {S} states in the encoder, {heard} + {TEXT} "
        f"(assumed) positions in the LLM\n"
        f"a step      {B} rows x {settings.accumulate} batches\n"
        f"an epoch    {n:,} rows in {steps:,} steps\n"
        f"arithmetic  {flops / 1e9:,.0f} GFLOP a row\n"
        f"time        {lasts} for {settings.epochs} epoch{'s'[: settings.epochs > 1]} at "
        f"{SHARE:.0%} of {FLOPS / 1e12:.0f} TFLOP/s (one H100; counted, not measured)"
    )
    print("\nwhat has to be there                  and how to get it")
    for base in (settings.encoder, settings.llm):
        print(f"    {short(base):34}{'(is there)' if base.exists() else fetch(base)}")
    how = "python tools/prepare.py covost2 --common-voice CV --covost COVOST"
    how += f" --lang {settings.lang} --out {short(settings.data)}"
    print(f"    {short(settings.data):34}{'(is there)' if settings.data.exists() else how}")


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Print what a training run would take; needs no weights.",
        epilog="All options of train.py are taken, too.",
    )
    parser.add_argument("preset", choices=PRESETS, help="the row of PRESETS to start from")
    return parser


def main(argv: list[str] | None = None) -> int:
    sys.stdout.reconfigure(errors="backslashreplace")  # escape what stdout cannot encode
    args, others = build_parser().parse_known_args(argv)
    args = train_parser().parse_args(["--preset", args.preset, *others])
    try:
        print_plan(with_flags(PRESETS[args.preset], args), args.clips)
    except (ValueError, OSError) as error:
        print(f"plan.py: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
