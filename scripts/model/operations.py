"""The decoder's operations and their gradients, on GPUs and on CPUs. Knows tensors; no layers and no configuration.

Shape letters are decoder.py's. Each operation keeps little for its backward: what is cheap to compute again is computed again.
On a CPU the variants named `_Host...` work on HOST_CHUNK_ROWS rows at a time, which stay in the cache. What `kernel` marks is
compiled by torch.compile where `compile_kernels` asks for it: fewer passes over the same tensors.
"""

import math
from collections.abc import Callable
from functools import wraps
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from scripts.config import COMPILER_OPTIONS, HOST_CHUNK_ROWS, KERNEL_VARIANTS

_bodies: dict[Callable, bool] = {}
_compiled: dict[Callable, Callable] = {}


class Normed(NamedTuple):
    """Rows divided by their root mean square, (..., K), and the scale of each row, 1 / rms, (..., 1) float32."""

    rows: Tensor
    scale: Tensor


class NormGradients(NamedTuple):
    """The gradients of a norm's input, (..., K), and of its gain, (K,)."""

    x: Tensor
    gain: Tensor


def kernel(*, any_shape: bool) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Marks a function of tensors for `compile_kernels`. A function that adds up rows is compiled for each shape anew: one for
    `any_shape` would add in an order that depends on the first shape that it met.
    """

    def mark(body: Callable[..., Any]) -> Callable[..., Any]:
        _bodies[body] = any_shape
        return wraps(body)(lambda *inputs: _compiled.get(body, body)(*inputs))

    return mark


def compile_kernels(is_wanted: bool) -> None:
    """From now on this process runs what `kernel` marks as torch.compile makes it at the first call, or as it is written.
    Raises RuntimeError where this torch does not know an option.
    """
    _compiled.clear()
    if is_wanted:
        _compiled.update({body: _as_compiled(body, any_shape) for body, any_shape in _bodies.items()})


def _as_compiled(body: Callable[..., Any], any_shape: bool) -> Callable[..., Any]:
    import torch._dynamo as tracer  # here alone: torch's compiler takes two seconds to load

    compiled = torch.compile(body, fullgraph=True, dynamic=any_shape, options=COMPILER_OPTIONS)

    def run(*inputs: Any) -> Any:
        if tracer.config.recompile_limit < KERNEL_VARIANTS:  # each thread has settings of its own, and so CUDA's backward
            tracer.config.recompile_limit = KERNEL_VARIANTS
        return compiled(*(each.detach() if isinstance(each, Tensor) else each for each in inputs))

    return run


def product_dtype(storage: torch.dtype, device: torch.device) -> torch.dtype:
    """The dtype of matrix products of `storage` tensors: their own, but float32 on a CPU that lacks 16-bit products.

    Such a CPU (no AVX-512, no AMX) takes 10 to 100 times longer in bfloat16 than in float32, which loses nothing.
    """
    if device.type == "cpu" and storage == torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return torch.float32
    return storage


def embed(ids: Tensor, table: nn.Embedding) -> Tensor:
    """Rows of the table: (B, T) int64 -> (B, T, D)."""
    return _HostEmbedding.apply(ids, table.weight) if on_host(table.weight) else table(ids)  # pyright: ignore


def normalise(x: Tensor, norm: nn.RMSNorm) -> Tensor:
    """norm(x) over the last dimension, (..., K) -> (..., K). The backward keeps x and one scale a row."""
    return _Norm.apply(x, norm.weight, norm.eps)  # pyright: ignore[reportReturnType]


def normed_products(x: Tensor, norm: nn.RMSNorm, *layers: nn.Linear) -> tuple[Tensor, ...]:
    """layer(norm(x)) for each layer: (B, T, D) -> (B, T, out) each. The backward keeps x alone."""
    function = _HostNormedProducts if on_host(x) else _NormedProducts
    return function.apply(x, norm.weight, norm.eps, *(layer.weight for layer in layers))  # pyright: ignore[reportReturnType]


def gated_product(gate: Tensor, up: Tensor, layer: nn.Linear) -> Tensor:
    """layer(silu(gate) * up): (B, T, F) twice -> (B, T, D). The backward keeps gate and up alone."""
    function = _HostGatedProduct if on_host(gate) else _GatedProduct
    return function.apply(gate, up, layer.weight)  # pyright: ignore[reportReturnType]


def product(x: Tensor, layer: nn.Linear) -> Tensor:
    """layer(x), computed in `product_dtype`: (B, T, in) -> (B, T, out)."""
    dtype = product_dtype(x.dtype, x.device) if on_host(x) else x.dtype
    return functional.linear(x, layer.weight) if dtype == x.dtype else _HostProduct.apply(x, layer.weight, dtype)  # pyright: ignore


def rotate(x: Tensor, rotary: Tensor) -> Tensor:
    """Rotates the pairs (i, i + K/2) of x (B, H, T, K) by their position's angle, in float32; the backward needs no x."""
    return _Rotation.apply(x, rotary)  # pyright: ignore[reportReturnType]


def rotate_(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """`rotate` in place, for x (B, H, T, K) float32."""
    first, second = x.chunk(2, dim=-1)
    rotated = second * sin
    second.mul_(cos).addcmul_(first, sin)
    first.mul_(cos).sub_(rotated)
    return x


def on_host(x: Tensor) -> bool:
    """Whether x lies in host memory, so that the variants for CPUs compute."""
    return x.device.type == "cpu"


def row_slices(num_rows: int, rows_at_once: int) -> list[slice]:
    """Cuts `num_rows` rows into slices of `rows_at_once`; the last one may be shorter."""
    return [slice(start, start + rows_at_once) for start in range(0, num_rows, rows_at_once)]


def rms_norm(x: Tensor, gain: Tensor, eps: float) -> Normed:
    """gain * x / rms(x) over the last dimension (Zhang & Sennrich 2019): (..., K), (K,) -> (..., K) and the rows' scales."""
    if x.device.type == "cuda":
        return Normed(*torch.ops.aten._fused_rms_norm(x, [x.shape[-1]], gain, eps))
    normed = Normed(torch.empty_like(x), x.new_empty(*x.shape[:-1], 1, dtype=torch.float32))
    flat, outputs, scales = x.flatten(0, -2), normed.rows.flatten(0, -2), normed.scale.flatten(0, -2)
    for rows in row_slices(len(flat), HOST_CHUNK_ROWS * _rows_of_token(x)):
        unit, scales[rows] = _unit_rows(flat[rows].float(), eps)
        outputs[rows] = unit.mul_(gain)
    return normed


def rms_norm_gradients(gradient: Tensor, x: Tensor, gain: Tensor, scale: Tensor) -> NormGradients:
    """The gradients of x and of gain, from the gradient (..., K) of `rms_norm`'s rows and from their scales."""
    if x.device.type == "cuda":
        return NormGradients(*torch.ops.aten._fused_rms_norm_backward(gradient, x, [x.shape[-1]], scale, gain, [True, True]))
    grad_x, grad_gain = torch.empty_like(x), torch.zeros_like(gain, dtype=torch.float32)
    flat, gradients, scales, outputs = (each.flatten(0, -2) for each in (x, gradient, scale, grad_x))
    for rows in row_slices(len(flat), HOST_CHUNK_ROWS * _rows_of_token(x)):
        unit, inner = flat[rows].float() * scales[rows], gradients[rows].to(torch.float32, copy=True)
        outputs[rows] = _norm_gradient_(inner, unit, gain, scales[rows], grad_gain)
    return NormGradients(grad_x, grad_gain.to(gain.dtype))


class _HostEmbedding(torch.autograd.Function):
    """Adds up a token's gradients in float32. On a CPU torch adds in bfloat16, where a frequent token's sum stops growing."""

    @staticmethod
    def forward(ctx, ids: Tensor, table: Tensor) -> Tensor:
        ctx.save_for_backward(ids)
        ctx.shape, ctx.dtype = table.shape, table.dtype
        return functional.embedding(ids, table)

    @staticmethod
    def backward(ctx, gradient: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        total = gradient.new_zeros(ctx.shape, dtype=torch.float32)
        return None, total.index_add_(0, ctx.saved_tensors[0].flatten(), gradient.flatten(0, 1).float()).to(ctx.dtype)


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, gain: Tensor, eps: float) -> Tensor:
        normed, scale = rms_norm(x, gain, eps)
        ctx.save_for_backward(x, gain, scale)
        return normed

    @staticmethod
    def backward(ctx, gradient: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        return *rms_norm_gradients(gradient, *ctx.saved_tensors), None


class _NormedProducts(torch.autograd.Function):
    """RMSNorm and several products of its result. The backward computes the norm again and writes gradients over it."""

    @staticmethod
    def forward(ctx, x: Tensor, gain: Tensor, eps: float, *weights: Tensor) -> tuple[Tensor, ...]:
        ctx.save_for_backward(x, gain, *weights)
        ctx.eps = eps
        normed = rms_norm(x, gain, eps).rows
        return tuple(functional.linear(normed, weight) for weight in weights)

    @staticmethod
    def backward(ctx, *gradients: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        x, gain, *weights = ctx.saved_tensors
        normed, scale = rms_norm(x, gain, ctx.eps)
        inner, pieces = normed.flatten(0, -2), [gradient.flatten(0, -2) for gradient in gradients]
        grads = [piece.T @ inner for piece in pieces]
        torch.mm(pieces[0], weights[0], out=inner)
        for piece, weight in zip(pieces[1:], weights[1:], strict=True):
            inner.addmm_(piece, weight)
        return *rms_norm_gradients(inner.view_as(x), x, gain, scale), None, *grads


class _HostNormedProducts(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, gain: Tensor, eps: float, *weights: Tensor) -> tuple[Tensor, ...]:
        ctx.save_for_backward(x, gain, *weights)
        ctx.eps = eps
        dtype = product_dtype(x.dtype, x.device)
        flat, matrices = x.flatten(0, -2), [weight.to(dtype) for weight in weights]
        outputs = [x.new_empty(len(flat), len(weight)) for weight in weights]
        for rows in row_slices(len(flat), HOST_CHUNK_ROWS):
            normed = _unit_rows(flat[rows].float(), eps).rows.mul_(gain).to(dtype)
            for output, matrix in zip(outputs, matrices, strict=True):
                _write_product(output[rows], normed, matrix.T)
        return tuple(output.view(*x.shape[:-1], -1) for output in outputs)

    @staticmethod
    def backward(ctx, *gradients: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        x, gain, *weights = ctx.saved_tensors
        dtype = product_dtype(x.dtype, x.device)
        flat, grad_x, matrices = x.flatten(0, -2), torch.empty_like(x), [weight.to(dtype) for weight in weights]
        grad_gain, *grads = (torch.zeros_like(weight, dtype=torch.float32) for weight in (gain, *weights))
        for rows in row_slices(len(flat), HOST_CHUNK_ROWS):
            unit, scale = _unit_rows(flat[rows].float(), ctx.eps)
            normed, inner = (unit * gain).to(dtype), torch.zeros_like(unit)
            for gradient, matrix, grad in zip(gradients, matrices, grads, strict=True):
                piece = gradient.flatten(0, -2)[rows].to(dtype)
                _add_product_(grad, piece.T, normed)
                _add_product_(inner, piece, matrix)
            grad_x.flatten(0, -2)[rows] = _norm_gradient_(inner, unit, gain, scale, grad_gain)
        return grad_x, grad_gain.to(gain.dtype), None, *(grad.to(gain.dtype) for grad in grads)


class _GatedProduct(torch.autograd.Function):
    """(silu(gate) * up) @ weight.T. Beside gate and up the backward has two tensors of their size, and returns these two."""

    @staticmethod
    def forward(ctx, gate: Tensor, up: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up, weight)
        return functional.linear(_gated(gate.flatten(0, -2), up.flatten(0, -2)).view_as(gate), weight)

    @staticmethod
    def backward(ctx, gradient: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        gate, up, weight = ctx.saved_tensors
        gates, ups, piece = (each.flatten(0, -2) for each in (gate, up, gradient))
        inner = _gated(gates, ups)
        grad = piece.T @ inner
        torch.mm(piece, weight, out=inner)
        grad_up = _gate_gradients_(inner, gates, ups)
        return inner.view_as(gate), grad_up.view_as(up), grad


class _HostGatedProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate: Tensor, up: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up, weight)
        dtype = product_dtype(gate.dtype, gate.device)
        gates, ups, matrix = gate.flatten(0, -2), up.flatten(0, -2), weight.to(dtype)
        output = gate.new_empty(len(gates), len(weight))
        for rows in row_slices(len(gates), HOST_CHUNK_ROWS):
            _write_product(output[rows], functional.silu(gates[rows].float()).mul_(ups[rows]).to(dtype), matrix.T)
        return output.view(*gate.shape[:-1], -1)

    @staticmethod
    def backward(ctx, gradient: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        gate, up, weight = ctx.saved_tensors
        dtype = product_dtype(gate.dtype, gate.device)
        grad, grad_gate, grad_up = torch.zeros_like(weight, dtype=torch.float32), torch.empty_like(gate), torch.empty_like(up)
        gates, ups, matrix = gate.flatten(0, -2), up.flatten(0, -2), weight.to(dtype)
        for rows in row_slices(len(gates), HOST_CHUNK_ROWS):
            wide_gate, wide_up, piece = gates[rows].float(), ups[rows].float(), gradient.flatten(0, -2)[rows].to(dtype)
            active, inner = functional.silu(wide_gate), (piece @ matrix).float()
            _add_product_(grad, piece.T, (active * wide_up).to(dtype))
            grad_up.flatten(0, -2)[rows] = active.mul_(inner)
            grad_gate.flatten(0, -2)[rows] = torch.ops.aten.silu_backward(inner.mul_(wide_up), wide_gate)
        return grad_gate, grad_up, grad.to(weight.dtype)


class _HostProduct(torch.autograd.Function):
    """x @ weight.T with both cast to `dtype`. The backward keeps both uncast."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.dtype = dtype
        return functional.linear(x.to(dtype), weight.to(dtype)).to(x.dtype)

    @staticmethod
    def backward(ctx, gradient: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        x, weight = ctx.saved_tensors
        flat = gradient.flatten(0, -2).to(ctx.dtype)
        grad_weight = flat.T @ x.flatten(0, -2).to(ctx.dtype)
        return (flat @ weight.to(ctx.dtype)).to(x.dtype).view_as(x), grad_weight.to(weight.dtype), None


class _Rotation(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, rotary: Tensor) -> Tensor:
        ctx.save_for_backward(rotary)
        return _rotated(x, *rotary)

    @staticmethod
    def backward(ctx, gradient: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        cos, sin = ctx.saved_tensors[0]
        return _rotated(gradient, cos, -sin), None


@kernel(any_shape=True)
def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """`rotate_` of a copy, in the dtype of x."""
    return rotate_(x.to(torch.float32, copy=True), cos, sin).to(x.dtype)


@kernel(any_shape=True)
def _gated(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up, all of one shape."""
    return functional.silu(gate).mul_(up)


@kernel(any_shape=True)
def _gate_gradients_(gradient: Tensor, gate: Tensor, up: Tensor) -> Tensor:
    """The gradient of `up` from that of `_gated`, over which that of `gate` is written."""
    grad_up = functional.silu(gate).mul_(gradient)
    torch.ops.aten.silu_backward.grad_input(gradient.mul_(up), gate, grad_input=gradient)
    return grad_up


def _unit_rows(x: Tensor, eps: float) -> Normed:
    """x / rms(x) and the scales 1 / rms(x), for x (rows, K) float32."""
    scale = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_().div_(x.shape[-1]).add_(eps).rsqrt_()
    return Normed(x * scale, scale)


def _rows_of_token(x: Tensor) -> int:
    """How many rows x has for each token: 1, or its heads in (B, T, H, K)."""
    return math.prod(x.shape[2:-1])


def _write_product(target: Tensor, left: Tensor, right: Tensor) -> None:
    """Writes left @ right into `target`, without a copy if all have its dtype."""
    if left.dtype == target.dtype:
        torch.mm(left, right, out=target)
    else:
        target.copy_(left @ right)


def _add_product_(total: Tensor, left: Tensor, right: Tensor) -> None:
    """Adds left @ right to `total`, which is float32; in one pass if they are too."""
    if left.dtype == total.dtype:
        total.addmm_(left, right)
    else:
        total += left @ right


def _norm_gradient_(gradient: Tensor, unit: Tensor, gain: Tensor, scale: Tensor, grad_gain: Tensor) -> Tensor:
    """The gradient of x from that of gain * unit, where unit = x * scale (rows, K); it takes the memory of `gradient`. The
    gain's is added to `grad_gain`.
    """
    both = gradient * unit
    grad_gain += both.sum(0)
    along = torch.mv(both, gain.float()).div_(unit.shape[-1]).unsqueeze(-1)
    return gradient.mul_(gain).addcmul_(unit, along, value=-1).mul_(scale)
