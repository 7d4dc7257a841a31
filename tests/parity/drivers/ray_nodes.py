"""Prints on how many nodes of a cluster units are worked: python ray_nodes.py ADDRESS."""

import sys
import time

from galenic.corpus.engine import map_units


def where(unit):
    import ray

    time.sleep(0.3)
    return {"node": ray.get_runtime_context().get_node_id(), "unit": unit["number"]}


if __name__ == "__main__":
    results = list(map_units(where, [{"number": n} for n in range(8)], workers=2, address=sys.argv[1]))
    assert sorted(result["unit"] for result in results) == list(range(8))
    print(len({result["node"] for result in results}))
