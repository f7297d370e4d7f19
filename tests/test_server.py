"""The handle, over one shared engine: generation, weights, sleep."""

import gc
import os
import threading
import time

import inside
import psutil
import pytest
import torch
from support import MIB, eventually, greedy, held, large_step, trainer_logprobs, under_way

from rollout_server.errors import (
    DeadlineError,
    PromptTooLongError,
    SamplingError,
    StateError,
    WeightSyncError,
)

pytestmark = pytest.mark.slow


def in_thread(work):
    """Run `work` in a thread; gives (thread, list that will hold its result)."""
    results = []
    thread = threading.Thread(target=lambda: results.append(work()), daemon=True)
    thread.start()
    return thread, results


@pytest.mark.core
def test_generate_takes_text_ids_and_messages(server, tokenizer):
    messages = [{"role": "user", "content": "Hi"}]
    ids = tokenizer("Hello")["input_ids"]
    sampling = {"temperature": 0, "max_tokens": 4, "ignore_eos": True}
    text, numbers = server.generate(["Hello", ids], sampling)
    assert text.ids == numbers.ids
    assert text.logprobs == pytest.approx(numbers.logprobs, abs=1e-4)
    assert (text.prompt_ids, len(text.ids), len(text.logprobs)) == (ids, 4, 4)
    assert text.text == tokenizer.decode(text.ids, skip_special_tokens=True)
    (one,) = server.generate("Hello", sampling)
    assert one.ids == text.ids
    (chat,) = server.generate(messages, sampling)
    rendered = tokenizer.apply_chat_template(messages, add_generation_prompt=True)
    assert chat.prompt_ids == rendered["input_ids"]


def test_generate_keeps_the_order_and_gives_n_for_each_prompt(server):
    prompts = [[5 + i, 6, 7] for i in range(8)]
    completions = server.generate(prompts, {"n": 3, "max_tokens": 5, "ignore_eos": True})
    assert [c.prompt_ids for c in completions] == [p for p in prompts for _ in range(3)]
    assert {len(c.ids) for c in completions} == {5}
    assert len({tuple(c.ids) for c in completions}) > 8, "samples of a prompt are all the same"


@pytest.mark.core
def test_sampled_logprobs_are_those_of_the_sampled_distribution(server, shared_model):
    prompt = [11, 12, 13]
    (completion,) = server.generate(
        prompt, {"temperature": 0.7, "max_tokens": 16, "ignore_eos": True}
    )
    with torch.no_grad():
        logits = shared_model(torch.tensor([prompt + completion.ids])).logits[0, 2:-1].float()
    expected = (logits / 0.7).log_softmax(-1)[range(16), completion.ids]
    assert torch.allclose(torch.tensor(completion.logprobs), expected, atol=1e-3)


@pytest.mark.parametrize(
    ("sampling", "parts"),
    [
        ({"temprature": 1.0}, ["temprature", "temperature"]),
        ({"temperature": -1.0}, ["temperature", "-1.0"]),
        ({"top_p": 7.0}, ["top_p", "7.0"]),
        ({"max_tokens": 0}, ["max_tokens", "0"]),
        ({"seed": 1 << 70}, ["seed", "64 bits"]),
    ],
)
def test_bad_sampling_fields_are_named(server, sampling, parts):
    with pytest.raises(SamplingError) as error:
        server.generate("Hello", sampling)
    for part in parts:
        assert part in str(error.value)


def test_bad_prompts_are_named(server):
    with pytest.raises(PromptTooLongError, match="maximum context length is 1024"):
        server.generate([[5] * 1024])
    with pytest.raises(SamplingError, match=r"prompts\[1\] is empty"):
        server.generate([[5], []])
    with pytest.raises(SamplingError, match=r"prompts\[0\]"):
        server.generate([[5.0, "x"]])


@pytest.mark.core
def test_each_optimizer_step_reaches_the_engine(server, shared_model):
    """After each of 5 large steps the engine agrees with the trainer's own model."""
    prompt, previous = [21, 22, 23, 24], ([], torch.zeros(12))
    client = server.openai()
    for seed in range(5):
        large_step(shared_model, prompt, seed)
        report = server.sync_weights()
        assert report.version == server.policy_version
        answer = client.completions.create(
            model="policy",
            prompt=prompt,
            max_tokens=12,
            temperature=0,
            logprobs=2,
            extra_body={"ignore_eos": True, "return_token_ids": True},
        )
        assert answer.policy_version == report.version
        choice = answer.choices[0]
        ids, logprobs = choice.token_ids, torch.tensor(choice.logprobs.token_logprobs)
        own = trainer_logprobs(shared_model, prompt, ids)
        assert torch.allclose(logprobs, own[range(12), ids], atol=1e-3)
        best, second = own.topk(2).values.T
        clear = best - second > 1e-3
        assert clear.any()
        assert (own.argmax(-1) == torch.tensor(ids))[clear].all()
        assert ids != previous[0] or not torch.allclose(logprobs, previous[1], atol=1e-2)
        previous = ids, logprobs


@pytest.mark.core
def test_verify_names_the_tensor_that_differs(server, shared_model):
    server.verify_weights()
    weight = shared_model.model.layers[1].self_attn.k_proj.weight
    with torch.no_grad():
        weight[3, 4] += 1
    with pytest.raises(WeightSyncError, match=r"layers\.1\.self_attn\.k_proj\.weight"):
        server.verify_weights()
    server.sync_weights()
    server.verify_weights()


def test_a_parameter_whose_memory_moved_is_found_again(server, shared_model):
    weight = shared_model.model.layers[0].mlp.up_proj.weight
    weight.data = torch.randn_like(weight) * 0.1
    server.sync_weights()
    server.verify_weights()
    assert greedy(server, [31, 32]).ids == greedy(server, [31, 32]).ids


@pytest.mark.parametrize("asleep", [False, True])
def test_weights_that_are_not_finite_are_refused_by_name(server, shared_model, asleep):
    """Nothing is written: the engine goes on with what it has, or sleeps on."""
    before, version = greedy(server, [31, 32]).ids, server.policy_version
    norm = shared_model.model.norm.weight
    good = norm.detach().clone()
    if asleep:
        server.sleep()
    for bad in (torch.nan, -torch.inf):
        with torch.no_grad():
            norm[3] = bad
        with pytest.raises(WeightSyncError, match=r"NaN or infinity in \['model\.norm\.weight'\]"):
            server.sync_weights()
    assert server.policy_version == version
    assert server.state == ("asleep" if asleep else "awake")
    if not asleep:
        assert greedy(server, [31, 32]).ids == before
    with torch.no_grad():
        norm.copy_(good)
    assert server.sync_weights().version == version + 1
    assert greedy(server, [31, 32]).ids == before


def test_other_tensors_than_at_attach_are_refused_with_the_list(server, shared_model):
    norm, version = shared_model.model.norm, server.policy_version
    good = norm.weight
    norm.weight = torch.nn.Parameter(torch.ones(64))
    norm.bias = torch.nn.Parameter(torch.ones(128))
    try:
        with pytest.raises(WeightSyncError) as error:
            server.sync_weights()
        assert "model.norm.bias (128,) is new" in str(error.value)
        assert "model.norm.weight had shape (128,), has (64,)" in str(error.value)
        norm.weight, norm.bias = torch.nn.Parameter(good.double()), None  # this is cast
        server.sync_weights()
        server.verify_weights()
        version = server.policy_version
    finally:
        norm.weight, norm.bias = good, None
    assert (server.state, server.policy_version) == ("awake", version)
    server.sync_weights()


def test_a_sync_that_waits_for_another_has_a_deadline(server, monkeypatch):
    monkeypatch.setattr(type(inside.sync(server)), "_allowed", property(lambda _: 0.2))
    started = time.monotonic()
    with inside.turn(server), pytest.raises(DeadlineError, match="another sync_weights"):
        server.sync_weights()
    assert time.monotonic() - started < 10  # and not the deadline of a sync that has begun
    assert server.sync_weights().version == server.policy_version


def test_two_hundred_syncs_leave_nothing_behind(server, shared_model):
    processes = [psutil.Process(), psutil.Process(server.engine_pid)]

    def held():
        gc.collect()  # what earlier tests left for the collector isn't of these syncs
        shared = sum(name.startswith("torch_") for name in os.listdir("/dev/shm"))
        files, threads = zip(*((p.num_fds(), p.num_threads()) for p in processes), strict=True)
        return [shared, *files, *threads]

    def resident():
        return [p.memory_info().rss for p in processes]

    for _ in range(20):
        server.sync_weights()
    before, memory = held(), resident()
    for number in range(200):
        if number % 20 == 0:  # memory that moves is found, and the old let go
            up = shared_model.model.layers[0].mlp.up_proj.weight
            up.data = up.data.clone()
        server.sync_weights()
    # What each sync, or each of the ten moves, left would be more than what comes and goes with
    # connections of earlier tests' clients.
    after = held()
    assert all(now < then + 5 for now, then in zip(after, before, strict=True)), (after, before)
    for now, then in zip(resident(), memory, strict=True):
        assert now <= then + 8 * MIB


def test_twenty_cycles_leave_no_memory_behind(server):
    process = psutil.Process(server.engine_pid)
    # Touch much of the KV cache, as an engine under load has.
    load = [[5 + i] * 900 for i in range(64)]
    server.generate(load, {"max_tokens": 1})
    awake = process.memory_info().rss
    server.sleep()
    assert server.memory()["weights"] == server.memory()["kv_cache"] == 0
    asleep = [process.memory_info().rss]
    assert awake - asleep[0] > 32 * MIB
    for _ in range(20):
        server.wake()
        greedy(server, [41, 42])
        server.sleep()
        asleep.append(process.memory_info().rss)
    assert max(asleep[1:]) <= 1.02 * asleep[0]


@pytest.mark.core
def test_a_request_waits_for_a_sleeping_engine(server, shared_model):
    server.sleep()
    version = server.policy_version
    client = server.openai()
    thread, answers = in_thread(
        lambda: client.completions.create(model="policy", prompt=[51, 52], max_tokens=4)
    )
    eventually(lambda: held(server) == 1)
    assert not answers
    large_step(shared_model, [51, 52], seed=51)
    server.wake()
    thread.join(30)
    assert answers[0].policy_version == version + 1 == server.policy_version


@pytest.mark.core
def test_an_interrupted_generation_goes_on_from_its_own_tokens(server):
    sampling = {"temperature": 0, "max_tokens": 400, "ignore_eos": True}
    (undisturbed,) = server.generate([61, 62], sampling)
    version = server.policy_version
    thread, answers = in_thread(lambda: server.generate([61, 62], sampling))
    eventually(lambda: under_way(server))
    server.sleep()
    assert not answers, "the generation was over before it could be interrupted"
    server.wake()
    server.sync_weights()
    thread.join(60)
    (completion,) = answers[0]
    assert completion.ids == undisturbed.ids
    assert completion.finish_reason == "length"
    assert completion.policy_version == version + 2
    starts = [start for _, start, _ in completion.versions]
    assert starts[0] == 0 and completion.versions[-1][2] == 400
    assert len(starts) >= 2, "the spans don't tell that two versions sampled"


def test_sleep_and_wake_may_be_called_twice(server):
    server.sleep()
    server.sleep()
    assert server.state == "asleep"
    with pytest.raises(StateError, match="wake"):
        server.generate("Hello")
    assert server.wake().version == server.policy_version
    assert server.wake() is None
    assert server.state == "awake"


def test_transitions_from_many_threads_happen_one_at_a_time(server):
    before = server.policy_version
    failures = []

    def cycle():
        try:
            server.sync_weights()
            server.sleep()
            server.sync_weights()
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=cycle) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not failures
    server.wake()
    assert server.policy_version >= before + 8
    assert greedy(server, [71]).ids


def test_it_shows_itself_without_its_key(server):
    text, table = repr(server), server._repr_html_()
    for shown in (text, table):
        assert "awake" in shown and server.base_url in shown and "MiB" in shown
        assert server.api_key not in shown
    assert table.startswith("<table>")
