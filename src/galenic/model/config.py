"""What the verb `convert` can be told; torch-free."""

from dataclasses import dataclass

from galenic.runtime import UserError


@dataclass(frozen=True, kw_only=True)
class ConvertConfig:
    """Makes a model folder of a GGUF file, or of the one inside a pinned wheel."""

    out: str
    """Output folder: receives `model/`."""
    gguf: str | None = None
    """The file."""
    package: str | None = None
    """Instead of `gguf`: the distribution whose wheel holds it."""
    wheels: str = "data/models"
    """Folder with the wheel."""
    requirements: str = "recipes/smollm2/wheels.txt"
    """Requirements file that pins the wheel and its SHA-256."""

    def __post_init__(self) -> None:
        if (self.gguf is None) == (self.package is None):
            raise UserError("gguf: name a GGUF file, or a package whose wheel holds one; one of the two")

    def reads(self) -> list[str]:
        """Inputs, for the fingerprint and the plan; the requirements hold the wheel's hash, which is checked."""
        return [self.gguf or self.requirements]
