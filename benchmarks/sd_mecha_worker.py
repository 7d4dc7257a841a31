"""Task arithmetic with sd-mecha on single safetensors files; runs in an environment of its own."""

import sys

import sd_mecha
import torch

out, base, *experts = sys.argv[1:]
origin = sd_mecha.model(base)
recipe = origin
for path in experts:
    recipe = recipe + (sd_mecha.model(path) - origin) * 0.3
sd_mecha.merge(recipe, output=out, merge_dtype=torch.float32, output_dtype=torch.bfloat16)
