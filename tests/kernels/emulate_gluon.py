"""Runs the source of the Hopper kernel on the CPU, with its concurrency and without its speed.

Programs and their partitions are threads; barriers count arrivals and bytes as the hardware's do; copies arrive late
and leave NaN until then; products run when they are waited for. Layouts are ignored. A deadlock, an access outside a
tensor, one arrival too many and an accumulator read before its wait are errors.
"""

from __future__ import annotations

import random
import re
import threading
import time
import traceback
from pathlib import Path
from types import ModuleType, SimpleNamespace

import torch
from torch import Tensor

DEADLOCK_SECONDS = 20.0
_thread = threading.local()
_stop = threading.Event()
_atomic = threading.Lock()


class Scalar(Tensor):
    """A tensor of the kernel: ``+=`` makes a new one, as in a language of values."""

    __iadd__ = lambda self, other: self + other  # noqa: E731
    __imul__ = lambda self, other: self * other  # noqa: E731
    __ixor__ = lambda self, other: self ^ other  # noqa: E731

    @property
    def type(self) -> SimpleNamespace:
        return SimpleNamespace(layout=None)


def _value(x: object) -> Tensor:
    if not isinstance(x, Tensor):
        x = torch.tensor(x, dtype=torch.float32 if isinstance(x, float) else None)
    return x.as_subclass(Scalar)


def _same_dtype(x: object, y: object) -> tuple[Tensor, Tensor]:
    x, y = _value(x), _value(y)
    dtype = torch.result_type(x, y)
    return x.to(dtype), y.to(dtype)


def _dawdle() -> None:
    """Shuffles the order of threads."""
    if random.random() < 0.02:
        time.sleep(random.random() * 0.002)


class Pointer:
    def __init__(self, memory: Tensor, offset: object = 0) -> None:
        self.memory, self.offset = memory, offset

    def __add__(self, offset: object) -> Pointer:
        return Pointer(self.memory, self.offset + offset)

    def at(self, mask: object) -> tuple[Tensor, Tensor]:
        offset, mask = torch.broadcast_tensors(_value(self.offset), _value(mask))
        assert bool(((offset >= 0) & (offset < self.memory.numel()))[mask].all()), "access outside a tensor"
        return offset.long(), mask


class Barrier:
    """An mbarrier: a phase ends when all arrivals and all expected bytes are in."""

    def __init__(self) -> None:
        self.changed = threading.Condition()

    def init(self, count: int) -> None:
        self.count = self.pending = count
        self.bytes = self.phase = 0

    def update(self, arrivals: int, expected_bytes: int) -> None:
        with self.changed:
            self.pending -= arrivals
            self.bytes += expected_bytes
            assert self.pending >= 0, "too many arrivals at a barrier"
            if self.pending == 0 and self.bytes == 0:
                self.pending = self.count
                self.phase += 1
                self.changed.notify_all()

    def wait(self, parity: int) -> None:
        end = time.monotonic() + DEADLOCK_SECONDS
        with self.changed:
            while self.phase % 2 == parity:
                if _stop.is_set() or time.monotonic() > end:
                    _stop.set()
                    raise TimeoutError("deadlock at a barrier")
                self.changed.wait(0.2)


class SharedMemory:
    def __init__(self, memory: Tensor) -> None:
        self.memory, self.shape, self.dtype = memory, list(memory.shape), memory.dtype

    def index(self, i: object) -> SharedMemory:
        return SharedMemory(self.memory[int(i)])

    def permute(self, order: tuple[int, ...]) -> SharedMemory:
        return SharedMemory(self.memory.permute(order))

    def load(self, layout: object = None) -> Tensor:
        _dawdle()
        return _value(self.memory.clone())

    def store(self, x: Tensor) -> None:
        _dawdle()
        assert x.shape == self.memory.shape
        self.memory.copy_(x.as_subclass(Tensor))


class Barriers(list):
    def index(self, i: object) -> Barrier:
        return self[int(i)]


class _Mbarrier:
    MBarrierLayout = staticmethod(lambda: Barrier)

    @staticmethod
    def init(barrier: Barrier, count: int) -> None:
        barrier.init(count)

    @staticmethod
    def wait(barrier: Barrier, phase: object) -> None:
        _dawdle()
        barrier.wait(int(phase))

    @staticmethod
    def arrive(barrier: Barrier, count: int = 1, pred: object = True) -> None:
        _dawdle()
        if bool(pred):
            barrier.update(count, 0)

    @staticmethod
    def expect(barrier: Barrier, expected_bytes: object) -> None:
        barrier.update(1, int(expected_bytes))


class Descriptor:
    def __init__(self, x: Tensor, shape: list[int], strides: list[int], block: list[int], layout: object) -> None:
        self.x, self.dtype, self.block_type = x, x.dtype, SimpleNamespace(shape=block)


def _copy_tile(source: Descriptor, origin: list[object], barrier: Barrier, destination: SharedMemory) -> None:
    i_b, i_h, first, _ = (int(i) for i in origin)

    def copy() -> None:
        time.sleep(random.choice((0, 0, 0.0005, 0.002)))
        rows, head_dim = source.block_type.shape[2:]
        tile = torch.zeros(rows, head_dim, dtype=source.dtype)
        start, end = max(first, 0), min(first + rows, source.x.shape[1])
        if start < end:
            tile[start - first : end - first] = source.x[i_b, start:end, i_h]
        destination.memory.copy_(tile)
        barrier.update(0, -tile.nbytes)

    destination.memory.fill_(torch.nan)
    threading.Thread(target=copy).start()


class Product:
    """A product in flight; it reads its operands when it is waited for, at the latest moment it may."""

    def __init__(self, left: object, right: SharedMemory, accumulator: object, use_acc: object) -> None:
        self.operands = left, right, accumulator, use_acc
        self.result: Tensor | None = None

    def finish(self) -> None:
        left, right, accumulator, use_acc = self.operands
        left = left.memory if isinstance(left, SharedMemory) else left
        self.result = _value(left.float() @ right.memory.float())
        if bool(use_acc):
            self.result = self.result + accumulator


def _warpgroup_mma(a: object, b: SharedMemory, acc: object, use_acc: object = True, is_async: bool = False) -> Product:
    _thread.products.append(Product(a, b, acc, use_acc))
    return _thread.products[-1]


def _warpgroup_mma_wait(in_flight: int, deps: list[object]) -> object:
    while len(_thread.products) > in_flight:
        _dawdle()
        _thread.products.pop(0).finish()
    results = [x.result if isinstance(x, Product) else x for x in deps]
    assert all(x is not None for x in results), "an accumulator is read before its wait"
    return results[0] if len(results) == 1 else tuple(results)


class _Constant(int):
    value = property(int)


class _Layout:
    def __init__(self, *arguments: object) -> None:
        pass

    @staticmethod
    def get_default_for(shape: list[int], dtype: object) -> None:
        pass


def _load(pointer: Pointer, mask: object = True, other: object = 0) -> Tensor:
    _dawdle()
    offset, mask = pointer.at(mask)
    return torch.where(mask, _value(pointer.memory[torch.where(mask, offset, 0)]), other)


def _store(pointer: Pointer, x: Tensor, mask: object) -> None:
    offset, mask = pointer.at(mask)
    pointer.memory[offset[mask].as_subclass(Tensor)] = x[mask].as_subclass(Tensor)


def _atomic_add(pointer: Pointer, x: int, sem: str) -> Tensor:
    with _atomic:
        before = pointer.memory[int(pointer.offset)].clone()
        pointer.memory[int(pointer.offset)] += x
    return _value(before)


def _allocate(dtype: torch.dtype, shape: list[int], layout: object) -> object:
    if layout is Barrier:
        barriers = Barriers(Barrier() for _ in range(shape[0]))
        return barriers if len(shape) > 1 else barriers[0]
    memory = torch.empty(shape, dtype=dtype)
    return SharedMemory(memory.fill_(torch.nan if dtype.is_floating_point else 123))


def _run_side_by_side(functions: list[object]) -> None:
    """Runs functions in threads; the first error ends all of them."""
    place = _thread.program, _thread.num_programs
    errors: list[str] = []

    def run(function: object, i: int) -> None:
        _thread.program, _thread.num_programs = place if place[1] else (i, len(functions))
        _thread.products = []
        try:
            function()
        except BaseException:
            errors.append(traceback.format_exc())
            _stop.set()

    threads = [threading.Thread(target=run, args=(function, i)) for i, function in enumerate(functions)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise RuntimeError(errors[0])


def _warp_specialize(partitions: list[tuple], num_warps: list[int], registers: list[int]) -> None:
    _run_side_by_side([lambda f=f, a=a: f(*a) for f, a in partitions])


_LANGUAGE = SimpleNamespace(
    **{name: getattr(torch, name) for name in ("int16", "int32", "int64", "float32", "log2")},
    **{name: _Layout for name in ("BlockedLayout", "SliceLayout", "NVMMADistributedLayout", "DotOperandLayout")},
    NVMMASharedLayout=lambda *a, **k: None,
    SwizzledSharedLayout=_Layout,
    constexpr=_Constant,
    to_tensor=_value,
    arange=lambda start, end, layout: _value(torch.arange(start, end)),
    full=lambda shape, x, dtype, layout: _value(torch.full(shape, float(x)).to(dtype)),
    zeros=lambda shape, dtype, layout: _value(torch.zeros(shape, dtype=dtype)),
    max=lambda x, axis: x.amax(axis),
    sum=lambda x, axis: x.sum(axis),
    minimum=lambda x, y: torch.minimum(*_same_dtype(x, y)),
    maximum=lambda x, y: torch.maximum(*_same_dtype(x, y)),
    where=lambda m, x, y: torch.where(_value(m), *_same_dtype(x, y)),
    expand_dims=lambda x, axis: x.unsqueeze(axis),
    convert_layout=lambda x, layout: x,
    inline_asm_elementwise=lambda assembly, constraints, x, **options: torch.exp2(x[0]),
    barrier=lambda: None,
    static_range=range,
    num_warps=lambda: 4,
    program_id=lambda axis: _value(_thread.program),
    num_programs=lambda axis: _value(_thread.num_programs),
    load=_load,
    store=_store,
    atomic_add=_atomic_add,
    allocate_shared_memory=_allocate,
    warp_specialize=_warp_specialize,
)
_LANGUAGE.NVMMASharedLayout.get_default_for = _Layout.get_default_for


class _Kernel:
    def __init__(self, function: object) -> None:
        self.function = function

    def __getitem__(self, grid: tuple[int]) -> object:
        def launch(*arguments: object, num_warps: int, **constants: object) -> None:
            values = [
                Pointer(x.view(-1)) if isinstance(x, Tensor) else x if isinstance(x, Descriptor) else _value(x)
                for x in arguments
            ]
            _stop.clear()
            _thread.program, _thread.num_programs = 0, 0
            _run_side_by_side([lambda: self.function(*values, **constants)] * grid[0])

        return launch


def load_emulated(path: Path, programs: int = 3) -> ModuleType:
    """The module at ``path`` with everything of Gluon replaced; ``programs`` stands for the multiprocessors."""
    source = re.sub(r"from triton\.experimental[^\n(]*(\([^)]*\))?\n", "", path.read_text())
    # variables that change in a loop are tensors in Gluon from the start
    source = re.sub(r"(?m)^(    +\w+ = )(\d+)$", r"\1gl.to_tensor(\2)", source)
    module = ModuleType("emulated_" + path.stem)
    names = module.__dict__
    names |= dict(gl=_LANGUAGE, mbarrier=_Mbarrier, tma=SimpleNamespace(async_load=_copy_tile))
    names |= dict(gluon=SimpleNamespace(jit=lambda function=None, **options: function or (lambda f: f)))
    names |= dict(warpgroup_mma=_warpgroup_mma, warpgroup_mma_wait=_warpgroup_mma_wait, TensorDescriptor=Descriptor)
    exec(compile(source, str(path), "exec"), names)
    names["attention_forward_kernel"] = _Kernel(names["attention_forward_kernel"])
    names["_multiprocessors"] = lambda device: programs
    return module
