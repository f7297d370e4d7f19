"""What a call records of what was sampled."""

from rollout_server.http.tokens.calls import Call, GenerationRequest
from rollout_server.lifecycle.gate import Gate


class Step:
    """What vLLM gives for a prompt; its only output has a token."""

    prompt_token_ids, finished = [1, 2], True

    def __init__(self):
        self.logprob = logprob = type("Logprob", (), {"logprob": -1.0})
        self.outputs = [
            type(
                "Output",
                (),
                {
                    "index": 0,
                    "token_ids": [5],
                    "logprobs": [{5: logprob}],
                    "finish_reason": "length",
                },
            )
        ]


async def test_a_token_that_nobody_sees_is_not_recorded():
    gate, step = Gate(hold_timeout=5), Step()

    async def steps(*_):
        yield step

    for silent, ids in ((False, [5]), (True, [])):
        call = Call(lambda: 7, gate, silent=silent)
        output_kind = type("Kind", (), {"name": "FINAL_ONLY"})
        params = type("Params", (), {"structured_outputs": None, "output_kind": output_kind})
        start = GenerationRequest(steps, None, "a", {})
        assert [s async for s in call.generate(start, {}, params)] == [step]
        sample = call.generations[0].samples[0]
        assert (sample.ids, sample.finish_reason) == (ids, "length")


async def test_versions_are_told_where_vllm_does_not_tell_them():
    """Before 0.32 it doesn't: each step's tokens are of the version of that moment."""
    version, told = 7, []

    async def steps(*_):
        nonlocal version
        for now, ids in ((7, [1]), (7, [2, 3]), (8, [4]), (9, []), (9, [5])):
            version, step = now, Step()
            step.outputs[0].token_ids = ids
            step.outputs[0].logprobs = [{i: step.logprob} for i in ids]
            step.outputs[0].finish_reason = "length" if ids == [5] else None
            yield step

    call = Call(lambda: version, Gate(hold_timeout=5))
    output_kind = type("Kind", (), {"name": "DELTA"})
    params = type("Params", (), {"structured_outputs": None, "output_kind": output_kind})
    start = GenerationRequest(steps, None, "a", {})
    async for _ in call.generate(start, {}, params):
        told.append(list(call.generations[0].samples[0].versions))
    assert told[-1] == [(7, 0, 3), (8, 3, 4), (9, 4, 5)]
    assert told[1] == [(7, 0, 3)] and told[3] == told[2]


def test_the_prompt_alone_is_told_and_recorded(server):
    with server.session() as session, session.openai() as client:
        answer = client.completions.create(
            model="policy", prompt="One two", max_tokens=0, echo=True, logprobs=1
        )
        assert answer.choices[0].text == "One two"
        assert answer.policy_versions == [[]]
    (call,) = session.tree.calls
    assert session.tree.tokens(call)[1] == [] and session.tree.tokens(call)[0]
    assert session.trajectory() == []
