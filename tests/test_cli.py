import os
import subprocess
import sys

import pytest

from galenic import cli

MINIMAL = {"out": "o", "tokenizer": "t", "phases": [{"name": "p", "tokens": 8192, "mixture": {"wiki": 1.0}}]}


def test_help_imports_nothing_heavy():
    code = (
        "import sys\nfrom galenic.cli import main\nmain(['--help'])\n"
        "heavy = {'torch', 'transformers', 'daft', 'matplotlib', 'jsonargparse', 'numpy'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    for verb in cli.VERBS:
        assert f"\n  {verb} " in done.stdout


@pytest.mark.parametrize("verb", cli.VERBS)
def test_every_verb_parses_without_torch_and_says_its_options(verb):
    code = f"import sys\nfrom galenic.cli import main\nmain(['{verb}', '--help'])\nassert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "--config" in done.stdout


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["pretran"], "unknown verb 'pretran' (did you mean 'pretrain'?)"),
        (["pretrain", "--config", "none.yaml"], "none.yaml"),
        (["pretrain", "--optim.lrr", "1"], "did you mean 'optim.lr'?"),
        (["pretrain", "--config", "typo.yaml"], "did you mean 'warmup_steps'?"),
        (["pretrain", "--config", "list.yaml"], "did you mean 'mixture'?"),
        (["pretrain", "--config", "type.yaml"], "Got value: many"),
        (
            ["pretrain", "--config", "ok.yaml", "--optim.lr", "fast"],
            "optim.lr: Expected a float. Got value: fast",
        ),
        (["sft", "--lora", "3"], "lora: Expected options of its own. Got value: 3"),
        (["export", "m", "--quantize", "int3"], "quantize: Expected one of 'int8', 'int4'. Got value: int3"),
        (["pretrain", "--config", "ok.yaml", "--optim.lr", "-1"], "optim.lr: -1.0 is not above 0"),
        (["pretrain", "--config", "broken.yaml"], "while parsing"),
        (["pretrain"], "out"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(words, says, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    phase = "- {name: p, tokens: 8192, mixture: {wiki: 1.0}}"
    (tmp_path / "ok.yaml").write_text(f"out: o\ntokenizer: t\nphases:\n{phase}\n")
    (tmp_path / "typo.yaml").write_text(
        f"out: o\ntokenizer: t\noptim: {{warmup_step: 3}}\nphases:\n{phase}\n"
    )
    (tmp_path / "list.yaml").write_text(
        "out: o\ntokenizer: t\nphases:\n- {name: p, tokens: 8192, mixtur: {w: 1.0}}\n"
    )
    (tmp_path / "type.yaml").write_text(
        "out: o\ntokenizer: t\nphases:\n- {name: p, tokens: many, mixture: {w: 1.0}}\n"
    )
    (tmp_path / "broken.yaml").write_text("out: [\n")
    before = sorted(os.listdir(tmp_path))
    assert cli.main(words) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert len(captured.err.splitlines()) == 1
    assert captured.err.startswith("galenic: error: ")
    assert says in captured.err
    assert sorted(os.listdir(tmp_path)) == before  # nothing half-written


def test_overrides_win_over_the_file(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text(
        "out: o\ntokenizer: t\nphases: [{name: p, tokens: 8192, mixture: {w: 1.0}}]\noptim: {lr: 1e-3}\n"
    )
    config, plan = cli.parse_config("pretrain", ["--config", str(path), "--optim.clip", "0.5", "--plan"])
    assert (config.optim.lr, config.optim.clip, config.phases[0].name, plan) == (1e-3, 0.5, "p", True)


def test_option_names_reach_into_lists():
    names = cli.option_names(type(cli.parse_config("pretrain", MINIMAL)[0]))
    assert {"optim.lr", "phases.mixture", "architecture.conv_window"} <= set(names)


def test_no_space_left_is_one_line(monkeypatch, capsys):
    def full(_):
        raise OSError(28, "No space left on device", "/disk/file")

    monkeypatch.setattr(cli, "_run", full)
    assert cli.main([]) == 2
    assert capsys.readouterr().err == (
        "galenic: error: /disk/file: no space left on device; free some and run the same command to continue\n"
    )


def test_a_missing_package_is_one_line_that_names_the_extra(tmp_path):
    """As after `pip install galenic` alone: the report's library of charts is not there."""
    (tmp_path / "r").mkdir()
    words = ["report", "--out", str(tmp_path / "out"), "--recipe", str(tmp_path / "r")]
    code = f"import sys\nsys.modules['matplotlib'] = None\nfrom galenic.cli import main\nsys.exit(main({words!r}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "pip install 'galenic[report]'" in done.stderr and len(done.stderr.splitlines()) == 1


def test_a_mistake_ends_the_process_at_once():
    """Threads of a library may be at work still; Python's own end would abort, with another exit code."""
    code = "import atexit, sys; atexit.register(print, 'the end'); from galenic.cli import entry; "
    code += "sys.argv[1:] = ['marge']; sys.exit(entry())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == "" and "did you mean 'merge'?" in done.stderr


def test_a_fault_of_ours_ends_with_its_traceback():
    code = "import sys; from galenic import cli; cli._run = lambda argv: {}['no such key']; sys.exit(cli.entry())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.splitlines()[-1] == "KeyError: 'no such key'"


@pytest.mark.parametrize("kind", [OSError, RuntimeError])
@pytest.mark.parametrize(
    "words", ["1 requested and 0 written", "a worker failed: No space left on device (28)"]
)
def test_a_full_disk_is_known_by_the_words_of_libraries(kind, words, monkeypatch, capsys):
    def full(argv):
        raise kind(words)

    monkeypatch.setattr(cli, "_run", full)
    assert cli.main(["corpus"]) == 2
    error = capsys.readouterr().err
    assert (
        error == "galenic: error: no space left on device; free some and run the same command to continue\n"
    )
