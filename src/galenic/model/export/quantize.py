"""Weight-only int8 and int4, in the compressed-tensors format.

    w ~ s q,   q whole, -2^(b-1) <= q < 2^(b-1)     one s a row (int8), or a group of a row's neighbours (int4)

Rounding to nearest needs no data and no GPU. int4 scales are the best of a few, by squared error in the weights.
"""

import importlib
from pathlib import Path
from typing import Any

import torch

from galenic.runtime import UserError, read_json

INSTALL = "pip install 'galenic[quantize]'"
GROUPS = (128, 64, 32, 16)
"""Widths of a group, the widest that divides every layer's inputs is taken; 128 is what kernels are written for."""
SHRINKS = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75)
"""Shares of the largest weight that a scale may reach to; what lies beyond is clipped."""
BLOCK = 1 << 22
"""Weights looked at together when scales are chosen."""


def linear_layers(model: torch.nn.Module) -> dict[str, torch.nn.Linear]:
    """Returns the linear layers whose weights nothing else shares (a head tied to the embedding is left out)."""
    users: dict[int, int] = {}
    for _, module in model.named_modules():
        for parameter in module.parameters(recurse=False):
            users[id(parameter)] = users.get(id(parameter), 0) + 1
    return {
        name: module
        for name, module in model.named_modules()
        if type(module) is torch.nn.Linear and users[id(module.weight)] == 1
    }


def group_width(layers: dict[str, torch.nn.Linear]) -> int:
    """Returns the width of an int4 group.

    Raises:
        UserError: no width divides the inputs of every layer.
    """
    widths = {layer.in_features for layer in layers.values()}
    for group in GROUPS:
        if not any(width % group for width in widths):
            return group
    raise UserError(f"quantize: int4 needs layers whose inputs are multiples of {GROUPS[-1]}; int8 takes any")


def scales(weight: torch.Tensor, bits: int, group: int | None) -> torch.Tensor:
    """Returns symmetric scales [rows, groups] of a weight [rows, columns] that round it with little error.

    A scale is c max|w| / (2^(b-1) - 1/2) of its group: half a step more than the largest whole number, as the library
    rounds. c is 1 for a row, and for a group the one of `SHRINKS` whose squared error sum (s q - w)^2 is least.
    """
    top = 2 ** (bits - 1)
    parts = weight.float().unflatten(1, (-1, group or weight.shape[1]))
    largest = parts.abs().amax(-1) / (top - 0.5)
    largest = torch.where(largest == 0, torch.finfo(torch.float32).eps, largest)
    if group is None:
        return largest.to(weight.dtype)
    chosen = torch.empty_like(largest)
    rows = max(1, BLOCK // weight.shape[1])
    for first in range(0, len(parts), rows):
        part, most = parts[first : first + rows], largest[first : first + rows]
        tried = torch.stack([(most * share).to(weight.dtype).float() for share in SHRINKS])
        errors = torch.stack(
            [
                (((part / s[..., None]).round().clamp(-top, top - 1) * s[..., None]) - part).square().sum(-1)
                for s in tried
            ]
        )
        chosen[first : first + rows] = tried.gather(0, errors.argmin(0)[None])[0]
    return chosen.to(weight.dtype)


@torch.no_grad()
def quantize(model: Any, kind: str) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Quantises a model's linear layers; in the model itself their weights become what the stored ones stand for.

    Args:
        model: on the CPU, with a plain head.
        kind: "int8", or "int4" with the head in 8 bits.

    Returns:
        (all tensors as they are stored, `quantization_config` of config.json).

    Raises:
        UserError: the library is not installed, or see `group_width`.
    """
    try:
        library = importlib.import_module("compressed_tensors.quantization")
        compressors = importlib.import_module("compressed_tensors.compressors")
    except ImportError:
        raise UserError(f"quantize: weights are packed with a package: {INSTALL}") from None

    layers = linear_layers(model)
    head = next((name for name, layer in layers.items() if layer is model.get_output_embeddings()), None)
    body = {name: layer for name, layer in layers.items() if name != head}
    if not body:
        raise UserError("quantize: the model has no linear layers that could be quantised")
    group = group_width(body) if kind == "int4" else None

    def scheme(targets: list[str], bits: int, width: int | None) -> Any:
        strategy = "channel" if width is None else "group"
        weights = library.QuantizationArgs(num_bits=bits, symmetric=True, strategy=strategy, group_size=width)
        return library.QuantizationScheme(targets=targets, weights=weights, format="pack-quantized")

    last_names = sorted({name.rsplit(".", 1)[-1] for name in body})
    schemes = {"group_0": scheme([rf"re:.*\.({'|'.join(last_names)})$"], 8 if group is None else 4, group)}
    if head is not None:
        schemes["group_1"] = scheme([head], 8, None)
    packer = compressors.BaseCompressor.get_value_from_registry("pack-quantized")
    stored = dict(model.state_dict())
    for name, layer in layers.items():
        own = schemes["group_1" if name == head else "group_0"]
        weight = layer.weight.detach()
        given = {
            "weight": weight,
            "weight_scale": scales(weight, own.weights.num_bits, own.weights.group_size),
        }
        packed = packer.compress(given, own)
        del stored[f"{name}.weight"]
        stored |= {f"{name}.{key}": value for key, value in packed.items()}
        weight.copy_(packer.decompress(packed, own)["weight"])
    others = [
        name
        for name, module in model.named_modules()
        if type(module) is torch.nn.Linear and name not in layers
    ]
    config = library.QuantizationConfig(
        config_groups=schemes, format="pack-quantized", ignore=others, quantization_status="compressed"
    )
    settings = config.model_dump(mode="json", exclude_none=True)
    return stored, {"quant_method": "compressed-tensors", **settings}


def load_quantized(folder: str | Path) -> Any:
    """Loads a model that was exported in int8 or int4, offline; transformers makes whole weights of the packed ones.

    Raises:
        UserError: the library is not installed, or the folder is damaged.
    """
    from transformers import AutoModelForCausalLM

    from galenic.model.folder import _quiet  # which also tells transformers our class

    try:
        importlib.import_module("compressed_tensors.quantization")
    except ImportError:
        raise UserError(f"{folder}: packed weights are read with a package: {INSTALL}") from None
    try:
        with _quiet():
            return AutoModelForCausalLM.from_pretrained(
                folder,
                dtype=torch.float32,
                local_files_only=True,
                trust_remote_code=False,
                use_safetensors=True,
            ).eval()
    except Exception as error:  # transformers raises whatever it meets
        raise UserError(f"{folder}: cannot be loaded ({' '.join(str(error).split())[:300]})") from None


def is_quantized(folder: str | Path) -> bool:
    """Whether a model folder holds weights in the compressed-tensors format."""
    file = Path(folder) / "config.json"
    settings = read_json(file) if file.is_file() else {}
    named = settings.get("quantization_config") if isinstance(settings, dict) else None
    return isinstance(named, dict) and named.get("quant_method") == "compressed-tensors"
