"""Without moving gates SoRA is LoRA: PEFT's run and ours give the same losses on real rows."""

import warnings

import pytest
import torch
from helpers import relative_error
from transformers import AutoModelForCausalLM, AutoTokenizer

from sora_llm.backbone import load_backbone
from sora_llm.base_spec import BackboneSpec
from sora_llm.data.batches import collate
from sora_llm.data.chunks import Tokenizing
from sora_llm.data.prepare import prepare
from sora_llm.data.sources import DatasetSpec
from sora_llm.distributed.engine import Engine
from sora_llm.distributed.group import make_accelerator
from sora_llm.inject import adapters, cut_adapters, inject_sora
from sora_llm.optim import ProxAdamW, parameter_groups
from sora_llm.running.optimizer_step import StepBatches, train_step
from sora_llm.topology import World

STEPS, ROWS, R, LORA_ALPHA, LR, DECAY, MAX_NORM = 16, 4, 8, 16, 5e-3, 0.01, 1.0


@pytest.fixture(scope="module")
def batches(stories, gsm8k, tmp_path_factory):
    """Sixteen steps of four GSM8K rows, the loss on the answers."""
    few = tmp_path_factory.mktemp("gsm8k") / "rows.jsonl"
    with gsm8k.open() as file:
        few.write_text("".join(next(file) for _ in range(4 * STEPS * ROWS)))
    columns = {"prompt": "question", "completion": "answer"}
    tokenizer = AutoTokenizer.from_pretrained(stories)
    spec = DatasetSpec(path=str(few), type="prompt_completion", columns=columns)
    rows, _ = prepare(Tokenizing((spec,), tokenizer, "", sequence_len=512), cache_dir=few.parent / "cache")
    short = [row for row in range(len(rows)) if rows.lengths[row] < 300][: STEPS * ROWS]
    assert len(short) == STEPS * ROWS
    return [collate([[rows[row]] for row in short[start : start + ROWS]], 0) for start in range(0, len(short), ROWS)]


def peft_run(stories, batches):
    """PEFT's layers, transformers' loss, torch's AdamW: losses, and factors at the start and the end."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_pretrained(stories, dtype=torch.float32)
    config = LoraConfig(r=R, lora_alpha=LORA_ALPHA, target_modules="all-linear", task_type="CAUSAL_LM")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(base, config).train()
    layers = {name: module for name, module in base.named_modules() if hasattr(module, "lora_A")}

    def factors():
        pairs = {name: (m.lora_A["default"].weight, m.lora_B["default"].weight) for name, m in layers.items()}
        return {name: (A.detach().clone(), B.detach().clone()) for name, (A, B) in pairs.items()}

    start = factors()
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=LR, weight_decay=DECAY)
    losses = []
    for batch in batches:
        loss = model(input_ids=batch["input_ids"], labels=batch["labels"], use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trainable, MAX_NORM)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses, start, factors()


def sora_run(stories, batches, start, gates):
    """Our layers, loss, optimizer and step from the same factors, the gates frozen or folded away."""
    model = inject_sora(load_backbone(BackboneSpec(str(stories), dtype="float32"), "cpu"), R, LORA_ALPHA)
    layers = adapters(model)
    assert layers.keys() == start.keys()
    with torch.no_grad():
        for name, layer in layers.items():
            layer.lora_A.copy_(start[name][0])
            layer.lora_B.copy_(start[name][1])
            layer.gate.requires_grad_(False)
    if gates == "folded":
        cut_adapters(model, {name: (layer.lora_A, layer.lora_B) for name, layer in layers.items()})
    optimizer = ProxAdamW(parameter_groups(model, LR, 1.0, weight_decay=DECAY))
    engine = Engine(make_accelerator("none", World(1, 0, 0)), model, optimizer, "none", MAX_NORM)
    losses = []
    for batch in batches:
        tokens = int((batch["labels"][:, 1:] != -100).sum())
        loss_sum, _ = train_step(engine, StepBatches([batch], tokens, tokens, tokens, tokens), num_processes=1)
        losses.append(loss_sum.item() / tokens)
    return losses, layers


@pytest.mark.parametrize("gates", ["frozen", "folded"])
def test_without_moving_gates_training_equals_pefts_lora(stories, batches, gates):
    expected, start, end = peft_run(stories, batches)
    losses, layers = sora_run(stories, batches, start, gates)
    assert all((labels != -100).sum(1).unique().numel() > 1 for labels in (b["labels"] for b in batches))
    # float32: 1e-7 a step, amplified by Adam's m/√v where a gradient is near 0
    assert losses == pytest.approx(expected, rel=2e-6)
    for name, layer in layers.items():
        A, B = end[name]
        assert layer.gate is None if gates == "folded" else torch.equal(layer.gate, torch.ones(R))
        assert relative_error(layer.lora_B @ layer.lora_A, B @ A) < 1e-4
    assert sum(expected[-4:]) < sum(expected[:4]) - 0.4, "the runs must have learned something"
