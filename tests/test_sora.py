"""SoraLinear is the equation, its hand-written gradient is the equation's, and it keeps next to nothing for it."""

import functools

import pytest
import torch
from helpers import dense_delta, linear4bit, linear8bit, randomise, relative_error, tiny_llama
from torch import nn
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from sora_llm.inject import inject_sora
from sora_llm.sora import SoraLinear, add_branch, fold, keep_live_slots, soft_threshold

IN, OUT, R = 7, 5, 3
S = 1.5  # the scale: a forgotten s shows
# A dtype's rounding, three or four times in a row (A x, g ⊙, B, + y), as a relative error of a whole tensor.
ROUNDING = {torch.float64: 1e-13, torch.float32: 1e-6, torch.bfloat16: 1e-2}


def tensors(x_shape, dtype=torch.float64, seed=0, requires_grad=True):
    """y, x, A, B, g."""
    generator = torch.Generator().manual_seed(seed)
    shapes = ((*x_shape[:-1], OUT), x_shape, (R, IN), (OUT, R), (R,))
    return [
        torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_(requires_grad)
        for shape in shapes
    ]


def plain(y, x, A, B, g, scaling=S):
    """The equation, left to autograd."""
    u = nn.functional.linear(x, A)
    return y + scaling * nn.functional.linear(u if g is None else u * g, B)


def branch(y, x, A, B, g, scaling, dropout, seed):
    """The branch on a base layer that answers y, whatever it is asked."""
    return add_branch(lambda _: y.clone(), x, A, B, g, scaling, dropout, seed)


def backward(output, leaves, seed=9):
    """Gradients of the leaves for a fixed random cotangent."""
    dy = torch.randn(output.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return torch.autograd.grad(output, leaves, dy.to(output.dtype))


def layer_of(base=None, dropout=0.0, dtype=torch.float32, dead=0, r=R):
    if base is None:
        base = nn.Linear(IN, OUT, dtype=dtype)
    return randomise(SoraLinear(base, r, lora_alpha=S * r, lora_dropout=dropout, dtype=dtype), seed=1, dead=dead)


# ----- the gradient ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("x_shape", [(4, IN), (2, 3, IN)])
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_the_gradients_are_those_of_finite_differences(x_shape, gated, dropout):
    y, x, A, B, g = tensors(x_shape)
    g = g if gated else None
    assert torch.autograd.gradcheck(lambda *t: branch(*t, S, dropout, 5), (y, x, A, B, g))


@pytest.mark.parametrize("frozen", range(5), ids=["y", "x", "A", "B", "gate"])
def test_an_input_that_requires_no_gradient_changes_no_other_gradient(frozen):
    leaves = tensors((2, 3, IN))
    leaves[frozen].requires_grad_(False)
    assert torch.autograd.gradcheck(lambda *t: branch(*t, S, 0.0, 0), leaves)


def test_gradcheck_holds_through_the_base_layer_and_for_strided_inputs():
    layer = layer_of(dtype=torch.float64)
    x = torch.randn(IN, 3, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: layer(x.permute(2, 1, 0)), (x,))
    parameters = (layer.lora_A, layer.lora_B, layer.gate)
    assert torch.autograd.gradcheck(lambda *_: layer(x.detach().permute(2, 1, 0)), parameters)


# ----- the equation ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("gated", [True, False])
def test_output_and_all_gradients_equal_the_plain_formula(dtype, gated):
    ours = tensors((2, 8, IN), dtype)
    if gated:
        with torch.no_grad():
            ours[4][1] = 0
    truth = [t.detach().double().requires_grad_() for t in ours]
    if not gated:
        ours[4], truth[4] = None, None
    found, expected = branch(*ours, S, 0.0, 0), plain(*truth)
    assert found.dtype == dtype
    assert relative_error(found, expected) < ROUNDING[dtype]
    pairs = zip(
        backward(found, [t for t in ours if t is not None]),
        backward(expected, [t for t in truth if t is not None]),
        strict=True,
    )
    for gradient, true_gradient in pairs:
        assert gradient.dtype == dtype
        assert relative_error(gradient, true_gradient) < ROUNDING[dtype]


def test_float32_adapters_serve_a_bf16_input_and_get_float32_gradients():
    y, x, *_ = tensors((2, 8, IN), torch.bfloat16)
    _, _, *adapter = tensors((2, 8, IN), torch.float32)
    # The truth knows the factors as they are cast: what is compared is the arithmetic, not that cast.
    truth = [t.detach().to(torch.bfloat16).double().requires_grad_() for t in (y, x, *adapter)]
    found = branch(y, x, *adapter, S, 0.0, 0)
    expected = plain(*truth)
    assert found.dtype == torch.bfloat16
    assert relative_error(found, expected) < ROUNDING[torch.bfloat16]
    gradients, true_gradients = backward(found, [y, x, *adapter]), backward(expected, truth)
    assert [g.dtype for g in gradients] == [torch.bfloat16] * 2 + [torch.float32] * 3
    for gradient, true_gradient in zip(gradients, true_gradients, strict=True):
        assert relative_error(gradient, true_gradient) < ROUNDING[torch.bfloat16]


@pytest.mark.parametrize("backward_inside", [False, True])
@pytest.mark.parametrize(
    ("dtype", "cast"),
    [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.bfloat16), (torch.bfloat16, torch.float16)],
)
@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_autocast_is_the_base_layers_and_leaves_the_branch_its_dtypes(dtype, cast, dropout, backward_inside):
    """The same branch, gradients and mask as without it, beside a base layer that computes as autocast wants."""
    base, x = nn.Linear(IN, OUT, dtype=dtype), tensors((2, 8, IN), dtype)[1].detach()
    found = []
    for is_on in (True, False):
        layer = layer_of(base, dropout)
        torch.manual_seed(3)
        leaf = x.clone().requires_grad_()
        with torch.autocast("cpu", cast, enabled=is_on):
            y = layer(leaf)
            if backward_inside:
                y.float().square().sum().backward()
        if not backward_inside:
            y.float().square().sum().backward()
        found.append([y, leaf.grad, *(p.grad for p in layer.parameters() if p.requires_grad)])
    assert found[0][0].dtype == cast and [t.dtype for t in found[0][2:]] == [torch.float32] * 3
    for with_cast, without in zip(*found, strict=True):
        assert relative_error(with_cast, without) < 3e-2  # the base layer's answer is rounded to 8 bits


def test_autocast_and_compilation_go_together():
    x = tensors((2, 8, IN), torch.float32)[1]
    found = []
    for compiled in (False, True):
        layer = layer_of(nn.Linear(IN, OUT))
        layer.base_layer.weight.data.fill_(0.1)
        layer.base_layer.bias.data.zero_()
        run = torch.compile(layer, backend="eager", fullgraph=True) if compiled else layer
        with torch.autocast("cpu", torch.bfloat16):
            y = run(x)
        y.float().square().sum().backward()
        found.append([y.detach(), *(p.grad for p in layer.parameters() if p.requires_grad)])
    assert torch.equal(found[0][0], found[1][0]) and found[0][0].dtype == torch.bfloat16  # the base layer's
    # float32, the adapter's and that of its input: the equation multiplies in another order
    assert all(relative_error(a, b) < ROUNDING[torch.float32] for a, b in zip(*found, strict=True))


def test_a_layer_without_memory_has_the_shape_of_its_answer():
    layer = SoraLinear(nn.Linear(IN, OUT, device="meta"), R, 16)
    assert layer(torch.empty(3, IN, device="meta")).shape == (3, OUT)


@pytest.mark.parametrize(("y_dtype", "x_dtype"), [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)])
def test_a_base_layer_that_answers_in_another_dtype_keeps_it(y_dtype, x_dtype):
    y = tensors((4, IN), y_dtype)[0]
    _, x, A, B, g = tensors((4, IN), x_dtype)
    found = branch(y, x, A, B, g, S, 0.0, 0)
    truth = [t.detach().double().requires_grad_() for t in (y, x, A, B, g)]
    assert found.dtype == y_dtype
    assert relative_error(found, plain(*truth)) < ROUNDING[torch.bfloat16]
    for gradient, true in zip(backward(found, [y, x, A, B, g]), backward(plain(*truth), truth), strict=True):
        assert relative_error(gradient, true) < ROUNDING[torch.bfloat16]


def test_a_dead_gate_gives_its_row_of_a_and_column_of_b_exactly_zero_gradient_and_keeps_its_own():
    layer = layer_of(dead=1)
    layer(torch.randn(6, IN)).square().sum().backward()
    assert torch.equal(layer.lora_A.grad[0], torch.zeros(IN))
    assert torch.equal(layer.lora_B.grad[:, 0], torch.zeros(OUT))
    assert layer.gate.grad[0] != 0
    assert (layer.lora_A.grad[1:] != 0).all() and (layer.lora_B.grad[:, 1:] != 0).all()


@pytest.mark.parametrize("of", ["x", "lora_B"])
def test_a_gradient_of_a_gradient_is_refused_instead_of_being_zero(of):
    layer, x = layer_of(), torch.randn(6, IN, requires_grad=True)
    first = torch.autograd.grad(layer(x).square().sum(), x if of == "x" else layer.lora_B, create_graph=True)[0]
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.square().sum().backward()


def test_a_new_layer_starts_as_its_base_layer_and_freezes_it():
    base = nn.Linear(IN, OUT)
    x = torch.randn(4, IN)
    expected = base(x)
    layer = SoraLinear(base, R, lora_alpha=6)
    assert torch.equal(layer(x), expected)
    assert {name for name, p in layer.named_parameters() if p.requires_grad} == {"lora_A", "lora_B", "gate"}
    assert layer.scaling == 2.0 and layer.weight is base.weight and layer.bias is base.bias
    assert torch.equal(layer.gate, torch.ones(R)) and layer.lora_A.abs().min() > 0
    # Kaiming-uniform with a = √5, LoRA's start, is uniform in ±1/√I
    assert layer.lora_A.abs().max() <= IN**-0.5


def test_a_layer_without_slots_is_refused():
    with pytest.raises(ValueError, match="it must be an integer >= 1"):
        SoraLinear(nn.Linear(IN, OUT), 0, lora_alpha=1)


@pytest.mark.parametrize("tau", [0.0, 0.5, torch.tensor([0.0, 0.5, 1.0, 2.0, 0.25])])
def test_soft_threshold_is_the_proximal_map_of_the_absolute_value(tau):
    """By its optimality condition: z − x ∈ τ·∂|x|, which names x alone since the objective is strictly convex."""
    z = torch.tensor([-2.0, -0.5, 0.0, 0.3, 1.5])
    x = soft_threshold(z, tau)
    tau = torch.as_tensor(tau).expand(5)
    moved = x != 0
    assert torch.equal((z - x)[moved], (tau * torch.sign(x))[moved])
    assert ((z - x).abs() <= tau).all()
    assert not torch.signbit(x[~moved]).any(), "−0 would be +0 after ZeRO's gathers: other bits"


def test_a_base_layer_that_needs_its_own_answer_again_is_an_error_not_a_wrong_gradient():
    """The branch is added in the answer's place; exp keeps its answer for its gradient."""
    x = torch.randn(4, IN, requires_grad=True)
    layer = layer_of(nn.Linear(IN, IN))
    output = add_branch(torch.exp, x, layer.lora_A, torch.randn(IN, R), layer.gate, S)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.sum().backward()


def test_an_answer_that_does_not_lie_in_rows_gets_the_branch_too():
    y, x, A, B, g = tensors((4, IN))
    across = y.detach().T.contiguous().T.requires_grad_()
    assert not across.is_contiguous()
    found = add_branch(lambda _: across * 1, x, A, B, g, S)
    torch.testing.assert_close(found, plain(y, x, A, B, g))
    torch.testing.assert_close(backward(found, [across, A]), backward(plain(y, x, A, B, g), [y, A]))


# ----- dropout --------------------------------------------------------------------------------------------------------


def drop(x, dropout, seed):
    """What the branch does to x: the branch itself with A, B the identity, g absent, y zero."""
    eye = torch.eye(x.shape[-1], dtype=x.dtype)
    return branch(torch.zeros_like(x), x, eye, eye, None, 1.0, dropout, seed)


def test_dropout_zeroes_its_share_of_x_and_keeps_the_expectation():
    x = torch.ones(200, 500)
    dropped = drop(x, 0.3, seed=11)
    zeroed = dropped == 0
    # 100 000 draws: the standard deviation of the share is 0.0014, so 0.01 is seven of them
    assert abs(zeroed.float().mean() - 0.3) < 0.01
    torch.testing.assert_close(dropped[~zeroed], torch.full_like(dropped[~zeroed], 1 / 0.7))
    assert not torch.equal(zeroed, drop(x, 0.3, seed=12) == 0)


def test_dropout_gradients_equal_the_plain_formula_under_the_same_mask():
    y, x, A, B, g = tensors((2, 8, IN))
    mask = drop(torch.ones_like(x), 0.4, seed=3)
    assert 0 < (mask == 0).sum() < mask.numel()
    found = branch(y, x, A, B, g, S, 0.4, 3)
    expected = plain(y, x * mask, A, B, g)
    torch.testing.assert_close(found, expected)
    for gradient, true_gradient in zip(backward(found, [x, A, B, g]), backward(expected, [x, A, B, g]), strict=True):
        torch.testing.assert_close(gradient, true_gradient)


def test_dropout_is_a_function_of_torchs_seed_and_off_in_eval_mode():
    layer = layer_of(dropout=0.5)
    x = torch.randn(4, IN)

    def run(seed):
        torch.manual_seed(seed)
        return layer(x)

    assert torch.equal(run(0), run(0))
    assert not torch.equal(run(0), run(1))
    torch.manual_seed(0)
    assert not torch.equal(layer(x), layer(x))  # a fresh mask at every call
    layer.eval()
    torch.testing.assert_close(layer(x), plain(layer.base_layer(x), x, layer.lora_A, layer.lora_B, layer.gate))
    assert torch.equal(run(0), run(1))


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_activation_checkpointing_with_dropout_gives_bit_equal_gradients(use_reentrant):
    """The mask is drawn again when the forward is recomputed; another mask there would be silently wrong gradients."""
    layers = nn.ModuleList([layer_of(nn.Linear(IN, IN), dropout=0.5), layer_of(nn.Linear(IN, IN), dropout=0.5)])

    def run(call):
        layers.zero_grad()
        torch.manual_seed(3)
        x = torch.randn(6, IN, requires_grad=True)
        h = x
        for layer in layers:
            h = torch.tanh(call(layer, h))
        h.sum().backward()
        return [x.grad, *(p.grad for p in layers.parameters() if p.grad is not None)]

    direct = run(lambda layer, h: layer(h))
    recomputed = run(functools.partial(checkpoint, use_reentrant=use_reentrant))
    assert len(direct) == 7 and any(gradient.abs().sum() > 0 for gradient in direct)
    assert all(torch.equal(a, b) for a, b in zip(direct, recomputed, strict=True))


@pytest.mark.parametrize(
    ("bias", "saved"), [(False, torch.ops.aten.mm.default), (True, torch.ops.aten.addmm.default)], ids=["mm", "addmm"]
)
def test_selective_checkpointing_may_keep_the_base_layers_products(bias, saved):
    """Without bias y is a view of one, whose changes torch does not notice: the branch was added to it twice."""
    layers = nn.ModuleList([layer_of(nn.Linear(IN, IN, bias=bias)) for _ in range(2)])

    def run(call):
        layers.zero_grad()
        x = torch.randn(2, 3, IN, generator=torch.Generator().manual_seed(3), requires_grad=True)
        loss = call(lambda h: layers[1](torch.tanh(layers[0](h))), x).sum()
        loss.backward()
        return [loss, x.grad, *(p.grad for p in layers.parameters() if p.grad is not None)]

    contexts = functools.partial(create_selective_checkpoint_contexts, [saved])
    recomputed = run(functools.partial(checkpoint, use_reentrant=False, context_fn=contexts))
    assert all(torch.equal(a, b) for a, b in zip(run(lambda f, x: f(x)), recomputed, strict=True))


@pytest.mark.parametrize("gated", [True, False])
def test_a_traced_layer_computes_what_it_computes(gated):
    layer = layer_of(nn.Linear(IN, OUT)).eval()
    if not gated:
        layer.cut(*(factor.detach() for factor in keep_live_slots(layer.lora_A, layer.lora_B, layer.gate)))
    x = torch.randn(3, IN)
    with torch.no_grad():
        traced = torch.jit.trace(layer, x)
        assert torch.allclose(traced(2 * x), layer(2 * x), atol=1e-6)


# ----- what is kept ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("base", ["linear", "nf4"])
def test_neighbours_keep_one_shared_x_and_narrow_us_no_mask_and_no_float32_copy(dropout, base):
    num_in, tokens = 64, 32
    weights = [torch.randn(num_in, num_in) * 0.1 for _ in range(3)]
    if base == "nf4":
        bases = [linear4bit(w, torch.bfloat16) for w in weights]
    else:
        bases = [nn.Linear(num_in, num_in, dtype=torch.bfloat16) for _ in weights]
    q, k, v = (layer_of(b, dropout=dropout) for b in bases)
    x = torch.randn(1, tokens, num_in, dtype=torch.bfloat16, requires_grad=True)
    saved = []

    def keep(tensor):
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = torch.stack([q(x), k(x), v(x)])

    frozen = {t.untyped_storage().data_ptr() for layer in (q, k, v) for t in layer.parameters()}
    kept = {t.untyped_storage().data_ptr(): t for t in saved if t.untyped_storage().data_ptr() not in frozen}
    wide = [t for t in kept.values() if t.numel() >= x.numel()]
    assert [t.data_ptr() for t in wide] == [x.data_ptr()], "only x itself, once for the three layers"
    narrow = [t for t in kept.values() if t.numel() < x.numel()]
    assert [(tuple(t.shape), t.dtype) for t in narrow] == [((R, tokens), torch.bfloat16)] * 3
    output.float().sum().backward()
    assert all(layer.lora_A.grad.abs().sum() > 0 for layer in (q, k, v))


# ----- base layers ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("make", [linear4bit, linear8bit])
def test_quantised_base_layers_get_the_same_branch(make, dtype):
    weight = torch.randn(64, 64, generator=torch.Generator().manual_seed(0)) * 0.2
    base = make(weight) if make is linear8bit else make(weight, dtype)
    layer = layer_of(base)
    x = torch.randn(2, 5, 64, generator=torch.Generator().manual_seed(1)).to(dtype).requires_grad_()
    y = base(x)
    (dx_base,) = backward(y, [x])
    truth = [t.detach().to(dtype).double().requires_grad_() for t in (y, x, layer.lora_A, layer.lora_B, layer.gate)]
    found, expected = layer(x), plain(*truth)
    assert relative_error(found, y) > 0.3, "the branch must matter"
    assert relative_error(found, expected) < ROUNDING[dtype]
    dx, *gradients = backward(found, [x, layer.lora_A, layer.lora_B, layer.gate])
    _, dx_branch, *true_gradients = backward(expected, truth)
    assert relative_error(dx, dx_base.double() + dx_branch) < ROUNDING[dtype]
    for gradient, true_gradient in zip(gradients, true_gradients, strict=True):
        assert relative_error(gradient, true_gradient) < ROUNDING[dtype]


@pytest.mark.matrix
def test_a_compiled_model_agrees_with_the_eager_one():
    """Without dropout, whose masks are torch's there."""
    model = inject_sora(tiny_llama(num_hidden_layers=1), r=R, lora_alpha=6)
    for index, layer in enumerate(m for m in model.modules() if isinstance(m, SoraLinear)):
        randomise(layer, index, size=0.1)
    ids = torch.arange(12).reshape(2, 6)

    def run(callable_model):
        model.zero_grad()
        torch.manual_seed(4)
        logits = callable_model(input_ids=ids, use_cache=False).logits
        logits.square().mean().backward()
        return [logits.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]

    eager = run(model)
    torch._dynamo.reset()
    compiled = run(torch.compile(model, backend="aot_eager"))
    assert len(eager) == len(compiled) == 1 + 3 * 7
    for a, b in zip(compiled, eager, strict=True):
        assert relative_error(a, b) < 1e-5  # float32; decompositions reorder sums


# ----- folding and cutting --------------------------------------------------------------------------------------------


def product(A, B):
    return B.double() @ A.double()


def test_keep_live_slots_drops_dead_slots_shares_the_gate_and_preserves_the_product():
    layer = layer_of(dtype=torch.float64, dead=2, r=5)
    A, B = keep_live_slots(layer.lora_A, layer.lora_B, layer.gate)
    assert A.shape == (3, IN) and B.shape == (OUT, 3)
    torch.testing.assert_close(layer.scaling * product(A, B), dense_delta(layer))
    # "half on either side": each factor grows by the same √|g|
    torch.testing.assert_close(A.norm(dim=1) / layer.lora_A[2:].norm(dim=1), layer.gate[2:].abs().sqrt())
    torch.testing.assert_close(B.norm(dim=0) / layer.lora_B[:, 2:].norm(dim=0), layer.gate[2:].abs().sqrt())


def test_without_a_gate_the_factors_come_back_as_they_are():
    A, B = torch.randn(R, IN), torch.randn(OUT, R)
    assert all(torch.equal(a, b) for a, b in zip(keep_live_slots(A, B, None), (A, B), strict=True))


@pytest.mark.parametrize("gated", [True, False])
def test_fold_gives_factors_of_scale_one_with_the_same_delta(gated):
    layer = layer_of(dead=1, r=4)
    if not gated:
        layer.cut(*keep_live_slots(layer.lora_A, layer.lora_B, layer.gate))
    A, B = fold(layer.lora_A, layer.lora_B, layer.gate, layer.scaling)
    assert A.dtype == B.dtype == torch.float32 and A.shape == (3, IN)
    assert relative_error(product(A, B), dense_delta(layer)) < 2e-7  # one rounding to float32 of either factor


def test_a_cut_layer_computes_what_it_computed_and_goes_on_training():
    layer = layer_of(dtype=torch.float64, dead=2, r=5)
    x = torch.randn(4, IN, dtype=torch.float64)
    before, old_A, scaling = layer(x), layer.lora_A, layer.scaling
    layer.cut(*keep_live_slots(layer.lora_A, layer.lora_B, layer.gate))
    torch.testing.assert_close(layer(x), before)
    assert layer.gate is None and layer.lora_A.shape == (3, IN) and layer.scaling == scaling
    assert layer.lora_A is not old_A and isinstance(layer.lora_A, nn.Parameter)
    assert torch.autograd.gradcheck(lambda *_: layer(x), (layer.lora_A, layer.lora_B))
    assert layer.extra_repr() == f"r=3, scaling={scaling:g}, gated=False"


def test_a_frozen_adapter_stays_frozen_when_it_is_cut():
    layer = randomise(SoraLinear(nn.Linear(6, 5), 4, 8), 0)
    layer.requires_grad_(False)
    layer.cut(layer.lora_A[:2], layer.lora_B[:, :2])
    assert not any(parameter.requires_grad for parameter in layer.parameters())
    layer = randomise(SoraLinear(nn.Linear(6, 5), 4, 8), 0)
    layer.requires_grad_(False)
    layer.replace(layer.lora_A, layer.lora_B, layer.gate)
    assert not any(parameter.requires_grad for parameter in layer.parameters())


@pytest.mark.parametrize("size", [0.0, 0.3])
def test_a_hook_on_the_base_layer_keeps_what_the_base_layer_answered(size):
    base = nn.Linear(6, 5)
    kept = []
    base.register_forward_hook(lambda module, args, output: kept.append(output))
    layer = randomise(SoraLinear(base, 4, 8), 0, size=size)
    x_TI = torch.randn(3, 6)
    y_TO = layer(x_TI)
    expected = nn.functional.linear(x_TI, base.weight, base.bias)
    assert torch.equal(kept[0], expected)
    assert torch.allclose(y_TO, expected + x_TI @ dense_delta(layer).T.float(), atol=1e-6)
    y_TO.sum().backward()
    assert layer.lora_A.grad is not None


def test_a_hook_on_every_module_keeps_what_the_base_layer_answered_too():
    base = nn.Linear(6, 5)
    layer, kept = randomise(SoraLinear(base, 4, 8), 0, size=0.3), {}
    hook = nn.modules.module.register_module_forward_hook(lambda module, args, output: kept.update({module: output}))
    try:
        x_TI = torch.randn(3, 6)
        y_TO = layer(x_TI)
    finally:
        hook.remove()
    assert torch.equal(kept[base], nn.functional.linear(x_TI, base.weight, base.bias))
    assert torch.equal(kept[layer], y_TO) and not torch.equal(kept[base], y_TO)


def test_a_layer_cut_to_rank_0_has_no_branch_and_is_its_base_layer():
    layer = layer_of(dead=R)
    layer.cut(*keep_live_slots(layer.lora_A, layer.lora_B, layer.gate))
    x = torch.randn(4, IN)
    assert torch.equal(layer(x), layer.base_layer(x))
    assert layer.lora_A is None and layer.lora_B is None and layer.gate is None
    assert not [name for name, p in layer.named_parameters() if p.requires_grad]
    assert "r=0" in layer.extra_repr()


def test_factors_that_do_not_fit_are_refused():
    layer = layer_of()
    for A, B in ((torch.ones(2, IN), torch.ones(OUT, 3)), (torch.ones(2, IN + 1), torch.ones(OUT, 2))):
        with pytest.raises(ValueError, match="do not fit"):
            layer.cut(A, B)
    layer.cut(torch.ones(IN, 2).T, torch.ones(2, OUT).T)
    assert all(factor.is_contiguous() for factor in (layer.lora_A, layer.lora_B)), "as their gradients are"
    for rank, slots in ((2, 3), (0, 0)):
        with pytest.raises(ValueError, match="a gate of shape"):
            layer.replace(torch.ones(rank, IN), torch.ones(OUT, rank), torch.ones(slots))
