"""How fast data becomes training tokens: `python benchmarks/data.py` from the project's root, on an idle machine.

`tokenise`: rows → token ids and weights (our formats, template, masks) against `datasets.map` with the bare tokenizer
over the same texts, already rendered.  Both on one core, in turn, medians of several rounds.

`start`: preparing a data set, and the time to the first batch of a run that finds it in the cache, with the memory of
both, for data sets of several sizes.

`stream`: a training step alone, beside a thread of the same process that tokenises, and beside the processes that
tokenise a stream, in turn.  The step is small on purpose: like a GPU's it consists of calls from Python.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

os.environ["TOKENIZERS_PARALLELISM"] = "false"  # both sides on one core
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import datasets
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from sora_llm import inject_sora
from sora_llm.data.builtin_templates import TEMPLATES
from sora_llm.data.chunks import Tokenizing, in_chunks
from sora_llm.data.formats import Conversation, PromptCompletion, to_examples
from sora_llm.data.sources import DatasetSpec
from sora_llm.data.stream import Item, WindowTokenizer
from sora_llm.data.templates import as_dicts, render
from sora_llm.data.tokenize import tokenize_examples

SHARED = Path(os.environ.get("SORA_TEST_DATA", Path(__file__).resolve().parent.parent.parent / "shared"))
ROWS_PER_CALL = 200  # the same cut as in preparation

# ----- tokenise -------------------------------------------------------------------------------------------------------


def tokenise(num_rows: int, rounds: int) -> None:
    """Prints rows per second of both sides and their ratio, for every kind of row and every tokenizer."""
    lines = (SHARED / "data/gsm8k_train.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in itertools.islice(itertools.cycle(lines), num_rows)]
    specs = {
        "alpaca": {"instruction": "question", "output": "answer"},
        "prompt_completion": {"prompt": "question", "completion": "answer"},
    }
    print(f"{num_rows:,} rows of GSM8K, medians of {rounds} rounds, one core")
    for vocabulary, tokenizer in {"base5m": base5m(), "bytes": byte_level(32_000)}.items():
        for type_, columns in specs.items():
            spec = DatasetSpec("rows", type_, columns=columns, separator="\n" if type_ == "prompt_completion" else "")
            texts = datasets.Dataset.from_dict({"text": list(rendered(rows, spec, tokenizer))})
            ours, theirs = in_turn(
                partial(tokenise_rows, rows, spec, tokenizer),
                partial(tokenise_texts, texts, tokenizer),
                rounds,
            )
            print(
                f"{vocabulary:6} vocabulary {len(tokenizer):6,}  {type_:17}  ours {num_rows / ours:7,.0f} rows/s   "
                f"datasets.map {num_rows / theirs:7,.0f} rows/s   ratio {theirs / ours:.2f}"
            )


def tokenise_rows(rows: list[dict[str, Any]], spec: DatasetSpec, tokenizer: Any) -> None:
    """Our side: a row read, rendered, tokenised, masked."""
    for start in range(0, len(rows), ROWS_PER_CALL):
        examples = [example for row in rows[start : start + ROWS_PER_CALL] for example in to_examples(row, spec)]
        tokenize_examples(examples, tokenizer, TEMPLATES["alpaca"], separator=spec.separator)


def tokenise_texts(texts: datasets.Dataset, tokenizer: Any) -> None:
    """Their side: the tokenizer alone."""
    texts.map(lambda batch: tokenizer(batch["text"]), batched=True)


def rendered(rows: list[dict[str, Any]], spec: DatasetSpec, tokenizer: Any) -> Iterator[str]:
    """The same rows as texts."""
    for row in rows:
        for example in to_examples(row, spec):
            if isinstance(example, Conversation):
                yield render(as_dicts(example.messages), TEMPLATES["alpaca"], tokenizer.special_tokens_map)
            elif isinstance(example, PromptCompletion):
                yield example.prompt + spec.separator + example.completion


def base5m() -> Any:
    """A sentencepiece tokenizer."""
    return AutoTokenizer.from_pretrained(SHARED / "models/base5m")


def byte_level(vocabulary: int) -> PreTrainedTokenizerFast:
    """A tokenizer as GPT-2's, Llama 3's and Qwen's are built, trained on the available text."""
    files = ("gsm8k_train.jsonl", "gutenberg_sherlock_holmes.txt", "wikitext2_valid.txt", "mlx_wikisql_train.jsonl")
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<bos>", "<eos>"]
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    backend.train([str(SHARED / "data" / file) for file in files], trainer)
    backend.post_processor = processors.TemplateProcessing("<bos> $A", None, [("<bos>", backend.token_to_id("<bos>"))])
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<bos>", eos_token="<eos>")


def in_turn(a: Callable[[], None], b: Callable[[], None], rounds: int) -> tuple[float, float]:
    """Median seconds of each, run A B A B so that a busy machine slows both; the first round only warms up."""
    seconds: tuple[list[float], list[float]] = ([], [])
    for _ in range(rounds + 1):
        for run, times in zip((a, b), seconds, strict=True):
            start = time.perf_counter()
            run()
            times.append(time.perf_counter() - start)
    return statistics.median(seconds[0][1:]), statistics.median(seconds[1][1:])


# ----- start ----------------------------------------------------------------------------------------------------------

FIRST_BATCH = """
import json, re, sys, time
from sora_llm import train
from sora_llm.running import inputs, plan, training_data
from sora_llm.config import load_config
from sora_llm.topology import World
def peak():  # (of this program: ru_maxrss would begin at what the process that started it has taken)
    return int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]) / 1024
imported, began = peak(), time.perf_counter()
config, alone = load_config(sys.argv[1]), World(1, 0, 0)
found = inputs.check_inputs(config, "none")
data = training_data.load_data(config, found, alone)
with training_data.training_order(config, found, data, plan.rows_in_step(config, alone)) as order:
    batch = found.batch([sequence.read() for sequence in order.step(0)], packed=True)
seconds = time.perf_counter() - began
print(json.dumps({"seconds": seconds, "mib": peak() - imported, "shape": list(batch["input_ids"].shape)}))
"""


PREPARE = """
import json, re, sys
from sora_llm.commands.cmd_preprocess import main
def peak():  # (of this program: ru_maxrss would begin at what the process that started it has taken)
    return int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]) / 1024
imported, out = peak(), sys.stdout
sys.stdout = sys.stderr
code = main([sys.argv[1], "--json"])
sys.stdout = out
print(json.dumps({"code": code, "mib": peak() - imported}))
"""


def start(num_rows: Sequence[int]) -> None:
    """Prints the cost of preparing, and of reaching the first batch of the prepared data."""
    print(
        "\nprepared with two processes, then: from the end of the imports to the first packed batch of 4 × 1,024 tokens"
    )
    with tempfile.TemporaryDirectory() as name:
        for count in num_rows:
            config = write_config(Path(name), count)
            began = time.perf_counter()
            prepared = child([sys.executable, "-c", PREPARE, str(config)])
            seconds = time.perf_counter() - began
            first = child([sys.executable, "-c", FIRST_BATCH, str(config)])
            print(
                f"{count:9,} rows   prepared in {seconds:6.1f} s, {prepared['mib']:5.0f} MiB at most   "
                f"first batch after {first['seconds']:.2f} s, {first['mib']:4.0f} MiB more than after the imports"
            )


def write_config(folder: Path, num_rows: int) -> Path:
    """A config with this many different rows, made from GSM8K's, with its own cache."""
    lines = (SHARED / "data/gsm8k_train.jsonl").read_text(encoding="utf-8").splitlines()
    with (folder / f"{num_rows}.jsonl").open("w") as file:
        for number, line in enumerate(itertools.islice(itertools.cycle(lines), num_rows)):
            row = json.loads(line)
            file.write(json.dumps({**row, "question": f"{number}. {row['question']}"}) + "\n")
    dataset = {"path": str(folder / f"{num_rows}.jsonl"), "columns": {"instruction": "question", "output": "answer"}}
    config = {
        "model": {"name_or_path": str(SHARED / "models/base5m")},
        "sora": {"sparse_lambda": 0.6},
        "data": {"datasets": [dataset], "sequence_len": 1024, "num_proc": 2, "cache_dir": str(folder / "cache")},
        "train": {"max_steps": 100, "per_device_train_batch_size": 4},
        "output": {"output_dir": str(folder / f"run-{num_rows}")},
    }
    path = folder / f"{num_rows}.yaml"
    path.write_text(json.dumps(config))  # JSON is YAML
    return path


def child(command: list[str]) -> dict[str, Any]:
    """The last line that a separate process prints, as JSON."""
    ended = subprocess.run(command, capture_output=True, text=True, check=True)
    found: dict[str, Any] = json.loads(ended.stdout.splitlines()[-1])
    return found


# ----- stream ---------------------------------------------------------------------------------------------------------

STEPS = 40


def stream(rounds: int) -> None:
    """Prints how much longer a step takes beside either way to tokenise, and the rows per second of those.  Means, as
    what stops a thread now and then does not show in a median of steps."""
    torch.set_num_threads(1)
    lines = (SHARED / "data/gsm8k_train.jsonl").read_text(encoding="utf-8").splitlines()
    columns = {"instruction": "question", "output": "answer"}
    work = Tokenizing((DatasetSpec("rows", "alpaca", columns=columns),), base5m(), TEMPLATES["alpaca"])
    items: list[Item] = [(f"rows:{number}", json.loads(line), 0) for number, line in enumerate(lines[:2000])]
    with contextlib.ExitStack() as stack:
        one, two = (stack.enter_context(contextlib.closing(WindowTokenizer(work, 0.0, n))) for n in (1, 2))
        ways: dict[str, Callable[[list[Item]], object]] = {
            "a thread": lambda window: [work.tokenize((0, c)) for c in in_chunks((at, row) for at, row, _ in window)],
            "a thread and 1 process": lambda window: one(window, [{}]),
            "a thread and 2 processes": lambda window: two(window, [{}]),
        }
        ratios: dict[str, list[float]] = {name: [] for name in ways}
        rates: dict[str, list[float]] = {name: [] for name in ways}
        alone, step = [], small_step()
        for _ in range(rounds):
            alone.append(mean_seconds(step))
            for name, tokenise_window in ways.items():
                with tokenising(tokenise_window, items) as rate:
                    ratios[name].append(mean_seconds(step) / alone[-1])
                rates[name].append(rate())
    print(f"\na step of stories260k, 64 tokens, one thread: means of {STEPS} steps, medians of {rounds} rounds")
    print(f"alone {statistics.median(alone) * 1e3:.1f} ms")
    for name, found in ratios.items():
        spread = f"{min(found):.2f} to {max(found):.2f}"
        rows = statistics.median(rates[name])
        print(f"beside {name:24}  {statistics.median(found):.2f} × ({spread}), {rows:,.0f} rows/s")


def small_step() -> Callable[[], None]:
    """Forward and backward pass of a small model with adapters."""
    base = AutoModelForCausalLM.from_pretrained(SHARED / "models/stories260k", dtype=torch.float32)
    ids = torch.randint(base.config.vocab_size, (1, 64), generator=torch.Generator().manual_seed(0))
    model = inject_sora(base, r=8)

    def step() -> None:
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        model.zero_grad()

    step()
    return step


def mean_seconds(step: Callable[[], None]) -> float:
    start = time.perf_counter()
    for _ in range(STEPS):
        step()
    return (time.perf_counter() - start) / STEPS


@contextlib.contextmanager
def tokenising(tokenise_window: Callable[[list[Item]], Any], items: list[Item]) -> Iterator[Callable[[], float]]:
    """Context in which a thread tokenises one window after the other; yields its rows per second, once it has ended."""
    done, is_over, start = [0], threading.Event(), time.perf_counter()

    def work() -> None:
        while not is_over.is_set():
            tokenise_window(items)
            done[0] += len(items)

    thread = threading.Thread(target=work)
    thread.start()
    try:
        yield lambda: done[0] / (time.perf_counter() - start)
    finally:
        is_over.set()
        thread.join()


# ----- command line ---------------------------------------------------------------------------------------------------


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=30_000)
    parser.add_argument("--rounds", type=int, default=5, help="of tokenise; 0 leaves it out")
    parser.add_argument(
        "--start", type=int, nargs="*", default=[50_000, 200_000], help="rows of the sets to start with"
    )
    parser.add_argument("--stream", type=int, default=5, help="rounds of stream; 0 leaves it out")
    args = parser.parse_args()
    datasets.disable_caching()
    datasets.disable_progress_bars()
    if args.rounds:
        tokenise(args.rows, args.rounds)
    if args.start:
        start(args.start)
    if args.stream:
        stream(args.stream)


if __name__ == "__main__":
    main()
