"""Calls that are put into a token tree."""

NAN, INF = float("nan"), float("inf")


def call(tree, prompt, ids, logprob=-1.0, versions=None, finish_reason="stop", **more):
    """Add a call whose log-probabilities are logprob, logprob - 1, ..."""
    logprobs = [logprob - i for i in range(len(ids))]
    versions = [(0, 0, len(ids))] if versions is None else versions
    return tree.add(prompt, ids, logprobs, versions=versions, finish_reason=finish_reason, **more)


def say(role, content):
    return {"role": role, "content": content}
