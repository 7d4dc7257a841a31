"""What a merge needs to know: mergekit's words for the part that is supported."""

import math
import os
from dataclasses import dataclass, field
from pathlib import PurePath
from typing import Literal

from galenic.runtime import UserError

Method = Literal["metagpt", "linear", "task_arithmetic", "ties", "dare_linear", "dare_ties"]

TASK_ARITHMETIC_WEIGHT = 0.3
"""MetaGPT paper, experimental set-up: lambda of the task-arithmetic baseline; DARE keeps it, as dropping and
rescaling leaves the expectation of a task vector as it is."""
DENSITY = 0.55
"""MetaGPT paper, experimental set-up: share of entries that the TIES and DARE baselines keep."""

TAKES_DENSITY = ("ties", "dare_linear", "dare_ties")
TAKES_WEIGHT = ("linear", "task_arithmetic", "ties", "dare_linear", "dare_ties")
METAGPT_ONLY = ("scope", "norm_power", "max_coefficient", "scale", "trim", "norms")


@dataclass(frozen=True, kw_only=True)
class MergeParameters:
    """Numbers of one model, or of all models that do not say otherwise."""

    weight: float | None = None
    """Coefficient of the model. Default: 1 for `linear`, `ties` and `dare_ties` (all divide by a sum of weights; the
    merged task vector of the latter two is added with lambda = 1), 0.3 for `task_arithmetic` and `dare_linear`."""
    density: float | None = None
    """Share of task-vector entries kept by `ties`, `dare_linear`, `dare_ties` and by `metagpt` with `trim`, in (0, 1].
    Default: 0.55."""


@dataclass(frozen=True, kw_only=True)
class MethodParameters(MergeParameters):
    """Numbers of the method, and of all models that do not say otherwise."""

    scope: Literal["global", "layer", "tensor"] | None = None
    """`metagpt`: one set of coefficients for the whole model (the paper's), for each layer, or for each tensor.
    Default: global."""
    norm_power: float | None = None
    """`metagpt`: p of lambda_t ~ ||tau_t||^p. 2 is the paper's and the default; 0 is the weight average; negative
    powers favour short task vectors."""
    max_coefficient: float | None = None
    """`metagpt`: no coefficient exceeds this, at least 1/T; what is cut off goes to the others in proportion.
    Default: 1."""
    scale: float | None = None
    """`metagpt`: the merged task vector is multiplied by this before it is added to the base. Default: 1, where the
    base cancels."""
    trim: Literal["ties", "dare"] | None = None
    """`metagpt`: thins the task vectors to `density` first: `ties` trims, elects signs and averages with the
    coefficients as weights, `dare` drops and rescales. Default: neither."""
    norms: Literal["before_trim", "after_trim"] | None = None
    """`metagpt` with `trim`: whether the norms are those of the whole task vectors or of the thinned ones. The paper
    does not say which. Default: before_trim."""


@dataclass(frozen=True, kw_only=True)
class MergeModel:
    """One expert."""

    model: str
    """Model folder (safetensors)."""
    name: str | None = None
    """Name in the results and in the keys of DARE's random numbers. Default: the folder's name, or its
    parent's if the folder is called `model`."""
    parameters: MergeParameters = field(default_factory=MergeParameters)
    """This model's numbers."""

    def label(self) -> str:
        """Returns the expert's name."""
        return self.name or folder_label(self.model)


def folder_label(folder: str) -> str:
    """Names a model folder: its last part, or the part before if that is `model`."""
    path = PurePath(os.path.normpath(folder))
    return path.parent.name if path.name == "model" and path.parent.name else path.name


@dataclass(frozen=True, kw_only=True)
class MergeConfig:
    """Merges experts of one base into one model."""

    out: str
    """Output folder: receives `model/` and `merge.json`."""
    merge_method: Method = "metagpt"
    """`metagpt`, `linear`, `task_arithmetic`, `ties`, `dare_linear` or `dare_ties`."""
    base_model: str
    """Model folder the experts were fine-tuned from; its config and tokenizer go to the output."""
    models: list[MergeModel]
    """The experts."""
    parameters: MethodParameters = field(default_factory=MethodParameters)
    """Numbers of the method, and of all models that do not set their own."""
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Data type of the output's floating-point tensors. Default: each tensor's in the base."""
    seed: int = 0
    """Seed of DARE's dropping."""

    def __post_init__(self) -> None:
        """Refuses contradictions before any work.

        Raises:
            UserError: no models, a model twice, the base among the experts, a weight or density that is out of
                range, missing meaning for this method, or weights that sum to zero.
        """
        if not self.models:
            raise UserError("models: at least one expert is needed")
        self._check_models()
        self._check_numbers("parameters", self.parameters)
        self._check_metagpt()
        for index, model in enumerate(self.models):
            self._check_numbers(f"models[{index}].parameters", model.parameters)
        if self.merge_method in ("linear", "ties", "dare_ties") and not sum(self.weights()):
            raise UserError(
                f"models[].parameters.weight: {self.merge_method} divides by their sum, which is 0"
            )
        if self.merge_method in ("ties", "dare_ties") and min(self.weights()) < 0:
            raise UserError(
                f"models[].parameters.weight: {self.merge_method} takes a weighted mean; weights must be >= 0"
            )

    def _check_models(self) -> None:
        base = os.path.realpath(self.base_model)
        paths: dict[str, int] = {}
        labels: dict[str, int] = {}
        for index, model in enumerate(self.models):
            path, label = os.path.realpath(model.model), model.label()
            if path in paths:
                raise UserError(f"models[{index}].model: {model.model} is models[{paths[path]}] already")
            if label in labels:
                raise UserError(
                    f"models[{index}]: '{label}' is the name of models[{labels[label]}] too; set `name:` for one"
                )
            if path == base and self.merge_method != "linear":
                raise UserError(
                    f"models[{index}].model: {model.model} is the base_model, whose task vector is zero; remove it"
                )
            paths[path], labels[label] = index, index

    def _check_numbers(self, place: str, numbers: MergeParameters) -> None:
        method = self.merge_method
        if numbers.density is not None:
            if method not in TAKES_DENSITY and self.parameters.trim is None:
                way = ", or set trim" if method == "metagpt" else ""
                raise UserError(
                    f"{place}.density: {method} keeps every entry; density is for {', '.join(TAKES_DENSITY)}{way}"
                )
            if not 0 < numbers.density <= 1:
                raise UserError(f"{place}.density: {numbers.density} is not in (0, 1]")
        if numbers.weight is not None:
            if method not in TAKES_WEIGHT:
                raise UserError(
                    f"{place}.weight: metagpt takes its coefficients from the norms of the task vectors; "
                    "remove it or use merge_method: task_arithmetic"
                )
            if not math.isfinite(numbers.weight):
                raise UserError(f"{place}.weight: {numbers.weight} is not a finite number")

    def _check_metagpt(self) -> None:
        numbers, count = self.parameters, len(self.models)
        for key in METAGPT_ONLY:
            if self.merge_method != "metagpt" and getattr(numbers, key) is not None:
                raise UserError(f"parameters.{key}: is for merge_method: metagpt, not {self.merge_method}")
        for key in ("norm_power", "scale"):
            value = getattr(numbers, key)
            if value is not None and not math.isfinite(value):
                raise UserError(f"parameters.{key}: {value} is not a finite number")
        if numbers.max_coefficient is not None and not 1 / count <= numbers.max_coefficient <= 1:
            raise UserError(
                f"parameters.max_coefficient: {numbers.max_coefficient} is not in [1/{count}, 1]: {count} coefficients "
                "sum to 1"
            )
        if numbers.norms is not None and numbers.trim is None:
            raise UserError("parameters.norms: says where trim stands, but parameters.trim is not set")

    @property
    def thins(self) -> Literal["ties", "dare"] | None:
        """How entries of the task vectors are taken away: by magnitude, at random, or not at all."""
        if self.merge_method == "ties" or self.parameters.trim == "ties":
            return "ties"
        if self.merge_method in ("dare_linear", "dare_ties") or self.parameters.trim == "dare":
            return "dare"
        return None

    @property
    def elects(self) -> bool:
        """Whether a sign is elected per entry, and the task vectors that have it are averaged."""
        return self.merge_method in ("ties", "dare_ties") or self.parameters.trim == "ties"

    @property
    def scale(self) -> float:
        """What the merged task vector is multiplied by."""
        return _first(self.parameters.scale, 1.0)

    @property
    def base_cancels(self) -> bool:
        """Whether the merged model is a sum of whole experts with coefficients that sum to 1: the base drops out."""
        return self.merge_method in ("metagpt", "linear") and self.thins is None and self.scale == 1

    def reads(self) -> list[str]:
        """Inputs, for the fingerprint and the plan."""
        return [self.base_model, *(model.model for model in self.models)]

    def names(self) -> list[str]:
        """Returns the experts' names in order."""
        return [model.label() for model in self.models]

    def weights(self) -> list[float]:
        """Returns each expert's weight, defaults filled in."""
        default = TASK_ARITHMETIC_WEIGHT if self.merge_method in ("task_arithmetic", "dare_linear") else 1.0
        return [_first(m.parameters.weight, self.parameters.weight, default) for m in self.models]

    def densities(self) -> list[float]:
        """Returns each expert's density, defaults filled in."""
        return [_first(m.parameters.density, self.parameters.density, DENSITY) for m in self.models]


def _first(*values: float | None) -> float:
    return next(value for value in values if value is not None)
