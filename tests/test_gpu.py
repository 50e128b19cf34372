"""On a CUDA device: the layer is the equation there too, runs finish, and device and strategy change no result.

pytest -m gpu                       (last results: benchmarks/gpu.md)
"""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import linear4bit, randomise, relative_error, tiny_llama
from runs import CONFIG, PLAIN, PRUNED, Finished, assert_same_end, gsm8k_overrides, start
from small_runs import delta_weights, interrupt
from torch import nn
from torch.utils.checkpoint import checkpoint

from sora_llm.hashes import fingerprints
from sora_llm.inject import inject_sora
from sora_llm.sora import SoraLinear

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
NUM_IN, NUM_OUT, R, TOKENS = 256, 384, 16, 128
# Of a whole tensor, against float64 arithmetic on the same bits.
ROUNDING = {torch.float32: 1e-5, torch.bfloat16: 2e-2}
HIDDEN = {"CUDA_VISIBLE_DEVICES": ""}
"""A process that sees no GPU."""


# ----- the layer ------------------------------------------------------------------------------------------------------


def base_of(kind: str, dtype: torch.dtype) -> nn.Linear:
    torch.manual_seed(0)
    linear = nn.Linear(NUM_IN, NUM_OUT, bias=False).to("cuda", dtype)
    if kind == "plain":
        return linear
    return linear4bit(linear.weight.detach(), dtype, "cuda")


def layer_of(base: nn.Linear, dropout: float = 0.0) -> SoraLinear:
    return randomise(SoraLinear(base, R, lora_alpha=2 * R, lora_dropout=dropout), seed=1, size=0.1)


def gradients(output: torch.Tensor, leaves: list[Any]) -> list[torch.Tensor]:
    dy = torch.randn(output.shape, generator=torch.Generator().manual_seed(9)).to(output)
    return list(torch.autograd.grad(output, leaves, dy))


@pytest.mark.parametrize("kind", ["plain", "nf4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_output_and_gradients_equal_the_equation(kind: str, dtype: torch.dtype) -> None:
    base = base_of(kind, dtype)
    layer = layer_of(base)
    A, B, g = layer.lora_A, layer.lora_B, layer.gate
    x = torch.randn(2, TOKENS, NUM_IN, generator=torch.Generator().manual_seed(2)).to("cuda", dtype).requires_grad_()
    found = layer(x)
    expected = base(x).double() + 2 * (x.double() @ A.double().T * g.double()) @ B.double().T
    assert found.dtype == dtype and relative_error(found, expected) < ROUNDING[dtype]
    leaves = [x, A, B, g]
    for own, true in zip(gradients(found, leaves), gradients(expected, leaves), strict=True):
        assert relative_error(own, true) < ROUNDING[dtype]


def test_the_dropout_mask_is_the_same_when_it_is_recomputed() -> None:
    layers = nn.ModuleList([layer_of(nn.Linear(NUM_IN, NUM_IN, device="cuda"), dropout=0.5) for _ in range(2)])

    def run(call: Any) -> list[torch.Tensor]:
        layers.zero_grad()
        torch.manual_seed(3)
        x = torch.randn(TOKENS, NUM_IN, device="cuda", requires_grad=True)
        h = x
        for layer in layers:
            h = torch.tanh(call(layer, h))
        h.sum().backward()
        return [x.grad, *(p.grad for p in layers.parameters() if p.grad is not None)]  # type: ignore[list-item]

    direct = run(lambda layer, h: layer(h))
    recomputed = run(functools.partial(checkpoint, use_reentrant=False))
    assert len(direct) == 7 and all(gradient.abs().sum() > 0 for gradient in direct)
    assert all(torch.equal(one, other) for one, other in zip(direct, recomputed, strict=True))


def test_dropout_zeroes_its_share() -> None:
    layer = layer_of(nn.Linear(NUM_IN, NUM_IN, bias=False, device="cuda"), dropout=0.3)
    with torch.no_grad():
        layer.cut(torch.eye(NUM_IN), torch.eye(NUM_IN))
        layer.base_layer.weight.zero_()
        dropped = layer(torch.ones(500, NUM_IN, device="cuda"))
    zeroed = dropped == 0
    # 128 000 draws: the standard deviation of the share is 0.0013
    assert abs(zeroed.float().mean() - 0.3) < 0.01
    torch.testing.assert_close(dropped[~zeroed], torch.full_like(dropped[~zeroed], 2 / 0.7))


def test_an_adapter_starts_the_same_on_a_gpu_and_on_a_cpu_and_so_do_its_fingerprints() -> None:
    models = [tiny_llama(), tiny_llama().to("cuda")]
    found = []
    for model in models:
        torch.manual_seed(5)
        inject_sora(model, 8, 16)
        found.append(fingerprints({name: p for name, p in model.named_parameters() if p.requires_grad}))
    assert found[0] == found[1] and len(found[0]) == 42


# ----- runs -----------------------------------------------------------------------------------------------------------


def train(directory: Path, environ: dict[str, str] | None = None, **values: Any) -> Finished:
    options = {**PRUNED, **values}
    found = start(PLAIN, [CONFIG, *gsm8k_overrides(directory, **options)], directory, **(environ or {}))
    assert found.returncode == 0, found.output
    return found


FLOAT32 = {
    "model.dtype": "float32",
    "quantization.load_in_4bit": False,
    "sora.lora_dropout": 0.0,  # a GPU draws other masks than a CPU
    "train.max_steps": 20,
}
SAVED = {"output.save_steps": 6, "output.save_total_limit": None}


@pytest.fixture(scope="module")
def float32_run(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    return train(tmp_path_factory.mktemp("gpu") / "none", **FLOAT32, **SAVED)


@pytest.fixture(scope="module")
def nf4_run(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    return train(tmp_path_factory.mktemp("gpu") / "nf4")


def test_a_4bit_run_learns_is_cut_and_exports_what_peft_reloads(nf4_run: Finished) -> None:
    found = nf4_run
    first, *_, last = found.lines("metrics.jsonl")
    assert last["eval_loss"] < first["eval_loss"] - 0.5
    assert last["mean_rank"] <= 2 and found.json("adapter/certificate.json")["passed"]
    assert found.json("env.json")["hardware"].get("gpus"), "the run saw no GPU"
    assert last["eval_loss_exported"] == pytest.approx(last["eval_loss"], rel=1e-3)
    arguments = [CONFIG, *gsm8k_overrides(found.directory), "--adapter", str(found.directory / "adapter"), "--json"]
    for environ in ({}, HIDDEN):
        evaluated = start((PLAIN[0], "-m", "sora_llm", "evaluate"), arguments, found.directory, **environ)
        assert evaluated.returncode == 0, evaluated.output
        # other kernels, and bf16 rounds at 2⁻⁹
        assert json.loads(evaluated.stdout)["adapter"]["loss"] == pytest.approx(last["eval_loss"], rel=2e-3)


def test_a_compiled_run_ends_with_the_ranks_and_the_loss_of_one_that_is_not(
    float32_run: Finished, tmp_path: Path
) -> None:
    assert_same_end(train(tmp_path / "compiled", **FLOAT32, **{"train.torch_compile": True}), float32_run)


def test_a_gpu_and_a_cpu_train_the_same_adapter(float32_run: Finished, tmp_path: Path) -> None:
    assert_same_end(float32_run, train(tmp_path / "cpu", HIDDEN, **FLOAT32))


@pytest.mark.parametrize("strategy", ["ddp", "zero1", "zero2", "zero3"])
def test_every_strategy_trains_the_same_adapter_under_nccl(
    float32_run: Finished, tmp_path: Path, strategy: str
) -> None:
    found = train(tmp_path / strategy, **FLOAT32, **{"distributed.strategy": strategy})
    assert found.json("env.json")["strategy"] == strategy
    expected, own = delta_weights(float32_run.directory), delta_weights(found.directory)
    assert expected.keys() == own.keys()
    for name, delta in expected.items():
        if delta.numel():
            assert relative_error(own[name], delta) < 1e-3, name
    assert found.lines("ranks.jsonl")[-1]["ranks"] == float32_run.lines("ranks.jsonl")[-1]["ranks"]


def test_a_resumed_run_ends_as_the_uninterrupted_one(float32_run: Finished, tmp_path: Path) -> None:
    directory = interrupt(float32_run.directory, tmp_path / "resumed", 6)
    resumed = train(directory, **FLOAT32, **SAVED)
    expected, own = delta_weights(float32_run.directory), delta_weights(resumed.directory)
    assert all(relative_error(own[name], delta) < 1e-4 for name, delta in expected.items() if delta.numel())
    assert f"step 6 of {FLOAT32['train.max_steps']}" in resumed.output


def test_the_finished_run_answers(nf4_run: Finished) -> None:
    arguments = [str(nf4_run.directory), "--prompt", "How many?", "--max-new-tokens", "8", "--compare", "--json"]
    found = start((PLAIN[0], "-m", "sora_llm", "generate"), arguments, nf4_run.directory)
    assert found.returncode == 0, found.output
    (answer,) = json.loads(found.stdout)["answers"]
    assert answer["base"] and answer["adapted"] and answer["base"] != answer["adapted"]
