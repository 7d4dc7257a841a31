"""De-identification: recall and precision by category on made-up notes, English and Chinese.

    python benchmarks/deidentification.py [--notes 400] [--models en_core_web_sm jieba]
        [--clean CORPUS/documents.parquet] [--presidio PYTHON]

The notes are templates filled at random: forms, where a label says what follows, and three groups of running text. On
`narrative` and `letters` the rules were improved; `unseen` was written after the rules were finished, so its figures
are those to believe (of the models, only how jieba's words are joined was changed after a look at it). The names are
of no list that the rules know; they know none but Chinese surnames. Templates and rules are of one hand, so real
notes will be harder; there is no real note in this repository. An identifier counts as found if every letter of it is
covered, whatever the tag. Intervals are Wilson's, 95%, as if identifiers were independent: they are of few templates.

With --presidio, an environment that has presidio-analyzer and en_core_web_sm reads the same English notes.
"""

import argparse
import json
import math
import random
import re
import subprocess
import time
from collections import Counter
from pathlib import Path

from deidentification_notes import CHINESE, ENGLISH, note

from galenic.corpus.privacy.deidentify import CATEGORIES, Deidentification, Deidentifier


def wilson(hits: int, of: int) -> str:
    """Share with Wilson's 95% interval (Wilson 1927)."""
    if not of:
        return ""
    share, z = hits / of, 1.96
    centre, spread = share + z * z / (2 * of), z * math.sqrt(share * (1 - share) / of + z * z / (4 * of * of))
    low, high = (centre - spread) / (1 + z * z / of), (centre + spread) / (1 + z * z / of)
    return f"{share:.1%} ({low:.1%} to {high:.1%})"


def covered(text: str, start: int, stop: int, finds: list[tuple[int, int, str]]) -> bool:
    hidden = [any(a <= i < b for a, b, _ in finds) for i in range(start, stop)]
    return all(h or not text[i].isalnum() for i, h in zip(range(start, stop), hidden, strict=True))


def score(
    name: str, notes: list[tuple[str, list[tuple[int, int, str]]]], found: list[list[tuple[int, int, str]]]
) -> Counter:
    """Prints a table; returns what stands around what was missed."""
    hits, total, right, said = Counter(), Counter(), Counter(), Counter()
    missed: Counter = Counter()
    for (text, spans), finds in zip(notes, found, strict=True):
        for start, stop, category in spans:
            hit = covered(text, start, stop, finds)
            hits[category] += hit
            total[category] += 1
            if not hit:
                missed[category, text[max(0, start - 14) : start] + "«...»" + text[stop : stop + 8]] += 1
        for start, stop, category in finds:
            said[category] += 1
            right[category] += any(start < b and a < stop for a, b, _ in spans)
    print(
        f"\n{name}, {len(notes)} notes\n\n| category | identifiers | recall | replaced | precision |\n"
        "|---|--:|---|--:|---|"
    )

    def line(label: str, *counts: int) -> None:
        print(f"| {label} | {counts[1]} | {wilson(*counts[:2])} | {counts[3]} | {wilson(*counts[2:])} |")

    for name in [*CATEGORIES, *sorted(set(said) - set(CATEGORIES))]:
        if total[name] or said[name]:
            line(name, hits[name], total[name], right[name], said[name])
    line("all", *(sum(counter.values()) for counter in (hits, total, right, said)))
    return missed


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--notes", type=int, default=400)
    parser.add_argument("--missed", type=int, default=0, help="print so many of what was missed")
    parser.add_argument("--clean", help="documents.parquet: what is replaced where there is nobody")
    parser.add_argument(
        "--models", nargs="*", default=(), help="spaCy pipelines and jieba, to compare with none"
    )
    parser.add_argument("--presidio", help="python of an environment with presidio-analyzer")
    given = parser.parse_args()
    ways = {"rules": Deidentifier()}
    if given.models:
        ways["rules and " + ", ".join(given.models)] = Deidentifier(
            Deidentification(models=tuple(given.models))
        )
    for language, groups in (("English", ENGLISH), ("Chinese", CHINESE)):
        for style, templates in groups.items():
            rng = random.Random(f"{language} {style}")
            notes = [note(templates[i % len(templates)], rng) for i in range(given.notes)]
            size = sum(len(text.encode()) for text, _ in notes) / 1e6
            for way, rules in ways.items():
                started = time.process_time()
                found = [[(f.start, f.stop, f.category) for f in rules.find(text)] for text, _ in notes]
                spent = time.process_time() - started
                missed = score(f"{language}, {style}, {way}", notes, found)
                print(f"\n{size / spent:.2f} MB/s")
                for (category, text), count in missed.most_common(given.missed):
                    print(f"  missed {count} {category}: {text!r}")
            if given.presidio and language == "English":
                worker = Path(__file__).with_name("presidio_worker.py")
                lines = "".join(json.dumps(text) + "\n" for text, _ in notes)
                answer = subprocess.run(
                    [given.presidio, worker], input=lines, capture_output=True, text=True, check=True
                ).stdout
                found = [[tuple(find) for find in json.loads(line)] for line in answer.splitlines()]
                score(f"{language}, {style}, presidio-analyzer", notes, found)
    if given.clean:
        for way, rules in ways.items():
            clean(given.clean, way, rules)


def clean(path: str, way: str, rules: Deidentifier) -> None:
    import pyarrow.parquet as parquet

    table = parquet.read_table(path, columns=["source", "text"])
    print(f"\n{way}\n\n| source | words | replaced in 1,000 words | by category |\n|---|--:|--:|---|")
    for source in ("radiology", "guidelines", "mesh", "hpo", "disease-tables"):
        texts = [
            t
            for s, t in zip(table["source"].to_pylist(), table["text"].to_pylist(), strict=True)
            if s == source
        ][:500]
        counts: Counter = Counter()
        for text in texts:
            counts.update(rules.replace(text)[1])
        kinds = ", ".join(f"{c} {n}" for c, n in counts.most_common())
        words = sum(len(re.findall(r"[\u3400-\u9fff]|[^\W\u3400-\u9fff]+", text)) for text in texts)
        print(f"| {source} | {words} | {1000 * sum(counts.values()) / words:.2f} | {kinds} |")


if __name__ == "__main__":
    main()
