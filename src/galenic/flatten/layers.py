"""Which layers can be shifted, and in what way each of them is a matrix that multiplies rows.

A linear layer multiplies every row of its inputs. A convolution multiplies every window of its (padded) inputs, each
group of channels by a matrix of its own: with C channels, G groups and a kernel of k values, d = (C / G) k, the weight
is (G, K / G, d) and the rows are (G, windows, d). So all mathematics is that of a linear layer, once per group.
"""

from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase

import torch.nn.functional as F
from torch import Tensor, nn

from galenic.runtime import UserError, nearest

CHUNK = 2**24
"""Numbers in a block of rows: 128 MB in float64, whatever the size of a batch."""

Layer = nn.Linear | nn.Conv1d | nn.Conv2d

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
    if not own:
        return f"it is a {type(module).__name__}, not a linear layer or convolution"
    if "weight" not in module._parameters:
        return "its weight is parametrised"
    assert isinstance(module, Layer)
    if not module.weight.dtype.is_floating_point:
        return f"its weight is quantised ({module.weight.dtype})"
    if not isinstance(module, nn.Linear) and 1 < module.groups == module.in_channels:
        return "a depthwise convolution's few inputs per channel are always spanned: there is nothing to move"
    for other, holder in model.named_modules():
        if other != name and any(p is module.weight for p in holder._parameters.values()):
            return f"its weight is tied to '{other}'"
    return ""


# ---------------------------------------------------------------------------- a layer as a matrix


def groups(module: Layer) -> int:
    """Returns how many matrices a layer holds."""
    return 1 if isinstance(module, nn.Linear) else module.groups


def geometry(module: Layer) -> tuple[object, ...]:
    """Returns what decides the rows a layer makes of its inputs: layers alike in it may share them."""
    if isinstance(module, nn.Linear):
        return ()
    return (
        module.kernel_size,
        module.stride,
        module.padding,
        module.padding_mode,
        module.dilation,
        module.groups,
    )


def input_rows(module: Layer, inputs: Tensor, mask: Tensor | None = None) -> Iterator[Tensor]:
    """Yields the rows that a layer multiplies by its weight, in blocks.

    Args:
        module: the layer.
        inputs: of one call: (..., d), or (N, C, length) or (N, C, height, width) with or without N.
        mask: nonzero on the rows that count, if it has as many entries as there are rows; else all count.

    Yields:
        (G, n, d) float64, with the values of a window in the order of the weight's.
    """
    inputs = inputs.detach()
    if isinstance(module, nn.Linear):
        rows = inputs.reshape(-1, inputs.shape[-1])
        if mask is not None and mask.numel() == len(rows):
            rows = rows[mask.reshape(-1).bool()]
        for block in rows.split(max(1, CHUNK // max(1, rows.shape[1]))):
            yield block.double()[None]
        return
    images = padded(module, inputs)
    flat = images.ndim == 3  # one-dimensional: an image of height one
    images = images.unsqueeze(2) if flat else images

    def wide(values: tuple[int, ...]) -> tuple[int, ...]:
        return (1, *values) if flat else values

    kernel, stride, dilation = wide(module.kernel_size), wide(module.stride), wide(module.dilation)
    windows = 1
    for size, k, s, e in zip(images.shape[2:], kernel, stride, dilation, strict=True):
        windows *= (size - e * (k - 1) - 1) // s + 1
    width = images.shape[1] * kernel[0] * kernel[1]
    keep = mask if mask is not None and mask.numel() == len(images) * windows else None
    for start in range(0, len(images), step := max(1, CHUNK // (windows * width))):
        block = images[start : start + step].double()
        unfolded = F.unfold(block, kernel, dilation=dilation, stride=stride)  # (n, C k, windows)
        split = unfolded.view(len(block), module.groups, -1, windows)
        rows = split.permute(1, 0, 3, 2).reshape(module.groups, -1, split.shape[2])
        if keep is not None:
            rows = rows[:, keep.reshape(len(images), windows)[start : start + step].reshape(-1).bool()]
        yield rows


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
    if isinstance(module, nn.Linear):
        return output_rows(module, F.linear(inputs, weight, bias))
    convolve = F.conv1d if isinstance(module, nn.Conv1d) else F.conv2d
    images = padded(module, inputs)
    return output_rows(
        module, convolve(images, weight, bias, module.stride, 0, module.dilation, module.groups)
    )


def output_rows(module: Layer, outputs: Tensor) -> Tensor:
    """Returns a layer's outputs as rows (N, K), one for each row of its inputs."""
    if not isinstance(module, nn.Linear):
        outputs = outputs.movedim(-len(module.kernel_size) - 1, -1)
    return outputs.reshape(-1, outputs.shape[-1])
