"""Estimates Hessian traces with other people's software for `flattening_speed.py`: `python trace_worker.py FILE.npz`.

The file holds a network (weights and biases `0.weight`, `0.bias`, `1.weight` ... of linear layers with ReLU between
them) and one batch, `x` and `y`. One line of JSON in, one out. In: {"tool", "matrix", "estimator", "products"}. Out:
{"seconds", "estimate"}. Operators are built before the clock starts, each estimate has probes of its own, and all data
are one batch. While it waits for a line it computes nothing.
"""

import functools
import json
import sys
from time import perf_counter

import curvlinops
import hessian_eigenthings as eigenthings
import numpy as np
import torch
from pyhessian import hessian as pyhessian
from torch import nn

LOSS = nn.CrossEntropyLoss()


def network(arrays: dict[str, torch.Tensor]) -> nn.Sequential:
    layers: list[nn.Module] = []
    for index in range(sum(name.endswith("weight") for name in arrays)):
        outputs, inputs = arrays[f"{index}.weight"].shape
        layers += [nn.Linear(inputs, outputs), nn.ReLU()]
        layers[-2].load_state_dict({name: arrays[f"{index}.{name}"] for name in ("weight", "bias")})
    return nn.Sequential(*layers[:-1])


def main() -> None:
    arrays = {name: torch.from_numpy(array) for name, array in np.load(sys.argv[1]).items()}
    x, y = arrays.pop("x"), arrays.pop("y")
    model, data = network(arrays), [(x, y)]
    seeds = iter(range(10**9))

    @functools.cache
    def operator(tool: str, matrix: str):
        if tool == "PyHessian":
            return pyhessian(model, LOSS, data=(x, y), cuda=False)
        if tool == "curvlinops":
            kind = {"Hessian": curvlinops.HessianLinearOperator, "Gauss-Newton": curvlinops.GGNLinearOperator}
            return kind[matrix](model, LOSS, list(model.parameters()), data)
        if matrix == "Hessian":
            return eigenthings.HessianOperator(model, data, eigenthings.supervised_loss(LOSS))
        forward, outer = eigenthings.supervised_forward, eigenthings.supervised_loss_of_output(LOSS)
        return eigenthings.GGNOperator(model, data, forward, outer)

    for line in sys.stdin:
        job = json.loads(line)
        tool, estimator, products = job["tool"], job["estimator"], job["products"]
        chosen, seed = operator(tool, job["matrix"]), next(seeds)
        torch.manual_seed(seed)
        start = perf_counter()
        if tool == "PyHessian":
            estimate = np.mean(chosen.trace(maxIter=products, tol=0.0))
        elif tool == "curvlinops":
            how = {"Hutchinson": "hutchinson_trace", "Hutch++": "hutchpp_trace", "XTrace": "xtrace"}[
                estimator
            ]
            estimate = getattr(curvlinops, how)(chosen, products)
        else:
            estimate = eigenthings.trace(
                chosen, num_matvecs=products, method=estimator.lower(), seed=seed
            ).estimate
        seconds = perf_counter() - start
        print(json.dumps({"seconds": seconds, "estimate": float(estimate)}), flush=True)


if __name__ == "__main__":
    main()
