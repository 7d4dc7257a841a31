"""Objects in an S3 server of others (moto) are read as files of the same names would be."""

import gzip
import io
import json
import socket
import subprocess
import time
import urllib.request
import zipfile

import pyarrow as pa
import pyarrow.parquet as parquet
import pytest
from parity_helpers import executable, surroundings

from galenic.corpus.config import SourceConfig
from galenic.corpus.readers import files
from galenic.corpus.units import plan_units, read_unit
from galenic.runtime import UserError

pytestmark = pytest.mark.parity


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def put(address: str, path: str, data: bytes = b"") -> None:
    headers = {"Content-Type": "application/octet-stream", "x-amz-acl": "public-read"}
    request = urllib.request.Request(f"{address}/{path}", data=data, headers=headers, method="PUT")
    with urllib.request.urlopen(request, timeout=20):
        pass


@pytest.fixture
def server(tmp_path, monkeypatch):
    """A running server: (address, its process); our environment points to it and to nothing else."""
    port = free_port()
    address = f"http://127.0.0.1:{port}"
    command = [executable("moto", "moto_server"), "-H", "127.0.0.1", "-p", str(port)]
    process = subprocess.Popen(
        command,
        env=surroundings(tmp_path),
        cwd=tmp_path,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    for name, value in {
        "AWS_ENDPOINT_URL": address,
        "AWS_ACCESS_KEY_ID": "testing",
        "AWS_SECRET_ACCESS_KEY": "testing",
        "AWS_EC2_METADATA_DISABLED": "true",
    }.items():
        monkeypatch.setenv(name, value)
    for name in ("AWS_REGION", "AWS_DEFAULT_REGION", "AWS_ENDPOINT_URL_S3", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    files._s3.cache_clear()
    try:
        for _ in range(240):
            try:
                put(address, "clinic")
                break
            except OSError:
                assert process.poll() is None, "the server ended"
                time.sleep(0.25)
        yield address, process
    finally:
        process.kill()
        process.wait()
        files._s3.cache_clear()


def objects() -> dict[str, bytes]:
    lines = b"".join(json.dumps({"text": f"line {i}", "id": i}).encode() + b"\n" for i in range(3000))
    table, archive = io.BytesIO(), io.BytesIO()
    parquet.write_table(pa.table({"text": [f"row {i}" for i in range(500)]}), table, row_group_size=50)
    with zipfile.ZipFile(archive, "w") as members:
        members.writestr("in/note.txt", "a note")
    return {
        "a/lines.jsonl": lines,
        "a/packed.jsonl.gz": gzip.compress(lines),
        "a/deep/table.parquet": table.getvalue(),
        "a/cut.parquet": table.getvalue()[:-20],
        "notes/one.txt": b"one",
        "notes/ä.txt": b"two",
        "notes/more.zip": archive.getvalue(),
        "notes/.hidden.txt": b"hidden",
    }


def read(path: str, format: str, unit_bytes: int):
    source = SourceConfig(name="s", path=path, format=format, licence="CC0")
    rows, drops = [], []
    for unit in plan_units([source], unit_bytes):
        for table in read_unit(unit, source, lambda *row: drops.append(row)):
            rows += table.to_pylist()
    return rows, drops


@pytest.mark.parametrize(
    ("path", "format"),
    [
        ("a", "jsonl"),
        ("a/lines.jsonl", "jsonl"),
        ("a/*.gz", "jsonl"),
        ("a", "parquet"),
        ("**/*.parquet", "parquet"),
        ("notes", "text"),
    ],
)
def test_objects_are_read_as_files_are(server, tmp_path, path, format):
    address, _ = server
    for name, data in objects().items():
        put(address, "clinic/" + urllib.request.quote(name), data)
        (tmp_path / "clinic" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "clinic" / name).write_bytes(data)
    local = read(f"{tmp_path}/clinic/{path}", format, 3000)
    assert local[0] and read(f"s3://clinic/{path}", format, 3000) == local
    assert read(f"s3://anonymous@clinic/{path}", format, 2**26)[0] == local[0]


def test_what_is_not_there_is_told(server):
    for path in ("s3://clinic/none", "s3://other/a", "s3://clinic/*.txt"):
        with pytest.raises(UserError, match=r"no such file or folder|matches no file"):
            plan_units([SourceConfig(name="s", path=path, format="text", licence="CC0")], 100)


def test_a_server_that_dies_stops_the_run_and_drops_nothing(server):
    address, process = server
    for name, data in objects().items():
        put(address, "clinic/" + urllib.request.quote(name), data)
    source = SourceConfig(name="s", path="s3://clinic/a", format="jsonl", licence="CC0")
    units, drops = plan_units([source], 3000), []
    tables = read_unit(units[0], source, lambda *row: drops.append(row))
    next(tables)
    process.kill()
    process.wait()
    with pytest.raises(UserError, match="cannot be read now"):
        for unit in units[1:]:
            list(read_unit(unit, source, lambda *row: drops.append(row)))
    assert not drops
