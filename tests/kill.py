"""Kill a training at random moments, and check that the same command continues it exactly.

    python tests/kill.py --kills 50 --seed 0

A toy training runs once without a stop. Then the same command runs in other folders. It gets
SIGKILL, SIGTERM or SIGINT after a random number of steps and a random time, and it is started again
until it finishes. Log, weights and test translations must be equal to those of the first run, bit
for bit. A model that a stopped run leaves must load. The exit code is 1 if something is wrong.
"""

import argparse
import os
import random
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from functools import partial
from pathlib import Path

import torch

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import toys
import train
from llast import LLaST
from translate import SearchOptions

END = os.WEXITED | os.WNOHANG | os.WNOWAIT  # look whether a process has ended
SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
torch.set_num_threads(1)  # a forked child does not have the threads of the parent, and waits


def start(flags: list[str], out: Path) -> int:
    """Start train.py in a child process, and return the id of the process.

    A forked child has already imported PyTorch. Only the time of the training itself is left.
    """
    sys.stdout.flush()
    if child := os.fork():
        return child
    code = 1
    try:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        log = os.open(out.with_suffix(".txt"), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        short = partial(SearchOptions, max_new_tokens=12)  # this model writes long nonsense
        train.SearchOptions, train.ONE_BEAM = short, short(beams=1)
        sys.argv = ["train.py", *flags, "--out", str(out)]
        code = train.main()
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(code)


def n_lines(file: Path) -> int:
    return file.read_bytes().count(b"\n") if file.exists() else 0


def interrupt(child: int, out: Path, number: int, rng: random.Random):
    """Send a signal after a few more lines of the log and a random time."""
    log, n_more = out / "log.jsonl", rng.randrange(8)
    first = n_lines(log)
    while n_lines(log) < first + n_more and os.waitid(os.P_PID, child, END) is None:
        time.sleep(0.002)
    time.sleep(rng.choice([0, 0.02, 0.2, 1]) * rng.random())
    os.kill(child, number)


def wait(child: int) -> int:
    """Wait for the end of a process. The result is negative if a signal ended it."""
    latest = time.monotonic() + 300
    while os.waitid(os.P_PID, child, END) is None:
        if time.monotonic() > latest:
            os.kill(child, signal.SIGKILL)
            sys.exit("the command still runs after 300 s; does it wait for a lock?")
        time.sleep(0.002)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def check(is_right: bool, problem: str, out: Path):
    if not is_right:
        sys.exit(f"{problem}. The output of the command:\n{out.with_suffix('.txt').read_text()}")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=50, help="number of signals [50]")
    parser.add_argument("--seed", type=int, default=0, help="random seed [0]")
    args = parser.parse_args()
    rng, counts = random.Random(args.seed), Counter()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        corpus = toys.small_corpus(root / "corpus", ("fr",), (12, 2, 2))
        flags = ["--data", corpus, "--encoder", corpus / "whisper", "--llm", corpus / "llama"]
        flags += ["--epochs", 3, "--batch", 145, "--accumulate", 2, "--dropout", 0.1]
        flags = [*map(str, flags), "--save-minutes", "0.003"]  # every few steps
        code, whole = wait(start(flags, root / "whole")), root / "whole"
        check(code == 0, f"the first run has exit code {code}", whole)
        n_runs = 0
        while counts.total() < args.kills:
            out, code = root / f"run-{n_runs}", None
            while code != 0:
                child, number = start(flags, out), rng.choice(SIGNALS)
                if counts.total() < args.kills:
                    interrupt(child, out, number, rng)
                code = wait(child)
                check(code in (0, -number, 128 + number), f"{number.name}: exit code {code}", out)
                counts.update([f"{number.name}, exit code {code}"] if code else [])
                if (out / "llast.json").exists():
                    LLaST.from_pretrained(out)
            is_equal = toys.run_results(out) == toys.run_results(whole)
            check(is_equal, "the results are not those of the first run", out)
            n_runs += 1
            print(f"{counts.total()} kills, {n_runs} runs equal to the first run", flush=True)
    for name, count in sorted(counts.items()):
        print(f"{count:4} {name}")


if __name__ == "__main__":
    main()
