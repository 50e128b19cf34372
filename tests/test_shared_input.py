"""Layers that read one x read it together, and compute what each would by itself."""

from __future__ import annotations

import copy
import io
import weakref
from collections.abc import Iterator

import pytest
import torch
from helpers import linear4bit, randomise, relative_error, tiny_llama
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from sora_llm import sora
from sora_llm.inject import adapters, inject_sora
from sora_llm.sora import SharedInput, SoraLinear, _dropout_mask
from sora_llm.targets import target_linears

IN, OUTS, RANKS = 7, (5, 3, 4), (3, 2, 4)
IDS = torch.arange(20).reshape(2, 10)


@pytest.fixture
def qkv() -> tuple[SoraLinear, ...]:
    layers = tuple(
        randomise(SoraLinear(nn.Linear(IN, out).double(), r, lora_alpha=1.5 * r, dtype=torch.float64), seed)
        for seed, (out, r) in enumerate(zip(OUTS, RANKS, strict=True))
    )
    acquaint(layers)
    return layers


def acquaint(layers: tuple[SoraLinear, ...]) -> None:
    shared_input = SharedInput(layers)
    for layer in layers:
        layer.shared_input = shared_input


def input_of(seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, 6, IN, generator=generator, dtype=torch.float64).requires_grad_()


def truth(layer: SoraLinear, x: Tensor, seed: int | None = None) -> Tensor:
    """The equation, left to autograd; with dropout under the mask of `seed`."""
    if layer.lora_A is None or layer.lora_B is None:
        return layer.base_layer(x)
    kept = x
    if seed is not None:
        mask = _dropout_mask(x.detach().reshape(-1, x.shape[-1]), layer.lora_dropout, seed).view_as(x)
        kept = x * mask / (1 - layer.lora_dropout)
    u = nn.functional.linear(kept, layer.lora_A)
    h = u if layer.gate is None else u * layer.gate
    return layer.base_layer(x) + layer.scaling * nn.functional.linear(h, layer.lora_B)


def ask(layer: SoraLinear, x: Tensor) -> Tensor:
    return layer(x)


def trained(layers: tuple[SoraLinear, ...]) -> list[Tensor]:
    return [p for layer in layers for p in layer.parameters() if p.requires_grad]


def same(found: Iterator[Tensor] | list[Tensor], expected: list[Tensor]) -> None:
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs)


def loss_of(outputs: list[Tensor]) -> Tensor:
    return sum(((index + 1) * y.square().sum() for index, y in enumerate(outputs)), torch.tensor(0.0))


def downs(output: Tensor) -> int:
    """How many nodes of the graph compute u = A x."""
    seen, waiting = set(), [output.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is not None and node not in seen:
            seen.add(node)
            waiting += [following for following, _ in node.next_functions]
    return sum(type(node).__name__ == "_DownBackward" for node in seen)


@pytest.mark.parametrize("form", ["gated", "cut", "one pruned away"])
def test_outputs_and_gradients_are_those_of_the_equation(qkv: tuple[SoraLinear, ...], form: str) -> None:
    if form == "cut":
        for layer in qkv:
            layer.cut(layer.lora_A[:2], layer.lora_B[:, :2])
    if form == "one pruned away":
        qkv[1].cut(torch.empty(0, IN), torch.empty(OUTS[1], 0))
    x = input_of()
    leaves = [x, *trained(qkv)]
    found, expected = [layer(x) for layer in qkv], [truth(layer, x) for layer in qkv]
    same(found, expected)
    assert downs(loss_of(found)) == 1
    same(torch.autograd.grad(loss_of(found), leaves), list(torch.autograd.grad(loss_of(expected), leaves)))


def test_what_meets_no_loss_gets_no_gradient_and_changes_no_other(qkv: tuple[SoraLinear, ...]) -> None:
    x = input_of()
    q, _, v = (layer(x) for layer in qkv)
    loss_of([q, v]).backward()
    expected = torch.autograd.grad(loss_of([truth(qkv[0], x), truth(qkv[2], x)]), [x, *trained((qkv[0], qkv[2]))])
    same([x.grad, *(p.grad for p in trained((qkv[0], qkv[2])))], list(expected))
    assert qkv[1].lora_A.grad is None and qkv[1].lora_B.grad is None


def test_layers_that_are_called_in_another_way_than_neighbours_are_right_too(qkv: tuple[SoraLinear, ...]) -> None:
    q, k, v = qkv
    x, other = input_of(), input_of(1)
    calls = [(q, x), (k, other), (k, x), (v, x), (v, x), (v, other), (q, other), (q, other)]
    found, expected = ([call(layer, given) for layer, given in calls] for call in (ask, truth))
    same(found, expected)
    leaves = [x, other, *trained(qkv)]
    same(torch.autograd.grad(loss_of(found), leaves), list(torch.autograd.grad(loss_of(expected), leaves)))
    same([layer(x) for layer in (v, k, q)], [truth(layer, x) for layer in (v, k, q)])


def test_what_waits_for_a_neighbour_does_not_outlive_the_values_it_was_made_of(qkv: tuple[SoraLinear, ...]) -> None:
    q, k, v = qkv
    x = input_of()
    q(x)
    with torch.no_grad():
        k.lora_A.mul_(2)  # as an optimizer does
    same([k(x)], [truth(k, x)])
    q(x)
    v.cut(v.lora_A.detach() * 3, v.lora_B.detach())
    same([v(x)], [truth(v, x)])
    with torch.no_grad():
        q(x)
        x.add_(1)
        same([k(x)], [truth(k, x)])
        q(x)
        k.cut(k.lora_A.clone() * 3, k.lora_B.clone())  # maybe at the place of the old one, which nobody holds
        same([k(x)], [truth(k, x)])
    k.lora_A.requires_grad_(False)
    q(x)
    k.lora_A.requires_grad_()
    k(x).sum().backward()
    assert k.lora_A.grad.abs().sum() > 0


def test_inference_mode_whose_tensors_count_no_changes_gives_the_same(qkv: tuple[SoraLinear, ...]) -> None:
    with torch.inference_mode():
        x = input_of().detach().clone()
        same([layer(x) for layer in qkv], [truth(layer, x) for layer in qkv])


def test_what_was_computed_without_gradients_is_not_taken_where_they_are_asked_for(
    qkv: tuple[SoraLinear, ...],
) -> None:
    q, k, _ = qkv
    x = input_of()
    with torch.no_grad():
        q(x)
    y = k(x)
    y.sum().backward()
    assert k.lora_A.grad.abs().sum() > 0
    q(x)
    with torch.no_grad():
        assert not k(x).requires_grad


def keep_apart(monkeypatch: pytest.MonkeyPatch, apart: bool) -> None:
    """As ZeRO-3 does, which gathers the A of a neighbour when it is only looked at."""

    def refuse(*_: object) -> None:
        raise AssertionError("a neighbour's A was looked at")

    if apart:
        monkeypatch.setattr(sora, "is_partitioned", lambda parameter: True)
        monkeypatch.setattr(SharedInput, "_factors", refuse)


@pytest.mark.parametrize("apart", [False, True])
def test_dropout_is_one_mask_of_x_for_all(
    qkv: tuple[SoraLinear, ...], apart: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where ZeRO-3 keeps them apart, or strategies would not train the same."""
    keep_apart(monkeypatch, apart)
    for layer in qkv:
        layer.lora_dropout = 0.5
    x = input_of()
    leaves = [x, *trained(qkv)]
    torch.manual_seed(3)
    seeds = [sora._draw_seed() for _ in range(2)]
    torch.manual_seed(3)
    for seed in seeds:
        found, expected = [layer(x) for layer in qkv], [truth(layer, x, seed) for layer in qkv]
        same(found, expected)
        assert downs(loss_of(found)) == (3 if apart else 1)
        same(torch.autograd.grad(loss_of(found), leaves), list(torch.autograd.grad(loss_of(expected), leaves)))
    state = torch.get_rng_state()
    for layer in qkv:
        layer.eval()
    same([layer(x) for layer in qkv], [truth(layer, x) for layer in qkv])
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_recomputed_activations_give_the_same_gradients(
    qkv: tuple[SoraLinear, ...], dropout: float, apart: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also after one of them was asked alone, whose mask the others never took."""
    keep_apart(monkeypatch, apart)
    for layer in qkv:
        layer.lora_dropout = dropout
    qkv[1](input_of(1))
    x = input_of()

    def block(x: Tensor) -> Tensor:
        read = x * 1
        return loss_of([layer(read) for layer in qkv])

    leaves = [x, *trained(qkv)]
    torch.manual_seed(3)
    direct = torch.autograd.grad(block(x), leaves)
    torch.manual_seed(3)
    recomputed = torch.autograd.grad(checkpoint(block, x, use_reentrant=False), leaves)
    assert all(torch.equal(a, b) for a, b in zip(direct, recomputed, strict=True))


def test_a_neighbour_with_another_dropout_or_width_goes_its_own_way(qkv: tuple[SoraLinear, ...]) -> None:
    q, k, v = qkv
    k.lora_dropout = 0.5
    x = input_of()
    assert downs(loss_of([layer(x) for layer in qkv])) == 2
    assert q.shared_input._waiting is None, "nothing is left that nobody will ask for"
    wide = randomise(SoraLinear(nn.Linear(2 * IN, 3).double(), 2, lora_alpha=2, dtype=torch.float64), 5)
    acquaint((q, v, wide))
    same([q(x), v(x)], [truth(q, x), truth(v, x)])
    same([wide(torch.cat([x, x], -1))], [truth(wide, torch.cat([x, x], -1))])


def test_attention_to_something_else_is_no_neighbourhood() -> None:
    class Attention(nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.q_proj, self.k_proj, self.v_proj = nn.Linear(8, 8), nn.Linear(width, 8), nn.Linear(width, 8)

    model = nn.ModuleDict({"self_attn": Attention(8), "cross_attn": Attention(8), "attn": Attention(6)})
    found = adapters(inject_sora(model, r=2))
    assert {name for name, layer in found.items() if layer.shared_input} == {f"self_attn.{p}_proj" for p in "qkv"}


def test_injection_acquaints_q_k_v_and_gate_up() -> None:
    model = inject_sora(tiny_llama(num_hidden_layers=2), r=2)
    groups = {}
    for name, layer in adapters(model).items():
        groups.setdefault(id(layer.shared_input) if layer.shared_input else name, []).append(name.rpartition(".")[2])
    assert sorted(map(tuple, groups.values())) == sorted(
        2 * [("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",)]
    )
    only = inject_sora(tiny_llama(num_hidden_layers=1), r=2, target_modules=["q_proj", "o_proj"])
    assert all(layer.shared_input is None for layer in adapters(only).values())


def test_a_copy_and_a_saved_model_are_acquainted_among_themselves() -> None:
    model = inject_sora(tiny_llama(num_hidden_layers=1), r=2)
    ids = torch.arange(10)[None]
    logits = model(ids, use_cache=False).logits
    saved = io.BytesIO()
    torch.save(model, saved)
    saved.seek(0)
    for other in (copy.deepcopy(model), torch.load(saved, weights_only=False)):
        q = adapters(other)["model.layers.0.self_attn.q_proj"]
        with torch.no_grad():
            for name, layer in adapters(other).items():
                randomise(layer, len(name))
        assert q.shared_input is not adapters(model)["model.layers.0.self_attn.q_proj"].shared_input
        found = other(ids, use_cache=False).logits
        assert downs(found) == 4 and relative_error(found, logits) > 0.01
    assert torch.equal(model(ids, use_cache=False).logits, logits), "the copies' values are their own"


def test_a_model_ends_with_its_last_user() -> None:
    """Without waiting for the garbage collector: the next one may need its memory."""
    model = inject_sora(tiny_llama(num_hidden_layers=1), r=2)
    model(torch.arange(10)[None], use_cache=False)
    layer = weakref.ref(adapters(model)["model.layers.0.self_attn.q_proj"])
    del model
    assert layer() is None


def test_a_replica_of_a_layer_reads_for_itself(qkv: tuple[SoraLinear, ...]) -> None:
    """As torch.nn.DataParallel makes one for a pass, from the parameters of the original."""
    x = input_of()
    for layer in qkv:
        assert relative_error(copy.copy(layer)(x), truth(layer, x)) < 1e-12


def test_the_recipe_of_4_bit_training_under_autocast_has_the_gradients_of_the_plain_one() -> None:
    """Norms in float32 hand q, k and v a float32 x, which a 4-bit layer takes and autocast does not change."""
    from peft import prepare_model_for_kbit_training

    gradients = []
    for is_on in (True, False):
        model = prepare_model_for_kbit_training(tiny_llama(), use_gradient_checkpointing=False)
        for name, linear in target_linears(model).items():
            model.set_submodule(name, linear4bit(linear.weight.detach()))
        for seed, layer in enumerate(adapters(inject_sora(model, r=3)).values()):
            randomise(layer, seed, size=0.05)
        with torch.autocast("cpu", torch.bfloat16, enabled=is_on):
            loss = model(input_ids=IDS, labels=IDS).loss
        loss.backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad]))
    assert relative_error(*gradients) < 0.05  # bf16 rounds at 4e-3, here through two layers of large weights
