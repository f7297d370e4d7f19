"""Names and transport of weights, without an engine."""

import multiprocessing
import os
import pickle

import pytest
import torch

from rollout_server.errors import UnsupportedModelError
from rollout_server.weights import transport
from rollout_server.weights.sources.base import not_finite, policy_tensors
from rollout_server.weights.transport import Exporter, Importer
from rollout_server.weights.wire import Part, Piece


def test_tied_tensors_come_once_and_untied_ones_twice(tiny):
    names = policy_tensors(tiny)
    assert "model.embed_tokens.weight" in names and "lm_head.weight" not in names
    tiny.config.tie_word_embeddings = False  # a config that doesn't tell vLLM that they are tied
    assert "lm_head.weight" in policy_tensors(tiny)


def test_persistent_buffers_are_part_of_the_weights(tiny):
    tiny.register_buffer("kept", torch.ones(3))
    tiny.register_buffer("derived", torch.ones(3), persistent=False)
    names = policy_tensors(tiny)
    assert "kept" in names and "derived" not in names


def test_wrappers_leave_no_trace_in_the_names(tiny, process_group):
    plain = set(policy_tensors(tiny))
    assert set(policy_tensors(torch.compile(tiny))) == plain
    tiny.model.layers[0] = torch.compile(tiny.model.layers[0])
    assert set(policy_tensors(tiny)) == plain
    assert set(policy_tensors(torch.nn.parallel.DistributedDataParallel(tiny))) == plain


def test_models_that_cannot_be_read_are_refused():
    with torch.device("meta"), pytest.raises(UnsupportedModelError, match="meta"):
        policy_tensors(torch.nn.Linear(2, 2))
    with pytest.raises(UnsupportedModelError, match="no parameters"):
        policy_tensors(torch.nn.ReLU())


def _sums(messages, answers):
    importer = Importer()
    while (message := messages.recv()) is not None:
        try:
            pieces = importer.open(message).pieces
            answers.send({p.name: p.tensor.double().sum().item() for p in pieces})
        except Exception as error:
            answers.send(error)


@pytest.fixture
def other_process():
    """Sends a message to an `Importer` in another process, and gives the sums it sees."""
    context = multiprocessing.get_context("spawn")
    (there, messages), (answers, here) = context.Pipe(False), context.Pipe(False)
    process = context.Process(target=_sums, args=(there, here), daemon=True)
    process.start()

    def ask(message):
        messages.send(message)
        assert answers.poll(60)
        return answers.recv()

    yield ask
    messages.send(None)
    process.join(20)


def tensors():
    base = torch.arange(24.0).reshape(4, 6)
    return {"whole": base, "slice": base[1:3, 2:], "turned": base.t(), "half": base.bfloat16()}


def whole(given, number=0):
    """All tensors as one part."""
    return Part(number, True, [Piece(name, 0, tensor) for name, tensor in given.items()])


def expected(given):
    return {name: t.double().sum().item() for name, t in given.items()}


def test_another_process_sees_the_same_memory(other_process):
    given, exporter = tensors(), Exporter()
    assert other_process(exporter.export(whole(given))) == expected(given)
    given["whole"].add_(1)  # views of it change with it, in both processes
    message = exporter.export(whole(given))
    assert len(message) < 128, "unmoved tensors are sent again"
    assert other_process(message) == expected(given)
    given["whole"].data = torch.ones(4, 6)  # what an optimizer wrapper may do
    assert other_process(exporter.export(whole(given))) == expected(given)


def test_without_room_in_shared_memory_a_copy_is_sent(other_process, monkeypatch):
    monkeypatch.setattr(transport.shutil, "disk_usage", lambda _: type("U", (), {"free": 0}))
    given, exporter = tensors(), Exporter()
    assert other_process(exporter.export(whole(given))) == expected(given)
    assert not given["whole"].untyped_storage().is_shared()
    given["whole"].mul_(3)
    assert other_process(exporter.export(whole(given))) == expected(given)


def test_nothing_stays_in_shared_memory_by_name():
    before = set(os.listdir("/dev/shm"))
    given, exporter = tensors(), Exporter()
    exporter.export(whole(given))
    assert {n for n in set(os.listdir("/dev/shm")) - before if n.startswith("torch_")} == set()


def test_handles_that_were_never_sent_are_an_error(other_process):
    given, exporter = tensors(), Exporter()
    exporter.export(whole(given))
    assert "never sent" in str(other_process(exporter.export(whole(given))))


def test_a_message_can_hold_nothing_but_handles():
    with pytest.raises(pickle.UnpicklingError, match="system"):
        Importer().open(pickle.dumps((1, [("x", os.system)])))


def test_handles_of_another_torch_are_refused(monkeypatch):
    message = Exporter().export(whole(tensors()))
    monkeypatch.setattr(torch, "__version__", "2.0.0")
    with pytest.raises(RuntimeError, match=r"the engine 2\.0\.0.*one torch"):
        Importer().open(message)


def test_tensors_of_one_storage_are_opened_once():
    base = torch.arange(24.0).reshape(4, 6)
    given = {"whole": base, "rows": base[1:3], "last": base[3], "turned": base.t()}
    exporter, importer = Exporter(), Importer()
    message = exporter.export(whole(given))
    storages, views = pickle.loads(message)[-1]
    assert (len(storages), len(views)) == (2, 4), "not one for what is whole and one for a copy"
    opened = importer.open(message)
    assert opened.bytes == sum(t.nbytes for t in given.values())
    base[1, 2] = 99
    for piece in opened.pieces[:3]:
        assert torch.equal(piece.tensor, given[piece.name])
    again = exporter.export(whole(given))
    assert importer.open(again) is opened
    assert exporter.has() and exporter.has(0) and not exporter.has(1)
    exporter.forget()
    assert not exporter.has()
    importer.forget()
    with pytest.raises(RuntimeError, match="never sent"):
        importer.open(again)
    assert len(importer.open(exporter.export(whole(given))).pieces) == 4


def test_not_finite_names_the_tensors():
    given = tensors() | {"ids": torch.arange(3), "none": torch.zeros(0)}
    assert not_finite(given.items()) == []
    given["half"][1, 1], given["turned"][0, 0] = torch.inf, torch.nan
    assert not_finite(given.items()) == ["whole", "turned", "half"]
