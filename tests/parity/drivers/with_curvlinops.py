"""Hessian and Gauss-Newton matrices with curvlinops, of a network and batches given as arrays."""

import json
import sys
from pathlib import Path

import numpy as np
import torch
from curvlinops import GGNLinearOperator, HessianLinearOperator, hutchpp_trace, xtrace
from torch import nn

job = json.loads(Path(sys.argv[1]).read_text())
torch.set_num_threads(1)
torch.manual_seed(0)
arrays = {name: torch.from_numpy(array) for name, array in np.load(job["arrays"]).items()}
x, y = arrays.pop("x"), arrays.pop("y")
model = nn.Sequential(*(getattr(nn, kind)(*sizes) for kind, sizes in job["layers"])).double()
model.load_state_dict(arrays)
data = list(zip(x.split(job["batches"]), y.split(job["batches"]), strict=True))
given = (model, nn.CrossEntropyLoss(), [p for p in model.parameters() if p.requires_grad], data)
found = {}
for name, kind in (("hessian", HessianLinearOperator), ("gauss_newton", GGNLinearOperator)):
    operator = kind(*given)
    found[name] = (operator @ torch.eye(operator.shape[1], dtype=x.dtype)).detach().numpy()
    for estimator in (hutchpp_trace, xtrace):
        draws = [float(estimator(operator, job["products"])) for _ in range(job["draws"])]
        found[f"{name}_{estimator.__name__}"] = np.array(draws)
np.savez(job["out"], **found)
