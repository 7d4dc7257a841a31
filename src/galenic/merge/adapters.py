"""LoRA adapters as experts, without making their weights: a view of the base with low-rank updates added while reading.

    expert = base + s B A        per adapted matrix, B (rows, r), A (r, columns), s = alpha / r

Norms and inner products of such task vectors come from the factors alone (`adapter_gram`), so adapters of one base are
measured without reading a weight of it.

A folder is PEFT's: `adapter_config.json` and `adapter_model.safetensors`. What PEFT can save and this file does not
understand is refused by name.
"""

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from galenic.merge.blocks import float_names
from galenic.merge.io import Checkpoint, TensorInfo, Weights, all_finite
from galenic.merge.statistics import gram_matrices
from galenic.runtime import Bar, UserError, nearest, read_json

CONFIG = "adapter_config.json"
PREFIX = "base_model.model."
"""What PEFT puts before the base's names."""
KINDS = {
    ".lora_A.weight": "A",
    ".lora_B.weight": "B",
    ".lora_embedding_A": "embedding A",
    ".lora_embedding_B": "embedding B",
}
REFUSED = (
    "use_dora",
    "use_qalora",
    "use_bdlora",
    "lora_bias",
    "layer_replication",
    "target_parameters",
    "trainable_token_indices",
    "alora_invocation_tokens",
    "arrow_config",
    "kasa_config",
    "monteclora_config",
)
"""Settings of PEFT that make an adapter more than `s B A`, or other matrices than the base's."""
CHANGES_THE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""Initialisations that take something from the base's weights: `s B A` belongs to what is left of them."""


def is_adapter(folder: Path) -> bool:
    """Whether a folder holds an adapter and no whole model."""
    whole = (folder / "model.safetensors").exists() or (folder / "model.safetensors.index.json").exists()
    return (folder / CONFIG).is_file() and not whole


class Adapter:
    """A base with an adapter's updates, read in parts; a context manager that closes the adapter's file.

    Adapted tensors are float64, as the update is added without rounding; others are the base's, or what the adapter
    holds in their place (`modules_to_save`, biases). Reading is thread-safe.

    Args:
        folder: PEFT's folder.
        base: the model the adapter was trained on.
        label: name in messages.
        base_files: the base's, if it is not the merge's base but this expert's own: then they are the expert's too.

    Raises:
        UserError: files are missing or malformed, a setting is not understood, or a tensor does not fit the base.
    """

    def __init__(self, folder: Path, base: Weights, label: str, base_files: Sequence[Path] = ()) -> None:
        self.folder = folder
        self._base_files = base_files
        self.label = label
        self.base = base
        self._settings = _read_settings(folder)
        if not any(folder.glob("*.safetensors")):
            if any(folder.glob("adapter_model.*")):
                raise UserError(
                    f"{folder}: only pickled weights, which are never loaded; save the adapter with PEFT's "
                    "save_pretrained"
                )
            raise UserError(f"{folder}: no adapter_model.safetensors in it")
        self._file = Checkpoint(folder, label)
        self._pairs: dict[str, tuple[str, str]] = {}  # the base's name -> names of A and B
        self._instead: dict[str, str] = {}  # the base's name -> name of what replaces it
        self._scales: dict[str, float] = {}
        self._place_tensors()
        tensors = dict(base.tensors)
        for name, own in self._instead.items():
            tensors[name] = self._file.tensors[own]
        for name in self._pairs:
            tensors[name] = TensorInfo(dtype=torch.float64, shape=tensors[name].shape)
        self.tensors: Mapping[str, TensorInfo] = tensors

    def __enter__(self) -> "Adapter":
        return self

    def __exit__(self, kind: type | None, value: BaseException | None, trace: TracebackType | None) -> None:
        self._file.__exit__(kind, value, trace)

    @property
    def files(self) -> list[Path]:
        """The adapter's files, and those of a base of its own."""
        return [self.folder / CONFIG, *self._file.files, *self._base_files]

    @property
    def nbytes(self) -> int:
        """Bytes that reading all tensors takes, the base's among them."""
        return self._file.nbytes + sum(info.nbytes for info in self.base.tensors.values())

    @property
    def replaced(self) -> list[str]:
        """Names of the base's tensors that the adapter holds whole."""
        return sorted(self._instead)

    def factors(self, name: str) -> tuple[Tensor, Tensor] | None:
        """Returns L (rows, r) and R (r, columns), float64, with L R the update of a tensor; None if it has none.

        Raises:
            UserError: a factor holds NaN or infinity.
        """
        if name not in self._pairs:
            return None
        first, second = (self._whole(own) for own in self._pairs[name])
        # Embeddings, and layers that store their weight transposed, add (B A)^T.
        left, right = (first.T, second.T) if self._is_transposed(name) else (second, first)
        return left * self._scales[name], right

    def read(self, name: str, start: int, stop: int) -> Tensor:
        """Returns the flattened elements [start, stop) of a tensor of base plus adapter."""
        own = self._instead.get(name)
        origin = self._file.read(own, start, stop) if own else self.base.read(name, start, stop)
        factors = self.factors(name)
        if factors is None or start == stop:
            return origin.to(self.tensors[name].dtype)
        left, right = factors
        width = self.tensors[name].shape[1]
        first, last = start // width, -(-stop // width)
        update = (left[first:last] @ right).flatten()
        return origin.double() + update[start - first * width : stop - first * width]

    def _whole(self, own: str) -> Tensor:
        info = self._file.tensors[own]
        values = self._file.read(own, 0, info.numel)
        if not all_finite(values):
            raise UserError(f"{self.label}: '{own}' holds NaN or infinity; mend or leave out the adapter")
        return values.view(info.shape).double()

    def _is_transposed(self, name: str) -> bool:
        return self._pairs[name][0].endswith("lora_embedding_A") or bool(self._settings.get("fan_in_fan_out"))

    def _place_tensors(self) -> None:
        """Finds out what each tensor of the file is in the base."""
        found: dict[str, dict[str, str]] = {}
        for own in self._file.tensors:
            key = own.removeprefix(PREFIX)
            ending = next((ending for ending in KINDS if key.endswith(ending)), None)
            if ending:
                module = key.removesuffix(ending)
                found.setdefault(self._in_base(f"{module}.weight", own), {})[KINDS[ending]] = own
            elif "lora_" in key:
                raise UserError(f"{self.label}: '{own}' is a part of an adapter that is not understood")
            else:
                self._instead[self._in_base(key.replace(".base_layer.", "."), own)] = own
        for name, own in self._instead.items():
            theirs, ours = self.base.tensors[name], self._file.tensors[own]
            if theirs.shape != ours.shape or not ours.dtype.is_floating_point:
                raise UserError(
                    f"{self.label}: '{own}' of shape {list(ours.shape)} would replace '{name}' of shape "
                    f"{list(theirs.shape)}; only adapters that keep the base's shapes can be merged"
                )
        for name, parts in found.items():
            if set(parts) not in ({"A", "B"}, {"embedding A", "embedding B"}):
                raise UserError(
                    f"{self.label}: '{name}' has {' and '.join(sorted(parts))} alone; an update is B A"
                )
            own_a, own_b = (parts[key] for key in sorted(parts))
            self._pairs[name] = (own_a, own_b)
            self._scales[name] = self._scale(name, own_a, own_b)

    def _in_base(self, name: str, own: str) -> str:
        if name in self.base.tensors:
            return name
        hint = nearest(name, self.base.tensors)
        tied = "; the base stores it tied to its embedding" if name == "lm_head.weight" else ""
        raise UserError(
            f"{self.label}: '{own}' belongs to '{name}', which {self.base.label} lacks{tied}{hint}"
        )

    def _scale(self, name: str, own_a: str, own_b: str) -> float:
        """Checks shapes and returns alpha / r, or alpha / sqrt(r) for rank-stabilised LoRA (arXiv 2312.03732)."""
        shape, a, b = self.base.tensors[name].shape, self._file.tensors[own_a], self._file.tensors[own_b]
        module = name.removesuffix(".weight")
        rank = self._pattern("rank_pattern", module, "r")
        expected = shape[::-1] if self._is_transposed(name) else shape
        fits = len(shape) == 2 and (*b.shape, *a.shape) == (expected[0], rank, rank, expected[1])
        if not fits or not a.dtype.is_floating_point or not b.dtype.is_floating_point:
            raise UserError(
                f"{self.label}: B of shape {list(b.shape)} and A of shape {list(a.shape)} with rank {rank:g} do not "
                f"make an update of '{name}', of shape {list(shape)}"
            )
        alpha = self._pattern("alpha_pattern", module, "lora_alpha")
        return alpha / (math.sqrt(rank) if self._settings.get("use_rslora") else rank)

    def _pattern(self, patterns: str, module: str, default: str) -> float:
        """Returns a module's number: that of the first pattern its name ends with, else the adapter's."""
        for pattern, number in (self._settings.get(patterns) or {}).items():
            if re.fullmatch(rf"(.*\.)?({pattern})", module):
                return number
        return self._settings[default]


def _read_settings(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG
    settings = read_json(path)
    if not isinstance(settings, dict) or settings.get("peft_type") != "LORA":
        kind = settings.get("peft_type") if isinstance(settings, dict) else settings
        raise UserError(f"{path}: peft_type is {kind}; LORA adapters can be merged")
    for key in REFUSED:
        if settings.get(key):
            raise UserError(
                f"{path}: {key} is set, which is not supported; merge the adapter into its base with PEFT"
            )
    start = str(settings.get("init_lora_weights", True)).lower()
    if start.startswith(CHANGES_THE_BASE):
        raise UserError(
            f"{path}: init_lora_weights is {start}, which changed the base's weights; save the adapter with PEFT's "
            "path_initial_model_for_weight_conversion first"
        )
    for key in ("r", "lora_alpha"):
        value = settings.get(key)
        if not _is_positive(value):
            raise UserError(f"{path}: {key} is {value!r}; it is a positive number")
    for key in ("rank_pattern", "alpha_pattern"):
        values = settings.get(key) or {}
        if not isinstance(values, dict) or not all(map(_is_positive, values.values())):
            raise UserError(f"{path}: {key} is {values!r}; it maps names to positive numbers")
        for pattern in values:
            try:
                re.compile(pattern)
            except re.error as error:
                raise UserError(f"{path}: {key}: {pattern!r} is not a regular expression ({error})") from None
    return settings


def _is_positive(value: Any) -> bool:
    """Whether a setting is a positive number, and none that no adapter can have."""
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < 2**31


# ---------------------------------------------------------------------------- norms without weights


def factor_inner_product(left: Tensor, right: Tensor, other_left: Tensor, other_right: Tensor) -> float:
    """Returns the inner product of two low-rank matrices from their factors.

        <L R, L' R'> = tr((L R)^T L' R') = sum of the entries of (L^T L') * (R R'^T)

    Args:
        left: L, (rows, r).
        right: R, (r, columns).
        other_left: L', (rows, r').
        other_right: R', (r', columns).
    """
    return float(((left.T @ other_left) * (right @ other_right.T)).sum())


def adapter_gram(base: Weights, adapters: Sequence[Adapter], bar: Bar | None = None) -> dict[str, Tensor]:
    """Computes the Gram matrix of adapters' task vectors, tensor by tensor, from their factors.

    Of the base only those tensors are read that an adapter replaces.

    Returns:
        As `statistics.gram`.
    """
    replaced = {name for adapter in adapters for name in adapter.replaced}
    whole = gram_matrices(_Part(base, replaced), [_Part(adapter, replaced) for adapter in adapters])
    matrices = {}
    for name in float_names(base):
        if name in replaced:
            matrices[name] = whole[name]
        else:
            matrices[name] = matrix = torch.zeros(len(adapters), len(adapters), dtype=torch.float64)
            factors = [adapter.factors(name) for adapter in adapters]
            for i, own in enumerate(factors):
                for j, other in enumerate(factors[: i + 1]):
                    if own and other:
                        matrix[i, j] = matrix[j, i] = factor_inner_product(*own, *other)
        if bar:
            bar.update(base.tensors[name].numel)
    return matrices


class _Part:
    """Some tensors of a model."""

    def __init__(self, model: Weights, names: set[str]) -> None:
        self.label = model.label
        self.tensors: Mapping[str, TensorInfo] = {n: i for n, i in model.tensors.items() if n in names}
        self._model = model

    def read(self, name: str, start: int, stop: int) -> Tensor:
        """Returns the flattened elements [start, stop) of a tensor."""
        return self._model.read(name, start, stop)
