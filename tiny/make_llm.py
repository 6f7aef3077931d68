"""Make the embedded LLM: a sentencepiece tokenizer and a small Llama that can translate text.

    python tiny/make_llm.py

It takes the place of Llama-2-chat. It follows the two instructions of data.prompt_for, with written
text at the place where LLaST puts speech. It is trained on text only: no audio and no states of an
encoder. No dev or test sentence is in these texts.
"""

import argparse
import io
import json
import random
import sys
import time
from pathlib import Path

import sentencepiece
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

import phrasebook
from make_corpus import held_out, held_out_texts

sys.path.insert(0, str(Path(__file__).parents[1]))
from data import AUDIO_ID, IGNORE, INSTRUCTIONS, LANGUAGES, prompt_for, prompt_ids  # noqa: E402
from llama import Llama, LlamaConfig, Tokenizer  # noqa: E402

FOLDER = Path(__file__).parent / "llama"
SEED = 1
VOCAB = 1300
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 256,
    "intermediate_size": 672,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "vocab_size": VOCAB,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "max_position_embeddings": 512,
    "hidden_act": "silu",
    "bos_token_id": 1,
    "eos_token_id": 2,
    "torch_dtype": "float16",
}
# Two stages: steps, rows in a step, highest learning rate, share of short phrases at the start,
# share of damaged source texts, and the possible numbers of fillers between two tokens of these.
# A word of speech has many states. So in the second stage the tokens of a text are far apart, too.
STAGES = (
    (2500, 64, 2e-3, 1.0, 0.5, (0, 0, 0, 1, 2)),
    (800, 32, 6e-4, 0.1, 0.75, tuple(range(15))),
)


def make_tokenizer():
    """Train byte-pair tokens on phrasebook texts. As in Llama, other characters become bytes."""
    rng, held = random.Random(SEED), held_out_texts()
    texts = [text for _ in range(20_000) for text in phrasebook.sentence(rng).values()]
    texts = [text for text in texts if text not in held]
    names = sorted(LANGUAGES[code] for code in phrasebook.LANGS)
    for instruction in INSTRUCTIONS.values():
        for source in names:
            for target in names:
                line = f"[INST] {instruction.format(source=source, target=target)} [/INST]"
                texts += [line] * 200
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts),
        model_writer=model,
        model_type="bpe",
        vocab_size=VOCAB,
        byte_fallback=True,
        normalization_rule_name="identity",
        character_coverage=1.0,
        split_digits=True,
        minloglevel=2,
    )
    FOLDER.mkdir(exist_ok=True)
    (FOLDER / "tokenizer.model").write_bytes(model.getvalue())
    (FOLDER / "config.json").write_text(json.dumps(CONFIG, indent=2) + "\n")


class Texts:
    """Random training rows."""

    def __init__(self, tokenizer: Tokenizer, seed: str):
        self.tokenizer, self.rng, self.held = tokenizer, random.Random(seed), held_out_texts()
        self.filler = tokenizer.pieces.piece_to_id("▁")

    def meaning(self, share_of_phrases: float) -> dict[str, str]:
        """A sentence or a short phrase.

        Without phrases at the start, a trial model learned the grammar, but not to translate.
        """
        while True:
            short = self.rng.random() < share_of_phrases
            meaning = phrasebook.phrase(self.rng) if short else phrasebook.sentence(self.rng)
            if self.held.isdisjoint(meaning.values()):
                return meaning

    def damage(self, ids: list[int], gaps: tuple[int, ...]) -> list[int]:
        """Repeat tokens, put fillers between them, replace some and leave out some.

        A large LLM can read such text anyway. A small one must have seen it in training.
        """
        out = []
        for i in ids:
            chance = self.rng.random()
            if chance < 0.03:
                continue
            if chance < 0.07:
                i = self.rng.randrange(259, VOCAB)
            out += [i] * self.rng.choice((1, 1, 1, 2, 3))
            out += [self.filler] * self.rng.choice(gaps)
        return out

    def row(self, phrases: float, damaged: float, gaps) -> tuple[list[int], list[int]]:
        """Ids and labels of one row: 3/4 translation, 1/8 repetition, 1/8 plain text."""
        meaning, encode = self.meaning(phrases), self.tokenizer.encode
        kind = self.rng.random()
        foreign = self.rng.choice(("fr", "de", "es"))
        if kind < 1 / 8:
            text = encode(meaning[self.rng.choice(phrasebook.LANGS)])
            row = [self.tokenizer.bos_id, *text, self.tokenizer.eos_id]
            return row, [IGNORE] + row[1:]
        if kind < 2 / 8:
            task, source, target = "asr", foreign, foreign
        elif kind < 3 / 8:
            task, source, target = "st", "en", foreign
        else:
            task, source, target = "st", foreign, "en"
        text = encode(meaning[source])
        if self.rng.random() < damaged:
            text = self.damage(text, gaps)
        prompt = []
        for i in prompt_ids(prompt_for(task, source, target), self.tokenizer):
            prompt += text if i == AUDIO_ID else [i]
        answer = encode(meaning[target]) + [self.tokenizer.eos_id]
        return prompt + answer, [IGNORE] * len(prompt) + answer


def loss_of(model: Llama, rows) -> torch.Tensor:
    ids = torch.nn.utils.rnn.pad_sequence([torch.tensor(i) for i, _ in rows], batch_first=True)
    labels = torch.nn.utils.rnn.pad_sequence(
        [torch.tensor(labels) for _, labels in rows], batch_first=True, padding_value=IGNORE
    )
    hidden, _ = model.hidden(model.embed(ids))
    here = labels[:, 1:] != IGNORE
    return F.cross_entropy(model.logits(hidden[:, :-1][here]).float(), labels[:, 1:][here])


@torch.no_grad()
def exact_share(model: Llama, tokenizer: Tokenizer, source: str) -> float:
    """Share of the written dev sentences that greedy search translates letter by letter."""
    meanings, right = held_out()["dev"], 0
    for meaning in meanings:
        ids = []
        for i in prompt_ids(prompt_for("st", source, "en"), tokenizer):
            ids += tokenizer.encode(meaning[source]) if i == AUDIO_ID else [i]
        start = len(ids)
        while len(ids) < start + 40 and ids[-1] != tokenizer.eos_id:
            ids.append(model(torch.tensor([ids]))[0, -1].argmax().item())
        right += tokenizer.decode(ids[start:]) == meaning["en"]
    return right / len(meanings)


def new_llama() -> Llama:
    model = Llama(LlamaConfig.from_json(FOLDER / "config.json"))
    for weight in model.parameters():
        if weight.dim() == 2:
            torch.nn.init.normal_(weight, std=0.02)
    return model


def train_stage(stage: int, model: Llama, tokenizer: Tokenizer):
    steps, n_rows, lr, phrases, damaged, gaps = STAGES[stage]
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / 100, 1) * max(0.01, 1 - step / steps)
    )
    texts, start = Texts(tokenizer, f"{SEED} {stage}"), time.time()
    for step in range(1, steps + 1):
        share = max(0.1, phrases * (1 - 2 * step / steps))
        rows = [texts.row(share, damaged, gaps) for _ in range(n_rows)]
        with torch.autocast("cpu", torch.bfloat16):
            loss = loss_of(model, rows)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if step % 200 == 0:
            seconds = time.time() - start
            print(
                f"stage {stage} step {step} loss {loss.item():.3f} seconds {seconds:.0f}",
                flush=True,
            )
    shares = {source: exact_share(model, tokenizer, source) for source in ("fr", "de", "es")}
    print(f"stage {stage}: exact text translations of unseen sentences {shares}", flush=True)
    weights = {name: tensor.half().contiguous() for name, tensor in model.state_dict().items()}
    save_file(weights, FOLDER / "model.safetensors", metadata={"format": "pt"})


def main():
    torch.manual_seed(SEED)
    make_tokenizer()
    tokenizer, model = Tokenizer(FOLDER), new_llama()
    for stage in range(len(STAGES)):
        train_stage(stage, model, tokenizer)


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()  # -h starts nothing
    main()
