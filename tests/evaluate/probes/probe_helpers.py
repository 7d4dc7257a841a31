"""Models that know exactly what they are told: oracles for the probes."""

from types import SimpleNamespace

import torch

from galenic.corpus.tokens.chat_format import encode_text
from galenic.evaluate.multiple_choice import PromptFormat
from galenic.evaluate.probes.asked import Subject, tokens_of


class Cache:
    """What was read, as a Hugging Face cache would hold it."""

    def __init__(self, rows):
        self.layers = [SimpleNamespace(rows=rows)]

    def reorder_cache(self, index):
        for layer in self.layers:
            layer.rows = [layer.rows[i] for i in index.tolist()]


class Reciter(torch.nn.Module):
    """Continues the beginnings it knows, with certainty; after all others every token is as likely."""

    def __init__(self, tokenizer, context=1024):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.config = SimpleNamespace(max_position_embeddings=context)
        self.tokenizer, self.next = tokenizer, {}

    def get_output_embeddings(self):
        """There is no head: its logits are its own."""

    def learn(self, prompt, text, answer, join=True):
        """Learns to answer a question so, and to stop then."""
        start = tokens_of(self.tokenizer, prompt, text)
        head, rest = prompt.parts(self.tokenizer, text)
        whole = [*head, *encode_text(self.tokenizer, rest + (prompt.join if join else "") + answer)]
        whole.append(self.tokenizer.eos_token_id)
        shared = next((i for i, (a, b) in enumerate(zip(start, whole, strict=False)) if a != b), len(start))
        for place in range(shared, len(whole)):
            self.next[tuple(whole[:place])] = whole[place]
        # asked to write, it begins where the prompt ends
        written = [*encode_text(self.tokenizer, prompt.join + answer), self.tokenizer.eos_token_id]
        for place, token in enumerate(written):
            self.next[(*start, *written[:place])] = token

    def forward(self, input_ids, attention_mask=None, past_key_values=None, use_cache=True, logits_to_keep=0):
        rows = past_key_values.layers[0].rows if past_key_values is not None else [()] * len(input_ids)
        logits = torch.zeros(*input_ids.shape, len(self.tokenizer))
        seen = []
        for number, (before, ids) in enumerate(zip(rows, input_ids.tolist(), strict=True)):
            real = (
                attention_mask[number, -len(ids) :].tolist() if attention_mask is not None else [1] * len(ids)
            )
            for place, (token, counts) in enumerate(zip(ids, real, strict=True)):
                before = (*before, token) if counts else before
                if before in self.next:
                    logits[number, place, self.next[before]] = 25.0
            seen.append(before)
        return SimpleNamespace(logits=logits, past_key_values=Cache(seen))


def subject_of(model, prompt=None):
    return Subject(model=model, tokenizer=model.tokenizer, prompt=prompt or PromptFormat(), batch_tokens=4000)
