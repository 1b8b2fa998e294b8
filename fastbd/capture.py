"""Functions of tensors as CUDA graphs: hundreds of kernels started with one call."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

WARM = 3  # calls of a shape before it is captured: compilation, cuDNN's choice, the optimizer's state


class Captured:
    """The same function, captured at the first call after WARM ones with inputs of some shapes.

    Inputs and the output are tensors in any nesting of tuples and dicts. What the function writes beside its output
    must lie where it lay at the capture. The output of a call is overwritten by the next one. A function that does
    other things at other times tells them apart by a `variant`.
    """

    def __init__(self, function: Callable, device: torch.device, variant: Callable[[], Hashable] = lambda: None):
        self.function, self.variant, self.stream = function, variant, torch.cuda.Stream(device)
        self.seen = Counter()
        self.graphs: dict[tuple, tuple[torch.cuda.CUDAGraph, list[Tensor], object]] = {}
        self.pool = torch.cuda.graph_pool_handle()

    def __call__(self, *inputs):
        """Everything runs on one stream of its own, the calls before the capture too: autograd remembers streams."""
        flat, form = pytree.tree_flatten(inputs)
        shapes = (self.variant(), *(tensor.shape for tensor in flat))
        self.seen[shapes] += 1
        here = torch.cuda.current_stream()
        self.stream.wait_stream(here)
        with torch.cuda.stream(self.stream):
            if self.seen[shapes] <= WARM:
                self._forget()
                output = self.function(*inputs)
            else:
                if shapes not in self.graphs:
                    self.graphs[shapes] = self._capture(flat, form)
                output = self._replay(shapes, flat)
        here.wait_stream(self.stream)
        return output

    def _forget(self) -> None:
        """Give back the memory of all graphs, as a call without one needs as much; they are captured again."""
        if self.graphs:
            self.graphs.clear()
            self.pool = torch.cuda.graph_pool_handle()  # tensors that are still used may lie in the old one

    def _capture(self, flat: list[Tensor], form) -> tuple[torch.cuda.CUDAGraph, list[Tensor], object]:
        own = [torch.empty_like(tensor) for tensor in flat]
        graph = torch.cuda.CUDAGraph()
        # The thread that makes batches may do meanwhile what a capture forbids.
        with torch.cuda.graph(graph, pool=self.pool, stream=self.stream, capture_error_mode="thread_local"):
            output = self.function(*pytree.tree_unflatten(own, form))
        return graph, own, output

    def _replay(self, shapes: tuple, flat: list[Tensor]):
        graph, own, output = self.graphs[shapes]
        torch._foreach_copy_(own, flat)
        graph.replay()
        return output
