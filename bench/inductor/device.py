"""An H200 that is not there: enough of a CUDA device for torch.compile to generate code for it, none to run it.

Works in a process of its own that has guard.cpp's library loaded before PyTorch (LD_PRELOAD), with a PyTorch without
CUDA. It reaches into private parts of PyTorch, so it is made for the versions in WORKS_WITH.
"""

from __future__ import annotations

import subprocess
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import _prims_common

WORKS_WITH = ("2.13.0",)
H200 = SimpleNamespace(
    name="NVIDIA H200", major=9, minor=0, multi_processor_count=132, warp_size=32, total_memory=150_754_820_096,
    max_threads_per_multi_processor=2048, max_threads_per_block=1024, regs_per_multiprocessor=65_536,
    shared_memory_per_block=49_152, shared_memory_per_block_optin=232_448, shared_memory_per_multiprocessor=233_472,
    L2_cache_size=62_914_560, gcnArchName="", is_integrated=0, is_multi_gpu_board=0,
)  # fmt: skip


def build_guard(folder: Path) -> Path:
    """Compile guard.cpp into `folder`; the library to preload."""
    home = Path(torch.__path__[0])
    library = folder / "guard.so"
    subprocess.run(
        [
            "g++",
            "-std=c++20",
            "-shared",
            "-fPIC",
            Path(__file__).with_name("guard.cpp"),
            "-o",
            library,
            f"-I{home}/include",
            f"-L{home}/lib",
            f"-Wl,-rpath,{home}/lib",
            "-lc10",
            "-ltorch_cpu",
        ],
        check=True,
    )
    return library


def pretend() -> None:
    """Make this process believe in the device. There is no way back."""
    _pretend_cuda()
    _pretend_to_dynamo()
    _pretend_to_triton()
    _pretend_to_inductor()


def _pretend_cuda() -> None:
    facts = {
        "is_available": True, "is_initialized": True, "is_bf16_supported": True, "is_current_stream_capturing": False,
        "device_count": 1, "current_device": 0, "get_device_properties": H200, "get_device_capability": (9, 0),
        "get_device_name": H200.name, "mem_get_info": (H200.total_memory, H200.total_memory), "synchronize": None,
        "current_stream": SimpleNamespace(
            cuda_stream=0, stream_id=0, device=torch.device("cuda", 0), device_index=0, device_type=1
        ),
        "get_rng_state": torch.zeros(16, dtype=torch.uint8), "set_rng_state": None, "_lazy_init": None,
    }  # fmt: skip
    for name, value in facts.items():
        setattr(torch.cuda, name, _always(value))
    torch.cuda.device = torch.cuda._DeviceGuard = lambda *_: nullcontext()
    for name in ("getCurrentRawStream", "getDevice", "setDevice", "exchangeDevice", "maybeExchangeDevice"):
        setattr(torch._C, f"_cuda_{name}", _always(0))
    torch._C._cuda_isCurrentStreamCapturing = _always(False)
    torch.tensor = partial(_tensor, torch.tensor)
    torch.version.cuda = "13.0"
    torch._C._conv_determine_backend_memory_format = _convolution_format


def _pretend_to_dynamo() -> None:
    from torch._dynamo import device_interface

    class Worker(device_interface.CudaInterface.Worker):
        get_device_properties = staticmethod(_always(H200))
        current_device = staticmethod(_always(0))

    class Interface(device_interface.CudaInterface):
        get_compute_capability = staticmethod(_always(90))
        raise_if_triton_unavailable = staticmethod(_always(None))
        get_raw_stream = staticmethod(_always(0))

    Interface.Worker = Worker
    device_interface.get_registered_device_interfaces()  # registers the real ones, once
    device_interface.device_interfaces |= {"cuda": Interface, "cuda:0": Interface}


def _pretend_to_triton() -> None:
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver

    stand_in: Any = SimpleNamespace(  # what is asked of a driver
        get_current_target=_always(GPUTarget("cuda", 90, 32)),
        get_current_device=_always(0),
        get_active_torch_device=_always(torch.device("cuda", 0)),
    )
    driver.set_active(stand_in)


def _pretend_to_inductor() -> None:
    import torch._inductor.fx_passes.joint_graph as joint_graph
    import torch._subclasses.fake_tensor as fake_tensor
    from torch._inductor import config

    fake_tensor.init_gpu_context = _always(None)  # would make a real tensor there

    config.force_disable_caches = True  # what a real GPU finds in a cache must not come from here
    config.compile_threads = 1
    joint_graph.lazy_init = _always(None)  # traces patterns with real tensors, which the device has none of
    config.joint_graph_constant_folding = False  # likewise computes with real ones


def _tensor(make, value, *, dtype=None, device=None) -> torch.Tensor:
    """As torch.tensor(), which even in a FakeTensorMode would put values on the device: only shape and type."""
    made = make(value, dtype=dtype, device="cpu")
    return torch.empty(made.shape, dtype=made.dtype, device=device or torch.get_default_device())


def _convolution_format(x: torch.Tensor, weight: torch.Tensor, *_) -> torch.memory_format:
    """As cuDNN's: channels_last as soon as the input or the weight is."""
    formats = map(_prims_common.suggest_memory_format, (x, weight))
    return torch.channels_last if torch.channels_last in formats else torch.contiguous_format


def _always(value):
    return lambda *_, **__: value
