"""Talking to a model: in the terminal, or on a page of this machine.

    question --> a model folder, loaded here          --> answer, piece by piece --> terminal, pipe
             --> an OpenAI-compatible address (--url) -->                        --> page (--web)

In: a model folder or an address. Out: text, and conversations as `{"messages": [...]}` where one is saved.

* `chat.py`: the verb: the prompt, its commands, pipes.
* `local.py`: a model in this process. `endpoint.py`: a model behind an address, ours or another's.
* `web.py`, `page.html`: the page and its server, on 127.0.0.1 only; the folder's model runs in `transformers serve`,
  a child that ends with us.

Nothing is kept and nothing leaves the machine, unless an address elsewhere is named.
"""
