"""An independent float64 SoRA, written from the paper's equations alone; it shares no code with `sora_llm`.

    ΔW = s · B diag(g) A,  s = lora_alpha / r          minimise  L(A, B, g) + λ Σ ‖g‖₁
    g ← S_τ(AdamW_step(g)) once per optimizer step, after clipping by the global norm of all A, B and g

Where the library has a choice of structure, this file takes the other one: the effective weight W + ΔW is put into the
model (no adapter branch), gradients come from `torch.autograd.grad`, AdamW and the cross-entropy are written out, and
the soft threshold is written by cases.

Shapes: B batch, T tokens, V vocabulary, I in, O out, R rank (A_RI, B_OR and g_R are SoRA's A, B and g).
"""

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

Factors = tuple[Tensor, Tensor, Tensor]  # A (R, I), B (O, R), g (R,)
MicroBatch = tuple[Tensor, Tensor]  # input_ids (B, T), labels (B, T) with -100 where unsupervised
IGNORED = -100


@dataclass(frozen=True)
class ReferenceResult:
    """What a run did: one entry per optimizer step, then the end state per module name."""

    losses: list[float]  # before the step's update
    grad_norms: list[float]  # over all A, B and g, before clipping
    factors: dict[str, Factors]
    delta_weights: dict[str, Tensor]  # ΔW (O, I), s included


def use_float64_norms(model: nn.Module) -> nn.Module:
    """Let the RMSNorms of `model` compute in float64, in place; returns `model`.

    Transformers casts to float32 inside RMSNorm whatever the model's dtype, so a `.double()` model still carries a
    relative error of 1e-7 per layer. Apply it to both sides of a comparison that is to hold more tightly than that.
    """
    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm"):
            module.forward = functools.partial(_rms_norm, module)
    return model


def _rms_norm(module: nn.Module, x: Tensor) -> Tensor:
    mean_square = (x * x).mean(dim=-1, keepdim=True)
    return module.weight * x / (mean_square + module.variance_epsilon).sqrt()


def delta_weight(factors: Factors, s: float) -> Tensor:
    """ΔW (O, I) = s · B diag(g) A."""
    A_RI, B_OR, g_R = factors
    return s * (B_OR @ torch.diag(g_R) @ A_RI)


def loss_and_gradients(
    model: nn.Module, factors: Mapping[str, Factors], s: float, micro_batches: Sequence[MicroBatch]
) -> tuple[float, dict[str, Factors]]:
    """Mean cross-entropy over all supervised tokens of one step and its gradients in (A, B, g).

    loss = Σ CE over the supervised tokens of all micro-batches / their number. The label at position i is predicted
    from position i − 1, so a label at position 0 is never predicted and not counted.
    """
    num_supervised = sum(int((labels[:, 1:] != IGNORED).sum()) for _, labels in micro_batches)
    assert num_supervised > 0, "a step without supervised tokens has no loss"
    leaves = {name: tuple(t.detach().clone().requires_grad_() for t in triple) for name, triple in factors.items()}
    total = torch.zeros((), dtype=torch.float64)
    for input_ids, labels in micro_batches:
        weights = {
            f"{name}.weight": model.get_submodule(name).weight.detach() + delta_weight(triple, s)
            for name, triple in leaves.items()
        }
        # tie_weights=False: an adapter on lm_head must not change the embedding that shares its weight.
        output = torch.func.functional_call(
            model, weights, (), {"input_ids": input_ids, "use_cache": False}, tie_weights=False
        )
        total = total + _summed_cross_entropy(output.logits, labels)
    loss = total / num_supervised
    flat = torch.autograd.grad(loss, [t for triple in leaves.values() for t in triple])
    gradients = {name: (flat[3 * i], flat[3 * i + 1], flat[3 * i + 2]) for i, name in enumerate(leaves)}
    return loss.item(), gradients


def _summed_cross_entropy(logits_BTV: Tensor, labels_BT: Tensor) -> Tensor:
    assert logits_BTV.dtype == torch.float64, f"logits are {logits_BTV.dtype}: the reference needs a float64 model"
    predicted, expected = logits_BTV[:, :-1], labels_BT[:, 1:]
    supervised = expected != IGNORED
    rows, targets = predicted[supervised], expected[supervised]  # (N, V), (N,)
    return (torch.logsumexp(rows, dim=-1) - rows[torch.arange(len(targets)), targets]).sum()


def soft_threshold_reference(z: Tensor, tau: Tensor | float) -> Tensor:
    """argmin over x of ½(x − z)² + τ|x|, by cases: z − τ above τ, z + τ below −τ, exactly 0 between."""
    tau = torch.as_tensor(tau, dtype=z.dtype)
    assert bool((tau >= 0).all()), "a threshold is not negative"
    return torch.where(z > tau, z - tau, torch.where(z < -tau, z + tau, torch.zeros_like(z)))


def reference_run(
    model: nn.Module,
    modules: Sequence[str],
    factors: Mapping[str, Factors],
    batches: Sequence[Sequence[MicroBatch]],
    *,
    r: int,
    lora_alpha: float,
    learning_rates: Sequence[float],
    gate_learning_rates: Sequence[float],
    lambdas: Sequence[float],
    threshold: str,
    weight_decay: float,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    max_grad_norm: float | None,
) -> ReferenceResult:
    """Train SoRA on a frozen float64 causal LM and return everything a library run can be compared with.

    Args:
        model: a transformers causal LM, `.double()` and `.eval()`; its parameters are read, never written.
        modules: names of the adapted `nn.Linear` modules, the keys of `factors`.
        factors: the start (A (R, I), B (O, R), g (R,)) per module, copied to float64.
        batches: per optimizer step a list of micro-batches (input_ids (B, T), labels (B, T)), right-padded.
        r, lora_alpha: s = lora_alpha / r for the whole run.
        learning_rates, gate_learning_rates, lambdas: one value per optimizer step; λ = 0 is a step without prox.
        threshold: τ = lr_gate·λ (`decoupled`), lr_gate·λ / (√v̂ + ε) (`proxgen`) or λ (`constant`).
        weight_decay: decoupled, on A and B only, times `learning_rates`.
        max_grad_norm: limit of the global norm over all A, B and g; None does not clip.
    """
    num_steps = len(batches)
    assert len(learning_rates) == len(gate_learning_rates) == len(lambdas) == num_steps, "one value per step"
    assert set(modules) == set(factors), "factors are given for exactly the target modules"
    assert threshold in ("decoupled", "proxgen", "constant"), threshold
    assert not model.training, "dropout would make the reference random"
    assert all(p.dtype == torch.float64 for p in model.parameters()), "the reference needs a float64 model"

    s = lora_alpha / r
    replica = ReferenceReplica(model, factors, s, weight_decay, betas, eps, max_grad_norm)
    losses, grad_norms = [], []

    for t, micro_batches in enumerate(batches, start=1):
        lr_gate, lam = gate_learning_rates[t - 1], lambdas[t - 1]
        loss, norm, gate_scales = replica.step(micro_batches, learning_rates[t - 1], lr_gate)
        losses.append(loss)
        grad_norms.append(norm)
        for name in modules:
            A, B, g = replica.state[name]
            if lam != 0:
                g = soft_threshold_reference(g, threshold_reference(threshold, lr_gate, lam, gate_scales[name]))
            replica.state[name] = (A, B, g)
    state = replica.state
    return ReferenceResult(losses, grad_norms, state, {name: delta_weight(state[name], s) for name in modules})


class ReferenceReplica:
    """SoRA's factors under AdamW, without prox: `state` {module: (A, B, g)}, moments, and what a step does to them."""

    def __init__(
        self,
        model: nn.Module,
        factors: Mapping[str, Factors],
        s: float,
        weight_decay: float,
        betas: tuple[float, float],
        eps: float,
        max_grad_norm: float | None,
    ) -> None:
        self.model, self.s, self.weight_decay, self.betas, self.eps = model, s, weight_decay, betas, eps
        self.max_grad_norm, self.num_steps = max_grad_norm, 0
        self.state: dict[str, Factors] = {}
        for name in factors:
            A, B, g = (t.detach().to(torch.float64).clone() for t in factors[name])
            self.state[name] = (A, B, g)
        self.first = {name: tuple(torch.zeros_like(t) for t in self.state[name]) for name in factors}
        self.second = {name: tuple(torch.zeros_like(t) for t in self.state[name]) for name in factors}

    def step(
        self, micro_batches: Sequence[MicroBatch], lr: float, lr_gate: float
    ) -> tuple[float, float, dict[str, Tensor]]:
        """One AdamW step; loss and gradient norm before it, and √v̂ + ε of every gate after it."""
        self.num_steps += 1
        t, (beta1, beta2) = self.num_steps, self.betas
        loss, gradients = loss_and_gradients(self.model, self.state, self.s, micro_batches)
        squares = [float((grad * grad).sum()) for triple in gradients.values() for grad in triple]
        norm = math.sqrt(math.fsum(squares))
        assert math.isfinite(loss) and math.isfinite(norm), f"step {t}: loss {loss}, gradient norm {norm}"
        clip = 1.0 if self.max_grad_norm is None else min(1.0, self.max_grad_norm / (norm + 1e-6))
        gate_scales = {}
        for name in self.state:
            grads = [clip * grad for grad in gradients[name]]
            first = [beta1 * m + (1 - beta1) * grad for m, grad in zip(self.first[name], grads, strict=True)]
            second = [beta2 * v + (1 - beta2) * grad**2 for v, grad in zip(self.second[name], grads, strict=True)]
            self.first[name], self.second[name] = tuple(first), tuple(second)
            m_A, m_B, m_g = (m / (1 - beta1**t) for m in first)
            d_A, d_B, d_g = ((v / (1 - beta2**t)).sqrt() + self.eps for v in second)  # √v̂ + ε

            A, B, g = self.state[name]
            A = A - lr * m_A / d_A - lr * self.weight_decay * A
            B = B - lr * m_B / d_B - lr * self.weight_decay * B
            g = g - lr_gate * m_g / d_g
            self.state[name], gate_scales[name] = (A, B, g), d_g
        return loss, norm, gate_scales


def threshold_reference(threshold: str, lr_gate: float, lam: float, gate_scale: Tensor) -> Tensor | float:
    """τ of one step: lr_gate·λ (`decoupled`), lr_gate·λ / (√v̂ + ε) (`proxgen`) or λ (`constant`)."""
    return {"decoupled": lr_gate * lam, "proxgen": lr_gate * lam / gate_scale, "constant": lam}[threshold]


def reference_rounds(
    model: nn.Module,
    factors: Mapping[str, Factors],
    batches: Sequence[Sequence[Sequence[MicroBatch]]],
    *,
    s: float,
    round_ends: Sequence[int],
    learning_rates: Sequence[float],
    gate_learning_rates: Sequence[float],
    lambdas: Sequence[float],
    threshold: str,
    weight_decay: float,
    outer_learning_rate: float = 1.0,
    outer_momentum: float = 0.0,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    max_grad_norm: float | None,
) -> tuple[dict[str, Factors], list[float]]:
    """Local updates of replicas that each have their own `batches`; the end state and, per round, the relative distance
    of mean(B diag(g) A) from mean(B) diag(mean(g)) mean(A) over all modules.

    Every replica steps alone.  After each step in `round_ends` (their numbers, from 1) all take the same A and B, from
    where the round began one outer Nesterov step towards the mean, and the same gates S_T(mean g), T the mean over
    replicas of the sum of the round's τ.
    """
    replicas = [ReferenceReplica(model, factors, s, weight_decay, betas, eps, max_grad_norm) for _ in batches]
    start = dict(replicas[0].state)
    velocity = {name: [torch.zeros_like(t) for t in start[name][:2]] for name in start}
    sums = [{name: torch.zeros_like(start[name][2]) for name in start} for _ in replicas]
    distances = []
    for t, (lr, lr_gate, lam) in enumerate(zip(learning_rates, gate_learning_rates, lambdas, strict=True)):
        for replica, own_batches, own_sums in zip(replicas, batches, sums, strict=True):
            _, _, gate_scales = replica.step(own_batches[t], lr, lr_gate)
            for name in start:
                own_sums[name] = own_sums[name] + threshold_reference(threshold, lr_gate, lam, gate_scales[name])
        if t + 1 not in round_ends:
            continue
        error = norm = 0.0
        for name in start:
            triples = [replica.state[name] for replica in replicas]
            A, B, g = (sum(parts) / len(parts) for parts in zip(*triples, strict=True))
            products = sum(delta_weight(triple, s) for triple in triples) / len(triples)
            error += float(((products - delta_weight((A, B, g), s)) ** 2).sum())
            norm += float((products**2).sum())
            moved = []
            for index, mean in enumerate((A, B)):
                gradient = start[name][index] - mean
                velocity[name][index] = outer_momentum * velocity[name][index] + gradient
                moved.append(
                    start[name][index] - outer_learning_rate * (gradient + outer_momentum * velocity[name][index])
                )
            T = sum(own_sums[name] for own_sums in sums) / len(sums)
            start[name] = (moved[0], moved[1], soft_threshold_reference(g, T))
        distances.append(math.sqrt(error / norm) if norm else 0.0)
        for replica, own_sums in zip(replicas, sums, strict=True):
            replica.state = dict(start)
            own_sums.update({name: torch.zeros_like(value) for name, value in own_sums.items()})
    return start, distances


def fold_slots(A: Tensor, B: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    """Cut to the k slots with g ≠ 0 and fold g evenly: A (k, I) = diag(√|g|)·A, B (O, k) = B·diag(sign(g)·√|g|).

    s stays outside: s · B_out A_out = s · B diag(g) A.
    """
    rows, columns = [], []
    for i, gate in enumerate(g.tolist()):
        if gate == 0:
            continue
        root = math.sqrt(abs(gate))
        rows.append(root * A[i])
        columns.append(math.copysign(root, gate) * B[:, i])
    if not rows:
        return A[:0].clone(), B[:, :0].clone()
    return torch.stack(rows, dim=0), torch.stack(columns, dim=1)


def lr_factor_reference(step: int, total: int, warmup: int, kind: str) -> float:
    """Factor on the peak learning rate used by optimizer step `step` (from 0), as `transformers.get_scheduler` has it.

    `constant` has no warmup there, whatever `warmup` is; `constant_with_warmup` has.
    """
    if kind == "constant":
        return 1.0
    if step < warmup:
        return step / warmup
    if kind == "constant_with_warmup":
        return 1.0
    progress = (step - warmup) / max(1, total - warmup)
    if kind == "linear":
        # Not 1 − progress: with warmup ≥ total transformers gives (total − step) / 1 here, cut at 0.
        return max(0.0, (total - step) / max(1, total - warmup))
    if kind == "cosine":
        return max(0.0, (1 + math.cos(math.pi * progress)) / 2)
    raise ValueError(f"kind {kind!r} is not one of linear, cosine, constant, constant_with_warmup")


def gate_lr_auto_reference(learning_rate: float, factors_in_window: Sequence[float]) -> float:
    """`gate_lr: auto` = min(0.25, max(learning_rate, 4 / Σ f_t)) over the sparsify window; 0.25 where the sum is 0."""
    total = math.fsum(factors_in_window)
    if total == 0:
        return 0.25
    wanted = 4 / total
    if wanted < learning_rate:
        wanted = learning_rate
    return 0.25 if wanted > 0.25 else wanted


def outer_products(A: Tensor, B: Tensor, g: Tensor | None, s: float) -> np.ndarray:
    """ΔW (O, I) = s Σ_i g_i b_i a_iᵀ, slot by slot, in float64."""
    total = np.zeros((B.shape[0], A.shape[1]))
    for i in range(A.shape[0]):
        gate = 1.0 if g is None else float(g[i])
        if gate != 0.0:
            total += s * gate * np.outer(B[:, i].double().numpy(), A[i].double().numpy())
    return total


def allocate_reference(
    importance: Mapping[str, Sequence[float]],
    costs: Mapping[str, int],
    budget: int,
    min_rank: int = 0,
    caps: Mapping[str, int] | None = None,
) -> dict[str, list[int]]:
    """Who is kept under a budget, one at a time: of those not yet seen the best one is taken if it is affordable.

    First every module's own `min_rank` best, then everything by importance / cost; the cost of a choice is
    Σ c_m · min(#, cap_m).
    """

    def cost_of(choice: Mapping[str, Sequence[int]]) -> int:
        return sum(costs[m] * (len(choice[m]) if caps is None else min(len(choice[m]), caps[m])) for m in importance)

    modules = list(importance)
    kept: dict[str, list[int]] = {m: [] for m in modules}
    for m in modules:
        best = sorted(range(len(importance[m])), key=lambda i, m=m: (-importance[m][i], i))
        kept[m] = best[:min_rank]
    assert cost_of(kept) <= budget, "min_rank costs more than the budget"
    unseen = [(m, i) for m in modules for i in range(len(importance[m])) if i not in kept[m]]
    while unseen:
        best_one = unseen[0]
        for one in unseen[1:]:  # the first of equals stays
            if importance[one[0]][one[1]] * costs[best_one[0]] > importance[best_one[0]][best_one[1]] * costs[one[0]]:
                best_one = one
        unseen.remove(best_one)
        m, i = best_one
        if cost_of({**kept, m: [*kept[m], i]}) <= budget:
            kept[m].append(i)
    return {m: sorted(kept[m]) for m in modules}
