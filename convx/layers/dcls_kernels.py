"""Kernel construction of DCLS: K taps at real positions become a dense kernel [O, I, h, w]. Imports torch.

Khalfaoui-Hassani et al., arXiv 2112.03740 (bilinear) and arXiv 2306.00817 (triangle, Gaussian). With the
centre c = s // 2 and p = position + c, every interpolation is separable per tap:

    kernel[y, x] = sum_k w_k a_k(y) b_k(x) / Z_k
    bilinear   a(y) = max(0, 1 - |y - p|),                                Z = 1
    triangle   a(y) = max(0, sigma - |y - p|),    sigma = |raw| + 1,      Z = (sum a)(sum b) + 1e-7
    gauss      a(y) = exp(-((y - p) / sigma)^2/2), sigma = |raw| + 0.27,  Z as above

Positions are (y, x) for every interpolation and every kernel shape. Inside, p is clamped to [0, s - 1]: no
mass is lost, even at even sizes. At kinks the derivative is the one-sided one that points into the kernel, so
that a tap on the border or on the integer grid, and a raw width of 0, still have a gradient (the original has
none for the triangle). Gradients are written by hand: one pass over [O I, K, s_h + s_w] numbers instead of
several over [O I, K, s_h, s_w]. First derivatives only.
"""

import torch
from torch.autograd.function import once_differentiable

from .dcls_spacings import limits

SIGMA_FLOOR = {"bilinear": None, "triangle": 1.0, "gauss": 0.27}
EPSILON = 1e-7  # in Z, as in the original


def build_kernel(weight_OIK, positions_2OIK, sigma_2OIK, size, interpolation, method="auto"):
    """Return the dense kernel [O, I, h, w] of ``size`` (h, w); differentiable in weight, positions and sigma.

    ``sigma`` is the raw width (see above), None for "bilinear". ``method`` "scatter" (bilinear only) adds
    four corners a tap, "separable" is a batched matrix product; "auto" scatters bilinear taps on the CPU,
    where it is the faster one, and takes the product elsewhere, since a scattered sum has no fixed order on a
    GPU.
    """
    if method == "auto":
        on_cpu = weight_OIK.device.type == "cpu"
        method = "scatter" if interpolation == "bilinear" and on_cpu else "separable"
    if method == "scatter" and interpolation == "bilinear":
        return _Scatter.apply(weight_OIK, positions_2OIK, size)
    if method != "separable":
        raise ValueError(f"method={method!r} is not valid for {interpolation}; choose auto or separable")
    return _Separable.apply(weight_OIK, positions_2OIK, sigma_2OIK, size, interpolation)


def _inside(positions_2CK, size):
    """Return p clamped to the kernel, [2, C, K], and where a tap was outside or has nowhere to go."""
    p = torch.empty_like(positions_2CK)
    for axis, s in enumerate(size):
        torch.clamp(positions_2CK[axis], *limits(s), out=p[axis])
    outside = p != positions_2CK
    for axis, s in enumerate(size):
        p[axis] -= limits(s)[0]
        if s == 1:
            outside[axis] = True
    return p, outside


class _Scatter(torch.autograd.Function):
    """Bilinear taps: the four cells around each tap, added up on a canvas of at least 2x2."""

    @staticmethod
    def forward(ctx, weight_OIK, positions_2OIK, size):
        outputs, inputs, K = weight_OIK.shape
        weight_CK, positions_2CK = weight_OIK.reshape(-1, K), positions_2OIK.reshape(2, -1, K)
        p, outside = _inside(positions_2CK, size)
        high, wide = max(size[0], 2), max(size[1], 2)
        corner = p.floor()
        # The last cell is reached with residual 1, so that its derivative points inwards.
        corner[0].clamp_(max=high - 2)
        corner[1].clamp_(max=wide - 2)
        ry, rx = residual = p - corner
        first = torch.add(corner[1], corner[0], alpha=wide).long()
        cells = torch.cat([first, first + 1, first + wide, first + (wide + 1)], 1)
        right, below = weight_CK * rx, weight_CK * ry
        both = below * rx
        values = torch.cat([weight_CK - below - right + both, right - both, below - both, both], 1)
        canvas = weight_CK.new_zeros(len(weight_CK), high * wide).scatter_add_(1, cells, values)
        ctx.save_for_backward(weight_CK, residual, cells, outside)
        ctx.shapes = weight_OIK.shape, positions_2OIK.shape, high, wide
        return canvas.view(outputs, inputs, high, wide)[:, :, : size[0], : size[1]]

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_OIhw):
        weight_CK, (ry, rx), cells, outside = ctx.saved_tensors
        weight_shape, positions_shape, high, wide = ctx.shapes
        pad = (0, wide - grad_OIhw.shape[3], 0, high - grad_OIhw.shape[2])
        grad = torch.nn.functional.pad(grad_OIhw, pad).reshape(len(weight_CK), high * wide)
        g00, g01, g10, g11 = grad.gather(1, cells).chunk(4, 1)
        top, bottom = torch.lerp(g00, g01, rx), torch.lerp(g10, g11, rx)
        grad_weight = torch.lerp(top, bottom, ry)
        along_x = torch.lerp(g01 - g00, g11 - g10, ry)
        grad_positions = torch.stack([bottom - top, along_x]).mul_(weight_CK).masked_fill_(outside, 0)
        return grad_weight.view(weight_shape), grad_positions.view(positions_shape), None


def _profile(p_CK, sigma_CK, size, interpolation):
    """Return a [C, K, s] of one axis, and the distances y - p."""
    t = torch.arange(size, dtype=p_CK.dtype, device=p_CK.device) - p_CK[..., None]
    if interpolation == "gauss":
        return (t / sigma_CK[..., None]).square_().mul_(-0.5).exp_(), t
    width = 1.0 if sigma_CK is None else sigma_CK[..., None]
    return (width - t.abs()).clamp_(min=0), t


def _slopes(a, t, p_CK, sigma_CK, size, interpolation):
    """Return da/dp and da/dsigma, [C, K, s]; at kinks the one-sided ones that point into the kernel."""
    if interpolation == "gauss":
        along = t * a / sigma_CK[..., None].square()
        return along, along * (t / sigma_CK[..., None])
    width = 1.0 if sigma_CK is None else sigma_CK[..., None]
    at_end = (p_CK >= size - 1)[..., None]
    falling = torch.where(at_end, t < 0, t <= 0) & torch.where(at_end, t >= -width, t > -width)
    rising = torch.where(at_end, t >= 0, t > 0) & torch.where(at_end, t < width, t <= width)
    return rising.to(a.dtype) - falling.to(a.dtype), (rising | falling).to(a.dtype)


class _Separable(torch.autograd.Function):
    """(w / Z a)^T b, a batched product [h, K] x [K, w]."""

    @staticmethod
    def forward(ctx, weight_OIK, positions_2OIK, sigma_2OIK, size, interpolation):
        outputs, inputs, K = weight_OIK.shape
        weight_CK = weight_OIK.reshape(-1, K)
        p, outside = _inside(positions_2OIK.reshape(2, -1, K), size)
        sigmas = (None, None)
        if sigma_2OIK is not None:
            sigmas = sigma_2OIK.reshape(2, -1, K).abs() + SIGMA_FLOOR[interpolation]
        (a, ta), (b, tb) = (_profile(p[i], sigmas[i], size[i], interpolation) for i in (0, 1))
        sums = a.sum(-1), b.sum(-1)
        inverse_CK = torch.ones_like(weight_CK)
        if interpolation != "bilinear":
            inverse_CK = (sums[0] * sums[1] + EPSILON).reciprocal_()
        scaled = a * (weight_CK * inverse_CK)[..., None]
        ctx.save_for_backward(weight_CK, p, outside, sigma_2OIK, a, b, ta, tb, *sums, inverse_CK)
        ctx.size, ctx.interpolation = size, interpolation
        ctx.shapes = weight_OIK.shape, positions_2OIK.shape
        return torch.bmm(scaled.transpose(1, 2), b).view(outputs, inputs, *size)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_OIhw):
        weight_CK, p, outside, raw_2OIK, a, b, ta, tb, sum_a, sum_b, inverse_CK = ctx.saved_tensors
        grad_Chw = grad_OIhw.reshape(-1, *ctx.size)
        seen_a = torch.bmm(b, grad_Chw.transpose(1, 2))  # [C, K, h]: what each row of a meets
        seen_b = torch.bmm(a, grad_Chw)
        mass_CK = (a * seen_a).sum(-1)
        grad_weight = mass_CK * inverse_CK
        scale_CK = weight_CK * inverse_CK
        normalised = ctx.interpolation != "bilinear"
        sigmas = (None, None)
        if raw_2OIK is not None:
            raw = raw_2OIK.reshape(p.shape)
            sigmas = raw.abs() + SIGMA_FLOOR[ctx.interpolation]
        grad_p, grad_s = torch.empty_like(p), torch.empty_like(p)
        for axis, own, t, seen, other in ((0, a, ta, seen_a, sum_b), (1, b, tb, seen_b, sum_a)):
            slopes = _slopes(own, t, p[axis], sigmas[axis], ctx.size[axis], ctx.interpolation)
            for slope, grad in zip(slopes, (grad_p, grad_s)):
                change = (slope * seen).sum(-1)
                if normalised:
                    change -= grad_weight * other * slope.sum(-1)
                torch.mul(change, scale_CK, out=grad[axis])
        grad_sigma = None
        if raw_2OIK is not None:  # d|raw|/draw at 0 is taken as 1: a width that starts at its floor can grow
            grad_sigma = torch.where(raw < 0, -grad_s, grad_s).view(ctx.shapes[1])
        grad_positions = grad_p.masked_fill_(outside, 0).view(ctx.shapes[1])
        return grad_weight.view(ctx.shapes[0]), grad_positions, grad_sigma, None, None
