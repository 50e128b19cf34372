"""export_adapter in other people's loops: names, autocast, hooks, and what they may give it."""

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from exporting import R, in_peft, logits, spec_of, trained_model
from helpers import relative_error, tiny_llama
from transformers import AutoConfig, AutoModelForSeq2SeqLM

from sora_llm import export
from sora_llm.backbone import load_backbone
from sora_llm.errors import RunFailed, UserError
from sora_llm.export import export_adapter
from sora_llm.inject import adapters, inject_sora


class Around(torch.nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, *arguments, **options):
        return self.inner(*arguments, **options)


@pytest.mark.parametrize("wrap", ["compiled", "one's own"])
def test_an_adapter_under_another_name_than_the_base_has_is_refused(stories, tmp_path, wrap):
    """PEFT finds nothing of it there and says nothing, while the check on this very model passes."""
    model = trained_model("float32", stories)
    for layer in model.model.layers:
        layer.mlp = torch.compile(layer.mlp, backend="eager") if wrap == "compiled" else Around(layer.mlp)
    with pytest.raises(
        UserError, match=r"model\.layers\.0\.mlp\.\w+\.\w+_proj is not a module of a freshly loaded LlamaForCausalLM"
    ):
        export_adapter(model, tmp_path / "adapter")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("how", ["a context", "accelerate"])
def test_a_right_adapter_passes_under_autocast_on_a_float32_base(stories, tmp_path, how):
    """Trainer and TRL leave bf16 autocast in the model's forward; the check compared as if all were float32."""
    model = trained_model("float32", stories)
    if how == "accelerate":
        AcceleratorState._reset_state(reset_partial_state=True)  # a run in this process may have left its own
        model = Accelerator(mixed_precision="bf16", cpu=True).prepare(model)
        assert logits(model).dtype == torch.float32 and "_original_forward" in vars(model)
        certificate = export_adapter(model, tmp_path / "adapter")
        AcceleratorState._reset_state(reset_partial_state=True)
    else:
        with torch.autocast("cpu", torch.bfloat16):
            certificate = export_adapter(model, tmp_path / "adapter")
    assert 1e-4 < certificate["logits_error"] < 5e-2, "which is bfloat16's"


def test_a_wrong_adapter_does_not_pass_under_autocast(stories, tmp_path, monkeypatch):
    factors = export.folded_factors

    def spoiled(model):
        return {name: (A, B * 1.5) for name, (A, B) in factors(model).items()}

    monkeypatch.setattr(export, "folded_factors", spoiled)
    with pytest.raises(RunFailed, match=r"is off by 5\.00e-01"), torch.autocast("cpu", torch.bfloat16):
        export_adapter(trained_model("float32", stories), tmp_path / "adapter")


def test_an_export_in_the_middle_of_training_leaves_no_hook_behind(stories, tmp_path):
    model = trained_model("float32", stories)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    embeddings = model.get_input_embeddings()
    if not embeddings._forward_hooks:  # some versions of transformers have put it there
        model.enable_input_require_grads()
    before, state = list(embeddings._forward_hooks.items()), set(vars(model))
    for _ in range(2):
        export_adapter(model, tmp_path / "adapter")
    assert list(embeddings._forward_hooks.items()) == before and set(vars(model)) == state
    model.disable_input_require_grads()
    assert not embeddings._forward_hooks


def test_an_adapter_that_has_learned_nothing_is_warned_of(stories, tmp_path):
    model = inject_sora(load_backbone(spec_of("float32", stories), "cpu"), R)
    with pytest.warns(UserWarning, match="nothing was learned yet: every ΔW is 0"):
        assert export_adapter(model, tmp_path / "adapter")["passed"]


@pytest.mark.parametrize(
    "ids",
    [
        [[1, 2]],
        torch.arange(3),
        torch.zeros(1, 3),
        torch.tensor([[512]]),
        torch.tensor([[-1]]),
        torch.zeros(1, 0).long(),
        torch.tensor([[True]]),
    ],
)
def test_what_are_no_token_ids_is_a_sentence(stories, tmp_path, ids):
    with pytest.raises(UserError, match=r"probe_ids are token ids \(B, T\) from 0 to 511"):
        export_adapter(trained_model("float32", stories), tmp_path / "adapter", probe_ids=ids)


@pytest.mark.parametrize("folder", [None, 3])
def test_a_folder_that_is_no_path_is_refused(stories, folder):
    with pytest.raises(UserError, match="is not a path"):
        export_adapter(trained_model("float32", stories), folder)


def test_a_compiled_model_is_exported_under_the_names_of_its_base(stories, tmp_path):
    model = trained_model("float32", stories)
    expected = logits(model)
    export_adapter(torch.compile(model), tmp_path / "adapter")
    assert relative_error(logits(in_peft("float32", stories, tmp_path / "adapter")), expected) < 2e-5


def test_a_model_of_which_more_than_the_adapter_was_trained_is_refused(stories, tmp_path):
    model = trained_model("float32", stories)
    model.model.norm.requires_grad_(True)
    with pytest.raises(UserError, match=r"model\.norm\.weight is trainable"):
        export_adapter(model, tmp_path / "adapter")
    assert not list(tmp_path.iterdir())


def test_a_model_that_peft_could_not_reload_is_refused(tmp_path):
    headless = inject_sora(tiny_llama().model, r=2)
    with pytest.raises(UserError, match="LlamaModel is not a transformers causal language model"):
        export_adapter(headless, tmp_path / "adapter")
    sizes = {"vocab_size": 48, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 1, "num_heads": 2}
    translator = AutoModelForSeq2SeqLM.from_config(AutoConfig.for_model("t5", **sizes))
    with pytest.raises(UserError, match="T5ForConditionalGeneration is an encoder-decoder model"):
        export_adapter(inject_sora(translator, r=2), tmp_path / "adapter")


def test_an_adapter_that_has_diverged_is_a_sentence(stories, tmp_path):
    model = trained_model("float32", stories)
    with torch.no_grad():
        adapters(model)["model.layers.0.self_attn.q_proj"].lora_B.fill_(float("nan"))
    with pytest.raises(RunFailed, match="the adapter has diverged"):
        export_adapter(model, tmp_path / "adapter")
    model = trained_model("float32", stories)
    with torch.no_grad():
        model.lm_head.weight[0] = float("inf")
    with pytest.raises(RunFailed, match="the base's logits are not finite"):
        export_adapter(model, tmp_path / "adapter")
    assert not list(tmp_path.iterdir())
