"""The contrastive kernels against the formula in float64. Without a GPU the Triton ways run in the interpreter."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from tables import table
from torch.library import opcheck

from fastbd.kernels import contrastive_reference, contrastive_tile
from fastbd.kernels.contrastive import contrastive_loss, sigmoid_loss

pytestmark = pytest.mark.filterwarnings(
    "ignore:overflow encountered:RuntimeWarning"
)  # masked lanes, in the interpreter
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
WAYS = ["reference", "whole", "tile", "hybrid", "small"]
NAMES = ["image", "text", "image_aug", "text_aug"]


def embeddings(rows: int, dim: int, count: int = 4, dtype=torch.float32, seed: int = 0) -> dict[str, torch.Tensor]:
    """Pairs with something in common, a gap between the modalities, and lengths from 0.5 to 3.5 times the usual."""
    noise = torch.Generator().manual_seed(seed)
    shared, gaps = torch.randn(rows, dim, generator=noise), torch.randn(2, dim, generator=noise)
    towers = [shared + torch.randn(rows, dim, generator=noise) + gaps[t % 2] for t in range(count)]
    towers = [x * (0.5 + 3 * torch.rand(rows, 1, generator=noise)) for x in towers]
    return {name: x.to(DEVICE, dtype) for name, x in zip(NAMES, towers, strict=False)}


def formula(towers: dict, log_scale, mmcl=1.0, ssl=1.0, symmetric=False):
    """Verma et al., eq. 1 and 2, in the dtype of the arguments."""
    x = {name: F.normalize(t, dim=-1) for name, t in towers.items()}
    target = torch.arange(len(x["image"]), device=log_scale.device)

    def one(a, b):
        return F.cross_entropy(log_scale.exp() * x[a] @ x[b].T, target)

    loss = mmcl * (one("image", "text") + one("text", "image")) / 2
    halves = [name for name in ("image", "text") if f"{name}_aug" in x]
    for name in halves:
        aug = f"{name}_aug"
        half = (one(name, aug) + one(aug, name)) / 2 if symmetric else one(name, aug)
        loss = loss + ssl * half / len(halves)
    return loss


def with_gradients(function, towers: dict, scale: float, dtype, factor: float = 1.0):
    """-> loss, gradients by name, "scale" among them."""
    leaves = {name: x.detach().to(dtype).requires_grad_() for name, x in towers.items()}
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    log_scale = torch.tensor(math.log(scale), dtype=wide, device=DEVICE, requires_grad=True)
    loss = function(leaves, log_scale)
    (loss * factor).backward()
    return loss.item(), {name: x.grad.double() / factor for name, x in leaves.items()} | {
        "scale": log_scale.grad / factor
    }


def errors(towers: dict, scale: float, way: str, dtype=torch.float32, factor=1.0, **options) -> dict[str, float]:
    """Of loss and gradients against float64: relative, down to the noise floor of the arithmetic."""
    mmcl, ssl, symmetric = (options.get(f"{k}", d) for k, d in (("mmcl", 1.0), ("ssl", 1.0), ("symmetric", False)))
    truth, true = with_gradients(lambda x, s: formula(x, s, mmcl, ssl, symmetric), towers, scale, torch.float64)
    if way == "autocast":

        def ours(x, s):
            with torch.autocast(DEVICE, torch.bfloat16):
                return formula(x, s, mmcl, ssl, symmetric)
    else:

        def ours(x, s):
            return contrastive_loss(
                **x, log_scale=s, mmcl_weight=mmcl, ssl_weight=ssl, ssl_symmetric=symmetric, way=way
            )[0]

    loss, gradients = with_gradients(ours, towers, scale, dtype, factor)
    assert math.isfinite(loss)
    found = {"loss": abs(loss - truth) / max(1, abs(truth))}
    for name, gradient in true.items():
        # p - 1 cancels: below this share of s * weight / (sqrt(B) |x|) any fp32 gradient is noise
        floor = 1e-2 * scale
        if name != "scale":
            rows, length = len(towers[name]), towers[name].double().norm(dim=1).mean().item()
            floor = 1e-4 * scale * (mmcl + ssl) / math.sqrt(rows) / length
        found[name] = (gradients[name] - gradient).norm().item() / max(gradient.norm().item(), floor)
    return found


def check(towers, scale, way, loss=2e-5, gradient=None, **options):
    found = errors(towers, scale, way, **options)
    gradient = gradient or (5e-5 if scale < 90 else 2e-4)
    assert found.pop("loss") < loss and max(found.values()) < gradient, found


@pytest.mark.parametrize("scale", table([1.0, 100 / 7, 100.0], 100.0))
@pytest.mark.parametrize("rows, dim, count", table([(2, 32, 2), (33, 48, 4), (70, 40, 2)], (33, 48, 4)))
@pytest.mark.parametrize("way", WAYS)
def test_equals_the_formula(way, rows, dim, count, scale):
    check(embeddings(rows, dim, count), scale, way, mmcl=0.7, ssl=1.3)


@pytest.mark.parametrize("way", WAYS)
def test_every_choice_of_terms(way):
    towers = embeddings(37, 24)
    check(towers, 20.0, way, symmetric=True, mmcl=0.7, factor=8.0)
    check({name: towers[name] for name in ("image", "text", "text_aug")}, 20.0, way, ssl=0.3)
    check({name: towers[name] for name in ("image", "text", "image_aug")}, 20.0, way, symmetric=True)
    one, gradients = with_gradients(
        lambda x, s: contrastive_loss(**x, log_scale=s, mmcl_weight=0, way=way)[0], towers, 20.0, torch.float32
    )
    truth, true = with_gradients(lambda x, s: formula(x, s, mmcl=0), towers, 20.0, torch.float64)
    assert one == pytest.approx(truth, rel=2e-5)
    assert all((gradients[name] - true[name]).norm() < 5e-5 * true[name].norm() for name in true)


def test_parts_are_the_terms():
    towers, scale = embeddings(20, 16), torch.tensor(2.0, device=DEVICE)
    for way in WAYS:
        loss, parts = contrastive_loss(**towers, log_scale=scale, mmcl_weight=0.7, ssl_weight=1.3, way=way)
        assert set(parts) == {"mmcl", "ssl_image", "ssl_text"}
        whole = 0.7 * parts["mmcl"] + 1.3 * (parts["ssl_image"] + parts["ssl_text"]) / 2
        torch.testing.assert_close(whole, loss)
        two = {name: towers[name] for name in ("image", "text")}
        torch.testing.assert_close(parts["mmcl"], formula(two, scale))


@pytest.mark.parametrize("way", WAYS)
def test_one_row_has_loss_and_gradients_of_zero(way):
    loss, gradients = with_gradients(
        lambda x, s: contrastive_loss(**x, log_scale=s, way=way)[0], embeddings(1, 16), 14.0, torch.float32
    )
    assert loss == 0 and all(not g.any() for g in gradients.values())


@pytest.mark.parametrize("way", ["reference", "tile", "hybrid"])
@pytest.mark.parametrize("rows", table([16, 48], 48))
def test_blocks_that_do_not_divide(way, rows, monkeypatch):
    """Rows are worked off in blocks: here in several, the last one short."""
    monkeypatch.setattr(contrastive_reference, "ROWS", rows)
    monkeypatch.setattr(contrastive_tile, "WORKSPACE", rows * 70 * 4 * (1 if way == "hybrid" else 3))
    check(embeddings(70, 24), 100.0, way, ssl=1.3)


@pytest.mark.parametrize("rows", table([16, 48], 16))
def test_whole_matrices_agree_with_blocks(rows, monkeypatch):
    """Whether one exponential of a logit serves all, or each row and each column has its own."""
    towers = embeddings(70, 40)
    monkeypatch.setattr(contrastive_reference, "ROWS", rows)
    gradients = []
    for way, furthest in (("reference", 0.0), ("whole", math.inf), ("whole", -1.0)):
        monkeypatch.setattr(contrastive_reference, "RANGE", furthest)
        gradients.append(gradients_by(way, towers)[1])
    for name, expected in gradients[0].items():
        for found in gradients[1:]:
            assert (found[name] - expected).norm() < 1e-5 * expected.norm(), name


def gradients_by(way: str, towers: dict, scale: float = 30.0, factor: float = 1.0):
    dtype = towers["image"].dtype
    return with_gradients(lambda x, s: contrastive_loss(**x, log_scale=s, way=way)[0], towers, scale, dtype, factor)


@pytest.mark.skipif(DEVICE == "cuda", reason="what a CPU takes")
@pytest.mark.parametrize("count", [2, 4])
def test_a_cpu_takes_whole_matrices_up_to_the_size_of_two_gradients(count):
    for rows, way in ((32, "whole"), (33, "reference")):
        towers = embeddings(rows, 16, count)
        (_, found), (_, expected) = gradients_by("auto", towers), gradients_by(way, towers)
        assert all(torch.equal(found[name], expected[name]) for name in expected), rows
        with torch.no_grad():  # the gradients would be made in vain
            scale = torch.tensor(3.0)
            losses = [contrastive_loss(**towers, log_scale=scale, way=way)[0] for way in ("auto", "reference")]
        assert torch.equal(*losses)


def test_bf16_gradients_are_rounded_once():
    """Whatever the loss is multiplied by: two roundings would make an error of 2.3e-3."""
    towers = geometry("trained", 64, 128)
    found = errors(towers, 20.0, "whole", dtype=torch.bfloat16, factor=0.7)
    assert max(found.values()) < 2e-3, found


@pytest.mark.parametrize("way", WAYS)
def test_a_tiny_loss_is_right_relative_to_itself(way):
    """Nearly equal pairs: the loss is about 1e-10, where 1 - p would be nothing but rounding."""
    noise = torch.Generator().manual_seed(0)
    image = torch.randn(8, 64, generator=noise).to(DEVICE)
    towers = {"image": image, "text": image + 0.05 * torch.randn(8, 64, generator=noise).to(DEVICE)}
    truth, true = with_gradients(formula, towers, 30.0, torch.float64)
    loss, gradients = with_gradients(
        lambda x, s: contrastive_loss(**x, log_scale=s, way=way)[0], towers, 30.0, torch.float32
    )
    assert truth < 1e-8 and loss == pytest.approx(truth, rel=1e-3)
    assert gradients["scale"].item() == pytest.approx(true["scale"].item(), rel=1e-3)


@pytest.mark.parametrize("scale", table([50.0, 79.0, 100.0], 100.0))
@pytest.mark.parametrize("spread", table([0.05, 0.8], 0.05))
@pytest.mark.parametrize("way", WAYS)
def test_towers_that_point_apart(way, spread, scale):
    """Every cosine far below 0: a shift of the exponent that suits the largest possible logit would lose whole rows."""
    noise = torch.Generator().manual_seed(0)
    u = torch.randn(64, generator=noise)
    image, text = (sign * u + spread * torch.randn(24, 64, generator=noise) for sign in (1, -1))
    check({"image": image.to(DEVICE), "text": text.to(DEVICE)}, scale, way, gradient=2e-4)


@pytest.mark.parametrize("way", WAYS)
def test_one_column_that_dwarfs_the_others(way):
    """At scale 100 logits span 288 binary orders, more than fp32 has, in one tile."""
    towers = embeddings(40, 48, 2)
    towers["image"][3:20] = -towers["text"][7]
    towers["text"][21] = -3 * towers["image"][2]
    check(towers, 100.0, way)


@pytest.mark.parametrize("way", WAYS)
def test_zero_vectors_have_logits_and_gradients_of_zero(way):
    towers = embeddings(20, 16)
    for x in towers.values():
        x[4] = 0
    check(towers, 10.0, way, gradient=math.inf)
    _, gradients = with_gradients(
        lambda x, s: contrastive_loss(**x, log_scale=s, way=way)[0], towers, 10.0, torch.float32
    )
    _, true = with_gradients(formula, towers, 10.0, torch.float64)
    rest = torch.arange(20, device=DEVICE) != 4
    for name in NAMES:
        assert not gradients[name][4].any()
        torch.testing.assert_close(gradients[name][rest], true[name][rest], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("columns", [False, True])
def test_many_tiles_are_merged(columns):
    """Sums of 40 tiles with shifts from -200 to 200: no order of the tiles may lose the largest."""
    noise = torch.Generator().manual_seed(0)
    shifts = (400 * torch.rand(1, 5, 40, generator=noise) - 200).sort(dim=2, descending=True).values
    sums = torch.rand(1, 40, 70, generator=noise)
    expected = (sums.double().log() + shifts[0, torch.arange(70) // 16].T * math.log(2)).logsumexp(1)
    strides = (40, 1)
    if columns:  # the tile of a column and its part change places
        shifts, strides = shifts.transpose(1, 2).contiguous(), (1, 5)
    found = contrastive_tile.merge(sums.to(DEVICE), shifts.to(DEVICE), [(0, 0, True)], strides, 16, columns)
    torch.testing.assert_close(found.cpu().double(), expected, rtol=1e-6, atol=1e-5)


def geometry(kind: str, rows: int, dim: int) -> dict[str, torch.Tensor]:
    """bf16 pairs as training has them: untrained towers, trained ones (cosine 0.28, others 0.1), two views (0.96)."""
    noise = torch.Generator().manual_seed(1)

    def unit(count: int = rows) -> torch.Tensor:
        return F.normalize(torch.randn(count, dim, generator=noise), dim=1)

    shared, common, a, b = unit(), unit(1), unit(1), unit(1)
    pairs = {
        "untrained": lambda: (shared, unit()),
        "trained": lambda: [0.62 * own + 0.3 * common + 0.42 * shared + 0.55 * unit() for own in (a, b)],
        "views": lambda: (shared, shared + 0.3 * unit()),
    }[kind]()
    lengths = 3 + 7 * torch.rand(2, rows, 1, generator=noise)
    return {
        name: (length * F.normalize(x, dim=1)).to(DEVICE, torch.bfloat16)
        for name, x, length in zip(NAMES, pairs, lengths, strict=False)
    }


@pytest.mark.parametrize("scale", table([100 / 7, 100.0], 100.0))
@pytest.mark.parametrize("kind", table(["untrained", "trained", "views"], "trained"))
@pytest.mark.parametrize("way", WAYS)
def test_bf16_is_never_worse_than_autocast(way, kind, scale):
    towers = geometry(kind, 64, 128)
    found = errors(towers, scale, way, dtype=torch.bfloat16)
    usual = errors(towers, scale, "autocast", dtype=torch.bfloat16)
    assert found["loss"] < 1e-3 and max(found.values()) < 5e-3, found
    assert all(found[name] <= usual[name] + 1e-4 for name in ("loss", *towers)), (found, usual)


@pytest.mark.parametrize("way", WAYS)
def test_the_same_bits_each_time(way):
    towers = embeddings(35, 32)

    def run():
        return with_gradients(lambda x, s: contrastive_loss(**x, log_scale=s, way=way)[0], towers, 30.0, torch.float32)

    (loss, gradients), (again, gradients_again) = run(), run()
    assert loss == again and all(torch.equal(gradients[name], gradients_again[name]) for name in gradients)


@pytest.mark.parametrize("way", ["reference", "tile", "hybrid"])
@pytest.mark.parametrize(
    "rows, dtype", table([(41, torch.float32), (1, torch.float32), (48, torch.bfloat16)], (41, torch.float32))
)
def test_sigmoid_loss(way, rows, dtype):
    towers = embeddings(rows, 24, 2, dtype)

    def run(function, dtype):
        wide = torch.promote_types(dtype, torch.float32)
        leaves = [x.to(dtype).requires_grad_() for x in towers.values()]
        leaves += [torch.tensor(v, dtype=wide, device=DEVICE, requires_grad=True) for v in (2.3, -8.0)]
        loss = function(*leaves)
        return loss.detach(), *(g.double() for g in torch.autograd.grad(3 * loss, leaves))

    def siglip(image, text, log_scale, bias):
        logits = log_scale.exp() * F.normalize(image, dim=1) @ F.normalize(text, dim=1).T + bias
        signs = 2 * torch.eye(len(logits), device=DEVICE) - 1
        return -F.logsigmoid(signs * logits).sum() / len(logits)

    expected = run(siglip, torch.float64)
    found = run(lambda i, t, s, b: sigmoid_loss(i, t, log_scale=s, bias=b, way=way), dtype)
    for a, b in zip(found, expected, strict=True):
        assert (a - b).norm() <= (1e-5 if dtype == torch.float32 else 5e-3) * b.norm()


@pytest.mark.gpu("too large for the interpreter")
@pytest.mark.parametrize("dim", [384, 512, 768, 1024])
@pytest.mark.parametrize("rows", [512, 1000, 4096])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_real_sizes(rows, dim, dtype):
    low = dtype == torch.bfloat16
    for way in ["tile", "hybrid", *(["small"] if rows <= 512 else [])]:
        for scale in (100 / 7, 100.0):
            limit = {"loss": 1e-3, "gradient": 5e-3} if low else {}
            check(embeddings(rows, dim, dtype=dtype), scale, way, dtype=dtype, **limit)


@pytest.mark.gpu("graphs are CUDA's")
@pytest.mark.parametrize("rows, way", [(256, "small"), (1000, "tile"), (1000, "hybrid")])
def test_a_graph_replays_it(rows, way):
    towers = {name: x.requires_grad_() for name, x in embeddings(rows, 512, dtype=torch.bfloat16).items()}
    log_scale = torch.tensor(3.0, device=DEVICE, requires_grad=True)

    def run():
        loss, _ = contrastive_loss(**towers, log_scale=log_scale, way=way)
        return loss, *torch.autograd.grad(loss, [*towers.values(), log_scale])

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        captured = run()
    with torch.no_grad():
        for x in towers.values():
            x += 0.1 * torch.randn_like(x)
        log_scale += 0.5
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(captured, run(), strict=True))


@pytest.mark.parametrize(
    "bad, message",
    [
        ({"way": "fast"}, "way one of"),
        ({"gather": "none"}, "gather is one of"),
        ({"mmcl_weight": 0, "image_aug": None, "text_aug": None}, "weight 0"),
        ({"text": torch.ones(5, 8)}, r"\(4, 8\), \(5, 8\)"),
        ({name: torch.ones(513, 8) for name in NAMES} | {"way": "small"}, "up to 512"),
        ({"text": torch.ones(4, 8).half(), "way": "tile"}, "fp16"),
    ],
)
def test_arguments_that_do_not_fit(bad, message):
    towers = {name: torch.ones(4, 8) for name in NAMES}
    with pytest.raises(ValueError, match=message):
        contrastive_loss(**{**towers, "log_scale": torch.tensor(1.0), **bad})


def test_whole_matrices_are_for_one_process_and_softmax():
    one = torch.tensor(1.0)
    with pytest.raises(ValueError, match="one process"):
        sigmoid_loss(torch.ones(4, 8), torch.ones(4, 8), log_scale=one, bias=one, way="whole")


TERMS = (torch.tensor([[0.5, 0.5], [0.5, 0.0], [0.5, 0.0]], device=DEVICE), [0, 1, 1, 0, 2, 0, 1, 3, 0])


@pytest.mark.parametrize("way", table(["reference", "tile"], "tile"))
def test_the_operations_are_registered_right(way):
    towers = [x.requires_grad_() for x in embeddings(20, 16).values()]
    scale, bias = (torch.tensor(v, device=DEVICE, requires_grad=True) for v in (2.0, -1.0))
    opcheck(torch.ops.fastbd.contrastive.default, (towers, scale, None, *TERMS, "", True, way))
    opcheck(
        torch.ops.fastbd.contrastive.default,
        (towers[:2], scale, bias, torch.tensor([[1.0, 0.0]], device=DEVICE), [0, 1, 0], "", True, way),
    )


def test_the_small_operation_is_registered_right():
    towers = [x.requires_grad_() for x in embeddings(20, 16).values()]
    scale = torch.tensor(2.0, device=DEVICE, requires_grad=True)
    opcheck(torch.ops.fastbd.contrastive_small.default, (towers, scale, *TERMS, "", True))


def test_the_whole_operation_is_registered_right():
    for dtype in (torch.float32, torch.bfloat16):
        towers = [x.requires_grad_() for x in embeddings(20, 16, dtype=dtype).values()]
        scale = torch.tensor(2.0, device=DEVICE, requires_grad=True)
        opcheck(torch.ops.fastbd.contrastive_whole.default, (towers, scale, *TERMS))


@pytest.mark.parametrize("way", table(["auto", "reference", "whole", "tile", "small"], "auto", "tile", "small"))
def test_compiles_into_a_whole_graph(way):
    torch._dynamo.reset()  # of one function only a few graphs may be kept
    compiled = torch.compile(
        lambda x, s: contrastive_loss(**{k: v * 2 for k, v in x.items()}, log_scale=s, way=way)[0],
        backend="aot_eager",
        fullgraph=True,
        dynamic=True,
    )
    for rows in (8, 13):
        towers = embeddings(rows, 32)
        loss, gradients = with_gradients(compiled, towers, 20.0, torch.float32)
        truth, true = with_gradients(formula, towers, 20.0, torch.float64)
        assert loss == pytest.approx(truth, rel=2e-5)
        assert all((gradients[name] - true[name]).norm() < 5e-5 * true[name].norm() for name in true)


@pytest.mark.parametrize("power", [1, 2])
@pytest.mark.parametrize("way", ["reference", "whole", "small"])
def test_a_second_derivative_is_refused(way, power):
    towers = {name: x.requires_grad_() for name, x in embeddings(6, 8).items()}
    loss, _ = contrastive_loss(**towers, log_scale=torch.tensor(1.0, device=DEVICE), way=way)
    with pytest.raises(RuntimeError):
        (gradient,) = torch.autograd.grad(loss**power, [towers["image"]], create_graph=True)
        gradient.sum().backward()


def test_autocast_does_not_reach_inside():
    towers, scale = embeddings(30, 32), torch.tensor(4.0, device=DEVICE)
    with torch.autocast(DEVICE, torch.bfloat16):
        inside, _ = contrastive_loss(**towers, log_scale=scale)
    assert torch.equal(inside, contrastive_loss(**towers, log_scale=scale)[0])


def peak(rows: int, dim: int = 64, way: str = "auto", count: int = 2, dtype=torch.float32) -> int:
    """Bytes in use at once, forward and backward."""
    from bench.measure import peak_bytes  # here, because the distributed test's worker imports this file elsewhere

    towers = {name: x.requires_grad_() for name, x in embeddings(rows, dim, count, dtype).items()}
    scale = torch.tensor(3.0, requires_grad=True)
    leaves = [*towers.values(), scale]
    return peak_bytes(
        lambda: torch.autograd.grad(contrastive_loss(**towers, log_scale=scale, way=way)[0], leaves), "cpu"
    )


@pytest.mark.skipif(DEVICE == "cuda", reason="counts the CPU's bytes")
def test_memory_grows_with_the_batch_not_with_its_square(monkeypatch):
    """Sixteen times the rows, from where the logits are no longer kept whole."""
    monkeypatch.setattr(contrastive_reference, "ROWS", 128)
    few, many = peak(256), peak(4096)
    assert many < 16.5 * few
    assert many < 4096**2 * 4 / 2  # half of the logits that the formula stores several times


@pytest.mark.skipif(DEVICE == "cuda", reason="counts the CPU's bytes")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("count", [2, 4])
def test_whole_matrices_take_no_more_memory_than_blocks(count, dtype):
    """Up to the largest batch for which unit vectors are kept beside them, and the largest for which they are taken."""
    for rows in (128, 256, 257, 1024):
        assert peak(rows, 512, "whole", count, dtype) <= peak(rows, 512, "reference", count, dtype)
