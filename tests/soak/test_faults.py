"""The engine is killed, stopped or starved at every transition while 64 clients run."""

import collections
import itertools
import os
import random
import threading
import time

import inside
import openai
import psutil
import pytest
import torch
from support import MIB, large_step
from transformers import AutoModelForCausalLM

from rollout_server import attach
from rollout_server.lifecycle.state import State

CLIENTS = 64
FAULTS = int(os.environ.get("ROLLOUT_SOAK_FAULTS", 100))
KINDS = ("kill", "stop", "starve")
# At each of these states, moments after it was entered, or in the middle of awake.
STATES = (State.AWAKE, State.CLOSING_GATE, State.ASLEEP, State.WAKING, State.SYNCING)
NAMED = ("engine", "wasn't ready")  # what an error over HTTP says of its cause


class Faults:
    """Does something to the engine when the server's state moves to where the next fault is due."""

    def __init__(self, server):
        self.server = server
        self.done = collections.Counter()
        self._chance = random.Random(7)
        self._due = None
        self._lock = threading.Lock()
        states = inside.states(server)
        move = states.move

        def moved(to):
            move(to)
            self._at(to)

        states.move = moved

    @property
    def pending(self):
        return self._due is not None

    def order(self, kind, state):
        with self._lock:
            self._due = kind, state
        if state is State.AWAKE and self.server.state is State.AWAKE:
            self._at(State.AWAKE)

    def _at(self, state):
        with self._lock:
            if self._due is None or self._due[1] is not state:
                return
            (kind, _), self._due = self._due, None
        later = self._chance.choice((0.0, 0.002, 0.02))
        if state is State.AWAKE:
            later += self._chance.uniform(0, 1)
        self.done[kind, state] += 1
        threading.Timer(later, self._do, (kind, self.server.engine_pid)).start()

    def _do(self, kind, pid):
        try:
            process = psutil.Process(pid)
            if kind == "kill":
                process.kill()
                return
            process.suspend()
            if kind == "starve":  # shorter than any deadline
                time.sleep(1)
                process.resume()
        except psutil.Error:
            pass  # ended by an earlier fault: the next engine has another number


class Client(threading.Thread):
    """Conversations in sessions, one after another, each checked when it ends."""

    def __init__(self, server, number, stop):
        super().__init__(daemon=True)
        self.server, self.stop = server, stop
        self.chance = random.Random(number)
        self.answered = self.conversations = 0
        self.failed = collections.Counter()
        self.wrong = []
        self.asked_at = None

    def run(self):
        while not self.stop.is_set():
            try:
                self.converse()
            except Exception as error:
                self.wrong.append(repr(error))
                return

    def converse(self):
        told = []
        with self.server.session() as session:
            messages = []
            with session.openai(max_retries=0, timeout=900) as client:
                for _ in range(self.chance.randint(1, 4)):
                    messages.append({"role": "user", "content": f"{self.chance.random()}?"})
                    self.asked_at = time.monotonic()
                    try:
                        content, tokens = self.ask(client, messages)
                    except openai.APIStatusError as error:
                        self.fail(error.status_code == 503, error)
                        break
                    except openai.APIError as error:  # in a stream
                        self.fail(True, error)
                        break
                    finally:
                        self.asked_at = None
                    told.append(tokens)
                    messages.append({"role": "assistant", "content": content})
                    self.answered += 1
        self.conversations += 1
        recorded = [session.tree.tokens(call) for call in session.tree.calls]
        if [(list(p), list(i)) for p, i in recorded] != told:
            self.wrong.append(f"{len(told)} answers, {len(recorded)} recorded, or other tokens")
        for (prompt, ids), (later, _) in itertools.pairwise(told):
            if later[: len(prompt) + len(ids)] != prompt + ids:
                self.wrong.append("a prompt doesn't begin with what was sampled")

    def fail(self, right_status, error):
        if not right_status or not any(name in str(error) for name in NAMED):
            self.wrong.append(repr(error))
        self.failed[str(error)[:60]] += 1

    def ask(self, client, messages):
        options = dict(
            model="policy", messages=messages, max_tokens=self.chance.randint(2, 40), logprobs=True
        )
        if self.chance.random() < 0.5:
            answer = client.chat.completions.create(**options).choices[0].message
            return answer.content, (answer.prompt_token_ids, answer.generation_token_ids)
        content, last = "", None
        for event in client.chat.completions.create(stream=True, **options):
            for choice in event.choices:
                content += choice.delta.content or ""
                last = choice.delta if choice.finish_reason else last
        return content, (last.prompt_token_ids, last.generation_token_ids)


def restarted(server):
    return server.metrics()["rollout_server_engine_restarts_total"]


@pytest.mark.timeout(4 * 3600)
def test_faults_at_every_transition(tiny_folder, tokenizer):
    model = AutoModelForCausalLM.from_pretrained(tiny_folder, dtype=torch.float32)
    with attach(
        model,
        tokenizer,
        kv_cache_memory_bytes=128 * MIB,
        max_restarts=10 * FAULTS,
        hold_timeout=900,
        liveness_timeout=4,
        sleep_timeout=4,
        wake_timeout=4,
        sync_timeout=4,
        start_timeout=200,
        progress=False,
    ) as server:
        faults, stop = Faults(server), threading.Event()
        clients = [Client(server, number, stop) for number in range(CLIENTS)]
        for client in clients:
            client.start()
        plan = [(kind, state) for state in STATES for kind in KINDS]
        started = time.monotonic()
        for number in range(FAULTS):
            faults.order(*plan[number % len(plan)])
            until = time.monotonic() + 300
            while faults.pending:
                assert time.monotonic() < until, f"fault {number} never came: {server.state}"
                time.sleep(0.05)
                server.sleep()
                large_step(model, [1, 2, 3], seed=number)
                server.wake()
                server.sync_weights()
            time.sleep(random.Random(number).uniform(0, 2))
            if number % 10 == 9:
                print(
                    f"  {number + 1} faults, {restarted(server):.0f} restarts, "
                    f"{sum(c.answered for c in clients)} answers, "
                    f"{time.monotonic() - started:.0f} s",
                    flush=True,
                )
            assert not [wrong for c in clients for wrong in c.wrong]
        stop.set()
        server.wake()
        for client in clients:
            client.join(300)
        stuck = [time.monotonic() - c.asked_at for c in clients if c.is_alive() and c.asked_at]
        assert not stuck, f"{len(stuck)} requests were never answered"
        assert not [wrong for c in clients for wrong in c.wrong]
        server.sync_weights()
        server.verify_weights()
        assert server.state == "awake"
        failed = sum((c.failed for c in clients), collections.Counter())
        print(
            f"\n{sum(faults.done.values())} faults ({dict(faults.done)}), "
            f"{restarted(server):.0f} restarts; "
            f"{sum(c.conversations for c in clients)} conversations, "
            f"{sum(c.answered for c in clients)} answers, {dict(failed)} failed; "
            f"policy version {server.policy_version}"
        )
        assert set(faults.done) == set(plan)
