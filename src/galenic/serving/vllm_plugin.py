"""Tells vLLM of the architecture. vLLM calls `register` in each of its processes (entry point `vllm.general_plugins`).

Nothing of vLLM's is imported before that call, and the network only when a folder asks for it.
"""

ARCHITECTURE = "BaichuanM1ForCausalLM"


def register() -> None:
    """Adds configuration and network to what vLLM and transformers know; calling it again changes nothing."""
    from transformers import AutoConfig
    from vllm import ModelRegistry  # pyrefly: ignore[missing-import]

    from galenic.model.modeling_baichuan_m1 import BaichuanM1Config

    # Known here, so neither our folders' code nor the published one's has to run; ours also says which layers slide.
    AutoConfig.register(BaichuanM1Config.model_type, BaichuanM1Config, exist_ok=True)
    if ARCHITECTURE not in ModelRegistry.get_supported_archs():
        ModelRegistry.register_model(ARCHITECTURE, f"galenic.serving.vllm_model:{ARCHITECTURE}")
