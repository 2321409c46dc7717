"""Depthwise convolution with large kernels: one call, three ways to compute it, chosen by shape and device.

    y[n, c, i] = sum_m k[c, m] x[n, c, i + m - padding]        (2-D; cross-correlation, as ``F.conv2d``)

native    ``F.conv2d``. The choice on every device but the CPU, for strides and for formats below float32.
toeplitz  The kernel of a channel as the matrix [H W, Ho Wo] from input to output plane (doubly blocked
          Toeplitz), then one batched matrix product. Exact as the native way; memory C (H W) (Ho Wo).
fft       Correlation theorem on the smallest 2-3-5-smooth grid of at least H + padding points (taps that wrap
          round only meet zeros). The error is that of a float32 FFT, some 1e-7 of the output's scale.

On a CPU the native backward pass of large depthwise kernels is slow by an order of magnitude or more. The
rule (``method_for``) was measured on one AVX2 and on one AVX512 core, forward and backward, in both memory
formats. Imports torch.
"""

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

MIN_AREA = 81  # smaller kernels stay native ...
MIN_AREA_FFT_CHANNELS_LAST = 225  # ... and on larger channels-last maps, where the native way is faster, up to here
TOEPLITZ_PIXELS = 144  # input pixels up to which the matrix of a channel is the fastest way


def output_size(size: int, kernel: int, padding: int, stride: int = 1) -> int:
    """Return the output length of a convolution along one axis."""
    return (size + 2 * padding - kernel) // stride + 1


def method_for(x_NCHW: torch.Tensor, kernel_C1hw: torch.Tensor, stride: tuple[int, int] = (1, 1)) -> str:
    """Return "native", "toeplitz" or "fft" for a depthwise convolution.

    native: not on a CPU, a stride above 1, below float32, several outputs a channel, or a kernel area below
    ``MIN_AREA`` (``MIN_AREA_FFT_CHANNELS_LAST`` where FFT would be taken in that memory format). toeplitz: at
    most ``TOEPLITZ_PIXELS`` input pixels. fft: larger maps.
    """
    low = x_NCHW.dtype not in (torch.float32, torch.float64) or torch.is_autocast_enabled("cpu")
    several = kernel_C1hw.shape[0] != x_NCHW.shape[1]
    way = "toeplitz" if x_NCHW.shape[-2] * x_NCHW.shape[-1] <= TOEPLITZ_PIXELS else "fft"
    least = MIN_AREA_FFT_CHANNELS_LAST if way == "fft" and _channels_last(x_NCHW) else MIN_AREA
    small = kernel_C1hw.shape[-2] * kernel_C1hw.shape[-1] < least
    if x_NCHW.device.type != "cpu" or tuple(stride) != (1, 1) or low or several or small:
        return "native"
    return way


def depthwise_conv2d(
    x_NCHW: torch.Tensor,
    kernel_C1hw: torch.Tensor,
    bias_C: torch.Tensor | None = None,
    stride: tuple[int, int] = (1, 1),
    padding: tuple[int, int] = (0, 0),
    method: str = "auto",
) -> torch.Tensor:
    """Return ``F.conv2d(x, kernel, bias, stride, padding, groups=C)``, computed the way ``method`` says.

    ``method`` is "auto" (the rule of ``method_for``), "native", "toeplitz" or "fft"; the last two take stride
    1 and one output a channel. The result keeps the memory format of the input. Gradients once; no second
    derivative through "toeplitz" and "fft". Raises ``ValueError`` for another word.
    """
    if method == "auto":
        method = method_for(x_NCHW, kernel_C1hw, stride)
    if method == "native":
        return F.conv2d(x_NCHW, kernel_C1hw, bias_C, stride, padding, groups=x_NCHW.shape[1])
    if method not in ("toeplitz", "fft"):
        raise ValueError(f"method={method!r} is not valid; choose one of auto, native, toeplitz, fft")
    if tuple(stride) != (1, 1) or kernel_C1hw.shape[0] != x_NCHW.shape[1]:
        raise ValueError(f"method={method!r} needs stride 1 and one output a channel; use 'native'")
    sizes = x_NCHW.shape[-2:]
    outs = [output_size(n, k, p) for n, k, p in zip(sizes, kernel_C1hw.shape[-2:], padding)]
    if min(outs) < 1 or x_NCHW.numel() == 0:  # torch's own errors, and its own empty results
        return F.conv2d(x_NCHW, kernel_C1hw, bias_C, stride, padding, groups=x_NCHW.shape[1])
    # Taps that never meet the image are cut: along n pixels only lags from -(out - 1) to n - 1 count.
    cuts = [
        (min(0, out - 1 - p), min(0, n + p - k)) for n, k, p, out in zip(sizes, kernel_C1hw.shape[-2:], padding, outs)
    ]
    kernel_Chw = F.pad(kernel_C1hw[:, 0], (*cuts[1], *cuts[0]))
    offsets = tuple(p + cut[0] for p, cut in zip(padding, cuts))
    way = _Toeplitz if method == "toeplitz" else _Fft
    y_NCHW = way.apply(x_NCHW, kernel_Chw, offsets, tuple(outs))
    return y_NCHW if bias_C is None else y_NCHW + bias_C[:, None, None]


def _channels_last(x_NCHW: torch.Tensor) -> bool:
    return x_NCHW.is_contiguous(memory_format=torch.channels_last) and not x_NCHW.is_contiguous()


def _like(y_NCHW: torch.Tensor, last: bool) -> torch.Tensor:
    """Return ``y`` in channels-last memory format, or contiguous."""
    if not last:
        return y_NCHW.contiguous()
    # The transposing copy of a matrix is several times faster than ``contiguous(memory_format=torch.channels_last)``.
    y_NPC = y_NCHW.flatten(2).transpose(1, 2).contiguous()
    return y_NPC.transpose(1, 2).unflatten(2, y_NCHW.shape[2:])


class _Toeplitz(torch.autograd.Function):
    """y = x T with T[c, u, v, i, j] = kernel[c, u - i + offset, v - j + offset], zero outside the kernel."""

    @staticmethod
    def _matrix(kernel_Chw, sizes, offsets, outs):
        (H, W), (Ho, Wo), (top, left), (h, w) = sizes, outs, offsets, kernel_Chw.shape[1:]
        lags_CLM = F.pad(kernel_Chw, (Wo - 1 - left, W + left - w, Ho - 1 - top, H + top - h)).contiguous()
        C, L, M = lags_CLM.shape
        # The view walks the lags forwards in i and j; the flip turns them round while it copies.
        view = lags_CLM.as_strided((C, H, W, Ho, Wo), (L * M, M, 1, M, 1))
        return view.flip(3, 4).reshape(C, H * W, Ho * Wo)

    @staticmethod
    def forward(ctx, x_NCHW, kernel_Chw, offsets, outs):
        ctx.last, x_NCHW = _channels_last(x_NCHW), x_NCHW.contiguous()  # a batched product of strided planes crawls
        ctx.save_for_backward(x_NCHW, kernel_Chw)
        ctx.offsets, ctx.outs = offsets, outs
        N, C, H, W = x_NCHW.shape
        x_CNP = x_NCHW.reshape(N, C, H * W).transpose(0, 1)
        y_CNQ = torch.bmm(x_CNP, _Toeplitz._matrix(kernel_Chw, (H, W), offsets, outs))
        return _like(y_CNQ.transpose(0, 1).reshape(N, C, *outs), ctx.last)

    @staticmethod
    @once_differentiable
    def backward(ctx, g_NCHW):
        x_NCHW, kernel_Chw = ctx.saved_tensors
        (N, C, H, W), (Ho, Wo), (h, w) = x_NCHW.shape, ctx.outs, kernel_Chw.shape[1:]
        g_NCHW = g_NCHW.contiguous()  # once for both products
        g_CNQ = g_NCHW.reshape(N, C, Ho * Wo).transpose(0, 1)
        grad_x = grad_kernel = None
        if ctx.needs_input_grad[0]:
            matrix = _Toeplitz._matrix(kernel_Chw, (H, W), ctx.offsets, ctx.outs)  # rebuilt: cheaper than to keep
            grad_x = torch.bmm(g_CNQ, matrix.transpose(1, 2)).transpose(0, 1).reshape(N, C, H, W)
            grad_x = _like(grad_x, ctx.last)
        if ctx.needs_input_grad[1]:
            x_CPN = x_NCHW.reshape(N, C, H * W).permute(1, 2, 0)
            turned_CNQ = g_NCHW.flip(2, 3).reshape(N, C, Ho * Wo).transpose(0, 1)  # so that lags grow with u + i
            pairs = torch.bmm(x_CPN, turned_CNQ).reshape(C, H, W, Ho, Wo)
            rows = pairs.new_zeros(C, H, Ho, W + Wo - 1)  # summed over equal v + j, one column at a time
            for v in range(W):
                rows[..., v : v + Wo] += pairs[:, :, v]
            lags = pairs.new_zeros(C, H + Ho - 1, W + Wo - 1)
            for u in range(H):
                lags[:, u : u + Ho] += rows[:, u]
            top, left = ctx.offsets
            grad_kernel = lags[:, Ho - 1 - top :, Wo - 1 - left :][:, :h, :w]
        return grad_x, grad_kernel, None, None


def _smooth(least: int) -> int:
    """Return the smallest even 2-3-5-smooth number from ``least`` on: a good length for a real FFT."""
    n = least + least % 2
    while True:
        rest = n
        for prime in (2, 3, 5):
            while rest % prime == 0:
                rest //= prime
        if rest == 1:
            return n
        n += 2


class _Fft(torch.autograd.Function):
    """y = irfft2(rfft2(x) conj(rfft2(kernel))) on a grid of L >= size + offset points, where nothing wraps on
    the output."""

    @staticmethod
    def forward(ctx, x_NCHW, kernel_Chw, offsets, outs):
        grid = [
            _smooth(max(n + p, out, out + k - 1 - p))
            for n, k, p, out in zip(x_NCHW.shape[2:], kernel_Chw.shape[1:], offsets, outs)
        ]
        ctx.last = _channels_last(x_NCHW)
        fx = torch.fft.rfft2(x_NCHW.contiguous(), s=grid)
        at_lags = F.pad(kernel_Chw, (0, grid[1] - kernel_Chw.shape[2], 0, grid[0] - kernel_Chw.shape[1]))
        fk = torch.fft.rfft2(at_lags.roll((-offsets[0], -offsets[1]), (1, 2)))
        ctx.save_for_backward(x_NCHW, fx if ctx.needs_input_grad[1] else None, fk)
        ctx.kernel_shape, ctx.offsets, ctx.grid = kernel_Chw.shape, offsets, grid
        y = torch.fft.irfft2(fx * fk.conj(), s=grid)
        return _like(y[..., : outs[0], : outs[1]], ctx.last)

    @staticmethod
    @once_differentiable
    def backward(ctx, g_NCHW):
        x_NCHW, fx, fk = ctx.saved_tensors
        fg = torch.fft.rfft2(g_NCHW.contiguous(), s=ctx.grid)
        grad_x = grad_kernel = None
        if ctx.needs_input_grad[0]:
            back = torch.fft.irfft2(fg * fk, s=ctx.grid)
            grad_x = _like(back[..., : x_NCHW.shape[2], : x_NCHW.shape[3]], ctx.last)
        if ctx.needs_input_grad[1]:
            lags = torch.fft.irfft2((fg.conj() * fx).sum(0), s=ctx.grid)
            _, h, w = ctx.kernel_shape
            grad_kernel = lags.roll(ctx.offsets, (1, 2))[:, :h, :w]
        return grad_x, grad_kernel, None, None
