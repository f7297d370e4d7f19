"""A session's requests without an engine."""

import asyncio

import jinja2
import played

from rollout_server.http.tokens.history import History
from rollout_server.http.tokens.splice import Known, Splicer
from rollout_server.http.tokens.texts import Texts
from rollout_server.trajectories.tree import TokenTree


class Server:
    """What the HTTP layer does with a session's requests, without an engine."""

    def __init__(self, case):
        self.case = case
        self.splicer = Splicer(Texts(case.tokenizer), case.stop_ids)
        self.history = History()
        self.tree = TokenTree()
        self.spliced = False

    async def render(self, messages, generation):
        try:
            return played.rendered_text(self.case, messages, generation)
        except (jinja2.TemplateError, TypeError, KeyError, ValueError):
            return None

    def prompt(self, case, messages):
        found = self.history.find(case.name, messages)
        self.spliced = found is not None
        if found is not None:
            known = Known(found[0], *self.tree.tokens(found[1]))
            ids = self.wait(self.splicer.splice(messages, known, self.render, case.name))
            self.spliced = ids is not None
            if ids is not None:
                return ids
        return played.render(case, messages)

    def answered(self, turn, prompt):
        node = self.tree.add(
            prompt,
            turn.ids,
            [-1.0] * len(turn.ids),
            versions=[(0, 0, len(turn.ids))],
            finish_reason="stop",
            messages=turn.messages,
            answer=turn.message,
        )
        self.history.add(self.case.name, turn.messages, turn.message, node)

    @staticmethod
    def wait(work):
        return asyncio.run(work)
