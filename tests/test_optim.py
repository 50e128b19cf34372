"""ProxAdamW is torch's AdamW, then the prox on the gate group, on float32 values."""

import copy
import math

import pytest
import torch
from helpers import tiny_llama
from reference import soft_threshold_reference
from torch import nn

from sora_llm.inject import adapters, cut_adapters, inject_sora
from sora_llm.optim import ProxAdamW, parameter_groups

LR, GATE_LR, LAMBDA, DECAY, EPS = 3e-3, 0.05, 0.4, 0.1, 1e-8


def parameters(dtype=torch.float64, seed=0):
    """A factor (6, 5) and a gate vector (40,) around 0.1, so that some thresholds bite and some do not."""
    generator = torch.Generator().manual_seed(seed)
    factor, gate = torch.randn(6, 5, generator=generator), 0.1 * torch.randn(40, generator=generator)
    return nn.Parameter(factor.to(dtype)), nn.Parameter(gate.to(dtype))


def groups(factor, gate, **gate_options):
    return [
        {"name": "factors", "params": [factor], "lr": LR, "weight_decay": DECAY},
        {"name": "gates", "params": [gate], "lr": GATE_LR, "weight_decay": 0.0, **gate_options},
    ]


def gradients(step, *params):
    generator = torch.Generator().manual_seed(100 + step)
    for p in params:
        p.grad = torch.randn(p.shape, generator=generator).to(p.dtype)


def zeros(tensor):
    return tensor == 0


# ----- AdamW ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_without_lambda_it_is_torchs_adamw_bit_for_bit(dtype):
    ours, theirs = parameters(dtype), parameters(dtype)
    optimizer = ProxAdamW(groups(*ours, sparse_lambda=0.0))
    reference = torch.optim.AdamW(groups(*theirs))
    for step in range(8):
        for both in (ours, theirs):
            gradients(step, *both)
        for each in (optimizer, reference):
            each.param_groups[1]["lr"] = GATE_LR / (1 + step)  # rates change as under a schedule
            each.step()
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    for a, b in zip(ours, theirs, strict=True):
        state, expected = optimizer.state[a], reference.state[b]
        assert state.keys() == expected.keys()
        assert all(torch.equal(state[key], expected[key]) for key in state)
    assert not torch.equal(ours[0], parameters(dtype)[0])


@pytest.mark.parametrize("threshold", ["decoupled", "proxgen", "constant"])
def test_the_step_is_adamw_and_then_the_threshold_on_the_gates_alone(threshold):
    """Against torch's AdamW and the case-by-case prox: the order, the group, and each rule's τ."""
    ours, theirs = parameters(), parameters()
    lam = 0.01 if threshold == "constant" else LAMBDA
    optimizer = ProxAdamW(groups(*ours, sparse_lambda=lam, threshold=threshold))
    reference = torch.optim.AdamW(groups(*theirs))
    for step in range(1, 7):
        for both in (ours, theirs):
            gradients(step, *both)
        optimizer.step()
        reference.step()
        factor, gate = theirs
        root_v = (reference.state[gate]["exp_avg_sq"] / (1 - 0.999**step)).sqrt()
        tau = {"decoupled": GATE_LR * lam, "proxgen": GATE_LR * lam / (root_v + EPS), "constant": lam}[threshold]
        with torch.no_grad():
            gate.copy_(soft_threshold_reference(gate, tau))
        assert torch.equal(ours[0], factor)
        torch.testing.assert_close(ours[1], gate, rtol=1e-12, atol=1e-14)  # float64; √v̂ is rounded in another order
        assert torch.equal(zeros(ours[1]), zeros(gate))
    assert 0 < zeros(ours[1]).sum() < 40


def test_the_three_thresholds_are_three_different_rules():
    ends = []
    for threshold in ("decoupled", "proxgen", "constant"):
        params = parameters()
        optimizer = ProxAdamW(groups(*params, sparse_lambda=LAMBDA, threshold=threshold))
        gradients(0, *params)
        for p in params:
            p.grad *= 0.5  # so that √v̂ is not near 1, where proxgen and decoupled would agree
        optimizer.step()
        ends.append(params[1].detach())
    assert not any(torch.equal(ends[i], ends[j]) for i, j in ((0, 1), (0, 2), (1, 2)))


def test_decoupled_follows_the_learning_rate_of_the_step_and_constant_does_not():
    moved = {}
    for threshold in ("decoupled", "constant"):
        gate = nn.Parameter(torch.ones(1, dtype=torch.float64))
        options = {"lr": 0.1, "weight_decay": 0.0, "threshold": threshold, "sparse_lambda": 0.2}
        optimizer = ProxAdamW([{"params": [gate], **options}])
        gate.grad = torch.zeros(1, dtype=torch.float64)  # Adam stands still: the prox alone moves
        optimizer.step()
        optimizer.param_groups[0]["lr"] = 0.01
        optimizer.step()
        moved[threshold] = 1 - gate.item()
    assert moved["decoupled"] == pytest.approx(0.2 * 0.11, rel=1e-12)
    assert moved["constant"] == pytest.approx(0.4, rel=1e-12)


def test_a_dead_gate_revives_when_its_gradient_insists():
    gate = nn.Parameter(torch.zeros(2, dtype=torch.float64))
    group = {"params": [gate], "lr": 0.1, "weight_decay": 0.0, "sparse_lambda": 0.5}
    optimizer = ProxAdamW([group])
    generator = torch.Generator().manual_seed(0)
    for _ in range(30):
        noise = torch.randn(1, generator=generator, dtype=torch.float64).item()
        gate.grad = torch.tensor([-1.0, 0.01 * noise], dtype=torch.float64)  # signal, and noise alone
        optimizer.step()
    # A steady gradient moves lr a step against a threshold of lr/2.
    assert gate[0].item() == pytest.approx(30 * 0.1 * 0.5, rel=1e-6)


def test_gates_without_a_gradient_are_left_alone():
    factor, gate = parameters()
    optimizer = ProxAdamW(groups(factor, gate, sparse_lambda=LAMBDA))
    before = gate.detach().clone()
    gradients(0, factor)
    optimizer.step()
    assert torch.equal(gate, before)


def test_a_closure_is_run_with_gradients_and_its_loss_returned():
    gate = nn.Parameter(torch.tensor([2.0]))
    optimizer = ProxAdamW([gate], lr=0.1)

    def closure():
        loss = gate.square().sum()
        loss.backward()
        return loss

    assert optimizer.step(closure).item() == 4.0
    assert gate.item() < 2.0


# ----- low precision --------------------------------------------------------------------------------------------------


def test_bf16_parameters_follow_their_float32_masters():
    """bf16 of the float32 run at every step, though each single step and threshold is below bf16's resolution."""
    low = parameters(torch.bfloat16)
    nn.init.ones_(low[1])
    full = [nn.Parameter(p.detach().float()) for p in low]
    optimizer, reference = (
        ProxAdamW([{"params": [factor], "lr": 1e-4}, {"params": [gate], "lr": 1e-4, "sparse_lambda": 0.5}])
        for factor, gate in (low, full)
    )
    for step in range(60):
        gradients(step, *low)
        for p, q in zip(low, full, strict=True):
            q.grad = p.grad.float()
        optimizer.step()
        reference.step()
        assert all(torch.equal(p, q.to(torch.bfloat16)) for p, q in zip(low, full, strict=True))
    assert all(torch.equal(optimizer.state[p]["master"], q) for p, q in zip(low, full, strict=True))
    # one threshold is 5e-5, a hundredth of bf16's spacing below 1 (2⁻⁸): in bf16 nothing would ever have moved
    assert (low[1] < 1).any()


def test_a_parameter_without_a_gradient_does_not_keep_the_others_from_their_masters():
    idle, trained = parameters(torch.bfloat16)
    optimizer = ProxAdamW([idle, trained], lr=1e-5, weight_decay=0.0)
    trained.grad = torch.ones_like(trained)
    optimizer.step()
    assert "master" in optimizer.state[trained] and not optimizer.state.get(idle)


def test_tiny_thresholds_act_on_bf16_gates_without_any_gradient_signal():
    gate = nn.Parameter(torch.ones(4, dtype=torch.bfloat16))
    optimizer = ProxAdamW([{"params": [gate], "lr": 1e-3, "weight_decay": 0.0, "sparse_lambda": 0.5}])
    for _ in range(40):
        gate.grad = torch.zeros_like(gate)
        optimizer.step()
    assert gate.dtype == torch.bfloat16 and optimizer.param_groups[0]["params"][0] is gate
    assert gate.tolist() == pytest.approx([1 - 40 * 5e-4] * 4, abs=2**-8)  # rounded once to bf16


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_state_survives_a_round_trip_through_state_dict(dtype):
    """torch casts a loaded state to the parameter's dtype: a bf16 parameter's float32 master would be lost."""
    factor, gate = parameters(dtype)
    optimizer = ProxAdamW(groups(factor, gate, sparse_lambda=LAMBDA))
    for step in range(3):
        gradients(step, factor, gate)
        optimizer.step()
    twins = [nn.Parameter(p.detach().clone()) for p in (factor, gate)]
    other = ProxAdamW(groups(*twins))
    saved = copy.deepcopy(optimizer.state_dict())
    other.load_state_dict(saved)
    assert other.param_groups[1]["sparse_lambda"] == LAMBDA
    for step in range(3, 6):
        for both in ((factor, gate), twins):
            gradients(step, *both)
        optimizer.step()
        other.step()
        assert torch.equal(factor, twins[0]) and torch.equal(gate, twins[1])


def test_steps_after_a_load_leave_the_loaded_state_of_bf16_parameters_as_it_was():
    """torch itself shares a float32 state with what it was loaded from."""
    params = parameters(torch.bfloat16)
    first, other = ProxAdamW(groups(*params)), ProxAdamW(groups(*parameters(torch.bfloat16)))
    gradients(0, *params)
    first.step()
    saved = copy.deepcopy(first.state_dict())
    before = copy.deepcopy(saved["state"])
    other.load_state_dict(saved)
    gradients(1, *(param for group in other.param_groups for param in group["params"]))
    other.step()
    for index, state in before.items():
        assert all(torch.equal(saved["state"][index][key], state[key]) for key in ("exp_avg", "exp_avg_sq", "master"))


# ----- options --------------------------------------------------------------------------------------------------------


def test_unknown_thresholds_and_negative_lambdas_are_refused():
    with pytest.raises(ValueError, match=r"'soft' is not one of decoupled, proxgen, constant"):
        ProxAdamW(groups(*parameters(), threshold="soft"))
    with pytest.raises(ValueError, match=r"sparse_lambda of the group gates is -0\.1"):
        ProxAdamW(groups(*parameters(), sparse_lambda=-0.1))


def test_parameter_groups_hold_factors_and_gates_apart_and_nothing_else():
    model = inject_sora(tiny_llama(), r=4, target_modules=["q_proj", "down_proj"])
    factors, gates = parameter_groups(model, 2e-4, 1e-2, sparse_lambda=0.3, weight_decay=0.1, threshold="proxgen")
    layers = list(adapters(model).values())
    assert [id(p) for p in factors["params"]] == [id(p) for layer in layers for p in (layer.lora_A, layer.lora_B)]
    assert [id(p) for p in gates["params"]] == [id(layer.gate) for layer in layers]
    assert {k: v for k, v in factors.items() if k != "params"} == {"name": "factors", "lr": 2e-4, "weight_decay": 0.1}
    assert {k: v for k, v in gates.items() if k != "params"} == {
        "name": "gates",
        "lr": 1e-2,
        "weight_decay": 0.0,
        "sparse_lambda": 0.3,
        "threshold": "proxgen",
    }
    optimizer = ProxAdamW([factors, gates])
    trainable = {id(p) for p in model.parameters() if p.requires_grad}
    assert {id(p) for group in optimizer.param_groups for p in group["params"]} == trainable
    assert optimizer.param_groups[0]["sparse_lambda"] == 0


def test_budgets_share_out_the_gates_and_forget_none():
    names = list(adapters(model := inject_sora(tiny_llama(), r=2, lora_alpha=2)))
    for budgets in ({"all": names[1:]}, {"all": [*names, "head"]}, {"all": names, "some": names[:1]}):
        with pytest.raises(ValueError, match="every gated module exactly once"):
            parameter_groups(model, 1.0, 1.0, budgets=budgets)
    groups = parameter_groups(model, 1.0, 1.0, budgets={"a": names[:3], "b": names[3:]})
    assert sum(len(group["params"]) for group in groups[1:]) == len(names)


def test_after_the_cut_there_are_no_gates_and_pruned_modules_have_no_parameters():
    model = inject_sora(tiny_llama(), r=4, target_modules=["q_proj"])
    first, second = adapters(model).items()
    factors = {first[0]: (torch.ones(2, 32), torch.ones(32, 2)), second[0]: (torch.ones(0, 32), torch.ones(32, 0))}
    cut_adapters(model, factors)
    (group,) = parameter_groups(model, 1e-3, 1e-2, sparse_lambda=0.3)
    assert [tuple(p.shape) for p in group["params"]] == [(2, 32), (32, 2)]


def test_a_model_without_adapters_has_no_parameter_groups():
    with pytest.raises(ValueError, match="inject_sora"):
        parameter_groups(tiny_llama(), 1e-3, 1e-2)


def test_gates_at_rest_reach_zero_after_the_promised_number_of_steps():
    """Without signal a gate of 1 is dead once Σ lr·λ has passed 1, and not a step earlier."""
    gate = nn.Parameter(torch.ones(1, dtype=torch.float64))
    optimizer = ProxAdamW([{"params": [gate], "lr": 0.1, "weight_decay": 0.0, "sparse_lambda": 0.3}])
    steps = math.ceil(1 / 0.03)
    for step in range(1, steps + 1):
        gate.grad = torch.zeros_like(gate)
        optimizer.step()
        assert (gate.item() == 0) == (step == steps)


def adaptive_optimizer(importance, dtype=torch.float32):
    gate = nn.Parameter(torch.ones(4, dtype=dtype))
    group = {"name": "gates", "params": [gate], "lr": 1e-2, "sparse_lambda": 0.5, "threshold": "adaptive"}
    optimizer = ProxAdamW([group], weight_decay=0.0)
    if importance is not None:
        state = {"exp_avg": torch.zeros(4), "exp_avg_sq": torch.zeros(4), "importance": importance}
        optimizer.state[gate] = {"step": torch.tensor(0.0), **state}
    return gate, optimizer


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_adaptive_zeroes_what_is_not_above_the_threshold_and_shrinks_nothing_else(dtype):
    gate, optimizer = adaptive_optimizer(torch.tensor([2.0, 1.0, 0.4, 0.0]), dtype)
    gate.grad = torch.tensor([1.0, -1.0, 1.0, 1.0], dtype=dtype)
    optimizer.step()
    assert gate.tolist() == pytest.approx([0.99, 1.01, 0.0, 0.0], abs=4e-3), "a plain AdamW step, then a hard cut"
    gate.grad = torch.tensor([0.0, 0.0, -1.0, -1.0], dtype=dtype)
    optimizer.param_groups[0]["sparse_lambda"] = 1e-30
    optimizer.step()
    assert gate[2] > 0 and gate[3] == 0, "a slot may come back; one without a component may not"


def test_adaptive_needs_gates_that_were_weighed():
    gate, optimizer = adaptive_optimizer(None)
    gate.grad = torch.ones(4)
    with pytest.raises(ValueError, match="need an importance"):
        optimizer.step()
    optimizer.param_groups[0]["sparse_lambda"] = 0.0
    optimizer.step()
    assert torch.count_nonzero(gate) == 4


# ----- in loops of other people ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("write", ["load_state_dict", "by hand", "through .data"])
def test_what_is_written_to_a_bf16_parameter_is_where_the_next_step_begins(write):
    model = nn.ParameterList([parameters(torch.bfloat16)[1]])
    optimizer = ProxAdamW(model.parameters(), lr=0.1, weight_decay=0.0)
    gradients(0, *model)
    optimizer.step()
    kept = optimizer.state[model[0]]["master"].clone()
    optimizer.param_groups[0]["lr"] = 0.0
    optimizer.step()
    assert torch.equal(optimizer.state[model[0]]["master"], kept), "what nobody wrote to keeps what bf16 cannot hold"

    written = torch.linspace(-1, 1, 40).to(torch.bfloat16)
    if write == "load_state_dict":
        model.load_state_dict({"0": written})
    elif write == "by hand":
        with torch.no_grad():
            model[0].copy_(written)
    else:
        model[0].data.copy_(written)
    optimizer.step()
    assert torch.equal(model[0], written)


def test_a_state_that_is_loaded_keeps_masters_that_are_finer_than_the_parameter():
    first, again = (nn.ParameterList([parameters(torch.bfloat16)[1]]) for _ in range(2))
    optimizers = [ProxAdamW(params, lr=1e-3, weight_decay=0.0) for params in (first, again)]
    gradients(0, *first)
    optimizers[0].step()
    optimizers[1].load_state_dict(copy.deepcopy(optimizers[0].state_dict()))
    again.load_state_dict(first.state_dict())
    for params, optimizer in zip((first, again), optimizers, strict=True):
        gradients(1, *params)
        optimizer.step()
    masters = [
        optimizer.state[params[0]]["master"] for params, optimizer in zip((first, again), optimizers, strict=True)
    ]
    assert torch.equal(*masters) and not torch.equal(masters[0], masters[0].bfloat16().float())


def test_a_parameter_that_became_float32_has_no_master():
    params = nn.ParameterList([parameters(torch.bfloat16)[1]])
    optimizer = ProxAdamW(params, lr=0.1, weight_decay=0.0)
    for dtype in (torch.bfloat16, torch.float32, torch.bfloat16):
        params.to(dtype)
        before = params[0].detach().clone().float()
        gradients(0, *params)
        optimizer.step()
        moved = params[0].detach().float() - before
        assert 0.05 < float(moved.abs().max()) < 0.2, f"a step of {dtype} goes out from where the parameter is"
        assert ("master" in optimizer.state[params[0]]) is (dtype == torch.bfloat16)


def test_gates_on_two_devices_are_cut_where_they_are():
    here, there = parameters()[1], nn.Parameter(torch.empty(3, device="meta"))
    here.grad, there.grad = torch.zeros_like(here), torch.empty_like(there)
    optimizer = ProxAdamW([{"params": [here, there], "sparse_lambda": LAMBDA}], lr=GATE_LR, weight_decay=0.0)
    expected = soft_threshold_reference(here.detach(), GATE_LR * LAMBDA)
    optimizer.step()
    torch.testing.assert_close(here.detach(), expected)


def test_a_step_that_a_gradient_scaler_skips_cuts_nothing():
    """A fused optimizer is called for such a step too, and told to skip it."""
    gate = parameters(torch.float32)[1]
    optimizer = ProxAdamW([{"params": [gate], "sparse_lambda": LAMBDA}], lr=GATE_LR, weight_decay=0.0, fused=True)
    scaler, before = torch.amp.GradScaler("cpu", init_scale=2.0), gate.detach().clone()
    for value in (math.inf, 0.0):
        scaler.scale(torch.ones(()))  # makes its state
        gate.grad = torch.full_like(gate, value)
        scaler.step(optimizer)
        scaler.update()
        is_cut = not torch.equal(gate.detach(), before)
        assert is_cut == (value == 0.0)


def test_adapters_that_somebody_froze_are_refused():
    """prepare_model_for_kbit_training freezes whatever it is given; nothing was trained, and nobody said so."""
    model = inject_sora(tiny_llama(), r=2).requires_grad_(False)
    with pytest.raises(ValueError, match=r"the adapters are frozen.*before inject_sora"):
        parameter_groups(model, 1e-3, 1e-3)
    next(iter(adapters(model).values())).gate.requires_grad_()
    parameter_groups(model, 1e-3, 1e-3)  # a gate alone can be trained


def test_hooks_of_a_step_run_once_and_see_the_step_whole():
    torch.optim.AdamW([nn.Parameter(torch.zeros(1))])  # torch puts its hooks around the class of whoever is made
    gate = parameters()[1]
    optimizer = ProxAdamW([{"params": [gate], "sparse_lambda": 1.0, "threshold": "constant"}], weight_decay=0.0)
    gate.grad, seen = torch.zeros_like(gate), []
    optimizer.register_step_post_hook(lambda *_: seen.append(int(torch.count_nonzero(gate))))
    optimizer.step()
    assert seen == [0]


def test_groups_that_come_later_or_from_another_adamw_have_the_defaults():
    factor, gate = parameters()
    optimizer = ProxAdamW([factor], lr=LR)
    optimizer.add_param_group({"params": [gate], "lr": GATE_LR, "sparse_lambda": LAMBDA})
    assert optimizer.param_groups[1]["threshold"] == "decoupled"
    with pytest.raises(ValueError, match="not one of"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(1))], "threshold": "soft"})

    assert len(optimizer.param_groups) == 2, "the one that could not be is not there"


def test_the_state_of_another_adamw_leaves_what_it_does_not_know():
    factor, gate = parameters()
    plain = torch.optim.AdamW([{"params": [factor]}, {"params": [gate]}], lr=0.5)
    optimizer = ProxAdamW(groups(factor, gate, sparse_lambda=LAMBDA, threshold="constant"))
    optimizer.load_state_dict(plain.state_dict())
    own = optimizer.param_groups[1]
    assert (own["lr"], own["sparse_lambda"], own["threshold"], own["name"]) == (0.5, LAMBDA, "constant", "gates")
    gradients(0, factor, gate)
    optimizer.step()


def test_a_step_that_is_refused_changes_nothing():
    """Also where a master stands in for the parameter during the step: the next one goes on from there."""
    gate = parameters(torch.bfloat16)[1]
    optimizer = ProxAdamW([{"params": [gate], "sparse_lambda": LAMBDA}], lr=GATE_LR)
    gradients(0, gate)
    before = gate.detach().clone()
    optimizer.param_groups[0]["threshold"] = "hard"
    with pytest.raises(ValueError, match="hard"):
        optimizer.step()
    assert torch.equal(gate, before) and optimizer.param_groups[0]["params"][0] is gate
    optimizer.param_groups[0]["threshold"] = "decoupled"
    optimizer.step()
    assert not torch.equal(gate, before)


def test_a_step_that_fails_leaves_the_parameter_in_its_group(monkeypatch):
    """A loop may catch that there was no memory and go on; masters that stayed in the group would be trained alone."""
    gate = parameters(torch.bfloat16)[1]
    optimizer = ProxAdamW([{"params": [gate], "sparse_lambda": LAMBDA}], lr=GATE_LR)
    gradients(0, gate)
    before = gate.detach().clone()
    with monkeypatch.context() as patch:
        patch.setattr("sora_llm.optim._step_of_adamw", lambda: lambda _: (_ for _ in ()).throw(MemoryError()))
        with pytest.raises(MemoryError):
            optimizer.step()
    assert optimizer.param_groups[0]["params"][0] is gate and torch.equal(gate, before)
    optimizer.step()
    assert not torch.equal(gate, before)


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        ({"threshold": "hard"}, "hard"),
        ({"sparse_lambda": -1.0}, "sparse_lambda is -1.0; it must be a number >= 0"),
        ({"sparse_lambda": math.nan}, "sparse_lambda is nan; it must be a number >= 0"),
        ({"name": "gates", "lr": -1e-3}, "lr of the group gates is -0.001; it must be a number >= 0"),
        ({"name": "gates", "lr": math.inf}, "lr of the group gates is inf; it must be a number >= 0"),
        ({"lr": "auto"}, "lr is 'auto'; it must be a number >= 0"),
        ({"lr": None}, "lr is None; it must be a number >= 0"),
        ({"lr": True}, "lr is True; it must be a number >= 0"),
        ({"lr": torch.tensor(-1.0)}, "it must be a number >= 0"),
    ],
)
def test_a_group_that_was_edited_into_what_cannot_be_is_an_error(edit, said):
    gate = parameters()[1]
    optimizer = ProxAdamW([{"params": [gate], "sparse_lambda": LAMBDA}])
    optimizer.param_groups[0].update(edit)
    gradients(0, gate)
    with pytest.raises(ValueError, match=said):
        optimizer.step()


def test_proxgen_prunes_no_gate_that_never_had_a_gradient():
    """While B is 0 gates have none: over eps alone the threshold of every λ was far above 1, and all of them died."""
    gate = torch.nn.Parameter(torch.ones(3, dtype=torch.float64))
    optimizer = ProxAdamW([{"params": [gate], "sparse_lambda": 1e-6, "threshold": "proxgen"}], lr=0.3, weight_decay=0.0)
    gate.grad = torch.tensor([0.0, 0.0, 1.0], dtype=torch.float64)
    optimizer.step()
    assert gate[:2].tolist() == [1.0, 1.0] and 0 < gate[2] < 1


def test_proxgen_uses_the_denominator_of_the_step_under_amsgrad():
    gate = parameters()[1]
    optimizer = ProxAdamW(
        [{"params": [gate], "sparse_lambda": 1e-3, "threshold": "proxgen"}], lr=GATE_LR, weight_decay=0.0, amsgrad=True
    )
    reference = torch.optim.AdamW([theirs := parameters()[1]], lr=GATE_LR, weight_decay=0.0, amsgrad=True)
    for size in (1.0, 1e-3):  # the second gradient leaves the maximum where it was
        for param in (gate, theirs):
            gradients(0, param)
            param.grad *= size
        optimizer.step()
        reference.step()
        largest = reference.state[theirs]["max_exp_avg_sq"] / (1 - 0.999 ** float(reference.state[theirs]["step"]))
        expected = soft_threshold_reference(theirs.detach(), GATE_LR * 1e-3 / (largest.sqrt() + EPS))
        torch.testing.assert_close(gate.detach(), expected, rtol=1e-12, atol=1e-15)
        theirs.data.copy_(gate.detach())


def test_an_adapter_without_any_rank_is_not_one_that_was_never_there():
    model = inject_sora(tiny_llama(), r=2)
    cut_adapters(
        model, {n: (torch.zeros(0, m.in_features), torch.zeros(m.out_features, 0)) for n, m in adapters(model).items()}
    )
    with pytest.raises(ValueError, match="every rank of the adapters was cut"):
        parameter_groups(model, LR, GATE_LR)
    with pytest.raises(ValueError, match="call inject_sora"):
        parameter_groups(tiny_llama(), LR, GATE_LR)


def test_an_adaptive_threshold_is_never_deferred():
    """Its τ is a quantile over all gates; summed like the others' it would be another rule."""
    gate = torch.nn.Parameter(torch.ones(4))
    gate.grad = torch.ones(4)
    optimizer = ProxAdamW([{"params": [gate], "threshold": "adaptive", "deferred": True}], lr=GATE_LR, weight_decay=0.0)
    optimizer.step()  # λ = 0, as the trainer has it
    optimizer.param_groups[0]["sparse_lambda"] = 0.5
    before = gate.detach().clone()
    with pytest.raises(ValueError, match="cannot be deferred"):
        optimizer.step()
    assert torch.equal(gate, before)
    group = {"params": [gate], "threshold": "adaptive", "deferred": True, "sparse_lambda": 0.5}
    with pytest.raises(ValueError, match="cannot be deferred"):
        ProxAdamW([group], lr=GATE_LR)
