"""Which layers can be shifted, and in what way each of them is a matrix that multiplies rows.

A linear layer multiplies every row of its inputs. A convolution multiplies every window of its (padded) inputs, each
group of channels by a matrix of its own: with C channels, G groups and a kernel of k values, d = (C / G) k, the weight
is (G, K / G, d) and the rows are (G, windows, d). So all mathematics is that of a linear layer, once per group.
"""

from collections.abc import Callable, Iterator, Sequence
from fnmatch import fnmatchcase

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from galenic.runtime import UserError, nearest

CHUNK = 2**21
"""Numbers in a block of rows: 16 MB in float64, whatever the size of a batch. Little more than a processor's cache."""

Layer = nn.Linear | nn.Conv1d | nn.Conv2d
"""And what transformers calls Conv1D, in GPT-2 and its like: a linear layer that stores its weight as (d, K)."""

# ---------------------------------------------------------------------------- which layers


def select_layers(model: nn.Module, patterns: Sequence[str]) -> list[str]:
    """Returns the names of the linear layers and convolutions that patterns name, in the model's order.

    A pattern may hold `*` for any text; it takes the layers that can be shifted and passes over the others. A full
    name insists.

    Raises:
        UserError: a pattern that matches nothing (nearest names given), or a full name of a layer that cannot be
            shifted (why is said).
    """
    modules = {name: module for name, module in model.named_modules() if name}
    reasons = {name: unsuitable(model, name, module) for name, module in modules.items()}
    chosen: set[str] = set()
    for pattern in patterns:
        if pattern in modules:
            if reasons[pattern]:
                raise UserError(f"layers: '{pattern}' cannot be shifted: {reasons[pattern]}")
            chosen.add(pattern)
            continue
        matches = {name for name in modules if fnmatchcase(name, pattern) and not reasons[name]}
        if not matches:
            linear = [name for name in modules if not reasons[name]]
            hint = nearest(pattern, linear) or f"; linear layers: {', '.join(linear[:4])} ..."
            raise UserError(f"layers: '{pattern}' matches no linear layer of the model{hint}")
        chosen |= matches
    return [name for name in modules if name in chosen]


def unsuitable(model: nn.Module, name: str, module: nn.Module) -> str:
    """Says why a module cannot be shifted, or returns an empty string."""
    if isinstance(module, nn.Embedding):
        return "an embedding's inputs are single tokens: tokens not in the data would become zero"
    if "NormHead" in type(module).__name__:
        return "a NormHead scales its rows to unit length; make it a plain head first (head: materialise)"
    if isinstance(module, nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d | nn.Conv3d):
        return f"a {type(module).__name__}'s windows are not gathered here; Conv1d and Conv2d are"
    kinds = (nn.Linear, nn.Conv1d, nn.Conv2d)
    own = [kind for kind in kinds if isinstance(module, kind) and type(module).forward is kind.forward]
    if not own and not is_transposed(module):
        return f"it is a {type(module).__name__}, not a linear layer or convolution"
    weight = module._parameters.get("weight")
    if weight is None:
        return "its weight is parametrised"
    if not weight.dtype.is_floating_point:
        return f"its weight is quantised ({weight.dtype})"
    if isinstance(module, nn.Conv1d | nn.Conv2d) and 1 < module.groups == module.in_channels:
        return "a depthwise convolution's few inputs per channel are always spanned: there is nothing to move"
    for other, holder in model.named_modules():
        if other != name and any(p is weight for p in holder._parameters.values()):
            return f"its weight is tied to '{other}'"
    return ""


# ---------------------------------------------------------------------------- a layer as a matrix


def is_transposed(module: nn.Module) -> bool:
    """Whether a module is transformers' Conv1D; told by name, for importing transformers takes seconds."""
    return type(module).__name__ == "Conv1D" and type(module).__module__ == "transformers.pytorch_utils"


def weight_of(model: nn.Module, name: str) -> Tensor:
    """Returns the weight of a layer by its dotted name, (K, d) or a convolution's: itself, or a view of it."""
    weight = model.get_parameter(f"{name}.weight")
    return weight.T if is_transposed(model.get_submodule(name)) else weight


def groups(module: nn.Module) -> int:
    """Returns how many matrices a layer holds."""
    return module.groups if isinstance(module, nn.Conv1d | nn.Conv2d) else 1


def geometry(module: Layer) -> tuple[object, ...]:
    """Returns what decides the rows a layer makes of its inputs: layers alike in it may share them."""
    if not isinstance(module, nn.Conv1d | nn.Conv2d):
        return ()
    return (
        module.kernel_size,
        module.stride,
        module.padding,
        module.padding_mode,
        module.dilation,
        module.groups,
    )


def input_rows(
    module: Layer,
    inputs: Tensor,
    mask: Tensor | None = None,
    *,
    chosen: Callable[[int], Tensor] | None = None,
    larger: int = 1,
) -> Iterator[Tensor]:
    """Yields the rows that a layer multiplies by its weight, in blocks.

    Args:
        module: the layer.
        inputs: of one call: (..., d), or (N, C, length) or (N, C, height, width) with or without N.
        mask: nonzero on the rows that count, if it has as many entries as there are rows; else all count.
        chosen: number of rows that count -> indices of those to yield. Default: all.
        larger: times `CHUNK`, the size of a block.

    Yields:
        (G, n, d) float64, with the values of a window in the order of the weight's.
    """
    inputs, chunk = inputs.detach(), larger * CHUNK
    if not isinstance(module, nn.Conv1d | nn.Conv2d):
        rows = inputs.reshape(-1, inputs.shape[-1])
        picked = _picked(len(rows), mask, chosen)
        rows = rows if picked is None else rows[picked.to(rows.device)]
        for block in rows.split(max(1, chunk // max(1, rows.shape[1]))):
            yield block.double()[None]
        return
    views = windows(module, inputs)  # (N, height, width, C, k_h, k_w)
    count, height, width, channels, *kernel = views.shape
    size = channels * kernel[0] * kernel[1]
    picked = _picked(count * height * width, mask, chosen)
    if picked is not None:
        for part in picked.split(max(1, chunk // size)):
            image, place = part // (height * width), part % (height * width)
            block = views[image, place // width, place % width]
            yield block.double().reshape(len(part), module.groups, -1).transpose(0, 1)
        return
    # One copy, from runs along the width to runs along the width: faster than `F.unfold`, which is not in row order.
    lines = max(1, min(height, chunk // (width * size)))
    images = max(1, chunk // (height * width * size))
    for first in range(0, count, images):
        for top in range(0, height, lines):
            part = views[first : first + images, top : top + lines].permute(3, 4, 5, 0, 1, 2)
            block = torch.empty(part.shape, dtype=torch.float64, device=part.device).copy_(part)
            yield block.view(module.groups, size // module.groups, -1).mT


def _picked(count: int, mask: Tensor | None, chosen: Callable[[int], Tensor] | None) -> Tensor | None:
    """Returns the indices of the rows that count and are chosen, or None for all."""
    counting = None
    if mask is not None and mask.numel() == count:
        counting = mask.reshape(-1).nonzero()[:, 0].cpu()
    if chosen is None:
        return counting
    index = chosen(count if counting is None else len(counting))
    return index if counting is None else counting[index]


def windows(module: nn.Conv1d | nn.Conv2d, inputs: Tensor) -> Tensor:
    """Returns a view of the windows of a convolution's padded inputs, (N, height, width, C, k_h, k_w).

    A one-dimensional one has width one: blocks of its windows are cut along the height.
    """
    images = padded(module, inputs)
    flat = images.ndim == 3
    images = images.unsqueeze(3) if flat else images

    def wide(values: tuple[int, ...]) -> tuple[int, ...]:
        return (*values, 1) if flat else values

    kernel, stride, dilation = wide(module.kernel_size), wide(module.stride), wide(module.dilation)
    for axis in (0, 1):
        reach = dilation[axis] * (kernel[axis] - 1) + 1
        images = images.unfold(2 + axis, reach, stride[axis])
    views = images[..., :: dilation[0], :: dilation[1]]  # (N, C, height, width, k_h, k_w)
    return views.movedim(1, 3)


def padded(module: nn.Conv1d | nn.Conv2d, inputs: Tensor) -> Tensor:
    """Returns a convolution's inputs with a batch dimension and its padding, of whichever mode, around them."""
    if inputs.ndim == len(module.kernel_size) + 1:
        inputs = inputs[None]
    sides: list[int] = []
    for axis in reversed(range(len(module.kernel_size))):  # F.pad begins with the last dimension
        if module.padding == "valid":
            before = after = 0
        elif module.padding == "same":  # as torch: the odd one goes behind
            total = module.dilation[axis] * (module.kernel_size[axis] - 1)
            before, after = total // 2, total - total // 2
        else:
            before = after = int(module.padding[axis])
        sides += [before, after]
    if not any(sides):
        return inputs
    return F.pad(inputs, sides, mode="constant" if module.padding_mode == "zeros" else module.padding_mode)


def outputs_with(module: Layer, inputs: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Returns what a layer would give with another weight and bias, as rows (N, K); no hooks run."""
    if not isinstance(module, nn.Conv1d | nn.Conv2d):
        return output_rows(module, F.linear(inputs, weight, bias))
    convolve = F.conv1d if isinstance(module, nn.Conv1d) else F.conv2d
    images = padded(module, inputs)
    return output_rows(
        module, convolve(images, weight, bias, module.stride, 0, module.dilation, module.groups)
    )


def output_rows(module: Layer, outputs: Tensor) -> Tensor:
    """Returns a layer's outputs as rows (N, K), one for each row of its inputs."""
    if isinstance(module, nn.Conv1d | nn.Conv2d):
        outputs = outputs.movedim(-len(module.kernel_size) - 1, -1)
    return outputs.reshape(-1, outputs.shape[-1])
