"""What is told about the run."""

import json
from pathlib import Path
from typing import Any, TextIO

from galenic.pretrain.config import WatchConfig


class Watch:
    """Appends rows to `metrics.jsonl`."""

    def __init__(
        self,
        out: Path,
        config: WatchConfig | None = None,
        *,
        flops_per_token: float = 0.0,
        devices: int = 1,
        device: str = "cpu",
    ) -> None:
        self.path = out / "metrics.jsonl"
        self.file: TextIO | None = None

    def row(self, row: dict[str, Any]) -> None:
        """Appends a row."""
        if self.file is None:
            self.file = open(self.path, "a", encoding="utf-8")
        self.file.write(json.dumps(row, ensure_ascii=False) + "\n")
        self.file.flush()

    def close(self) -> None:
        """Closes the file."""
        if self.file is not None:
            self.file.close()
            self.file = None
