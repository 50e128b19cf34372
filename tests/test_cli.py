"""`sora-llm`: what it lists works, in every terminal."""

from __future__ import annotations

import argparse
import contextlib
import os
import subprocess
import sys
from pathlib import Path
from shutil import which

import pytest
from runs import CONFIG, gsm8k_overrides

from sora_llm import cli


def test_help_lists_every_command_without_loading_torch():
    check = "import sys; from sora_llm.cli import main; main(['--help']); sys.exit('torch' in sys.modules)"
    shown = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True)
    assert shown.returncode == 0
    for command in cli.COMMANDS:
        assert f"  {command} " in shown.stdout


def test_the_help_page_tells_the_whole_way_in_order():
    page = cli.usage()
    way = ["doctor", "preprocess", "estimate", "train", "inspect", "evaluate", "chat", "export", "consensus"]
    places = [page.index(f"  {step} ") for step in way] + [page.index("vllm serve")]
    assert places == sorted(places)


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_scripts_know_every_command(shell, capsys):
    assert cli.main(["completion", shell]) == 0
    script = capsys.readouterr().out
    assert all(command in script for command in cli.COMMANDS) and "top-p" in script and "num-processes" in script
    parsed = subprocess.run([shell, "-n"], input=script, text=True, capture_output=True) if which(shell) else None
    assert parsed is None or (parsed.returncode, parsed.stderr) == (0, "")


TAKE_PATHS = set(cli.COMMANDS) - {"completion", "doctor"}


@pytest.mark.skipif(which("bash") is None, reason="no bash here")
@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["sora-llm", "pre"], {"preprocess"}),
        (["sora-llm", "generate", "--max"], {"--max-new-tokens"}),
        (["sora-llm", "completion", ""], {"bash", "zsh", "fish"}),
        *((["sora-llm", command, "READ"], {"README.md"}) for command in sorted(TAKE_PATHS)),
    ],
)
def test_bash_completes_commands_options_and_choices(words, expected, capsys):
    assert cli.main(["completion", "bash"]) == 0
    typed = " ".join(repr(word) for word in words)
    script = f"{capsys.readouterr().out}\nCOMP_WORDS=({typed}); COMP_CWORD={len(words) - 1}\n"
    script += "$(complete -p sora-llm | sed 's/.*-F \\([^ ]*\\) .*/\\1/')\nprintf '%s\\n' \"${COMPREPLY[@]}\""
    shown = subprocess.run(["bash", "-c", script], capture_output=True, text=True)
    assert {word.strip() for word in shown.stdout.split()} >= expected
    assert all(word.startswith(words[-1]) for word in shown.stdout.split())


def test_making_completions_leaves_argparse_as_it_was(capsys):
    before = argparse.ArgumentParser.parse_known_args
    assert cli.main(["completion", "bash"]) == 0
    assert argparse.ArgumentParser.parse_known_args is before


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_every_command_has_a_help_page(command, capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main([command, "--help"])
    assert stopped.value.code == 0 and f"sora-llm {command}" in capsys.readouterr().out


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_a_wrong_option_is_a_sentence(command, capsys):
    assert cli.main([command, "--no-such-option"]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and f"see sora-llm {command} --help" in said


@pytest.mark.parametrize("command", ["train", "estimate", "evaluate", "generate"])
def test_what_may_be_left_out_is_not_called_missing(command, capsys):
    assert cli.main([command]) == 2
    assert "section.key=value" not in capsys.readouterr().err


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_a_terminal_of_another_encoding_gets_escapes_for_what_it_lacks(encoding):
    script = "from sora_llm import cli; cli.main(['--version']); print('λ → é')"
    shown = subprocess.run(
        [sys.executable, "-c", script], env=os.environ | {"PYTHONIOENCODING": encoding}, capture_output=True, check=True
    )
    assert r"\u03bb \u2192" in shown.stdout.decode(encoding)


def test_a_result_that_cannot_be_printed_is_a_sentence(tmp_path, capfd):
    with Path("/dev/full").open("w") as full, contextlib.redirect_stdout(full):
        assert cli.main(["estimate", CONFIG, *gsm8k_overrides(tmp_path)]) == 1
    assert "cannot be printed: No space left on device" in capfd.readouterr().err


@pytest.mark.parametrize(
    "arguments", [["--help"], ["--version"], ["export", "--help"], ["train", CONFIG, "--print-config"]]
)
def test_no_page_ends_in_a_traceback_where_it_cannot_be_printed(arguments):
    with Path("/dev/full").open("w") as full:
        done = subprocess.run([sys.executable, "-m", "sora_llm", *arguments], stdout=full, stderr=-1, text=True)
    assert done.returncode == 1 and done.stderr.count("\n") == 1 and "cannot be printed" in done.stderr


@pytest.mark.parametrize(
    ("option", "meant"),
    [
        ("--gpu", "--gpus-per-node"),
        ("--utilization", "--utilisation"),
        ("--zzz 3 --gpu", "--gpus-per-node"),
        ("--zzz", None),
    ],
)
def test_an_unknown_option_is_never_taken_for_another(capsys, option, meant):
    assert cli.main(["estimate", CONFIG, *option.split(), "4"]) == 2
    error = capsys.readouterr().err
    assert f"unrecognized arguments: {option} 4" in error and error.count("\n") == 1
    assert (f"did you mean {meant}?" in error) if meant else ("did you mean" not in error)


def test_all_options_that_an_unknown_one_begins_are_named(capsys):
    assert cli.main(["evaluate", "run", "--target", "4"]) == 2
    assert "did you mean --target-rank or --target-params?" in capsys.readouterr().err


def test_an_unknown_command_is_bad_input(capsys):
    assert cli.main(["trian"]) == cli.main(["xyz"]) == 2
    error = capsys.readouterr().err
    assert "did you mean train?" in error and "commands: doctor, convert, preprocess, " in error
