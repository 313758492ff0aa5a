"""Block-sparse attention as an operator of torch: how it gets gradients and how torch.compile sees it.

The operator takes tensors and numbers only, so that autograd saves it and a compiled graph holds it as one node. Its
backend is chosen when it runs, not when it is traced.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from draftattn.kernels.backends import BackendName, choose_backend
from draftattn.kernels.block_mask import BlockMask, SlidingWindow
from draftattn.kernels.transposed import block_map_of, transposed_lists

if TYPE_CHECKING:
    from draftattn.kernels.api import BlockMeans

# these differentiate themselves
_DIFFERENTIABLE = ("reference", "cpu", "flex")

# what `_Call` holds
_ARGUMENTS = """
    Tensor query, Tensor key, Tensor value, Tensor? mean_key, Tensor? mean_value,
    Tensor kv_num_blocks, Tensor kv_indices, Tensor query_offsets, Tensor key_offsets, Tensor? block_map,
    Tensor? query_num_blocks, Tensor? query_indices, Tensor? query_shifts, Tensor? whole, Tensor? starts,
    int block_size, int largest_query_block, int? window_size, int sink,
    float scale, bool causal, bool return_lse, str backend
"""


class _Call(NamedTuple):
    """One call of the operator, flat, in the order of its schema."""

    query: Tensor
    key: Tensor
    value: Tensor
    mean_key: Tensor | None
    mean_value: Tensor | None
    kv_num_blocks: Tensor
    kv_indices: Tensor
    query_offsets: Tensor
    key_offsets: Tensor
    block_map: Tensor | None  # for the residual
    query_num_blocks: Tensor | None  # the transposed lists, for gradients
    query_indices: Tensor | None
    query_shifts: Tensor | None
    whole: Tensor | None
    starts: Tensor | None
    block_size: int
    largest_query_block: int
    window_size: int | None
    sink: int
    scale: float
    causal: bool
    return_lse: bool
    backend: str

    @property
    def block_mask(self) -> BlockMask:
        window = None
        if self.window_size is not None:
            window = SlidingWindow(self.window_size, self.sink, self.whole, self.starts)
        mask = BlockMask(
            kv_num_blocks=self.kv_num_blocks,
            kv_indices=self.kv_indices,
            query_offsets=self.query_offsets,
            key_offsets=self.key_offsets,
            block_size=self.block_size,
            query_block_size=self.largest_query_block,
            query_shifts=self.query_shifts,
            window=window,
        )
        if self.block_map is not None:
            mask.__dict__["block_map"] = self.block_map
        if self.query_num_blocks is not None:
            mask.__dict__["transposed_lists"] = (self.query_num_blocks, self.query_indices)
        return mask

    @property
    def residual(self) -> BlockMeans | None:
        from draftattn.kernels.api import BlockMeans

        if self.mean_key is None or self.mean_value is None:
            return None
        return BlockMeans(self.mean_key, self.mean_value)

    @property
    def inputs(self) -> list[Tensor]:
        """The tensors that have gradients."""
        return [self.query, self.key, self.value, *(self.residual or ())]

    @property
    def chosen(self) -> BackendName:
        return choose_backend(self.backend, self.query, self.key, self.value, self.residual, self.block_mask)  # type: ignore[arg-type]

    def forward(self) -> tuple[Tensor, Tensor | None]:
        from draftattn.kernels.api import _implementation

        return _implementation(self.chosen)(
            self.query, self.key, self.value, self.block_mask,
            scale=self.scale, causal=self.causal, residual=self.residual, return_lse=self.return_lse,
        )  # fmt: skip


def needs_operator(backend: BackendName, inputs: Sequence[Tensor]) -> bool:
    """Whether a call must go through the operator: it is being compiled, or its kernel's gradients are wanted.

    Without either, calling the backend directly spares the dispatch.

    >>> needs_operator("triton", [torch.zeros(1)]), needs_operator("triton", [torch.zeros(1, requires_grad=True)])
    (False, True)
    """
    if torch.compiler.is_compiling():
        return True
    wants_gradient = torch.is_grad_enabled() and any(x.requires_grad for x in inputs)
    return wants_gradient and backend not in _DIFFERENTIABLE


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    block_mask: BlockMask,
    *,
    scale: float,
    causal: bool,
    residual: BlockMeans | None,
    return_lse: bool,
    backend: BackendName,
) -> tuple[Tensor, Tensor | None]:
    """``block_sparse_attention`` through the operator; ``backend`` may be ``"auto"``.

    Gradients come from the Triton backward where the forward is a kernel of ours, and from running the forward once
    more under autograd for backends that differentiate themselves.
    """
    mean_key, mean_value = (None, None) if residual is None else residual
    inputs = [query, key, value, *(residual or ())]
    wants_gradient = torch.is_grad_enabled() and any(x.requires_grad for x in inputs)
    query_num_blocks, query_indices = transposed_lists(block_mask) if wants_gradient else (None, None)
    window = block_mask.window
    call = _Call(
        query, key, value, mean_key, mean_value,
        block_mask.kv_num_blocks, block_mask.kv_indices, block_mask.query_offsets, block_mask.key_offsets,
        None if residual is None else block_map_of(block_mask),
        query_num_blocks, query_indices, block_mask.query_shifts,
        None if window is None else window.whole,
        None if window is None else window.starts,
        block_mask.block_size, block_mask.largest_query_block,
        None if window is None else window.size,
        0 if window is None else window.sink,
        scale, causal, return_lse or wants_gradient, backend,
    )  # fmt: skip
    out, lse = _attention(*call)
    return out, lse if return_lse else None


@torch.library.custom_op(
    "draftattn::block_sparse_attention", mutates_args=(), schema=f"({_ARGUMENTS}) -> (Tensor, Tensor)"
)
def _attention(*arguments: Any) -> tuple[Tensor, Tensor]:
    call = _Call(*arguments)
    with torch.no_grad():
        out, lse = call.forward()
    return out.contiguous(), call.query.new_empty(0, dtype=torch.float32) if lse is None else lse.contiguous()


@_attention.register_fake
def _attention_fake(*arguments: Any) -> tuple[Tensor, Tensor]:
    call = _Call(*arguments)
    batch, length, heads, _ = call.query.shape
    lse_shape = (batch, heads, length) if call.return_lse else (0,)
    return call.query.new_empty(call.query.shape), call.query.new_empty(lse_shape, dtype=torch.float32)


@torch.library.custom_op(
    "draftattn::block_sparse_attention_backward",
    mutates_args=(),
    schema=f"(Tensor grad_out, Tensor grad_lse, Tensor out, Tensor lse, {_ARGUMENTS}) -> Tensor[]",
)
def _attention_backward(grad_out: Tensor, grad_lse: Tensor, out: Tensor, lse: Tensor, *arguments: Any) -> list[Tensor]:
    call = _Call(*arguments)
    if call.chosen in _DIFFERENTIABLE:
        return _gradients_by_recomputation(call, grad_out, grad_lse)
    from draftattn.kernels.triton_backward import attention_backward

    gradients = attention_backward(
        grad_out, grad_lse, call.query, call.key, call.value, out, lse, call.block_mask,
        scale=call.scale, causal=call.causal, residual=call.residual,
    )  # fmt: skip
    return [x for x in gradients if x is not None]


@_attention_backward.register_fake
def _attention_backward_fake(
    grad_out: Tensor, grad_lse: Tensor, out: Tensor, lse: Tensor, *arguments: Any
) -> list[Tensor]:
    return [x.new_empty(x.shape) for x in _Call(*arguments).inputs]


def _gradients_by_recomputation(call: _Call, grad_out: Tensor, grad_lse: Tensor) -> list[Tensor]:
    with _autograd_inside_an_operator():
        leaves = [x.detach().requires_grad_() for x in call.inputs]
        means = leaves[3:] or (None, None)
        out, lse = call._replace(**dict(zip(call._fields, (*leaves[:3], *means), strict=False))).forward()
        assert lse is not None
        gradients = torch.autograd.grad((out, lse), leaves, (grad_out, grad_lse), materialize_grads=True)
    return [x.contiguous() for x in gradients]


@contextlib.contextmanager
def _autograd_inside_an_operator() -> Iterator[None]:
    # torch switches autograd off there, and has no public way to switch it on (torch.func breaks tolist in torch 2.6)
    with torch._C._PreserveDispatchKeyGuard(), torch.enable_grad():
        torch._C._dispatch_tls_set_dispatch_key_excluded(torch._C.DispatchKey.AutogradFunctionality, False)
        yield


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    tensors = [x if isinstance(x, Tensor) else None for x in inputs]
    ctx.save_for_backward(*output, *tensors)
    ctx.numbers = [None if isinstance(x, Tensor) else x for x in inputs]


def _differentiate(ctx: Any, grad_out: Tensor, grad_lse: Tensor) -> tuple[Tensor | None, ...]:
    out, lse, *tensors = ctx.saved_tensors
    arguments = [number if x is None else x for x, number in zip(tensors, ctx.numbers, strict=True)]
    gradients = _attention_backward(grad_out, grad_lse, out, lse, *arguments)
    return *gradients, *[None] * (len(arguments) - len(gradients))


_attention.register_autograd(_differentiate, setup_context=_save)
