"""train.torch_compile changes how fast a step is, not what is trained: a compiled layer is the layer, and a compiled
run ends with the adapter of one that is not, under every strategy that may compile."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import linear4bit, linear8bit, randomise, relative_error, tiny_llama
from small_runs import CONFIG, PREEMPTED, Playground, delta_error, delta_weights, lines, overrides
from torch import nn

from sora_llm import compiled
from sora_llm.backbone import enable_checkpointing
from sora_llm.compiled import CompiledBlocks, blocks, check_compilable
from sora_llm.errors import RunFailed, UserError
from sora_llm.inject import adapters, inject_sora
from sora_llm.sora import SoraLinear
from sora_llm.train import run

IN, OUT, R, ALPHA = 64, 64, 4, 6.0
ROUNDING = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}


def layer_of(base: nn.Linear, dropout: float = 0.0, dead: int = 0) -> SoraLinear:
    return randomise(SoraLinear(base, R, ALPHA, dropout), seed=1, dead=dead)


def traced(layer: SoraLinear) -> Callable[[torch.Tensor], torch.Tensor]:
    """The layer as torch.compile sees it, in one graph, without its code generation."""
    torch.compiler.reset()
    return torch.compile(layer, backend="aot_eager", fullgraph=True)


# ----- the layer ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("form", ["gated", "cut", "nf4", "int8", "answers in another dtype"])
def test_a_compiled_layer_has_the_answers_and_gradients_of_the_layer(form: str, dtype: torch.dtype) -> None:
    weight = torch.randn(OUT, IN, generator=torch.Generator().manual_seed(0)) * 0.1
    made = {"nf4": lambda: linear4bit(weight, dtype), "int8": lambda: linear8bit(weight)}
    base: nn.Linear = made[form]() if form in made else nn.Linear(IN, OUT, bias=False, dtype=dtype)
    layer = layer_of(base)
    if form == "cut":
        layer.cut(layer.lora_A[:2], layer.lora_B[:, :2])
    if form == "answers in another dtype":
        layer.base_layer.forward = lambda x: nn.functional.linear(x.double(), weight.double())
    found = []
    for call in (layer, traced(layer)):
        x = torch.randn(2, 3, IN, generator=torch.Generator().manual_seed(1)).to(dtype).requires_grad_()
        y = call(x)
        y.float().square().sum().backward()
        found.append([y.detach(), x.grad, *(p.grad for p in layer.parameters() if p.requires_grad)])
        layer.zero_grad()
    for eager, ours in zip(*found, strict=True):
        assert ours.dtype == eager.dtype and relative_error(ours, eager) < ROUNDING[dtype]


def test_a_dead_gate_of_a_compiled_layer_keeps_its_gradient_and_gives_its_slot_none() -> None:
    layer = layer_of(nn.Linear(IN, OUT), dead=1)
    traced(layer)(torch.randn(6, IN)).square().sum().backward()
    assert layer.gate.grad[0] != 0
    assert torch.equal(layer.lora_A.grad[0], torch.zeros(IN))
    assert torch.equal(layer.lora_B.grad[:, 0], torch.zeros(OUT))
    assert (layer.lora_A.grad[1:] != 0).any() and (layer.lora_B.grad[:, 1:] != 0).any()


def test_dropout_of_a_compiled_layer_is_one_mask_of_its_input_forward_and_backward() -> None:
    """With A = B = 1 and a base layer of zeros, y shows the mask, and so does the gradient of x."""
    p, base = 0.25, nn.Linear(IN, IN, bias=False)
    base.weight.data.zero_()
    layer = SoraLinear(base, IN, lora_alpha=IN, lora_dropout=p)
    with torch.no_grad():
        layer.lora_A.copy_(torch.eye(IN))
        layer.lora_B.copy_(torch.eye(IN))
    x = torch.ones(50, IN, requires_grad=True)
    y = traced(layer)(x)
    y.sum().backward()
    kept = y.detach() != 0
    assert abs(kept.float().mean() - (1 - p)) < 0.03
    torch.testing.assert_close(y.detach(), kept / (1 - p))
    torch.testing.assert_close(x.grad, y.detach())
    torch.testing.assert_close(layer.lora_A.grad, torch.ones(IN, 1) * y.detach().sum(0))
    layer.eval()
    torch.testing.assert_close(traced(layer)(x), x)


def test_recomputed_blocks_draw_the_mask_again_that_they_had() -> None:
    found = []
    for recompute in (False, True):
        torch.manual_seed(0)
        model = inject_sora(tiny_llama(num_hidden_layers=2), r=R, lora_dropout=0.5).train()
        for index, layer in enumerate(adapters(model).values()):
            randomise(layer, index, size=0.1)
        if recompute:
            enable_checkpointing(model)
        torch.compiler.reset()
        for block in blocks(model):
            block.compile(backend="aot_eager", fullgraph=True)
        torch.manual_seed(1)
        x = model.get_input_embeddings()(torch.arange(8)[None]).detach().requires_grad_()
        model(inputs_embeds=x, use_cache=False).logits.square().mean().backward()
        found.append([x.grad, *(p.grad for p in model.parameters() if p.grad is not None)])
    assert len(found[0]) == 1 + 2 * 7 * 3
    for kept, recomputed in zip(*found, strict=True):
        torch.testing.assert_close(recomputed, kept)


# ----- the model ------------------------------------------------------------------------------------------------------


def test_blocks_run_compiled_in_training_passes_alone() -> None:
    model = inject_sora(tiny_llama(), r=2)
    found = CompiledBlocks(model)
    assert [type(block).__name__ for block in blocks(model)] == ["LlamaDecoderLayer"] * len(model.model.layers)
    calls: list[nn.Module] = []

    def noting(block: nn.Module) -> Callable[..., Any]:
        return lambda *args, **kwargs: (calls.append(block), block._call_impl(*args, **kwargs))[1]

    found._compiled = [(block, noting(block)) for block, _ in found._compiled]
    ids = torch.arange(6)[None]
    with found.active():
        inside = model(ids, use_cache=False).logits
    assert calls == blocks(model)
    assert torch.equal(model(ids, use_cache=False).logits, inside) and calls == blocks(model)
    with pytest.raises(ZeroDivisionError), found.active():
        raise ZeroDivisionError
    model(ids)
    assert calls == blocks(model), "also after an error"


@pytest.mark.matrix
def test_blocks_are_compiled_anew_however_often_the_adapters_have_been_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    """As the stages of a sparsity path do: graphs of adapters that are gone do not use up the limit."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    monkeypatch.setattr(compiled, "_GRAPHS_PER_BLOCK", 2)
    model, counters = inject_sora(tiny_llama(num_hidden_layers=2), r=6), torch._dynamo.utils.counters
    for number in range(2):
        for index, layer in enumerate(adapters(model).values()):
            rank = (number + index) % 3 + 1
            layer.cut(torch.randn(rank, layer.in_features), torch.randn(layer.out_features, rank))
        found = CompiledBlocks(model)
        counters.clear()
        for length in (4, 5):
            with found.active():
                model(torch.arange(length)[None], use_cache=False).logits.sum().backward()
        assert counters["stats"]["unique_graphs"] >= 2, "each of two blocks with other ranks"
        assert not counters["unimplemented"] and not counters["recompile_limit"]


def test_a_compiler_that_fails_ends_the_run_with_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(graph: Any, inputs: Any) -> Any:
        raise ValueError("no such instruction\nand much more")

    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=broken))
    model = inject_sora(tiny_llama(), r=2)
    found = CompiledBlocks(model)
    with (
        pytest.raises(RunFailed, match=r"could not be compiled \(.*no such instruction.*set it to false") as caught,
        found.active(),
    ):
        model(torch.arange(6)[None], use_cache=False)
    assert "\n" not in str(caught.value) and "much more" not in str(caught.value)
    assert model(torch.arange(6)[None], use_cache=False).logits.isfinite().all()


def test_what_cannot_be_compiled_is_refused_before_a_model_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_llama()
    check_compilable(model, "zero2", cuda=False)
    with pytest.raises(UserError, match="zero3"):
        check_compilable(model, "zero3", cuda=False)
    with pytest.raises(UserError, match="Linear has no blocks"):
        check_compilable(nn.Linear(2, 2), "none", cuda=False)
    monkeypatch.setattr(compiled, "find_spec", lambda name: None)
    check_compilable(model, "none", cuda=False)
    with pytest.raises(UserError, match="needs Triton"):
        check_compilable(model, "none", cuda=True)
    monkeypatch.setenv("CXX", "no-such-compiler -v")
    with pytest.raises(UserError, match=r"needs a C\+\+ compiler: apt install g\+\+"):
        check_compilable(model, "none", cuda=False)


# ----- the run --------------------------------------------------------------------------------------------------------

STEPS = 10
RUN: dict[str, Any] = {
    "sora.sparse_lambda": None,
    "sora.target_rank": 1.5,
    "sora.dense_ratio": 0.2,
    "sora.consensus_at": 0.6,
    "sora.gate_lr": "auto",
    "sora.lora_dropout": 0.0,  # its masks are others
    "train.max_steps": STEPS,
    "evaluation.eval_steps": None,
    "data.sample_packing": True,
    "output.save_steps": 5,
}
FORMS: dict[str, dict[str, Any]] = {
    "fp32": {},
    "nf4": {"quantization.load_in_4bit": True, "quantization.bnb_4bit_compute_dtype": "float32"},
    "padded, recompute": {"data.sample_packing": False, "train.gradient_checkpointing": True},
}
SHORT = {"sora.threshold": "decoupled", "sora.dense_ratio": 0.25, "sora.consensus_at": 0.5, "train.max_steps": 4}
CELLS = [(form, *world) for form in FORMS for world in (("none", 1), ("ddp", 2), ("zero2", 2))]
TOLERANCE = 1e-4
"""Relative error of ΔW: as between strategies, float32 sums in another order, through ten steps and two SVDs."""


@pytest.fixture(scope="module")
def plain(ground: Playground) -> Callable[[str], Path]:
    """The directory of a run in one process that is not compiled."""

    def make(form: str) -> Path:
        name = f"not compiled, {form}"
        if not ground.run_dir(name).exists():
            assert ground.codes(name, **{**RUN, **{**FORMS, "short": SHORT}[form]}) == [0]
        return ground.run_dir(name)

    return make


def test_a_traced_run_ends_with_the_adapter_of_one_that_is_not(
    ground: Playground, plain: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Shorter than below, and without the minute that generating code takes."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    torch._dynamo.utils.counters.clear()
    run(CONFIG, *overrides(ground.folder, tmp_path, **{**RUN, **SHORT, "train.torch_compile": True}))
    assert_same_adapter(tmp_path, plain("short"))
    stats = torch._dynamo.utils.counters["stats"]
    num_blocks = len({name.partition("layers.")[2].split(".")[0] for name in delta_weights(tmp_path)})
    assert not torch._dynamo.utils.counters["graph_break"]
    # Up to the cut all blocks but the first, whose input needs no gradient, are one graph; of one length, then of any.
    assert num_blocks == 5 and 4 < stats["unique_graphs"] <= 4 + num_blocks + 1


@pytest.mark.matrix
@pytest.mark.timeout(900)
@pytest.mark.parametrize(("form", "strategy", "num_processes"), CELLS)
def test_a_compiled_run_ends_with_the_adapter_of_one_that_is_not(
    form: str, strategy: str, num_processes: int, ground: Playground, plain: Callable[[str], Path]
) -> None:
    name, options = f"compiled, {form}, {strategy}", {"train.torch_compile": True, "distributed.strategy": strategy}
    assert ground.codes(name, num_processes, **{**RUN, **FORMS[form], **options}) == [0] * num_processes
    error = assert_same_adapter(ground.run_dir(name), plain(form))
    print(f"| {form} | {strategy} ×{num_processes} | {error:.1e} |")


@pytest.mark.matrix
@pytest.mark.timeout(900)
def test_a_compiled_run_that_was_stopped_goes_on_to_the_same_adapter(
    ground: Playground, plain: Callable[[str], Path]
) -> None:
    """In the window, and in the finetune phase, where it goes on uncompiled."""
    name, options = "compiled, stopped", {**RUN, "train.torch_compile": True}
    for step in (3, 5):  # the second process takes steps 4 to 8
        assert ground.codes(name, faults=[{"place": "step", "nth": step, "do": "TERM"}], **options) == [PREEMPTED]
    assert ground.codes(name, **{**options, "train.torch_compile": False}) == [0]
    assert_same_adapter(ground.run_dir(name), plain("fp32"))


def assert_same_adapter(run_dir: Path, expected: Path) -> float:
    """The same ranks at every line and the same ΔW; returns its relative error."""
    assert lines(run_dir, "ranks.jsonl") == lines(expected, "ranks.jsonl")
    error = delta_error(run_dir, expected)
    assert error < TOLERANCE
    return error
