"""Packed rows do not see each other: logits, losses and gradients are those of the rows alone."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from conftest import shared
from helpers import randomise_all, relative_error, tiny_llama
from transformers import AutoTokenizer
from worlds import PRECISIONS

from sora_llm.backbone import load_backbone
from sora_llm.base_spec import BackboneSpec
from sora_llm.causal_loss import causal_loss_sum
from sora_llm.data.batches import collate
from sora_llm.data.dataset import TokenDataset
from sora_llm.data.order import EpochOrder
from sora_llm.errors import UserError
from sora_llm.inject import adapter_parameters, inject_sora
from sora_llm.running import packing_check
from sora_llm.running.optimizer_step import step_batches
from sora_llm.topology import World


@pytest.fixture(scope="module")
def rows(stories, gsm8k):
    """Twelve GSM8K rows of up to 200 tokens, the loss on the answers, one of them with weights of its own."""
    tokenizer = AutoTokenizer.from_pretrained(stories)
    made = []
    with gsm8k.open() as file:
        for line in [next(file) for _ in range(12)]:
            row = json.loads(line)
            ids = tokenizer(f"{row['question']} {row['answer']}", verbose=False).input_ids[: 90 + 10 * len(made)]
            weights = np.arange(len(ids)) > len(ids) // 2
            made.append((np.array(ids), weights.astype(np.float32)))
    made[3] = (made[3][0], made[3][1] * np.float32(0.25))
    return TokenDataset.of(made)


def gradients(model, step, micro_batch_size, num_processes=1, **layout):
    """(loss, {name: gradient}) of a step, its shares summed over the processes."""
    for parameter in adapter_parameters(model).values():
        parameter.grad = None
    total = 0.0
    for process in range(num_processes):
        world = World(num_processes, process, process)
        batches = step_batches(step, world, micro_batch_size, lambda sequences: collate(sequences, 0, **layout))
        for batch in batches.micro_batches:
            loss = causal_loss_sum(model, **batch) / batches.weight
            loss.backward()
            total += loss.item()
    return total, {name: parameter.grad.clone() for name, parameter in adapter_parameters(model).items()}


def adapted(stories, precision, attn_implementation):
    spec = BackboneSpec(str(stories), **PRECISIONS[precision], attn_implementation=attn_implementation)
    model = inject_sora(load_backbone(spec, "cpu"), 4, 8)
    return randomise_all(model, size=0.05)


@pytest.mark.parametrize("attn_implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("precision", ["fp32", "nf4"])
def test_the_gradient_of_packed_rows_is_that_of_the_rows_alone(stories, rows, precision, attn_implementation):
    """The same twelve rows as one step, packed into sequences of 512 tokens and one by one."""
    model = adapted(stories, precision, attn_implementation)
    packed_step = EpochOrder(rows, 64, seed=0, pack_to=512).step(0)
    assert len(packed_step) < 8 and sorted(np.concatenate([s.rows for s in packed_step])) == list(range(12))
    loss, alone = gradients(model, EpochOrder(rows, 12, seed=0).step(0), micro_batch_size=1)
    for micro_batch_size in (1, 3):
        packed_loss, packed = gradients(model, packed_step, micro_batch_size, packed=True)
        assert packed_loss == pytest.approx(loss, rel=1e-6)
        assert max(relative_error(packed[name], alone[name]) for name in alone) < 2e-5  # float32 sums in another order
    leaked_loss, leaked = gradients(model, packed_step, 1)  # without position ids the rows see each other
    assert leaked_loss != pytest.approx(loss, rel=1e-3)
    assert max(relative_error(leaked[name], alone[name]) for name in alone) > 1e-2


@pytest.mark.parametrize("pack_to", [None, 512])
def test_any_split_of_a_step_has_the_same_gradient(stories, rows, pack_to):
    """1 × 8 ≡ 2 × 4 ≡ 4 × 2 ≡ 8 × 1, packed or not; some processes have fewer sequences, some none."""
    model = adapted(stories, "fp32", "sdpa")
    step = EpochOrder(rows, 8, seed=0, pack_to=pack_to).step(0)
    loss, expected = gradients(model, step, 8, packed=pack_to is not None)
    for num_processes, micro_batch_size in ((2, 4), (4, 2), (8, 1)):
        split_loss, split = gradients(model, step, micro_batch_size, num_processes, packed=pack_to is not None)
        assert split_loss == pytest.approx(loss, rel=1e-6)
        assert max(relative_error(split[name], expected[name]) for name in expected) < 1e-5


@pytest.mark.parametrize("precision", ["fp32", "bf16", "nf4bf16"])
@pytest.mark.parametrize("attn_implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("name", ["stories260k", "base5m"])
def test_the_probe_finds_real_models_isolated(name, attn_implementation, precision):
    spec = BackboneSpec(str(shared(f"models/{name}")), **PRECISIONS[precision], attn_implementation=attn_implementation)
    packing_check.check_packing(load_backbone(spec, "cpu"), attn_implementation, "cpu")


def test_the_probe_finds_an_untrained_model_isolated_whose_logits_hardly_depend_on_the_context():
    for dtype in (torch.float32, torch.bfloat16):
        packing_check.check_packing(tiny_llama(initializer_range=0.02).to(dtype), "sdpa", "cpu")


def test_the_probe_accepts_8_bit_weights_whose_roundings_depend_on_the_batch():
    model = load_backbone(BackboneSpec(str(shared("models/base5m")), load_in_8bit=True), "cpu")
    packing_check.check_packing(model, "sdpa", "cpu", is_8bit=True)


class Leaking(torch.nn.Module):
    """A model whose code does not pass the position ids on."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def get_input_embeddings(self):
        return self.model.get_input_embeddings()

    def forward(self, input_ids, position_ids=None, use_cache=False):
        return self.model(input_ids=input_ids, use_cache=use_cache)


@pytest.mark.parametrize("initializer_range", [0.3, 0.02])
def test_the_probe_refuses_a_model_in_which_packed_rows_see_each_other(initializer_range):
    with pytest.raises(UserError, match=r"packed rows see each other .* set data\.sample_packing to false"):
        packing_check.check_packing(Leaking(tiny_llama(initializer_range=initializer_range)), "sdpa", "cpu")


def test_the_probe_passes_nothing_that_it_cannot_compare():
    model = tiny_llama()
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[0, 0] = torch.nan
    with pytest.raises(UserError, match="the base's logits are not finite"):
        packing_check.check_packing(model, "sdpa", "cpu")


def test_the_probe_refuses_flash_attention_s_rule_under_another_layout(monkeypatch):
    """Flash attention reads the positions of a batch of one only; a batch of two would leak in silence."""

    class OnlyFlat(Leaking):
        def forward(self, input_ids, position_ids=None, use_cache=False):
            seen = position_ids if len(input_ids) == 1 else None
            return self.model(input_ids=input_ids, position_ids=seen, use_cache=use_cache)

    model = OnlyFlat(tiny_llama())
    packing_check.check_packing(model, "flash_attention_2", "cpu")
    monkeypatch.setattr(packing_check, "packs_flat", lambda attn_implementation: False)
    with pytest.raises(UserError, match="packed rows see each other"):
        packing_check.check_packing(model, "flash_attention_2", "cpu")
