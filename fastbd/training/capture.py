"""Functions of tensors as CUDA graphs: hundreds of kernels started with one call."""

from __future__ import annotations

import gc
from collections import Counter
from collections.abc import Callable, Hashable
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from fastbd.base.console import console
from fastbd.base.errors import UserError

WARM = 3  # calls of a shape before it is captured: compilation, cuDNN's choice, the optimizer's state

_broken: list[torch.cuda.CUDAGraph] = []  # kept for good: PyTorch's allocator of locked memory still refers to them


class Captured:
    """The same function, captured at the first call after WARM ones with inputs of some shapes.

    Inputs and the output are tensors in any nesting of tuples and dicts. What the function writes beside its output
    must lie where it lay at the capture. The output of a call is overwritten by the next one. A function that does
    other things at other times tells them apart by a `variant`.

    A capture that fails is a UserError. With `falls_back` it is said instead, once, `failure` is the reason from then
    on, and all later calls, this one included, are calls of the function itself: a capture runs nothing on the device,
    so none of it has been done yet.
    """

    def __init__(
        self,
        function: Callable,
        device: torch.device,
        variant: Callable[[], Hashable] = lambda: None,
        falls_back: bool = False,
    ):
        self.function, self.variant, self.stream = function, variant, torch.cuda.Stream(device)
        self.falls_back, self.failure = falls_back, None
        self.seen = Counter()
        self.graphs: dict[tuple, tuple[torch.cuda.CUDAGraph, list[Tensor], object]] = {}
        self.pool = torch.cuda.graph_pool_handle()

    def __call__(self, *inputs: Any) -> Any:
        """Everything runs on one stream of its own, the calls before the capture too: autograd remembers streams."""
        flat, form = pytree.tree_flatten(inputs)
        shapes = (self.variant(), *(tensor.shape for tensor in flat))
        self.seen[shapes] += 1
        here = torch.cuda.current_stream()
        self.stream.wait_stream(here)
        with torch.cuda.stream(self.stream):
            if self.seen[shapes] > WARM and self._has_graph(shapes, flat, form):
                output = self._replay(shapes, flat)
            else:
                self._forget()
                output = self.function(*inputs)
        here.wait_stream(self.stream)
        return output

    def _forget(self) -> None:
        """Give back the memory of all graphs, as a call without one needs as much; they are captured again."""
        if self.graphs:
            self.graphs.clear()
            self.pool = torch.cuda.graph_pool_handle()  # tensors that are still used may lie in the old one

    def _has_graph(self, shapes: tuple, flat: list[Tensor], form) -> bool:
        """Whether these shapes have a graph, captured now if need be; never after a capture has failed."""
        if self.failure is None and shapes not in self.graphs:
            try:
                self.graphs[shapes] = self._capture(flat, form)
            except Exception as error:  # of any kind: one that is the function's own comes again without a capture
                self._fail(error)
            if self.failure:
                self.graphs.clear()
                gc.collect()  # the error had hold of tensors
                torch.cuda.empty_cache()
        return self.failure is None

    def _capture(self, flat: list[Tensor], form) -> tuple[torch.cuda.CUDAGraph, list[Tensor], object]:
        own = [tensor.clone() for tensor in flat]
        graph = torch.cuda.CUDAGraph()
        with _capturing(graph, self.pool, self.stream):
            output = self.function(*pytree.tree_unflatten(own, form))
        return graph, own, output

    def _fail(self, error: Exception) -> None:
        reason = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
        said = f"the step could not be captured in a CUDA graph ({reason})"
        if not self.falls_back:
            raise UserError(f"{said}: give --graph auto, which then goes on without one, or --graph off.") from error
        self.failure = reason
        console.print(f"{said}: from here on it runs without one.", markup=False)

    def _replay(self, shapes: tuple, flat: list[Tensor]):
        graph, own, output = self.graphs[shapes]
        torch._foreach_copy_(own, flat)  # pyright: ignore[reportPrivateImportUsage]  # its hints leave it out
        graph.replay()
        return output


@contextmanager
def _capturing(graph: torch.cuda.CUDAGraph, pool, stream: torch.cuda.Stream):
    """A capture; of two errors the first one is raised, as the end of a capture that is broken raises another.

    Garbage is collected before: memory, an event or a graph that went away within a capture would break it.
    """
    first, collects = None, gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        # The thread that makes batches may do meanwhile what a capture forbids.
        with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
            try:
                yield
            except Exception as error:
                first = error
                raise
    except Exception:
        _end(graph, pool, stream.device_index)
        if first is None:
            raise
        raise first from first.__cause__
    finally:
        if collects:
            gc.enable()


def _end(graph: torch.cuda.CUDAGraph, pool, device: int) -> None:
    """Let PyTorch know that a capture is over, which CUDAGraph.capture_end does not do where CUDA has invalidated it.

    Its allocator would else never again free what two streams have used, as batches are, and fail when its cache is
    emptied; and its generator would draw no more (torch 2.11: capture_end checks cudaStreamEndCapture's result first).
    """
    try:
        torch._C._cuda_endAllocateToPool(device, pool)
    except (AttributeError, RuntimeError):  # it does know, or it has no such call
        return
    torch._C._cuda_releasePool(device, pool)
    generator = torch.cuda.default_generators[device]
    generator.graphsafe_set_state(generator.clone_state())
    _broken.append(graph)
