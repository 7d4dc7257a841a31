"""The recipes for those who only build a corpus: understood as they are, and planned and run on a tiny hospital."""

import gzip
import json
import random
from pathlib import Path

import pytest
import yaml

from galenic.cli import main
from galenic.runtime import read_json

parquet = pytest.importorskip("pyarrow.parquet")
pytest.importorskip("daft")

RECIPES = Path(__file__).parents[2] / "recipes" / "corpus"
WORDS = [
    f"{a}{b}" for a in ("ca", "be", "do", "fi", "gu", "ha") for b in ("rd", "rn", "st", "lt", "mp", "nk", "x")
]
TERM = '[Term]\nid: X:{0}\nname: Fever of kind {0}\ndef: "A fever that is seen in stage {0} of the illness." []\n'
CITATION = (
    "<PubmedArticle><MedlineCitation><PMID>{0}</PMID><Article><ArticleTitle>Trial {0}.</ArticleTitle><Abstract>"
    "<AbstractText>{1}</AbstractText></Abstract></Article></MedlineCitation></PubmedArticle>"
)


def text(rng, sentences=8):
    def sentence():
        return "The {} and the {} have {} with {} of the {}.".format(*rng.choices(WORDS, k=5))

    return " ".join(sentence() for _ in range(sentences))


@pytest.fixture
def hospital(tmp_path, monkeypatch):
    """What the recipe's paths name."""
    rng = random.Random(1)
    monkeypatch.chdir(tmp_path)
    root = tmp_path / "hospital"
    for folder in ("notes", "guidelines", "ontology", "pubmed"):
        (root / folder).mkdir(parents=True)
    notes = [json.dumps({"text": f"Karen Wilson came. {text(rng)}"}) for _ in range(30)]
    (root / "notes/2024.jsonl").write_text("\n".join(notes))
    (root / "guidelines/fever.md").write_text(f"# Fever\n\n{text(rng)}\n")
    (root / "guidelines/cough.html").write_text(f"<html><body><main><p>{text(rng)}</p></main></body></html>")
    (root / "ontology/local.obo").write_text(
        "format-version: 1.2\n\n" + "\n".join(TERM.format(number) for number in range(20))
    )
    citations = "".join(CITATION.format(number, text(rng)) for number in range(20))
    with gzip.open(root / "pubmed/one.xml.gz", "wt") as file:
        file.write(f"<PubmedArticleSet>{citations}</PubmedArticleSet>")
    (root / "names.txt").write_text("Karen Wilson\n")
    (root / "evaluation.jsonl").write_text(json.dumps({"question": text(rng, 2), "answer": "flu"}) + "\n")
    return root


@pytest.mark.parametrize("file", sorted(RECIPES.glob("*.yaml")), ids=lambda file: file.stem)
def test_recipes_are_planned_and_run(file, hospital, capsys):
    words = ["corpus", "--config", str(file), "--out", "corpus", "--workers", "1"]
    assert main([*words, "--plan"]) == 0, capsys.readouterr().err
    assert not Path("corpus").exists() and "de-identify, clean" in capsys.readouterr().out
    assert main(words) == 0, capsys.readouterr().err
    given = [source["name"] for source in yaml.safe_load(file.read_text())["sources"]]
    sources = read_json("corpus/sources.json")
    assert list(sources) == given and all(row["documents"] for row in sources.values())
    texts = parquet.read_table("corpus/documents.parquet", columns=["text"])["text"].to_pylist()
    assert sum("[NAME] came" in text for text in texts) == 30 and not any("Wilson" in text for text in texts)
    assert sources["notes"]["masked"]["NAME"] >= 30


def test_there_are_recipes():
    assert list(RECIPES.glob("*.yaml"))
