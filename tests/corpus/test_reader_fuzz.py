"""Files of every format, damaged at random: reading ends, raises nothing, and loses no file beside the damaged one."""

import gzip
import io
import json
import random
import tarfile
import zipfile

import pyarrow as pa
import pyarrow.parquet as parquet
import pytest
from reader_helpers import read
from test_reader_records import RESOURCES, SECTIONS, article, bundle, medline
from test_reader_terminologies import ICD, OBO, release


def lines(count=40):
    return b"".join(json.dumps({"id": i, "text": f"text {i} 咳"}).encode() + b"\n" for i in range(count))


def table():
    buffer = io.BytesIO()
    words = [f"text {i}" for i in range(200)]
    parquet.write_table(pa.table({"text": words, "id": range(200)}), buffer, row_group_size=50)
    return buffer.getvalue()


def zipped(name, data):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for number in range(4):
            archive.writestr(f"{number}{name}", data)
    return buffer.getvalue()


def tarred(name, data):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        for number in range(4):
            info = tarfile.TarInfo(f"{number}{name}")
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


CITATIONS = medline(*(article(i, abstract=SECTIONS, kinds=["Review"]) for i in range(1, 30)))
BUNDLE = json.dumps(bundle(RESOURCES)).encode()
CASES = {
    "parquet": (".parquet", table()),
    "jsonl": (".jsonl", lines()),
    "jsonl gz": (".jsonl.gz", gzip.compress(lines(400))),
    "jsonl zst": (".jsonl.zst", pa.compress(lines(400), codec="zstd", asbytes=True)),
    "jsonl zip": (".zip", zipped("a.jsonl", lines())),
    "text tar": (".tar.gz", tarred("a.txt", lines())),
    "parquet zip": (".zip", zipped("a.parquet", table())),
    "html": (
        ".html",
        b"<meta charset=utf-8><main><h1>T</h1><p class='a'>Text &amp; more</p><ul><li>x</ul></main>" * 20,
    ),
    "markdown": (".md", b"---\nx: 1\n---\n# T\n\n[a](b) <!-- c --> ![d](e)\n```\nf\n```\n" * 10),
    "obo": (".obo", OBO.encode()),
    "icd10cm": (".xml", ICD.encode()),
    "medline": (".xml", CITATIONS),
    "medline gz": (".xml.gz", gzip.compress(CITATIONS)),
    "fhir": (".json", BUNDLE),
    "fhir lines": (".ndjson", b"\n".join(json.dumps(resource).encode() for resource in RESOURCES)),
}


def damaged(data, rng):
    data = bytearray(data)
    for _ in range(rng.choice([1, 1, 3, 20])):
        place, size = rng.randrange(len(data)), rng.choice([1, 1, 4, 64])
        match rng.randrange(5):
            case 0:
                data[place : place + size] = rng.randbytes(size)
            case 1:
                del data[place : place + size]
            case 2:
                data[place:place] = rng.randbytes(size)
            case 3:
                data[place:place] = data[place : place + size]
            case 4 if len(data) > 1:
                del data[max(1, place) :]
        data = data or bytearray(b"\0")
    return bytes(data)


@pytest.mark.parametrize("case", CASES)
def test_damage_stays_where_it_is(tmp_path, case):
    ending, data = CASES[case]
    format = case.split()[0]
    rng = random.Random(case)
    (tmp_path / f"b{ending}").write_bytes(data)
    whole, _ = read(tmp_path, format)
    last = [row["text"] for row in whole]
    assert last
    for _ in range(25):
        (tmp_path / f"a{ending}").write_bytes(damaged(data, rng))
        rows, drops = read(tmp_path, format, id_column="" if case != "parquet" else "id")
        found = [row["text"] for row in rows]
        # Lines of a bulk export are joined over the files of a folder, so only the notes stay as they are.
        assert found[-len(last) :] == last if case != "fhir lines" else set(found) & set(last)
        assert all(isinstance(part, str) and part.encode() is not None for drop in drops for part in drop)


def test_a_damaged_release_of_umls(tmp_path):
    release(tmp_path / "META")
    whole = {path: path.read_bytes() for path in (tmp_path / "META").iterdir()}
    rng = random.Random(0)
    for _ in range(60):
        for path, data in whole.items():
            path.write_bytes(damaged(data, rng) if rng.random() < 0.5 else data)
        for unit_bytes in (100, 2**20):
            read(tmp_path, "umls", unit_bytes)
