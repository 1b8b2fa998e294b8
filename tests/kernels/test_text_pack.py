"""Packed captions by hand, and attention within them against the formula in float64, caption by caption."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from tables import table
from torch.library import opcheck

from fastbd.kernels import attention_native
from fastbd.kernels.text_pack import END, pack, packed_attention

pytestmark = pytest.mark.filterwarnings(
    "ignore:overflow encountered:RuntimeWarning"
)  # masked lanes, in the interpreter
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ON_CPU = "native" if attention_native.library() else "reference"
WAYS = ["reference", "triton", *(["native"] if ON_CPU == "native" and DEVICE == "cpu" else [])]
LENGTHS = [2, 3, 15, 0, 16, 17, 31, 1, 32, 33, 77]


def captions(lengths: list[int], heads: int, dim: int, dtype=torch.float32, room: int = 0, seed: int = 0):
    """-> qkv, starts and a gradient of the output."""
    noise = torch.Generator().manual_seed(seed)
    starts = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)
    qkv = torch.randn(sum(lengths) + room, 3 * heads * dim, generator=noise)
    gradient = torch.randn(len(qkv), heads * dim, generator=noise)
    return qkv.to(DEVICE, dtype), starts.to(DEVICE), gradient.to(DEVICE, dtype)


def formula(qkv: torch.Tensor, starts: torch.Tensor, heads: int) -> torch.Tensor:
    """softmax(q k^T / sqrt(d) where the key is not ahead) v, of each caption alone; zeros behind the last."""
    outputs, dim = [], qkv.shape[1] // 3 // heads
    for first, last in itertools.pairwise(starts.tolist()):
        q, k, v = qkv[first:last].view(last - first, 3, heads, dim).permute(1, 2, 0, 3)
        scores = q @ k.mT / dim**0.5
        ahead = torch.ones_like(scores, dtype=torch.bool).triu(1)
        p = scores.masked_fill(ahead, -torch.inf).softmax(-1)
        outputs.append((p @ v).transpose(0, 1).flatten(1))
    return torch.cat([*outputs, qkv.new_zeros(len(qkv) - len(torch.cat(outputs)), heads * dim)])


def run(function, qkv, starts, gradient, heads: int) -> tuple[torch.Tensor, torch.Tensor]:
    """-> the output, and the gradient of qkv."""
    qkv = qkv.detach().requires_grad_()
    out = function(qkv, starts, heads)
    out.backward(gradient)
    return out.detach(), qkv.grad


def attend(way: str):
    return lambda qkv, starts, heads: packed_attention(qkv, starts, heads, way)


def check(qkv, starts, gradient, heads: int) -> None:
    """Reference within the rounding of its dtype, and the kernels within twice the reference's error."""
    truth = run(formula, qkv.double(), starts, gradient.double(), heads)
    limits = [2e-6 if qkv.dtype == torch.float32 else 1e-2] * 2
    for way in WAYS:
        found = run(attend(way), qkv, starts, gradient, heads)
        assert all(x.dtype == qkv.dtype and not x[starts[-1] :].any() for x in found)
        errors = [((x - y).norm() / y.norm()).item() for x, y in zip(found, truth, strict=True)]
        assert all(error < limit for error, limit in zip(errors, limits, strict=True)), (way, errors, limits)
        limits = [2 * error + 5e-7 for error in errors]


@pytest.mark.parametrize("dtype", table([torch.float32, torch.bfloat16], torch.bfloat16))
@pytest.mark.parametrize("heads, dim", table([(1, 64), (2, 16), (1, 24)], (2, 16)))
def test_every_length_equals_the_formula(heads, dim, dtype):
    check(*captions(LENGTHS, heads, dim, dtype, room=5), heads)


@pytest.mark.parametrize("heads, dim", table([(8, 16), (3, 128)], (8, 16)))
@pytest.mark.parametrize(
    "lengths, room", table([([19], 0), ([0, 5, 0, 0, 18, 0], 0), ([4], 50)], ([0, 5, 0, 0, 18, 0], 0))
)
def test_few_captions_and_much_room(lengths, room, heads, dim):
    check(*captions(lengths, heads, dim, room=room), heads)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_large_scores_do_not_overflow(dtype):
    """Scores of both signs beyond 2,000: their powers have no place in fp32, and most probabilities are 0 or 1."""
    qkv, starts, gradient = captions([40, 9], 2, 16, dtype)
    qkv[:, :64] *= 23.0  # queries and keys
    scores = qkv[:40, :16].float() @ qkv[:40, 32:48].float().T / 4
    assert scores.max() > 1500 and scores.min() < -1500
    truth = run(formula, qkv.double(), starts, gradient.double(), 2)
    for way in WAYS:
        found = run(attend(way), qkv, starts, gradient, 2)
        errors = [((x - y).norm() / y.norm()).item() for x, y in zip(found, truth, strict=True)]
        assert max(errors) < (2e-3 if dtype == torch.float32 else 2e-2), (way, errors)


@pytest.mark.parametrize("way", WAYS)
def test_a_caption_knows_nothing_of_the_others(way):
    qkv, starts, gradient = captions([7, 20, 18], 2, 16, room=3)
    before = run(attend(way), qkv, starts, gradient, 2)
    others = torch.ones(len(qkv), dtype=torch.bool, device=DEVICE)
    others[7:27] = False
    qkv[others] = 40 * qkv[others].flip(0)
    gradient[others] += 9.0
    after = run(attend(way), qkv, starts, gradient, 2)
    for x, y in zip(before, after, strict=True):
        assert torch.equal(x[7:27], y[7:27]) and not torch.equal(x[:7], y[:7]) and not y[45:].any()


@pytest.mark.parametrize("way", WAYS)
def test_a_token_knows_nothing_of_those_behind_it(way):
    qkv, starts, _ = captions([33], 1, 16)
    before = packed_attention(qkv, starts, 1, way)
    qkv[17:] += 1.0
    after = packed_attention(qkv, starts, 1, way)
    assert torch.equal(before[:17], after[:17]) and (before[17:] != after[17:]).any(1).all()


def test_the_same_bits_each_time():
    inputs = captions([40, 3, 17], 2, 24, torch.bfloat16, room=9)
    for x, y in zip(run(attend("triton"), *inputs, 2), run(attend("triton"), *inputs, 2), strict=True):
        assert torch.equal(x, y)


def test_every_place_is_written():
    qkv, starts, gradient = captions([0, 5, 18], 2, 24, room=300)
    torch.use_deterministic_algorithms(True)  # fills new memory with nan
    try:
        out, saved = torch.ops.fastbd.packed_attention(qkv, starts, 2, "triton")
        of_qkv = torch.ops.fastbd.packed_attention_backward(gradient, qkv, starts, out, saved, 2, "triton")
        assert qkv.new_empty(3).isnan().all()
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(x.isfinite().all() and not x[23:].any() for x in (out, saved, of_qkv))


@pytest.mark.parametrize("way", WAYS)
def test_any_layout(way):
    qkv, starts, gradient = captions([5, 18], 2, 16)
    out, of_qkv = run(attend(way), qkv, starts, gradient, 2)
    found = run(attend(way), qkv.T.contiguous().T, starts, gradient.T.contiguous().T, 2)
    assert torch.equal(found[0], out) and torch.equal(found[1], of_qkv)
    one = gradient.new_ones(1, 1).expand_as(gradient)
    torch.testing.assert_close(
        run(attend(way), qkv, starts, one, 2)[1], run(attend(way), qkv, starts, one.contiguous(), 2)[1]
    )


@pytest.mark.parametrize("way", WAYS)
def test_autocast_does_not_reach_inside(way):
    for dtype in (torch.float32, torch.bfloat16):
        qkv, starts, _ = captions([5, 18], 2, 16, dtype)
        with torch.autocast(DEVICE, torch.bfloat16):
            inside = packed_attention(qkv, starts, 2, way)
        assert inside.dtype == dtype and torch.equal(inside, packed_attention(qkv, starts, 2, way))


@pytest.mark.parametrize("way", WAYS)
def test_the_operations_are_registered_right(way):
    qkv, starts, gradient = captions([5, 0, 18], 2, 16, torch.bfloat16, room=3)
    out, saved = torch.ops.fastbd.packed_attention(qkv, starts, 2, way)
    opcheck(torch.ops.fastbd.packed_attention_backward.default, (gradient, qkv, starts, out, saved, 2, way))
    opcheck(torch.ops.fastbd.packed_attention.default, (qkv.requires_grad_(), starts, 2, way))


@pytest.mark.parametrize("way", WAYS)
def test_compiles_into_a_whole_graph(way):
    compiled = torch.compile(
        lambda qkv, starts, heads: packed_attention(2 * qkv, starts, heads, way),
        backend="aot_eager",
        fullgraph=True,
        dynamic=True,
    )
    for lengths in ([5, 18], [3, 2, 9]):
        inputs = captions(lengths, 2, 16)
        found = run(compiled, *inputs, 2)
        truth = run(lambda qkv, *rest: formula(2 * qkv, *rest), *inputs, 2)
        torch.testing.assert_close(found, truth)


def test_arguments_that_do_not_fit():
    qkv, starts, _ = captions([3], 1, 16)
    with pytest.raises(ValueError, match="way is one of"):
        packed_attention(qkv, starts, 1, "fast")
    with pytest.raises(ValueError, match="48 columns .* 5 heads"):
        packed_attention(qkv, starts, 5)


def test_a_gpu_takes_the_kernels_and_a_cpu_what_is_compiled():
    qkv, starts, _ = captions([9, 30], 2, 16)
    usual = packed_attention(qkv, starts, 2, "triton" if DEVICE == "cuda" else ON_CPU)
    assert torch.equal(packed_attention(qkv, starts, 2), usual)


@pytest.mark.gpu("too large for the interpreter")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("heads, dim", [(8, 64), (12, 64), (3, 128), (4, 80)])
def test_real_sizes(heads, dim, dtype):
    lengths = np.random.default_rng(0).integers(2, 78, 300).tolist()
    check(*captions(lengths, heads, dim, dtype, room=1000), heads)


@pytest.mark.gpu("gigabytes of rows")
def test_offsets_beyond_32_bits():
    if torch.cuda.mem_get_info()[0] < 24e9:
        pytest.skip("needs 24 GB")
    qkv, starts, gradient = captions([20, 33], 8, 64, torch.bfloat16, room=7)
    near, far = run(attend("triton"), qkv, starts, gradient, 8), 2**31 // qkv.shape[1] + 1
    many, of_many = qkv.new_zeros(far + len(qkv), qkv.shape[1]), qkv.new_zeros(far + len(qkv), gradient.shape[1])
    many[far:], of_many[far:] = qkv, gradient
    for x, y in zip(near, run(attend("triton"), many, starts + far, of_many, 8), strict=True):
        assert torch.equal(x, y[far:])


@pytest.mark.gpu("graphs are CUDA's")
def test_a_graph_replays_it_for_other_lengths():
    qkv, starts, gradient = captions([5, 40, 3, 77], 8, 64, torch.bfloat16, room=11)
    qkv.requires_grad_()

    def step():
        out = packed_attention(qkv, starts, 8, "triton")
        return out, *torch.autograd.grad(out, qkv, gradient)

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        captured = step()
    starts.copy_(torch.tensor([0, 60, 60, 93, 110]))
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(captured, step(), strict=True))


def rows(*captions: list[int], length: int = 8) -> np.ndarray:
    return np.array([[*tokens, *[0] * (length - len(tokens))] for tokens in captions])


def test_pack_takes_tokens_up_to_the_end_token():
    tokens, positions, starts = pack(rows([1, 5, END], [1, 0, 0, 7, END], [1, END], [1, 2, 3, 4, 5, 6, 7, END]))
    assert tokens.tolist() == [1, 5, END, 1, 0, 0, 7, END, 1, END, 1, 2, 3, 4, 5, 6, 7, END]  # 0 is "!", a token
    assert positions.tolist() == [0, 1, 2, 0, 1, 2, 3, 4, 0, 1, 0, 1, 2, 3, 4, 5, 6, 7]
    assert starts.tolist() == [0, 3, 8, 10, 18]
    assert (tokens.dtype, positions.dtype, starts.dtype) == (torch.int64, torch.int64, torch.int32)


def test_pack_ends_a_caption_at_its_first_end_token():
    tokens, _, starts = pack(np.array([[1, 2, END, END], [1, END, 0, END]], np.int32))
    assert tokens.tolist() == [1, 2, END, 1, END] and starts.tolist() == [0, 3, 5]


@pytest.mark.parametrize("room, expected", [(1, 5), (4, 8), (5, 5), (64, 64)])
def test_pack_leaves_room_behind_the_last_caption(room, expected):
    tokens, positions, starts = pack(rows([1, 5, END], [1, END]), room)
    assert len(tokens) == len(positions) == expected and starts.tolist() == [0, 3, 5]
    assert tokens[:5].tolist() == [1, 5, END, 1, END] and not tokens[5:].any() and not positions[5:].any()


@pytest.mark.gpu(count=2)
def test_captions_may_lie_on_another_gpu_than_the_threads():
    qkv, starts, gradient = captions(LENGTHS, 2, 16)
    here, there = (
        run(packed_attention, *(x.to(device) for x in (qkv, starts, gradient)), 2) for device in ("cuda:0", "cuda:1")
    )
    for mine, theirs in zip(here, there, strict=True):
        assert torch.equal(mine.cpu(), theirs.cpu())
