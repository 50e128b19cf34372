"""The cache of prepared data: what is prepared once and what anew, what is refused; remembered hashes of files."""

import os
import time
from pathlib import Path
from typing import Any

import pytest
from conversations import byte_tokenizer
from data_files import json_lines, write
from preparing import TEXTS, refuse, run, texts
from preparing import fills as fills
from preparing import prepared as prepared

from sora_llm.data import cache, prepare
from sora_llm.data.cache import remembered_sha256
from sora_llm.data.chunks import Tokenizing
from sora_llm.data.dataset import TokenDataset
from sora_llm.data.prepare import default_cache_dir
from sora_llm.data.sources import DatasetSpec
from sora_llm.errors import UserError


def test_the_same_is_prepared_once(prepared, fills):
    first, report = prepared(*TEXTS)
    second, report_again = prepared(*TEXTS)
    assert len(fills) == 1 and report_again == report
    assert (report.from_cache, report_again.from_cache) == (False, True)
    assert all((first[i][0] == second[i][0]).all() for i in range(10))
    assert (TokenDataset.load(Path(report.cache_folder))[3][0] == first[3][0]).all()


def test_whatever_changes_the_tokens_prepares_anew_and_nothing_else(prepared, fills, tmp_path, byte):
    prepared(*TEXTS)
    prepared(*TEXTS[:-1], {"text": "jjx"})
    prepared(*TEXTS, sequence_len=100)
    prepared(*TEXTS, train_on_inputs=True)
    prepared(*TEXTS, chat_template="chatml")
    prepared(*TEXTS, drop_duplicates=True)
    spec = texts(tmp_path, *TEXTS)
    for tokenizer in (byte_tokenizer(adds_bos=False), byte_tokenizer(merges=(("a", "a"),))):
        run([spec], tokenizer, cache_dir=tmp_path / "cache")
    assert len(fills) == 8
    prepared(*TEXTS, num_proc=2, max_bad_row_fraction=0.5, wait_first=1.0)
    weighted = DatasetSpec(spec.path, spec.type, weight=2.0)
    run([weighted], byte, cache_dir=tmp_path / "cache")
    assert len(fills) == 8, "processes, the bound on bad rows and weights in a mixture change no token"


def test_settings_of_a_tokenizer_that_change_ids_are_another_key(tmp_path, byte):
    spec = DatasetSpec(write(tmp_path / "a.jsonl", json_lines(*TEXTS)), "completion")
    before = prepare.prepare(Tokenizing((spec,), byte, ""), cache_dir=tmp_path)[1].cache_folder
    other = byte_tokenizer()
    other.split_special_tokens = True
    assert prepare.prepare(Tokenizing((spec,), other, ""), cache_dir=tmp_path)[1].cache_folder != before


def test_cached_data_is_still_checked_for_bad_rows(prepared):
    rows = {"text": "a"}, {"text": ""}
    prepared(*rows, max_bad_row_fraction=0.5)
    with pytest.raises(UserError, match="1 of 2 rows"):
        prepared(*rows, max_bad_row_fraction=0.1)


@pytest.mark.parametrize("file", ["tokens.bin", "weights.bin", "lengths.npy", "table.npy", "report.json"])
def test_a_damaged_cache_is_named_and_not_trained_on(prepared, tmp_path, file):
    prepared(*TEXTS)
    damaged = next((tmp_path / "cache").glob(f"*/{file}"))
    damaged.write_bytes(damaged.read_bytes()[: damaged.stat().st_size // 2])
    with pytest.raises(UserError, match=r"is damaged: delete this folder"):
        prepared(*TEXTS)


def test_a_cache_that_cannot_be_written_is_refused(tmp_path, byte):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot be written .*: set data.cache_dir"):
        run([texts(tmp_path, *TEXTS)], byte, cache_dir=tmp_path / "file")


def test_a_finished_cache_is_read_where_nothing_can_be_written(prepared, monkeypatch):
    prepared(*TEXTS)
    monkeypatch.setattr(cache, "_wait_or_write", refuse)
    assert len(prepared(*TEXTS)[0]) == 10


def test_a_file_that_changes_between_hashing_and_reading_is_refused_and_not_kept(tmp_path, byte, monkeypatch):
    rows = Path(write(tmp_path / "a.jsonl", json_lines(*TEXTS)))
    work = Tokenizing((DatasetSpec(str(rows), "completion"),), byte, "")
    read_rows = prepare.read_rows

    def grown(spec: DatasetSpec) -> Any:
        rows.write_text(json_lines(*TEXTS, *TEXTS))
        return read_rows(spec)

    with monkeypatch.context() as patched, pytest.raises(UserError, match=r"a.jsonl changed while it was being read"):
        patched.setattr(prepare, "read_rows", grown)
        prepare.prepare(work, cache_dir=tmp_path / "cache")
    rows.write_text(json_lines(*TEXTS))
    tokens, report = prepare.prepare(work, cache_dir=tmp_path / "cache")
    assert len(tokens) == len(TEXTS) and not report.from_cache


def test_the_cache_is_in_the_user_s_cache_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_cache_dir() == tmp_path / "sora_llm" / "data"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert default_cache_dir() == tmp_path / ".cache" / "sora_llm" / "data"


# ----- hashes that are remembered -------------------------------------------------------------------------------------


def test_cached_data_is_not_read_again_but_to_be_hashed_and_not_even_that_where_the_hash_is_remembered(
    tmp_path, byte, monkeypatch
):
    spec = texts(tmp_path, *TEXTS)
    monkeypatch.setattr(cache, "_REMEMBERED_BYTES", 0)
    monkeypatch.setattr(cache, "_SETTLED_SECONDS", -1)
    run([spec], byte, cache_dir=tmp_path / "cache")
    monkeypatch.setattr(prepare, "read_rows", refuse)
    monkeypatch.setattr(cache, "file_sha256", refuse)
    assert len(run([spec], byte, cache_dir=tmp_path / "cache")[0]) == 10


@pytest.fixture
def hashed(monkeypatch):
    """The files that were read to be hashed."""
    files = []
    sha256 = cache.file_sha256
    monkeypatch.setattr(cache, "file_sha256", lambda file: (files.append(file), sha256(file))[1])
    monkeypatch.setattr(cache, "_REMEMBERED_BYTES", 4)
    monkeypatch.setattr(cache, "_SETTLED_SECONDS", -1)
    return files


def test_a_large_file_is_hashed_once_until_it_changes(tmp_path, hashed):
    file, memory = tmp_path / "a.jsonl", tmp_path / "cache" / "digests"
    file.write_text("content")
    first = remembered_sha256(file, memory)
    (tmp_path / "link").symlink_to(file)
    assert remembered_sha256(tmp_path / "link", memory) == first == remembered_sha256(file, memory)
    assert len(hashed) == 1
    written = file.stat()
    time.sleep(0.05)  # longer than a tick of the clock that file systems take their times from
    file.write_text("CONTENT")
    os.utime(file, ns=(written.st_atime_ns, written.st_mtime_ns))
    second = remembered_sha256(file, memory)
    assert second != first and len(hashed) == 2, "the same size and a time that was set back: ctime tells"
    file.write_text("content")
    assert remembered_sha256(file, memory) == first
    assert len(list(memory.iterdir())) == 1, "one note for each file"


def test_a_file_that_may_still_be_written_is_not_remembered(tmp_path, hashed, monkeypatch):
    monkeypatch.setattr(cache, "_SETTLED_SECONDS", 2)
    (tmp_path / "a").write_text("content")
    for count in (1, 2):
        remembered_sha256(tmp_path / "a", tmp_path / "digests")
        assert len(hashed) == count


def test_small_files_and_a_memory_that_cannot_be_written_are_no_trouble(tmp_path, hashed):
    (tmp_path / "small").write_text("abc")
    (tmp_path / "large").write_text("content")
    (tmp_path / "file").write_text("")
    for name in ("small", "large"):
        remembered_sha256(tmp_path / name, tmp_path / "file" / "digests")
    (tmp_path / "digests").mkdir()
    remembered_sha256(tmp_path / "small", tmp_path / "digests")
    assert len(hashed) == 3 and list((tmp_path / "digests").iterdir()) == []
