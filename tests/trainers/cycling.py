"""Attach to the model in a folder and train it, in a way, until killed: what the tests kill.

Prints what it does as it does it: "attaching", "attached", and then "cycle <n>".
"""

import sys
import threading

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from rollout_server import attach

folder, colocate = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
tokenizer = AutoTokenizer.from_pretrained(folder)
print("attaching", flush=True)
server = attach(model, tokenizer, colocate=colocate, kv_cache_memory_bytes=64 << 20, progress=False)
print("attached", server.base_url, flush=True)


def ask():
    with server.session() as session, session.openai() as client:
        while True:
            client.completions.create(model="policy", prompt="Hello", max_tokens=20)


for _ in range(4):
    threading.Thread(target=ask, daemon=True).start()
optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
cycle = 0
while True:
    server.generate([5, 6, 7], {"max_tokens": 8, "ignore_eos": True})
    server.sleep()
    ids = torch.randint(0, 1000, (2, 16))
    model(ids, labels=ids).loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    server.wake()
    server.sync_weights()
    cycle += 1
    print("cycle", cycle, flush=True)
