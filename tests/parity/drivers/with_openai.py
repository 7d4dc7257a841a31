"""Questions to a local server through OpenAI's client, whole and streamed."""

import json
import sys
from pathlib import Path

import numpy as np
from openai import OpenAI

job = json.loads(Path(sys.argv[1]).read_text())
client = OpenAI(base_url=job["url"], api_key="none", max_retries=0, timeout=60)
whole, streamed, cut = [], [], []
for question in job["questions"]:
    settings = {"model": job["folder"], "messages": [{"role": "user", "content": question}], "temperature": 0}
    answer = client.chat.completions.create(**settings, max_tokens=job["new_tokens"])
    choice = answer.choices[0]
    whole.append([choice.message.content, choice.finish_reason, str(answer.usage.completion_tokens)])
    chunks = list(client.chat.completions.create(**settings, max_tokens=job["new_tokens"], stream=True))
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    ends = [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices]
    streamed.append([text, ends[-1], str(len(chunks))])
    answer = client.chat.completions.create(**settings, max_tokens=2)
    cut.append([answer.choices[0].message.content, answer.choices[0].finish_reason])
np.savez(job["out"], whole=np.array(whole), streamed=np.array(streamed), cut=np.array(cut))
