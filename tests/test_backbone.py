"""Loading: the tokenizer's guard, the CPU repack guard, the loss that a batch's padding cannot change."""

from __future__ import annotations

import json
import re
import shutil

import pytest
import torch
from helpers import token_row
from safetensors.torch import load_file, save_file

from sora_llm import backbone, causal_loss
from sora_llm.backbone import (
    check_weights,
    load_backbone,
    load_model_config,
    load_tokenizer,
    num_embeddings,
    pad_token_id,
    skeleton,
)
from sora_llm.base_spec import BackboneSpec
from sora_llm.causal_loss import causal_loss_sum
from sora_llm.data.batches import collate
from sora_llm.errors import UserError


def test_a_tokenizer_made_of_tokenizer_model_alone_is_compared_with_sentencepiece(stories, tmp_path, monkeypatch):
    """transformers drops one of the blanks at the start of a text that sentencepiece keeps."""
    for name in ("config.json", "tokenizer.model", "tokenizer_config.json"):
        shutil.copyfile(stories / name, tmp_path / name)
    spec = BackboneSpec(str(tmp_path))
    load_tokenizer(spec)
    monkeypatch.setattr(backbone, "SENTENCEPIECE_PROBES", ("  two blanks",))
    with pytest.raises(UserError, match=r"put the base model's tokenizer\.json next to it"):
        load_tokenizer(spec)
    load_tokenizer(BackboneSpec(str(stories)))  # with tokenizer.json nothing is compared


def test_an_eval_forward_does_not_change_4_bit_weights(stories):
    """bitsandbytes repacks them for AVX512-BF16 at the first CPU forward in eval mode unless it is forbidden."""
    model = load_backbone(BackboneSpec(str(stories), load_in_4bit=True), "cpu")
    linears = [module for module in model.modules() if hasattr(module, "support_avx512bf16_for_cpu")]
    assert linears and not any(module.support_avx512bf16_for_cpu for module in linears)
    before = [module.weight.detach().clone() for module in linears]
    with torch.no_grad():
        model.eval()(input_ids=torch.arange(8)[None])
    assert all(torch.equal(old, module.weight) for old, module in zip(before, linears, strict=True))


def _base(stories, folder, change, **config):
    """A copy of the checkpoint with other names of tensors (None: left out), or another config.json."""
    shutil.copytree(stories, folder)
    tensors = {change(name): tensor for name, tensor in load_file(stories / "model.safetensors").items()}
    tensors.pop(None, None)
    (folder / "model.safetensors").unlink()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    said = json.loads((stories / "config.json").read_text())
    (folder / "config.json").unlink()
    (folder / "config.json").write_text(json.dumps({**said, **config}))
    return folder


NORM = "model.layers.1.input_layernorm.weight"


@pytest.mark.parametrize("quantised", [False, True])
@pytest.mark.parametrize(
    ("change", "config", "said"),
    [
        (lambda name: None if name == NORM else name, {}, f"lack {NORM}, which would be random"),
        (lambda name: f"_orig_mod.{name}", {}, r"lack \S+ and 47 more, which would be random"),
        (lambda name: name.replace("q_proj", "q_proj.base_layer"), {}, r"lack \S+q_proj.weight and 4 more"),
        (str, {"num_hidden_layers": 6}, r"lack model.layers.5.\S+ and 8 more"),
        (str, {"tie_word_embeddings": False}, "lack lm_head.weight, which"),
        (str, {"vocab_size": 600}, r"model.embed_tokens.weight of \S+ is \[512, 64\] in its files, but \[600, 64\] by"),
    ],
    ids=["one left out", "compiled", "from inside PEFT", "more layers", "no head", "other size"],
)
def test_a_base_is_never_completed_with_random_weights(stories, tmp_path, change, config, said, quantised):
    folder = _base(stories, tmp_path / "base", change, **config)
    spec = BackboneSpec(str(folder), dtype="float32", load_in_4bit=quantised, compute_dtype="float32")
    with pytest.raises(UserError, match=said):
        check_weights(spec, load_model_config(spec))
    if quantised and "vocab_size" in config:
        return  # in 4 bits, transformers 5.17 takes the shape that is in the files
    with pytest.raises(UserError, match=said):
        load_backbone(spec, "cpu")


def test_the_attention_of_its_config_need_not_be_installed(stories, tmp_path):
    folder = _base(stories, tmp_path / "base", str, attn_implementation="flash_attention_2")
    spec = BackboneSpec(str(folder), dtype="float32")
    check_weights(spec, load_model_config(spec))
    load_backbone(spec, "cpu")


def test_weights_that_a_base_has_no_place_for_are_said(stories, tmp_path):
    folder, said = _base(stories, tmp_path / "base", str, num_hidden_layers=4), []
    load_backbone(BackboneSpec(str(folder), dtype="float32"), "cpu", warn=said.append)
    assert len(said) == 1 and "hold model.layers.4.input_layernorm.weight and 8 more, which the model" in said[0]
    load_backbone(BackboneSpec(str(stories), dtype="float32"), "cpu", warn=said.append)
    assert len(said) == 1


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"num_attention_heads": 7}, "The hidden size (64) is not a multiple of the number of attention heads (7)"),
        ({"hidden_size": "64"}, "Field 'hidden_size' expected int"),
        ({"hidden_act": "nope"}, "cannot make the model that the config.json of {} describes: KeyError 'nope'"),
    ],
)
def test_a_config_that_describes_no_model_is_a_sentence(stories, tmp_path, config, said):
    spec = BackboneSpec(str(_base(stories, tmp_path / "base", str, **config)))
    with pytest.raises(UserError, match=re.escape(said.format(spec.name_or_path))):
        skeleton(load_model_config(spec), spec)


def test_rows_are_filled_with_a_token_that_the_model_has(stories):
    spec = BackboneSpec(str(stories), dtype="float32")
    model, tokenizer = load_backbone(spec, "cpu"), load_tokenizer(spec)
    tokenizer.pad_token = "<s>"
    assert pad_token_id(tokenizer, model) == tokenizer.bos_token_id
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    assert tokenizer.pad_token_id == num_embeddings(model)
    assert pad_token_id(tokenizer, model) == tokenizer.eos_token_id


@pytest.mark.parametrize("pad_id", [0, 2, 77])
def test_padding_changes_no_loss_whatever_its_id(stories, pad_id):
    model = load_backbone(BackboneSpec(str(stories), dtype="float32"), "cpu").eval()
    rows = [token_row([1, 5, 9, 30, 2], [0, 0, 1, 1, 1]), token_row([1, 8, 2], [0, 1, 1])]
    together = collate([[row] for row in rows], pad_id)
    with torch.no_grad():
        sums = [causal_loss_sum(model, **collate([[row]], pad_id)) for row in rows]
        padded = causal_loss_sum(model, **together)
    torch.testing.assert_close(padded, sum(sums), rtol=1e-6, atol=1e-5)  # another order of float32 sums


def test_a_model_that_cannot_select_columns_gives_the_same_loss(stories, monkeypatch):
    model = load_backbone(BackboneSpec(str(stories), dtype="float32"), "cpu").eval()
    batch = collate([[token_row([1, 5, 9, 30, 2], [0, 0, 1, 0, 1])]], 0)
    with torch.no_grad():
        selected = causal_loss_sum(model, **batch)
        monkeypatch.setattr(causal_loss, "takes_columns", lambda model: False)
        torch.testing.assert_close(causal_loss_sum(model, **batch), selected, rtol=1e-6, atol=0)


def test_a_batch_without_supervised_tokens_weighs_nothing(stories):
    model = load_backbone(BackboneSpec(str(stories), dtype="float32"), "cpu")
    model.get_input_embeddings().requires_grad_(True)
    loss = causal_loss_sum(model, **collate([], 0))
    loss.backward()
    assert loss.item() == 0 and not model.get_input_embeddings().weight.grad.any()
