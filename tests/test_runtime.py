import os
import signal
import subprocess
import sys
import time

import pytest
import yaml

from galenic import runtime
from galenic.runtime import UserError, atomic_path, human, load_yaml, nearest, read_jsonl


def test_atomic_path_file_appears_whole_or_not_at_all(tmp_path):
    target = tmp_path / "a" / "x.txt"
    with atomic_path(target) as temporary:
        temporary.write_text("one")
        assert not target.exists()
    assert target.read_text() == "one"
    with pytest.raises(RuntimeError), atomic_path(target) as temporary:
        temporary.write_text("two")
        raise RuntimeError
    assert target.read_text() == "one"
    assert sorted(os.listdir(target.parent)) == ["x.txt"]


def test_atomic_path_replaces_a_folder(tmp_path):
    target = tmp_path / "folder"
    for name in ("old", "new"):
        with atomic_path(target) as temporary:
            temporary.mkdir()
            (temporary / name).write_text(name)
    assert os.listdir(target) == ["new"]


def test_a_killed_writer_leaves_nothing_that_counts(tmp_path):
    code = (
        "import sys, time\nfrom galenic.runtime import atomic_path\n"
        f"with atomic_path({str(tmp_path / 'x')!r}) as t:\n"
        "    t.write_text('half'); print('ready', flush=True); time.sleep(60)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    assert not (tmp_path / "x").exists()
    with atomic_path(tmp_path / "x") as temporary:
        assert not temporary.exists()  # the killed one's leftover is gone
        temporary.write_text("whole")
    assert os.listdir(tmp_path) == ["x"]


def test_read_jsonl_names_file_and_line(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"a": 1}\n\n{"a": \n')
    with pytest.raises(UserError, match=r"rows.jsonl:3: not valid JSON"):
        list(read_jsonl(path))
    path.write_text("[1]\n")
    with pytest.raises(UserError, match=r"rows.jsonl:1: expected a JSON object, got list"):
        list(read_jsonl(path))
    with pytest.raises(UserError, match="no such file"):
        list(read_jsonl(tmp_path / "none.jsonl"))


def test_nearest_and_human():
    assert nearest("pretran", ["pretrain", "merge"]) == " (did you mean 'pretrain'?)"
    assert nearest("zzz", ["pretrain"]) == ""
    assert [human(n) for n in (3, 1234, 14_470_764_320)] == ["3", "1.23k", "14.5B"]
    assert [runtime.human_bytes(n) for n in (97_600_000, 2_160_000_000)] == ["97.6MB", "2.16GB"]
    assert [runtime.duration(s) for s in (5, 75, 3675)] == ["0:05", "1:15", "1:01:15"]


def test_plain_progress_prints_lines_with_time_left(capsys, monkeypatch):
    clock = iter([0.0, 11.0, 12.0, 22.0])
    monkeypatch.setattr(time, "monotonic", lambda: next(clock))
    with runtime.progress(100, "label", "docs") as bar:
        bar.update(50, "note")
        bar.update(25)
    lines = capsys.readouterr().err.splitlines()
    assert lines == ["  label:  50% 50/100 docs, 0:11 left; note", "  label: 75 docs in 0:22; note"]


def test_progress_without_a_unit_counts_nothing(capsys, monkeypatch):
    clock = iter([0.0, 11.0, 22.0, 30.0])
    monkeypatch.setattr(time, "monotonic", lambda: next(clock))
    with runtime.progress(100, "corpus", "") as bar:
        bar.update(0, "reading")
        bar.update(50, "cleaning notes")
    lines = capsys.readouterr().err.splitlines()
    assert lines == [
        "  corpus:   0%; reading",
        "  corpus:  50%, 0:22 left; cleaning notes",
        "  corpus: done in 0:30",
    ]


def test_folders_are_named_without_their_place(tmp_path):
    (tmp_path / "30-pretrain" / "phase-1").mkdir(parents=True)
    (tmp_path / "41-sft" / "model").mkdir(parents=True)
    assert runtime.folder_name(str(tmp_path / "30-pretrain" / "phase-1")) == "30-pretrain/phase-1"
    assert runtime.folder_name(str(tmp_path / "41-sft" / "model")) == "41-sft/model"
    assert runtime.folder_name("org/model-on-the-hub") == "org/model-on-the-hub"


def test_yaml_is_the_librarys_but_for_keys_that_stand_twice():
    text = "a: &x {b: 1, c: [2, 1.5e3, null]}\nd: {<<: *x, b: 3}\n'1': yes\n1: no\n"
    assert load_yaml(text) == yaml.safe_load(text)
    for twice in ("a: 1\na: 1\n", "x:\n  - {a: 1, 'a': 2}\n", "a: {b: {c: 1, c: 2}}\n"):
        with pytest.raises(yaml.YAMLError, match="stands twice"):
            load_yaml(twice)


def test_peak_memory_is_the_process_own_whoever_started_it():
    ballast = bytearray(300 * 10**6)
    for at in range(0, len(ballast), 4096):
        ballast[at] = 1
    code = "from galenic.runtime import peak_memory_bytes; print(peak_memory_bytes())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert 5 * 10**6 < int(done.stdout) < 200 * 10**6
    assert runtime.peak_memory_bytes() > 300 * 10**6
    del ballast
