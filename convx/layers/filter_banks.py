"""Banks of fixed spatial filters, drawn from a seed on the CPU in float32.

``iid_uniform``: PyTorch's default initialisation, U[-1, 1] / sqrt(fan_in) (arXiv 2301.11360, equation 3 and
appendix B). ``iid_normal``: the same variance. ``shared``: every layer's bank is the corner of one draw,
times the layer's own 1 / sqrt(fan_in) (appendix B). ``orthonormal``: F^T F = I, so that gradient descent on
the combinations is gradient descent on the kernel. ``covariance``: filters from N(0, S), S measured on a
trained network (Trockman, Willmott and Kolter, arXiv 2210.03651). ``edges_and_lines``: the fixed edge and
line profiles at four angles, both signs, of arXiv 2410.16897.

Uniform and edge banks have the same bits on every machine; the others may differ in a last bit between builds
of torch.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

BANKS = ("iid_uniform", "iid_normal", "shared", "orthonormal", "covariance", "edges_and_lines")


def draw_bank(
    kind: str,
    shape: tuple[int, int, int, int],
    seed: int,
    shared_shape: tuple[int, int] | None = None,
    root: Tensor | None = None,
) -> Tensor:
    """Return a bank of ``shape`` [M, c_in, k_h, k_w], float32 on the CPU; the global random state is not
    touched.

    ``shared_shape`` (M, c_in), for ``shared``: the size of the one draw that this bank is the corner of.
    ``root`` [k_h k_w, k_h k_w], for ``covariance``: R with R R^T = S; its scale is dropped, the variance is
    the default's. Raises ``ValueError`` for an unknown kind, or where the argument of a kind is missing.
    """
    filters, c_in, *kernel = shape
    area = math.prod(kernel)
    fan_in = c_in * area
    generator = torch.Generator(device="cpu").manual_seed(seed)
    if kind == "iid_uniform":
        return _uniform(shape, generator).div_(math.sqrt(fan_in))
    if kind == "shared":
        if shared_shape is None or shared_shape[0] < filters or shared_shape[1] < c_in:
            raise ValueError(f"shared_shape={shared_shape}: a shared bank must hold {filters} x {c_in} filters here")
        return _uniform((*shared_shape, *kernel), generator)[:filters, :c_in].div(math.sqrt(fan_in))
    if kind == "edges_and_lines":
        bank = edges_and_lines(*kernel)
        return bank.repeat(math.ceil(filters * c_in / len(bank)), 1, 1)[: filters * c_in].reshape(shape)
    if kind not in BANKS:
        raise ValueError(f"bank {kind!r} is unknown; the banks are {', '.join(BANKS)}")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the order of a sum must not follow the machine's cores
    try:
        if kind == "iid_normal":
            return torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu").div_(
                math.sqrt(3 * fan_in)
            )
        if kind == "orthonormal":
            return _orthonormal(filters, fan_in, generator).to(torch.float32).reshape(shape)
        if root is None or root.shape != (area, area):
            raise ValueError(f"bank 'covariance' needs root, the {area} x {area} root of the filters' covariance")
        draws = torch.randn((filters * c_in, area), generator=generator, dtype=torch.float64, device="cpu")
        root = root.detach().to("cpu", torch.float64)
        scale = math.sqrt(area / (3 * fan_in)) / root.norm()  # mean variance 1 / (3 fan_in)
        return (draws @ (root.T * scale)).to(torch.float32).reshape(shape)
    finally:
        torch.set_num_threads(threads)


def _uniform(shape, generator: torch.Generator) -> Tensor:
    return torch.rand(shape, generator=generator, dtype=torch.float32, device="cpu").mul_(2).sub_(1)


def _orthonormal(rows: int, columns: int, generator: torch.Generator) -> Tensor:
    """Return a random float64 matrix with orthonormal columns; where rows are fewer, they are orthonormal."""
    normal = torch.randn((rows, columns), generator=generator, dtype=torch.float64, device="cpu")
    q, r = torch.linalg.qr(normal if rows >= columns else normal.T)
    q = q * r.diagonal().sign()  # makes the factor unique and its law uniform
    return q if rows >= columns else q.T


def edges_and_lines(height: int, width: int | None = None, angles: int = 4) -> Tensor:
    """Return the filters [4 ``angles``, k, k]: zero mean, unit L1 norm; for each angle edge, -edge, line,
    -line.

    With c the coordinate across the orientation, edge = sign(c) (1 - exp(-c^2 / 2 (0.3 k)^2)) and line = 2
    exp(-c^2 / 2 (0.15 k)^2). The sign is that of c itself (below 1e-9: 0), so that it is right in large
    filters too. Raises ``ValueError`` for a kernel that is not square or smaller than 2 x 2.
    """
    if width not in (None, height) or height < 2:
        raise ValueError(f"bank 'edges_and_lines' needs a square kernel above 1 x 1, not {height} x {width}")
    axis = torch.arange(height, dtype=torch.float64, device="cpu") - (height - 1) / 2
    y_kk, x_kk = torch.meshgrid(axis, axis, indexing="ij")
    filters = []
    for step in range(angles):
        angle = math.pi * step / angles
        c_kk = x_kk * math.cos(angle) + y_kk * math.sin(angle)
        c_kk = c_kk.where(c_kk.abs() >= 1e-9, 0.0)
        edge_kk = c_kk.sign() * (1 - torch.exp(-c_kk.square() / (2 * (0.3 * height) ** 2)))
        line_kk = 2 * torch.exp(-c_kk.square() / (2 * (0.15 * height) ** 2))
        for profile_kk in (edge_kk, line_kk):
            profile_kk = profile_kk - profile_kk.mean()
            profile_kk = profile_kk / profile_kk.abs().sum()
            filters += [profile_kk, -profile_kk]
    return torch.stack(filters).to(torch.float32)


def transferred_roots(donors: list[Tensor], sizes: list[tuple[int, int]]) -> list[Tensor]:
    """Return a covariance root for each recipient layer, from the kernels [c_out, c_in, k_h, k_w] of a
    donor's layers.

    ``sizes`` are the recipients' kernel sizes, first layer to last. A recipient takes the covariance at its
    relative depth, interpolated linearly between the two nearest donor layers (unit trace each: structure is
    carried over, not scale). Raises ``ValueError`` where there is no donor layer, or one whose filters do not
    vary.
    """
    if not donors:
        raise ValueError("donor: the model has no convolution with a kernel above 1x1 to measure")
    roots = []
    for place, size in enumerate(sizes):
        depth = place / max(1, len(sizes) - 1) * (len(donors) - 1)
        below = int(depth)
        pair = [donors[below], donors[min(below + 1, len(donors) - 1)]]
        pair = [resize_covariance(spatial_covariance(kernel), kernel.shape[2:], size) for kernel in pair]
        below_PP, above_PP = (covariance / covariance.trace() for covariance in pair)
        roots.append(covariance_root(below_PP.lerp(above_PP, depth - below)))
    return roots


def spatial_covariance(weight: Tensor) -> Tensor:
    """Return the covariance [k_h k_w, k_h k_w] of all filters of [c_out, c_in, k_h, k_w], float64."""
    filters_NP = weight.detach().to("cpu", torch.float64).flatten(2).flatten(0, 1)
    centred_NP = filters_NP - filters_NP.mean(0)
    return centred_NP.T @ centred_NP / len(filters_NP)


def resize_covariance(covariance: Tensor, old: tuple[int, int], new: tuple[int, int]) -> Tensor:
    """Return a covariance for kernels of size ``new``: both pixel indices bilinear, then made symmetric."""
    if tuple(old) == tuple(new):
        return covariance

    def resize_rows(matrix: Tensor) -> Tensor:
        maps = F.interpolate(matrix.T.reshape(-1, 1, *old), size=tuple(new), mode="bilinear", align_corners=False)
        return maps.flatten(1).T

    resized = resize_rows(resize_rows(covariance).T)
    return (resized + resized.T) / 2


def covariance_root(covariance: Tensor) -> Tensor:
    """Return R, float32, with R R^T = ``covariance``; negative eigenvalues, which resizing can make, count as
    zero.

    Raises ``ValueError`` when no variance is left (the filters of the donor are all the same).
    """
    if not bool(covariance.isfinite().all()):
        raise ValueError("donor: filters without variance; a covariance bank needs a donor with different filters")
    values, vectors = torch.linalg.eigh((covariance + covariance.T).to(torch.float64) / 2)
    return (vectors * values.clamp_min(0).sqrt()).to(torch.float32)
