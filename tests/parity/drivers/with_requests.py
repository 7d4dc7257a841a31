"""Many requests at once to a local server, token ids in and out; how many ran together, by its own count."""

import asyncio
import json
import re
import sys
import urllib.request
from pathlib import Path

import numpy as np
from openai import AsyncOpenAI

job = json.loads(Path(sys.argv[1]).read_text())


def running() -> int:
    with urllib.request.urlopen(job["url"].removesuffix("/v1") + "/metrics", timeout=30) as page:
        found = re.search(r"^vllm:num_requests_running\{.*\} ([0-9.]+)", page.read().decode(), re.M)
    return int(float(found[1]))


async def ask(client: AsyncOpenAI, prompt: list[int]) -> list[int]:
    extra = {"ignore_eos": True, "return_token_ids": True, "detokenize": False}
    answer = await client.completions.create(
        model=job["folder"], prompt=prompt, temperature=0, max_tokens=job["new_tokens"], extra_body=extra
    )
    return answer.choices[0].token_ids


async def main() -> None:
    client = AsyncOpenAI(base_url=job["url"], api_key="none", max_retries=0, timeout=120)
    requests = asyncio.gather(*(ask(client, prompt) for prompt in job["prompts"]))
    most = 0
    while not requests.done():
        most = max(most, await asyncio.to_thread(running))
        await asyncio.sleep(0.02)
    np.savez(job["out"], tokens=np.array(await requests), running=most)


asyncio.run(main())
