"""T-CNN: the recast layer is the convolution at its start, stays attention afterwards, and trains."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import convx
from convx import config, surgery
from convx.layers import gpsa_attend
from convx.layers.gpsa import GatedPositionalAttention
from convx.layers.gpsa_fold import Conv2dSame
from convx.layers.gpsa_positions import centres_and_spans
from convx.models import create_model
from convx.papers.tcnn import analysis


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def make_conv(c_in=8, c_out=8, k=3, dtype=torch.float64, **settings) -> nn.Conv2d:
    settings.setdefault("padding", k // 2 if isinstance(k, int) else 0)
    return nn.Conv2d(c_in, c_out, k, **settings).to(dtype)


def recast(conv, attention=True, **settings) -> GatedPositionalAttention:
    """Recast with a seed; with ``attention`` the layer may not take the convolution for itself."""
    layer = GatedPositionalAttention.from_conv(conv, generator=torch.Generator().manual_seed(1), **settings)
    if attention:
        layer.tolerance = 0.0
    return layer


def relative(found, wanted) -> float:
    return float(((found - wanted).norm() / wanted.norm()).detach())


def calibrated_resnet(name="resnet8_8", channels=3) -> nn.Module:
    """A random network whose batch statistics fit its inputs, so that its logits are of ordinary size."""
    net = create_model(name, num_classes=10, in_channels=channels).train()
    with torch.no_grad():
        for _ in range(20):
            net(torch.randn(16, channels, 32, 32))
    return net.eval()


def stir(layer: GatedPositionalAttention, share=0.3) -> GatedPositionalAttention:
    """Move every parameter away from its start: open gates, wide heads, real content, a mixing W_val."""
    with torch.no_grad():
        layer.gate.uniform_(share / 2, share)
        layer.query.mul_(20)
        layer.key.mul_(20)
        layer.value.add_(0.1 * torch.randn_like(layer.value))
        layer.positions.add_(0.2 * torch.randn_like(layer.positions))
    return layer


# ------------------------------------------------------------------------------------------- the start


SHAPES = [
    (k, s, p, d, groups, bias, size)
    for k, s, d, (groups, bias), size in itertools.product(
        (1, 2, 3, 5, 7), (1, 2), (1, 2), ((1, True), (4, False), (8, True)), ((8, 8), (13, 9))
    )
    for p in sorted({0, k // 2, 2})
    if (k - 1) * d + 1 <= min(size) + 2 * p
]  # fmt: skip


@pytest.mark.parametrize("attention", [True, False])
def test_identity_of_every_shape_in_float64(attention):
    for k, s, p, d, groups, bias, size in SHAPES:
        conv = make_conv(k=k, stride=s, padding=p, dilation=d, groups=groups, bias=bias)
        x = torch.randn(2, 8, *size, dtype=torch.float64)
        with torch.no_grad():
            error = (recast(conv, attention, locality=46.0)(x) - conv(x)).abs().max()
        assert error < 1e-12, (k, s, p, d, groups, bias, size)


@pytest.mark.parametrize("attention", [True, False])
@pytest.mark.parametrize("stride", [1, 2])
def test_identity_in_float32(stride, attention):
    conv = make_conv(32, 32, stride=stride, dtype=torch.float32)
    x = torch.randn(2, 32, 14, 13).relu()
    layer = recast(conv, attention, locality=20.0)
    assert (layer(x) - conv(x)).abs().max() < 1e-5  # with the content path
    with torch.no_grad():
        assert (layer(x) - conv(x)).abs().max() < 1e-5  # without


@pytest.mark.parametrize("mode", ["reflect", "circular", "replicate"])
def test_identity_of_other_paddings_rectangular_kernels_and_string_padding(mode):
    x = torch.randn(2, 8, 9, 7, dtype=torch.float64)
    for conv in (
        make_conv(padding=2, padding_mode=mode, k=3),
        make_conv(k=(1, 5), padding=(0, 2), padding_mode=mode),
        make_conv(k=(4, 2), padding="same", padding_mode=mode),
        make_conv(k=3, padding="valid"),
    ):
        for attention in (True, False):
            with torch.no_grad():
                assert (recast(conv, attention, locality=46.0)(x) - conv(x)).abs().max() < 1e-12


def test_error_falls_with_locality_by_the_analytic_law():
    x = torch.randn(4, 64, 8, 8).relu()
    errors = analysis.initial_error(make_conv(64, 64, bias=False), x, [2, 3, 5, 8, 10, 15, 20])
    assert all(a[1] > b[1] for a, b in itertools.pairwise(errors))
    for alpha, error, law in errors:
        if alpha >= 3:
            assert 0.5 * law < error < 1.2 * law, alpha


@pytest.mark.parametrize("alpha,law", [(1, 0.682), (3, 0.173), (5, 2.6e-2), (10, 1.8e-4), (20, 8.2e-9)])
def test_epsilon_is_the_mass_off_the_pixel(alpha, law):
    assert analysis.epsilon(alpha) == pytest.approx(law, rel=2e-2)
    assert analysis.epsilon(46) == pytest.approx(4 * 2.718281828459045**-46, rel=1e-6)


@pytest.mark.parametrize("alpha", [0.5, 1.0, 2.0, 3.0])
def test_small_locality_is_no_convolution(alpha):
    """Guards against a layer that keeps the convolution inside."""
    conv, x = make_conv(16, 16, dtype=torch.float32), torch.randn(2, 16, 8, 8)
    layer = recast(conv, attention=False, locality=alpha)
    with torch.no_grad():
        assert relative(layer(x), conv(x)) > 0.1
    assert not layer.foldable
    with pytest.raises(ValueError, match="not a convolution"):
        layer.effective_kernel()


@pytest.mark.parametrize("attention", [True, False])
def test_without_halo_the_border_is_replicated(attention):
    for k, size in ((3, 8), (3, 4), (5, 7)):
        conv, x = make_conv(k=k), torch.randn(2, 8, size, size, dtype=torch.float64)
        layer = recast(conv, attention, locality=46.0, border="replicate")
        padded = F.pad(x, [k // 2] * 4, mode="replicate")
        wanted = F.conv2d(padded, conv.weight, conv.bias)
        with torch.no_grad():
            assert (layer(x) - wanted).abs().max() < 1e-12
            assert relative(layer(x), conv(x)) > 0.1


def test_stride_samples_the_full_map_and_keeps_the_shape():
    for k, p, size in itertools.product((2, 3, 5), (0, 1, 2), range(4, 18)):
        if k > size + 2 * p:
            continue
        conv = make_conv(4, 4, k=k, padding=p, stride=2)
        x = torch.randn(1, 4, size, size + 1, dtype=torch.float64)
        full = recast(make_conv(4, 4, k=k, padding=p), locality=46.0)
        with torch.no_grad():
            for name in ("out_weight", "bias"):
                getattr(full, name).copy_(getattr(recast(conv), name))
            found = recast(conv, locality=46.0)(x)
            assert found.shape == conv(x).shape
            assert (found - full(x)[..., ::2, ::2]).abs().max() < 1e-12


def test_each_tap_is_its_own_shift():
    """Neither the transposed kernel (head order) nor the flipped one (sign of the offsets)."""
    x = torch.randn(1, 1, 6, 7, dtype=torch.float64)
    for ky, kx in itertools.product(range(3), range(3)):
        conv = make_conv(1, 1, bias=False)
        with torch.no_grad():
            conv.weight.zero_()[0, 0, ky, kx] = 1
            found = recast(conv, locality=46.0)(x)
        wanted = F.pad(x, (1, 1, 1, 1))[..., ky : ky + 6, kx : kx + 7]
        assert (found - wanted).abs().max() < 1e-12
        for wrong in (conv.weight.transpose(2, 3), conv.weight.flip(2, 3)):
            if not torch.equal(wrong, conv.weight):
                assert (found - F.conv2d(x, wrong, padding=1)).abs().max() > 0.1


def test_tensorflow_padding_at_every_size():
    timm_layers = pytest.importorskip("timm.layers")
    for k, s, size in itertools.product((3, 5), (1, 2), range(6, 9)):
        conv = timm_layers.Conv2dSame(8, 8, k, s, groups=8, bias=True).double()
        x = torch.randn(1, 8, size, size + 1, dtype=torch.float64)
        with torch.no_grad():
            layer = recast(conv, locality=46.0)
            assert (layer(x) - conv(x)).abs().max() < 1e-12
            layer.tolerance = None
            folded = layer.fold()
            assert (folded(x) - conv(x)).abs().max() < 1e-12
            assert (recast(folded, locality=46.0)(x) - conv(x)).abs().max() < 1e-12


# ------------------------------------------------------------------------------------------- attention


def test_rows_sum_to_one_and_content_ignores_the_halo():
    for border in ("zero_halo", "replicate"):
        layer = stir(recast(make_conv(stride=2), locality=2.0, border=border))
        x = torch.randn(3, 8, 7, 6, dtype=torch.float64)
        maps = analysis.attention_maps(layer, x)
        for kind in ("positional", "content", "mixed"):
            assert (maps[kind].sum(-1) - 1).abs().max() < 1e-12
        inside = ((maps["keys"] >= 0) & (maps["keys"] < torch.tensor([7, 6]))).all(1)
        assert inside.all() == (border == "replicate")
        assert maps["content"][..., ~inside].eq(0).all()


def textbook(layer: GatedPositionalAttention, x):
    """Padded keys, both attentions materialised for every sample: the layer by its definition."""
    maps = analysis.attention_maps(layer, x)["mixed"]
    p = layer.padding[0] if layer.border == "zero_halo" else 0
    v = F.conv2d(x, layer.value[:, :, None, None], groups=layer.groups)
    v = F.pad(v, (p,) * 4).flatten(2)
    z = torch.einsum("bhqn,bcn->bqhc", maps, v).unflatten(3, (layer.groups, -1))
    y = torch.einsum("bqhgi,gohi->bgoq", z, layer.out_weight.unflatten(0, (layer.groups, -1))).flatten(1, 2)
    return y + (0 if layer.bias is None else layer.bias[:, None])


@pytest.mark.parametrize("cache,memory", [(2**22, 2**28), (1, 1)])
@pytest.mark.parametrize("border", ["zero_halo", "replicate"])
@pytest.mark.parametrize("groups,stride", [(1, 1), (1, 2), (2, 1), (8, 2)])
def test_attends_as_defined(groups, stride, border, cache, memory, monkeypatch):
    """Open gates, in one piece and sample by sample and row by row; the gradients too."""
    monkeypatch.setattr(gpsa_attend, "CACHE_BYTES", cache)
    monkeypatch.setattr(gpsa_attend, "MEMORY_BYTES", memory)
    layer = stir(recast(make_conv(groups=groups, stride=stride), locality=1.5, border=border))
    x = torch.randn(3, 8, 7, 6, dtype=torch.float64, requires_grad=True)
    y = layer(x)
    assert (y.flatten(2) - textbook(layer, x)).abs().max() < 1e-12
    with torch.no_grad():
        assert (layer(x) - y).abs().max() < 1e-12


@pytest.mark.parametrize("groups,stride,content", [(1, 1, True), (2, 2, True), (1, 1, False)])
def test_gradients(groups, stride, content):
    layer = stir(recast(make_conv(4, 4, groups=groups, stride=stride), locality=1.5, key_dim=2))
    if not content:
        layer.gate.data.zero_()
        layer.gate.requires_grad_(False)
    names = [n for n, p in layer.named_parameters() if p.requires_grad and (content or n not in ("query", "key"))]
    values = [layer.get_parameter(n).detach().clone().requires_grad_() for n in names]
    x = torch.randn(2, 4, 4, 3, dtype=torch.float64, requires_grad=True)

    def call(x, *values):
        return torch.func.functional_call(layer, dict(zip(names, values, strict=True)), (x,))

    assert torch.autograd.gradcheck(call, (x, *values), fast_mode=True)


def test_large_maps_go_through_the_profiles(monkeypatch):
    """The separable path equals the dense one, values and gradients."""
    conv, x = make_conv(groups=2, stride=2), torch.randn(2, 8, 9, 10, dtype=torch.float64)
    layer = recast(conv, locality=1.5)
    layer.gate.requires_grad_(False)
    found = []
    for limit in (0, 10**9):
        monkeypatch.setattr(gpsa_attend, "DENSE_MAP", limit)
        layer.zero_grad()
        y = layer(x)
        y.square().sum().backward()
        found.append((y.detach(), layer.positions.grad.clone(), layer.out_weight.grad.clone()))
    for separable, dense in zip(*found, strict=True):
        assert relative(separable, dense) < 1e-12


GATE_ERRORS = {0: 0.41, 1: 0.22, 2: 0.098, 3: 0.039, 4: 0.015, 5: 5.5e-3, 6: 2.0e-3, 8: 2.8e-4, 10: 3.7e-5}


def test_gates():
    """The published shape of the error: that of the sigmoid's tail; a linear gate at zero has none."""
    conv, x = make_conv(64, 64, bias=False), torch.randn(4, 64, 8, 8).relu()
    measured = {}
    for start, wanted in GATE_ERRORS.items():
        ((_, error, _),) = analysis.initial_error(conv, x, [30], gate="sigmoid", gate_init=start)
        assert error == pytest.approx(wanted, rel=0.25), start
        measured[start] = error
    for start in (4, 6, 8):
        share = 1 / (1 + 2.718281828**start) / (1 / (1 + 2.718281828**10))
        assert measured[start] / measured[10] == pytest.approx(share, rel=0.05)
    assert analysis.initial_error(conv, x, [30])[0][1] < 1e-12


def test_positional_attention_is_a_renormalised_gaussian_blur():
    """Without halo: a separable Gaussian (cut at 7 pixels) over the blur of ones, shifted to each tap."""
    conv, alpha = make_conv(3, 3, bias=False), 0.75
    layer = recast(conv, locality=alpha, border="replicate")
    x = torch.randn(2, 3, 10, 12, dtype=torch.float64)
    wanted = 0
    for ky, kx in itertools.product(range(3), range(3)):
        n = torch.arange(-7, 8, dtype=torch.float64)
        gauss = torch.outer(torch.exp(-alpha * (n - ky + 1) ** 2), torch.exp(-alpha * (n - kx + 1) ** 2))[None, None]
        blur = F.conv2d(x, gauss.repeat(3, 1, 1, 1), padding=7, groups=3)
        ones = F.conv2d(torch.ones_like(x[:1, :1]), gauss, padding=7)
        wanted = wanted + F.conv2d(blur / ones, conv.weight[:, :, ky : ky + 1, kx : kx + 1])
    with torch.no_grad():
        assert relative(layer(x), wanted) < 1e-9


def test_autocast_and_extreme_locality():
    conv, x = make_conv(8, 8, dtype=torch.float32), torch.randn(1, 8, 32, 32)
    for alpha in (46.0, 1000.0):
        layer = recast(conv, locality=alpha)
        with torch.autocast("cpu", torch.bfloat16):
            y, wanted = layer(x), conv(x)
            assert all(a.dtype == torch.float32 for a in layer.pixel_profiles(32, 32))
        assert y.dtype == wanted.dtype == torch.bfloat16
        assert relative(y.float(), wanted.float()) < 2e-2
        y.float().sum().backward()
        assert all(p.grad.isfinite().all() for p in layer.parameters())
    for dtype in (torch.float16, torch.bfloat16):
        half = recast(conv, attention=False, locality=20.0).to(dtype)
        with torch.no_grad():
            assert relative(half(x.to(dtype)).float(), conv(x)) < 2e-2


# ------------------------------------------------------------------------------- networks and training


def test_whole_network_starts_as_the_cnn_and_other_sizes_too():
    net = calibrated_resnet("resnet20_16")
    new = convx.recast_attention(net, ["{stage-1}", "{stage-2}"], locality=20.0)
    assert len(new.surgery_log) == 12
    for size in (32, 40):
        x = torch.randn(4, 3, size, size)
        wanted = net(x)
        for found in (new(x), convx.fold(new)(x)):
            assert relative(found, wanted) < 1e-5
            assert found.argmax(1).equal(wanted.argmax(1))
    net.train(), new.train()
    x = torch.randn(8, 3, 32, 32)
    assert relative(new(x), net(x)) < 1e-5
    theirs = dict(net.named_buffers())
    for name, buffer in new.named_buffers():
        assert torch.allclose(buffer.float(), theirs[name].float(), rtol=1e-5, atol=1e-6), name


def test_defaults_classify_as_the_cnn():
    net = calibrated_resnet()
    x = torch.randn(200, 3, 32, 32)
    with torch.no_grad():
        wanted, found = net(x), convx.recast_attention(net, "{stage-1}")(x)
    assert relative(found, wanted) < 2e-5 and found.argmax(1).equal(wanted.argmax(1))


def test_parameters_and_state_round_trip(tmp_path):
    from safetensors.torch import load_model, save_model

    conv = make_conv(64, 32, dtype=torch.float32)
    layer = stir(recast(conv, key_dim=10))
    count = sum(p.numel() for p in layer.parameters())
    assert count - sum(p.numel() for p in conv.parameters()) == 2 * 64 * 9 * 10 + 64**2 + 4 * 9
    assert recast(conv).key_dim == 8 and recast(make_conv(512, 8)).key_dim == 56
    net = create_model("resnet8_8", 10)
    new = convx.recast_attention(net, "{stage-1}", seed=3)
    for module in new.modules():
        if isinstance(module, GatedPositionalAttention):
            stir(module)
    save_model(new, str(tmp_path / "model.safetensors"))
    other = convx.recast_attention(net, "{stage-1}", seed=4)
    load_model(other, str(tmp_path / "model.safetensors"), strict=True)
    again = convx.recast_attention(net, "{stage-1}", seed=5)
    again.load_state_dict(new.state_dict(), strict=True)
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        wanted = new.eval()(x)
        assert other.eval()(x).equal(wanted) and again.eval()(x).equal(wanted)


def test_gradients_reach_everything_and_zero_queries_are_never_drawn():
    layer = recast(make_conv(dtype=torch.float32), locality=2.0, gate="sigmoid", gate_init=3.0)
    layer(torch.randn(4, 8, 8, 8)).square().mean().backward()
    for name, parameter in layer.named_parameters():
        assert parameter.grad.abs().max() > 0, name
    assert layer.query.abs().max() > 0 and layer.key.abs().max() > 0
    linear = recast(make_conv(dtype=torch.float32))
    linear(torch.randn(4, 8, 8, 8)).square().mean().backward()
    assert linear.gate.grad.abs().min() > 0 and linear.query.grad.abs().max() == 0
    with torch.no_grad():
        layer.query.zero_(), layer.key.zero_()
    layer.zero_grad()
    layer(torch.randn(4, 8, 8, 8)).square().mean().backward()
    assert layer.query.grad.abs().max() == 0 == layer.key.grad.abs().max()  # the saddle that the draw avoids


def test_centres_spans_and_non_locality():
    layer = recast(make_conv(dilation=2, padding=2), locality=30.0)
    centres, spans = centres_and_spans(layer.positions.double())
    wanted = torch.tensor(list(itertools.product((-2.0, 0.0, 2.0), repeat=2)), dtype=torch.float64)
    assert (centres - wanted).abs().max() < 1e-6 and (spans * 30 - 1).abs().max() < 1e-6
    plain = recast(make_conv(), locality=46.0)
    found = analysis.non_locality(plain, torch.randn(2, 8, 6, 5, dtype=torch.float64))
    assert (found - torch.tensor([2**0.5, 1, 2**0.5, 1, 0, 1, 2**0.5, 1, 2**0.5])).abs().max() < 1e-6
    assert found.mean() == pytest.approx((4 + 4 * 2**0.5) / 9, abs=1e-6)


def test_analysis_reads_the_true_inputs_and_leaves_the_model_alone():
    net = convx.recast_attention(calibrated_resnet(), "{stage-1}", locality=20.0)
    net.train()
    before = {k: v.clone() for k, v in net.state_dict().items()}
    x = torch.randn(4, 3, 32, 32)
    names = list(analysis.recast_layers(net))
    inputs = analysis.activations(net, x, names, inputs=True)
    assert [tuple(inputs[n].shape[1:]) for n in names] == [(16, 16, 16), (32, 8, 8)]
    rows = analysis.rows(net, x)
    assert len(rows) == 2 * 5 * 9 and net.training
    centre = [r["value"] for r in rows if r["metric"] == "non_locality" and r["conditions"]["head"] == 4]
    assert max(abs(v) for v in centre) < 1e-3
    assert all(v.equal(before[k]) for k, v in net.state_dict().items())
    layer = net.get_submodule(names[1])
    one = analysis.attention_at(layer, inputs[names[1]], row=0, column=3, kind="positional")
    assert one.shape == (1, 9, 10, 10) and one[0, 0].argmax() == 3  # key (-1, 2)
    with pytest.raises(ValueError, match="no recast layer"):
        analysis.rows(calibrated_resnet(), x)


def test_cka():
    features = torch.randn(30, 20)
    rotation = torch.linalg.qr(torch.randn(20, 20))[0]
    assert analysis.linear_cka(features, 3 * features @ rotation) == pytest.approx(1, abs=1e-6)
    assert analysis.linear_cka(torch.randn(500, 3), torch.randn(500, 3)) < 0.1
    net = calibrated_resnet()
    new = convx.recast_attention(net, "{stage-1}", locality=20.0)
    rows = analysis.cka_rows(new, net, torch.randn(12, 3, 32, 32), ["layer2", "layer3"])
    assert [r["value"] for r in rows] == pytest.approx([1, 1], abs=1e-6)
    with pytest.raises(ValueError, match="same for all images"):
        analysis.linear_cka(torch.ones(4, 2), features[:4])


@pytest.mark.parametrize("gate", ["linear", "sigmoid"])
def test_fifty_steps_lower_the_loss_and_move_the_gates(gate):
    start = 0.0 if gate == "linear" else 3.0
    net = convx.recast_attention(calibrated_resnet(), "{stage-1}", locality=5.0, gate=gate, gate_init=start).train()
    x, y = torch.randn(16, 3, 16, 16), torch.randint(0, 10, (16,))
    optimizer = torch.optim.AdamW(net.parameters(), lr=3e-3)
    losses = []
    for _ in range(50):
        loss = F.cross_entropy(net(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        for layer in analysis.recast_layers(net).values():
            layer.after_step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.5 * losses[0]
    for layer in analysis.recast_layers(net).values():
        assert (layer.gate - start).abs().max() > 0.01
        assert all(torch.tensor(v).isfinite() for v in layer.diagnostics().values())
        assert gate == "sigmoid" or (layer.gate.min() >= 0 and layer.gate.max() <= 1)


def test_training_hooks():
    layer = recast(make_conv(), gate_lr_factor=10.0, position_lr_factor=0.5)
    groups = {id(p): g for g in layer.param_groups() for p in g["params"]}
    assert groups[id(layer.gate)]["lr_factor"] == 10 and groups[id(layer.positions)]["lr_factor"] == 0.5
    assert all(g["weight_decay"] == 0 for g in groups.values()) and len(groups) == 2
    with torch.no_grad():
        layer.gate.copy_(torch.linspace(-1, 2, 9))
    layer.after_step()
    assert layer.gate.min() == 0 and layer.gate.max() == 1
    assert layer.diagnostics()["content_share_8"] == 1


def test_controls():
    net = calibrated_resnet()
    conv = net.get_submodule("layer3.0.conv2")
    closed = convx.recast_attention(net, "{stage-1}", frozen="gates").get_submodule("layer3.0.conv2")
    assert [n for n, p in closed.named_parameters() if not p.requires_grad] == ["query", "key", "gate"]
    fixed = convx.recast_attention(net, "{stage-1}", frozen="projections").get_submodule("layer3.0.conv2")
    assert [n for n, p in fixed.named_parameters() if not p.requires_grad] == ["value", "query", "key"]
    x = torch.randn(2, 32, 8, 8)
    drawn = convx.recast_attention(net, "{stage-1}", filters="random").get_submodule("layer3.0.conv2")
    assert relative(drawn(x), conv(x)) > 0.5 and drawn.out_weight.detach().std() == pytest.approx(
        float(conv.weight.detach().std()), rel=0.1
    )
    lost = convx.recast_attention(net, "{stage-1}", positions="random").get_submodule("layer3.0.conv2")
    assert lost.positions.detach().abs().max() < 0.1 and relative(lost(x), conv(x)) > 0.5
    same, again, other = (
        convx.recast_attention(net, "{stage-1}", seed=s).get_submodule("layer3.0.conv2").query for s in (1, 1, 2)
    )
    assert same.equal(again) and not same.equal(other)


def test_declared_variants_can_be_built_and_name_their_origins():
    declared = {n: v for n, v in config.declared_variants().items() if v["paper"] == "tcnn"}
    assert {"tcnn", "cnn_finetuned", "tcnn_frozen_gates", "tcnn_scratch", "tcnn_partial_50"} <= set(declared)
    net = create_model("resnet8_8", 10)
    for name, variant in declared.items():
        origins = variant["origin"]
        for place, step in enumerate(variant.get("surgery", [])):
            assert {f"surgery.{place}.{key}" for key in step if key != "verb"} <= set(origins), name
        assert all(o.startswith(("paper: ", "official code: ", "own choice: ")) for o in origins.values()), name
        assert ("at_epoch" in variant) <= ({"at_epoch", "budget"} <= set(origins)), name
        new = surgery.apply(net, variant.get("surgery", []), seed=0)
        layers = [m for m in new.modules() if isinstance(m, GatedPositionalAttention)]
        assert len(layers) == {"cnn_finetuned": 0, "tcnn_two_stages": 4}.get(name, 2), name


def test_fold_is_the_convolution():
    x = torch.randn(2, 8, 9, 10, dtype=torch.float64)
    for border, settings in itertools.product(
        ("zero_halo", "replicate"),
        ({}, {"stride": 2}, {"groups": 4, "bias": False}, {"dilation": 2, "padding": 2}),
    ):
        layer = recast(make_conv(**settings), attention=False, locality=46.0, border=border)
        with torch.no_grad():
            layer.value.add_(0.1 * torch.randn_like(layer.value))
            wanted, folded = layer(x), layer.fold()
            layer.tolerance = 0.0
            assert (layer(x) - wanted).abs().max() < 1e-12
            assert type(folded) is nn.Conv2d and (folded(x) - wanted).abs().max() < 1e-12
            layer.gate[0] = 0.1
        layer.tolerance = None
        assert not layer.foldable
    moved = recast(make_conv(), attention=False, locality=46.0)
    with torch.no_grad():
        moved.positions[4, 0] += 46.0  # the middle head looks halfway to the right: half of each tap
        moved_folded = moved.fold()
        assert relative(moved_folded(x), moved(x)) < 1e-12
        moved.tolerance = 0.0
        assert relative(moved_folded(x), moved(x)) < 1e-12
    timm_same = recast(Conv2dSame(8, 8, 3, 2).double(), attention=False, locality=46.0)
    assert isinstance(timm_same.fold(), Conv2dSame)


def test_copies_formats_and_unbatched_input():
    import copy

    layer = stir(recast(make_conv(dtype=torch.float32)))
    x = torch.randn(2, 8, 6, 5)
    y = layer(x)
    assert copy.deepcopy(layer)(x).equal(y) and torch.allclose(layer(x[0]), y[0], atol=1e-5)
    last = layer(x.to(memory_format=torch.channels_last))
    assert last.is_contiguous(memory_format=torch.channels_last) and torch.allclose(last, y, atol=1e-5)


@pytest.mark.parametrize(
    "settings,words",
    [
        ({"layers": "stage9.*"}, "matches no convolution.*could match: stem"),
        ({"layers": "layer2.0.shortcut.*"}, "matches no convolution"),
        ({"locality": -1.0}, "locality=-1.0 is out of range"),
        ({"key_dim": 0}, "key_dim=0 is out of range"),
        ({"key_dim": 2.5}, "key_dim=2.5"),
        ({"gate": "hard"}, "gate='hard' is not valid; choose one of linear, sigmoid"),
        ({"border": "mask"}, "border='mask' is not valid"),
        ({"frozen": "all"}, "frozen='all' is not valid"),
        ({"gate_init": 2.0}, "gate_init=2.0 is out of range"),
    ],
)
def test_bad_input_is_one_clear_error(settings, words):
    with pytest.raises(ValueError, match=words) as error:
        convx.recast_attention(create_model("resnet8_8", 10), **settings)
    assert "\n" not in str(error.value)


def test_too_small_an_input_is_named():
    with pytest.raises(ValueError, match="smaller than the kernel"):
        recast(make_conv(k=5, padding=0))(torch.randn(1, 8, 4, 4, dtype=torch.float64))


@pytest.mark.slow
def test_compiles():
    layer = stir(recast(make_conv(dtype=torch.float32)))
    net = nn.Sequential(layer, nn.ReLU())
    x = torch.randn(2, 8, 6, 6)
    y = torch.compile(net)(x)
    assert torch.allclose(y, net(x), atol=1e-5)
    y.sum().backward()
    assert layer.gate.grad.abs().min() > 0
    with torch.no_grad():  # which path it takes depends on the parameters: traced, but not compiled once more
        assert torch.allclose(torch.compile(net, backend="eager")(x), net(x), atol=1e-5)
