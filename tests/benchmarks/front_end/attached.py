"""A process with an attached server, told by lines on standard input.

    sessions N    end the sessions before, open N; their [base_url, api_key] as JSON
    (its end)     close

Its first line of output is [base_url, api_key] of the server.
"""

import json
import sys

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from rollout_server import attach


def main(folder, options):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    with attach(model, tokenizer, progress=False, **json.loads(options)) as server:
        tell([server.base_url, server.api_key])
        sessions = []
        for line in sys.stdin:
            for session in sessions:
                session.end()
            sessions = [server.session() for _ in range(int(line.split()[1]))]
            tell([[session.base_url, session.api_key] for session in sessions])


def tell(value):
    print(json.dumps(value), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
