"""Serves models with software that other people wrote; Galenic itself needs none of it.

    a model folder of ours, or the published Baichuan-M1-14B
        |  vllm serve FOLDER           (entry point `vllm.general_plugins`, found wherever Galenic is installed)
        v
    an OpenAI-compatible server

* `vllm_plugin.py`: tells vLLM of the architecture; imports nothing of vLLM's.
* `vllm_model.py`: the network in vLLM's parts: paged keys and values, tensor parallelism, the head's unit-length rows.
* `previous_token.py`: the convolution's memory, a second paged cache of raw keys and values; why it is that, and not a
  state, stands there.

In: a folder. Out: what the server answers. `transformers serve` is `galenic.model.serve`. The guide: docs/serving.md.
"""
