"""Makes the demo's base model and data, offline, from the documentation in every Python installation.

    python launch/demo_base.py [--out outputs/demo] [--seconds 60]

    <out>/data/train.jsonl, dev.jsonl    questions and answers about the standard library, alpaca form
    <out>/base/                          a LLaMA of 2 M parameters with its tokenizer, for AutoModel and AutoTokenizer

The base is trained on documentation pages, never on questions: the adapter has to learn to answer. A second run
finds both folders and exits at once; they appear complete or not at all.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

VERSION = "1"  # raise it when the result should change: an older <out> is then rebuilt
MARKER = "demo_base_version"

VOCAB_SIZE = 2048
CONTEXT_TOKENS = 512  # the model's limit
WINDOW_TOKENS = 256  # in training: pages and questions are shorter
MODEL: dict[str, Any] = {  # every side of every linear is a multiple of 64, the block size of NF4
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 192,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": CONTEXT_TOKENS,
    "tie_word_embeddings": True,
    "initializer_range": 0.07,  # about 1/sqrt(hidden_size); LLaMA's 0.02 wastes half of such a short training
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": None,
}
BATCH_WINDOWS = 2  # many small steps learn more in a minute than few large ones
PEAK_LEARNING_RATE = 4e-3
WARMUP_FRACTION = 0.05
SEED = 0


def main() -> int:
    parser = argparse.ArgumentParser(description="Make the demo's base model and data.")
    parser.add_argument("--out", type=Path, default=Path("outputs/demo"), help="folder for base/ and data/")
    parser.add_argument("--seconds", type=float, default=60.0, help="time to train the base model for")
    args = parser.parse_args()
    if args.seconds <= 0:
        parser.error(f"--seconds must be above 0, got {args.seconds:g}")

    out: Path = args.out
    if all(is_complete(out / name) for name in ("base", "data")):
        print(f"{out / 'base'} and {out / 'data'} are there already.")
        return 0

    try:
        out.mkdir(parents=True, exist_ok=True)
        building = tempfile.TemporaryDirectory(dir=out, prefix=".building-")
    except OSError as error:
        print(f"Cannot write to {out}: {error.strerror}. Choose another folder with --out.", file=sys.stderr)
        return 2
    with building as folder:
        data, base = Path(folder, "data"), Path(folder, "base")
        corpus, held_out = make_data(data)
        base.mkdir()
        tokenizer = make_tokenizer(corpus, held_out, base)
        train_base(tokenizer, corpus, held_out, base, args.seconds)
        for made in (data, base):
            (made / MARKER).write_text(VERSION + "\n")
            final = out / made.name
            if final.exists():
                shutil.move(final, Path(folder, "old-" + made.name))  # removed with the temporary folder
            made.rename(final)
    print(f"Base model in {out / 'base'}, data in {out / 'data'}.")
    return 0


def is_complete(folder: Path) -> bool:
    marker = folder / MARKER  # added before the folder gets its name
    return marker.is_file() and marker.read_text().strip() == VERSION


def make_data(folder: Path) -> tuple[list[str], list[str]]:
    """Writes train.jsonl and dev.jsonl; returns the base model's corpus and the pages kept out of it."""
    from demo_data import make_demo_data

    corpus, held_out, train, dev = make_demo_data()
    folder.mkdir()
    for name, rows in (("train", train), ("dev", dev)):
        lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (folder / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
    num_characters = sum(map(len, corpus))
    print(
        f"Data: {len(train)} train and {len(dev)} dev questions; {num_characters / 1e6:.1f} M characters of text.",
        flush=True,
    )
    return corpus, held_out


def make_tokenizer(corpus: list[str], held_out: list[str], folder: Path) -> Any:
    """Trains a sentencepiece BPE with LLaMA's settings and saves it in both forms; returns transformers' tokenizer.

    Both are needed: llama.cpp and others read tokenizer.model, while transformers, given tokenizer.model alone, makes
    a tokenizer that splits some texts differently, and is correct with tokenizer.json. Their agreement is checked on a
    few hundred pages and on awkward strings. (They differ by design on a text that begins with a space: LlamaTokenizer
    adds no second one.)
    """
    import sentencepiece
    from transformers import AutoTokenizer

    start = time.monotonic()
    model_file = folder / "tokenizer.model"
    with model_file.open("wb") as writer:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=(line for page in corpus for line in page.splitlines() if line),
            model_writer=writer,
            model_type="bpe",
            vocab_size=VOCAB_SIZE,
            character_coverage=0.99995,
            byte_fallback=True,
            split_digits=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=True,
            allow_whitespace_only_pieces=True,
            unk_id=0,
            bos_id=1,
            eos_id=2,
            pad_id=-1,
            num_threads=num_threads(),
            minloglevel=2,
        )
    reference = sentencepiece.SentencePieceProcessor(model_file=str(model_file))

    build_fast_tokenizer(reference).save(str(folder / "tokenizer.json"))
    special_tokens = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    settings = {
        "tokenizer_class": "LlamaTokenizer",
        **special_tokens,
        "add_bos_token": True,
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
        "legacy": False,
        "model_max_length": CONTEXT_TOKENS,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")
    (folder / "special_tokens_map.json").write_text(json.dumps(special_tokens) + "\n")

    tokenizer = AutoTokenizer.from_pretrained(folder)
    awkward = [
        "",
        "a",
        "naïve café",
        "日本語 🙂",
        "x  y   z\n\n\tif a:\n        b",
        "3.14 2024",
        "tail ",
        "-" * 9,
        "=" * 20,
    ]
    texts = held_out + awkward + corpus[:: max(1, len(corpus) // 400)]
    for text in texts:
        expected = [tokenizer.bos_token_id, *reference.encode(text)]
        if tokenizer(text, verbose=False)["input_ids"] != expected:
            raise RuntimeError(f"tokenizer.json disagrees with sentencepiece on {text!r}; not a usable tokenizer")
    spent = time.monotonic() - start
    print(
        f"Tokenizer: {len(tokenizer)} pieces, equal to sentencepiece on {len(texts)} texts; {spent:.0f} s.", flush=True
    )
    return tokenizer


def build_fast_tokenizer(reference: Any) -> Any:
    """The tokenizer of a sentencepiece BPE model as transformers' LlamaTokenizer writes it to tokenizer.json.

    sentencepiece joins whichever neighbours form the known piece of the best score; the tokenizers library wants a
    list of merges in order. Pieces are numbered by score, so the list is: for each piece, all ways to make it from two.
    (transformers 5.23 lists them in a different order when it converts tokenizer.model itself.)
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

    vocab = {reference.id_to_piece(i): i for i in range(len(reference))}
    merges = []
    for piece, i in vocab.items():
        if not reference.is_byte(i) and not reference.is_control(i) and not reference.is_unknown(i):
            pairs = [(piece[:k], piece[k:]) for k in range(1, len(piece))]
            merges += [(left, right) for left, right in pairs if left in vocab and right in vocab]
    fast = Tokenizer(models.BPE(vocab, merges, fuse_unk=True, byte_fallback=True))
    fast.pre_tokenizer = pre_tokenizers.Metaspace("▁", prepend_scheme="first", split=False)
    fast.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s>:1 $B:1", special_tokens=[("<s>", 1)]
    )
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", left=1)]
    fast.decoder = decoders.Sequence(steps)
    fast.add_special_tokens([AddedToken(reference.id_to_piece(i), normalized=False, special=True) for i in range(3)])
    return fast


def train_base(tokenizer: Any, corpus: list[str], held_out: list[str], folder: Path, seconds: float) -> None:
    """Trains the model from scratch for `seconds` and saves it in bfloat16.

    The learning rate follows the clock (short linear warm-up, cosine to zero), so a slow machine gets a finished
    model from fewer steps.
    """
    import torch

    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # saving imports deepspeed, if installed, which would ask
    from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    torch.set_num_threads(num_threads())
    torch.manual_seed(SEED)
    order = torch.Generator().manual_seed(SEED)
    model = LlamaForCausalLM(LlamaConfig(**MODEL))

    pages = [corpus[i] for i in torch.randperm(len(corpus), generator=order).tolist()]
    windows = token_windows(tokenizer, pages)
    dev_windows = token_windows(tokenizer, held_out)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=PEAK_LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.1, fused=True
    )
    untrained = mean_loss(model, dev_windows)
    num_parameters = sum(p.numel() for p in model.parameters())
    print(f"Base: {num_parameters / 1e6:.2f} M parameters, {windows.numel() / 1e6:.2f} M tokens of text.", flush=True)

    start, next_report, step = time.monotonic(), 0.1, 0
    batches: Iterator[torch.Tensor] = iter(())
    model.train()
    while (progress := (time.monotonic() - start) / seconds) < 1:
        rows = next(batches, None)
        if rows is None:  # a new epoch in a new order
            batches = iter(torch.randperm(len(windows), generator=order).split(BATCH_WINDOWS))
            rows = next(batches)
        cosine = 0.5 * (1 + math.cos(math.pi * progress))
        optimizer.param_groups[0]["lr"] = PEAK_LEARNING_RATE * min(progress / WARMUP_FRACTION, cosine)
        loss = model(input_ids=windows[rows], labels=windows[rows]).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        step += 1
        if progress >= next_report:
            next_report += 0.1
            print(f"  step {step}  {progress:4.0%}  loss {loss.item():.3f}", flush=True)

    trained = mean_loss(model, dev_windows)
    tokens = step * BATCH_WINDOWS * WINDOW_TOKENS
    print(f"Base: {step} steps, {tokens / 1e6:.2f} M tokens, held-out loss {untrained:.3f} -> {trained:.3f}.")
    if not trained < untrained:
        raise RuntimeError("the base model did not learn; give it more --seconds")
    model.generation_config = GenerationConfig(bos_token_id=1, eos_token_id=2)
    model.to(torch.bfloat16).save_pretrained(folder)  # type: ignore[arg-type]


def token_windows(tokenizer: Any, pages: list[str]) -> Any:
    """All pages, each <s> … </s>, as one stream cut into rows of WINDOW_TOKENS; shape (rows, WINDOW_TOKENS)."""
    import torch

    stream = [i for ids in tokenizer(pages, verbose=False)["input_ids"] for i in [*ids, tokenizer.eos_token_id]]
    num_rows = len(stream) // WINDOW_TOKENS
    return torch.tensor(stream[: num_rows * WINDOW_TOKENS]).view(num_rows, WINDOW_TOKENS)


def mean_loss(model: Any, windows: Any) -> float:
    import torch

    model.eval()
    with torch.no_grad():
        losses = [model(input_ids=rows, labels=rows).loss.item() * len(rows) for rows in windows.split(BATCH_WINDOWS)]
    return sum(losses) / len(windows)


def num_threads() -> int:
    """All cores this process may use but one (at most four): more do not help a model this small, and threads waiting
    for a busy core make a step many times slower."""
    return max(1, min(len(os.sched_getaffinity(0)) - 1, 4))


if __name__ == "__main__":
    sys.exit(main())
