"""Data wheels: found by the requirements file, verified before a byte is believed, read as archives.

Nothing in a wheel is installed or imported. The requirements file is pip's own, with one hash a line:

    simple-icd-10-cm==1.5.0 --hash=sha256:6d46...
"""

import re
import zipfile
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from galenic.runtime import UserError, nearest, sha256_file

_REQUIREMENT = re.compile(
    r"(?P<name>[A-Za-z0-9._-]+)==(?P<version>[^\s;]+)(?P<hashes>(\s+--hash=sha256:[0-9a-f]{64})+)"
)


@dataclass(frozen=True, kw_only=True)
class Requirement:
    """One pinned distribution and the SHA-256 of the files that may stand for it."""

    name: str
    version: str
    sha256: tuple[str, ...]


def read_requirements(path: str | Path) -> dict[str, Requirement]:
    """Reads a pip requirements file of pins with hashes; keys are names in lower case with hyphens.

    Raises:
        UserError: the file is missing, or a line is not `name==version --hash=sha256:...` (line named).
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        raise UserError(f"{path}: no such requirements file") from None
    found: dict[str, Requirement] = {}
    waiting = ""
    for number, line in enumerate(lines, start=1):
        waiting = f"{waiting} {line.partition('#')[0].strip()}".strip()
        if waiting.endswith("\\"):
            waiting = waiting[:-1]
            continue
        if waiting:
            match = _REQUIREMENT.fullmatch(waiting)
            if match is None:
                raise UserError(
                    f"{path}:{number}: expected 'name==version --hash=sha256:...', got {waiting[:60]!r}"
                )
            name = re.sub(r"[-_.]+", "-", match["name"]).lower()
            hashes = tuple(re.findall(r"sha256:([0-9a-f]{64})", match["hashes"]))
            found[name] = Requirement(name=name, version=match["version"], sha256=hashes)
        waiting = ""
    return found


class Wheel:
    """A verified wheel: its members can be read."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._archive = zipfile.ZipFile(path)
        except zipfile.BadZipFile as error:
            raise UserError(f"{path}: not a wheel ({error})") from None

    def members(self, prefix: str, suffix: str) -> list[str]:
        """Returns the sorted names of the files that begin and end so."""
        names = self._archive.namelist()
        return sorted(n for n in names if n.startswith(prefix) and n.endswith(suffix))

    def read(self, member: str) -> bytes:
        """Returns the bytes of a file.

        Raises:
            UserError: the wheel has no such file, or its checksum is wrong.
        """
        try:
            return self._archive.read(member)
        except KeyError:
            raise UserError(f"{self.path}: no file '{member}' in this wheel") from None
        except (zipfile.BadZipFile, zlib.error) as error:
            raise UserError(f"{self.path}: '{member}' is damaged ({error})") from None


class Wheels:
    """The folder of data wheels of a recipe."""

    def __init__(self, folder: str | Path, requirements: str | Path) -> None:
        """Reads the requirements; wheels are looked for when asked for."""
        self.folder = Path(folder)
        self.requirements_file = Path(requirements)
        self.requirements = read_requirements(requirements)

    def path(self, package: str) -> Path:
        """Returns where the wheel of a distribution lies.

        Raises:
            UserError: it is not pinned, or not in the folder.
        """
        requirement = self.requirements.get(package)
        if requirement is None:
            hint = f"{nearest(package, self.requirements)}; add its pin and hash"
            raise UserError(f"{self.requirements_file}: no line for {package}{hint}")
        stem = f"{requirement.name.replace('-', '_')}-{requirement.version}"
        found = sorted(self.folder.glob(f"{stem}-*.whl"))
        if not found:
            raise UserError(f"{self.folder}: the wheel {stem}-*.whl is missing; run `make data` to fetch it")
        return found[0]

    def open(self, package: str) -> Wheel:
        """Returns the wheel of a distribution, verified.

        Raises:
            UserError: it is missing, or its SHA-256 is not the pinned one (both are told).
        """
        path = self.path(package)
        actual, wanted = sha256_file(path), self.requirements[package].sha256
        if actual not in wanted:
            raise UserError(
                f"{path}: SHA-256 is {actual} but {self.requirements_file} pins {' or '.join(wanted)}; "
                "delete the file and run `make data`"
            )
        return Wheel(path)

    def check(self, packages: Iterable[str]) -> None:
        """Raises a UserError for the first of the packages that is not in the folder; verifies nothing."""
        for package in packages:
            self.path(package)
