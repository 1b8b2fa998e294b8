"""Launches and memory traffic of a module that Inductor has generated, read from its text.

A kernel reads or writes every element of a tensor once, however often it names it: what it needs again comes from the
cache. Where it gathers rows of a table, or looks at a part of a tensor, it moves at most one element for each of its
points and each place in its code. A call of a library moves its operands and results once.
"""

from __future__ import annotations

import ast
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

SIZES = {
    "bf16": 2, "fp16": 2, "fp32": 4, "fp64": 8, "i1": 1, "u8": 1, "i8": 1, "i32": 4, "u32": 4, "i64": 8, "u64": 8,
    "bfloat16": 2, "float16": 2, "float32": 4, "float64": 8, "bool": 1, "uint8": 1, "int8": 1, "int32": 4, "uint32": 4,
    "int64": 8, "uint64": 8,
}  # fmt: skip
SMALL = 2_000_000  # bytes: less than the H200 moves in half a microsecond, far less than a launch takes


@dataclass(eq=False)
class Tensor:
    """`origin` is the tensor whose memory a view shows."""

    size: tuple[int, ...]
    stride: tuple[int, ...]
    element: int
    origin: Tensor | None = None

    @property
    def numel(self) -> int:
        return math.prod(self.size)

    @property
    def root(self) -> Tensor:
        return self.origin.root if self.origin else self

    def laid_like(self, stride: tuple[int, ...]) -> bool:
        """Whether these are its strides, but for dimensions of one element, whose stride means nothing."""
        return all(n == 1 or a == b for n, a, b in zip(self.size, self.stride, stride, strict=True))

    @property
    def channels_last(self) -> bool:
        _, channels, height, width = self.size
        return self.laid_like((height * width * channels, 1, width * channels, channels))


@dataclass(frozen=True)
class Kernel:
    """A Triton kernel: names of its arguments with their types, and how often its code loads and stores each tensor."""

    arguments: dict[str, str]
    loads: dict[str, int]
    stores: dict[str, int]
    copies: bool
    """It writes what it reads, at most in another type."""


@dataclass(frozen=True)
class Launch:
    """One call: of a Triton kernel, or of a library, which may run several kernels."""

    name: str
    triton: bool
    bytes: int
    fp32: int = 0
    """Bytes of them in float32 that are no parameters or their gradients."""
    products: int = 0
    """Convolutions: 1 forward; gradient of the input and of the weight backward."""
    layouts: int = 0
    """Operands of a convolution that are not channels_last, or were copied to be."""


def launches(code: str) -> list[Launch]:
    """What the module's call() launches, in turn. ValueError where something is not understood."""
    tree = ast.parse(code)
    reader = _Reader({name: _kernel(source) for name, source in _kernels(tree)})
    for function in _functions(tree, "get_args"):
        reader.read(function.body)
    for function in _functions(tree, "call"):
        reader.read(function.body)
    return [launch() for launch in reader.launches]


def _functions(tree: ast.Module, name: str) -> Iterator[ast.FunctionDef]:
    return (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) and node.name == name)


def _kernels(tree: ast.Module) -> Iterator[tuple[str, str]]:
    """Name and source of each kernel."""
    for node in tree.body:
        match node:
            case ast.Assign(targets=[ast.Name(id=name)], value=ast.Call(func=ast.Attribute(attr="triton"), args=words)):
                yield name, ast.literal_eval(words[1])


def _kernel(source: str) -> Kernel:
    (function,) = (node for node in ast.parse(source).body if isinstance(node, ast.FunctionDef))
    (signature,) = (
        value
        for table in ast.walk(function.decorator_list[0])
        if isinstance(table, ast.Dict)
        for key, value in zip(table.keys, table.values, strict=True)
        if isinstance(key, ast.Constant) and key.value == "signature"
    )
    arguments = ast.literal_eval(signature)
    loads, stores, values = {}, {}, {}
    stored = None
    for node in ast.walk(function):
        match node:
            case ast.Assign(targets=[ast.Name(id=name)], value=value):
                values[name] = value
            case ast.Call(func=ast.Attribute(value=ast.Name(id="tl"), attr=("load" | "store" | "atomic_add") as kind)):
                pointer = next(n.id for n in ast.walk(node.args[0]) if isinstance(n, ast.Name) and n.id in arguments)
                if kind != "store":  # adding reads too
                    loads[pointer] = loads.get(pointer, 0) + 1
                if kind != "load":
                    stores[pointer] = stores.get(pointer, 0) + 1
                    stored = node.args[1]
    single = sum(loads.values()) == sum(stores.values()) == 1
    return Kernel(arguments, loads, stores, single and _is_load(stored, values))


def _is_load(value: ast.expr | None, values: dict[str, ast.expr]) -> bool:
    """Whether a value is what was loaded, at most in another type."""
    match value:
        case ast.Name(id=name):
            return name in values and _is_load(values[name], values)
        case ast.Call(func=ast.Attribute(value=inner, attr="to")):
            return _is_load(inner, values)
        case ast.Call(func=ast.Attribute(attr="load")):
            return True
    return False


@dataclass
class _Reader:
    """Follows the statements of a generated function. Bytes are known when all of it has been read."""

    kernels: dict[str, Kernel]
    tensors: dict[str, Tensor] = field(default_factory=dict)
    writers: dict[Tensor, tuple[Kernel, list[Tensor]]] = field(default_factory=dict)
    weights: set[Tensor] = field(default_factory=set)
    results: dict[str, dict[Any, Tensor]] = field(default_factory=dict)
    launches: list[Callable[[], Launch]] = field(default_factory=list)

    def read(self, statements: list[ast.stmt]) -> None:
        for statement in statements:
            match statement:
                case ast.With(body=body):
                    self.read(body)
                case ast.Assign(targets=[ast.Name(id=name)], value=value):
                    self._assign(name, value)
                case ast.Expr(value=ast.Call() as call):
                    self._call(call, None)
                case ast.Return(value=ast.Tuple(elts=outputs)):
                    self._return(outputs)

    def _assign(self, name: str, value: ast.expr) -> None:
        match value:
            case ast.Name(id=other) if other in self.tensors:  # the memory of one for another of the same size
                old = self.tensors[other]
                self.tensors[name] = Tensor(old.size, old.stride, old.element)
            case ast.Call(func=ast.Name(id="empty_strided_cuda" | "rand_strided"), args=[size, stride, *rest]):
                kinds = [*rest, *(k.value for k in value.keywords if k.arg == "dtype")]
                (element,) = (SIZES[kind.attr] for kind in kinds if isinstance(kind, ast.Attribute))
                self.tensors[name] = Tensor(ast.literal_eval(size), ast.literal_eval(stride), element)
                if name.startswith("primals_"):
                    self.weights.add(self.tensors[name])
            case ast.Call(func=ast.Name(id="reinterpret_tensor") | ast.Attribute(attr="as_strided")) if (
                view := self._tensor(value)
            ):
                self.tensors[name] = view
            case ast.Call():
                self._call(value, name)
            case ast.Subscript(value=ast.Name(id=other), slice=ast.Constant(value=place)) if other in self.results:
                element = self.tensors[other].element
                self.tensors[name] = self.results[other][place] = Tensor((0,), (1,), element)  # its size comes next

    def _call(self, call: ast.Call, result: str | None) -> None:
        name = ast.unparse(call.func)
        if name.endswith(".run") and (kernel := self.kernels.get(name[:-4])):
            self._triton(name[:-4], kernel, call.args)
        elif name == "assert_size_stride":
            self._known(*call.args)
        elif name.startswith(("extern_kernels.", "torch.ops.")):
            self._library(name, call, result)

    def _known(self, name: ast.expr, size: ast.expr, stride: ast.expr, *_: ast.expr) -> None:
        """The size of what a library has returned."""
        if isinstance(name, ast.Name) and name.id in self.tensors:
            tensor = self.tensors[name.id]
            tensor.size, tensor.stride = ast.literal_eval(size), ast.literal_eval(stride)

    def _tensor(self, value: ast.expr) -> Tensor | None:
        match value:
            case ast.Name(id=name):
                return self.tensors.get(name)
            case ast.Call(args=[ast.Name(id=name), ast.Tuple() as size, ast.Tuple() as stride, *_]):  # a view
                of = self.tensors[name]
                return Tensor(ast.literal_eval(size), ast.literal_eval(stride), of.element, of)
        return None

    def _triton(self, name: str, kernel: Kernel, values: list[ast.expr]) -> None:
        given = dict(zip((a for a, kind in kernel.arguments.items() if kind != "constexpr"), values, strict=False))
        points = math.prod(ast.literal_eval(value) for a, value in given.items() if a.endswith("numel"))
        tensors: dict[str, Tensor] = {}
        for a, value in given.items():
            if kernel.arguments[a].startswith("*"):
                tensor = self._tensor(value)
                if tensor is None:
                    raise ValueError(f"{name} is called with {ast.unparse(value)}, which is no known tensor")
                tensors[a] = tensor
        for a in kernel.stores:
            self.writers[tensors[a].root] = kernel, [tensors[b] for b in kernel.loads if b != a]

        def launch() -> Launch:
            total = fp32 = 0
            for a, tensor in tensors.items():
                kind = kernel.arguments[a][1:]
                sides = (kernel.loads.get(a, 0), kernel.stores.get(a, 0))
                moved = SIZES[kind] * sum(min(tensor.numel, sites * points) for sites in sides)
                total += moved
                fp32 += moved * (kind == "fp32" and tensor.root not in self.weights)
            return Launch(name, True, total, fp32)

        self.launches.append(launch)

    def _library(self, name: str, call: ast.Call, result: str | None) -> None:
        values = [*call.args, *(keyword.value for keyword in call.keywords)]
        operands = [tensor for tensor in map(self._tensor, values) if tensor]
        outputs: dict[Any, Tensor] = {}
        if result:  # one tensor or several: what the name is used for tells
            self.results[result] = outputs
            self.tensors[result] = outputs[None] = Tensor((0,), (1,), operands[0].element)
        backward = name.startswith("torch.ops.aten.convolution_backward")
        products = sum(ast.literal_eval(call.args[-1])) if backward else int(name == "extern_kernels.convolution")
        layouts = 0
        if products:
            layouts = sum(not x.channels_last or self._was_copied(x) for x in operands[: 3 if backward else 2])

        def launch() -> Launch:
            moved = [*operands, *outputs.values()]
            moved += operands[:1] * (backward and products == 2)  # the output's gradient, for both
            return Launch(name, False, sum(x.numel * x.element for x in moved), products=products, layouts=layouts)

        self.launches.append(launch)

    def _was_copied(self, x: Tensor) -> bool:
        if x.root not in self.writers:
            return False
        kernel, sources = self.writers[x.root]
        return kernel.copies and sources[0].size == x.size and not x.laid_like(sources[0].stride)

    def _return(self, outputs: list[ast.expr]) -> None:
        """Outputs of a backward pass are gradients."""
        if any(name.startswith("tangents_") for name in self.tensors):
            self.weights |= {tensor.root for tensor in map(self._tensor, outputs) if tensor}
