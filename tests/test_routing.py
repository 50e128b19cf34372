"""A base of its own code whose experts are linear layers, each for some tokens only."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
from conftest import shared
from helpers import tiny_llama
from small_runs import Playground, lines
from torch import nn

from sora_llm.inject import adapters, inject_sora
from sora_llm.running.routing_check import check_routing

CODE = """
from torch import nn
from transformers import LlamaForCausalLM

class Experts(nn.Module):
    def __init__(self, size):
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(size, size, bias=False) for _ in range(3))

    def forward(self, x):
        which, out = x[..., 0].sign().long() + 1, 0
        for number in which.unique().tolist():
            out = out + self.experts[number](x) * (which == number)[..., None]
        return out

class ExpertsForCausalLM(LlamaForCausalLM):
    def __init__(self, config):
        super().__init__(config)
        for layer in self.model.layers:
            layer.mlp = Experts(config.hidden_size)
        self.post_init()
"""


@pytest.fixture(scope="module")
def experts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, object]:
    """The options of a run on a random base of this code."""
    folder = tmp_path_factory.mktemp("base") / "experts"
    own_code: dict[str, type[nn.Module]] = {}
    exec(CODE, own_code)
    model = own_code["ExpertsForCausalLM"](tiny_llama(vocab_size=512, max_position_embeddings=256).config)
    model.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        if (source := shared("models/stories260k") / name).exists():
            shutil.copyfile(source, folder / name)
    (folder / "modeling_experts.py").write_text(CODE)
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {"AutoModelForCausalLM": "modeling_experts.ExpertsForCausalLM"}
    (folder / "config.json").write_text(json.dumps(config))
    return {"model.name_or_path": str(folder), "model.trust_remote_code": True}


def ranks(run_dir: Path) -> dict[str, int]:
    return lines(run_dir, "ranks.jsonl")[-1]["ranks"]


def test_one_process_trains_experts(ground: Playground, experts: dict[str, object]) -> None:
    """Their last names are numbers, as those of whole blocks: the exported config has them in full."""
    assert ground.codes("alone", 1, **experts) == [0]
    assert sum(".experts." in name for name in ranks(ground.run_dir("alone"))) == 6


def test_processes_that_average_gradients_of_different_experts_are_refused(
    ground: Playground, experts: dict[str, object]
) -> None:
    """Under ZeRO-1 and 2 one expert's gradients would be added to another's: ΔW was off by 23 % after three steps."""
    children = ground.start("two", 2, **experts)
    assert [child.wait() for child in children] == [2, 2]
    assert re.search(r"a token can miss model\.layers\.0\.mlp\.experts\.\d and 3 others", children[0].output)


def test_replicas_that_step_on_their_own_train_experts(ground: Playground, experts: dict[str, object]) -> None:
    local = {"distributed.strategy": "ddp", "distributed.sync_every": 2}
    assert ground.codes("local", 2, **experts, **local) == [0, 0]
    assert sum(".experts." in name for name in ranks(ground.run_dir("local"))) == 6


def test_a_model_whose_tokens_pass_every_layer_is_not_refused() -> None:
    model = inject_sora(tiny_llama(), r=2)
    check_routing(model)
    assert not any(layer._forward_pre_hooks for layer in adapters(model).values())
