"""How fast cleaning is (megabytes of UTF-8 a second of CPU time), what it drops by mistake, which language it names.

    python benchmarks/clean_speed.py [--wheels data/wheels] [--megabytes 20]

Documents of about two kilobytes are made from the starter's wheels: leads of Wikipedia articles, a lead a line, and
Chinese sentences of HSK and of the disease tables, ten a line; both repeated to the size asked for. `untidy` has
carriage returns, trailing blanks and lines of boilerplate in every document. Languages are told from the beginning of
each document alone, nothing declared; the tables of diseases in other languages are texts of their fields that no
other language's table has.
"""

import argparse
import ast
import time
from collections import Counter

import pyarrow as pa

from galenic.corpus.cleaning.clean import STARTER, clean_table
from galenic.corpus.cleaning.language import identify
from galenic.corpus.cleaning.measure import measure
from galenic.corpus.cleaning.rules import Rules
from galenic.corpus.readers.collect import collect
from galenic.corpus.records import Document
from galenic.corpus.starter.wheels import Wheels
from galenic.corpus.texts import buffers, column

BOILERPLATE = (
    "Skip to main content",
    "We use cookies to improve this site.",
    "Share on Facebook",
    "© 2024 上一篇",
)


def joined(lines: list[str], size: int) -> list[str]:
    """Texts of at least `size` bytes, a line each."""
    texts, current, length = [], [], 0
    for line in lines:
        current.append(line)
        length += len(line.encode()) + 1
        if length >= size:
            texts.append("\n".join(current))
            current, length = [], 0
    return texts


def repeated(texts: list[str], size: float) -> list[str]:
    total = sum(len(text.encode()) for text in texts)
    return texts * max(1, round(size / total))


def chinese(text: str) -> bool:
    return sum("\u4e00" <= letter <= "\u9fff" for letter in text) > len(text) / 2


def strings(source: bytes) -> list[str]:
    constants = (node.value for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Constant))
    return [value for value in constants if isinstance(value, str)]


def speed(name: str, texts: list[str]) -> None:
    batches = [texts[i : i + 4000] for i in range(0, len(texts), 4000)]
    tables = [pa.table({"id": column(map(str, range(len(b)))), "text": column(b)}) for b in batches]
    size = sum(len(text.encode()) for text in texts) / 1e6
    seconds = []
    for what in ("measured", "cleaned"):
        wall, cpu, kept = time.perf_counter(), time.process_time(), 0
        for table in tables:
            if what == "measured":
                measure(*buffers(table["text"]))
            else:
                kept += len(clean_table(table, form="prose", rules=Rules())[0])
        seconds.append((time.perf_counter() - wall, time.process_time() - cpu))
    (_, measured), (wall, cpu) = seconds
    print(
        f"{name:8s} {len(texts):6d} documents of {size / len(texts) * 1e6:5.0f} bytes: "
        f"counted at {size / measured:5.1f}, cleaned at {size / cpu:5.1f} MB/s of CPU "
        f"({size / wall:5.1f} of wall), {kept} kept"
    )


def accuracy(name: str, label: str, texts: list[str]) -> None:
    data, starts = buffers(column(texts))
    measures = measure(data, starts)
    cpu = time.process_time()
    found = Counter(identify(data, starts, measures))
    cpu = time.process_time() - cpu
    others = ", ".join(f"{other} {count}" for other, count in found.most_common(5) if other != label)
    print(
        f"{name:32s} {label:3s} {found[label] / len(texts):7.2%} of {len(texts):5d}, "
        f"{cpu / len(texts) * 1e6:5.1f} us each; {others}"
    )


def false_alarms(source: str, documents: list[Document]) -> None:
    table = pa.table({"id": column(d.id for d in documents), "text": column(d.text for d in documents)})
    table = table.append_column("language", column(["en"] * len(documents)))
    kept, _ = clean_table(table, form="prose", rules=STARTER)
    _, dropped = clean_table(
        kept.select(table.column_names), form="prose", rules=Rules(longest=STARTER.longest)
    )
    reasons = ", ".join(
        f"{reason} {count}" for reason, count in Counter(dropped["reason"].to_pylist()).most_common()
    )
    cut = sum(kept["cut_lines"].to_pylist())
    print(
        f"{source:18s} of {len(kept)} that the starter keeps, the rules for the web drop {len(dropped)}: {reasons}; "
        f"{cut} lines cut"
    )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--wheels", default="data/wheels")
    parser.add_argument("--megabytes", type=float, default=20)
    arguments = parser.parse_args()
    wheels = Wheels(arguments.wheels, "recipes/starter/wheels.txt")
    raw = collect(wheels, lambda *_: None)
    leads = {
        kind: [d.text for d in raw.documents if d.source == kind]
        for kind in ("wikipedia", "wikipedia-health")
    }
    english = joined([text for texts in leads.values() for text in texts], 2000)
    tables = wheels.open("faker-healthcare-provider")
    fields = {
        code: strings(tables.read(f"faker_healthcare/{folder}disease_correlations.py"))
        for code, folder in (
            ("en", ""),
            ("de", "de_DE/"),
            ("es", "es_ES/"),
            ("fr", "fr_FR/"),
            ("pt", "pt_BR/"),
        )
    }
    counts = Counter(field for found in fields.values() for field in set(found))
    own = {code: [field for field in found if counts[field] == 1] for code, found in fields.items()}
    sentences = [line.pair.zh for line in raw.lines if line.pair.source == "hsk"]
    sentences += [
        text
        for text in strings(tables.read("faker_healthcare/zh_CN/disease_correlations.py"))
        if chinese(text)
    ]

    warm = pa.table({"id": ["0"], "text": column(["Alles wird kompiliert, bevor es gemessen wird."])})
    clean_table(warm, form="prose", rules=Rules())
    size = arguments.megabytes * 1e6
    speed("English", repeated(english, size))
    paragraphs = ["".join(sentences[i : i + 10]) for i in range(0, len(sentences), 10)]
    speed("Chinese", repeated(joined(paragraphs, 2000), size))
    untidy = ["\r\n".join((BOILERPLATE[0], *BOILERPLATE[1:], *text.split("\n"))) + " \n" for text in english]
    speed("untidy", repeated(untidy, size))
    print()
    for source in (*leads, "python-docs"):
        false_alarms(source, [document for document in raw.documents if document.source == source])
    print()
    for kind, texts in leads.items():
        accuracy(kind, "en", texts)
        accuracy(f"{kind}, 100 characters", "en", [text[:100] for text in texts])
    accuracy("sentences of HSK", "zh", [line.pair.zh for line in raw.lines if line.pair.source == "hsk"])
    for code, found in own.items():
        accuracy(
            "fields of diseases, six each",
            code,
            [". ".join(found[i : i + 6]) for i in range(0, len(found), 6)],
        )


if __name__ == "__main__":
    main()
