"""What a merge needs to know: mergekit's words for the part that is supported."""

import math
import os
import re
from dataclasses import dataclass, field, fields
from pathlib import Path, PurePath
from typing import Literal

from galenic.runtime import UserError

Method = Literal[
    "metagpt",
    "linear",
    "task_arithmetic",
    "ties",
    "dare_linear",
    "dare_ties",
    "breadcrumbs",
    "della",
    "sce",
    "model_stock",
    "slerp",
    "tsv",
    "iso_c",
    "iso_cts",
]

TASK_ARITHMETIC_WEIGHT = 0.3
"""MetaGPT paper, experimental set-up: lambda of the task-arithmetic baseline; DARE keeps it, as dropping and
rescaling leaves the expectation of a task vector as it is."""
DENSITY = 0.55
"""MetaGPT paper, experimental set-up: share of entries that the TIES and DARE baselines keep."""
GAMMA = 0.01
"""mergekit's default: share of the largest entries that `breadcrumbs` drops."""
COMMON_SHARE = 0.8
"""Iso-CTS, arXiv 2502.04959: share of the directions in the common subspace."""
EPSILON = 0.15
"""mergekit's default: how far `della` moves the probability of keeping from the density."""

TAKES: dict[str, tuple[Method, ...]] = {
    "weight": (
        "linear",
        "task_arithmetic",
        "ties",
        "dare_linear",
        "dare_ties",
        "breadcrumbs",
        "della",
        "tsv",
        "iso_c",
        "iso_cts",
    ),
    "density": ("ties", "dare_linear", "dare_ties", "breadcrumbs", "della"),
    "gamma": ("breadcrumbs",),
    "epsilon": ("della",),
    "normalize": ("linear", "task_arithmetic", "ties", "dare_linear", "dare_ties", "breadcrumbs", "della"),
    "t": ("slerp",),
    "select_topk": ("sce",),
    "scope": ("metagpt",),
    "norm_power": ("metagpt",),
    "max_coefficient": ("metagpt",),
    "scale": (
        "metagpt",
        "task_arithmetic",
        "ties",
        "dare_linear",
        "dare_ties",
        "breadcrumbs",
        "della",
        "sce",
        "tsv",
        "iso_c",
        "iso_cts",
    ),
    "common_share": ("iso_cts",),
    "trim": ("metagpt",),
    "norms": ("metagpt",),
}
"""Parameter -> the methods that take it. `metagpt` takes a density too if it trims."""


@dataclass(frozen=True, kw_only=True)
class MergeParameters:
    """Numbers of one model, or of all models that do not say otherwise."""

    weight: float | None = None
    """Coefficient of the model. Default: 0.3 for the methods that add task vectors (`task_arithmetic`, `dare_linear`,
    `breadcrumbs`), 1 for those that average (`linear`, `ties`, `dare_ties`, `della`) and for `tsv`, `iso_c` and
    `iso_cts`, whose task vectors are multiplied by it first."""
    density: float | None = None
    """Share of task-vector entries kept by `ties`, `dare_linear`, `dare_ties`, `breadcrumbs`, `della` and by `metagpt`
    with `trim`, in (0, 1]. Default: 0.55."""
    gamma: float | None = None
    """`breadcrumbs`: share of the largest entries of each tensor that is dropped, in [0, 1). Default: 0.01."""
    epsilon: float | None = None
    """`della`: entries are kept with probability density - epsilon (the least of a row) to density + epsilon (the
    largest). Default: 0.15, or less where the density leaves no room."""


@dataclass(frozen=True, kw_only=True)
class MethodParameters(MergeParameters):
    """Numbers of the method, and of all models that do not set their own."""

    normalize: bool | None = None
    """Whether the weighted sum is divided by the sum of its weights (of those that agree with the elected sign, where
    one is elected). Default: true for `linear`, `ties`, `dare_ties` and `della`."""
    t: float | None = None
    """`slerp`: how far to go from the base (0) to the other model (1). Default: 0.5."""
    select_topk: float | None = None
    """`sce`: share of each tensor's entries, those that vary most between the experts, that is merged, in (0, 1].
    Default: 1."""
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
    """The merged task vector is multiplied by this before it is added to the base; mergekit's `lambda`. Default: 1."""
    common_share: float | None = None
    """`iso_cts`: share of a matrix's directions that the experts have in common, in [0, 1]. Default: 0.8."""
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
    """Model folder (safetensors), GGUF file or Hub id; or a LoRA adapter (PEFT) of the base; or `model+adapter`."""
    name: str | None = None
    """Name in the results and in the keys of DARE's random numbers. Default: the folder's name, or its
    parent's if the folder is called `model`."""
    parameters: MergeParameters = field(default_factory=MergeParameters)
    """This model's numbers."""

    def label(self) -> str:
        """Returns the expert's name."""
        return self.name or folder_label(self.paths()[-1])

    def paths(self) -> list[str]:
        """Returns the folders or Hub ids it is made of: the model, or a model and the adapter to be put on it."""
        if "+" not in self.model or os.path.exists(self.model):
            return [self.model]
        return self.model.split("+", 1)


def folder_label(folder: str) -> str:
    """Names a model folder: its last part, or the part before if that is `model`."""
    path = PurePath(os.path.normpath(folder))
    return path.parent.name if path.name == "model" and path.parent.name else path.name


HUB_ID = re.compile(r"(?P<repo>[\w.-]+/[\w.-]+)(@(?P<revision>[\w./-]+))?")


def is_hub_id(model: str) -> bool:
    """Whether a model's name in a recipe means a repository on the Hub.

    A local folder wins; and where the first part is a local folder, the whole is a mistyped path, not a repository.
    """
    if os.path.lexists(model) or not HUB_ID.fullmatch(model):
        return False
    owner = model.split("/")[0]
    return owner not in (".", "..") and not os.path.lexists(owner)


@dataclass(frozen=True, kw_only=True)
class MergeTokenizer:
    """Which vocabulary the output has."""

    source: Literal["base", "union"]
    """`base`: the base's. `union`: the base's, then the tokens that only experts have. Rows of embeddings and heads are
    matched by the token's string."""


@dataclass(frozen=True, kw_only=True)
class MergeConfig:
    """Merges experts of one base into one model."""

    out: str
    """Output folder: receives `model/`, `merge-report.html` and `merge.json`."""
    merge_method: Method = "metagpt"
    """`metagpt`, `linear`, `task_arithmetic`, `ties`, `dare_linear`, `dare_ties`, `breadcrumbs`, `della`, `sce`,
    `model_stock`, `slerp`, `tsv`, `iso_c` or `iso_cts`."""
    base_model: str
    """Model the experts were fine-tuned from, a folder, a GGUF file or a Hub id (`owner/name` or
    `owner/name@revision`); its config and tokenizer go to the output."""
    models: list[MergeModel]
    """The experts. The base may be listed among them, without parameters."""
    parameters: MethodParameters = field(default_factory=MethodParameters)
    """Numbers of the method, and of all models that do not set their own."""
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Data type of the output's floating-point tensors. Default: each tensor's in the base. Sums are taken in float64
    whatever it is."""
    out_dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """The same, and stronger than `dtype`."""
    tokenizer_source: Literal["base", "union"] | None = None
    """The same as `tokenizer.source`."""
    tokenizer: MergeTokenizer | None = None
    """The output's vocabulary. Default: the base's, and experts with another one are refused."""
    device: Literal["cpu", "cuda"] = "cpu"
    """Where `tsv`, `iso_c` and `iso_cts` find singular values. All else is done where the weights are read, faster than
    a disk can give them."""
    allow_non_finite: bool = False
    """Whether an expert's weights may be NaN or infinite; the base's stand in for them. Otherwise they are refused."""
    seed: int = 0
    """Seed of what is dropped at random."""

    def __post_init__(self) -> None:
        """Refuses contradictions before any work.

        Raises:
            UserError: no models, a model twice, an output that lies in an input or would replace one, a number that is
                out of range or without meaning for this method, or weights that sum to zero.
        """
        if not all(self.names_read()):
            raise UserError(
                "base_model or models[].model: '' names no model; a model+adapter needs both parts"
            )
        if self.tokenizer and self.tokenizer_source not in (None, self.tokenizer.source):
            raise UserError(
                f"tokenizer_source: {self.tokenizer_source}, but tokenizer.source is {self.tokenizer.source}; give one"
            )
        if self.out:
            self._check_places()
        self._leave_base_out()
        if not self.models:
            raise UserError("models: at least one expert is needed besides the base")
        self._check_models()
        self._check_numbers("parameters", self.parameters)
        for index, model in enumerate(self.models):
            self._check_numbers(f"models[{index}].parameters", model.parameters)
        self._check_metagpt()
        self._check_weights()
        self._check_epsilons()
        if self.device != "cpu" and not self.spectral:
            raise UserError(
                f"device: {self.device} is for tsv, iso_c, iso_cts; {self.merge_method} waits for the disk, not for "
                "arithmetic"
            )

    def _leave_base_out(self) -> None:
        """Takes the base off the list of experts, where mergekit's recipes may have it; `linear` averages it in."""
        if self.merge_method == "linear":
            return
        experts = []
        for index, model in enumerate(self.models):
            if os.path.realpath(model.model) != os.path.realpath(self.base_model):
                experts.append(model)
            elif model.parameters != MergeParameters():
                raise UserError(
                    f"models[{index}].parameters: {model.model} is the base_model, whose task vector is zero; "
                    "leave its parameters out"
                )
        object.__setattr__(self, "models", experts)

    def _check_places(self) -> None:
        """Refuses an output that is no folder, lies in an input or replaces one, before anything is written."""
        out = Path(os.path.realpath(self.out))
        for path in (Path(self.out), *out.parents):
            if os.path.lexists(path) and not path.is_dir():
                raise UserError(f"out: {path} is not a folder; choose another out")
        for folder in self.reads():
            source = Path(os.path.realpath(folder))
            if out == source or source in out.parents:
                raise UserError(f"out: {self.out} lies inside the input {folder}; choose another folder")
            if out / "model" == source or out / "model" in source.parents:
                raise UserError(
                    f"out: {self.out}/model would replace the input {folder}; choose another folder"
                )

    def _check_models(self) -> None:
        count = len(self.models)
        if self.merge_method == "slerp" and count != 1:
            raise UserError(
                f"models: slerp goes from the base to one model; {count} are given besides the base"
            )
        if self.merge_method == "model_stock" and count < 2:
            raise UserError("models: model_stock compares experts with each other; give two or more")
        paths: dict[str, int] = {}
        labels: dict[str, int] = {}
        for index, model in enumerate(self.models):
            path, label = os.path.realpath(model.model), model.label()
            if path in paths:
                raise UserError(f"models[{index}].model: {model.model} is models[{paths[path]}] already")
            if not label.isprintable() or not label:
                raise UserError(
                    f"models[{index}]: {label!r} cannot be printed as a name; set `name:` to another"
                )
            if label in labels:
                raise UserError(
                    f"models[{index}]: '{label}' is the name of models[{labels[label]}] too; set `name:` for one"
                )
            paths[path], labels[label] = index, index

    def _check_numbers(self, place: str, numbers: MergeParameters) -> None:
        for field_ in fields(numbers):
            key, value = field_.name, getattr(numbers, field_.name)
            if value is None:
                continue
            self._check_taken(f"{place}.{key}", key)
            if isinstance(value, float | int) and not math.isfinite(value):
                raise UserError(f"{place}.{key}: {value} is not a finite number")
            if key in ("density", "select_topk") and not 0 < value <= 1:
                raise UserError(f"{place}.{key}: {value} is not in (0, 1]")
            if (key == "gamma" and not 0 <= value < 1) or (
                key in ("t", "common_share") and not 0 <= value <= 1
            ):
                raise UserError(f"{place}.{key}: {value} is not in [0, 1{')' if key == 'gamma' else ']'}")

    def _check_taken(self, place: str, key: str) -> None:
        method = self.merge_method
        if method in TAKES[key] or (key == "density" and method == "metagpt" and self.parameters.trim):
            return
        way = ""
        if key == "weight" and method == "metagpt":
            way = ": it takes its coefficients from the norms of the task vectors"
        if key == "density" and method == "metagpt":
            way = ": it keeps every entry, unless trim is set"
        raise UserError(f"{place}: is for {', '.join(TAKES[key])}, not {method}{way}")

    def _check_metagpt(self) -> None:
        numbers, count = self.parameters, len(self.models)
        if numbers.max_coefficient is not None and not 1 / count <= numbers.max_coefficient <= 1:
            raise UserError(
                f"parameters.max_coefficient: {numbers.max_coefficient} is not in [1/{count}, 1]: {count} coefficients "
                "sum to 1"
            )
        if numbers.norms is not None and numbers.trim is None:
            raise UserError("parameters.norms: says where trim stands, but parameters.trim is not set")

    def _check_weights(self) -> None:
        if self.merge_method not in TAKES["weight"]:
            return
        weights = self.weights()
        if self.normalizes and not sum(weights):
            raise UserError(
                f"models[].parameters.weight: {self.merge_method} divides by their sum, which is 0"
            )
        if self.elects and min(weights) < 0:
            raise UserError(
                f"models[].parameters.weight: {self.merge_method} takes a weighted mean; weights must be >= 0"
            )

    def _check_epsilons(self) -> None:
        if self.merge_method != "della":
            return
        for model, density, epsilon in zip(self.models, self.densities(), self.epsilons(), strict=True):
            if epsilon < 0 or density - epsilon <= 0 or density + epsilon > 1:
                raise UserError(
                    f"epsilon: {epsilon} with density {density} ('{model.label()}'): density - epsilon and density + "
                    "epsilon are probabilities, in (0, 1]"
                )

    @property
    def thins(self) -> Literal["ties", "dare", "breadcrumbs", "della", "sce"] | None:
        """How entries of the task vectors are taken away, if any are."""
        if self.merge_method in ("breadcrumbs", "della"):
            return self.merge_method
        if self.merge_method == "sce" and _first(self.parameters.select_topk, 1.0) < 1:
            return "sce"
        if self.merge_method == "ties" or self.parameters.trim == "ties":
            return "ties"
        if self.merge_method in ("dare_linear", "dare_ties") or self.parameters.trim == "dare":
            return "dare"
        return None

    @property
    def spectral(self) -> bool:
        """Whether whole matrices are merged in their singular spaces."""
        return self.merge_method in ("tsv", "iso_c", "iso_cts")

    @property
    def thins_together(self) -> bool:
        """Whether thinning looks at several entries together: at those of a row, or of all experts."""
        return self.thins in ("della", "sce")

    @property
    def draws(self) -> bool:
        """Whether chance has a part, and so the seed."""
        return self.thins in ("dare", "della")

    @property
    def elects(self) -> bool:
        """Whether a sign is elected per entry, and only the task vectors that have it are merged."""
        return self.merge_method in ("ties", "dare_ties", "della", "sce") or self.parameters.trim == "ties"

    @property
    def normalizes(self) -> bool:
        """Whether the weighted sum is divided by the sum of its weights."""
        if self.parameters.normalize is not None:
            return self.parameters.normalize
        return self.merge_method == "linear" or self.elects

    @property
    def scale(self) -> float:
        """What the merged task vector is multiplied by."""
        return _first(self.parameters.scale, 1.0)

    @property
    def base_cancels(self) -> bool:
        """Whether the merged model is a sum of whole experts alone, so that the base is not read.

        So it is for the weight average, and for MetaGPT, whose coefficients sum to 1.
        """
        return self.merge_method == "linear" or (
            self.merge_method == "metagpt" and self.thins is None and self.scale == 1
        )

    @property
    def output_dtype(self) -> str | None:
        """Name of the output's data type, if one is asked for."""
        return self.out_dtype or self.dtype

    @property
    def vocabulary(self) -> Literal["base", "union"] | None:
        """Whose tokens the output has where rows are matched by token; None if vocabularies must be equal."""
        return self.tokenizer.source if self.tokenizer else self.tokenizer_source

    def names_read(self) -> list[str]:
        """Inputs as the recipe names them: folders, files and Hub ids."""
        every = [self.base_model, *(path for model in self.models for path in model.paths())]
        return list(dict.fromkeys(every))

    def reads(self) -> list[str]:
        """Inputs that lie on this machine, for the fingerprint: a Hub id is its own."""
        return [name for name in self.names_read() if not is_hub_id(name)]

    def names(self) -> list[str]:
        """Returns the experts' names in order."""
        return [model.label() for model in self.models]

    def weights(self) -> list[float]:
        """Returns each expert's weight, defaults filled in."""
        adds = self.merge_method in ("task_arithmetic", "dare_linear", "breadcrumbs")
        return self._each("weight", TASK_ARITHMETIC_WEIGHT if adds else 1.0)

    def densities(self) -> list[float]:
        """Returns each expert's density, defaults filled in."""
        return self._each("density", DENSITY)

    def gammas(self) -> list[float]:
        """Returns each expert's gamma, defaults filled in."""
        return self._each("gamma", GAMMA)

    def epsilons(self) -> list[float]:
        """Returns each expert's epsilon, defaults filled in."""
        rooms = [min(EPSILON, density / 2, 1 - density) for density in self.densities()]
        return [
            _first(model.parameters.epsilon, self.parameters.epsilon, room)
            for model, room in zip(self.models, rooms, strict=True)
        ]

    def _each(self, key: str, default: float) -> list[float]:
        return [
            _first(getattr(m.parameters, key), getattr(self.parameters, key), default) for m in self.models
        ]


def _first(*values: float | None) -> float:
    return next(value for value in values if value is not None)
