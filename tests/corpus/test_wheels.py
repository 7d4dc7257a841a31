import hashlib
import zipfile

import pytest

from galenic.corpus.starter.wheels import Wheels, read_requirements
from galenic.runtime import UserError


def make_wheel(folder, filename, members):
    folder.mkdir(exist_ok=True)
    path = folder / filename
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in members.items():
            archive.writestr(zipfile.ZipInfo(name), data)  # no clock: the same bytes each time
    return path


def pin(path, name, version):
    return f"{name}=={version} --hash=sha256:{hashlib.sha256(path.read_bytes()).hexdigest()}\n"


@pytest.fixture
def tiny(tmp_path):
    path = make_wheel(tmp_path / "wheels", "some_data-1.2-py3-none-any.whl", {"some_data/a.txt": b"hello"})
    requirements = tmp_path / "wheels.txt"
    requirements.write_text(
        "# comment\n\n" + pin(path, "Some.Data", "1.2").replace(" --hash", " \\\n    --hash")
    )
    return tmp_path / "wheels", requirements, path


def test_reads_members_of_a_verified_wheel(tiny):
    folder, requirements, _ = tiny
    wheel = Wheels(folder, requirements).open("some-data")
    assert wheel.read("some_data/a.txt") == b"hello"
    assert wheel.members("some_data/", ".txt") == ["some_data/a.txt"]
    with pytest.raises(UserError, match=r"no file 'b\.txt'"):
        wheel.read("b.txt")


def test_wrong_hash_tells_both(tiny):
    folder, requirements, path = tiny
    wanted = hashlib.sha256(path.read_bytes()).hexdigest()
    path.write_bytes(path.read_bytes() + b"x")
    actual = hashlib.sha256(path.read_bytes()).hexdigest()
    with pytest.raises(UserError) as error:
        Wheels(folder, requirements).open("some-data")
    assert wanted in str(error.value) and actual in str(error.value)


def test_missing_wheel_names_file_folder_and_way_out(tiny):
    folder, requirements, path = tiny
    path.unlink()
    with pytest.raises(UserError, match=r"some_data-1\.2-\*\.whl is missing; run `make data`") as error:
        Wheels(folder, requirements).open("some-data")
    assert str(folder) in str(error.value)


def test_unpinned_package_suggests_the_nearest(tiny):
    folder, requirements, _ = tiny
    with pytest.raises(UserError, match="did you mean 'some-data'"):
        Wheels(folder, requirements).path("some-dat")


def test_pinned_file_that_is_no_archive(tmp_path):
    (tmp_path / "x-1-py3-none-any.whl").write_bytes(b"not a zip")
    requirements = tmp_path / "r.txt"
    requirements.write_text(pin(tmp_path / "x-1-py3-none-any.whl", "x", "1"))
    with pytest.raises(UserError, match="not a wheel"):
        Wheels(tmp_path, requirements).open("x")


@pytest.mark.parametrize("line", ["x>=1", "x==1", "x==1 --hash=md5:00", "-r other.txt"])
def test_requirements_without_pin_and_hash_are_refused(tmp_path, line):
    (tmp_path / "r.txt").write_text(f"# first\n{line}\n")
    with pytest.raises(UserError, match=r"r\.txt:2: expected 'name==version"):
        read_requirements(tmp_path / "r.txt")


def test_missing_requirements_file(tmp_path):
    with pytest.raises(UserError, match="no such requirements file"):
        read_requirements(tmp_path / "r.txt")
