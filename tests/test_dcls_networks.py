"""DCLS in networks: the verbs on convx's and timm's models, the small ConvNeXt, the variants and what is read
off them."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import convx
from convx import surgery
from convx.config import declared_variants
from convx.layers.dcls import DCLSConv2d
from convx.layers.dcls_kernels import limits
from convx.models import create_model
from convx.papers.dcls import analysis

VARIANTS = {name: entry for name, entry in declared_variants().items() if entry["paper"] == "dcls"}


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def host(name="convnext_cifar", seed=0, **settings):
    torch.manual_seed(seed)
    return create_model(name, num_classes=10, in_channels=3, image_size=32, **settings)


def count(model, trainable=False):
    return sum(p.numel() for p in model.parameters() if p.requires_grad or not trainable)


def build(name, seed=0):
    entry = VARIANTS[name]
    model = entry.get("model", {"name": "resnet8_8"})
    net = host(model["name"], **model.get("settings", {}))
    if entry.get("start_from"):
        net = surgery.apply(net, VARIANTS[entry["start_from"]]["surgery"], seed)
    return surgery.apply(net, entry.get("surgery", []), seed)


# ------------------------------------------------------------------------------------------------------ host


def test_the_small_convnext_has_the_parameters_of_its_formula():
    for name, kernels, settings in (
        ("convnext_cifar", (7, 7), {}),
        ("convnext_cifar_k3", (3, 3), {}),
        ("convnext_cifar", (15, 13), {"kernels": [15, 13]}),
    ):
        stem, down, head = 3 * 4 * 64 + 64 + 128, 128 + 64 * 128 * 4 + 128, 256 + 128 * 10 + 10
        block = [c * k * k + c + 2 * c + 8 * c * c + 5 * c + c for c, k in zip((64, 128), kernels)]
        assert count(host(name, **settings)) == stem + down + head + 3 * sum(block)
    assert count(host()) == 560_458


def test_the_small_convnext_runs_on_any_size_and_starts_near_the_identity():
    net = host(drop_path=0.2)
    for height, width in ((32, 32), (20, 28), (4, 4)):
        x = torch.randn(2, 3, height, width)
        features = net.stages[0](net.stem(x))
        assert features.shape == (2, 64, height // 2, width // 2) and net(x).shape == (2, 10)
        torch.testing.assert_close(features, net.stem(x), rtol=0, atol=1e-4)  # layer scale 1e-6
    assert surgery.stage_names(net) == ["stages.0", "stages.1"]
    assert net.fc.weight.std().item() == pytest.approx(0.02, rel=0.1) and net.fc.bias.count_nonzero() == 0
    for settings in ({"kernels": [7]}, {"kernels": [6, 7]}, {"drop_path": 1.0}, {"dilation": 0}):
        with pytest.raises(ValueError, match="convnext_cifar"):
            host(**settings)


def test_drop_path_keeps_the_mean_and_is_off_in_evaluation():
    net = host(drop_path=0.5).stages[1][-1]
    nn.init.ones_(net.gamma)
    x = torch.randn(1, 128, 4, 4).expand(4000, -1, -1, -1)
    with torch.no_grad():
        branch = (net.train()(x) - x)[:, 0, 0, 0]
        wanted = (net.eval()(x[:1]) - x[:1])[0, 0, 0, 0]
    assert set((branch / wanted).round(decimals=3).abs().tolist()) == {0.0, 2.0}
    assert branch.mean() / wanted == pytest.approx(1, abs=0.1)


# ----------------------------------------------------------------------------------------------------- verbs


def test_taps_at_equal_parameters_and_shared_positions():
    net = host()
    for interpolation, taps, tensors in (("bilinear", 29, 1), ("gauss", 21, 2)):
        new = convx.learnable_spacings(net, dilated_kernel_size=13, interpolation=interpolation)
        layers = [m for m in new.modules() if isinstance(m, DCLSConv2d)]
        assert len(layers) == 6 == len(new.surgery_log) and {m.kernel_count for m in layers} == {taps}
        assert 0 <= count(net) - count(new) < 3 * (64 + 128) * 2 and count(net) == 560_458
        owned = {id(p) for m in layers for p in (m.positions, m.sigma) if p is not None}
        assert len(owned) == 2 * tensors
        assert layers[0].positions is layers[2].positions is not layers[3].positions
        assert len({id(m.weight) for m in layers}) == 6
    alone = convx.learnable_spacings(net, dilated_kernel_size=13, share="none")
    layers = [m for m in alone.modules() if isinstance(m, DCLSConv2d)]
    assert len({id(m.positions) for m in layers}) == 6 and {m.kernel_count for m in layers} == {49 // 3}


def test_convnext_tiny_and_resnets_of_timm():
    timm = pytest.importorskip("timm")
    net = timm.create_model("convnext_tiny")
    assert count(net) == 28_589_128
    for interpolation, size, taps, wanted in (
        ("bilinear", 17, 34, 28_587_688),
        ("gauss", 23, 26, 28_586_536),
    ):
        new = convx.learnable_spacings(net, dilated_kernel_size=size, interpolation=interpolation)
        layers = [m for m in new.modules() if isinstance(m, DCLSConv2d)]
        assert len(layers) == 18 and {m.kernel_count for m in layers} == {taps} and count(new) == wanted
        assert len({id(m.positions) for m in layers}) == 4 and layers[0].padding == (size // 2, size // 2)
    net = timm.create_model("resnet26d")
    new = convx.learnable_spacings(net, layers="layer*", kernel_count=5, dilated_kernel_size=7)
    layers = {n: m for n, m in new.named_modules() if isinstance(m, DCLSConv2d)}
    assert set(layers) == {f"layer{s}.{b}.conv2" for s in range(1, 5) for b in range(2)}
    assert [m.stride for m in layers.values()] == [m.stride for n, m in net.named_modules() if n in layers]
    assert new.eval()(torch.randn(1, 3, 64, 48)).shape == (1, 1000)
    assert len({id(m.positions) for m in layers.values()}) == 4


def test_taps_on_the_convolution_s_grid_change_no_output():
    for net, layers in ((host(), "*"), (host("resnet8_8"), "layer*")):
        x = torch.randn(2, 3, 32, 32)
        new = convx.learnable_spacings(net.eval(), layers, positions="conv", dilated_kernel_size=9)
        torch.testing.assert_close(new(x), net(x), rtol=1e-5, atol=1e-5)


def test_same_seed_same_taps_and_the_input_is_not_edited():
    net = host()
    before = copy.deepcopy(net.state_dict())
    torch.manual_seed(5)
    state = torch.get_rng_state()
    first, again, other = (convx.learnable_spacings(net, dilated_kernel_size=13, seed=s) for s in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), state)  # nothing is drawn from the global stream
    same = {k: torch.equal(v, again.state_dict()[k]) for k, v in first.state_dict().items()}
    assert all(same.values())
    assert not torch.equal(first.stages[0][0].conv_dw.positions, other.stages[0][0].conv_dw.positions)
    assert not torch.equal(first.stages[0][0].conv_dw.weight, first.stages[0][1].conv_dw.weight)
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())


@pytest.mark.parametrize("wrong, message", [
    ({"interpolation": "cubic"}, "bilinear, triangle, gauss"), ({"share": "all"}, "stage, none"),
    ({"positions": "grid"}, "normal, uniform, conv"), ({"kernel_count": 0}, "kernel_count"),
    ({"dilated_kernel_size": 12}, "cannot keep the output size"),
    ({"repulsion_start": 1.5}, "repulsion_start"), ({"layers": "stem.*"}, "could match"),
    ({"positions": "conv", "kernel_count": 9}, "leave kernel_count out"),
])  # fmt: skip
def test_wrong_arguments_are_told_in_one_line(wrong, message):
    with pytest.raises(ValueError, match=message) as error:
        convx.learnable_spacings(host(), **wrong)
    assert "\n" not in str(error.value)


def test_folded_networks_have_the_same_logits_and_plain_convolutions():
    for name in ("dcls_bilinear", "dcls_gauss", "dcls_triangle", "dcls_resnet"):
        net = build(name)
        for module in net.modules():
            if isinstance(module, DCLSConv2d):
                module.place("uniform")
            if hasattr(module, "gamma"):
                nn.init.ones_(module.gamma)
        net.eval()
        folded = convx.fold(net)
        x = torch.randn(4, 3, 32, 32)
        with torch.no_grad():
            wanted, found = net(x), folded(x)
        assert not any(isinstance(m, DCLSConv2d) for m in folded.modules())
        assert (found - wanted).abs().max() < 1e-5 * max(1, wanted.abs().max().item()), name


def test_two_steps_make_one_repulsive_loss_over_all_layers():
    net = build("dcls_bilinear")
    losses = [m.auxiliary_loss(0.5) for m in net.modules() if isinstance(m, DCLSConv2d)]
    sets = [m.positions for m in analysis.dcls_layers(net).values()]
    assert len(sets) == 2 and losses[1:] == [None] * 5
    from convx.layers.dcls_spacings import overlap

    torch.testing.assert_close(losses[0], torch.stack([overlap(p) for p in sets]).mean().square())
    assert [build("dcls_no_repulsion").stages[0][0].conv_dw.auxiliary_loss(1.0)] == [None]


def train(net, steps=4, lr=0.03):
    x, y = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0)), torch.arange(4)
    layers = [m for m in net.modules() if isinstance(m, DCLSConv2d)]
    optimizer = torch.optim.AdamW([p for p in net.parameters() if p.requires_grad], lr=lr)
    for _ in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(net(x), y).backward()
        optimizer.step()
        for layer in layers:
            layer.after_step()
    return net


def test_frozen_positions_stay_and_learned_ones_move_inside_the_kernel():
    for name in ("dcls_frozen_positions", "dcls_uniform_frozen"):
        net = build(name)
        before = [m.positions.clone() for m in analysis.dcls_layers(net).values()]
        train(net)
        assert all(torch.equal(m.positions, b) for m, b in zip(analysis.dcls_layers(net).values(), before))
    for name in ("dcls_bilinear", "dcls_gauss"):
        net = build(name)
        before = [m.positions.clone() for m in analysis.dcls_layers(net).values()]
        train(net)
        for layer, start in zip(analysis.dcls_layers(net).values(), before):
            assert (layer.positions - start).abs().mean() > 1e-3
            for axis, size in zip(layer.positions, layer.kernel_size):
                assert limits(size)[0] <= axis.min() and axis.max() <= limits(size)[1]
            assert layer.sigma is None or (layer.sigma != 0.23).any()


def test_final_positions_are_kept_and_everything_else_is_drawn_anew():
    trained = train(build("dcls_bilinear"))
    fresh, again, other = (convx.freeze_spacings(trained, seed=s) for s in (3, 3, 4))
    for name, layer in analysis.dcls_layers(fresh).items():
        assert torch.equal(layer.positions, trained.get_submodule(name).positions)
        assert not layer.positions.requires_grad
    learned = dict(trained.named_parameters())
    start = build("dcls_bilinear")
    for name, parameter in fresh.named_parameters():
        if "positions" not in name:
            assert parameter.requires_grad and not torch.equal(parameter, learned[name]), name
            assert torch.equal(parameter, dict(again.named_parameters())[name])
            assert parameter.std().item() == pytest.approx(
                dict(start.named_parameters())[name].std().item(), rel=0.25, abs=1e-9
            )
    assert not torch.equal(fresh.fc.weight, other.fc.weight)
    assert trained.stages[0][0].conv_dw.positions.requires_grad
    bare = nn.Sequential(DCLSConv2d(3, 3, 4, 5, padding=2))
    bare.scale = nn.Parameter(torch.ones(1))
    with pytest.raises(ValueError, match="cannot start anew"):
        convx.freeze_spacings(nn.Sequential(bare))
    with pytest.raises(ValueError, match="matches no DCLS layer"):
        convx.freeze_spacings(host())


# ------------------------------------------------------------------------------------- variants and analysis


def test_every_variant_builds_and_its_numbers_have_an_origin():
    counts = {}
    for name, entry in VARIANTS.items():
        net = build(name)
        counts[name] = count(net), count(net, trainable=True)
        assert entry["origin"], name
        for place, step in enumerate(entry.get("surgery", [])):
            missing = [k for k in step if k != "verb" and f"surgery.{place}.{k}" not in entry["origin"]]
            assert not missing, (name, missing)
    arms = [
        counts[name][0]
        for name in (
            "dense7",
            "dcls_bilinear",
            "dcls_gauss",
            "dcls_triangle",
            "dcls_unshared",
            "dilated_fixed",
        )
    ]
    assert max(arms) - min(arms) < 0.0011 * max(arms)
    assert counts["dcls_frozen_positions"] == counts["dcls_final_positions_frozen"] == (560_074, 560_074 - 29 * 2 * 192)
    assert counts["dense3"][0] < counts["dense7"][0] < counts["dense_s"][0]
    reach = [m for m in build("dilated_fixed").modules() if isinstance(m, nn.Conv2d) and m.groups > 1]
    assert {(m.kernel_size, m.dilation, m.padding) for m in reach} == {((7, 7), (2, 2), (6, 6))}


def test_rows_histograms_and_the_verdict_on_spread():
    net = build("dcls_bilinear")
    rows = analysis.rows(net)
    assert {r["conditions"]["layer"] for r in rows} == {"stages.0.0.conv_dw", "stages.1.2.conv_dw", "all"}
    every = {r["metric"]: r for r in rows if r["conditions"]["layer"] == "all"}
    assert every["tap_radius_mean"]["value"] == pytest.approx(0.5 * (torch.pi / 2) ** 0.5, rel=0.03)
    assert every["tap_radius_mean"]["n"] == 29 * (64 + 128) and every["tap_share_outside"]["value"] == 0
    assert "did not spread" in analysis.unspread(rows)
    wide = analysis.rows(build("dcls_uniform_frozen"))
    assert analysis.unspread(wide) is None
    layer = net.stages[0][0].conv_dw
    with torch.no_grad():
        layer.positions.zero_()
        layer.positions[0, 0, 0, :3] = torch.tensor([5.0, -7.0, 0.4])
        layer.positions[1, 0, 0, :3] = torch.tensor([-2.0, 7.0, 0.6])
    found = analysis.rows(net)
    one = {r["metric"]: r["value"] for r in found if r["conditions"]["layer"] == "stages.0.0.conv_dw"}
    taps = 64 * 29
    assert one["tap_share_outside"] == pytest.approx(100 * 2 / taps)
    assert one["tap_radius_mean"] == pytest.approx((29**0.5 + 98**0.5 + 0.52**0.5) / taps, rel=1e-5)
    grid = analysis.position_histograms(net)["stages.0.0.conv_dw"]
    assert grid.shape == (15, 15) and grid.sum() == taps
    assert grid[12, 5] == grid[0, 14] == grid[7, 8] == 1 and grid[7, 7] == taps - 3
    weights = sum(net.stages[0][b].conv_dw.weight[0, 0, 0].abs().item() for b in range(3))
    assert analysis.position_histograms(net, weighted=True)["stages.0.0.conv_dw"][12, 5] == pytest.approx(weights)
    kernels = analysis.kernels(net)
    assert len(kernels) == 6 and kernels["stages.0.0.conv_dw"].shape == (64, 1, 15, 15)
    with pytest.raises(ValueError, match="no DCLS layer"):
        analysis.rows(host())


def test_curves_are_read_from_a_history():
    net = build("dcls_bilinear")
    row = {
        f"{n}.{k}": v for n, m in net.named_modules() if isinstance(m, DCLSConv2d) for k, v in m.diagnostics().items()
    }
    found = analysis.curves([{"epoch": 0} | row, {"epoch": 1} | {k: 2 * v for k, v in row.items()}])
    assert list(found) == list(analysis.dcls_layers(net))
    assert all(late == 2 * early for early, late in found.values())
    assert len(analysis.curves([row], "tap_overlap")) == 2
    with pytest.raises(ValueError, match="no column"):
        analysis.curves([{"epoch": 0}])
