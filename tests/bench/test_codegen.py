"""Counting what torch.compile generates: on code made by hand, and on that of a small step."""

from __future__ import annotations

import csv
import shutil

import pytest
import torch
from forked import forked
from torch import nn

from bench.__main__ import main
from bench.inductor.count import launches
from bench.inductor.device import WORKS_WITH
from bench.records import RESULTS, triton_version
from fastbd.models import create

HAND_MADE = """
half = async_compile.triton('half', '''
@triton_heuristics.pointwise(
    triton_meta={'signature': {'in_ptr0': '*fp32', 'in_ptr1': '*fp32', 'out_ptr0': '*bf16', 'xnumel': 'i32',
                 'XBLOCK': 'constexpr'}, 'device': DeviceProperties(type='cuda')},
)
@triton.jit
def half(in_ptr0, in_ptr1, out_ptr0, xnumel, XBLOCK : tl.constexpr):
    tmp0 = tl.load(in_ptr0 + (x0), xmask)
    tmp1 = tl.load(in_ptr1 + (x0 // 100), xmask)
    tmp2 = tl.load(in_ptr0 + (x0), xmask)
    tl.store(out_ptr0 + (x0), tmp0 * tmp1 + tmp2, xmask)
''', device_str='cuda')
rows = async_compile.triton('rows', '''
@triton_heuristics.pointwise(
    triton_meta={'signature': {'in_ptr0': '*i64', 'in_ptr1': '*fp32', 'out_ptr0': '*fp32', 'ynumel': 'i32',
                 'xnumel': 'i32', 'XBLOCK': 'constexpr', 'YBLOCK': 'constexpr'}},
)
@triton.jit
def rows(in_ptr0, in_ptr1, out_ptr0, ynumel, xnumel, XBLOCK : tl.constexpr, YBLOCK : tl.constexpr):
    tmp0 = tl.load(in_ptr0 + (y0), ymask)
    tmp1 = tl.load(in_ptr1 + (x1 + 8*tmp0), xmask)
    tl.atomic_add(out_ptr0 + (x1 + 8*y0), tmp1, xmask)
''', device_str='cuda')
turned = async_compile.triton('turned', '''
@triton_heuristics.pointwise(
    triton_meta={'signature': {'in_ptr0': '*fp32', 'out_ptr0': '*bf16', 'xnumel': 'i32', 'XBLOCK': 'constexpr'}},
)
@triton.jit
def turned(in_ptr0, out_ptr0, xnumel, XBLOCK : tl.constexpr):
    tmp0 = tl.load(in_ptr0 + (x0 + 16*x1), xmask)
    tmp1 = tmp0.to(tl.float32)
    tl.store(out_ptr0 + (x1 + 3*x0), tmp1, xmask)
''', device_str='cuda')

def call(args):
    with torch.cuda._DeviceGuard(0):
        buf0 = empty_strided_cuda((64, 100), (100, 1), torch.bfloat16)
        half.run(activation, primals_1, buf0, 6400, stream=stream0)
        buf1 = empty_strided_cuda((10, 8), (8, 1), torch.float32)
        rows.run(ids, primals_2, buf1, 10, 8, stream=stream0)
        buf2 = empty_strided_cuda((2, 3, 4, 4), (48, 1, 12, 3), torch.bfloat16)
        turned.run(pixels, buf2, 96, stream=stream0)
        buf3 = extern_kernels.convolution(buf2, weight, stride=(1, 1), bias=None)
        assert_size_stride(buf3, (2, 5, 4, 4), (80, 1, 20, 5), 'torch.ops.aten.convolution.default')
        buf4 = buf2; del buf2  # reuse
        buf5 = torch.ops.aten.convolution_backward.default(buf3, buf4, weight, [0], (1, 1), [True, True, False])
        buf6 = buf5[0]
        assert_size_stride(buf6, (2, 3, 4, 4), (48, 1, 12, 3), 'torch.ops.aten.convolution_backward.default')
        buf7 = buf5[1]
        assert_size_stride(buf7, (5, 3, 1, 1), (3, 1, 3, 3), 'torch.ops.aten.convolution_backward.default')
        extern_kernels.mm(reinterpret_tensor(buf0, (100, 64), (1, 100), 0), buf0, out=buf8)
    return (buf1, )

def get_args():
    activation = rand_strided((64, 100), (100, 1), device='cuda:0', dtype=torch.float32)
    primals_1 = rand_strided((64, ), (1, ), device='cuda:0', dtype=torch.float32)
    ids = rand_strided((10, ), (1, ), device='cuda:0', dtype=torch.int64)
    primals_2 = rand_strided((1000, 8), (8, 1), device='cuda:0', dtype=torch.float32)
    pixels = rand_strided((2, 3, 4, 4), (48, 16, 4, 1), device='cuda:0', dtype=torch.float32)
    weight = rand_strided((5, 3, 1, 1), (3, 1, 3, 3), device='cuda:0', dtype=torch.bfloat16)
    buf8 = rand_strided((100, 100), (100, 1), device='cuda:0', dtype=torch.bfloat16)
"""


def test_bytes_of_code_made_by_hand():
    half, rows, turned, forward, backward, product = launches(HAND_MADE)
    assert (half.triton, half.bytes, half.fp32) == (True, 4 * 6400 + 4 * 64 + 2 * 6400, 4 * 6400)  # not the weights
    assert (rows.bytes, rows.fp32) == (8 * 10 + 4 * 80 + 2 * 4 * 80, 2 * 4 * 80)  # 10 rows of the table; adds to 10
    assert (turned.bytes, turned.fp32) == ((4 + 2) * 96, 4 * 96)
    assert (forward.triton, forward.products, forward.layouts) == (False, 1, 1)
    assert forward.bytes == 2 * (96 + 15 + 160)
    assert (backward.products, backward.layouts) == (2, 0)
    assert backward.bytes == 2 * ((160 + 15 + 96) + (160 + 96 + 15))
    assert (product.bytes, product.products) == (2 * (2 * 6400 + 100 * 100), 0)


def test_an_operand_that_cudnn_would_copy_is_one_that_is_copied():
    code = HAND_MADE.replace("convolution(buf2, weight", "convolution(pixels, weight")
    assert [launch.layouts for launch in launches(code)][3] == 1


def test_a_tensor_that_is_not_known_is_an_error():
    with pytest.raises(ValueError, match="half is called with elsewhere"):
        launches(HAND_MADE.replace("half.run(activation", "half.run(elsewhere"))


@pytest.mark.full
@pytest.mark.skipif(
    torch.__version__.split("+")[0] not in WORKS_WITH or torch.version.cuda or not shutil.which("g++"),
    reason="made for another torch, or no g++",
)
def test_the_code_of_a_small_step_is_that_of_the_table(tmp_path):
    """A change here is a change of speed: look at it, then write the table anew with python -m bench codegen."""
    # in a process of its own: ast.parse of CPython 3.11 has failed deep in that of a long run of tests (SystemError)
    process = forked(main, ["codegen", "--models", "tiny-rn", "--out", str(tmp_path)], cwd=RESULTS.parents[1])
    process.join()
    assert process.exitcode == 0
    found, kept = (table(folder) for folder in (tmp_path, RESULTS))
    assert found == [row for row in kept if row["model"] == "tiny-rn" and row["triton"] == triton_version()]
    forward, backward = found
    convolutions = sum(isinstance(module, nn.Conv2d) for module in create("tiny-rn", 0).modules())
    assert int(forward["convolutions"]) == convolutions
    assert int(backward["convolutions"]) == 2 * convolutions - 1  # pixels need no gradient
    assert forward["layout_copies"] == backward["layout_copies"] == "0"


def test_fused_pools_move_less_in_the_table_and_no_convolution_copies():
    moved = {}
    for row in table(RESULTS):
        assert row["layout_copies"] == "0"
        key = row["model"], row["views"], row["group"], row["torch"], row["fused"]
        moved[key] = moved.get(key, 0) + int(row["triton_bytes"])
    fused = [case for *case, pools in moved if pools == "True"]
    assert fused and all(moved[*case, "True"] < 0.97 * moved[*case, "False"] for case in fused)


def table(folder) -> list[dict]:
    with open(folder / "codegen.csv") as file:
        return list(csv.DictReader(file))


def test_where_no_code_can_be_generated_it_says_so(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(torch, "__version__", "2.99.0")
    assert main(["codegen", "--out", str(tmp_path)]) == 2
    assert "made for torch 2.13.0" in capsys.readouterr().err
    monkeypatch.setattr(torch, "__version__", WORKS_WITH[0])
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setenv("PATH", str(tmp_path))
    if triton_version():
        assert main(["codegen", "--out", str(tmp_path)]) == 2
        assert "g++" in capsys.readouterr().err
