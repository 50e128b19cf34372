"""What the runs say: tables, plots and the verdicts on the hypotheses of README.md.

    python benchmarks/quality/verdicts.py [--task NAME] [--runs FILE] [--speed FILE] [--out FOLDER]

Writes results.md, recovery.png and tuning.png into the folder of the task (or into --out) and prints results.md.
Hypotheses whose runs are not all there yet are said to be open.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from protocol import (
    ARMS,
    CORE_SIZES,
    LADDER,
    PARTS,
    WHOLE,
    Group,
    Protocol,
    Queue,
    core_groups,
    extra_groups,
    read_all,
    read_lines,
)
from speed import speed_pairs, speed_section
from statistics_of_pairs import LEVEL, bootstrap_interval, holm, sign_flip_p
from tasks import GSM8K_ANSWERS, HERE, TASKS, Task

MARGIN = 0.02
"""Of the gap between the base and LoRA at r = 16: what is not inferior."""
LORA, BALANCED = Group(WHOLE, "lora"), Group(WHOLE, "balanced")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", choices=TASKS, default=GSM8K_ANSWERS.name)
    parser.add_argument("--runs", type=Path, help="default runs.jsonl in the folder of the task")
    parser.add_argument("--speed", type=Path, help="the runs of H4, default speed.jsonl here")
    parser.add_argument("--out", type=Path, help="default the folder of the task")
    parser.add_argument("--steps", type=int, default=Protocol.steps)
    arguments = parser.parse_args()
    task = TASKS[arguments.task]
    runs, out = arguments.runs or task.runs, arguments.out or task.folder
    lines = read_lines(runs)
    if arguments.speed is not None and not task.is_first:
        print(f"verdicts.py: H4 is not asked of {task.name}; leave --speed out", file=sys.stderr)
        return 2
    if not lines:
        print(f"verdicts.py: there are no runs in {runs}; make some with grid.py", file=sys.stderr)
        return 2
    found = found_in(lines, task, arguments.steps)
    if not found.seeds_of(LORA):
        print(
            f"verdicts.py: {runs} has no test run of LoRA at r = 16 in {arguments.steps} steps, which all "
            "others are measured by; go on with grid.py",
            file=sys.stderr,
        )
        return 2
    text = results(found, runs, arguments.speed or HERE / "speed.jsonl")
    out.mkdir(parents=True, exist_ok=True)
    (out / "results.md").write_text(text)
    draw_recovery(found, out / "recovery.png")
    draw_tuning(found, out / "tuning.png")
    print(text, end="")
    return 0


def found_in(lines: Mapping[str, Mapping[str, Any]], task: Task, steps: int) -> Found:
    """Of all arms of the task."""
    return Found(Queue(Protocol.of(task, steps), [core_groups(task), extra_groups(task)]), lines)


class Found:
    """The test runs at the frozen learning rates."""

    def __init__(self, queue: Queue, lines: Mapping[str, Mapping[str, Any]]) -> None:
        self.queue, self.lines = queue, lines
        self.groups = [group for block in queue.blocks for group in block if queue.tuning_losses(group, lines)]

    def runs_of(self, group: Group) -> dict[int, Mapping[str, Any]]:
        """{seed: line}, failed ones included."""
        cells = self.queue.test_cells(group, self.lines)
        return {cell.seed: self.lines[cell.key] for cell in cells if cell.key in self.lines}

    def seeds_of(self, group: Group) -> dict[int, float]:
        """{seed: test loss} of the runs that did not fail."""
        return {seed: line["loss"] for seed, line in self.runs_of(group).items() if "failed" not in line}

    @property
    def base_loss(self) -> float:
        """That of the first seed: between devices it differs by rounding."""
        return next(line["base_loss"] for line in self.runs_of(LORA).values() if "failed" not in line)

    @property
    def gap(self) -> float:
        """Between the base and LoRA at r = 16, the mean over its seeds."""
        return self.base_loss - statistics.mean(self.seeds_of(LORA).values())

    def recovery(self, group: Group) -> dict[int, float]:
        """{seed: share of the gap}."""
        return {seed: (self.base_loss - loss) / self.gap for seed, loss in self.seeds_of(group).items()}

    def differences(self, group: Group, rival: Group) -> list[float]:
        """Test loss minus that of the rival, in shares of the gap, of the seeds that both have."""
        own, other = self.seeds_of(group), self.seeds_of(rival)
        return [(own[seed] - other[seed]) / self.gap for seed in sorted(own.keys() & other.keys())]

    def undecidable(self, groups: Sequence[Group]) -> str | None:
        """Why their runs cannot decide a hypothesis: None if all are there, went well and were made alike."""
        runs = [line for group in groups for line in self.runs_of(group).values()]
        if len(runs) < len(groups) * len(self.queue.protocol.seeds):
            return "open: runs are missing"
        if failed := sum("failed" in line for line in runs):
            return f"not shown: {failed} of its runs failed"
        if len({(line["device"], line["sources"]) for line in runs}) > 1:
            return "open: its runs are of several devices or sources"
        return None


# --------------------------------------------------------------------------------------------------------- hypotheses


@dataclass(frozen=True)
class Hypothesis:
    """SoRA's test loss minus a rival's is below `margin` of the gap; against each of `rivals`."""

    name: str
    says: str
    size: float
    rivals: tuple[Group, ...]
    margin: float = 0.0


def hypotheses(task: Task = GSM8K_ANSWERS) -> list[Hypothesis]:
    """H1 to H3 of README.md, those of a task being a family that is corrected together."""
    found = [
        Hypothesis("H1", f"not inferior to LoRA at r = 16 (margin {MARGIN:.0%} of the gap)", 0.70, (LORA,), MARGIN)
    ]
    for size in CORE_SIZES:
        uniform, svd, svd4 = (Group(size, arm) for arm in ("uniform", "svd", "svd4"))
        found.append(Hypothesis(f"H2 at {size:.0%}", "better than LoRA of its size", size, (uniform,)))
        if {svd.arm, svd4.arm} <= set(task.rivals):
            found.append(Hypothesis(f"H3 at {size:.0%}", "better than either SVD arm", size, (svd, svd4)))
    return found


def verdict_table(found: Found) -> str:
    """A row per hypothesis: p of the family, or why nothing is decided."""
    better, worse, reasons = {}, {}, {}
    asked = hypotheses(found.queue.protocol.task)
    for h in asked:
        own = Group(h.size, "sora")
        reasons[h.name] = found.undecidable([own, *h.rivals])
        better[h.name] = worse[h.name] = 1.0
        if reasons[h.name] is None:
            shifted = [[d - h.margin for d in found.differences(own, rival)] for rival in h.rivals]
            # Better than all of them is rejected with the largest p (an intersection-union test); worse than one of
            # them with the smallest, times their number.
            better[h.name] = max(sign_flip_p(pairs) for pairs in shifted)
            worse[h.name] = min(1.0, len(shifted) * min(sign_flip_p([-d for d in pairs]) for pairs in shifted))
    adjusted, opposite = holm(better), holm(worse)
    rows = ["| | SoRA is | against | p | p, Holm | verdict |", "|---|---|---|---|---|---|"]
    for h in asked:
        shown = [h.name, h.says, ", ".join(map(str, h.rivals))]
        if reason := reasons[h.name]:
            rows.append(f"| {' | '.join(shown)} | | | {reason} |")
            continue
        verdict = "not shown"
        if adjusted[h.name] <= LEVEL:
            verdict = "**holds**"
        elif opposite[h.name] <= LEVEL:
            verdict = "**the opposite**"
        rows.append(f"| {' | '.join(shown)} | {better[h.name]:.4f} | {adjusted[h.name]:.4f} | {verdict} |")
    return "\n".join(rows)


def difference_table(found: Found) -> str:
    """Paired differences: everybody's from LoRA at r = 16, SoRA's from all others of its size and from itself uncut
    (`balanced`), and of `balanced` from each of its parts."""
    rows = ["| arm | against | pairs | mean difference, % of the gap (95 %) | p, better | p, within the margin |"]
    rows += ["|---|---|---|---|---|---|"]
    pairs = [(group, LORA) for group in found.groups if group != LORA]
    pairs += [(BALANCED, Group(WHOLE, part)) for part in PARTS]
    for size in sorted({group.size for group in found.groups} - {WHOLE}):
        own = Group(size, "sora")
        pairs += [(own, group) for group in found.groups if group.size == size and group != own]
        pairs += [(own, BALANCED)]
    for group, rival in pairs:
        if differences := found.differences(group, rival):
            low, high = bootstrap_interval(differences)
            mean = f"{100 * statistics.mean(differences):+.2f} ({100 * low:+.2f} … {100 * high:+.2f})"
            within = sign_flip_p([d - MARGIN for d in differences])
            rows.append(
                f"| {group} | {rival} | {len(differences)} | {mean} | {sign_flip_p(differences):.4f} | {within:.4f} |"
            )
    return "\n".join(rows)


# ------------------------------------------------------------------------------------------------------------- tables


def results(found: Found, runs_file: Path, speed_file: Path) -> str:
    """results.md."""
    protocol = found.queue.protocol
    task = protocol.task
    files, option, up = (
        ((runs_file, speed_file), "", "") if task.is_first else ((runs_file,), f" --task {task.name}", "../")
    )
    made = [line for line in found.lines.values() if line["protocol"] == protocol.fields]
    devices = Counter(line["device"] for line in made)
    origin = Counter(f"{line['sources']}" for line in made)
    failed = [line for file in files for line in read_all(file) if "failed" in line]
    parts = [
        "# Results",
        f"Written by `python benchmarks/quality/verdicts.py{option}`; what is compared and how: "
        f"[README.md]({up}README.md). "
        f"{len(made)} runs of {protocol.steps} steps ({listed(devices)}; sources {listed(origin)}). Base: test "
        f"loss {found.base_loss:.4f}; the gap to LoRA at r = 16 is {found.gap:.4f} nats.",
        "## Verdicts",
        verdict_table(found),
        speed_section(speed_file, speed_pairs(found.queue, found.lines)) if task.is_first else "",
        "## Paired differences",
        difference_table(found),
        "A difference below 0 is in favour of the arm named first. p is one-sided, of the exact paired sign-flip test, "
        f"not corrected: that the arm is better, and that it is worse by less than {MARGIN:.0%} of the gap.",
        "## Test loss by arm and size",
        size_table(found),
        "Recovery is (base − loss) / gap; the interval is a bootstrap over seeds. The seeds' spread is shared by the "
        "arms: for a comparison take the paired differences.",
        "## Every seed",
        seed_table(found),
        "## Learning rates",
        tuning_table(found),
        "Mean tuning loss over the tuning seeds; bold is the frozen rate.",
        "## Failed runs",
        failures(failed),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def listed(counts: Mapping[str, int]) -> str:
    """ "A" where all are alike, else "A (300), B (12)"."""
    if len(counts) == 1:
        return next(iter(counts))
    return ", ".join(f"{name} ({count})" for name, count in counts.items())


def size_table(found: Found) -> str:
    rows = ["| arm | size | parameters | learning rate | seeds | test loss (sd) | recovery (95 %) |"]
    rows += ["|---|---|---|---|---|---|---|"]
    for group in sorted(found.groups, key=lambda group: -group.size):
        losses, recovery = list(found.seeds_of(group).values()), list(found.recovery(group).values())
        if not losses:
            continue
        kept = sorted({line["kept_params"] for line in found.runs_of(group).values() if "failed" not in line})
        span = f"{kept[0]:,}" if len(kept) == 1 else f"{kept[0]:,} … {kept[-1]:,}"
        spread = f" ({statistics.stdev(losses):.4f})" if len(losses) > 1 else ""
        low, high = bootstrap_interval(recovery)
        shown = f"{statistics.mean(recovery):.1%} ({low:.1%} … {high:.1%})"
        rate = found.queue.tuned(group, found.lines)
        rows.append(
            f"| {group.arm} | {group.size:.0%} | {span} | {rate:g} | {len(losses)} | "
            f"{statistics.mean(losses):.4f}{spread} | {shown} |"
        )
    return "\n".join(rows)


def seed_table(found: Found) -> str:
    seeds = found.queue.protocol.seeds
    rows = ["| arm | " + " | ".join(map(str, seeds)) + " |", "|---|" + "---|" * len(seeds)]
    for group in found.groups:
        runs = found.runs_of(group)
        if runs:
            cells = [
                "failed" if "failed" in runs.get(s, {}) else f"{runs[s]['loss']:.4f}" if s in runs else ""
                for s in seeds
            ]
            rows.append(f"| {group} | " + " | ".join(cells) + " |")
    return "\n".join(rows)


def tuning_table(found: Found) -> str:
    losses = {group: found.queue.tuning_losses(group, found.lines) for group in found.groups}
    rates = sorted({rate for own in losses.values() for rate in own})
    rows = ["| arm | " + " | ".join(f"{rate:g}" for rate in rates) + " |", "|---|" + "---|" * len(rates)]
    for group, own in losses.items():
        best = found.queue.tuned(group, found.lines)
        cells = []
        for rate in rates:
            text = "" if rate not in own else "failed" if math.isinf(own[rate]) else f"{own[rate]:.3f}"
            cells.append(f"**{text}**" if rate == best else text)
        rows.append(f"| {group} | " + " | ".join(cells) + " |")
    return "\n".join(rows)


def failures(failed: Sequence[Mapping[str, Any]]) -> str:
    if not failed:
        return "None."
    return "\n".join(
        f"* {line['cell']['arm']} {line['cell']['size']:.0%}, lr {line['cell']['learning_rate']:g}, seed "
        f"{line['cell']['seed']}: {line['failed']}"
        for line in failed
    )


# -------------------------------------------------------------------------------------------------------------- plots


def look_of(index: int) -> dict[str, Any]:
    """Colour and marker of an arm: squares where the ten colours begin anew."""
    return {"color": f"C{index % 10}", "marker": "os"[index // 10], "markerfacecolor": None if index < 10 else "white"}


def draw_recovery(found: Found, file: Path) -> None:
    """Recovery of the gap against kept parameters: means, bootstrap intervals, and every seed."""
    plt = pyplot()
    figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
    for index, arm in enumerate(ARMS):
        xs, ys, errors = [], [], []
        for group in sorted(group for group in found.groups if group.arm == arm):
            recovery = list(found.recovery(group).values())
            if not recovery:
                continue
            kept = [line["kept_params"] for line in found.runs_of(group).values() if "failed" not in line]
            low, high = bootstrap_interval(recovery)
            mean = statistics.mean(recovery)
            xs.append(statistics.mean(kept) * 1.005 ** (index - len(ARMS) / 2))  # beside each other
            ys.append(100 * mean)
            errors.append((100 * (mean - low), 100 * (high - mean)))
            axes.scatter([xs[-1]] * len(recovery), [100 * r for r in recovery], s=6, color=f"C{index}", alpha=0.4)
        if xs:
            bars = list(zip(*errors, strict=True))
            axes.errorbar(xs, ys, yerr=bars, capsize=3, label=arm, **look_of(index))
    axes.axhline(100, color="0.7", linewidth=0.8, zorder=0)
    axes.axhline(100 * (1 - MARGIN), color="0.7", linewidth=0.8, linestyle=":", zorder=0)
    axes.set(xscale="log", xlabel="kept parameters", ylabel="recovered gap, % (dotted: margin of H1)")
    axes.legend()
    figure.savefig(file, dpi=150)


def draw_tuning(found: Found, file: Path) -> None:
    """Mean tuning loss against learning rate, a panel per size."""
    plt = pyplot()
    tried = {rate for group in found.groups for rate in found.queue.tuning_losses(group, found.lines)}
    ticks = [rate for rate in LADDER if rate in tried]
    sizes = sorted({group.size for group in found.groups if group != LORA})
    figure, panels = plt.subplots(
        1, max(1, len(sizes)), figsize=(5 * max(1, len(sizes)), 4), sharey=True, squeeze=False, layout="constrained"
    )
    for axes, size in zip(panels[0], sizes or [WHOLE], strict=True):
        for index, arm in enumerate(ARMS):
            group = LORA if arm == "lora" else Group(size, arm)
            if group in found.groups:
                losses = found.queue.tuning_losses(group, found.lines)
                own = {rate: loss for rate, loss in losses.items() if math.isfinite(loss)}
                axes.plot(list(own), list(own.values()), markersize=4, label=arm, **look_of(index))
        axes.set_xscale("log", base=2)
        axes.set_xticks(ticks, [f"{1000 * tick:g}e-3" for tick in ticks])
        axes.set(xlabel="learning rate", title=f"{size:.0%} of r = 16")
        axes.legend(fontsize="small")
    panels[0][0].set(ylabel="tuning loss, mean over the tuning seeds")
    figure.savefig(file, dpi=150)


def pyplot() -> Any:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    return plt


if __name__ == "__main__":
    sys.exit(main())
