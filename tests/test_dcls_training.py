"""DCLS in training: shared positions, clamping, repulsion, a shift that one tap must find, and speed."""

import copy
import importlib.util
import logging
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from convx.layers.dcls import DCLSConv2d
from convx.layers.dcls_kernels import build_kernel
from convx.layers.dcls_spacings import (
    Repulsion,
    iso_parameter_kernel_count,
    limits,
    overlap,
    share_positions,
)
from convx.layers.depthwise import depthwise_conv2d


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_shared_positions_sum_their_gradients_and_are_optimised_once():
    torch.manual_seed(0)
    layers = nn.ModuleList(DCLSConv2d(3, 3, 4, 7, padding=3, groups=3, interpolation="gauss") for _ in range(3))
    alone = copy.deepcopy(layers)
    share_positions([list(layers)])
    for layer in alone:
        layer.positions.data.copy_(layers[0].positions)
        layer.sigma.data.copy_(layers[0].sigma)
    x = torch.randn(2, 3, 9, 9)
    for net in (layers, alone):
        sum(layer(x).square().sum() for layer in net).backward()
    for name in ("positions", "sigma"):
        total = sum(getattr(layer, name).grad for layer in alone)
        torch.testing.assert_close(getattr(layers[0], name).grad, total, rtol=1e-5, atol=1e-5)
    assert sum(p.numel() for p in layers.parameters()) == 3 * (12 + 3) + 2 * 24

    from convx.training import parameter_groups

    groups = parameter_groups(layers, {"weight_decay": 0.05, "decay_norm_and_bias": False})
    every = [p for group in groups for p in group["params"]]
    assert len({id(p) for p in every}) == len(every) == len(list(layers.parameters()))
    own = [g for g in groups if any(p is layers[0].positions for p in g["params"])]
    assert len(own) == 1 and own[0]["weight_decay"] == 0 and own[0]["lr_scale"] == 5
    assert {id(p) for p in own[0]["params"]} == {id(layers[0].positions), id(layers[0].sigma)}


def test_names_of_modules_do_not_decide_the_learning_rate_of_positions():
    """The official code compares a group's name; layer-wise decay renames groups and its factor of five is
    lost."""
    from convx.training import parameter_groups

    for name in ("positions", "layer_3_no_decay", "x"):
        net = nn.ModuleDict({name: nn.Sequential(DCLSConv2d(2, 2, 3, 5))})
        groups = parameter_groups(net, {"weight_decay": 0.1, "decay_norm_and_bias": True})
        factor = {id(p): g["lr_scale"] for g in groups for p in g["params"]}
        assert factor[id(net[name][0].positions)] == 5 and factor[id(net[name][0].weight)] == 1


@pytest.mark.parametrize("size", [7, 8, (5, 9)])
def test_a_step_leaves_the_taps_inside_finite_and_movable(size):
    torch.manual_seed(0)
    layer = DCLSConv2d(2, 2, 6, size, padding=2)
    optimizer = torch.optim.SGD(layer.parameters(), lr=1.0)
    x, rng = torch.randn(2, 2, 12, 12), torch.Generator().manual_seed(0)
    with torch.no_grad():
        layer.positions.copy_(torch.randint(0, 2, layer.positions.shape, generator=rng) * 200.0 - 100)
    layer.after_step()
    for axis, s in zip(layer.positions, layer.kernel_size):
        assert set(axis.unique().tolist()) == set(map(float, limits(s)))
    target = torch.randn_like(layer(x))
    for _ in range(5):
        optimizer.zero_grad()
        (layer(x) - target).square().mean().backward()
        assert all(torch.isfinite(p.grad).all() for p in layer.parameters())
        assert (layer.positions.grad != 0).float().mean() > 0.9  # those on the border have a gradient too
        optimizer.step()
        layer.after_step()
        for axis, s in zip(layer.positions, layer.kernel_size):
            low, high = limits(s)
            assert axis.min() >= low and axis.max() <= high


def test_repulsion_of_two_taps_by_hand():
    for distance in (0.0, 0.25, 0.6, 1.0, 3.0):
        positions = torch.zeros(2, 3, 1, 2, dtype=torch.float64)
        positions[0, ..., 1], positions[1, ..., 1] = 0.6 * distance, 0.8 * distance
        positions.requires_grad_()
        loss = overlap(positions)
        assert loss.item() == pytest.approx(max(0.0, 1 - distance))
        loss.backward()
        assert torch.isfinite(positions.grad).all()
        if 0 < distance < 1:  # descent moves the second tap away from the first
            assert (positions.grad[:, ..., 1] < 0).all() and (positions.grad[:, ..., 0] > 0).all()
    assert overlap(torch.zeros(2, 4, 1, 1)).item() == 0


def test_repulsion_at_the_start_and_uniformly_spread():
    """Known values: 0.252 at the start with 34 taps, about 0.004 when spread uniformly over
    17x17."""
    rng = torch.Generator().manual_seed(0)
    assert overlap(torch.randn(2, 384, 1, 34, generator=rng) * 0.5).item() == pytest.approx(0.252, abs=0.005)
    assert overlap(torch.rand(2, 384, 1, 34, generator=rng) * 16).item() == pytest.approx(0.004, abs=0.001)


def test_repulsion_is_the_squared_mean_reported_once_after_its_start():
    torch.manual_seed(0)
    layers = [DCLSConv2d(4, 4, 5, 9, groups=4) for _ in range(3)]
    share_positions([layers[:2]])
    Repulsion(layers, 0.25)
    assert all(layer.auxiliary_loss(progress) is None for layer in layers for progress in (0.0, 0.25))
    losses = [layer.auxiliary_loss(0.26) for layer in layers]
    wanted = ((overlap(layers[0].positions) + overlap(layers[2].positions)) / 2) ** 2
    assert losses[1:] == [None, None]
    torch.testing.assert_close(losses[0], wanted)
    Repulsion(layers, None)
    assert all(layer.auxiliary_loss(1.0) is None for layer in layers)
    for layer in layers:
        layer.positions.requires_grad_(False)
    Repulsion(layers, 0.0)
    assert layers[0].auxiliary_loss(0.5) is None
    assert set(layers[0].diagnostics()) == {"tap_radius_mean", "tap_radius_p90", "tap_overlap"}
    assert layers[1].diagnostics() == {} and DCLSConv2d(2, 2, 3, 5).diagnostics()["tap_radius_mean"] > 0


def test_iso_parameter_tap_counts_are_those_of_the_papers():
    tiny = [96, 192, 384, 768], [3, 3, 9, 3]
    assert iso_parameter_kernel_count(*tiny) == 34 and iso_parameter_kernel_count(*tiny, positions_per_tap=4) == 26
    assert iso_parameter_kernel_count(tiny[0], [3, 3, 27, 3]) == 40
    assert iso_parameter_kernel_count([128, 256, 512, 1024], [3, 3, 27, 3]) == 40
    uniform = {2: (24, 16), 3: (29, 21), 4: (32, 24), 6: (36, 29), 8: (39, 32)}
    for depth, counts in uniform.items():
        assert counts == tuple(iso_parameter_kernel_count([64, 128], [depth] * 2, 7, a) for a in (2, 4))
    assert iso_parameter_kernel_count([10, 20], [1, 1], [3, (1, 5)]) == (90 + 100) // (30 + 60)
    with pytest.raises(ValueError):
        iso_parameter_kernel_count([64], [1, 2])


# -------------------------------------------------------------------------------------------- the shift task


def field(rng, side, smoothness):
    """Return smooth periodic images [8, 1, side, side] and their exact shift by real offsets, through the
    Fourier transform."""
    spectrum = torch.fft.fft2(torch.randn(8, 1, side, side, generator=rng, dtype=torch.float64))
    f = torch.fft.fftfreq(side, dtype=torch.float64)
    fy, fx = torch.meshgrid(f, f, indexing="ij")
    spectrum = spectrum * torch.exp(-2 * (torch.pi * smoothness) ** 2 * (fy**2 + fx**2))
    images = torch.fft.ifft2(spectrum).real
    scale = images.std()

    def shifted(dy, dx):
        phase = torch.exp(2j * torch.pi * (fy * dy + fx * dx))
        return (torch.fft.ifft2(spectrum * phase).real / scale).float()

    return (images / scale).float(), shifted


def recover(offset, smoothness, interpolation="bilinear", steps=250):
    """Return the distance of the learned position of one tap in 17x17 from ``offset`` (y, x)."""
    rng = torch.Generator().manual_seed(7)
    x, shifted = field(rng, 48, smoothness)
    layer = DCLSConv2d(1, 1, 1, 17, bias=False, interpolation=interpolation, generator=rng)
    with torch.no_grad():
        layer.weight.fill_(0.5)
    target = shifted(*offset)[:, :, 8:-8, 8:-8]
    optimizer = torch.optim.Adam([{"params": [layer.weight], "lr": 0.01}, {"params": [layer.positions], "lr": 0.15}])
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        optimizer.zero_grad()
        (layer(x) - target).square().mean().backward()
        optimizer.step()
        layer.after_step()
        schedule.step()
    return (layer.positions.detach().flatten() - torch.tensor(offset)).abs().max().item()


@pytest.mark.parametrize("offset", [(3.0, -5.0), (-7.4, 6.3), (0.35, 7.8), (-8.0, -8.0), (8.0, 2.5)])
def test_one_tap_recovers_a_shift_within_eight_pixels(offset):
    assert recover(offset, smoothness=5.0) < 0.1


def test_white_noise_hides_the_shift_from_a_bilinear_tap():
    """Its gradient comes from the four cells around it: the basin is one pixel wide unless the images are
    smooth."""
    assert recover((-7.4, 6.3), smoothness=0.0) > 1


# ----------------------------------------------------------------------------------------------------- speed


@pytest.fixture(scope="module")
def benchmark():
    file = Path(__file__).resolve().parents[1] / "benchmarks" / "dcls.py"
    spec = importlib.util.spec_from_file_location("benchmarks_dcls", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
@pytest.mark.parametrize(
    "interpolation, version, count, size, faster",
    [("bilinear", "v0", 34, 17, 80), ("gauss", "gauss", 26, 23, 40)],
)
def test_construction_is_many_times_faster_and_smaller_than_the_package(
    monkeypatch, benchmark, interpolation, version, count, size, faster
):
    modules = pytest.importorskip("DCLS.construct.modules", reason="the dcls package is not installed")
    monkeypatch.setattr(logging, "warning", lambda *args, **kwargs: None)
    layer = DCLSConv2d(384, 384, count, size, groups=384, interpolation=interpolation)
    layer.place("uniform")
    leaves, grad = (layer.weight, layer.positions, layer.sigma), torch.randn(384, 1, size, size)
    package = modules.ConstructKernel2d(384, 384, 384, count, (size, size), version)

    def ours():
        build_kernel(*leaves, (size, size), interpolation).backward(grad)

    def theirs():
        package(*leaves).backward(grad)

    # The fastest rounds of both sides, taken in turn: what a busy machine adds is left out on both.
    assert benchmark.paired(theirs, ours, 2, inner=20)["best"] > faster
    assert benchmark.peak_bytes(theirs) > 5 * benchmark.peak_bytes(ours)


@pytest.mark.slow
@pytest.mark.parametrize("batch, channels, side, faster", [(64, 256, 8, 15), (64, 128, 16, 4), (32, 64, 32, 5)])
def test_a_training_step_of_17x17_kernels_is_many_times_faster_than_the_native_one(
    benchmark, batch, channels, side, faster
):
    x, kernel = torch.randn(batch, channels, side, side), torch.randn(channels, 1, 17, 17)
    x, kernel, grad = x.requires_grad_(), kernel.requires_grad_(), torch.randn_like(x)

    def ours():
        depthwise_conv2d(x, kernel, padding=(8, 8)).backward(grad)

    def native():
        F.conv2d(x, kernel, padding=8, groups=channels).backward(grad)

    assert benchmark.paired(native, ours, 2)["best"] > faster
