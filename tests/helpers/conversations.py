"""Conversations with a server, and what is told of their tokens."""

import itertools
import threading

import anthropic
from support import eventually, running, under_way

TOKENS = 120  # of a request that is to be under way for a while
SAMPLING = {"max_tokens": 12, "temperature": 1.0, "extra_body": {"ignore_eos": True}}


def converse(client, turns, **options):
    """A conversation by chat completions; (messages, answers)."""
    messages = [{"role": "system", "content": "Be short."}]
    answers = []
    for turn in range(turns):
        messages.append({"role": "user", "content": f"Question {turn}?"})
        answer = client.chat.completions.create(
            model="policy", messages=messages, **(SAMPLING | options)
        )
        answers.append(answer)
        messages.append({"role": "assistant", "content": answer.choices[0].message.content})
    return messages, answers


def converse_by_messages(session, turns, stream, **options):
    """The answers of a conversation by Anthropic's client, one after another."""
    url = session.environment["ANTHROPIC_BASE_URL"]
    with anthropic.Anthropic(base_url=url, api_key=session.api_key) as client:
        messages = []
        for turn in range(turns):
            messages.append({"role": "user", "content": f"Question {turn}?"})
            asked = dict(model="policy", messages=messages) | options
            if stream:
                with client.messages.stream(**asked) as events:
                    answer = events.get_final_message()
            else:
                answer = client.messages.create(**asked)
            messages.append({"role": "assistant", "content": answer.content})
            yield answer


def converse_by_responses(client, turns, stream, **options):
    """The answers of a conversation by Responses, one after another."""
    items = []
    for turn in range(turns):
        items.append({"role": "user", "content": f"Question {turn}?"})
        asked = dict(model="policy", input=items) | options
        if stream:
            with client.responses.stream(**asked) as events:
                list(events)
                answer = events.get_final_response()
        else:
            answer = client.responses.create(**asked)
        items += [item.model_dump(exclude_none=True) for item in answer.output]
        yield answer


def sampled(answer):
    """(prompt ids, sampled ids) that an answer's message tells."""
    message = answer.choices[0].message.model_dump()
    return message["prompt_token_ids"], message["generation_token_ids"]


def goes_on(session):
    """Whether each later call's prompt begins with the call's before it and what that sampled."""
    calls = [session.tree.tokens(call) for call in session.tree.calls]
    assert len(calls) > 1
    return all(
        later[: len(prompt) + len(ids)] == prompt + ids
        for (prompt, ids), (later, _) in itertools.pairwise(calls)
    )


class Asking(threading.Thread):
    """A greedy chat request that runs when this has been entered, and is answered on the way out.

    Attributes: answer, and its prompt_ids, ids and versions.
    """

    def __init__(self, server, session=None, tokens=TOKENS, **fields):
        super().__init__()
        self._server, self._session = server, session or server
        self._tokens, self._fields = tokens, fields

    def run(self):
        with self._session.openai() as client:
            self.answer = client.chat.completions.create(
                model="policy",
                messages=[{"role": "user", "content": "Count."}],
                temperature=0,
                max_tokens=self._tokens,
                logprobs=True,
                extra_body={"ignore_eos": True} | self._fields,
            )
        self.prompt_ids, self.ids = sampled(self.answer)
        spans = self.answer.model_dump()["policy_versions"][0]
        self.versions = [(s["version"], s["start"], s["end"]) for s in spans]

    def __enter__(self):
        others = running(self._server)
        self.start()
        eventually(lambda: under_way(self._server, but=others))
        return self

    def __exit__(self, *_):
        self.join(60)
