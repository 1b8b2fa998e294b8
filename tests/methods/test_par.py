"""PAR: its loss and rates against the published formulas, what it compares with, and its variants."""

from __future__ import annotations

import json
import shutil
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from cleanings import cleaning, start
from steps import BATCH, ROOM, SHALLOW_RN, Waits, batch_of, captions_of, counting, make_step

from fastbd import cli
from fastbd.config.flags import CleanConfig, config_of
from fastbd.kernels.text_pack import pack
from fastbd.methods.method import Embedded
from fastbd.methods.par import Par, nearest_rotation
from fastbd.models.batchnorm import batch_norms
from fastbd.models.clip import CLIP, MODELS, ModelSpec, fresh

ROWS = np.arange(3, 3 + 2 * BATCH, 2)


@dataclass
class Around:
    """What a method can learn of a training, here of pairs with any captions."""

    model: CLIP
    rows: np.ndarray
    compiled: bool = False
    policies: tuple[str, ...] = ("light",)
    seed: int = 0
    device: torch.device = torch.device("cpu")
    precision: str = "fp32"

    @torch.no_grad()
    def embed_images(self, rows):
        return deepcopy(self.model).eval().encode_image(batch_of(1).views[0])

    @torch.no_grad()
    def embed_texts(self, rows):
        return deepcopy(self.model).eval().encode_text(pack(captions_of(100, 0)[rows]))


def poisoned_model(seed: int = 0, spec: ModelSpec = MODELS["tiny-rn"]) -> CLIP:
    """With statistics of batch norm that have something to say."""
    model = fresh(spec, seed).train()
    for at in range(3):
        model.encode_image(batch_of(1, at).views[0])
    return model


def method_of(model: CLIP, rows=ROWS, compiled: bool = False, **flags) -> Par:
    method = Par(config_of(CleanConfig, "par")(method="par", **flags))
    method.attach(Around(model, rows, compiled))
    return method


def embedded_of(seed: int = 0) -> Embedded:
    """Any embeddings of the pairs ROWS, in another order."""
    noise = torch.Generator().manual_seed(seed)
    images, texts = (torch.randn(BATCH, 32, generator=noise).requires_grad_() for _ in range(2))
    rows = torch.from_numpy(ROWS)[torch.randperm(BATCH, generator=noise)]
    return Embedded([images], [texts], torch.tensor(3.0, requires_grad=True), rows, batch_of(1, seed).views)


def targets_of(model: CLIP, embedded: Embedded) -> list[torch.Tensor]:
    """The poisoned model's embeddings of the same pairs, float64, normalised."""
    frozen = deepcopy(model).eval()
    with torch.no_grad():
        images = frozen.encode_image(embedded.views[0])
        texts = frozen.encode_text(pack(captions_of(100, 0)[embedded.rows.numpy()]))
    return [F.normalize(x.double()) for x in (images, texts)]


def distances(embedded: Embedded, targets, rotated: bool = False) -> list[torch.Tensor]:
    ours = [F.normalize(x.double()) for x in (*embedded.images, *embedded.texts)]
    if rotated:
        u, _, vh = torch.linalg.svd(torch.cat(ours).T @ torch.cat(targets))
        ours = [x @ u @ vh for x in ours]
    return [((x - y) ** 2).sum(1) for x, y in zip(ours, targets, strict=True)]


def formula(embedded: Embedded, each: list[torch.Tensor], tau: float, gate: str) -> torch.Tensor:
    """CLIP's loss minus half of the gated distances, as in the released program (losses.py)."""
    logits = (
        embedded.log_scale.double().exp()
        * F.normalize(embedded.images[0].double())
        @ F.normalize(embedded.texts[0].double()).T
    )
    truth = torch.arange(BATCH)
    loss = (F.cross_entropy(logits, truth) + F.cross_entropy(logits.T, truth)) / 2
    for distance in each:
        if gate == "sample":
            loss = loss - distance[distance <= tau].sum() / BATCH / 2
        elif distance.mean() <= tau:
            loss = loss - distance.mean() / 2
    return loss


@pytest.mark.parametrize("gate", ["batch", "sample"])
@pytest.mark.parametrize(("distance", "opened"), [("plain", 0), ("plain", 1), ("plain", 2), ("rotation", 2)])
def test_loss_and_gradients_are_the_formulas(distance, opened, gate):
    """With none, one or both of the gates open. The formula differentiates through the rotation, too."""
    model, embedded = poisoned_model(), embedded_of()
    each = distances(embedded, targets_of(model, embedded), distance == "rotation")
    low, high = sorted(x.mean().item() for x in each)
    tau = (0.0, (low + high) / 2, 4.0)[opened]
    leaves = [*embedded.images, *embedded.texts, embedded.log_scale]
    expected = formula(embedded, each, tau, gate)
    loss, parts = method_of(model, gate=gate, distance=distance, tau=tau)(embedded)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    for name, mine in zip(("image", "text"), each, strict=True):
        assert parts[f"distance_{name}"].item() == pytest.approx(mine.mean().item(), rel=1e-5)
    found, truth = (torch.autograd.grad(x, leaves) for x in (loss, expected))
    torch.testing.assert_close(found, truth, rtol=1e-4, atol=1e-6)


def test_the_rotation_is_that_of_the_svd_and_a_rotated_model_has_not_moved():
    noise = torch.Generator().manual_seed(1)
    for rows, dim in ((64, 24), (24, 64)):  # without full rank, the rows are all there is to rotate
        x, y, turn = (torch.randn(n, dim, generator=noise) for n in (rows, rows, dim))
        turn = torch.linalg.qr(turn).Q
        u, _, vh = torch.linalg.svd(x.double().T @ y.double(), full_matrices=False)
        rank = min(rows, dim)
        expected = x.double() @ u[:, :rank] @ vh[:rank]
        torch.testing.assert_close(x @ nearest_rotation(x.T @ y), expected.float(), rtol=0, atol=1e-3)
        assert (x @ nearest_rotation(x.T @ (x @ turn)) - x @ turn).abs().max() < 1e-3
    assert nearest_rotation(torch.zeros(3, 3)).abs().max() == 0


@pytest.mark.parametrize("distance", ["plain", "rotation"])
def test_a_model_that_only_turned_both_its_towers(distance):
    model, embedded = poisoned_model(), embedded_of()
    turn = torch.linalg.qr(torch.randn(32, 32, generator=torch.Generator().manual_seed(3))).Q
    images, texts = (x.float() @ turn for x in targets_of(model, embedded))
    _, parts = method_of(model, distance=distance)(embedded._replace(images=[images], texts=[texts]))
    for name in ("image", "text"):
        assert parts[f"distance_{name}"].item() == pytest.approx(0, abs=1e-4) or distance == "plain"
        assert parts[f"distance_{name}"] > 1 or distance == "rotation"


def test_rates_are_the_published_table():
    """Two epochs of 5 steps: a table of 12. Fallen to the peak in the first 6, then a cosine cut short by 2."""
    rates = Par(config_of(CleanConfig, "par")(method="par", epochs=2)).rates(1e-3, warmup=7, total=10).tolist()
    cosine = [1, (2 + 3**0.5) / 4, 0.75, 0.5]
    assert rates == pytest.approx([1e-3 * x for x in (10, 8.2, 6.4, 4.6, 2.8, 1, *cosine)], rel=1e-5)
    long = Par(config_of(CleanConfig, "par")(method="par", epochs=10)).rates(3e-6, warmup=0, total=9760)
    assert long[0] == pytest.approx(3e-5) and long[4885] == pytest.approx(3e-6) and len(long) == 9760
    assert long[-1] == pytest.approx(1e-9, abs=1e-10)


@pytest.mark.parametrize("frozen", [True, False])
def test_a_step_begins_where_the_poisoned_model_is_and_moves_away(frozen):
    model = poisoned_model()
    method = method_of(model, frozen_norms=frozen, rows=np.arange(BATCH))
    before, statistics = deepcopy(model.state_dict()), batch_norms(model)[0].running_mean.clone()
    step = make_step(model, method)
    rows = [step(batch_of(1)) for _ in range(4)]
    image = [row["distance_image"].item() for row in rows]
    assert (image[0] < 1e-6) == frozen and image[-1] > image[0]
    assert torch.equal(batch_norms(model)[0].running_mean, statistics) == frozen
    assert torch.equal(model.logit_scale, before["logit_scale"])
    assert not method.state_dict() and not list(method.parameters())


@pytest.mark.parametrize("settings", [{"parts": 2}, {"compiled": True}])
def test_in_parts_or_compiled_it_trains_the_same(monkeypatch, settings):
    counter, states = counting(monkeypatch), []
    for given in ({}, settings):
        model = poisoned_model(spec=SHALLOW_RN)
        method = method_of(model, rows=np.arange(BATCH), compiled=given.get("compiled", False), train_scale=True)
        step = make_step(model, method, **given)
        losses = [step(batch_of(1, at, given.get("parts", 1), ROOM))["loss"].item() for at in range(3)]
        states.append((losses, model.state_dict()))
    assert counter.frame_count == (2 if "compiled" in settings else 0)  # the model, and the poisoned one
    assert states[0][0] == pytest.approx(states[1][0], rel=1e-4)
    torch.testing.assert_close(states[0][1], states[1][1], rtol=0, atol=1e-4)


@pytest.mark.parametrize("flags", [{}, {"distance": "rotation", "gate": "sample"}])
def test_nothing_in_a_step_waits_for_the_device(flags):
    model = poisoned_model()
    step = make_step(model, method_of(model, rows=np.arange(BATCH), **flags))
    step(batch_of(1))
    with Waits() as waits:
        step(batch_of(1, 1))
    assert waits.seen == []


def test_plain_views_are_embedded_once():
    model, embedded = poisoned_model(), embedded_of()
    method = Par(config_of(CleanConfig, "par")(method="par"))
    method.attach(Around(model, ROWS, policies=("plain",)))
    method.poisoned = None
    ordered = embedded._replace(rows=torch.from_numpy(ROWS))
    assert method(ordered)[0].item() == pytest.approx(method_of(model)(ordered)[0].item(), rel=1e-5)
    assert method(embedded)[0].item() != pytest.approx(method_of(model)(ordered)[0].item(), rel=1e-5)


def test_another_run_in_the_same_memory_compares_with_its_own_start():
    one, other, embedded = poisoned_model(), poisoned_model(seed=1), embedded_of()
    method = method_of(one, rows=ROWS + 40)
    places = [x.data_ptr() for x in (method.known, method.texts)]
    one.load_state_dict(other.state_dict())
    method.attach(Around(one, ROWS))
    assert [x.data_ptr() for x in (method.known, method.texts)] == places
    assert method(embedded)[0].item() == pytest.approx(method_of(other)(embedded)[0].item(), rel=1e-6)


def test_a_run_that_goes_on_still_compares_with_the_poisoned_model(study, monkeypatch, tmp_path):
    """In parts, too, which batch norm does not mind while it is frozen."""
    monkeypatch.chdir(study)
    start(study)
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    flags = ("--method", "par", "--frozen-norms", "--accumulate", 2, "--rows", 48, "--save-every", 1)
    cleaning(whole, *flags).train()
    shutil.copytree(whole, cut)
    shutil.copy(whole / "ckpt_epoch_001.pt", cut / "ckpt_last.pt")
    assert cli.main(["clean", "--resume", str(cut)]) == 0
    states = [torch.load(run / "ckpt_last.pt", weights_only=True)["model"] for run in (whole, cut)]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    rows = [[json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()] for run in (whole, cut)]
    distances = [[row["distance_image"] for row in of_run] for of_run in rows]
    assert len(distances[0]) == 4 and distances[0][0] < 1e-6 < distances[0][2] and distances[0] == distances[1]


def test_two_processes_have_the_gates_and_the_rotation_of_the_whole_batch(together):
    for output in together(Path(__file__).with_name("par_worker.py"), 2):
        assert output.count(" done") == 4, output


def test_the_published_presets():
    """The released script cleans in 2 epochs of 122 steps, its program's defaults in 10 of 976."""
    par, short = (cli.parse("clean", ["--preset", name]) for name in ("par", "par-2"))
    assert (par.method, par.lr, par.tau, par.views) == ("par", 3e-6, 2.15, "par")
    assert (par.weight_decay, par.beta1, par.beta2, par.frozen_norms, par.train_scale) == (1e-4, 0.9, 0.98, True, False)
    assert par.rows // par.batch_size == 976 and par.epochs == 10
    assert short == replace(par, preset="par-2", epochs=2, batch_size=2048) and short.rows // 2048 == 122
    other = cli.parse("clean", ["--preset", "par", "--method", "cleanclip"])
    assert other.views == "cleanclip" and other.weight_decay == 0.1
