"""A program: one tiny model that sees images, attached, asked and changed. Prints what it found.

Apart from the tests' process, since it may have another torchvision: see test_vision.py.
"""

import json
import sys

import vision
from support import MIB
from vision import ask, change, far, rendered, seen_logprobs, tokens, user, user_over_http

from rollout_server import attach

A, B = vision.picture(1), vision.picture(2, (70, 30))


def main(kind, **options):
    model, processor = getattr(vision, kind)()
    found = {"differences": [], "sensitivity": [], "same_ids": [], "paths": [], "turns": []}
    with attach(
        model,
        processor,
        kv_cache_memory_bytes=64 * MIB,
        max_model_len=1024,
        progress=False,
        **options,
    ) as server:
        messages, ids = (
            [user_over_http("What? ", A, B)],
            rendered(processor, [user("What? ", A, B)]),
        )
        for of in ("", "", "", "vision", None):
            prompt_ids, sampled, logprobs = tokens(ask(server.openai(), messages))
            found["same_ids"].append(prompt_ids == ids)
            own = seen_logprobs(model, processor, prompt_ids, sampled, [A, B])
            found["differences"].append(far(logprobs, own))
            others = [vision.picture(3, A.size), vision.picture(4, B.size)]
            other = seen_logprobs(model, processor, prompt_ids, sampled, others)
            found["sensitivity"].append(far(logprobs, other))
            if of is not None:
                change(model, of)
                if options.get("colocate") != "share":
                    server.sleep()
                report = server.wake() or server.sync_weights()
                found["paths"].append(report.path)
                server.verify_weights()
        with server.session() as session:
            messages, before = [], []
            for turn, images in enumerate(([A], [], [B, A])):
                messages.append(user_over_http(f"Turn {turn}. ", *images))
                prompt_ids, sampled, logprobs = tokens(answer := ask(session.openai(), messages))
                so_far = ([A], [A], [A, B, A])[turn]
                own = seen_logprobs(model, processor, prompt_ids, sampled, so_far)
                found["turns"].append([prompt_ids[: len(before)] == before, far(logprobs, own)])
                said = answer["choices"][0]["message"]["content"]
                messages.append({"role": "assistant", "content": said})
                before = [*prompt_ids, *sampled]
    print(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1], **json.loads(sys.argv[2]))
