"""What `galenic evaluate --compare` can be told. Torch-free."""

from dataclasses import dataclass
from pathlib import Path

from galenic.runtime import UserError


@dataclass(frozen=True, kw_only=True)
class CompareConfig:
    """Compares two evaluated models item by item."""

    a: str
    """Evaluation folder and model, `FOLDER:MODEL`; the folder alone if it holds one model."""
    b: str
    """The model that is held against it, written likewise; differences are b - a."""
    out: str | None = None
    """Folder that gets compare.json; without it the table is printed only."""
    common: bool = False
    """Compare the items that both have, where one has items that the other has not."""
    resamples: int = 10_000
    """Draws of the bootstrap and of the sign flips."""
    seed: int = 0
    """Fixes the draws."""

    def reads(self) -> list[str]:
        """Inputs, for the fingerprint and the plan."""
        return list(dict.fromkeys(place(given)[0] for given in (self.a, self.b)))

    def __post_init__(self) -> None:
        for name, given in (("a", self.a), ("b", self.b)):
            if not given:
                raise UserError(f"{name}: names no evaluation; write FOLDER:MODEL")
        if self.resamples < 100:
            raise UserError(f"resamples is {self.resamples}; an interval needs at least 100")


def place(given: str) -> tuple[str, str | None]:
    """Splits `FOLDER:MODEL`; a folder whose own name has a colon is taken as it is."""
    folder, colon, model = given.rpartition(":")
    return (given, None) if not colon or Path(given).is_dir() else (folder, model)
