"""The reference itself is right: finite differences, torch's AdamW, the prox as an argmin, transformers' schedules."""

import pytest
import torch
from reference import (
    delta_weight,
    fold_slots,
    gate_lr_auto_reference,
    loss_and_gradients,
    lr_factor_reference,
    reference_run,
    soft_threshold_reference,
    use_float64_norms,
)
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, get_scheduler

MODULES = ("model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj", "lm_head")
R = 4
LORA_ALPHA = 6.0  # s = 1.5: a forgotten s shows


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=37,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=32,
        initializer_range=0.3,  # logits far from uniform, so that gradients are of order 1
        tie_word_embeddings=True,  # lm_head is a target: the embedding must keep its own weight
    )
    return use_float64_norms(LlamaForCausalLM(config).double().eval().requires_grad_(False))


def make_factors(model, seed=1):
    generator = torch.Generator().manual_seed(seed)
    factors = {}
    for name in MODULES:
        num_out, num_in = model.get_submodule(name).weight.shape
        A, B, g = (
            torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in ((R, num_in), (num_out, R), (R,))
        )
        factors[name] = (0.3 * A, 0.3 * B, 1 + 0.3 * g)
    return factors


def make_batches(num_steps, seed=2):
    """Two micro-batches per step with different numbers of supervised tokens, so that a mean of means is wrong."""
    generator = torch.Generator().manual_seed(seed)
    batches = []
    for _ in range(num_steps):
        step = []
        for num_rows, num_tokens, prompt in ((2, 7, 3), (1, 11, 0)):
            ids = torch.randint(0, 37, (num_rows, num_tokens), generator=generator)
            labels = ids.clone()
            labels[:, :prompt] = -100
            labels[0, -2:] = -100  # right padding
            step.append((ids, labels))
        batches.append(step)
    return batches


def run(model, factors, batches, **changes):
    num_steps = len(batches)
    arguments = {
        "r": R,
        "lora_alpha": LORA_ALPHA,
        "learning_rates": [0.01] * num_steps,
        "gate_learning_rates": [0.05] * num_steps,
        "lambdas": [0.0] * num_steps,
        "threshold": "decoupled",
        "weight_decay": 0.0,
        "max_grad_norm": None,
    }
    return reference_run(model, MODULES, factors, batches, **(arguments | changes))


@pytest.mark.parametrize("name", MODULES)
@pytest.mark.parametrize(("which", "index"), [(0, (1, 3)), (1, (5, 2)), (2, (0,))], ids=["A", "B", "g"])
def test_gradients_equal_finite_differences(model, name, which, index):
    factors, (batch,) = make_factors(model), make_batches(1)
    _, gradients = loss_and_gradients(model, factors, LORA_ALPHA / R, batch)
    h = 1e-4
    losses = []
    for sign in (1, -1):
        moved = {key: tuple(t.clone() for t in triple) for key, triple in factors.items()}
        moved[name][which][index] += sign * h
        losses.append(loss_and_gradients(model, moved, LORA_ALPHA / R, batch)[0])
    measured = (losses[0] - losses[1]) / (2 * h)
    expected = gradients[name][which][index].item()
    assert abs(expected) > 1e-4  # an entry without gradient would test nothing
    # Central differences: truncation ~ h² = 1e-8 times the third derivative, rounding ~ 1e-16 / h = 1e-12.
    assert measured == pytest.approx(expected, rel=1e-5, abs=1e-7)


class Branch(nn.Module):
    """The adapter as a branch beside the frozen layer, the structure that the reference avoids."""

    def __init__(self, base, A, B, g):
        super().__init__()
        self.base, self.A, self.B, self.g = base, nn.Parameter(A), nn.Parameter(B), nn.Parameter(g)

    def forward(self, x):
        return self.base(x) + (LORA_ALPHA / R) * nn.functional.linear(self.g * nn.functional.linear(x, self.A), self.B)


@pytest.mark.parametrize("max_grad_norm", [0.5, 1e6])
def test_without_lambda_equals_torch_adamw_on_adapter_branches(model, max_grad_norm):
    factors, batches = make_factors(model), make_batches(5)
    learning_rates = [0.02, 0.03, 0.01, 0.02, 0.005]
    gate_learning_rates = [0.1, 0.05, 0.2, 0.1, 0.15]
    result = run(
        model,
        factors,
        batches,
        learning_rates=learning_rates,
        gate_learning_rates=gate_learning_rates,
        weight_decay=0.1,
        max_grad_norm=max_grad_norm,
    )

    branches = {name: Branch(model.get_submodule(name), *(t.clone() for t in factors[name])) for name in MODULES}
    matrices = [p for b in branches.values() for p in (b.A, b.B)]
    gates = [b.g for b in branches.values()]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.1}, {"params": gates, "weight_decay": 0.0}], lr=1.0
    )
    losses, norms = [], []
    originals = {name: model.get_submodule(name) for name in MODULES}
    try:
        for name, branch in branches.items():
            model.set_submodule(name, branch)
        for step, lr, lr_gate in zip(batches, learning_rates, gate_learning_rates, strict=True):
            optimizer.param_groups[0]["lr"], optimizer.param_groups[1]["lr"] = lr, lr_gate
            optimizer.zero_grad()
            logits = [model(input_ids=ids, use_cache=False).logits[:, :-1].flatten(0, 1) for ids, _ in step]
            labels = [labels[:, 1:].flatten() for _, labels in step]
            loss = nn.functional.cross_entropy(torch.cat(logits), torch.cat(labels), ignore_index=-100)
            loss.backward()
            losses.append(loss.item())
            norms.append(nn.utils.clip_grad_norm_([*matrices, *gates], max_grad_norm).item())
            optimizer.step()
    finally:
        for name, original in originals.items():
            model.set_submodule(name, original)

    assert min(norms) > 0.5  # so 0.5 clips at every step
    # float64 rounding (1e-16) through two layers and five steps; Adam divides by √v̂, which amplifies it somewhat.
    assert result.losses == pytest.approx(losses, rel=1e-11)
    assert result.grad_norms == pytest.approx(norms, rel=1e-10)
    for name, branch in branches.items():
        for ours, theirs in zip(result.factors[name], (branch.A, branch.B, branch.g), strict=True):
            torch.testing.assert_close(ours, theirs.detach(), rtol=1e-9, atol=1e-10)
        torch.testing.assert_close(result.delta_weights[name], delta_weight(result.factors[name], LORA_ALPHA / R))


def test_soft_threshold_is_the_argmin_on_a_grid():
    z = torch.tensor([-2.0, -0.7, -0.3, -0.1, 0.0, 0.2, 0.3, 0.31, 1.5], dtype=torch.float64)
    tau = 0.3
    grid = torch.linspace(-3, 3, 60001, dtype=torch.float64)  # spacing 1e-4
    objective = 0.5 * (grid[None] - z[:, None]) ** 2 + tau * grid[None].abs()
    ours = soft_threshold_reference(z, tau)
    torch.testing.assert_close(ours, grid[objective.argmin(dim=1)], rtol=0, atol=1e-4)
    assert (ours == 0).tolist() == [False, False, True, True, True, True, True, False, False]
    assert torch.equal(soft_threshold_reference(z, 0.0), z)


@pytest.mark.parametrize(
    ("threshold", "after_each_step"),
    [
        ("decoupled", [0.75, 0.5, 0.25, 0.0, 0.0]),  # τ = 0.5 · 0.5
        ("constant", [0.5, 0.0, 0.0, 0.0, 0.0]),  # τ = 0.5
        ("proxgen", [0.0, 0.0, 0.0, 0.0, 0.0]),  # √v̂ = 0: τ = 0.25 / ε
    ],
)
def test_prox_kills_a_gate_without_signal(model, threshold, after_each_step):
    factors = make_factors(model)
    A, B, g = factors[MODULES[0]]
    A[1], B[:, 1], g[1] = 0.0, 0.0, 1.0  # slot 1 has no gradient in A, B or g
    for num_steps, expected in enumerate(after_each_step, start=1):
        result = run(
            model,
            factors,
            make_batches(num_steps),
            threshold=threshold,
            lambdas=[0.5] * num_steps,
            gate_learning_rates=[0.5] * num_steps,
        )
        assert result.factors[MODULES[0]][2][1].item() == expected


def test_zero_lambda_has_no_prox(model):
    factors = make_factors(model)
    factors[MODULES[0]][2][1] = 0.2
    results = [run(model, factors, make_batches(3), threshold=name) for name in ("decoupled", "proxgen", "constant")]
    for name in MODULES:
        gates = [result.factors[name][2] for result in results]
        assert torch.equal(gates[0], gates[1]) and torch.equal(gates[0], gates[2])
        assert bool((gates[0] != 0).all())


def test_proxgen_divides_by_the_gradient_scale(model):
    """After one step √v̂ = |gradient|, so a live gate moves by lr·λ/|gradient| more than without prox."""
    factors, batches = make_factors(model), make_batches(1)
    _, gradients = loss_and_gradients(model, factors, LORA_ALPHA / R, batches[0])
    plain = run(model, factors, batches, gate_learning_rates=[0.01])
    proxed = run(model, factors, batches, gate_learning_rates=[0.01], lambdas=[1e-3], threshold="proxgen")
    for name in MODULES:
        before, after = plain.factors[name][2], proxed.factors[name][2]
        tau = 0.01 * 1e-3 / gradients[name][2].abs()
        live = before.abs() > tau
        assert bool(live.any())
        # ε = 1e-8 beside gradients of at least 1e-4 changes τ by 1e-4 relative at most.
        torch.testing.assert_close((before - after).abs()[live], tau[live], rtol=1e-3, atol=1e-12)
        assert bool((after[~live] == 0).all())


def test_fold_slots_keeps_the_product_of_live_slots():
    torch.manual_seed(3)
    A, B = torch.randn(4, 5, dtype=torch.float64), torch.randn(6, 4, dtype=torch.float64)
    g = torch.tensor([0.5, 0.0, -2.0, -0.0], dtype=torch.float64)
    A_cut, B_cut = fold_slots(A, B, g)
    assert A_cut.shape == (2, 5) and B_cut.shape == (6, 2)
    torch.testing.assert_close(B_cut @ A_cut, delta_weight((A, B, g), 1.0))
    torch.testing.assert_close(A_cut[1], 2.0**0.5 * A[2])  # A takes √|g|, the sign goes to B
    A_none, B_none = fold_slots(A, B, torch.zeros_like(g))
    assert A_none.shape == (0, 5) and B_none.shape == (6, 0)


@pytest.mark.parametrize("kind", ["linear", "cosine", "constant", "constant_with_warmup"])
@pytest.mark.parametrize(("total", "warmup"), [(10, 0), (10, 3), (1, 0), (4, 4), (3, 5)])
def test_lr_factor_equals_transformers_get_scheduler(kind, total, warmup):
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = get_scheduler(kind, optimizer, num_warmup_steps=warmup, num_training_steps=total)
    for step in range(total + 1):
        expected = scheduler.get_last_lr()[0]
        # One cosine written in another order: a few units in the last place.
        assert lr_factor_reference(step, total, warmup, kind) == pytest.approx(expected, rel=1e-13, abs=1e-15)
        optimizer.step()
        scheduler.step()


def test_gate_lr_auto_known_answers():
    assert gate_lr_auto_reference(1e-3, [1.0] * 40) == pytest.approx(0.1)
    assert gate_lr_auto_reference(1e-3, [1.0] * 8) == 0.25  # the cap binds: Σ f < 16
    assert gate_lr_auto_reference(0.2, [1.0] * 40) == 0.2  # never below the adapters' rate
    assert gate_lr_auto_reference(0.5, [1.0] * 40) == 0.25
    assert gate_lr_auto_reference(1e-3, [0.0, 0.0]) == 0.25
    assert gate_lr_auto_reference(1e-3, []) == 0.25
