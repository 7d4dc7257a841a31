"""Taking a model out: a folder that any Hugging Face tool loads, as it is wanted there.

    model folder, or base+adapter --> adapter merged in --> plain head --> int8 / int4 --> dtype --> model/ --> the Hub

In: a model folder of ours or of another architecture. Out: `model/` (config, safetensors, tokenizer, model card) and
`export.json`, which tells sizes and, after quantising, what it cost in bits per byte and in agreement.

* `export.py`: the verb. `quantize.py`: weight-only int8 and int4 in the compressed-tensors format, which transformers
  and vLLM read. `losses.py`: what a change of weights costs on held-out text. `push.py`: the upload, only when asked.
"""
