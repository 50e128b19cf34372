"""`sora-llm generate` and `chat`: whom they ask, and what they say."""

from __future__ import annotations

import io
import json
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from conversations import HEADINGS
from helpers import randomise_all
from peft import PeftModel
from peft_loras import lora as lora
from run_dirs import run_dir
from transformers import AutoModelForCausalLM, AutoTokenizer

from sora_llm import checkpoint, cli
from sora_llm.commands import cmd_chat
from sora_llm.commands.inference import generation_parser, sampling_of
from sora_llm.config import load_config, to_dict
from sora_llm.errors import UserError
from sora_llm.export import export_adapter
from sora_llm.generation import Sampling
from sora_llm.inject import adapter_parameters, inject_sora

PROMPT = "Once upon a time"
SHORT = ["--max-new-tokens", "12", "--temperature", "0"]


def greedy(model: Any, stories: Path, prompt: str) -> str:
    """What transformers says after a plain prompt."""
    tokenizer = AutoTokenizer.from_pretrained(stories)
    ids = tokenizer(prompt, return_tensors="pt").input_ids
    output = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False)
    return tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True).strip()


def generate(capsys: pytest.CaptureFixture[str], *arguments: object) -> dict[str, Any]:
    assert cli.main(["generate", *map(str, arguments), *SHORT, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_base_and_adapter_answer_as_they_do_in_transformers_and_peft(stories, lora, capsys):
    found = generate(capsys, lora, "--prompt", PROMPT, "--prompt", "Tim had a red", "--compare")
    base = AutoModelForCausalLM.from_pretrained(stories, dtype=torch.float32)
    expected = [{"prompt": prompt, "base": greedy(base, stories, prompt)} for prompt in (PROMPT, "Tim had a red")]
    adapted = PeftModel.from_pretrained(base, str(lora))
    for line in expected:
        line["adapted"] = greedy(adapted, stories, line["prompt"])
        assert line["adapted"] != line["base"]
        line["finish_reason"] = {"base": "length", "adapted": "length"}
    assert found == {"base_model": str(stories), "adapter": str(lora), "answers": expected}
    (alone,) = generate(capsys, lora, "--prompt", PROMPT, "--no-adapter")["answers"]
    assert alone == {"prompt": PROMPT, "answer": expected[0]["base"], "finish_reason": "length"}


def test_a_whole_model_is_asked_and_measured_as_its_certificate_says(stories, lora, tmp_path, capsys):
    """A merged one: no adapter, no separate base, and after prompts what training put there."""
    (base,) = generate(capsys, lora, "--prompt", PROMPT, "--no-adapter")["answers"]
    assert generate(capsys, stories, "--prompt", PROMPT) == {
        "base_model": str(stories),
        "adapter": None,
        "answers": [base],
    }
    merged = tmp_path / "merged"
    shutil.copytree(stories, merged)
    merged.chmod(0o755)
    certificate = {"layout": "merged", "modules": {}, "separator": " and"}
    (merged / "certificate.json").write_text(json.dumps(certificate))
    (found,) = generate(capsys, merged, "--prompt", "Once upon a time there was a dog")["answers"]
    (expected,) = generate(capsys, stories, "--prompt", "Once upon a time there was a dog and")["answers"]
    assert found["answer"] == expected["answer"]
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"prompt": "Once upon a time", "completion": " there was a dog."}))
    losses = []
    for extra in ([], ["--separator", ""]):
        arguments = ["evaluate", merged, "--data", rows, "--type", "prompt_completion", "--json", *extra]
        assert cli.main([str(argument) for argument in arguments]) == 0
        losses.append(json.loads(capsys.readouterr().out)["model"]["loss"])
    assert losses[0] != losses[1]
    for wrong, said in (
        (["--compare"], "needs an adapter"),
        (["--base", str(stories)], "whole model without a separate base"),
    ):
        assert cli.main(["generate", str(merged), "--prompt", "a", *wrong]) == 2
        assert said in capsys.readouterr().err


def test_the_terminal_shows_the_same(lora, capsys):
    (expected,) = generate(capsys, lora, "--prompt", PROMPT)["answers"]
    assert cli.main(["generate", str(lora), "--prompt", PROMPT, *SHORT]) == 0
    shown = capsys.readouterr()
    assert shown.out == expected["answer"] + "\n" and "--max-new-tokens" in shown.err


def test_prompts_come_from_files_and_standard_input(lora, tmp_path, capsys, monkeypatch):
    (tmp_path / "a.txt").write_text(f"{PROMPT}\n\nTim\n")
    (tmp_path / "b.jsonl").write_text(json.dumps({"prompt": PROMPT}) + "\n")
    (expected,) = generate(capsys, lora, "--prompt", PROMPT)["answers"]
    assert generate(capsys, lora, "--prompts-file", tmp_path / "a.txt")["answers"][0] == expected
    assert generate(capsys, lora, "--prompts-file", tmp_path / "b.jsonl")["answers"] == [expected]
    odd = f"{PROMPT}\u2028there\x85was"  # the ends of lines to str.splitlines, and to no data file
    (tmp_path / "c.jsonl").write_text(json.dumps({"prompt": odd}, ensure_ascii=False) + "\r\n")
    (tmp_path / "c.txt").write_text(f"{odd}\r\nTim\r\n", newline="")
    assert [found["prompt"] for found in generate(capsys, lora, "--prompts-file", tmp_path / "c.jsonl")["answers"]] == [
        odd
    ]
    found = generate(capsys, lora, "--prompts-file", tmp_path / "c.txt")["answers"]
    assert [answer["prompt"] for answer in found] == [odd, "Tim"]
    monkeypatch.setattr("sys.stdin", (tmp_path / "b.jsonl").open())
    assert generate(capsys, lora)["answers"][0]["prompt"] == json.dumps({"prompt": PROMPT})
    (tmp_path / "D.JSONL").write_text((tmp_path / "b.jsonl").read_text())
    assert generate(capsys, lora, "--prompts-file", tmp_path / "D.JSONL")["answers"] == [expected]
    (tmp_path / "e.json").write_text(json.dumps([{"prompt": PROMPT}]))
    assert cli.main(["generate", str(lora), "--prompts-file", str(tmp_path / "e.json")]) == 2
    assert "is neither .txt (a prompt per line) nor .jsonl" in capsys.readouterr().err


def test_a_prompt_of_a_file_may_have_a_system_message(lora, tmp_path, capsys):
    row, asked = {"system": "Be brief.", "prompt": PROMPT}, tmp_path / "a.jsonl"
    form = ("--chat-template", "chatml", "--prompts-file", asked)
    asked.write_text(json.dumps(row))
    (found,) = generate(capsys, lora, *form)["answers"]
    roles = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": PROMPT}]
    asked.write_text(json.dumps({"messages": roles}))
    (expected,) = generate(capsys, lora, *form)["answers"]
    assert found == {**row, "answer": expected["answer"], "finish_reason": expected["finish_reason"]}
    asked.write_text("\n".join(json.dumps({"system": text, "prompt": PROMPT}) for text in ("", "  ")))
    empty, blank = generate(capsys, lora, *form)["answers"]
    assert blank == empty and blank["answer"] != found["answer"], "as the rows that were trained on"
    asked.write_text(json.dumps({"prompt": PROMPT, "tools": [{"name": "f", "parameters": {}}]}))
    assert cli.main(["generate", str(lora), *map(str, form)]) == 2
    assert f"{asked}:1 has tools, which cannot be called here" in capsys.readouterr().err


def test_a_run_is_asked_as_it_was_trained(stories, lora, tmp_path, capsys):
    """Its template or its separator, also by the adapter's own folder and by the config that it came from."""
    run = run_dir(tmp_path / "run", **{"data.chat_template": "alpaca", "data.datasets": _alpaca(tmp_path)})
    shutil.copytree(lora, run / "adapter")
    preamble = (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request."
    )
    written = f"{preamble}\n\n### Instruction:\n{PROMPT}\n\n### Response:\n"
    (expected,) = generate(capsys, lora, "--raw", "--prompt", written)["answers"]
    for place in (run, run / "adapter", run / "config.yaml"):
        (found,) = generate(capsys, place, "--prompt", PROMPT)["answers"]
        assert found["answer"] == expected["answer"], place
    dialogue = [{"role": "user", "content": PROMPT}]
    (tmp_path / "asked.jsonl").write_text(json.dumps({"messages": dialogue}))
    (found,) = generate(capsys, run, "--prompts-file", tmp_path / "asked.jsonl")["answers"]
    assert found == {"messages": dialogue, "answer": expected["answer"], "finish_reason": "length"}
    (tmp_path / "rows.jsonl").write_text(json.dumps({"instruction": PROMPT, "input": "", "output": "x"}))
    (found,) = generate(capsys, run, "--prompts-file", tmp_path / "rows.jsonl")["answers"]
    assert found == {"instruction": PROMPT, "answer": expected["answer"], "finish_reason": "length"}
    asked = {"instruction": PROMPT, "input": "Tim"}
    (tmp_path / "rows.jsonl").write_text(json.dumps(asked))
    preamble = preamble.replace("a task.", "a task, paired with an input that provides further context.")
    written = f"{preamble}\n\n### Instruction:\n{PROMPT}\n\n### Input:\nTim\n\n### Response:\n"
    (expected,) = generate(capsys, lora, "--raw", "--prompt", written)["answers"]
    (found,) = generate(capsys, run, "--prompts-file", tmp_path / "rows.jsonl")["answers"]
    assert found == {**asked, "answer": expected["answer"], "finish_reason": "length"}
    plain = run_dir(tmp_path / "plain", **{"data.datasets": [_completion(tmp_path)]})
    shutil.copytree(lora, plain / "adapter")
    (expected,) = generate(capsys, lora, "--raw", "--prompt", "Tim had\n")["answers"]
    (found,) = generate(capsys, plain, "--prompt", "Tim had")["answers"]
    assert found["answer"] == expected["answer"]
    assert cli.main(["export", str(plain / "adapter"), "--out", str(tmp_path / "exported")]) == 0
    capsys.readouterr()
    assert cli.main(["export", str(tmp_path / "exported"), "--layout", "ragged", "--out", str(tmp_path / "again")]) == 0
    capsys.readouterr()
    for place in ("exported", "again"):
        (found,) = generate(capsys, tmp_path / place, "--prompt", "Tim had")["answers"]
        assert found["answer"] == expected["answer"], place


def test_an_answer_that_fills_the_model_s_positions_says_so(lora, capsys):
    prompt = "Once upon a time there was " * 80
    assert cli.main(["generate", str(lora), "--raw", "--prompt", prompt, "--max-new-tokens", "500"]) == 0
    assert "the answer was cut off at the model's 512 positions" in capsys.readouterr().err


def _alpaca(folder: Path) -> list[dict[str, Any]]:
    (folder / "rows.jsonl").write_text(json.dumps({"instruction": "a", "output": "b"}))
    return [{"path": str(folder / "rows.jsonl"), "type": "alpaca"}]


def _completion(folder: Path) -> dict[str, Any]:
    return {"path": str(folder / "rows.jsonl"), "type": "prompt_completion", "separator": "\n"}


def test_a_checkpoint_answers_as_the_adapter_that_it_would_become(stories, tmp_path, capsys):
    run = run_dir(tmp_path / "run", **{"sora.r": 4, "sora.lora_alpha": 8})
    model = AutoModelForCausalLM.from_pretrained(stories, dtype=torch.float32)
    inject_sora(model, r=4, lora_alpha=8)
    randomise_all(model, seed=3, size=0.2)
    masters = {name: p.detach().clone() for name, p in adapter_parameters(model).items()}
    state = {"config": to_dict(load_config(run / "config.yaml"))}
    folder = checkpoint.save(run, 7, masters, state)
    assert cli.main(["generate", str(run), "--prompt", PROMPT]) == 2
    assert "name one of its checkpoints" in capsys.readouterr().err
    export_adapter(model, run / "adapter")
    by_checkpoint, by_adapter = (generate(capsys, place, "--prompt", PROMPT, "--compare") for place in (folder, run))
    assert by_checkpoint["answers"] == by_adapter["answers"]
    assert by_adapter["answers"][0]["base"] != by_adapter["answers"][0]["adapted"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["nowhere", "--prompt", "x"], "nowhere does not exist"),
        (["{lora}/..", "--prompt", "x"], "is not a run directory"),
        (["{lora}", "--prompt", " "], "is empty"),
        (["{lora}", "--prompt", "x", "--temperature", "-1"], "--temperature"),
        (["{lora}", "--prompt", "x", "--temperature", "1", "--top-p", "0"], "--top-p is 0"),
        (["{lora}", "--prompt", "x", "--top-p", "0.9"], "--temperature 0 does not sample"),
        (["{lora}", "--prompt", "x", "--seed", "3"], "--seed applies to sampling"),
        (["{lora}", "--prompt", "x", "--max-new-tokens", "0"], "--max-new-tokens"),
        (["{lora}", "--prompt", "x", "--compare", "--no-adapter"], "--compare"),
        (
            ["{lora}", "--prompt", "x", "--chat-template", "nope"],
            "--chat-template 'nope' is neither a built-in template",
        ),
        (["{lora}", "--prompt", "x", "--system", "y"], "--chat-template"),
        (["{lora}", "--prompt", "x", "train.max_steps=5"], "without a config to override"),
        (["{lora}", "--prompt", "x", "--base", "/nope/y"], "--base: there is no folder /nope/y"),
        (["{lora}", "--prompt", "word " * 600], "no room in the model's 512 positions"),
        (["{lora}", "--prompts-file", "/nope.txt"], "cannot be read"),
    ],
)
def test_bad_input_is_a_sentence_before_any_weights_are_loaded(arguments, said, lora, capsys, monkeypatch):
    monkeypatch.setattr(
        "sora_llm.commands.model_ref.load_backbone", lambda *_, **__: pytest.fail("weights were loaded")
    )
    assert cli.main(["generate", *(argument.replace("{lora}", str(lora)) for argument in arguments)]) == 2
    error = capsys.readouterr().err
    assert said in error and "Traceback" not in error


DIALOGUE = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
WITHOUT_SYSTEM = """{%- for m in messages if m.role != 'system' -%}
{{ m.role + ': ' + m.content.split('</think>')[-1] + '\n' }}
{%- endfor -%}"""


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["generate", "--system", "Be brief.", "--prompt", "Hi"], "--system cannot be used"),
        (["chat", "--system", "Be brief."], "--system cannot be used"),
        (["generate", "--prompts-file", "{folder}/p.jsonl"], "p.jsonl:1 cannot be used"),
    ],
)
def test_a_system_message_that_the_template_leaves_out_is_a_sentence_before_any_weights_are_loaded(
    arguments, said, lora, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(
        "sora_llm.commands.model_ref.load_backbone", lambda *_, **__: pytest.fail("weights were loaded")
    )
    (tmp_path / "form.jinja").write_text(WITHOUT_SYSTEM)
    (tmp_path / "p.jsonl").write_text(json.dumps({"messages": DIALOGUE}) + "\n")
    command, *others = (argument.replace("{folder}", str(tmp_path)) for argument in arguments)
    assert cli.main([command, str(lora), "--chat-template", str(tmp_path / "form.jinja"), *others]) == 2
    assert f"{said}: the chat template leaves out the text of system messages" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("row", "said"),
    [
        (
            {"instruction": "Add.", "input": "1 2"},
            "has an input as well as an instruction, which needs a chat template",
        ),
        ({"instruction": "Add.", "tools": [{"name": "f", "parameters": {}}]}, "has tools"),
        ({"instruction": 3}, "p.jsonl:1: instruction"),
        ({"instruction": 3, "messages": None}, "p.jsonl:1: instruction"),
        ({"question": "?"}, "must be "),
        ({"instruction": "Add.", "instances": [{"input": "1 2", "output": "3"}]}, "must be "),
        ({"instruction": "Add.", "messages": [{"role": "assistant", "content": "x"}]}, "ends with the assistant"),
    ],
)
def test_a_row_that_cannot_be_asked_is_a_sentence(row, said, lora, tmp_path, capsys):
    (tmp_path / "p.jsonl").write_text(json.dumps(row))
    assert cli.main(["generate", str(lora), "--raw", "--prompts-file", str(tmp_path / "p.jsonl")]) == 2
    assert said in capsys.readouterr().err


def test_a_dialogue_goes_on_though_the_template_drops_the_thoughts_of_earlier_answers(lora, tmp_path, capsys):
    (tmp_path / "form.jinja").write_text(WITHOUT_SYSTEM)
    thoughts = {"role": "assistant", "content": "<think>Hm.</think>Ho", "reasoning": "Hm."}
    for name, earlier in (("with", thoughts), ("without", {"role": "assistant", "content": "Ho"})):
        row = {"messages": [DIALOGUE[1], earlier, DIALOGUE[1]]}
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(row) + "\n")
    files = (tmp_path / "with.jsonl", tmp_path / "without.jsonl")
    form = ["--chat-template", tmp_path / "form.jinja"]
    found = [generate(capsys, lora, *form, "--prompts-file", file)["answers"][0]["answer"] for file in files]
    assert found[0] == found[1]


# -------------------------------------------------------------------------------------------------- the base alone


def test_the_base_alone_is_spoken_to_as_beside_a_lora_with_a_form_of_its_own(lora, tmp_path, capsys):
    folder = shutil.copytree(lora, tmp_path / "lora")
    (folder / "chat_template.jinja").write_text(HEADINGS)
    (both,) = generate(capsys, folder, "--prompt", "Tim", "--compare")["answers"]
    (alone,) = generate(capsys, folder, "--prompt", "Tim", "--no-adapter")["answers"]
    assert alone["answer"] == both["base"]
    (plain,) = generate(capsys, folder, "--prompt", "Tim", "--no-adapter", "--raw")["answers"]
    assert plain["answer"] != both["base"]


def test_the_base_alone_is_spoken_to_in_the_tokens_of_a_lora_that_brings_a_tokenizer(stories, lora, tmp_path, capsys):
    folder, template = shutil.copytree(lora, tmp_path / "lora"), tmp_path / "headings.jinja"
    template.write_text(HEADINGS)
    AutoTokenizer.from_pretrained(stories).save_pretrained(folder)
    saved = json.loads((folder / "tokenizer.json").read_text())
    vocab = saved["model"]["vocab"]
    vocab["T"], vocab["L"] = vocab["L"], vocab["T"]
    (folder / "tokenizer.json").write_text(json.dumps(saved))
    asked = ["--prompt", "Tim", "--chat-template", template]
    (both,) = generate(capsys, folder, *asked, "--compare")["answers"]
    (alone,) = generate(capsys, folder, *asked, "--no-adapter")["answers"]
    assert alone["answer"] == both["base"]
    (in_other_tokens,) = generate(capsys, lora, *asked, "--no-adapter")["answers"]
    assert in_other_tokens["answer"] != both["base"]


# ------------------------------------------------------------------------------------------------------------- chat


def chatted(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], lines: list[str], *arguments: object):
    """(stdout, stderr) of a chat into which these lines are typed."""
    left = iter(lines)

    def type_line(_prompt: str) -> str:
        line = next(left, None)
        if line is None:
            raise EOFError
        if line == "^C":
            raise KeyboardInterrupt
        return line

    monkeypatch.setattr("builtins.input", type_line)
    assert cli.main(["chat", *map(str, arguments), *SHORT]) == 0
    return capsys.readouterr()


def test_a_chat_remembers_resets_and_turns_the_adapter_off(lora, tmp_path, capsys, monkeypatch):
    template = tmp_path / "all.jinja"
    template.write_text("{% for m in messages %}{{ m.content }} {% endfor %}")
    options = (lora, "--chat-template", template)
    lines = ["Tim", "^C", "", "saw", "/reset", "Tim", "/adapter off", "/reset", "Tim", "/adapter", "/quit", "never"]
    shown = chatted(monkeypatch, capsys, lines, *options)
    first, second, again, base, *rest = shown.out.strip().replace("\n\n", "\n").split("\n")
    assert first == again != base and rest == []
    (by_base,) = generate(capsys, *options, "--prompt", "Tim", "--no-adapter")["answers"]
    (by_adapter,) = generate(capsys, *options, "--prompt", "Tim")["answers"]
    assert (by_base["answer"], by_adapter["answer"]) == (base, first)
    dialogue = [("user", "Tim"), ("assistant", first), ("user", "saw")]
    (tmp_path / "d.jsonl").write_text(json.dumps({"messages": [{"role": r, "content": c} for r, c in dialogue]}))
    (expected,) = generate(capsys, *options, "--prompts-file", tmp_path / "d.jsonl")["answers"]
    assert expected["answer"] == second
    assert shown.err.count("/quit") == 2  # at the start and for what is no command


def test_ctrl_c_stops_the_answer_and_not_the_chat(lora, capsys, monkeypatch):
    shown: list[str] = []

    def show(text: str) -> None:
        shown.append(text)
        if len(shown) == 2:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(cmd_chat, "show", show)
    before = signal.getsignal(signal.SIGINT)  # a shell lets its background jobs ignore it
    heard = chatted(monkeypatch, capsys, [PROMPT, PROMPT], lora)
    assert heard.err.count("sora_llm: stopped") == 1 and heard.err.count("cut off at --max-new-tokens") == 1
    assert len(shown) > 2 + 3, "the next answer was whole"
    assert signal.getsignal(signal.SIGINT) is before


@pytest.mark.parametrize("damage", ["truncated", "pickle"])
def test_a_damaged_adapter_is_a_sentence(damage, stories, tmp_path, capsys):
    folder = tmp_path / "lora"
    folder.mkdir()
    options = {"peft_type": "LORA", "base_model_name_or_path": str(stories), "r": 2, "lora_alpha": 2}
    (folder / "adapter_config.json").write_text(json.dumps({**options, "target_modules": ["q_proj"]}))
    if damage == "truncated":
        (folder / "adapter_model.safetensors").write_bytes(b"\x40\x00\x00\x00\x00\x00\x00\x00{")
    else:
        (folder / "adapter_model.bin").write_bytes(b"\x80\x04.")
    assert cli.main(["generate", str(folder), "--prompt", "Once", "--raw"]) == 2
    assert ("is damaged" if damage == "truncated" else "safetensors alone") in capsys.readouterr().err


@pytest.mark.parametrize("form", [[], ["--chat-template", "alpaca"]])
def test_half_a_character_is_a_sentence(form, lora, tmp_path, capsys):
    (tmp_path / "a.jsonl").write_text('{"prompt": "Once \\ud83d upon"}')
    for given in (["--prompt", "Once \udcff upon"], ["--prompts-file", str(tmp_path / "a.jsonl")]):
        assert cli.main(["generate", str(lora), *given, *form, *SHORT]) == 2
        assert "half a surrogate pair" in capsys.readouterr().err


def test_standard_input_that_is_no_text_is_a_sentence(stories, monkeypatch, capsys):
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"\xff\xfe\x00")))
    assert cli.main(["generate", str(stories)]) == 2
    assert "standard input is not UTF-8 text" in capsys.readouterr().err


def sampling(*options: str) -> Sampling:
    default = Sampling()
    return sampling_of(generation_parser("test", "", default).parse_args(["place", *options]), default)


@pytest.mark.parametrize("temperature", ["1e-5", "1e-300", "-1", "nan", "inf"])
def test_a_temperature_that_logits_cannot_be_divided_by_is_a_sentence(temperature: str) -> None:
    with pytest.raises(UserError, match=r"--temperature is .*; it is 0, or 0\.0001 or more"):
        sampling(f"--temperature={temperature}")
    assert sampling("--temperature", "1e-4").temperature == 1e-4 and sampling("--temperature", "0").temperature == 0


@pytest.mark.parametrize("seed", [str(-(2**63) - 1), str(2**64), "9" * 30])
def test_a_seed_that_torch_does_not_take_is_a_sentence(seed: str) -> None:
    with pytest.raises(UserError, match=f"--seed is {seed}; it is a whole number from −2"):
        sampling("--temperature", "1", f"--seed={seed}")
    for taken in (-1, 2**64 - 1):
        sampling("--temperature", "1", f"--seed={taken}")
