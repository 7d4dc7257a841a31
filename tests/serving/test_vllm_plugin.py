"""What vLLM meets first: an entry point that names something, costs nothing, and may be called again."""

import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_the_entry_point_is_there_and_imports_nothing():
    named = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]
    module, function = named["vllm.general_plugins"]["galenic"].split(":")
    code = f"import sys, {module}\nassert callable({module}.{function})\n"
    code += "heavy = {'torch', 'transformers', 'vllm'} & set(sys.modules)\nassert not heavy, heavy"
    subprocess.run([sys.executable, "-c", code], check=True)


REGISTERED = """
import sys
from types import ModuleType, SimpleNamespace

from transformers import AutoConfig

known = {}
vllm = sys.modules["vllm"] = ModuleType("vllm")
vllm.ModelRegistry = SimpleNamespace(get_supported_archs=lambda: set(known), register_model=known.__setitem__)
from galenic.serving.vllm_plugin import register

register()
register()
assert known == {"BaichuanM1ForCausalLM": "galenic.serving.vllm_model:BaichuanM1ForCausalLM"}, known
config = AutoConfig.for_model("baichuan_m1", num_hidden_layers=4, vocab_size=64)
assert config.layer_types == ["hybrid", "hybrid_sliding"] * 2, config.layer_types
"""


def test_registering_twice_adds_one_lazy_entry():
    subprocess.run([sys.executable, "-c", REGISTERED], check=True)
