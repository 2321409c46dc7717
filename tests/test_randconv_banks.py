"""Banks of filters, where their numbers come from, and how the filters of a network are measured."""

import hashlib
import math
import subprocess
import sys

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn

import convx
from convx.layers.filter_banks import (
    BANKS,
    covariance_root,
    draw_bank,
    edges_and_lines,
    resize_covariance,
    spatial_covariance,
    transferred_roots,
)
from convx.layers.linear_combination import LinearCombinationConv2d
from convx.models import create_model
from convx.papers.randconv import kernels as measures


def lc_layers(model):
    return {n: m for n, m in model.named_modules() if isinstance(m, LinearCombinationConv2d)}


def banks_of(model):
    return {n: hashlib.sha256(m.bank.filters.numpy().tobytes()).hexdigest() for n, m in lc_layers(model).items()}


# ----------------------------------------------------------------------------------------------- seeds, banks


def test_banks_depend_on_seed_and_name_alone():
    torch.manual_seed(0)
    host = create_model("resnet8_8", 10)
    state = torch.get_rng_state()
    first = convx.linear_combinations(host, expansion=2, seed=1)
    assert torch.equal(torch.get_rng_state(), state)
    assert not hasattr(host, "surgery_log") and not lc_layers(host)
    torch.manual_seed(99)
    backwards = host
    for name in reversed(list(lc_layers(first))):
        backwards = convx.linear_combinations(backwards, name, expansion=2, seed=1)
    assert banks_of(backwards) == banks_of(first)
    for ours, theirs in zip(lc_layers(backwards).values(), lc_layers(first).values()):
        assert torch.equal(ours.combination, theirs.combination)
    other = banks_of(convx.linear_combinations(host, expansion=2, seed=2))
    assert len(set(other.values()) | set(banks_of(first).values())) == 14  # every layer and every seed draws its own


def test_uniform_bank_is_pinned_and_the_same_in_another_process():
    golden = "5a2c65b191278ab5"
    code = (
        "import hashlib, torch; from convx.layers.filter_banks import draw_bank; torch.randn(3);"
        "bank = draw_bank('iid_uniform', (32, 16, 3, 3), 2**62 + 5);"
        "print(hashlib.sha256(bank.numpy().tobytes()).hexdigest()[:16])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
    here = draw_bank("iid_uniform", (32, 16, 3, 3), 2**62 + 5)
    assert out == hashlib.sha256(here.numpy().tobytes()).hexdigest()[:16] == golden


def test_threads_do_not_change_a_bank():
    root = covariance_root(spatial_covariance(draw_bank("iid_normal", (64, 8, 5, 5), 1)))
    threads = torch.get_num_threads()
    try:
        drawn = []
        for count in (1, 2):
            torch.set_num_threads(count)
            drawn.append([draw_bank(k, (300, 8, 5, 5), 3, (400, 9), root) for k in BANKS])
            assert torch.get_num_threads() == count
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(*drawn))


@pytest.mark.parametrize(("c_in", "kernel"), [(16, 3), (64, 3), (16, 7)])
def test_statistics_of_the_start(c_in, kernel):
    fan_in = c_in * kernel**2
    shape = (16 * 8, c_in, kernel, kernel)
    uniform = draw_bank("iid_uniform", shape, 0)
    assert uniform.abs().max() <= 1 / math.sqrt(fan_in) < uniform.abs().max() * 1.001
    shared = draw_bank("shared", shape, 0, (1024, 64))
    assert shared.abs().max() <= 1 / math.sqrt(fan_in)
    for bank in (uniform, shared, draw_bank("iid_normal", shape, 0)):
        assert bank.std() == pytest.approx(1 / math.sqrt(3 * fan_in), rel=0.02)
        assert abs(float(bank.mean())) < 0.02 * float(bank.std())
    for expansion in (1, 8, 64):
        layer = LinearCombinationConv2d(c_in, 64, kernel, expansion=expansion)
        ratio = float(layer.effective_kernel().detach().std()) * math.sqrt(3 * fan_in)
        assert ratio == pytest.approx(1 / math.sqrt(3), abs=0.03)


def test_shared_bank_is_one_draw():
    model = convx.linear_combinations(create_model("resnet8_8", 10), expansion=2.0, bank="shared")
    layers = lc_layers(model).values()
    whole = max((m.bank.filters * math.sqrt(m.in_channels * 9) for m in layers), key=lambda bank: bank.numel())
    for layer in layers:
        scaled = layer.bank.filters * math.sqrt(layer.in_channels * 9)
        torch.testing.assert_close(scaled, whole[: scaled.shape[0], : scaled.shape[1]], rtol=1e-6, atol=1e-6)
    combinations = [m.combination for m in layers if m.combination.shape == (8, 16)]
    assert len(combinations) == 3 and not torch.equal(combinations[0], combinations[1])


def test_orthonormal_bank():
    for shape in ((144, 16, 3, 3), (256, 16, 3, 3), (64, 16, 3, 3)):
        rows = draw_bank("orthonormal", shape, 0).flatten(1).double()
        product = rows.T @ rows if shape[0] >= 144 else rows @ rows.T
        assert (product - torch.eye(len(product))).abs().max() < 1e-6


def test_covariance_bank_has_the_donors_covariance():
    rng = torch.Generator().manual_seed(0)
    spread = torch.randn(25, 25, generator=rng, dtype=torch.float64) * torch.linspace(0.1, 2, 25)[:, None]
    target = spread @ spread.T
    root = covariance_root(target)
    torch.testing.assert_close((root @ root.T).double(), target, rtol=1e-4, atol=1e-3)
    bank = draw_bank("covariance", (5000, 10, 5, 5), 3, root=root)
    measured = spatial_covariance(bank)
    expected = target * (25 / (3 * 250)) / target.trace()
    assert (measured - expected).norm() < 0.05 * expected.norm()
    assert bank.std() == pytest.approx(1 / math.sqrt(3 * 250), rel=0.02)
    # indefinite input is clipped, an unvarying donor is an error
    assert torch.isfinite(covariance_root(torch.diag(torch.tensor([1.0, -0.1])))).all()
    with pytest.raises(ValueError, match="donor: filters without variance"):
        transferred_roots([torch.ones(4, 4, 3, 3)], [(3, 3)])
    with pytest.raises(ValueError, match="no convolution"):
        transferred_roots([], [(3, 3)])


def centred_kernel(c_out, c_in, size, seed):
    """Random filters whose variance falls off from the centre, as learned ones have."""
    axis = torch.arange(size) - size // 2
    mask = torch.exp(-(axis[:, None] ** 2 + axis[None] ** 2) / (2 * (size / 5) ** 2))
    return torch.randn(c_out, c_in, size, size, generator=torch.Generator().manual_seed(seed)) * mask


def test_covariance_is_interpolated_over_depth_and_resized():
    small, large = centred_kernel(64, 16, 5, 0), draw_bank("iid_normal", (64, 16, 5, 5), 1)
    same = transferred_roots([small, large], [(5, 5)] * 3)
    units = [spatial_covariance(k) / spatial_covariance(k).trace() for k in (small, large)]
    for root, expected in zip(same, (units[0], (units[0] + units[1]) / 2, units[1])):
        torch.testing.assert_close((root @ root.T).double(), expected, rtol=1e-4, atol=1e-6)
    nine = draw_bank("covariance", (64, 16, 9, 9), 2, root=transferred_roots([small], [(9, 9)])[0])
    assert measures.centre_to_border(measures.spatial_variance([nine])[(9, 9)]) > 5
    flat = draw_bank("covariance", (64, 16, 9, 9), 2, root=transferred_roots([large], [(9, 9)])[0])
    assert measures.centre_to_border(measures.spatial_variance([flat])[(9, 9)]) < 2
    resized = resize_covariance(units[0], (5, 5), (3, 3))
    assert torch.equal(resized, resized.T) and resized.argmax() == 4 * 9 + 4


def test_covariance_verb_takes_only_the_covariances_of_a_trained_host():
    torch.manual_seed(0)
    host, donor = create_model("resnet8_8", 10), create_model("resnet8_16_k5", 10)
    with torch.no_grad():
        for place, net in enumerate((host, donor)):
            for module in net.modules():
                if isinstance(module, nn.Conv2d) and module.kernel_size[0] > 1:
                    module.weight.copy_(centred_kernel(*module.weight.shape[:3], seed=place))
    for settings in ({"donor": "host"}, {"donor": donor}):
        model = convx.linear_combinations(host, expansion=8, bank="covariance", **settings)
        for layer in lc_layers(model).values():
            heat = measures.spatial_variance([layer.bank.filters])[(3, 3)]
            assert measures.centre_to_border(heat) > 2
        assert torch.equal(model.fc.weight, host.fc.weight)
    model = convx.linear_combinations(host, expansion=8, bank="covariance", fresh=True, seed=4)
    again = convx.linear_combinations(host, expansion=8, bank="covariance", fresh=True, seed=4)
    kept = {n for n, p in model.named_parameters() if n in dict(host.named_parameters()) and p.dim() > 1}
    assert "fc.weight" in kept and "layer2.0.shortcut.0.weight" in kept
    for name in kept:
        assert not torch.equal(model.get_parameter(name), host.get_parameter(name))
        assert torch.equal(model.get_parameter(name), again.get_parameter(name))
    assert float(model.fc.weight.detach().std()) == pytest.approx(1 / math.sqrt(3 * 32), rel=0.1)
    with pytest.raises(ValueError, match="donor: the model has no convolution"):
        convx.linear_combinations(host, bank="covariance", donor=nn.Linear(2, 2))


def test_edges_and_lines_bank():
    for size, angles in ((3, 4), (5, 4), (7, 4), (5, 8), (7, 8)):
        bank = edges_and_lines(size, angles=angles).double()
        assert bank.shape == (4 * angles, size, size)
        assert bank.sum((1, 2)).abs().max() < 1e-7
        torch.testing.assert_close(bank.abs().sum((1, 2)), torch.ones(4 * angles, dtype=torch.float64))
        assert torch.equal(bank[0::2], -bank[1::2])
        axis = torch.arange(size) - size // 2
        for step in range(angles):  # an edge has the sign of the coordinate across it, in every pixel
            angle = math.pi * step / angles
            across = axis[None] * math.cos(angle) + axis[:, None] * math.sin(angle)
            clear = across.abs() > 1e-6
            assert torch.equal(bank[4 * step].sign()[clear], across.sign()[clear].double())
            assert bank[4 * step][~clear].abs().max() < 1e-7
    bank = edges_and_lines(3).double()
    assert torch.linalg.matrix_rank(bank.flatten(1), atol=1e-6) == 8
    column = torch.tensor([-1.0, 0, 1]).double().expand(3, 3) / 6
    torch.testing.assert_close(bank[0], column, rtol=0, atol=1e-7)
    torch.testing.assert_close(bank[2], torch.tensor([-1.0, 2, -1]).double().expand(3, 3) / 12, rtol=0, atol=1e-7)
    torch.testing.assert_close(bank[8], bank[0].T, rtol=0, atol=1e-7)


def test_edges_and_lines_layer_maps_channel_i_to_kernel_i_mod_16():
    layer = LinearCombinationConv2d(5, 4, 3, padding=1, bank="edges_and_lines", form="depthwise", expansion=7)
    bank = edges_and_lines(3)
    for channel in range(35):
        assert torch.equal(layer.bank.filters[channel, 0], bank[channel % 16])
    step = torch.zeros(1, 1, 9, 9)
    step[..., 5:] = 1
    single = LinearCombinationConv2d(1, 16, 3, padding=0, bank="edges_and_lines", form="depthwise", expansion=16)
    answers = F.conv2d(step, single.bank.filters, groups=1).abs().amax((0, 2, 3))
    assert int(answers.argmax()) in (0, 1)  # the edge of 0 degrees and its negative
    assert single(torch.ones(1, 1, 8, 8)).abs().max() < 1e-6


def test_edges_and_lines_parameter_count_on_resnet18():
    host = timm.create_model("resnet18", num_classes=10)
    host.conv1, host.maxpool = nn.Conv2d(3, 64, 3, padding=1, bias=False), nn.Identity()
    assert sum(p.numel() for p in host.parameters()) == 11_173_962
    settings = {"bank": "edges_and_lines", "form": "depthwise", "mode": "two_layer", "middle": "bn_relu"}
    model = convx.linear_combinations(host, "layer*", **settings)
    assert sum(p.numel() for p in model.parameters()) == 1_415_882


# ------------------------------------------------------------------------------------------ filters, measured


def test_entropy_goldens():
    assert measures.entropy_of_random_filters(48) == pytest.approx(0.88624, abs=1e-5)
    assert measures.entropy_of_random_filters(4096) == pytest.approx(0.95107, abs=1e-5)
    first = [measures.filter_variance_entropy(draw_bank("iid_uniform", (16, 3, 3, 3), s)) for s in range(40)]
    assert np.mean(first) == pytest.approx(0.913, abs=0.005)
    wide = draw_bank("iid_uniform", (64, 64, 3, 3), 0)
    assert measures.filter_variance_entropy(wide) == pytest.approx(0.9538, abs=3e-4)
    assert measures.normalised_entropy(wide) == pytest.approx(1.003, abs=1e-3)
    for size, golden in ((5, 1.3966), (7, 1.6876), (9, 1.9043)):
        bank = draw_bank("iid_uniform", (64, 64, size, size), 0)
        assert measures.filter_variance_entropy(bank) == pytest.approx(golden, abs=5e-4)
        assert golden < math.log10(size**2)
    for size, golden in ((5, 1.283), (7, 1.466), (9, 1.544)):
        stems = [measures.filter_variance_entropy(draw_bank("iid_uniform", (16, 3, size, size), s)) for s in range(20)]
        assert np.mean(stems) == pytest.approx(golden, abs=0.01)


def test_entropy_of_degenerate_filters():
    pattern = torch.randn(3, 3, generator=torch.Generator().manual_seed(0))
    scales = torch.randn(8, 4, 1, 1, generator=torch.Generator().manual_seed(1))
    assert measures.filter_variance_entropy(scales * pattern) == pytest.approx(0, abs=1e-9)
    assert measures.filter_variance_entropy(pattern.expand(8, 4, 3, 3)) == 0
    assert measures.filter_variance_entropy(torch.zeros(8, 4, 3, 3)) == 0
    few = torch.randn(2, 2, 9, 9)  # fewer filters than weights: rank-deficient, no NaN
    assert 0 < measures.filter_variance_entropy(few) <= math.log10(3) + 1e-9
    bank = draw_bank("iid_normal", (8, 8, 3, 3), 0)
    moved = 7 * bank + pattern
    assert measures.filter_variance_entropy(moved) == pytest.approx(measures.filter_variance_entropy(bank), abs=1e-6)
    with pytest.raises(ValueError, match="3x3 kernels, not 5x5"):
        measures.normalised_entropy(torch.randn(4, 4, 5, 5))


def test_measures_look_at_the_effective_kernel_not_at_the_bank():
    torch.manual_seed(0)
    host = create_model("resnet8_16", 10)
    model = convx.linear_combinations(host, expansion=16)
    with torch.no_grad():  # combinations that make every filter a multiple of one pattern
        conv = nn.Conv2d(64, 64, 3, bias=False)
        conv.weight.copy_(torch.randn(64, 64, 1, 1) * torch.randn(3, 3))
        model.layer3[0].conv2 = LinearCombinationConv2d.from_conv(conv, fit=True, expansion=16)
    rows = {(r["metric"], r["conditions"].get("layer")): r["value"] for r in measures.run(model).rows}
    assert rows["filter_variance_entropy", "last"] < 1e-4
    assert rows["filter_variance_entropy", "first"] == pytest.approx(1.03, abs=0.03)
    assert measures.normalised_entropy(model.layer3[0].conv2.bank.filters) > 0.99
    assert list(measures.effective_kernels(model)) == [n for n, _ in lc_layers(model).items()]
    for expansion in (1, 16, 128):  # before training, any expansion looks random
        assert measures.normalised_entropy(
            LinearCombinationConv2d(64, 64, 3, expansion=expansion, seed=expansion).effective_kernel()
        ) == pytest.approx(1.0, abs=0.01)
    layer = convx.linear_combinations(host, mode="two_layer", middle="relu")
    assert measures.effective_kernels(layer) == {}
    assert {r["value"] for r in measures.run(layer).rows} == {None}


def test_spatial_variance():
    flat = measures.spatial_variance([draw_bank("iid_uniform", (64, 64, k, k), k) for k in (3, 9)] * 2)
    assert set(flat) == {(3, 3), (9, 9)}
    for heat in flat.values():
        torch.testing.assert_close(heat, torch.ones_like(heat), rtol=0.1, atol=0)
    kernel = centred_kernel(32, 32, 5, 0)
    scaled = measures.spatial_variance([kernel, kernel * 100])[(5, 5)]  # each layer counts alike, whatever its scale
    once = measures.spatial_variance([kernel])[(5, 5)]
    torch.testing.assert_close(scaled, once, rtol=1e-5, atol=1e-6)
    expected = kernel.double().flatten(0, 1).var(0, correction=0) / kernel.double().var()
    torch.testing.assert_close(once, expected, rtol=1e-6, atol=1e-9)
    assert measures.centre_to_border(once) > 5


def test_the_law_of_random_combinations():
    rows = measures.law(expansions=range(1, 17))
    for entry in rows:
        assert entry["measured"] == pytest.approx(entry["predicted"], abs=0.03), entry
    assert all(entry["measured"] < 1e-9 for entry in rows if entry["expansion"] >= 9)
    assert rows[7]["measured"] > 0.3
    assert measures.best_fit_residual(3, 16, 3, 2) < 1e-9 < measures.best_fit_residual(3, 16, 3, 1)  # the stem: E >= 2
    assert measures.best_fit_residual(16, 32, 3, 5) < 1e-9 < measures.best_fit_residual(16, 32, 3, 4)  # c_out = 2 c_in


def test_the_law_can_be_drawn():
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots()
    rows = measures.law(expansions=(1, 4, 9))
    measures.plot_law(axes, rows)
    drawn = axes.lines[1].get_xydata()
    np.testing.assert_allclose(drawn, [[r["ratio"], r["measured"]] for r in rows])
    pyplot.close(figure)
