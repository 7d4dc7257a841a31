import gzip
import io
import os
import socket
import tarfile
import zipfile

import pyarrow as pa
import pyarrow.parquet as parquet
import pytest
from reader_helpers import read, reasons, source, texts

from galenic.corpus.readers import files
from galenic.corpus.readers.files import listing, relative_name
from galenic.corpus.units import plan_units
from galenic.runtime import UserError


def names(path, format="text"):
    return [file.name for file in listing(str(path), format)]


def tree(root, *paths):
    for path in paths:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(f"text of {path}")


# ---------------------------------------------------------------------------- listing


def test_a_folder_gives_what_fits_and_passes_over_the_rest(tmp_path):
    tree(
        tmp_path,
        "b.txt",
        "a/z.TXT",
        "a/y.text",
        "readme.md",
        ".hidden.txt",
        ".git/x.txt",
        "c.txt.gz",
        "d.zip",
    )
    assert names(tmp_path) == ["a/y.text", "a/z.TXT", "b.txt", "c.txt.gz", "d.zip"]
    assert names(tmp_path / "b.txt") == ["b.txt"] and names(f"{tmp_path}/") == names(tmp_path)


@pytest.mark.parametrize(
    ("pattern", "found"),
    [
        ("*.txt", ["one.txt", "two.txt"]),
        ("**/*.txt", ["deep/er/x.txt", "deep/y.txt", "one.txt", "two.txt"]),
        ("deep/*.txt", ["y.txt"]),
        ("deep/**", ["er/x.txt", "y.txt"]),
        ("*/er", ["deep/er/x.txt"]),
        ("[!o]*.txt", ["two.txt"]),
        ("t?o.txt", ["two.txt"]),
        ("*.dat", ["three.dat"]),
    ],
)
def test_patterns(tmp_path, pattern, found):
    tree(tmp_path, "one.txt", "two.txt", "three.dat", "deep/er/x.txt", "deep/y.txt")
    assert names(tmp_path / pattern) == found


def test_a_name_may_hold_a_bracket_and_a_folder_an_ending(tmp_path):
    tree(tmp_path, "a[1].txt", "x.parquet/part.txt")
    assert names(tmp_path / "a[1].txt") == ["a[1].txt"] and names(tmp_path / "x.parquet") == ["part.txt"]


def test_ids_say_nothing_of_this_machine(tmp_path, monkeypatch):
    tree(tmp_path, "data/a/b.txt")
    monkeypatch.chdir(tmp_path)
    for path in ("data", str(tmp_path / "data"), "./data/", f"{tmp_path}/data/*/*.txt"):
        rows, _ = read(path, "text")
        assert [row["id"] for row in rows] == ["s/a/b.txt"]
    assert relative_name("s3://bucket/data/a/b.txt", "s3://bucket/data") == "a/b.txt"
    assert relative_name("s3://bucket/data/b.txt", "s3://bucket/data/b.txt") == "b.txt"
    assert relative_name("s3://bucket/data/b.txt", "s3://bucket/*/b.txt") == "data/b.txt"


def test_links_may_loop_and_lead_nowhere(tmp_path):
    tree(tmp_path, "a/x.txt", "b/y.txt")
    (tmp_path / "a" / "up").symlink_to(tmp_path)
    (tmp_path / "a" / "self").symlink_to(tmp_path / "a")
    (tmp_path / "b" / "linked.txt").symlink_to(tmp_path / "a" / "x.txt")
    (tmp_path / "b" / "nowhere.txt").symlink_to(tmp_path / "gone")
    os.mkfifo(tmp_path / "b" / "pipe.txt")
    rows, drops = read(tmp_path, "text")
    assert [row["id"] for row in rows] == ["s/a/x.txt", "s/b/linked.txt", "s/b/y.txt"]
    assert reasons(drops) == [("s/b/nowhere.txt", "unreadable file")]
    with pytest.raises(UserError, match="neither a file nor a folder"):
        listing(str(tmp_path / "b" / "pipe.txt"), "text")


def test_names_that_are_not_utf8(tmp_path):
    with open(os.fsencode(tmp_path) + b"/\xb9\xfe.txt", "w") as file:
        file.write("text")
    assert [row["id"] for row in read(tmp_path, "text")[0]] == [r"s/\udcb9\udcfe.txt"]


@pytest.mark.parametrize(
    ("path", "format", "message"),
    [
        ("none", "text", "none: no such file or folder"),
        ("none/*.txt", "text", "matches no file"),
        ("*.html", "html", "matches no file"),
        ("empty", "text", "an empty folder"),
        (
            "a.jsonl",
            "parquet",
            r"no file of format 'parquet' \(.parquet or .pq .*a.jsonl; set format to 'jsonl'\?",
        ),
        (".", "parquet", r"no file of format 'parquet'"),
        ("a.txt", "umls", "set format to 'text'"),
        ("ftp://x/a.txt", "text", "begin with s3:// or hf://"),
    ],
)
def test_paths_that_give_nothing(tmp_path, path, format, message):
    tree(tmp_path, "a.jsonl", "a.txt")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=message):
        plan_units([source(path if "://" in path else f"{tmp_path}/{path}", format)], 100)


def test_a_named_file_with_an_ending_that_says_nothing_is_taken_at_its_word(tmp_path):
    (tmp_path / "notes.dat").write_text("a note")
    assert texts(read(tmp_path / "notes.dat", "text")[0]) == {"s/notes.dat": "a note"}
    (tmp_path / "notes").write_text('{"text": "a"}')
    assert len(read(tmp_path / "notes", "jsonl")[0]) == 1


def test_json_beside_json_lines_is_something_else(tmp_path):
    (tmp_path / "info.json").write_text('{\n"text": "no"\n}')
    assert names(tmp_path, "jsonl") == ["info.json"]
    (tmp_path / "data.jsonl").write_text('{"text": "yes"}')
    assert [row["text"] for row in read(tmp_path, "jsonl")[0]] == ["yes"]
    (tmp_path / "data.jsonl").write_text('[{"text": "a"},\n{"text": "b"}]')
    with pytest.raises(UserError, match="one JSON list, not JSON lines"):
        read(tmp_path, "jsonl")


def test_a_folder_that_may_not_be_entered_is_told(tmp_path):
    tree(tmp_path, "a/x.txt", "b/y.txt")
    (tmp_path / "a").chmod(0)
    try:
        if os.access(tmp_path / "a", os.R_OK):
            pytest.skip("root may enter everything")
        with pytest.raises(UserError, match="cannot be listed"):
            listing(str(tmp_path), "text")
    finally:
        (tmp_path / "a").chmod(0o700)


def test_local_paths_open_no_connection(tmp_path, monkeypatch):
    def refuse(*_):
        raise AssertionError("a connection")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(files, "_s3", refuse)
    monkeypatch.setattr(files, "_hub", refuse)
    tree(tmp_path, "a.txt", "b.html", "c.md")
    for format in ("text", "html", "markdown"):
        assert len(read(tmp_path, format)[0]) == 1


# ---------------------------------------------------------------------------- other places


def test_the_hub_is_read_through_its_own_file_system(tmp_path, monkeypatch):
    """The Hub's file system is an fsspec one; another of the kind stands in for it."""
    from fsspec.implementations.dirfs import DirFileSystem
    from fsspec.implementations.local import LocalFileSystem

    folder = tmp_path / "datasets" / "owner" / "name" / "data"
    folder.mkdir(parents=True)
    parquet.write_table(pa.table({"text": ["a", "b"]}), folder / "train-0.parquet")
    (folder / "more.jsonl").write_text('{"text": "c"}\n' * 9)
    monkeypatch.setattr(
        "huggingface_hub.HfFileSystem", lambda: DirFileSystem(str(tmp_path), LocalFileSystem())
    )
    files._hub.cache_clear()
    try:
        rows, drops = read("hf://datasets/owner/name", "parquet")
        assert texts(rows) == {"s/data/train-0.parquet:0": "a", "s/data/train-0.parquet:1": "b"} and not drops
        assert len(read("hf://datasets/owner/name/data/*.jsonl", "jsonl", 20)[0]) == 9
        with pytest.raises(UserError, match="no such file or folder"):
            read("hf://datasets/owner/none", "parquet")
    finally:
        files._hub.cache_clear()


def test_what_lies_elsewhere_and_cannot_be_had_stops_the_run(tmp_path, monkeypatch):
    """A connection that breaks must not turn files into dropped ones."""
    from fsspec.implementations.dirfs import DirFileSystem
    from fsspec.implementations.local import LocalFileSystem

    (tmp_path / "datasets").mkdir()
    (tmp_path / "datasets" / "a.txt").write_text("text")
    monkeypatch.setattr(
        "huggingface_hub.HfFileSystem", lambda: DirFileSystem(str(tmp_path), LocalFileSystem())
    )
    files._hub.cache_clear()
    try:
        config = source("hf://datasets", "text")
        units = plan_units([config], 100)
        (tmp_path / "datasets").rename(tmp_path / "away")
        from galenic.corpus.units import read_unit

        with pytest.raises(UserError, match="cannot be read now"):
            list(read_unit(units[0], config, lambda *_: None))
    finally:
        files._hub.cache_clear()


# ---------------------------------------------------------------------------- archives


def zipped(path, members, **options):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, **options) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return path


def tarred(path, members, mode="w"):
    with tarfile.open(path, mode) as archive:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


MEMBERS = {"b.txt": b"second", "a/a.txt": b"first", "x.png": b"picture", "c.txt.gz": gzip.compress(b"third")}


@pytest.mark.parametrize("name", ["m.zip", "m.tar", "m.tar.gz", "m.tgz", "m.tar.zst"])
def test_members_are_read_in_the_archives_own_order(tmp_path, name):
    path = tmp_path / name
    if name.endswith(".zip"):
        zipped(path, MEMBERS)
    elif name.endswith(".zst"):
        with pa.CompressedOutputStream(str(path), "zstd") as file:
            file.write(tarred(tmp_path / "plain", MEMBERS).read_bytes())
    else:
        tarred(path, MEMBERS, "w:gz" if name.endswith("gz") else "w")
    rows, drops = read(path, "text")
    assert [(row["id"], row["text"]) for row in rows] == [
        (f"s/{name}/b.txt", "second"),
        (f"s/{name}/a/a.txt", "first"),
        (f"s/{name}/c.txt.gz", "third"),
    ]
    assert not drops


def test_parquet_and_json_lines_in_an_archive(tmp_path):
    buffer = io.BytesIO()
    parquet.write_table(pa.table({"text": ["a", "b"]}), buffer)
    path = zipped(tmp_path / "m.zip", {"p.parquet": buffer.getvalue(), "cut.parquet": buffer.getvalue()[:-9]})
    rows, drops = read(path, "parquet")
    assert texts(rows) == {"s/m.zip/p.parquet:0": "a", "s/m.zip/p.parquet:1": "b"}
    assert reasons(drops) == [("s/m.zip/cut.parquet", "unreadable file")]
    with pytest.raises(UserError, match="no text_column 'content'"):
        read(path, "parquet", text_column="content")
    path = zipped(tmp_path / "j.zip", {"j.jsonl": b'{"text": "a"}\n{"text": 1}\n'})
    rows, drops = read(path, "jsonl")
    assert texts(rows) == {"s/j.zip/j.jsonl:0": "a"} and reasons(drops) == [
        ("s/j.zip/j.jsonl:14", "malformed record")
    ]


def test_paths_in_an_archive_lead_nowhere(tmp_path):
    inside = tmp_path / "in"
    inside.mkdir()
    members = {"../../evil.txt": b"text one", "/etc/evil.txt": b"text two"}
    zipped(inside / "m.zip", members)
    tarred(inside / "m.tar", members)
    before = sorted(tmp_path.rglob("*"))
    rows, drops = read(inside, "text")
    assert [row["id"] for row in rows] == [
        f"s/m.{kind}/{name}" for kind in ("tar", "zip") for name in ("../../evil.txt", "/etc/evil.txt")
    ]
    assert sorted(tmp_path.rglob("*")) == before and not drops


def test_links_and_devices_in_a_tar_are_no_documents(tmp_path):
    with tarfile.open(tmp_path / "m.tar", "w") as archive:
        for name, kind in (
            ("link.txt", tarfile.SYMTYPE),
            ("hard.txt", tarfile.LNKTYPE),
            ("fifo.txt", tarfile.FIFOTYPE),
        ):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "/etc/passwd"
            archive.addfile(info)
    assert read(tmp_path, "text") == ([], [])


def test_archives_in_archives_are_opened_once(tmp_path):
    innermost = zipped(tmp_path / "3", {"c.txt": b"third"}).read_bytes()
    inner = zipped(tmp_path / "2", {"b.txt": b"second", "deep.zip": innermost}).read_bytes()
    path = zipped(
        tmp_path / "m.zip",
        {"a.txt": b"first", "in.zip": inner, "bad.tar.gz": b"no archive", "z.txt": b"last"},
    )
    rows, drops = read(path, "text")
    assert [row["text"] for row in rows] == ["first", "second", "last"]
    assert reasons(drops) == [
        ("s/m.zip/in.zip/deep.zip", "nested archive"),
        ("s/m.zip/bad.tar.gz", "unreadable file"),
    ]


def test_a_zip_bomb_is_refused(tmp_path):
    bomb = zipped(
        tmp_path / "a.zip", {"small.txt": b"text", "zeros.txt": bytes(100 * 2**20), "after.txt": b"text"}
    )
    (tmp_path / "b.txt").write_text("next")
    rows, drops = read(tmp_path, "text")
    assert [row["text"] for row in rows] == ["text", "next"]
    assert reasons(drops) == [("s/a.zip", "unreadable file")] and "refused as a bomb" in drops[0][2]
    # Nor does it help to hide it in an archive, or in many members.
    zipped(tmp_path / "a.zip", {"inner.zip": bomb.read_bytes(), "after.txt": b"text"})
    assert [row["text"] for row in read(tmp_path, "text")[0]] == ["text", "next"]
    zipped(tmp_path / "a.zip", {f"{i}.txt": bytes(2**20) for i in range(100)})
    rows, drops = read(tmp_path, "text")
    assert rows[-1]["text"] == "next" and drops[-1][1] == "unreadable file"


def test_a_tar_bomb_is_refused(tmp_path):
    tarred(tmp_path / "a.tar.gz", {"small.txt": b"text", "zeros.txt": bytes(100 * 2**20)}, "w:gz")
    rows, drops = read(tmp_path, "text")
    assert [row["text"] for row in rows] == ["text"]
    assert reasons(drops) == [("s/a.tar.gz", "unreadable file")] and "refused as a bomb" in drops[0][2]


def test_damaged_archives(tmp_path):
    content = {f"{i}.txt": os.urandom(30_000).hex().encode() for i in range(4)}
    data = bytearray(zipped(tmp_path / "a.zip", content).read_bytes())
    with zipfile.ZipFile(tmp_path / "a.zip") as archive:
        offset = archive.getinfo("1.txt").header_offset
    data[offset + 500 : offset + 520] = bytes(20)
    (tmp_path / "a.zip").write_bytes(data)
    (tmp_path / "b.zip").write_bytes(data[: len(data) // 2])
    (tmp_path / "c.tar").write_bytes(b"no archive" * 100)
    whole = tarred(tmp_path / "d.tar.gz", content, "w:gz").read_bytes()
    (tmp_path / "d.tar.gz").write_bytes(whole[: len(whole) * 3 // 5])
    rows, drops = read(tmp_path, "text")
    found = [row["id"] for row in rows]
    assert found[:3] == ["s/a.zip/0.txt", "s/a.zip/2.txt", "s/a.zip/3.txt"]
    assert found[3:] == ["s/d.tar.gz/0.txt", "s/d.tar.gz/1.txt"]
    assert reasons(drops)[:3] == [
        ("s/a.zip/1.txt", "unreadable file"),
        ("s/b.zip", "unreadable file"),
        ("s/c.tar", "unreadable file"),
    ]
    assert ("s/d.tar.gz", "unreadable file") in reasons(drops)


def test_a_full_disk_is_no_fault_of_the_archive(tmp_path, monkeypatch):
    from galenic.corpus.readers import archives

    class Full(archives.SpooledTemporaryFile):
        def write(self, _):
            raise OSError(28, "No space left on device")

    zipped(tmp_path / "a.zip", {"a.txt": b"text"})
    monkeypatch.setattr(archives, "SpooledTemporaryFile", Full)
    with pytest.raises(UserError, match="No space left on device; let TMPDIR"):
        read(tmp_path, "text")


def test_a_locked_member_is_dropped_by_name(tmp_path):
    data = bytearray(zipped(tmp_path / "a.zip", {"a.txt": b"text"}).read_bytes())
    for mark, at in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):  # the bit that says: encrypted
        data[data.find(mark) + at] |= 1
    (tmp_path / "a.zip").write_bytes(data)
    rows, drops = read(tmp_path, "text")
    assert (
        not rows and reasons(drops) == [("s/a.zip/a.txt", "unreadable file")] and "encrypted" in drops[0][2]
    )
