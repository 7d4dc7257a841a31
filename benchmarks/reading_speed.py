"""How fast sources are read into tables: MB of text a second of CPU time, on one core, and the peak of memory.

    python benchmarks/reading_speed.py [FOLDER]

The files are made of a fixed seed; each format is read in a process of its own.
"""

import gzip
import json
import random
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

WORDS = "fever cough asthma lung heart pain drug dose daily mild severe acute 患者 发热 咳嗽 the of and in".split()
UNIT = 64 * 2**20


def documents(count: int, seed: int = 0):
    rng = random.Random(seed)
    for number in range(count):
        yield f"Document {number}. " + " ".join(rng.choices(WORDS, k=rng.randint(20, 600))) + "."


def make(folder: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as parquet

    texts = list(documents(60_000))
    (folder / "jsonl").mkdir()
    with open(folder / "jsonl" / "a.jsonl", "w") as file, open(folder / "jsonl" / "bad.jsonl", "w") as bad:
        for number, text in enumerate(texts):
            line = (
                json.dumps({"id": number, "text": text, "meta": {"source": "made", "scores": [1.5, 2]}})
                + "\n"
            )
            (file if number % 2 else bad).write(line)
            if number % 500 == 0:
                bad.write("{broken\n")  # so that every block is read line by line
    (folder / "parquet").mkdir()
    parquet.write_table(
        pa.table({"id": range(len(texts)), "text": texts}),
        folder / "parquet" / "a.parquet",
        compression="zstd",
    )
    for name, ending in (("text", "txt"), ("html", "html")):
        (folder / name).mkdir()
        for number, text in enumerate(texts[:6000]):
            page = (
                f"<html><body><nav><a href='/'>x</a></nav><main><h1>T</h1><p>{text}</p></main></body></html>"
            )
            (folder / name / f"{number:05d}.{ending}").write_text(page if name == "html" else text)
    (folder / "medline").mkdir()
    with gzip.open(folder / "medline" / "a.xml.gz", "wt", 6) as file:
        file.write("<PubmedArticleSet>")
        for number, text in enumerate(texts[:15_000]):
            file.write(
                f"<PubmedArticle><MedlineCitation><PMID>{number + 1}</PMID><Article><ArticleTitle>T</ArticleTitle>"
                f"<Abstract><AbstractText>{text}</AbstractText></Abstract><Language>eng</Language></Article>"
                + "<MeshHeadingList>"
                + "<MeshHeading><DescriptorName UI='D1'>Asthma</DescriptorName></MeshHeading>" * 8
                + "</MeshHeadingList></MedlineCitation><PubmedData>"
                + "<Reference><Citation>x</Citation></Reference>" * 20
                + "</PubmedData></PubmedArticle>\n"
            )
        file.write("</PubmedArticleSet>")


def measure(folder: str, format: str, name: str) -> None:
    from galenic.corpus.config import SourceConfig
    from galenic.corpus.units import plan_units, read_unit

    source = SourceConfig(name="s", path=folder, format=format, licence="none")
    import pyarrow.json
    import pyarrow.parquet  # noqa: F401
    from pyarrow import compute

    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = resident("VmRSS")
    best = float("inf")
    for _ in range(3):
        rows = size = 0
        cpu = time.process_time()
        for unit in plan_units([source], UNIT):
            for table in read_unit(unit, source, lambda *_: None):
                rows += table.num_rows
                size += compute.sum(compute.call_function("binary_length", [table["text"]])).as_py()
        best = min(best, time.process_time() - cpu)
    grown = (resident("VmHWM") - before) / 1e6
    print(
        f"{name:<24} {rows:>7} rows  {size / 1e6:>7.1f} MB  {size / 1e6 / best:>7.1f} MB/s  +{grown:.0f} MB of memory"
    )


def resident(name: str) -> int:
    """Bytes of resident memory: now (VmRSS), at most (VmHWM)."""
    return int(re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024


if __name__ == "__main__":
    if len(sys.argv) == 4:
        measure(*sys.argv[1:])
        sys.exit()
    with tempfile.TemporaryDirectory(dir=sys.argv[1] if len(sys.argv) > 1 else None) as temporary:
        make(Path(temporary))
        for path, format, name in (
            ("parquet", "parquet", "parquet (zstd)"),
            ("jsonl/a.jsonl", "jsonl", "jsonl"),
            ("jsonl/bad.jsonl", "jsonl", "jsonl, a bad line a block"),
            ("text", "text", "text, 6000 files"),
            ("html", "html", "html, 6000 files"),
            ("medline", "medline", "medline (gzip)"),
        ):
            subprocess.run([sys.executable, __file__, f"{temporary}/{path}", format, name], check=True)
