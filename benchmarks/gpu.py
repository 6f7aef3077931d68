"""Measure this project on a GPU, step by step. `bash benchmarks/gpu.sh` runs all steps.

    python benchmarks/gpu.py kernels decode        these steps, in one process
    python benchmarks/gpu.py --toy kernels         tiny models, also on a CPU: a test of this file
    python benchmarks/gpu.py --table               gpu.json -> the table in README.md

The models have the sizes of the paper's systems and random weights: time and memory do not depend
on the values of the weights. Each result is written to gpu.json as soon as it is known. Next to it
is the limit: the best that this GPU could do, computed from the arithmetic and the bytes that
the work needs, and from the speed of a large matrix product and of a large copy, measured first.
"""

import argparse
import gc
import json
import math
import statistics
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.profiler import ProfilerActivity, profile

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import train  # noqa: E402
from benchmarks.measure import (  # noqa: E402
    Machine,
    Phase,
    bytes_of,
    made_on,
    measure_machine,
    noise,
    seconds_of,
    write_below,
)
from data import AUDIO_ID, IGNORE, Batch, read_corpus  # noqa: E402
from llama import Llama, LlamaConfig, Tokenizer  # noqa: E402
from llast import LLaST, pick_device  # noqa: E402
from tools.cost import llm_flops  # noqa: E402
from tools.plan import GEOMETRY, activation_bytes, example_flops  # noqa: E402
from train import (  # noqa: E402
    PRESETS,
    Preset,
    compute_gradient,
    model_config,
    to_device,
    train_epochs,
)
from translate import SearchOptions, beam_search, extend  # noqa: E402
from whisper_encoder import WhisperConfig, WhisperEncoder  # noqa: E402

DEVICE, DTYPE, REASON = pick_device()
ON_GPU = DEVICE.type == "cuda"
LLAMA_3_8B = LlamaConfig(4096, 14336, 32, 32, 8, 128, 128_256, 1e-5, 500_000.0, False)
TOY_ENCODER = WhisperConfig(80, 64, 2, 4, 128, 1500)
TOY_LLM = LlamaConfig(64, 128, 2, 4, 2, 16, 2000, 1e-5, 10_000.0, False)
SECONDS, PROMPT, ANSWER = 5.0, 30, 30  # a made-up row: seconds of speech, tokens
NEVER = -1  # an end token that no model writes, so that all answers have the same length


class Results:
    """The results so far, in a JSON file. A result replaces an older one with the same name."""

    def __init__(self, path: Path):
        self.path = path
        self.values = json.loads(path.read_text()) if path.is_file() else {"rows": []}
        self.values["about"] = {
            "device": REASON, "torch": torch.__version__, "python": sys.version.split()[0],
            "date": time.strftime("%Y-%m-%d"),
        }  # fmt: skip

    def add(self, step: str, case: str, measured, unit: str = "", limit=None, share=None):
        """Write one result. `limit`: the best possible value. `share`: how much of it is reached.

        `measured` is a number or a text. The unit belongs to both numbers.
        """
        row = {"step": step, "case": case, "measured": measured, "unit": unit}
        row |= {"limit": limit, "share": share}
        rows = [r for r in self.values["rows"] if (r["step"], r["case"]) != (step, case)]
        self.values["rows"] = [*rows, row]
        temporary = self.path.with_suffix(".tmp")
        temporary.write_text(json.dumps(self.values, indent=1) + "\n")
        temporary.replace(self.path)
        print(" | ".join(cells_of(row)), flush=True)


def cells_of(row: dict) -> list[str]:
    """The cells of a row of the table."""

    def cell(value):
        if not isinstance(value, float):
            return "" if value is None else str(value)
        return f"{value:,.{max(0, 2 - math.floor(math.log10(abs(value) or 1)))}f} {row['unit']}"

    share = "" if row["share"] is None else f"{row['share']:.0%}"
    return [row["step"], row["case"], cell(row["measured"]), cell(row["limit"]), share]


def build(preset: str, toy: bool, lora: bool = True, llm: LlamaConfig | None = None) -> LLaST:
    """A model of the size of a preset, with random weights."""
    settings = PRESETS[preset]
    if not lora:
        settings = replace(settings, encoder_rank=0, llm_rank=0)
    encoder, llm = GEOMETRY[settings.encoder.name], llm or GEOMETRY[settings.llm.name]
    if toy:
        encoder, llm = TOY_ENCODER, TOY_LLM
        settings = replace(settings, encoder_rank=lora * 4, llm_rank=lora * 4)
    torch.manual_seed(0)
    parts = made_on(DEVICE, DTYPE, WhisperEncoder, encoder), made_on(DEVICE, DTYPE, Llama, llm)
    tokenizer = Tokenizer(ROOT / "tiny" / "llama")
    return LLaST(model_config(settings), *parts, tokenizer)


def free():
    """Give the memory of deleted models back to the GPU."""
    gc.collect()
    if ON_GPU:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def median_seconds(work, times: int = 5) -> float:
    work()  # the first call may compile or allocate
    return statistics.median(seconds_of(work, DEVICE) for _ in range(times))


# ---------------------------------------------------------------------------------------- kernels

KERNELS = {  # part of the name of an operator: the kernel that it calls
    "_flash_attention": "flash", "_cudnn_attention": "cuDNN", "_efficient_attention": "efficient",
    "_attention_math": "MATH (slow)",
}  # fmt: skip


def kernel_of(work) -> str:
    """The names of the attention kernels that PyTorch chose while `work` ran."""
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        work()
    names = [event.key for event in profiler.key_averages()]
    names = [name for name in names if "scaled_dot_product" in name and "backward" not in name]
    found = [kernel for part, kernel in KERNELS.items() if any(part in name for name in names)]
    return ", ".join(sorted(found)) or "none"


def kernels(results: Results, toy: bool, machine: Machine):
    """Which attention kernel runs in training, for prompts and in beam steps."""
    geometries = {name: GEOMETRY[name] for name in GEOMETRY if "Tiny" in name or "7b" in name}
    geometries |= {"Llama-3-8B": LLAMA_3_8B}
    slow = []
    for name, config in {"toy": TOY_LLM}.items() if toy else geometries.items():
        llm = made_on(DEVICE, DTYPE, Llama, replace(config, num_hidden_layers=1, vocab_size=64))
        llm.requires_grad_(False)
        x = torch.randn(4, 311, config.hidden_size, device=DEVICE, dtype=DTYPE)

        def training(llm=llm, x=x):
            llm.hidden(x.clone().requires_grad_())[0].sum().backward()

        @torch.inference_mode()
        def prompts(llm=llm, x=x):
            return llm.hidden(x)[1]

        @torch.inference_mode()
        def beam_step(llm=llm, x=x):
            cache, W = prompts(), 5
            can_attend = torch.ones(4, W, cache.length + W, dtype=torch.bool, device=DEVICE)
            positions = torch.full((4, W), cache.length, device=DEVICE)
            llm.hidden(x[:, :W], cache, positions, can_attend)

        for use, work in (("training", training), ("prompts", prompts), ("beam step", beam_step)):
            kernel = kernel_of(work)
            results.add("kernels", f"{name}, {use}", kernel)
            # For a beam step, prompts() runs too, so two kernels can be there.
            slow += [f"{name}, {use}"] if "MATH" in kernel and ON_GPU else []
        del llm
        free()
    new_shapes(results)
    if slow:
        raise SystemExit(f"the slow attention kernel runs in: {'; '.join(slow)}")


def new_shapes(results: Results):
    """Time of attention over a length that it has not seen before, with and without cuDNN."""
    for with_cudnn in (False, True) if ON_GPU else (False,):
        torch.backends.cuda.enable_cudnn_sdp(with_cudnn)
        times = {"new": [], "known": []}
        for L in range(301, 326):
            q, k = (made_on(DEVICE, DTYPE, torch.randn, 1, 32, n, 128) for n in (5, L))
            for name in times:
                work = partial(F.scaled_dot_product_attention, q, k, k)
                times[name].append(seconds_of(work, DEVICE))
        for name, seconds in times.items():
            case = f"attention of a beam step, {name} length, {'with' if with_cudnn else 'without'}"
            median = statistics.median(seconds[5:])  # the first calls load the kernels
            results.add("kernels", f"{case} cuDNN", 1e3 * median, "ms")
    torch.backends.cuda.enable_cudnn_sdp(False)


# --------------------------------------------------------------------------------------- training


def made_up_batch(model: LLaST, B: int) -> Batch:
    """B rows of SECONDS of noise, PROMPT tokens and ANSWER tokens."""
    ids = torch.randint(3, 999, (B, PROMPT + ANSWER + 1))
    ids[:, 2] = AUDIO_ID
    labels = ids.clone()
    labels[:, : PROMPT + 1] = IGNORE
    audio = [noise(SECONDS, i) for i in range(B)]
    return Batch([], audio, ids, labels, torch.full((B,), ids.shape[1]), [2] * B)


def training(preset: str, results: Results, toy: bool, machine: Machine):
    """Clips per second, share of the arithmetic, and memory against tools/plan.py."""
    model = build(preset, toy)
    Wc, Lc = model.speech_encoder.config, model.llm.config
    S = round(50 * SECONDS)
    P = S + PROMPT + ANSWER
    trained = sum(t.numel() for t in model.trained().values())
    frozen = sum(p.numel() for p in model.parameters()) - trained
    # The compiled case is the last one, because the layers stay compiled.
    cases = [("clip", "none", 3000, False), ("30s", "all", 6400, False),
             ("clip", "none", 3000, True)]  # fmt: skip
    for window, recompute, positions, compiled in cases[:2] if toy else cases:
        if compiled:
            waiting(preset, model, results, toy)
        settings = replace(
            PRESETS[preset], window=window, recompute=recompute,
            encoder_rank=model.config.encoder_rank, llm_rank=model.config.llm_rank,
        )  # fmt: skip
        encoder_states = Wc.max_source_positions if window == "30s" else S
        B = 2 if toy else positions // P
        fixed = 2 * frozen + 16 * trained

        def predicted(B, settings=settings, encoder_states=encoder_states, fixed=fixed):
            return fixed + activation_bytes(settings, Wc, Lc, B, encoder_states, P)

        while B > 1 and predicted(B) > 72e9:
            B -= 1
        name = f"{preset}, {B} rows of {SECONDS:.0f} s, window {window}, recompute {recompute}"
        name += ", compiled" * compiled
        try:
            seconds, kernels, peak = time_training(model, settings, B, compiled)
        except torch.OutOfMemoryError as error:
            results.add("training", name, f"out of memory: {str(error)[:80]}")
            free()
            continue
        once = replace(settings, recompute="none")
        flops = B * example_flops(once, Wc, Lc, encoder_states, S, PROMPT + ANSWER, ANSWER)
        results.add("training", f"{name}: rows a second", B / seconds, "",
                    B * machine.flops / flops, flops / seconds / machine.flops)  # fmt: skip
        if machine.sheet_flops:
            mfu = flops / seconds / machine.sheet_flops
            results.add("training", f"{name}: MFU (share of the data sheet)", 100 * mfu, "%")
        if ON_GPU:
            add_shares(results, "training", name, kernels, seconds)
            results.add("training", f"{name}: peak memory, limit = tools/plan.py", peak / 1e9, "GB",
                        predicted(B) / 1e9, peak / predicted(B))  # fmt: skip
        free()


def time_training(model: LLaST, settings: Preset, B: int, compiled: bool):
    """Median seconds of a step, seconds of its kernels of each kind, and peak memory."""
    model.config = replace(model.config, window=settings.window)
    model.speech_encoder.recompute = settings.recompute == "all"
    model.llm.recompute = settings.recompute != "none"
    model.train()
    if compiled:
        model.compile_layers()
    weights = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=1e-6, fused=True)
    batch = made_up_batch(model, B)
    n_tokens = int((batch.labels != IGNORE).sum())

    def step():
        compute_gradient(model, [to_device(batch, model.device)], n_tokens, 1.0)
        optimizer.step()

    step(), step()
    if ON_GPU:
        torch.cuda.reset_peak_memory_stats()
    seconds = statistics.median(seconds_of(step, DEVICE) for _ in range(20 if ON_GPU else 2))
    peak = torch.cuda.max_memory_allocated() if ON_GPU else 0
    return seconds, kernel_seconds(step) if ON_GPU else {}, peak


KINDS = {  # parts of the names of kernels: what they do
    "matrix products": ("gemm", "nvjet", "cutlass_80", "cutlass_90", "xmma", "gemv", "splitK"),
    "attention": ("flash", "fmha", "sdpa"),
    "optimizer and norm of the gradient": ("multi_tensor", "adam"),
    "dropout": ("dropout",),
    "copies and changes of type": ("copy", "Memcpy", "cat", "index"),
}


def kernel_seconds(work) -> dict[str, float]:
    """Seconds in which kernels of each kind run during one call of `work`."""
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        work()
        torch.cuda.synchronize()
    seconds = dict.fromkeys([*KINDS, "other element-wise work"], 0.0)
    for event in profiler.key_averages():
        kinds = [k for k, parts in KINDS.items() if any(part in event.key for part in parts)]
        seconds[(kinds or ["other element-wise work"])[0]] += event.self_device_time_total / 1e6
    return seconds


def add_shares(results: Results, step: str, name: str, kernels: dict, seconds: float):
    """Write in which share of the time the GPU computes, and what it computes."""
    results.add(step, f"{name}: GPU computes", 100 * sum(kernels.values()) / seconds, "%")
    shares = {kind: value / seconds for kind, value in kernels.items()}
    texts = [f"{kind} {share:.0%}" for kind, share in shares.items() if share > 0.005]
    results.add(step, f"{name}: share of the time", ", ".join(texts))


def waiting(preset: str, model: LLaST, results: Results, toy: bool):
    """The share of the training time in which the GPU waits for clips from files."""
    rows = read_corpus(ROOT / "tiny" / "corpus", "fr", "en")[0]["train"][: 8 if toy else 200]
    settings = replace(PRESETS[preset], epochs=1, recompute="all")
    model.speech_encoder.recompute = model.llm.recompute = True
    batches = train.make_batches(model, rows, settings)
    times, wait = [], [0.0]
    prefetch = train.prefetch

    def timed(steps):  # train_epochs calls it only on a GPU
        items = prefetch(steps)
        while True:
            start = time.perf_counter()
            item = next(items, None)
            wait[0] += time.perf_counter() - start
            if item is None:
                return
            yield item

    train.prefetch = timed
    try:
        start = time.perf_counter()
        train_epochs(model, batches, settings, lambda step: times.append(time.perf_counter()))
    finally:
        train.prefetch = prefetch
    seconds = times[-1] - start
    case = f"{preset}, {len(times)} steps with clips from files"
    results.add("training", f"{case}: rows a second", 2 * len(rows) / seconds, "")
    results.add("training", f"{case}: waiting for data", 100 * wait[0] / seconds, "%")


# --------------------------------------------------------------------------------------- decoding


def decode(results: Results, toy: bool, machine: Machine):
    """Time of a beam step of llast-8b against the time that reading the weights needs."""
    model = build("llast-8b", toy, lora=False).eval()
    llm, P, W, n = model.llm, round(50 * SECONDS) + PROMPT, 5, 8 if toy else 64
    for compiled in (False, True) if ON_GPU else (False,):
        if compiled:
            time_graphs(results, model, machine, W, P, n)
            model.compile_layers()
        for B in (1, 4) if toy else (1, 32):
            prompts = made_on(DEVICE, DTYPE, torch.randn, B, P, llm.config.hidden_size).unbind()

            def search(length, prompts=prompts):
                return beam_search(llm, list(prompts), [NEVER], SearchOptions(W, 1.0, length))

            whole = median_seconds(lambda search=search: search(n), 3)
            step = (whole - median_seconds(lambda s=search: s(1), 3)) / (n - 1)
            limit = machine.least([step_phase(model, B, W, P, n)])
            name = f"llast-8b, {B} clip{'s'[: B > 1]}, 5 beams" + ", compiled" * compiled
            results.add("decode", f"{name}: a token", 1e3 * step, "ms", 1e3 * limit, limit / step)
            results.add("decode", f"{name}: {n} tokens with the prompt, per clip",
                        1e3 * whole / B, "ms")  # fmt: skip
            if ON_GPU:
                add_shares(results, "decode", name, kernel_seconds(partial(search, n)), whole)


def time_graphs(results: Results, model: LLaST, machine: Machine, W: int, P: int, n: int):
    for B in (1, 32):
        seconds = graph_seconds(model, B, W, P, n)
        limit = machine.least([step_phase(model, B, W, P, n)])
        name = f"llast-8b, {B} clip{'s'[: B > 1]}, 5 beams, a step as one CUDA graph: a token"
        results.add("decode", name, 1e3 * seconds, "ms", 1e3 * limit, limit / seconds)


def step_phase(model: LLaST, B: int, W: int, P: int, n: int) -> Phase:
    """What one beam step must compute and read.

    Steps get longer during an answer. This is the step in the middle of an answer of n tokens.
    """
    llm, config = model.llm, model.llm.config
    kv = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
    kv *= llm.lm_head.weight.element_size()
    flops = B * (sum(llm_flops(config, W, W, P + W * n // 2)))
    flops += 2 * B * W * config.hidden_size * config.vocab_size
    weights = bytes_of(llm.model.layers) + bytes_of(llm.lm_head)
    return Phase(flops, weights + B * (P + W * n // 2) * kv)


@torch.inference_mode()
def graph_seconds(model: LLaST, B: int, W: int, P: int, n: int) -> float:
    """Seconds of a beam step in the middle of an answer, as one CUDA graph.

    The library does not do this: a graph has one length of the cache, and an answer has many.
    """
    llm, length = model.llm, P + W * n // 2
    _, cache = llm.hidden(made_on(DEVICE, DTYPE, torch.randn, B, length, llm.config.hidden_size))
    cache.reserve(W)
    can_attend = torch.ones(B, W, length + W, dtype=torch.bool, device=DEVICE)
    positions = torch.full((B, W), length, device=DEVICE)
    token = torch.ones(B, W, dtype=torch.long, device=DEVICE)
    total = torch.zeros(B, W, device=DEVICE)

    def step():
        cache.length = length
        state, _ = llm.hidden(llm.embed(token), cache, positions, can_attend)
        return extend(total, llm.logits(state).float().log_softmax(-1), 1)

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return median_seconds(graph.replay, 20)


# --------------------------------------------------------------------------- the included example


def example(results: Results, toy: bool, machine: Machine, out: Path):
    """`python train.py --lang fr` from start to finish."""
    command = [sys.executable, "train.py", "--lang", "fr", "--out", str(out)]
    if toy:
        command += ["--data", str(few_clips(out.with_name(out.name + "-corpus"))), "--epochs", "1"]
    start = time.perf_counter()
    subprocess.run(command, cwd=ROOT, check=True, stdout=sys.stderr)
    results.add("example", "python train.py --lang fr: all", time.perf_counter() - start, "s")
    scores = json.loads((out / "results.json").read_text())["fr-en"]
    results.add("example", "BLEU of its test clips", scores["bleu"])
    log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    rates = [line["clips_per_second"] for line in log if "clips_per_second" in line]
    results.add("example", "training, median of the steps: rows a second",
                float(statistics.median(rates)))  # fmt: skip


def few_clips(folder: Path) -> Path:
    """A corpus with the first six clips of each split of the French one."""
    source = ROOT / "tiny" / "corpus" / "fr"
    (folder / "fr" / "clips").mkdir(parents=True, exist_ok=True)
    head, *lines = (source / "fr-en.tsv").read_text().splitlines(keepends=True)
    for split in ("train", "dev", "test"):
        of_split = [line for line in lines if split in line.split("\t")][:6]
        head += "".join(of_split)
        for name in (line.split("\t")[0] for line in of_split):
            (folder / "fr" / "clips" / name).write_bytes((source / "clips" / name).read_bytes())
    (folder / "fr" / "fr-en.tsv").write_text(head)
    return folder


def precision(results: Results, toy: bool, machine: Machine):
    """Losses of the same 50 steps with frozen weights in float32 and in bfloat16."""
    settings, losses = PRESETS["tiny"], []
    rows = read_corpus(settings.data, "fr", "en")[0]["train"][: 4 if toy else 200]
    settings = replace(settings, epochs=1 if toy else 4)
    for dtype in (torch.float32, torch.bfloat16):
        torch.manual_seed(0)
        model = LLaST.fresh(model_config(settings), dtype, DEVICE)
        batches = train.make_batches(model, rows, settings)
        steps = []
        train_epochs(model, batches, settings, steps.append)
        losses.append([step.loss for step in steps])
    single, half = losses
    n = min(50, len(single))
    gap = [abs(a - b) / a for a, b in zip(single, half, strict=True)][:n]
    case = f"included example, loss in bfloat16 against float32, {n} steps"
    results.add("precision", f"{case}: median difference", 100 * statistics.median(gap), "%")
    results.add("precision", f"{case}: largest difference", 100 * max(gap), "%")
    last = [sum(values[n - 5 : n]) / len(values[n - 5 : n]) for values in (single, half)]
    results.add("precision", f"{case}: mean of the last 5 in float32", last[0])
    results.add("precision", f"{case}: mean of the last 5 in bfloat16", last[1])


def energy(results: Results, toy: bool, machine: Machine, out: Path):
    """Seconds, joules and memory of a clip: direct translation and cascade."""
    data = ["--data", str(few_clips(out.with_name(out.name + "-corpus")))] if toy else []
    for task in ("st", "cascade"):
        command = [sys.executable, "tools/evaluate.py", "--model", str(out), "--test", "fr"]
        command += ["--task", task, "--stats", "--json", *data]
        done = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
        costs = json.loads(done.stderr.splitlines()[-1])  # the costs are the last line
        for key, unit in (("seconds", "s"), ("joules", "J")):
            if costs[key] is not None:
                results.add("energy", f"{task}: {key} of a clip", costs[key] / costs["clips"], unit)
        results.add("energy", f"{task}: peak memory", float(costs["peak_gb"]), "GB")


# -------------------------------------------------------------------------------------- the table


def write_readme_tables(path: Path):
    """The results of the steps, and those of compare.py in peers-*.json in the same folder."""
    values = json.loads(path.read_text())
    about = values["about"]
    lines = [
        f"{about['date']}, {about['device']}, torch {about['torch']}, Python {about['python']}.\n",
        "| step | case | measured | limit | reached |", "| --- | --- | --- | --- | --- |",
    ]  # fmt: skip
    lines += [f"| {' | '.join(cells_of(row))} |" for row in values["rows"]]
    write_below("gpu", lines)
    lines = ["| size | case | ours, ms | peer, ms | peer : ours | peak MB, ours : peer |"]
    lines.append("| --- | --- | --- | --- | --- | --- |")
    for file in sorted(path.parent.glob("peers-*.json")):
        for r in json.loads(file.read_text())["results"]:
            lines.append(
                f"| {r['size']} | {r['case']} | {1e3 * r['ours']:,.1f} | {1e3 * r['peer']:,.1f} "
                f"| {r['ratio']:.2f} | {r['ours_memory'] / 1e6:,.0f} : "
                f"{r['peer_memory'] / 1e6:,.0f} |"
            )
    write_below("gpu-peers", lines if len(lines) > 2 else ["Not measured yet."])


STEPS = {
    "kernels": kernels,
    "training-2b": lambda *args: training("llast-2b", *args),
    "training-8b": lambda *args: training("llast-8b", *args),
    "decode": decode,
    "example": example,
    "precision": precision,
    "energy": energy,
}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("steps", nargs="*", choices=[*STEPS, []], help=f"{', '.join(STEPS)}")
    parser.add_argument("--toy", action="store_true", help="tiny models, to test this script")
    parser.add_argument("--json", type=Path, default=ROOT / "benchmarks" / "gpu.json")
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "gpu", help="run of `example`")
    parser.add_argument("--table", action="store_true", help="write the tables in README.md")
    args = parser.parse_args()
    if args.steps and not (ON_GPU or args.toy):
        raise SystemExit("there is no CUDA GPU; --toy runs the steps with tiny models on a CPU")
    results = Results(args.json)
    if args.steps:
        machine = measure_machine(DEVICE, DTYPE)
        results.add("machine", "large matrix product", machine.flops / 1e12, "TFLOP/s")
        results.add("machine", "large copy, bytes read and written", machine.bytes / 1e9, "GB/s")
    for name in args.steps:
        more = (args.out,) if name in ("example", "energy") else ()
        STEPS[name](results, args.toy, machine, *more)
    if args.table:
        write_readme_tables(args.json)


if __name__ == "__main__":
    main()
