"""Imports point down only, and every outside library has its one home."""

import ast
import functools
import graphlib
import sys
from pathlib import Path

import pytest

import sora_llm

PACKAGE = Path(sora_llm.__file__).parent
GROUPS = ("artifacts", "estimates", "running")
"""Packages whose modules have places of their own; the others have one as a whole."""
# From the bottom up; a module imports only from the lines below its own.  `config` stands beside them all.
LAYERS = """
errors terminal row_types values run_files
arguments files hub running.stop running.liveness
extensions artifacts.certificate
compiled
topology factors hashes weights_digest wrappers
sora schedule allocation loss_scale head_loss
base_spec budget estimates.activations estimates.step_time
consensus targets running.alarms running.early_stopping
inject quantised reread_weights causal_loss
optim merge local_updates spectrum artifacts.lora_files artifacts.gguf_lora
artifacts.consumers
artifacts.card artifacts.logit_check
distributed
sparsity_controller
base_files
backbone
peft_check
data checkpoint report export artifacts.merged running.run_state
report_page artifacts.gguf_export artifacts.merged_export
pipeline estimates.memory running.evaluation running.packing_check running.routing_check running.verified_export
rank_scheduler generation running.optimizer_step running.rundir running.rounds running.unpack
prompt_format
running.run_folders
running.inputs
running.training_data running.data_lineage
running.held_out
running.data_summary running.plan running.processes
running.job running.layouts
running.training running.config_warnings
running.summary
running.snapshot running.metrics
running.start
running.assembly
running.finish running.training_loop
running.dry_run
train commands
cli
__main__
"""
LEVEL = {name: level for level, line in enumerate(LAYERS.split("\n")) for name in line.split()}
ALGORITHM = [
    *("sora", "schedule", "factors", "hashes", "allocation", "budget", "consensus", "loss_scale", "merge"),
    *("local_updates", "spectrum", "optim", "inject", "wrappers", "estimates.activations", "estimates.step_time"),
]


def modules() -> dict[str, Path]:
    """{dotted name below sora_llm: file}."""
    return {
        ".".join(path.relative_to(PACKAGE).with_suffix("").parts): path
        for path in sorted(PACKAGE.rglob("*.py"))
        if path != PACKAGE / "__init__.py"
    }


@functools.cache
def imports(path: Path) -> set[str]:
    """The full names of everything a file imports, wherever in the file: "sora_llm.sora", "torch.distributed"."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports relatively"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def part_of(name: str) -> str:
    """What has a place in the layers: "data" for "data.formats", and "running.job" as it is."""
    first, *rest = name.split(".")
    return ".".join([first, *rest[:1]]) if first in GROUPS else first


def siblings(path: Path) -> set[str]:
    """Which parts of sora_llm a file imports: "sora", "data", "running.job", …"""
    below = {part_of(name.removeprefix("sora_llm.")) for name in imports(path) if name.startswith("sora_llm.")}
    return below - {"__version__"}


def importers(*prefixes: str) -> set[str]:
    """The modules that import one of these libraries or a part of it."""
    return {
        name
        for name, path in modules().items()
        if any(found == p or found.startswith(p + ".") for found in imports(path) for p in prefixes)
    }


@pytest.mark.parametrize("name", modules())
def test_a_module_imports_only_from_the_layers_below_it(name):
    part = part_of(name)
    if name in {f"{group}.__init__" for group in GROUPS}:
        assert not imports(modules()[name])
        return
    if part == "config":
        assert siblings(modules()[name]) <= {"config", "errors", "row_types"}
        return
    assert part in LEVEL, f"{part} has no place in the layers: put it into the table of CONTRIBUTING.md and into LAYERS"
    for other in siblings(modules()[name]) - {part, "config"}:
        assert LEVEL[other] < LEVEL[part], f"{name} imports {other}, which is not below it"


def test_the_layers_name_the_parts_there_are_and_each_once():
    parts = {part_of(name) for name in modules()} - {"config"} - {f"{group}.__init__" for group in GROUPS}
    assert sorted(LAYERS.split()) == sorted(parts)


def test_the_config_is_imported_by_those_who_unpack_it_alone():
    before = [
        "unpack",
        "run_folders",
        "inputs",
        "data_lineage",
        "held_out",
        "training_data",
        "data_summary",
        "plan",
        "processes",
        "job",
        "config_warnings",
    ]
    allowed = {
        "config",
        "train",
        "commands",
        "prompt_format",
        *(f"running.{name}" for name in [*before, "snapshot", "start", "finish"]),
    }
    assert {part_of(name) for name in importers("sora_llm.config")} == allowed


@pytest.mark.parametrize("name", modules())
def test_a_module_imports_a_name_from_where_it_is_defined(name):
    """Not from a module that itself imports it, except from a package's __init__."""
    known = modules()
    for found in imports(known[name]):
        home, _, thing = found.removeprefix("sora_llm.").rpartition(".")
        if found.startswith("sora_llm.") and home in known:
            others = [other for other in imports(known[home]) if other.rpartition(".")[2] == thing]
            assert not others, f"{name} imports {thing} from {home}, which has it from {others[0]}"


@pytest.mark.parametrize("name", ALGORITHM)
def test_the_algorithm_imports_torch_alone(name):
    outside = {found.split(".")[0] for found in imports(modules()[name])} - set(sys.stdlib_module_names)
    assert outside <= {"torch", "sora_llm"}


@pytest.mark.parametrize(
    ("libraries", "homes"),
    [
        (("deepspeed", "accelerate"), {"distributed.group", "distributed.engine", "distributed.zero"}),
        (("torch.distributed",), {"distributed.collectives", "distributed.group", "distributed.replicas"}),
        (("yaml",), {"config.yaml_text"}),
        (("bitsandbytes",), {"backbone", "quantised", "reread_weights"}),
        (("peft",), {"export", "peft_check", "targets"}),
        (("huggingface_hub",), {"hub"}),
        (("gguf",), {"artifacts.gguf_lora"}),
        (("matplotlib",), {"report_page.plots"}),
    ],
)
def test_a_library_is_known_in_one_place(libraries, homes):
    assert importers(*libraries) == homes


def module_of(imported, known):
    """The module that "data.formats.Message", "data.formats" or, of a package itself, "data" is in; None for what the
    package's own __init__ has."""
    parent = imported.rpartition(".")[0]
    candidates = (imported, f"{imported}.__init__", parent, f"{parent}.__init__")
    return next((name for name in candidates if name in known), None)


def test_modules_do_not_import_each_other_in_circles():
    """Also inside packages, of which the layers see the whole alone; imports inside functions count."""
    known = modules()
    graph = {}
    for name, path in known.items():
        found = {other.removeprefix("sora_llm.") for other in imports(path) if other.startswith("sora_llm.")}
        graph[name] = {module_of(other, known) for other in found} - {None}
    order = list(graphlib.TopologicalSorter(graph).static_order())
    assert order.index("distributed.collectives") < order.index("distributed.engine"), "it sees what is inside packages"


def test_the_package_is_imported_without_torch():
    """So that `sora-llm --help` answers at once."""
    tree = ast.parse((PACKAGE / "__init__.py").read_text(encoding="utf-8"))
    at_run_time = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
    assert {node.module for node in at_run_time} == {"importlib", "typing"}
