"""The plan of a sync, recorded from loaders of every habit, without an engine."""

from types import SimpleNamespace

import pytest
import torch

from rollout_server.weights.staging import EngineTensorInfo, Staging, buckets, streamed
from rollout_server.weights.wire import Piece, TensorSpec
from rollout_server.worker.copier import Copier
from rollout_server.worker.marks import mark, marked
from rollout_server.worker.recording import record

D = 4


class Model(torch.nn.Module):
    """Fuses q, k and v, pads its vocabulary, casts a norm, and skips what its loader skips."""

    def __init__(self, parallel=1, rank=0):
        super().__init__()
        self.parallel, self.rank = parallel, rank
        self.qkv = torch.nn.Parameter(torch.full((3 * D // parallel, D), 9.0))
        self.out = torch.nn.Parameter(torch.full((D, D // parallel), 9.0))
        self.embed = torch.nn.Parameter(torch.full((8, D), 9.0))
        self.norm = torch.nn.Parameter(torch.full((D,), 9.0, dtype=torch.bfloat16))

    def load_weights(self, weights):
        part = D // self.parallel
        for name, tensor in weights:
            if name in ("q", "k", "v"):
                at = "qkv".index(name) * part
                self.qkv.data[at : at + part].copy_(tensor.narrow(0, self.rank * part, part))
            elif name == "out":
                self.out.data.copy_(tensor.narrow(1, self.rank * part, part))
            elif name == "embed":
                self.embed.data[: tensor.shape[0]].copy_(tensor)
                self.embed.data[tensor.shape[0] :].fill_(0)
            elif name == "norm":
                assert tensor.shape == self.norm.shape, "norm has another shape"
                self.norm.data.copy_(tensor)
            elif name != "skipped":
                raise KeyError(name)


def weights():
    torch.manual_seed(0)
    square = {name: torch.randn(D, D) for name in ("q", "k", "v", "out")}
    return square | {"embed": torch.randn(6, D), "norm": torch.randn(D)}


def specs(tensors):
    return {name: TensorSpec(tuple(t.shape), t.dtype) for name, t in tensors.items()}


def recorded(model, tensors):
    meta = [(n, torch.empty(t.shape, dtype=t.dtype, device="meta")) for n, t in tensors.items()]
    return record(model, specs(tensors), meta, write=False)


def loaded(tensors, **how):
    model = Model(**how)
    model.load_weights(tensors.items())
    return model


def assert_same(model, other):
    for (name, mine), theirs in zip(model.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(mine, theirs), name


@pytest.mark.parametrize("how", [{}, {"parallel": 2, "rank": 1}])
def test_copies_by_the_plan_are_what_the_loader_does(how):
    tensors, model = weights(), Model(**how)
    plan = recorded(model, tensors)
    assert (model.qkv == 9).all(), "recording wrote something"
    assert plan.usable, plan.unsupported_reasons
    pieces = [Piece(name, 0, t) for name, t in tensors.items()]
    assert set(plan.mismatched(pieces)) == set(tensors)
    Copier(*plan.pairs(pieces)).run()
    plan.fill()
    assert_same(model, loaded(tensors, **how))
    assert plan.mismatched(pieces) == []
    tensors["k"][2, 1] += 1
    assert plan.mismatched(pieces) == ["k"]


@pytest.mark.parametrize("how", [{}, {"parallel": 2, "rank": 0}, {"parallel": 2, "rank": 1}])
@pytest.mark.parametrize("limit", [16, 40, 64, 1 << 20])
def test_pieces_in_buckets_land_where_the_whole_would(how, limit):
    tensors, model = weights(), Model(**how)
    plan = recorded(model, tensors)
    assert plan.splittable() == set(tensors)
    staging = Staging(limit, EngineTensorInfo({"norm": torch.bfloat16}, plan.splittable()))
    parts = 0
    for part in streamed(specs(tensors), iter(tensors.items()), staging, torch.device("cpu")):
        assert part.number == parts
        parts += 1
        assert sum(p.tensor.nbytes for p in part.pieces) <= max(limit, 16)
        Copier(*plan.pairs(part.pieces)).run()
    assert part.last and (parts > 1) == (limit < 1 << 20)
    plan.fill()
    assert_same(model, loaded(tensors, **how))


def test_what_cannot_be_split_gets_a_bucket_of_its_own():
    f32 = torch.float32
    found = buckets([("a", f32, (4,), 2), ("b", f32, (4,), 8), ("c", f32, (), 3)], 48, {"a", "c"})
    assert [[(s.name, s.first, s.rows) for s in b.slots] for b in found] == [
        [("a", 0, 2)],
        [("b", 0, 8)],
        [("c", 0, 3)],
    ]
    assert found[1].nbytes == 128


def test_names_and_shapes_that_do_not_fit_are_listed_and_nothing_is_written():
    tensors = weights() | {"extra": torch.zeros(2), "skipped": torch.zeros(3)}
    tensors["norm"] = torch.zeros(D + 1)
    model = Model()
    with pytest.raises(ValueError) as error:
        recorded(model, tensors)
    text = str(error.value)
    assert "extra (2,)" in text and "norm (5,): norm has another shape" in text
    assert "skipped (3,): nothing in the engine takes it" in text
    assert (model.embed == 9).all()
    del tensors["extra"], tensors["norm"], tensors["q"]
    with pytest.raises(ValueError) as error:
        recorded(model, tensors)
    assert "skipped (3,): nothing in the engine takes it" in str(error.value)
    assert "norm (4,): the trainer has nothing for this parameter" in str(error.value)


def loader(change):
    """A model whose loader does something else with one tensor."""

    class Changed(Model):
        def load_weights(self, weights):
            for name, tensor in weights:
                if not change(self, name, tensor):
                    super().load_weights([(name, tensor)])

    return Changed()


@pytest.mark.parametrize(
    ("change", "obstacle"),
    [
        (lambda m, n, t: n == "norm" and m.norm.data.copy_(t + 1) is not None, "computed"),
        (lambda m, n, t: n == "norm" and m.norm.data.add_(t) is not None, "add_"),
    ],
)
def test_what_is_not_a_copy_is_an_obstacle(change, obstacle):
    plan = recorded(loader(change), weights())
    assert not plan.usable
    assert obstacle in " ".join(plan.unsupported_reasons)


@pytest.mark.parametrize(
    ("change", "left"),
    [
        (lambda m, n, t: n == "embed" and m.embed.data[:6].copy_(t) is not None, "8 of the 32 "),
        (lambda m, n, t: n == "out" and m.out.data[:, :2].copy_(t[:, :2]) is not None, "8 of the"),
    ],
)
def test_elements_that_nothing_is_written_to_are_refused(change, left):
    with pytest.raises(ValueError, match=f"{left}.*elements of (embed|out) aren't loaded") as error:
        recorded(loader(lambda m, n, t: change(m, n, t) or _computed(m, n, t)), weights())
    assert "norm" not in str(error.value)


def _computed(model, name, tensor):
    """An obstacle to a plan, whatever else is wrong."""
    return name == "norm" and model.norm.data.copy_(tensor + 1) is not None


def test_beside_an_obstacle_nothing_is_left_out_unseen():
    """A plan that isn't used has told what the loader skips all the same."""
    given = weights() | {"skipped": torch.zeros(3)}
    with pytest.raises(ValueError, match=r"skipped \(3,\): nothing in the engine takes it"):
        recorded(loader(_computed), given)
    with pytest.raises(ValueError, match=r"out \(4, 4\): the trainer has nothing for this"):
        recorded(loader(_computed), {n: t for n, t in weights().items() if n != "out"})


def test_a_tensor_that_is_looked_at_and_dropped_is_not_taken():
    """As by a loader that casts and slices all it is given, and then looks for its place."""

    def drops(model, name, tensor):
        return name == "skipped" and tensor.narrow(0, 0, 2).double().mul(2) is not None

    with pytest.raises(ValueError, match=r"skipped \(3,\): nothing in the engine takes it"):
        recorded(loader(drops), weights() | {"skipped": torch.zeros(3)})


def test_a_loader_that_keeps_tensors_for_later_is_followed():
    """Each is told from the others after they have all come, and what is made of them too."""

    class Later(Model):
        def load_weights(self, weights):
            kept = dict(weights)
            kept["norm"] = kept["norm"].float() * 2
            super().load_weights(kept.items())

    plan = recorded(Later(), weights())
    assert set(plan.copies) == set(weights()) - {"norm"}
    assert plan.unsupported_reasons == ["what becomes of norm is computed while it is loaded"]


def test_what_a_plan_that_is_not_used_can_still_compare():
    tensors, model = weights(), loader(_computed)
    plan = record(model, specs(tensors), tensors.items(), write=True)
    pieces = [Piece(name, 0, t) for name, t in tensors.items()]
    assert {p.name for p in plan.comparable(pieces, model)} == set(tensors) - {"norm"}
    model.out.data = model.out.data.t().contiguous()  # as vLLM does when it repacks a layer
    pieces = plan.comparable(pieces, model)
    assert {p.name for p in pieces} == set(tensors) - {"norm", "out"}
    assert plan.mismatched(pieces) == []
    tensors["k"][2, 1] += 1
    assert plan.mismatched(pieces) == ["k"]


def test_padding_that_vllm_knows_of_is_zero_and_no_error():
    model = loader(lambda m, n, t: n == "embed" and m.embed.data[:6].copy_(t) is not None)
    model.embed.weight_loader_numel = 24
    tensors = weights()
    plan = record(model, specs(tensors), tensors.items(), write=True)
    assert plan.unsupported_reasons == ["8 of the 32 elements of embed aren't loaded"]
    assert (model.embed[6:] == 0).all()


CONFIG = object()  # vLLM's


def _reloaded(model, tensors, cut=None):
    """What `reload.part` does in a worker, in one part or in two."""
    from rollout_server.worker import reload

    pieces = [Piece(name, 0, t) for name, t in tensors.items()]
    worker = SimpleNamespace(get_model=lambda: model, vllm_config=CONFIG)
    with torch.no_grad():
        if cut is None:
            return reload.part(worker, pieces, True, True, layerwise=False)
        reload.part(worker, pieces[:cut], True, False, layerwise=False)
        reload.part(worker, pieces[cut:], False, True, layerwise=False)


def test_a_reload_has_the_engines_config():
    """Layers look it up when what they were loaded with is processed."""
    from vllm.config import get_current_vllm_config

    seen, tensors = [], weights()
    model = loader(_computed)
    model.rollout_plan = record(model, specs(tensors), tensors.items(), write=True)
    load = model.load_weights

    def loading(weights):
        seen.append(get_current_vllm_config())
        return load(weights)

    model.load_weights = loading
    _reloaded(model, tensors)
    assert seen == [CONFIG]


@pytest.mark.parametrize("cut", [None, 2])
def test_a_reload_that_leaves_something_out_names_it(cut):
    """What vLLM's loader skips later on would go on with the numbers that were there."""
    tensors, model = weights(), loader(_computed)
    model.rollout_plan = record(model, specs(tensors), tensors.items(), write=True)
    _reloaded(model, tensors, cut)
    assert torch.equal(model.embed[:6], tensors["embed"])
    with pytest.raises(RuntimeError, match=r"left out 16 of the 48 elements of qkv; out \(4, 4\)"):
        _reloaded(model, {n: t for n, t in tensors.items() if n not in ("v", "out")}, cut)


@pytest.mark.parametrize(
    "dtype", [torch.float8_e4m3fn, torch.float16, torch.bfloat16, torch.float32, torch.int8]
)
def test_marks_tell_what_was_written(dtype):
    model = torch.nn.Module()
    model.weight = torch.nn.Parameter(torch.zeros(4, 6).to(dtype), requires_grad=False)
    mark(model)
    assert marked(model) == ["weight (4, 6)"]
    model.weight.data[:2] = torch.zeros(2, 6).to(dtype)
    partly = ["12 of the 24 elements of weight"] if dtype.is_floating_point else []
    assert marked(model) == partly
    model.weight.data[2:] = torch.zeros(2, 6).to(dtype)
    assert marked(model) == []


def test_a_parameter_that_got_other_memory_makes_the_plan_stale():
    model = Model()
    plan = recorded(model, weights())
    assert plan.stale(model) == []
    model.out.data = model.out.data.clone()
    assert plan.stale(model) == ["out"]


def test_a_transposed_place_is_copied_right_and_cannot_be_split():
    class Turned(Model):
        def load_weights(self, weights):
            for name, tensor in weights:
                if name == "out":
                    self.out.data.copy_(tensor.t())
                else:
                    super().load_weights([(name, tensor)])

    tensors, model = weights(), Turned()
    plan = recorded(model, tensors)
    assert "out" not in plan.splittable()
    Copier(*plan.pairs([Piece(n, 0, t) for n, t in tensors.items()])).run()
    assert torch.equal(model.out, tensors["out"].t())
    with pytest.raises(ValueError, match="pieces"):
        plan.pairs([Piece("out", 0, tensors["out"][:2])])


def test_copies_in_several_threads_are_whole():
    to = [torch.zeros(n) for n in (3, 5_000_000, 1, 2_000_001)] + [torch.zeros(8, 8)[:, ::2]]
    sources = [torch.randn(t.shape) for t in to]
    Copier(to, sources).run()
    for mine, theirs in zip(to, sources, strict=True):
        assert torch.equal(mine, theirs)
