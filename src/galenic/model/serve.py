"""Runs `transformers serve` on a model folder: `python -m galenic.model.serve FOLDER [its options]`.

transformers looks the class of a folder up by name among its own classes, also when it trusts the folder's code. So the
class is put there first, and no code from the folder has to run.
"""

import sys

from galenic.model import BaichuanM1ForCausalLM


def main(arguments: list[str]) -> None:
    """Serves `arguments[0]`; the rest are options of `transformers serve`."""
    try:
        from transformers.cli.serving import model_manager
        from transformers.cli.transformers import main as transformers_cli

        setattr(model_manager.transformers, BaichuanM1ForCausalLM.__name__, BaichuanM1ForCausalLM)
        sys.argv = ["transformers", "serve", *arguments]
        transformers_cli()
    except ImportError as error:
        sys.exit(f"{error}\nWith Galenic: pip install 'galenic[serve]'")


if __name__ == "__main__":
    main(sys.argv[1:])
