"""The names of the files in a run directory, on which other tools rely."""

from __future__ import annotations

CONFIG = "config.yaml"
ENV = "env.json"
CHAT_TEMPLATE = "chat_template.jinja"
"""As the run read it, if its config names a file; with an adapter, the one that it was trained with."""
STATUS = "status.json"
METRICS = "metrics.jsonl"
RANKS = "ranks.jsonl"
SAMPLES = "samples.jsonl"
DATA_REPORT = "data_report.json"
"""May be left by `preprocess` before there is a run."""
REPORT = "report.html"
STOP = "STOP"
"""A request to stop; removed by the run that obeys it."""
LOCK = ".lock"
"""Held by the process that writes the directory."""
FILES = (CONFIG, ENV, CHAT_TEMPLATE, STATUS, METRICS, RANKS, SAMPLES, DATA_REPORT, REPORT)

ADAPTER_CONFIG, ADAPTER_WEIGHTS, CERTIFICATE = "adapter_config.json", "adapter_model.safetensors", "certificate.json"
"""Of an exported LoRA, in a run directory or not."""
CHECKPOINT_STATE = "state.json"

ADAPTER = "adapter"
CHECKPOINTS = "checkpoints"
PATH = "path"
PLOTS = "plots"
TRACKERS = "trackers"
FOLDERS = (ADAPTER, CHECKPOINTS, PATH, PLOTS, TRACKERS)


def stage_name(sparse_lambda: float) -> str:
    """The folder of a stage in path/, and the name by which it is requested."""
    return f"{sparse_lambda:.6g}"
