import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from galenic import build, cli
from galenic.runtime import UserError

RUNS: list[str] = []


@dataclass(frozen=True, kw_only=True)
class UpperConfig:
    """Writes a text in capitals, after `source` if given."""

    out: str
    text: str = ""
    source: str | None = None

    def reads(self):
        return [self.source] if self.source else []


def plan(config):
    from galenic.runtime import Plan

    return Plan(reads=config.reads(), writes=[config.out], facts={"letters": str(len(config.text))})


def run(config):
    RUNS.append(Path(config.out).name)
    if config.text == "fail":
        raise RuntimeError("cut")
    if config.text == "mistake":
        raise UserError("cannot be")
    before = (Path(config.source) / "text.txt").read_text() if config.source else ""
    (Path(config.out) / "text.txt").write_text(before + config.text.upper())


@pytest.fixture
def recipe(tmp_path, monkeypatch):
    monkeypatch.setitem(cli.VERBS, "upper", (f"{__name__}:UpperConfig", __name__, "capitals"))
    monkeypatch.chdir(tmp_path)
    RUNS.clear()
    folder = tmp_path / "recipe"
    folder.mkdir()
    (folder / "10-upper.yaml").write_text("text: one\n")
    (folder / "20-upper-more.yaml").write_text("text: two\nsource: RUN/10-upper\n")
    return folder


def step(tmp_path, name):
    return tmp_path / "runs" / "recipe" / name


def test_steps_run_in_order_and_once(recipe, tmp_path):
    assert cli.main(["build", str(recipe)]) == 0
    assert step(tmp_path, "20-upper-more").joinpath("text.txt").read_text() == "ONETWO"
    done = json.loads(step(tmp_path, "20-upper-more").joinpath("done.json").read_text())
    assert done["inputs"] == {
        "RUN/10-upper": json.loads(step(tmp_path, "10-upper").joinpath("done.json").read_text())[
            "fingerprint"
        ]
    }
    assert done["versions"]["galenic"]
    assert "text: two" in step(tmp_path, "20-upper-more").joinpath("config.yaml").read_text()
    assert cli.main(["build", str(recipe)]) == 0
    assert RUNS == ["10-upper", "20-upper-more"]


def test_a_change_reruns_the_step_and_what_depends_on_it(recipe, tmp_path):
    cli.main(["build", str(recipe)])
    RUNS.clear()
    (recipe / "20-upper-more.yaml").write_text("text: three\nsource: RUN/10-upper\n")
    cli.main(["build", str(recipe)])
    assert RUNS == ["20-upper-more"]
    (recipe / "10-upper.yaml").write_text("text: zero\n")
    cli.main(["build", str(recipe)])
    assert RUNS == ["20-upper-more", "10-upper", "20-upper-more"]
    assert step(tmp_path, "20-upper-more").joinpath("text.txt").read_text() == "ZEROTHREE"


def test_an_outside_input_that_changes_reruns_its_reader(recipe, tmp_path):
    data = tmp_path / "data"
    data.mkdir()
    (data / "text.txt").write_text("a")
    (recipe / "10-upper.yaml").write_text(f"text: one\nsource: {data}\n")
    cli.main(["build", str(recipe)])
    (data / "text.txt").write_text("b")
    cli.main(["build", str(recipe)])
    assert RUNS == ["10-upper", "20-upper-more"] * 2


def test_a_cut_step_continues_and_a_changed_one_starts_clean(recipe, tmp_path):
    (recipe / "20-upper-more.yaml").write_text("text: fail\nsource: RUN/10-upper\n")
    with pytest.raises(RuntimeError, match="cut"):
        cli.main(["build", str(recipe)])
    out = step(tmp_path, "20-upper-more")
    assert not (out / "done.json").exists()
    (out / "partial").write_text("kept while the fingerprint is the same")
    with pytest.raises(RuntimeError, match="cut"):
        cli.main(["build", str(recipe)])
    assert (out / "partial").exists()
    (recipe / "20-upper-more.yaml").write_text("text: two\nsource: RUN/10-upper\n")
    assert cli.main(["build", str(recipe)]) == 0
    assert not (out / "partial").exists()
    assert RUNS == ["10-upper", *["20-upper-more"] * 3]


def test_plan_does_nothing(recipe, tmp_path, capsys):
    assert cli.main(["build", str(recipe), "--plan"]) == 0
    out = capsys.readouterr().out
    assert "waits for  RUN/10-upper" in out
    assert "letters" in out
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("30-uper.yaml", "text: x", "known verb (did you mean 'upper'?)"),
        ("upper.yaml", "text: x", "NN-verb"),
        ("30-upper.yaml", "texxt: x", "did you mean 'text'?"),
        ("30-upper.yaml", "text: x\nsource: RUN/40-upper", "not an earlier step"),
        ("30-upper.yaml", "text: x\nsource: RUN/10-uper", "did you mean '10-upper'?"),
        ("30-upper.yaml", "a: [", "not valid YAML"),
        ("30-upper.yaml", "text: a\ntext: b\n", "the key 'text' stands twice"),
        ("30-upper.yaml", "word", "expected options"),
    ],
)
def test_a_wrong_recipe_is_refused_before_any_work(recipe, tmp_path, capsys, name, text, says):
    (recipe / name).write_text(text)
    assert cli.main(["build", str(recipe)]) == 2
    error = capsys.readouterr().err
    assert name in error
    assert says in error
    assert len(error.splitlines()) == 1
    assert RUNS == []
    assert not (tmp_path / "runs").exists()


def test_a_folder_of_another_recipe_is_refused(recipe, tmp_path, capsys):
    cli.main(["build", str(recipe)])
    other = tmp_path / "other"
    other.mkdir()
    (other / "10-upper.yaml").write_text("text: one\n")
    assert cli.main(["build", str(other), "--run-dir", str(tmp_path / "runs" / "recipe")]) == 2
    assert "belongs to recipe 'recipe', not 'other'" in capsys.readouterr().err
    assert cli.main(["build", str(other), "--run-dir", str(recipe)]) == 2
    assert "is not a run folder" in capsys.readouterr().err
    assert cli.main(["build", str(tmp_path / "none")]) == 2
    assert "no such recipe folder" in capsys.readouterr().err


def test_two_builds_do_not_share_a_folder(recipe, tmp_path):
    run_dir = tmp_path / "runs" / "recipe"
    with build._locked(run_dir, "recipe"), pytest.raises(UserError, match="another build is running"):
        with build._locked(run_dir, "recipe"):
            pass


def test_a_single_verb_resumes_its_own_folder_and_refuses_another(recipe, tmp_path, capsys):
    words = ["upper", "--out", str(tmp_path / "x"), "--text", "a"]
    assert cli.main(words) == 0
    assert cli.main(words) == 0
    assert RUNS == ["x"]
    assert cli.main([*words[:-1], "b"]) == 2
    assert "holds the result of another configuration" in capsys.readouterr().err
    assert cli.main(["upper", "--out", str(recipe), "--text", "a"]) == 2
    assert "holds other files" in capsys.readouterr().err


def test_a_folder_of_a_mistake_may_be_used_again(recipe, tmp_path, capsys):
    out = tmp_path / "out"
    assert cli.main(["upper", "--out", str(out), "--text", "mistake"]) == 2
    assert not list(out.iterdir())
    assert cli.main(["upper", "--out", str(out), "--text", "right"]) == 0
    assert (out / "text.txt").read_text() == "RIGHT"


def test_a_moved_run_is_still_done(recipe, tmp_path):
    cli.main(["build", str(recipe)])
    (tmp_path / "runs" / "recipe").rename(tmp_path / "elsewhere")
    cli.main(["build", str(recipe), "--run-dir", str(tmp_path / "elsewhere")])
    assert RUNS == ["10-upper", "20-upper-more"]


def test_code_digest_covers_imports_and_nothing_else():
    files = {path.name for path in build.code_files("galenic.pretrain.pretrain")}
    assert {"pretrain.py", "loop.py", "guard.py", "packing.py", "runtime.py", "shards.py"} <= files
    assert "report.py" not in files
    assert "cli.py" not in files


def test_a_done_recipe_needs_no_heavy_import(recipe):
    code = (
        "import sys\nfrom galenic import build\n"
        "for verb in ('pretrain', 'tokenizer', 'sft'):\n    build.code_digest(build.VERBS[verb][1])\n"
        "assert not {'torch', 'transformers', 'daft'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_recipe_path_outside_a_build_is_explained(recipe, tmp_path, capsys):
    assert cli.main(["upper", "--out", str(tmp_path / "x"), "--source", "RUN/10-upper"]) == 2
    assert "RUN/ is the run folder of `galenic build`" in capsys.readouterr().err


def test_a_model_and_its_adapter_are_both_found_in_the_run_folder(tmp_path):
    where = build._resolve("RUN/10-a/model+RUN/20-b/model", tmp_path, ["10-a", "20-b"], tmp_path / "x.yaml")
    assert where == f"{tmp_path}/10-a/model+{tmp_path}/20-b/model"
    with pytest.raises(UserError, match="'RUN/20-b/model' is not an earlier step"):
        build._resolve("RUN/10-a/model+RUN/20-b/model", tmp_path, ["10-a"], tmp_path / "x.yaml")
