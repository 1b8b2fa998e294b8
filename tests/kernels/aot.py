"""Compile every Triton kernel for GPUs that need not be here, and print what each one needs as .csv.

    TRITON_INTERPRET=0 python tests/kernels/aot.py 80 90 > tests/kernels/aot-3.7.1.csv

A table is named after its version of Triton: 3.7.1 is the one of constraints.txt, 3.6.0 the one of torch 2.11.
Columns: registers of a thread; bytes of shared memory, and of the stack that registers are spilled to; the PTX's matrix
instructions (wgmma, mma) and those with float64. Of the kernels that resize images, `tap`: instructions of the
innermost loop for each pixel that is multiplied by a weight in it, so three times those for each byte of an image that
it loads.
"""

from __future__ import annotations

import csv
import os
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
import triton
import triton.backends.nvidia
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fastbd.kernels import augment_triton as augment
from fastbd.kernels import contrastive_small as small
from fastbd.kernels import contrastive_tile as tile
from fastbd.kernels import gather_triton as gather
from fastbd.kernels import stamp_triton as stamp
from fastbd.kernels import text_pack_triton as text

CUOBJDUMP = Path(triton.backends.nvidia.__file__).parent / "bin" / "cuobjdump"
COLUMNS = ["kernel", "case", "arch", "registers", "shared", "stack", "wgmma", "mma", "f64", "tap"]
INTS = {"M", "N", "D", "L", "NP", "offset", "m0", "rows", "pm0", "all_blocks_m", "blocks_m", "blocks_n", "parts",
        "blocks", "stride_own", "stride_part", "start", "stop", "strips", "n_terms", "pitch", "size", "H", "W",
        "h", "w", "captions", "images", "T", *(f"{plane}_{axis}" for plane in ("keep", "add") for axis in "byxc"),
        }  # fmt: skip
POINTERS = {
    "i32": {
        "TERMS",
        "DIRECTIONS",
        "params",
        "first",
        "shape",
        "means",
        "histograms",
        "KEEP",
        "ADD",
        "PLACES",
        "FIELD",
        "STARTS",
    },
    "i64": {"resizes", "jobs", "spans"},
    "i16": {"weights"},
    "u8": {"scratch", "tables", "IMAGES", "STAMPED", "LEVELS"},
}
ALIGNED = {"D", "NP", "pitch", "H", "W", "size"}  # multiples of 16, as Triton sees them when they are launched
KIND = re.compile(r"^([QKXG]\d?|out|OUT|QKV|OF_QKV|GRADIENT)$")  # pointers to what the case is named after


def tiles(shape: tile.Tile, dim: int, ip: str, stored: bool = False, sigmoid: bool = False, **more) -> dict:
    return dict(
        D=dim,
        BM=shape.m,
        BN=shape.n,
        BK=shape.k,
        GROUP=shape.group,
        IP=ip,
        STORED=stored,
        SIGMOID=sigmoid,
        num_warps=shape.warps,
        num_stages=shape.stages,
        **more,
    )


def cases(arch: int):
    """(kernel, name of the case, type of its main pointers, compile-time arguments, options), as they are launched."""
    yield from contrastive_cases(arch)
    yield from augment_cases()
    yield from stamp_cases()
    yield from text_cases()
    yield gather.gather_kernel, "", "i64", dict(BLOCK=gather.BLOCK)


def augment_cases():
    exact, block = dict(enable_fp_fusion=False), dict(BLOCK=augment.PIXELS)
    for name, cubic in (("cubic", True), ("linear", False)):
        yield augment.weights_kernel, name, "fp32", dict(CUBIC=cubic, BLOCK=augment.OUTPUTS), exact
    yield augment.columns_kernel, "", "u8", dict(ROWS=augment.TILE_ROWS, COLUMNS=augment.TILE_COLUMNS), {}
    resized = dict(SUMS=True, ROWS=augment.ROWS, BLOCK=augment.BYTES, num_warps=2)
    as_it_is = resized | dict(SUMS=False, **dict.fromkeys(("weights", "first", "shape", "scratch")))
    for kind in ("bf16", "fp32", "u8"):
        yield augment.finish_kernel, f"{kind} resized", kind, dict(NORMALISE=kind != "u8", **resized), exact
        yield augment.finish_kernel, f"{kind} as it is", kind, dict(NORMALISE=kind != "u8", **as_it_is), exact
    yield augment.operate_kernel, "", "u8", block, exact
    yield augment.statistics_kernel, "", "u8", dict(BLOCK=augment.COUNTED_PIXELS), exact
    yield augment.tables_kernel, "", "u8", {}, exact
    for name, across in (("rows", True), ("columns", False)):
        yield augment.blur_kernel, name, "u8", dict(ACROSS=across, LINES=augment.LINES, **block), {}


def stamp_cases():
    no_levels, no_field = dict(LEVELS=None, HAS_LEVELS=False), dict(FIELD=None, HAS_FIELD=False)
    yield stamp.stamp_kernel, "four corners", "u8", dict(N=4, **no_levels, **no_field, BLOCK=stamp.BLOCK)
    yield stamp.stamp_kernel, "whole", "u8", dict(N=1, **no_levels, **no_field, BLOCK=stamp.BLOCK)
    yield stamp.stamp_kernel, "warp", "u8", dict(N=0, HAS_FIELD=True, **no_levels, BLOCK=stamp.BLOCK)
    yield stamp.stamp_kernel, "everything", "u8", dict(N=4, HAS_FIELD=True, HAS_LEVELS=True, BLOCK=stamp.BLOCK)


def text_cases():
    for kernel in (text.attention_kernel, text.attention_backward_kernel):
        for kind, dtype, dim in (
            ("bf16", torch.bfloat16, 16),
            ("bf16", torch.bfloat16, 64),
            ("fp32", torch.float32, 64),
        ):
            out = torch.empty(0, 8 * dim, dtype=dtype)
            yield kernel, f"{kind} {dim}", kind, text.arguments(out, 8) | dict(IP="tf32")


def contrastive_cases(arch: int):
    sizes = tile.HOPPER if arch >= 90 else tile.AMPERE
    bf16, fp32, sigmoid = sizes[torch.bfloat16], sizes[torch.float32], tile.SIGMOID[torch.bfloat16]
    for kind in ("bf16", "fp32"):
        yield tile.inverse_norms_kernel, kind, kind, dict(BR=4, DP=1024)
        yield tile.normalise_backward_kernel, kind, kind, dict(BR=4, DP=1024)
    for name, columns in (("rows", False), ("columns", True)):
        yield tile.merge_kernel, name, "fp32", dict(BLOCK=128, B=128, PB=16, COLUMNS=columns)
    for kernel in (tile.sums_kernel, tile.gradient_kernel):
        more, exact = ({}, {}) if kernel is tile.sums_kernel else ({"WITH_TOTAL": False}, {"WITH_TOTAL": True})
        for dim in (512, 1024):
            yield kernel, f"bf16 {dim}", "bf16", tiles(bf16, dim, "tf32", **more)
        yield kernel, "bf16 1024 sigmoid", "bf16", tiles(sigmoid, 1024, "tf32", sigmoid=True, **more)
        yield kernel, "bf16 1024 stored", "bf16", tiles(tile.STORED_TILE, 1024, "tf32", stored=True, **more)
        yield kernel, "fp32 1024 tf32", "fp32", tiles(fp32, 1024, "tf32", **exact)
        yield kernel, "fp32 1024 ieee", "fp32", tiles(fp32, 1024, "ieee", **exact)
    for columns in (128, 256, 512):
        options = dict(num_warps=8 if columns > 128 else 4, num_stages=2 if columns > 256 else 3)
        yield small.losses_kernel, f"bf16 {columns}", "bf16", dict(BM=16, NP=columns, BK=64, IP="tf32", **options)
        if columns == 256:
            yield small.losses_kernel, f"fp32 {columns}", "fp32", dict(BM=16, NP=columns, BK=32, IP="tf32", **options)
    options = dict(BM=16, BD=128, NB=256, IP="tf32", num_warps=8, num_stages=3)
    yield small.gradients_kernel, "bf16 256", "bf16", dict(BJ=64, **options)
    yield small.gradients_kernel, "fp32 256", "fp32", dict(BJ=32, **options)


def compile_one(kernel, kind: str, arguments: dict, options: dict, arch: int):
    options = {name: arguments[name] for name in ("num_warps", "num_stages") if name in arguments} | options
    constants = {name: value for name, value in arguments.items() if name not in options}
    signature, attributes = {}, {}
    for place, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
            continue
        element = next((t for t, names in POINTERS.items() if name in names), kind if KIND.match(name) else "fp32")
        signature[name] = "i32" if name in INTS else f"*{element}"
        if name not in INTS or name in ALIGNED:
            attributes[(place,)] = [["tt.divisibility", 16]]
    places = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    source = ASTSource(fn=kernel, signature=signature, constexprs=places, attrs=attributes)
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options={"enable_fp_fusion": True} | options)


def row(case, arch: int) -> dict:
    kernel, name, kind, arguments, *options = case
    compiled = compile_one(kernel, kind, arguments, options[0] if options else {}, arch)
    tapped = kernel is augment.columns_kernel or arguments.get("SUMS")
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = cuobjdump("--dump-resource-usage", file.name)
        sass = cuobjdump("--dump-sass", file.name) if tapped else ""  # which takes as long as many a compilation
    ptx = compiled.asm["ptx"]
    return dict(
        kernel=kernel.__name__,
        case=name,
        arch=arch,
        registers=int(re.search(r"REG:(\d+)", usage)[1]),
        shared=compiled.metadata.shared,
        stack=int(re.search(r"STACK:(\d+)", usage)[1]),
        wgmma=ptx.count("wgmma.mma_async"),
        mma=ptx.count("mma.sync"),
        f64=ptx.count(".f64"),
        tap=f"{tap(sass):.1f}" if tapped else "",
    )


def cuobjdump(what: str, file: str) -> str:
    return subprocess.run([CUOBJDUMP, what, file], capture_output=True, text=True, check=True).stdout


def tap(sass: str) -> float:
    """Instructions for each pixel and tap in the longest innermost loop that loads bytes of images.

    A byte is loaded alone, or four at once; weights are the loads of 16 bits.
    """
    code = [(int(at, 16), text) for at, text in re.findall(r"/\*([0-9a-f]{4,})\*/\s+([^;]*);", sass)]
    jumps = [(int(to[1], 16), at) for at, text in code if (to := re.search(r"\bBRA\b.*0x([0-9a-f]+)", text))]
    loops = [(to, at) for to, at in jumps if to < at]
    found = []
    for to, at in loops:
        if not any((to, at) != other and to <= other[0] and other[1] <= at for other in loops):
            body = [text for place, text in code if to <= place <= at]
            loads = [load[1] for text in body if (load := re.search(r"LDG\.E(\.U8|\.U16|) ", text))]
            found.append((len(body), loads.count(".U8") + 4 * loads.count("")))
    instructions, loaded = max((length, loaded) for length, loaded in found if loaded)
    return 3 * instructions / loaded


def main(archs: list[int]) -> None:
    if tile.INTERPRETED:
        sys.exit("set TRITON_INTERPRET=0: interpreted kernels cannot be compiled")
    with tempfile.TemporaryDirectory() as cache, ThreadPoolExecutor(2) as pool:
        os.environ["TRITON_CACHE_DIR"] = cache
        jobs = [(case, arch) for arch in archs for case in cases(arch)]
        writer = csv.DictWriter(sys.stdout, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(pool.map(lambda job: row(*job), jobs))


if __name__ == "__main__":
    main([int(arch) for arch in sys.argv[1:]])
