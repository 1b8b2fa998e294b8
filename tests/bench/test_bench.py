from __future__ import annotations

import csv
import gc
import json
import math
import multiprocessing
import os
import runpy
import signal
import sys
import time
import weakref
from collections.abc import Callable
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tables import table
from torch._dynamo.testing import CompileCounter
from torch.utils.flop_counter import FlopCounterMode

from bench import loss, records, step
from bench.__main__ import BENCHES, listed, main
from bench.captions import captions, lengths
from bench.case import Case, Cases, Provider, Unavailable, errors, objection
from bench.eval import every_other, protocol_case
from bench.limits import Limits
from bench.measure import MOST, largest, measure, most_in_use, peak_bytes, spread
from bench.peers import autocast, float32, of_pairs, one_matrix, two_matrices
from bench.published_step import text_tower, trimmed
from bench.run import Effort, Gate, run
from bench.text import text_case
from fastbd.base.dist import World
from fastbd.base.learning_rates import learning_rates
from fastbd.data.beton import BetonWriter
from fastbd.evals.classifier import Classifier
from fastbd.kernels.text_pack import lengths_of, pack, room_for
from fastbd.methods.method import Method
from fastbd.methods.objectives import Objective
from fastbd.models import create
from fastbd.training.optim import make_optimizer
from fastbd.training.roofline import Rates, step_seconds, text_ops
from fastbd.training.step import Step

LIMITS = Limits("cpu", {"fp32": 1e9, "bf16": 1e9, "fp64": 1e9}, 1e9)


@pytest.fixture(autouse=True)
def _little_to_collect():
    """A bench collects what each provider leaves: that takes long among all that the tests have loaded."""
    gc.freeze()
    yield
    gc.unfreeze()


def bench(monkeypatch, *words) -> int:
    """Exit code of `python -m bench`, run within this process as on a machine without a GPU."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["bench", *map(str, words)])
    monkeypatch.delitem(sys.modules, "bench.__main__")  # it is loaded anew
    with pytest.raises(SystemExit) as ended:
        runpy.run_module("bench", run_name="__main__", alter_sys=True)
    return ended.value.code


def test_calls_are_timed_in_turn_after_a_warm_up():
    called, ticks = [], []

    def clock(call) -> float:
        call()
        ticks.append(called[-1])
        return {"a": 1.0, "b": 3.0}[called[-1]]

    times = measure({"a": lambda: called.append("a"), "b": lambda: called.append("b")}, clock, seconds=0, least=3)
    assert ticks == ["a", "b"] * 3 and called == ["a", "b"] + ticks
    assert (times["a"].median, times["b"].median) == (1.0, 3.0)
    measure({"a": lambda: called.append("a")}, clock, seconds=20, least=3)
    assert len(ticks) == 2 * 3 + 20


def test_quantiles_of_values_done_by_hand():
    times = spread([5.0, 1.0, 2.0, 4.0, 3.0, 6.0])
    assert (times.median, times.low, times.high) == (3.5, 2.0, 5.0)


def test_peak_bytes_of_a_call_done_by_hand():
    def call():
        a = torch.empty(1_000_000)
        b = torch.empty(500_000)
        del a
        c = torch.empty(250_000)
        return b, c

    assert peak_bytes(call, "cpu") == 6_000_000
    assert peak_bytes(call, "cpu") == 6_000_000


def test_what_was_there_before_is_no_release_of_the_call():
    events = [(3, 8, 100), (1, 7, -50), (2, 9, 10), (4, 9, -10), (5, 6, 20)]  # time, address, bytes
    assert most_in_use([{"ts": ts, "args": {"Addr": addr, "Bytes": size}} for ts, addr, size in events]) == 120


def work(value: float, calls: list | None = None, **about) -> Provider:
    def call():
        if calls is not None:
            calls.append(value)
        return {"x": torch.full((4,), value)}

    return Provider(lambda: call, {"": 1e-3}, **{"ours": True, "memory": "", **about})  # a profiler takes a second


def missing(error: Exception, ours: bool = True) -> Provider:
    def build():
        raise error

    return Provider(build, {"": 1e-3}, ours=ours)


def test_the_gate_times_no_provider_that_is_wrong_or_missing():
    calls = []
    providers = {
        "right": work(1.0001),
        "wrong": work(1.1, calls),
        "nan": work(math.nan),
        "absent": missing(Unavailable("needs a GPU")),
        "no package": missing(ImportError("No module named 'x'")),
        "huge": missing(torch.OutOfMemoryError("tried to allocate")),
        "broken peer": missing(RuntimeError("no compiler\nmore"), ours=False),
        "broken": missing(RuntimeError("no such kernel")),
    }
    case = Case("sum", "x/s", 4, "cpu", providers, truth=lambda: {"x": torch.ones(4, dtype=torch.float64)}, flops=1e6)
    results = {result.provider: result for result in run(case, LIMITS, Effort())}
    row = results["right"].row
    assert [name for name, result in results.items() if result.row] == ["right"] and calls == [1.1]
    assert row["limit_share"] == pytest.approx(1e-3 / row["seconds"]) and row["error"] == pytest.approx(1e-4, rel=1e-3)
    refused = {name: result.refused for name, result in results.items() if result.refused}
    assert set(refused) == {"wrong", "nan", "broken"} and refused["broken"] == "RuntimeError: no such kernel"
    assert refused["wrong"] == "x is off by 1.0e-01; 1e-03 is allowed" and "no such kernel" in results["broken"].trace
    assert {name: result.skipped for name, result in results.items() if result.skipped} == {
        "absent": "needs a GPU",
        "no package": "ImportError: No module named 'x'",
        "huge": "does not fit in memory",
        "broken peer": "RuntimeError: no compiler",
    }


def rows(case: Case, **effort) -> list[dict]:
    return [result.row for result in run(case, LIMITS, Effort(**effort)) if result.row]


def test_without_a_truth_the_first_provider_is_it():
    case = Case("sum", "x/s", 4, "cpu", {"first": work(2.0), "second": work(2.5), "third": work(2.0)})
    found = rows(case)
    assert [row["provider"] for row in found] == ["first", "third"]
    assert found[0]["ratio"] == 1 and found[0]["limit_share"] is None
    slow = Case("sum", "x/s", 4, "cpu", {"first": work(2.0)}, truth=missing(AssertionError()).build, truth_flops=1e12)
    assert len(rows(slow)) == 1  # float64 would take 1000 s here


def test_a_ratio_is_of_times_taken_in_turns(monkeypatch):
    """On a machine that becomes twice as slow with each provider; `broken` fails, so the next one is the baseline."""
    called, speed = [], {"a": 1.0, "b": 2.0, "c": 4.0}
    built = []

    def provider(name: str) -> Provider:
        def build():
            built.append(name)
            return lambda: called.append(name) or {"x": torch.ones(4)}

        return Provider(build, {"": 0.0})

    def clock(call) -> float:
        call()
        return 2 ** len(built) / speed[called[-1]]

    monkeypatch.setattr("bench.run.clock_of", lambda device: clock)
    providers = {"broken": missing(Unavailable("needs a GPU")), **{name: provider(name) for name in speed}}
    found = rows(Case("sum", "x/s", 4, "cpu", providers))
    assert [row["seconds"] for row in found] == [2, 2, 2] and [row["ratio"] for row in found] == [1, 2, 4]
    assert {row["baseline"] for row in found} == {"a"}


def test_only_the_first_provider_stays_in_memory():
    alive, most = weakref.WeakSet(), []

    class Held(torch.Tensor):
        pass

    def build():
        held = torch.ones(4).as_subclass(Held)
        alive.add(held)
        most.append(len(alive))
        return lambda: {"x": held.as_subclass(torch.Tensor)}

    rows(Case("sum", "x/s", 4, "cpu", dict.fromkeys("abcd", Provider(build, {"": 0.0}))))
    assert most == [1, 2, 2, 2]


def test_what_a_provider_takes_to_build_is_until_its_first_call_is_done(monkeypatch):
    """The first call compiles; what is compared is no time of the provider's."""
    now = [0.0]

    def passes(seconds: float, value=None):
        now[0] += seconds
        return value

    calls = iter([5.0, 2.0, 2.0, 2.0, 2.0])
    provider = Provider(
        lambda: passes(10.0) or (lambda: passes(next(calls), {"x": torch.ones(2, 4)})),
        {"": 0.0},
        memory="",
        compared=lambda output: passes(100.0, {"x": output["x"][0]}),
    )

    def clock(call) -> float:
        began = now[0]
        call()
        return now[0] - began

    monkeypatch.setattr("bench.run.time", SimpleNamespace(perf_counter=lambda: now[0]))
    monkeypatch.setattr("bench.run.clock_of", lambda device: clock)
    (row,) = rows(Case("sum", "x/s", 4, "cpu", {"a": provider}, truth=lambda: {"x": torch.ones(4)}))
    assert row["build_seconds"] == 15.0 and row["seconds"] == 2.0 and row["peak_bytes"] is None


def test_the_largest_operations_of_a_call():
    a, b = torch.randn(600, 600), torch.randn(10)
    found = largest(lambda: (a @ a, b + 1, b + 1), "cpu", 5)
    assert found[0].name == "aten::mm" and found[0].share > 0.5 and 0 < found[0].seconds < 10
    assert {share.name: share.count for share in found}["aten::add"] == 2 and len(found) <= 5
    assert sum(share.share for share in found) <= 1 + 1e-9


def gated(case: Case, names=None) -> tuple[dict, dict]:
    """The calls that pass the gate, and why the others do not."""
    gate, calls, reasons = Gate(case, LIMITS), {}, {}
    for name in names or case.providers:
        try:
            calls[name] = gate.build(name).call
        except (Unavailable, ImportError) as error:
            reasons[name] = str(error)
    return calls, reasons


def step_sizes(device: str, quick: bool) -> list[step.Size]:
    return [step.Size("tiny-rn", 16, objective, "fp32") for objective in step.OBJECTIVES]


# Of each bench on a CPU: less work than with --quick, of all its kinds.
SMALL = {
    "step": {"bench.step.sizes": step_sizes},
    "text": {"bench.text.LARGE": {"cpu": ("tiny-vit", 8, "fp32")}},
    "eval": {"bench.eval.IMAGES": {True: 30}, "bench.published_eval.BATCH": 20, "bench.eval.TEMPLATES": "eurosat"},
    "augment": {"bench.augment.SIZE": 64},
    "data": {"bench.data.IMAGES": {"cpu": {True: 72}}, "bench.data.BATCH": 36, "bench.data.SIZE": 64},
}


def small_cases(name: str, monkeypatch) -> Cases:
    for target, value in SMALL[name].items():
        monkeypatch.setattr(target, value)
    return import_module(f"bench.{name}").cases("cpu", quick=True)


@pytest.mark.parametrize("name", SMALL)
def test_the_ways_of_a_bench_do_the_same(name, monkeypatch):
    """Refused raises here. Packages may not be installed, and nothing is compiled for --quick on a CPU."""
    for case_name, build in small_cases(name, monkeypatch):
        case = build()
        names = [way for way, provider in case.providers.items() if not provider.slow and not is_ffcvs(way)]
        calls, skipped = gated(case, names)
        assert case.name == case_name and len(calls) >= 2
        assert all("dali" in way or "GPU" in why for way, why in skipped.items())


def is_ffcvs(way: str) -> bool:
    return "ffcv" in way.lower()


@pytest.mark.full
@pytest.mark.skipif(not find_spec("ffcv"), reason="FFCV is not installed")
def test_ffcvs_ways_do_the_same(monkeypatch):
    """numba compiles them, for longer than all else takes. The pixels of its own loader are not compared."""
    own = "FFCV, random crop"
    for _, build in small_cases("data", monkeypatch):
        case = build()
        first, *others = case.providers
        names = [first, *filter(is_ffcvs, others)]
        calls, _ = gated(case, names)
        assert list(calls) == names and len(calls) >= 2
        views = calls[own]()["view 0"] if own in calls else torch.full((36, 3, 64, 64), 100.0)
        assert views.shape == (36, 3, 64, 64) and views.dtype == torch.float32 and 50 < views.mean() < 200


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("name", BENCHES)
def test_names_of_cases_cost_no_data(name, device, monkeypatch):
    """They are told apart, and are there before anything is made, for a GPU on a machine without one too."""
    monkeypatch.setattr(torch, "randn", None)
    monkeypatch.setattr(BetonWriter, "__init__", None)
    for quick in (True, False):
        began = time.process_time()
        names = [case_name for case_name, _ in import_module(BENCHES[name]).cases(device, quick)]
        assert names and len(set(names)) == len(names) and time.process_time() - began < 1


def test_captions_are_as_long_as_those_of_cc3m():
    """Of the real ones the longest of 128 has 32.1 tokens on average."""
    all_lengths = lengths()
    assert all_lengths.mean() == pytest.approx(12.64, abs=0.005)
    assert np.quantile(all_lengths, [0, 0.5, 0.95, 0.99, 1]).tolist() == [5, 11, 22, 30, 48]
    batches = np.random.default_rng(0).choice(all_lengths, (5000, 128))
    assert batches.max(1).mean() == pytest.approx(32.1, abs=0.5)
    tokens = captions(200, seed=1)
    for caption, length in zip(tokens, lengths_of(tokens), strict=True):
        assert caption[0] == 49_406 and caption[length - 1] == 49_407 and not caption[length:].any()
        assert 5 <= length <= 48 and caption[1 : length - 1].min() > 0 and caption[1 : length - 1].max() < 49_406
    assert np.array_equal(tokens, captions(200, seed=1)) and not np.array_equal(tokens, captions(200, seed=2))


def test_hardly_any_batch_needs_more_room():
    taken = np.random.default_rng(0).choice(lengths(), (10_000, 128)).sum(1)
    assert taken.max() <= room_for(lengths(), 128) <= 1.22 * taken.mean() and room_for(lengths(), 128) % 64 == 0


def linear_flops(call) -> int:
    """FLOPs of its matrix products, forward and backward, without attention's."""
    with FlopCounterMode(display=False) as counter:
        call().sum().backward()
    flops = counter.get_flop_counts()["Global"]
    return sum(flops.get(op, 0) for op in (torch.ops.aten.mm, torch.ops.aten.addmm))


def test_tokens_and_flops_of_padded_trimmed_and_packed_captions():
    """Of the demo's text tower: 2 layers of width 64, embeddings of 128."""
    model, tokens = create("demo", 0), captions(128, seed=0)
    padded, seen = torch.from_numpy(tokens), []
    model.transformer.resblocks[1].mlp.c_fc.register_forward_hook(lambda _, x, y: seen.append(y.numel() // 256))
    ways = [
        (77 * 128, lambda: text_tower(model, padded)),
        (-(-lengths_of(tokens).max() // 8) * 8 * 128, lambda: text_tower(model, trimmed(padded)[0])),
        (lengths_of(tokens).sum(), lambda: model.encode_text(pack(tokens))),
        (room_for(lengths(), 128), lambda: model.encode_text(pack(tokens, room_for(lengths(), 128)))),
    ]
    for rows, embed in ways:
        linear = 2 * (3 + 1 + 4 + 4) * 64 * 64 * rows + 64 * 128 * 128
        assert linear_flops(embed) == 3 * 2 * linear
    assert seen == [rows for rows, _ in ways]
    assert seen[0] / seen[2] > 5.5


def our_step(name: str, objective: Objective) -> Step:
    """As the trainer makes it, in float32 on the CPU."""
    model = create(name, 0).to(memory_format=torch.channels_last).train()
    optimizer = make_optimizer(model, lr=1e-3, weight_decay=0.1, betas=(0.9, 0.999), eps=1e-8)
    rates = learning_rates(1e-3, warmup=0, total=20)
    return Step(model, Method(objective), optimizer, rates, precision="fp32", world=World(0, 1, torch.device("cpu")))


@pytest.mark.parametrize("objective", table(step.OBJECTIVES, "mmcl_ssl"))
def test_batches_of_all_lengths_share_one_compilation(objective):
    torch._dynamo.reset()
    size, counter = step.Size("tiny-vit", 8, objective, "fp32"), CompileCounter()
    ours = our_step(size.model, step.OBJECTIVES[objective])
    ours.towers = torch.compile(ours.towers, backend=counter)
    taken = set()
    for fixed, compilations in ((True, 1), (False, 2)):  # one more for all lengths there are
        for seed in range(4):
            data = step.Data(step.made(size, 32, "cpu").images, [captions(8, 9 * seed + k) for k in range(size.views)])
            batch = step.our_batch(size, data, fixed)
            taken.add((fixed, len(batch.texts[0].tokens)))
            ours(batch)
        assert counter.frame_count == compilations
    assert len([of for of in taken if of[0]]) == 1 and len(taken) > 3


@pytest.mark.parametrize(("name", "objective"), [("tiny-rn", "mmcl_ssl"), ("tiny-vit", "mmcl")])
def test_the_eager_steps_of_a_gpus_case_do_the_same(name, objective):
    """In bf16, which a CPU computes too."""
    size = step.Size(name, 8, objective, "bf16")
    model, data = create(name, 0), step.made(size, 32, "cpu")
    found = step.providers(size, "cuda", model, data)
    eager = ["CleanCLIP", "open_clip", "fastbd"]
    calls, _ = gated(Case("", "", 8, "cpu", found), eager)
    assert list(calls) == eager
    slow = {way for way, provider in found.items() if provider.slow}
    variants = {f"fastbd, compiled, captured, {variant}" for variant in ("fused", "combo kernels")}
    assert slow == {"open_clip, step compiled", *variants}
    in_graphs = {way for way, provider in found.items() if provider.memory == "graph"}
    assert in_graphs == {"fastbd, compiled, captured", *variants}

    # The first one is timed with each of the others; a learning rate too few would end the process on a GPU.
    assert len(found) * (MOST + 10) < step.CALLS


def test_the_evaluations_of_a_gpus_case_do_the_same(monkeypatch):
    """In bf16, and not compiled. Each of ours builds its classifier, though the weights are the same."""
    built, build = [], Classifier.__call__
    monkeypatch.setattr(Classifier, "__call__", lambda self, tower: built.append(build(self, tower)) or built[-1])
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    monkeypatch.setattr("bench.eval.TEMPLATES", "demo")
    made = partial(protocol_case, "tiny", "tiny-rn", 200, every_other(50), "bf16", "cpu")
    assert list(made(False).providers) == ["fastbd, compiled"]
    case = made(True)
    gate = Gate(case, LIMITS)
    ready = {name: gate.build(name) for name in ("open_clip, arithmetic", "fastbd, compiled")}
    assert gate.found["fastbd, compiled"]["clean"] > 1e-4  # as a CPU's open_clip is in float32
    ready["fastbd, compiled"].call()
    assert len(built) == 2


def test_our_batch_is_the_peers_as_the_loader_would_make_it():
    size = step.Size("tiny-rn", 8, "mmcl_ssl", "fp32")
    data = step.made(size, 32, "cpu")
    batch = step.our_batch(size, data, fixed=True)
    for view, image in zip(batch.views, data.images, strict=True):
        assert torch.equal(view, image) and view.is_contiguous(memory_format=torch.channels_last)
        assert image.is_contiguous()
    (text,) = batch.texts
    assert len(text.tokens) == room_for(lengths(), 16) and len(text.starts) == 17
    second = text.tokens[text.starts[8] : text.starts[9]].numpy()
    assert np.array_equal(second, data.tokens[1][0, : len(second)]) and second[-1] == 49_407


def test_the_limit_of_work_of_many_parts_is_in_each_providers_own_arithmetic():
    limits = Limits("cpu", {"fp32": 2e9, "bf16": 8e9}, 3e9)
    case = Case("sum", "x/s", 1, "cpu", {}, least=lambda rates, name: len(name) * rates.matmul + rates.bandwidth)
    assert limits.seconds(case, work(1.0)) == 4 * 2e9 + 3e9
    assert limits.seconds(case, Provider(work, {}, rate="bf16")) == 4 * 8e9 + 3e9


def test_limits_of_the_step_and_of_the_text_tower():
    rates, size = Rates(1e11, 2e10), step.Size("tiny-rn", 8, "mmcl_ssl", "fp32")
    model, tokens = create("tiny-rn", 0), np.concatenate([captions(8, seed) for seed in (0, 1)])
    want = step_seconds(model, rates, batch=8, views=2, texts=2, tokens=lengths_of(tokens).mean(), precision="fp32")
    assert step.step_case(size, "cpu").least(rates, "fp32") == pytest.approx(want)
    ops = list(text_ops(model, lengths_of(tokens[:8]).mean()))
    want = 8 * sum(max(op.flops / 1e11, 2 * op.elements / 2e10) for op in ops)
    assert text_case("tiny", "tiny-rn", 8, "fp32", "cpu").least(rates, "bf16") == pytest.approx(want)


def test_errors_are_relative_and_a_rival_bounds_them():
    one = {"x": torch.tensor(3.0)}
    assert errors(one, {"x": torch.tensor(2.0)}, {}) == {"x": 0.5}
    assert errors(one, {"x": torch.tensor(2.0)}, {"x": 10.0}) == {"x": 0.1}
    with pytest.raises(ValueError, match="'x'.*'y'"):
        errors(one, {"y": torch.tensor(2.0)}, {})
    assert objection({"x": 0.4, "y": 0.1}, {"": 0.2, "x": 0.5}) == ""
    assert "more than the plain formula's 1.0e-01" in objection({"x": 0.3}, {"": 0.5}, {"x": 0.1})


@pytest.mark.parametrize("terms", loss.TOWERS)
def test_the_float64_truth_of_the_loss_is_what_autograd_gives(terms):
    towers, log_scale = loss.embeddings(loss.Size(13, 8, terms, "fp32"), "cpu")
    towers = {name: tower.detach().double().requires_grad_() for name, tower in towers.items()}
    unit = {name: F.normalize(tower, dim=-1) for name, tower in towers.items()}

    def rows(a: str, b: str):
        return F.cross_entropy(log_scale.double().exp() * unit[a] @ unit[b].T, torch.arange(13))

    value = (rows("image", "text") + rows("text", "image")) / 2
    if terms == "mmcl_ssl":
        value = value + (rows("image", "image_aug") + rows("text", "text_aug")) / 2
    value.backward()
    want = {"loss": value, "log_scale": log_scale.grad, **{name: tower.grad for name, tower in towers.items()}}
    assert max(errors(loss.truth(towers, log_scale), want, {}).values()) < 1e-6  # log_scale is a float32
    blocks = loss.pair_truth(unit["image"], unit["text"], log_scale.double().exp(), True, block=5)
    whole = loss.pair_truth(unit["image"], unit["text"], log_scale.double().exp(), True)
    assert all(torch.allclose(a, b, rtol=1e-12) for a, b in zip(blocks, whole, strict=True))


@pytest.mark.parametrize("terms", loss.TOWERS)
def test_the_peers_compute_the_loss(terms):
    towers, log_scale = loss.embeddings(loss.Size(96, 64, terms, "fp32"), "cpu")
    want = loss.truth(towers, log_scale)
    full, mixed = float32(two_matrices), autocast(two_matrices)
    for form, tolerance in ((full, "fp32"), (one_matrix, "fp32"), (mixed, "autocast")):
        found = errors(loss.gradients(form, towers, log_scale)(), want, {})
        assert objection(found, loss.TOLERANCE[tolerance]) == ""


@pytest.mark.skipif(not find_spec("triton"), reason="Triton is not installed")
@pytest.mark.skipif(torch.cuda.is_available(), reason="kernels are not interpreted: the bench compares them")
@pytest.mark.parametrize("name", ["fixed_maximum", "online_rows"])
def test_the_peers_in_triton_compute_the_loss(name, monkeypatch):
    module = import_module(f"bench.{name}")
    monkeypatch.setattr("bench.fixed_maximum.DTYPE", torch.float32)  # the interpreter multiplies no bf16
    towers, log_scale = loss.embeddings(loss.Size(150, 64, "mmcl_ssl", "fp32"), "cpu")
    found = errors(loss.gradients(of_pairs(module.pair_loss), towers, log_scale)(), loss.truth(towers, log_scale), {})
    assert max(found.values()) < 1e-5, found


def test_a_new_column_leaves_old_rows_whole(tmp_path):
    path = tmp_path / "results" / "cpu.csv"
    records.append(path, [{"provider": "a, b", "rate": 1}])
    records.append(path, [{"provider": "c", "rate": 2}])
    before = path.read_bytes()
    records.append(path, [])
    assert path.read_bytes() == before
    records.append(path, [{"error": 0.5, "provider": "d", "rate": 3}, {"provider": "e"}])
    records.append(path, [{"rate": 4, "provider": "f"}])
    with open(path, newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["provider", "rate", "error"]
    assert [tuple(row.values()) for row in rows] == [
        ("a, b", "1", ""),
        ("c", "2", ""),
        ("d", "3", "0.5"),
        ("e", "", ""),
        ("f", "4", ""),
    ]


def test_the_rows_in_the_repository_are_whole():
    for path in (records.RESULTS / "cpu.csv", *records.RESULTS.glob("gpu-*.csv")):
        with open(path, newline="") as file:
            for row in csv.DictReader(file):
                assert None not in row and None not in row.values()
                assert row["name"] and row["provider"] and float(row["rate"]) > 0 and row["date"] and row["torch"]


def test_the_command_ends_with_one_json_object(tmp_path, monkeypatch, capfd):
    sizes = [loss.Size(32, 64, terms, "fp32") for terms in loss.TOWERS]
    monkeypatch.setattr(loss, "sizes", lambda device, quick: sizes)
    words = ("--cases", "mmcl fp32", "--providers", "fastbd,open_clip form, autocast,CleanCLIP", "--kernels", 8)
    assert bench(monkeypatch, "loss", "--quick", *words, "--out", tmp_path) == 0
    said = capfd.readouterr().out.splitlines()
    result = json.loads(said[-1])
    assert not result["refused"] and not result["failed"]
    for row in result["rows"]:
        assert {"name", "provider", "rate", "unit", "ratio", "limit_share", "device"} <= set(row)
        assert row["rate"] > 0 and row["limit_share"] > 0 and row["peak_bytes"] > 0 and row["build_seconds"] > 0
        assert row["name"] == "loss B=32 D=64 mmcl fp32" and row["baseline"] == "open_clip form, autocast"
    ways = [row["provider"] for row in result["rows"]]
    assert ways == ["open_clip form, autocast", "fastbd auto", "fastbd reference", "CleanCLIP form, float32"]
    assert result["skipped"]["loss B=32 D=64 mmcl fp32: fastbd tile"] == "needs a GPU"
    assert "fastbd tile: skipped: needs a GPU" in said
    assert sum("aten::mm" in line for line in said) == len(ways)  # of each
    with open(tmp_path / "cpu.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(result["rows"]) and all(row["device"] and row["fp32_tflops"] for row in rows)


def sum_case(name: str, **providers: Provider) -> tuple[str, Callable[[], Case]]:
    return name, lambda: Case(name, "x/s", 4, "cpu", providers)


ABSENT, NO_GPU = missing(Unavailable("no such package")), missing(Unavailable("needs a GPU"))


def command(monkeypatch, capsys, tmp_path, cases, *words) -> tuple[int, dict, str]:
    """Exit code, JSON and error output of a command with one bench of its own, "sum", and one that is not there."""
    module = ModuleType("sum")
    module.cases = lambda device, quick: iter(cases)
    monkeypatch.setitem(sys.modules, "sum", module)
    monkeypatch.setattr("bench.__main__.BENCHES", {"sum": "sum", "gone": "bench.gone"})
    monkeypatch.setattr("bench.__main__.circumstances", lambda device: (LIMITS, {"device": "a CPU"}))
    code = main([*words, "--quick", "--out", str(tmp_path)])
    captured = capsys.readouterr()
    lines = captured.out.splitlines()
    return code, json.loads(lines[-1]) if lines else {}, captured.err


@pytest.mark.parametrize(
    "words, cases, code, rows, failed",
    [
        (["sum"], [sum_case("one", a=work(1.0), b=ABSENT)], 0, ["a"], []),
        (["sum"], [sum_case("one", a=ABSENT, b=NO_GPU)], 1, [], ["sum"]),
        (["sum"], [sum_case("one", a=ABSENT), sum_case("two", a=work(1.0))], 0, ["a"], []),
        (["sum"], [sum_case("one", a=work(1.0), b=work(2.0))], 1, ["a"], []),
        (["gone", "sum"], [sum_case("one", a=work(1.0))], 1, ["a"], ["gone"]),
        ([], [sum_case("one", a=work(1.0))], 1, ["a"], ["gone"]),
        (["sum"], [("one", lambda: 1 / 0), sum_case("two", a=work(1.0))], 1, ["a"], ["one"]),
        (["sum", "--seconds", "0"], [sum_case("one", a=work(1.0))], 1, [], ["sum"]),
        (["sum", "--cases", "tw"], [("one", lambda: 1 / 0), sum_case("two", a=work(1.0))], 0, ["a"], []),
        (["sum", "--providers", "b"], [sum_case("one", a=work(1.0), b=work(2.0))], 0, ["b"], []),
        (["sum", "--providers", "b"], [sum_case("one", b=work(1.0)), sum_case("two", a=ABSENT)], 0, ["b"], []),
        (["sum"], [sum_case("one", a=work(1.0), b=work(1.0, slow="slow"))], 0, ["a"], []),
        (["sum", "--providers", "a,b"], [sum_case("one", a=work(1.0), b=work(1.0, slow="slow"))], 0, ["a", "b"], []),
        (["sum", "--providers", "a,b"], [sum_case("one", a=work(1.0), bc=work(1.0, slow="slow"))], 0, ["a"], []),
        (["sum", "--providers", "a,c"], [sum_case("one", a=work(1.0), b=work(1.0))], 2, ["a"], []),
    ],
)
def test_exit_codes_and_what_is_measured(monkeypatch, capsys, tmp_path, words, cases, code, rows, failed):
    found, result, errors = command(monkeypatch, capsys, tmp_path, cases, *words)
    assert (found, [row["provider"] for row in result["rows"]], list(result["failed"])) == (code, rows, failed)
    assert errors == ("error: no provider c; there are a, b.\n" if code == 2 else "")


def test_an_unknown_name_is_answered_with_the_names_there_are(monkeypatch, capsys, tmp_path):
    assert main(["loss", "los"]) == 2
    captured = capsys.readouterr()
    assert captured.err == "error: no bench los; there are step, text, eval, loss, augment, data.\n"
    assert not captured.out
    cases = [("one", lambda: 1 / 0), ("two", lambda: 1 / 0)]
    words = "sum", "--cases", "two,three"
    assert command(monkeypatch, capsys, tmp_path, cases, *words) == (
        2,
        {},
        "error: no case three; there are one, two.\n",
    )


def test_names_with_commas_on_the_command_line():
    assert listed("open_clip, step compiled,fastbd,a") == ["open_clip, step compiled", "fastbd", "a"]


def test_a_run_that_is_killed_keeps_the_rows_before(monkeypatch, capfd, tmp_path):
    """It is at the fourth call of its third provider."""
    left = [3, 2, 1]

    def call():
        if not left:
            os.kill(os.getpid(), signal.SIGKILL)
        return {"x": torch.full((4,), float(left.pop() > 0))}

    killed = Provider(lambda: call, {"": 0.0}, memory="")
    cases = [sum_case("one", a=work(1.0), b=work(1.0), killed=killed, later=work(1.0))]
    words = monkeypatch, capfd, tmp_path, cases, "sum"
    process = multiprocessing.get_context("fork").Process(target=command, args=words)
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    with open(tmp_path / "cpu.csv", newline="") as file:
        assert [row["provider"] for row in csv.DictReader(file)] == ["a", "b"]
    assert [line.split()[0] for line in capfd.readouterr().out.splitlines()[-2:]] == ["a", "b"]
