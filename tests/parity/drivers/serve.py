"""Runs `transformers serve FOLDER ...` for a folder that brings its own network.

transformers 5.23 looks the class up by name among its own even under --trust-remote-code; so it is put there first.
"""

import sys

from transformers import AutoConfig
from transformers.cli.serving import model_manager
from transformers.cli.transformers import main
from transformers.dynamic_module_utils import get_class_from_dynamic_module

folder = sys.argv[1]
name = AutoConfig.from_pretrained(folder, trust_remote_code=True).auto_map["AutoModelForCausalLM"]
network = get_class_from_dynamic_module(name, folder)
setattr(model_manager.transformers, network.__name__, network)
sys.argv = ["transformers", "serve", *sys.argv[1:], "--trust-remote-code"]
main()
