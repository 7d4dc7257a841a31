import gzip
import json
import os
from itertools import pairwise

import numpy as np
import pyarrow as pa
import pyarrow.parquet as parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from reader_helpers import memory_within, read, reasons, source, texts

from galenic.corpus.readers import jsonl
from galenic.corpus.readers.files import Unreadable
from galenic.corpus.readers.lines import LONGEST
from galenic.corpus.units import plan_units, read_unit
from galenic.runtime import UserError


def write_jsonl(path, rows):
    path.write_bytes(b"".join(json.dumps(row, ensure_ascii=False).encode() + b"\n" for row in rows))


def write_parquet(path, texts, group=100, **columns):
    parquet.write_table(pa.table({"text": texts, **columns}), path, row_group_size=group)


# ---------------------------------------------------------------------------- plans


def test_units_are_numbered_over_all_sources(tmp_path):
    for name in ("b", "a"):
        write_jsonl(tmp_path / f"{name}.jsonl", [{"text": f"{name} {i}"} for i in range(100)])
    (tmp_path / "t.txt").write_text("one document")
    first, second = source(tmp_path, "jsonl"), source(tmp_path, "text", name="second")
    units = plan_units([first, second], 1000)
    assert [unit["number"] for unit in units] == list(range(len(units)))
    assert {unit["source"] for unit in units} == {"s", "second"}
    assert units == sorted(units, key=lambda unit: (unit["source"], unit["files"], unit["start"]))
    size = (tmp_path / "a.jsonl").stat().st_size
    ranges = [(u["start"], u["stop"]) for u in units if u["files"] == [str(tmp_path / "a.jsonl")]]
    assert ranges[0][0] == 0 and ranges[-1][1] == size
    assert all(a[1] == b[0] for a, b in pairwise(ranges)) and len(ranges) == 2
    with pytest.raises(UserError, match="unit_bytes: 0 is below 1"):
        plan_units([first], 0)


def test_small_files_share_a_unit_and_archives_stand_alone(tmp_path):
    import zipfile

    for i in range(10):
        (tmp_path / f"{i}.txt").write_text("x" * 100)
    with zipfile.ZipFile(tmp_path / "5a.zip", "w") as archive:
        archive.writestr("in.txt", "inside")
    names = [
        [os.path.basename(u) for u in unit["files"]] for unit in plan_units([source(tmp_path, "text")], 400)
    ]
    assert names == [
        ["0.txt", "1.txt", "2.txt", "3.txt"],
        ["4.txt", "5.txt"],
        ["5a.zip"],
        ["6.txt", "7.txt", "8.txt", "9.txt"],
    ]


# ---------------------------------------------------------------------------- Parquet


def test_parquet_is_cut_at_row_groups(tmp_path):
    write_parquet(tmp_path / "a.parquet", [f"text number {i}" for i in range(1000)], other=list(range(1000)))
    units = plan_units([source(tmp_path, "parquet")], 5000)
    assert len(units) > 2 and units[0]["start"] == 0 and units[-1]["stop"] == 10
    rows, drops = read(tmp_path, "parquet", 5000)
    assert texts(rows) == {f"s/a.parquet:{i}": f"text number {i}" for i in range(1000)} and not drops
    assert read(tmp_path, "parquet", 2**30) == (rows, drops)  # ids do not depend on the plan
    assert rows[0] | {"language": "zh"} == read(tmp_path, "parquet", language="zh")[0][0]


@pytest.mark.parametrize(
    "kind",
    [
        pa.string(),
        pa.large_string(),
        pa.string_view(),
        pa.binary(),
        pa.large_binary(),
        pa.dictionary(pa.int32(), pa.string()),
    ],
    ids=str,
)
def test_parquet_text_of_any_type(tmp_path, kind):
    words = ["fièvre", None, "", " \u3000\n", "咳嗽"]
    column = (
        pa.array(words).cast(kind)
        if not pa.types.is_dictionary(kind)
        else pa.array(words).dictionary_encode()
    )
    write_parquet(tmp_path / "a.parquet", column, key=[7, 8, 9, 10, None])
    rows, drops = read(tmp_path, "parquet", id_column="key")
    assert texts(rows) == {"s/7": "fièvre", "s/a.parquet:4": "咳嗽"}
    assert reasons(drops) == [("s/8", "empty"), ("s/9", "empty"), ("s/10", "empty")]


def test_parquet_texts_that_are_not_utf8_are_dropped(tmp_path):
    values = [b"good", b"bad \xff\xfe here", "好".encode(), b"cut \xe5\xa5"]
    broken = pa.array(values).view(pa.string())  # writers do not look either
    write_parquet(tmp_path / "a.parquet", broken)
    rows, drops = read(tmp_path, "parquet")
    assert texts(rows) == {"s/a.parquet:0": "good", "s/a.parquet:2": "好"}
    assert [(d[0], d[1], d[2]) for d in drops] == [
        ("s/a.parquet:1", "broken encoding", "not UTF-8 at byte 4"),
        ("s/a.parquet:3", "broken encoding", "not UTF-8 at byte 4"),
    ]


def test_half_written_parquet_is_one_drop_and_the_next_file_comes(tmp_path):
    for name in ("a", "b", "c"):
        write_parquet(tmp_path / f"{name}.parquet", [f"{name}{i}" for i in range(50)])
    whole = (tmp_path / "b.parquet").read_bytes()
    (tmp_path / "b.parquet").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "d.parquet").write_bytes(b"")
    rows, drops = read(tmp_path, "parquet")
    assert [row["text"] for row in rows] == [f"{n}{i}" for n in "ac" for i in range(50)]
    assert reasons(drops) == [("s/b.parquet", "unreadable file"), ("s/d.parquet", "unreadable file")]
    assert "no whole Parquet file" in drops[0][2]


def test_a_damaged_row_group_costs_its_rows_only(tmp_path):
    path = tmp_path / "a.parquet"
    words = [f"text {i} {np.random.default_rng(i).bytes(20).hex()}" for i in range(300)]
    parquet.write_table(
        pa.table({"text": words}), path, row_group_size=100, compression="zstd", use_dictionary=False
    )
    column = parquet.ParquetFile(path).metadata.row_group(1).column(0)
    data = bytearray(path.read_bytes())
    middle = column.data_page_offset + column.total_compressed_size // 2
    data[middle : middle + 64] = bytes(64)
    path.write_bytes(data)
    rows, drops = read(path, "parquet")
    assert [row["id"] for row in rows] == [f"s/a.parquet:{i}" for i in (*range(100), *range(200, 300))]
    assert reasons(drops) == [("s/a.parquet:100", "unreadable file")]
    assert "row group 1, rows 100 to 199" in drops[0][2]


def test_columns_of_parquet_are_checked_before_work(tmp_path):
    write_parquet(tmp_path / "a.parquet", ["x"], content=["y"], score=[0.5])
    with pytest.raises(
        UserError, match=r"no text_column 'contents' in .*a\.parquet \(did you mean 'content'\?\)"
    ):
        plan_units([source(tmp_path, "parquet", text_column="contents")], 100)
    with pytest.raises(UserError, match=r"id_column 'score' of .* is double, not text"):
        plan_units([source(tmp_path, "parquet", id_column="score")], 100)


def test_large_texts_come_in_small_tables(tmp_path):
    sizes = [3 * 2**20] * 12 + [LONGEST, LONGEST + 1]
    write_parquet(tmp_path / "a.parquet", ["x" * size for size in sizes], group=5)
    config = source(tmp_path, "parquet")
    drops = []
    tables = [
        table
        for unit in plan_units([config], 2**30)
        for table in read_unit(unit, config, lambda *row: drops.append(row))
    ]
    assert sum(table.num_rows for table in tables) == 13
    assert all(sum(map(len, table["text"].to_pylist())) <= LONGEST for table in tables)
    assert reasons(drops) == [("s/a.parquet:13", "too long")] and len(drops[0][3]) == 2000


# ---------------------------------------------------------------------------- JSON lines


def test_every_line_is_read_once_however_it_is_cut(tmp_path):
    rng = np.random.default_rng(0)
    rows = [{"text": f"{i} " + "咳" * int(rng.integers(0, 40)), "n": i} for i in range(300)]
    write_jsonl(tmp_path / "a.jsonl", rows)
    whole, drops = read(tmp_path / "a.jsonl", "jsonl", 2**30)
    assert [row["text"] for row in whole] == [row["text"] for row in rows] and not drops
    data = (tmp_path / "a.jsonl").read_bytes()
    for row in whole:  # the key is where the line begins
        offset = int(row["id"].rpartition(":")[2])
        assert json.loads(data[offset:].split(b"\n")[0])["text"] == row["text"]
    for unit_bytes in (1, 7, 50, 99, 1000, len(data) - 1):
        assert read(tmp_path / "a.jsonl", "jsonl", unit_bytes) == (whole, [])


def test_one_line_file_without_an_end(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "a"}\r\n\r\n\n{"text": "b"}')
    for unit_bytes in (1, 5, 2**20):
        rows, drops = read(tmp_path, "jsonl", unit_bytes)
        assert texts(rows) == {"s/a.jsonl:3": "a", "s/a.jsonl:21": "b"} and not drops


BAD_LINES = [
    (b"{'text': 'x'}", "malformed record", "not valid JSON"),
    (b'["text"]', "malformed record", "expected a JSON object, got list"),
    (b'{"other": "x"}', "malformed record", "no field 'text'"),
    (b'{"text": 5}', "malformed record", "field 'text' is int, not text"),
    (b'{"text": null}', "empty", "no text"),
    (b'{"text": " \\n"}', "empty", "no text"),
    (b'{"text": "a"}{"text": "b"}', "malformed record", "not valid JSON"),
    (b'{"text": "a\xff"}', "broken encoding", "not UTF-8 at byte 11 of the line"),
    (b'{"text": "a", "other": "\xe5\xa5"}', "broken encoding", "not UTF-8 at byte 24 of the line"),
    (b'{"text": "a\\ud800"}', "broken encoding", "lone surrogate at character 1"),
    (b'{"text": "a', "malformed record", "not valid JSON"),
    (b"[" * 100_000, "malformed record", "nested too deeply"),
    (b"9" * 5000, "malformed record", "number too long"),
    (b'{"text": "a\x00b"}', "malformed record", "not valid JSON"),
]


def test_bad_lines_are_told_one_by_one_and_good_ones_stay(tmp_path):
    path, expected, offset = tmp_path / "a.jsonl", [], 0
    with open(path, "wb") as file:
        for number, (line, reason, detail) in enumerate(BAD_LINES):
            good = json.dumps({"text": f"good {number}"}).encode()
            offset += file.write(good + b"\n")
            expected.append((f"s/a.jsonl:{offset}", reason, detail))
            offset += file.write(line + b"\n")
    rows, drops = read(path, "jsonl")
    assert [row["text"] for row in rows] == [f"good {number}" for number in range(len(BAD_LINES))]
    for (key, reason, detail, _), (wanted, why, how) in zip(sorted(drops), sorted(expected), strict=True):
        assert (key, reason) == (wanted, why) and how in detail
    assert read(path, "jsonl", 40)[0] == rows  # nor does it matter what else is in the part


@pytest.mark.parametrize("line", [line for line, *_ in BAD_LINES])
def test_a_bad_line_alone_is_one_drop(tmp_path, line):
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "first"}\n' + line + b"\n")
    rows, drops = read(tmp_path, "jsonl")
    assert texts(rows) == {"s/a.jsonl:0": "first"} and [drop[0] for drop in drops] == ["s/a.jsonl:18"]


scalars = st.one_of(st.none(), st.integers(-(2**70), 2**70), st.text(max_size=8), st.booleans(), st.floats())
lines_of_json = st.lists(
    st.one_of(
        st.dictionaries(
            st.sampled_from(["text", "id", "x"]), st.one_of(scalars, st.lists(scalars, max_size=2))
        ),
        st.fixed_dictionaries({"text": st.text(min_size=1), "id": st.integers(0, 99) | st.text(max_size=3)}),
    ).map(lambda row: json.dumps(row).encode())
    | st.binary(max_size=12).filter(lambda data: b"\n" not in data),
    max_size=12,
)


@settings(max_examples=150, deadline=None)
@given(lines_of_json)
def test_arrow_and_the_line_by_line_reader_agree(lines):
    """Whatever Arrow takes as a block, it takes as we would line by line."""
    block = b"".join(line + b"\n" for line in [*lines, b""])
    config = source("x", "jsonl", id_column="id")

    def outcome():
        drops = []
        tables = jsonl._json_block(block, 0, "f", config, lambda *row: drops.append(row))
        return [row for table in tables for row in table.to_pylist()], sorted(drops)

    fast = outcome()
    whole, jsonl._json_whole = jsonl._json_whole, lambda *_: None
    try:
        assert fast == outcome()
    finally:
        jsonl._json_whole = whole


def test_ids_of_json_lines(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", [{"text": "a", "id": 5}, {"text": "b", "id": 6}])
    write_jsonl(tmp_path / "b.jsonl", [{"text": "a", "id": "x"}, {"text": "b"}])
    write_jsonl(
        tmp_path / "c.jsonl", [{"text": "a", "id": 2**80}, {"text": "b", "id": [1]}, {"text": "c", "id": "k"}]
    )
    rows, drops = read(tmp_path, "jsonl", id_column="id")
    ids = [row["id"] for row in rows]
    assert ids == ["s/5", "s/6", "s/x", "s/b.jsonl:25", f"s/{2**80}", "s/c.jsonl:47", "s/k"] and not drops


def test_a_line_without_end_is_passed_over_unheld(tmp_path):
    path = tmp_path / "a.jsonl"
    with open(path, "wb") as file:
        file.write(b'{"text": "first"}\n{"text": "')
        for _ in range(150):
            file.write(b"x" * 2**20)
        file.write(b'"}\n{"text": "last"}\n')
    with memory_within(100 * 2**20):
        rows, drops = read(path, "jsonl", 2**30)
    assert [row["text"] for row in rows] == ["first", "last"]
    [(key, reason, detail, text)] = drops
    assert (key, reason) == ("s/a.jsonl:18", "too long") and f"a line of {150 * 2**20 + 12} bytes" in detail
    assert len(text) == 2000
    assert read(path, "jsonl", 2**23) == (rows, drops)  # a part that holds nothing but the middle of it


@pytest.mark.parametrize("length", [LONGEST, LONGEST + 1])
def test_the_longest_line_is_exact(tmp_path, length):
    padding = length - len('{"text": "a", "x": ""}')
    line = json.dumps({"text": "a", "x": "y" * padding})
    assert len(line) == length
    (tmp_path / "a.jsonl").write_text('{"text": "b"}\n' + line + '\n{"text": "c"}\n')
    rows, drops = read(tmp_path, "jsonl")
    assert [row["text"] for row in rows] == (["b", "a", "c"] if length == LONGEST else ["b", "c"])
    assert len(drops) == (length > LONGEST)


def test_compressed_lines(tmp_path):
    rows = [{"text": f"line {i}"} for i in range(1000)]
    write_jsonl(tmp_path / "plain.jsonl", rows)
    data = (tmp_path / "plain.jsonl").read_bytes()
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(data[:5000]) + gzip.compress(data[5000:]))
    with pa.CompressedOutputStream(str(tmp_path / "c.jsonl.zst"), "zstd") as file:
        file.write(data)
    found, drops = read(tmp_path, "jsonl", 5000)
    by_file = {}
    for row in found:
        name, _, offset = row["id"].removeprefix("s/").rpartition(":")
        by_file.setdefault(name, []).append((offset, row["text"]))
    assert by_file["b.jsonl.gz"] == by_file["c.jsonl.zst"] == by_file["plain.jsonl"] and not drops
    units = plan_units([source(tmp_path, "jsonl")], 5000)
    assert [unit["start"] for unit in units if "plain" not in unit["files"][0]] == [0, 0]


def test_a_compressed_file_that_ends_early_keeps_its_beginning(tmp_path):
    rng = np.random.default_rng(0)
    data = b"".join(json.dumps({"text": rng.bytes(500).hex()}).encode() + b"\n" for _ in range(12_000))
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(data, 1)[:-50_000])
    (tmp_path / "b.jsonl").write_text('{"text": "next"}\n')
    rows, drops = read(tmp_path, "jsonl")
    assert 3000 < len(rows) < 12_000 and rows[-1]["text"] == "next"
    assert reasons(drops) == [("s/a.jsonl.gz", "unreadable file")] and "Truncated" in drops[0][2]


def test_a_compressed_bomb_is_refused(tmp_path):
    with gzip.open(tmp_path / "a.jsonl.gz", "wb", 9) as file:
        for _ in range(100):
            file.write(bytes(2**20))
    rows, drops = read(tmp_path, "jsonl")
    assert not rows and reasons(drops) == [("s/a.jsonl.gz", "unreadable file")]
    assert "unpacks to more than 200 times its size" in drops[0][2]


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be"])
def test_json_lines_in_utf16_are_one_drop(tmp_path, encoding):
    text = "\ufeff" + '{"text": "a"}\n' * 50
    (tmp_path / "a.jsonl").write_bytes(text.encode(encoding))
    for unit_bytes in (10, 2**20):
        rows, drops = read(tmp_path, "jsonl", unit_bytes)
        assert not rows and reasons(drops) == [("s/a.jsonl", "unreadable file")] and "UTF-16" in drops[0][2]


def test_a_misspelt_field_is_refused_before_work(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", [{"content": "a", "key": 1}, {"content": "b", "key": 2}])
    with pytest.raises(UserError, match=r"no text_column 'text' in .*; the first record has content, key"):
        plan_units([source(tmp_path, "jsonl")], 100)
    with pytest.raises(UserError, match=r"no id_column 'keys' in .* \(did you mean 'key'\?\)"):
        plan_units([source(tmp_path, "jsonl", text_column="content", id_column="keys")], 100)


def test_a_reader_that_breaks_down_is_not_hidden(tmp_path, monkeypatch):
    """Only what a file does wrong goes into the ledger; a mistake of ours must be seen."""
    (tmp_path / "a.txt").write_text("text")
    from galenic.corpus import units

    def broken(*_):
        raise KeyError("ours")

    monkeypatch.setattr(units, "page_records", broken)
    with pytest.raises(KeyError, match="ours"):
        read(tmp_path, "text")
    monkeypatch.setattr(units, "page_records", lambda *_: (_ for _ in ()).throw(Unreadable("theirs")))
    assert reasons(read(tmp_path, "text")[1]) == [("s/a.txt", "unreadable file")]
