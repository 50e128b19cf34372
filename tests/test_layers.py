"""Imports point down only, and every outside library has its one home."""

import ast
import graphlib
import sys
from pathlib import Path

import pytest

import sora_llm

PACKAGE = Path(sora_llm.__file__).parent
# From the bottom up; a module imports only from the lines below its own. `config` stands beside them all.
LAYERS = [
    {"errors", "terminal", "row_types", "values"},
    {"files", "stop", "lifeline", "hub"},
    {"extensions"},
    {
        "topology",
        "sora",
        "schedule",
        "factors",
        "hashes",
        "allocation",
        "budget",
        "activations",
        "step_time",
        "loss_scale",
    },
    {"consensus", "targets", "optim", "alarms"},
    {"inject"},
    {"merge", "local_updates", "lora_files", "spectrum", "gguf_lora"},
    {"consumers"},
    {"card"},
    {"distributed", "quantised"},
    {"backbone"},
    {"data", "checkpoint", "run_state", "report", "export", "merged"},
    {"report_page", "gguf_export", "merged_export"},
    {"evaluation", "packing_proof", "pipeline", "verified_export", "memory"},
    {"generation", "loop", "rundir", "steering", "rounds", "unpack"},
    {"prompt_form"},
    {"inputs"},
    {"training_data", "layouts"},
    {"data_words", "plan"},
    {"job"},
    {"training"},
    {"snapshot", "measures"},
    {"start"},
    {"assembly"},
    {"ending", "stages"},
    {"rehearsal"},
    {"train", "commands"},
    {"cli"},
    {"__main__"},
]
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}
ALGORITHM = [
    *(
        "sora",
        "schedule",
        "factors",
        "hashes",
        "allocation",
        "activations",
        "step_time",
        "budget",
        "consensus",
        "loss_scale",
    ),
    *("merge", "local_updates", "spectrum", "optim", "inject"),
]


def modules() -> dict[str, Path]:
    """{dotted name below sora_llm: file}."""
    return {
        ".".join(path.relative_to(PACKAGE).with_suffix("").parts): path
        for path in sorted(PACKAGE.rglob("*.py"))
        if path != PACKAGE / "__init__.py"
    }


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


def siblings(path: Path) -> set[str]:
    """Which parts of sora_llm a file imports: "sora", "data", …"""
    below = {name.split(".")[1] for name in imports(path) if name.startswith("sora_llm.")}
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
    part = name.split(".")[0]
    if part == "config":
        assert siblings(modules()[name]) <= {"errors", "row_types"}
        return
    assert part in LEVEL, f"{part} has no place in the layers: put it into DESIGN's order and into LAYERS"
    for other in siblings(modules()[name]) - {part, "config"}:
        assert LEVEL[other] < LEVEL[part], f"{name} imports {other}, which is not below it"


def test_the_config_is_imported_by_those_who_unpack_it_alone():
    assert {name.split(".")[0] for name in importers("sora_llm.config")} <= {
        "unpack",
        "prompt_form",
        "inputs",
        "training_data",
        "data_words",
        "plan",
        "job",
        "snapshot",
        "start",
        "ending",
        "train",
        "commands",
    }


@pytest.mark.parametrize("name", ALGORITHM)
def test_the_algorithm_imports_torch_alone(name):
    outside = {found.split(".")[0] for found in imports(modules()[name])} - set(sys.stdlib_module_names)
    assert outside <= {"torch", "sora_llm"}


@pytest.mark.parametrize(
    ("libraries", "homes"),
    [
        (("deepspeed", "accelerate"), {"distributed.group", "distributed.engine"}),
        (("torch.distributed",), {"distributed.collectives", "distributed.group", "distributed.replicas"}),
        (("yaml",), {"config"}),
        (("bitsandbytes",), {"backbone", "quantised"}),
        (("peft",), {"export", "targets"}),
        (("huggingface_hub",), {"hub"}),
        (("gguf",), {"gguf_lora"}),
        (("matplotlib",), {"report_page.plots"}),
    ],
)
def test_a_library_is_known_in_one_place(libraries, homes):
    assert importers(*libraries) <= homes


def test_modules_do_not_import_each_other_in_circles():
    """Also inside packages, of which the layers see the whole alone; imports inside functions count."""
    known = modules()
    graph = {}
    for name, path in known.items():
        found = {other.removeprefix("sora_llm.") for other in imports(path) if other.startswith("sora_llm.")}
        graph[name] = {part for other in found for part in (other, other.rpartition(".")[0]) if part in known}
    order = list(graphlib.TopologicalSorter(graph).static_order())
    assert order.index("distributed.collectives") < order.index("distributed.engine"), "it sees what is inside packages"


def test_the_package_is_imported_without_torch():
    """So that `sora-llm --help` answers at once."""
    tree = ast.parse((PACKAGE / "__init__.py").read_text(encoding="utf-8"))
    at_run_time = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
    assert {node.module for node in at_run_time} == {"importlib", "typing"}
