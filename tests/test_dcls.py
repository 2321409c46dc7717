"""The DCLS operator: its kernels against the authors' package, its gradients, its geometry and its training
hooks."""

import copy
import logging
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from convx.layers.dcls import DCLSConv2d
from convx.layers.dcls_kernels import build_kernel
from convx.layers.dcls_spacings import Repulsion, limits, share_positions

OFFICIAL = {"bilinear": "v0", "v1": "v1", "triangle": "max", "gauss": "gauss"}


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def official(monkeypatch):
    """The package's kernel builder; it logs to the root logger, and installs a handler there, when layers are
    made."""
    monkeypatch.setattr(logging, "warning", lambda *args, **kwargs: None)
    modules = pytest.importorskip("DCLS.construct.modules", reason="the dcls package is not installed")

    def build(version, weight, positions, sigma, size):
        outputs, inputs, count = weight.shape
        make = modules.ConstructKernel2d(outputs, inputs, 1, count, size, OFFICIAL[version])
        if version != "bilinear":  # v0 takes (row, column), the others (column, row)
            positions, sigma = positions.flip(0), None if sigma is None else sigma.flip(0)
        return make(weight, positions, sigma)

    return build


def taps(shape, size, interpolation, dtype=torch.float64, seed=0, margin=0.2):
    """Return weights, positions (no integers: fractional parts in [margin, 1 - margin]) and raw widths, leaf
    tensors."""
    rng = torch.Generator().manual_seed(seed)
    bound = (shape[1] * shape[2]) ** -0.5
    weight = (torch.rand(shape, generator=rng, dtype=torch.float64) * 2 - 1) * bound
    axes = []
    for s in size:
        low, high = limits(s)
        cell = torch.randint(low, high, shape, generator=rng) if high > low else torch.zeros(shape)
        inside = margin + (1 - 2 * margin) * torch.rand(shape, generator=rng, dtype=torch.float64)
        axes.append(cell + inside * (high > low))
    sigma = None
    if interpolation in ("triangle", "gauss"):
        sign = torch.randint(0, 2, (2, *shape), generator=rng) * 2 - 1
        sigma = sign * (0.05 + 0.6 * torch.rand(2, *shape, generator=rng, dtype=torch.float64))
    tensors = weight, torch.stack(axes), sigma
    return [None if t is None else t.to(dtype).requires_grad_() for t in tensors]


def gradients(kernel, tensors, seed=1):
    grad = torch.randn(kernel.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return torch.autograd.grad(kernel, [t for t in tensors if t is not None], grad.to(kernel.dtype))


def methods(interpolation):
    return ["scatter", "separable"] if interpolation == "bilinear" else ["separable"]


# --------------------------------------------------------------------------------------------------- kernels


@pytest.mark.parametrize("size", [7, 17, 23])
@pytest.mark.parametrize("shape", [(4, 3, 9), (6, 1, 21), (8, 2, 5)], ids=["dense", "depthwise", "grouped"])
@pytest.mark.parametrize("version", OFFICIAL)
def test_kernels_and_gradients_are_those_of_the_package(official, version, shape, size):
    ours = "triangle" if version == "v1" else version  # v1 is the triangle of raw width 0
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 2e-7)):
        tensors = taps(shape, (size, size), version, dtype, seed=size)
        theirs = official(version, *tensors, (size, size))
        wanted = gradients(theirs, tensors)
        sigma = torch.zeros_like(tensors[1]) if version == "v1" else tensors[2]
        for method in methods(ours):
            kernel = build_kernel(tensors[0], tensors[1], sigma, (size, size), ours, method)
            assert kernel.shape == (*shape[:2], size, size)
            torch.testing.assert_close(kernel, theirs, rtol=0, atol=tolerance)
            if dtype == torch.float64:
                for found, want in zip(gradients(kernel, tensors), wanted):
                    torch.testing.assert_close(found, want, rtol=0, atol=tolerance * want.abs().max().item())


@pytest.mark.parametrize("interpolation", ["bilinear", "triangle", "gauss"])
def test_float32_gradients_are_as_exact_as_the_package_s(official, interpolation):
    """Against float64 as the truth: both sides round, so each is held to the truth, not to the other."""
    exact = taps((24, 1, 26), (23, 23), interpolation, seed=3)
    rounded = [None if t is None else t.detach().float().requires_grad_() for t in exact]
    again = [None if t is None else t.detach().double().requires_grad_() for t in rounded]
    truth = gradients(build_kernel(*again, (23, 23), interpolation), again)
    ours = gradients(build_kernel(*rounded, (23, 23), interpolation), rounded)
    theirs = gradients(official(interpolation, *rounded, (23, 23)), rounded)
    for found, other, want in zip(ours, theirs, truth):
        scale = want.abs().max()
        error, theirs_error = ((x - want).abs().max() / scale for x in (found, other))
        assert error < max(2e-7, 1.5 * theirs_error.item()), (error, theirs_error)


@pytest.mark.parametrize("interpolation", ["bilinear", "triangle"])
def test_taps_on_a_grid_are_a_dilated_convolution_and_swapped_axes_are_not(interpolation):
    torch.manual_seed(0)
    x, weight = torch.randn(2, 3, 12, 14), torch.randn(5, 3, 3, 3)
    steps = torch.tensor([-4.0, 0.0, 4.0])
    grid = torch.stack(torch.meshgrid(steps, steps, indexing="ij")).flatten(1)
    layer = DCLSConv2d(3, 5, 9, 9, padding=4, bias=False, interpolation=interpolation)
    wanted = F.conv2d(x, weight, padding=4, dilation=4)

    def run(positions):
        with torch.no_grad():
            layer.weight.copy_(weight.flatten(2))
            layer.positions.copy_(positions[:, None, None].expand_as(layer.positions))
        return layer(x)

    kernel = weight.new_zeros(5, 3, 9, 9)
    kernel[:, :, ::4, ::4] = weight
    run(grid)
    atol = 0.0 if interpolation == "bilinear" else 2e-6  # Z holds an epsilon of 1e-7
    torch.testing.assert_close(layer.effective_kernel(), kernel, rtol=0, atol=atol)
    torch.testing.assert_close(run(grid), wanted, rtol=0, atol=2e-5)
    assert (run(grid.flip(0)) - wanted).abs().max() > 0.1


def test_single_taps_half_positions_and_mass():
    weight = torch.tensor([[[2.0]]])
    for interpolation, method in [
        ("bilinear", "scatter"),
        ("bilinear", "separable"),
        ("triangle", "separable"),
    ]:
        sigma = None if interpolation == "bilinear" else torch.zeros(2, 1, 1, 1)
        centre = build_kernel(weight, torch.zeros(2, 1, 1, 1), sigma, (5, 9), interpolation, method)
        assert centre[0, 0, 2, 4].item() == pytest.approx(2, rel=2e-7) and centre.count_nonzero() == 1
        half = build_kernel(weight, torch.full((2, 1, 1, 1), 0.5), sigma, (5, 5), interpolation, method)
        torch.testing.assert_close(half[0, 0, 2:4, 2:4], torch.full((2, 2), 0.5), rtol=2e-7, atol=0)
        assert half.count_nonzero() == 4


@pytest.mark.parametrize("size", [(1, 1), (1, 7), (6, 9), (8, 8), (5, 4), (2, 3)])
@pytest.mark.parametrize("interpolation", ["bilinear", "triangle", "gauss"])
def test_no_size_loses_mass_or_its_centre(interpolation, size):
    """Even and non-square kernels, taps on and beyond every border; the package loses mass or the centre
    there."""
    torch.manual_seed(1)
    positions = torch.randn(2, 6, 1, 40, dtype=torch.float64) * 6
    weight = torch.rand(6, 1, 40, dtype=torch.float64)
    sigma = None if interpolation == "bilinear" else torch.rand_like(positions)
    for method in methods(interpolation):
        kernel = build_kernel(weight, positions, sigma, size, interpolation, method)
        torch.testing.assert_close(kernel.sum((2, 3)), weight.sum(2), rtol=3e-6, atol=0)
        one = build_kernel(
            weight[:, :, :1],
            positions[..., :1] * 0,
            None if sigma is None else sigma[..., :1],
            size,
            interpolation,
            method,
        )
        assert one[0, 0].flatten().argmax().item() == (size[0] // 2) * size[1] + size[1] // 2


@pytest.mark.parametrize("interpolation", ["bilinear", "triangle", "gauss"])
@pytest.mark.parametrize("size", [(5, 7), (4, 3), (1, 5)])
def test_gradcheck(interpolation, size):
    tensors = taps((2, 2, 3), size, interpolation, seed=5)
    given = [t for t in tensors if t is not None]
    for method in methods(interpolation):

        def build(*leaves, method=method):
            return build_kernel(
                leaves[0], leaves[1], leaves[2] if len(leaves) > 2 else None, size, interpolation, method
            )

        assert torch.autograd.gradcheck(build, given, eps=1e-6, atol=1e-6)


@pytest.mark.parametrize("interpolation", ["bilinear", "triangle"])
@pytest.mark.parametrize("place", [-3.0, -1.0, 0.0, 2.0, 3.0])
def test_a_tap_on_the_grid_has_the_slope_towards_the_inside(interpolation, place):
    """At whole positions, borders included, the derivative is that of a small step to the right (to the left
    at the end)."""
    step = 1e-4 if place < 3 else -1e-4
    sigma = None if interpolation == "bilinear" else torch.zeros(2, 1, 1, 1, dtype=torch.float64)
    ramp = torch.arange(49, dtype=torch.float64).view(1, 1, 7, 7).square()

    def value(y, method):
        positions = torch.tensor([y, 0.3], dtype=torch.float64).view(2, 1, 1, 1).requires_grad_()
        kernel = build_kernel(torch.ones(1, 1, 1, dtype=torch.float64), positions, sigma, (7, 7), interpolation, method)
        (kernel * ramp).sum().backward()
        return (kernel * ramp).sum().item(), positions.grad[0].item()

    for method in methods(interpolation):
        slope = (value(place + step, method)[0] - value(place, method)[0]) / step
        assert value(place, method)[1] == pytest.approx(slope, rel=1e-6) and abs(slope) > 1


def test_a_width_at_its_floor_can_grow(official):
    """The package starts the triangle's raw width at 0, where its |.| has no derivative: it could never learn
    it."""
    weight, positions, _ = taps((2, 1, 3), (7, 7), "bilinear")
    sigma = torch.zeros_like(positions, requires_grad=True)
    theirs = gradients(official("triangle", weight, positions, sigma, (7, 7)), [sigma])[0]
    ours = gradients(build_kernel(weight, positions, sigma, (7, 7), "triangle"), [sigma])[0]
    assert theirs.abs().max() == 0 and ours.abs().min() > 1e-3


def test_a_far_gauss_tap_stays_finite_and_trains():
    weight, positions, sigma = taps((1, 1, 1), (7, 7), "gauss", torch.float32)
    with torch.no_grad():
        positions.fill_(30.0)
        sigma.zero_()
    kernel = build_kernel(weight, positions, sigma, (7, 7), "gauss")
    assert kernel[0, 0, 6, 6].abs() > 0.9 * weight.abs().item()
    assert all(torch.isfinite(g).all() for g in gradients(kernel, [weight, positions, sigma]))


def test_unknown_construction_is_refused():
    with pytest.raises(ValueError, match="not valid for gauss"):
        build_kernel(*taps((1, 1, 1), (3, 3), "gauss"), (3, 3), "gauss", "scatter")


# ----------------------------------------------------------------------------------------------------- layer


@pytest.mark.parametrize("interpolation", ["bilinear", "triangle", "gauss"])
@pytest.mark.parametrize("outputs, count, size, settings", [
    (4, 6, 9, {"padding": 4, "groups": 4}),
    (8, 6, (6, 9), {"padding": (2, 4), "groups": 4, "bias": False}),
    (6, 5, 7, {"stride": 2, "padding": 3, "groups": 2}),
    (4, 5, 17, {"padding": 8, "groups": 4, "padding_mode": "circular"}),
    (4, 3, 11, {"padding": 5, "groups": 4, "padding_mode": "reflect"}),
], ids=["depthwise", "multiplier", "strided", "circular", "reflect"])  # fmt: skip
def test_the_layer_is_the_convolution_with_its_effective_kernel_and_folds(
    interpolation, outputs, count, size, settings
):
    torch.manual_seed(0)
    layer = DCLSConv2d(4, outputs, count, size, interpolation=interpolation, **settings).double()
    layer.place("uniform")
    conv = layer.fold()
    assert type(conv) is nn.Conv2d and conv.padding_mode == layer.padding_mode and conv.groups == layer.groups
    for height, width in ((12, 17), (20, 9)):
        x = torch.randn(3, 4, height, width, dtype=torch.float64, requires_grad=True)
        y, other = layer(x), conv(x)
        torch.testing.assert_close(y, other, rtol=0, atol=1e-10)
        grad = torch.randn_like(y)
        found, want = (torch.autograd.grad(out, x, grad, retain_graph=True)[0] for out in (y, other))
        torch.testing.assert_close(found, want, rtol=0, atol=1e-10)
        # The gradient of the taps is that of the dense kernel, pulled back through the construction.
        (dense,) = torch.autograd.grad(other, conv.weight, grad)
        own = [p for p in (layer.weight, layer.positions, layer.sigma) if p is not None]
        pulled = torch.autograd.grad(layer.effective_kernel(), own, dense)
        for found, want in zip(torch.autograd.grad(y, own, grad), pulled):
            torch.testing.assert_close(found, want, rtol=0, atol=1e-10)


@pytest.mark.parametrize("interpolation", ["bilinear", "gauss"])
def test_positions_of_all_taps_plus_one_shift_the_output_by_a_pixel(interpolation):
    torch.manual_seed(0)
    layer = DCLSConv2d(2, 3, 4, 13, padding=6, bias=False, interpolation=interpolation).double()
    x = torch.randn(1, 2, 24, 24, dtype=torch.float64)
    before = layer(x)
    with torch.no_grad():
        layer.positions[0] += 1
    inside = slice(7, -7)
    # Gaussian tails are cut at the border of the kernel: 6 pixels and more from these taps, exp(-50).
    torch.testing.assert_close(layer(x)[:, :, inside, inside], before[:, :, 8:-6, inside], rtol=0, atol=1e-9)


def test_from_conv_on_the_grid_is_the_same_function():
    torch.manual_seed(0)
    for conv in (
        nn.Conv2d(3, 8, 3, stride=2, padding=1),
        nn.Conv2d(4, 4, (3, 5), padding=(2, 4), dilation=2, groups=4, padding_mode="replicate"),
        nn.Conv2d(4, 6, 5, padding="same", groups=2, bias=False),
    ):
        x = torch.randn(2, conv.in_channels, 15, 16)
        for size in (None, 13):
            layer = DCLSConv2d.from_conv(conv, dilated_kernel_size=size)
            assert layer.kernel_count == conv.kernel_size[0] * conv.kernel_size[1]
            torch.testing.assert_close(layer(x), conv(x), rtol=1e-5, atol=1e-5)


def test_from_conv_keeps_geometry_scale_dtype_and_mode():
    conv = nn.Conv2d(16, 16, 7, padding=3, groups=16).to(torch.bfloat16).eval()
    layer = DCLSConv2d.from_conv(conv, 29, 17, "gauss", torch.Generator().manual_seed(0))
    assert layer.weight.dtype == torch.bfloat16 and not layer.training and layer.padding == (8, 8)
    assert layer.weight.float().std().item() == pytest.approx(conv.weight.float().std().item(), rel=0.1)
    assert torch.equal(layer.bias, conv.bias)
    with pytest.raises(ValueError, match="cannot keep the output size"):
        DCLSConv2d.from_conv(conv, 29, 16)
    with pytest.raises(ValueError, match="no gauss DCLS"):
        DCLSConv2d.from_conv(conv, interpolation="gauss")
    with pytest.raises(ValueError, match="too small"):
        DCLSConv2d.from_conv(conv, dilated_kernel_size=5)


@pytest.mark.parametrize("wrong, message", [
    ({"interpolation": "cubic"}, "bilinear, triangle, gauss"), ({"padding_mode": "mirror"}, "padding_mode"),
    ({"groups": 3}, "divide"), ({"kernel_count": 0}, "at least 1"),
    ({"dilated_kernel_size": (0, 3)}, "at least 1"),
])  # fmt: skip
def test_wrong_settings_are_told(wrong, message):
    with pytest.raises(ValueError, match=message):
        DCLSConv2d(**({"in_channels": 4, "out_channels": 4, "kernel_count": 3, "dilated_kernel_size": 5} | wrong))


def test_start_is_that_of_the_package_and_drawn_from_the_generator():
    layers = [
        DCLSConv2d(64, 64, 34, 17, groups=64, interpolation="gauss", generator=torch.Generator().manual_seed(s))
        for s in (1, 1, 2)
    ]
    assert torch.equal(layers[0].positions, layers[1].positions) and torch.equal(layers[0].weight, layers[1].weight)
    assert not torch.equal(layers[0].positions, layers[2].positions)
    assert layers[0].positions.std().item() == pytest.approx(0.5, abs=0.02)
    assert layers[0].weight.abs().max() <= 34**-0.5 and (layers[0].sigma == 0.23).all()
    layers[0].place("uniform", torch.Generator().manual_seed(0))
    assert layers[0].positions.abs().max() <= 8 and layers[0].positions.std().item() == pytest.approx(
        16 / 12**0.5, rel=0.03
    )


def test_construction_is_in_float32_under_autocast_and_for_bfloat16_weights():
    torch.manual_seed(0)
    layer = DCLSConv2d(4, 4, 9, 17, padding=8, groups=4)
    layer.place("uniform")
    x, kernel = torch.randn(2, 4, 12, 12), layer.effective_kernel()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(layer.effective_kernel(), kernel)
        assert layer(x).dtype == torch.bfloat16
        layer(x).float().sum().backward()
    assert layer.positions.grad.dtype == torch.float32 and torch.isfinite(layer.positions.grad).all()
    low = copy.deepcopy(layer).to(torch.bfloat16)
    assert low.effective_kernel().dtype == torch.float32 and low(x.bfloat16()).dtype == torch.bfloat16


def test_evaluation_builds_the_kernel_once_until_a_parameter_changes(monkeypatch):
    from convx.layers import dcls

    built = []
    monkeypatch.setattr(dcls, "build_kernel", lambda *args: built.append(1) or build_kernel(*args))
    torch.manual_seed(0)
    layer, x = DCLSConv2d(4, 4, 5, 9, padding=4, groups=4).eval(), torch.randn(1, 4, 8, 8)

    def count(run):
        built.clear()
        run()
        return len(built)

    with torch.no_grad():
        first = layer(x)
        assert count(lambda: [layer(x) for _ in range(3)]) == 0
        layer.positions += 0.5
        assert count(lambda: layer(x)) == 1 and not torch.equal(layer(x), first)
        layer.load_state_dict({k: v + 1 for k, v in layer.state_dict().items()})
        assert count(lambda: layer(x)) == 1
        layer.double()
        assert count(lambda: layer(x.double())) == 1 and layer(x.double()).dtype == torch.float64
        layer.float()
    with torch.inference_mode():
        assert count(lambda: [layer(x), layer(x)]) <= 1
    assert count(lambda: [layer(x), layer(x)]) == 2 and layer(x).requires_grad  # gradients wanted: built each time
    layer.train()
    assert count(lambda: layer(x)) == 1


def test_copies_pickles_checkpoints_and_memory_formats(tmp_path):
    from safetensors.torch import load_model, save_model

    torch.manual_seed(0)

    def make():
        net = nn.Sequential(*(DCLSConv2d(6, 6, 5, 13, padding=6, groups=6, interpolation="gauss") for _ in range(2)))
        share_positions([list(net)])
        Repulsion(list(net), 0.0)
        return net

    net, other, x = make().eval(), make().eval(), torch.randn(2, 6, 14, 14)
    with torch.no_grad():
        wanted = net(x)
        again = copy.deepcopy(net)
        assert torch.equal(again(x), wanted) and again[0].positions is again[1].positions
        assert again[0].repulsion.layers[1] is again[1] and again[0].positions is not net[0].positions
        assert torch.equal(pickle.loads(pickle.dumps(net))(x), wanted)
        save_model(net, str(tmp_path / "net.safetensors"))
        load_model(other, str(tmp_path / "net.safetensors"), strict=True)
        assert torch.equal(other(x), wanted)
        make().load_state_dict(net.state_dict(), strict=True)
        last = copy.deepcopy(net).to(memory_format=torch.channels_last)  # safetensors wants shared tensors contiguous
        assert last[0].positions.is_contiguous() and last[0].positions is last[1].positions
        save_model(last, str(tmp_path / "last.safetensors"))
        load_model(other, str(tmp_path / "last.safetensors"), strict=True)
        assert torch.equal(other(x), wanted)
        last = net(x.to(memory_format=torch.channels_last))
    assert last.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(last, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("interpolation", ["bilinear", "gauss"])
def test_traces_with_gradients(interpolation):
    """The graphs that inductor is given, taken apart and cut into forward and backward as for it, without its C++."""
    torch.manual_seed(0)
    layer = DCLSConv2d(4, 4, 5, 9, padding=4, groups=4, interpolation=interpolation)
    x = torch.randn(2, 4, 10, 10)
    wanted = layer(x)
    grads = torch.autograd.grad(wanted.square().sum(), list(layer.parameters()))
    found = torch.compile(layer, backend="aot_eager_decomp_partition", fullgraph=True)(x)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    for ours, theirs in zip(torch.autograd.grad(found.square().sum(), list(layer.parameters())), grads):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)


@pytest.mark.slow
def test_compiles():
    """Inductor for inference; a training graph has several more C++ kernels, each up to half a minute of compiling."""
    torch.manual_seed(0)
    layer = DCLSConv2d(4, 4, 5, 9, padding=4, groups=4).eval()
    x = torch.randn(2, 4, 10, 10)
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(layer)(x), layer(x), rtol=1e-4, atol=1e-5)
