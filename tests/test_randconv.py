"""Linear combinations of fixed random filters: the block, what is stored, the verbs, and training."""

import copy
import hashlib

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import load_model, save_model
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import convx
from convx import config
from convx.evaluate import EvaluationData, attacks
from convx.evaluate.cost import parameter_counts, stored_bytes
from convx.layers.filter_banks import BANKS
from convx.layers.linear_combination import LinearCombinationConv2d
from convx.models import create_model
from convx.surgery import apply

CASES = {
    "plain": {"padding": 1},
    "stride": {"stride": 2, "padding": 1},
    "pointwise": {"kernel_size": 1},
    "five": {"kernel_size": 5, "padding": 2},
    "nine_no_padding": {"kernel_size": 9},
    "oblong": {"kernel_size": (1, 3), "padding": (0, 1), "stride": (2, 1)},
    "dilated": {"dilation": 2, "padding": "same"},
    "groups": {"groups": 2, "padding": 1},
    "depthwise": {"groups": 6, "out_channels": 6, "padding": 1},
    "depthwise_multiplier": {"groups": 6, "out_channels": 12, "padding": 1, "stride": 2},
    "reflect": {"padding": 2, "padding_mode": "reflect"},
    "circular_same": {"padding": "same", "padding_mode": "circular", "dilation": 2},
    "bias": {"bias": True, "padding": 1},
}


def block(case="plain", dtype=torch.float64, **settings):
    shape = {"in_channels": 6, "out_channels": 8, "kernel_size": 3} | CASES[case]
    return LinearCombinationConv2d(**shape, **settings).to(dtype)


def images(dtype=torch.float64, seed=0, n=2, channels=6, size=(13, 11)):
    return torch.randn(n, channels, *size, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def two_layer(layer):
    twin = copy.deepcopy(layer)
    twin.mode = "two_layer"
    return twin


def lc_layers(model):
    return {n: m for n, m in model.named_modules() if isinstance(m, LinearCombinationConv2d)}


def banks_of(model):
    return {n: hashlib.sha256(m.bank.filters.numpy().tobytes()).hexdigest() for n, m in lc_layers(model).items()}


def batch(n=8, size=16, classes=10, seed=0):
    rng = torch.Generator().manual_seed(seed)
    return torch.randn(n, 3, size, size, generator=rng), torch.randint(classes, (n,), generator=rng)


# -------------------------------------------------------------------------------------------------- the block


@pytest.mark.parametrize("form", ["dense", "depthwise"])
@pytest.mark.parametrize("case", CASES)
def test_folded_two_layer_fold_and_effective_kernel_agree(case, form):
    layer = block(case, expansion=3, form=form, seed=5)
    x = images()
    out = layer(x)
    plain = layer.fold()
    assert type(plain) is nn.Conv2d
    for key in ("stride", "padding", "dilation", "groups", "padding_mode", "kernel_size"):
        assert getattr(plain, key) == getattr(layer, key)
    assert plain.weight.shape == layer.effective_kernel().shape
    for other in (two_layer(layer)(x), plain(x)):
        assert other.shape == out.shape
        torch.testing.assert_close(other, out, rtol=0, atol=4e-15 * 20)
    reference = nn.Conv2d(
        layer.in_channels, layer.out_channels, layer.kernel_size, layer.stride, layer.padding, layer.dilation,
        layer.groups, layer.bias is not None, layer.padding_mode,
    )  # fmt: skip
    assert reference(x.float()).shape == out.shape


@pytest.mark.parametrize("expansion", [1, 16, 128])
def test_fold_in_float32_is_within_1e_5(expansion):
    layer = LinearCombinationConv2d(16, 16, 3, padding=1, expansion=expansion)
    x = images(torch.float32, channels=16, size=(32, 32))
    with torch.no_grad():
        assert (layer(x) - two_layer(layer)(x)).abs().max() <= 1e-5
        assert torch.equal(layer(x), layer.fold()(x))


@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize("form", ["dense", "depthwise"])
@pytest.mark.parametrize("case", ["stride", "groups", "depthwise_multiplier", "bias"])
def test_gradients_of_both_modes_agree(case, form, frozen):
    folded = block(case, expansion=2, form=form, frozen=frozen)
    grads = []
    for layer in (folded, two_layer(folded)):
        x = images().requires_grad_()
        weight = images(seed=1, channels=layer.out_channels, size=layer(x).shape[2:])
        (layer(x) * weight).sum().backward()
        assert (layer.bank.filters.grad is None) == frozen
        grads.append([x.grad, *(p.grad for p in layer.parameters())])
    for ours, other in zip(*grads):
        torch.testing.assert_close(ours, other, rtol=1e-10, atol=1e-10)


def test_gradcheck():
    layer = block("groups", expansion=2, frozen=False)

    def call(x, combination, filters):
        parts = {"combination": combination, "bank.filters": filters}
        return torch.func.functional_call(layer, parts, (x,))

    x = images(size=(4, 5)).requires_grad_()
    arguments = [x, layer.combination, layer.bank.filters]
    assert torch.autograd.gradcheck(call, [a.detach().clone().requires_grad_() for a in arguments])


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.float64, 1e-9)])
def test_five_optimiser_steps_in_both_modes(dtype, tolerance, monkeypatch):
    if dtype == torch.float32:
        # A ReLU whose input is within float32's rounding of zero switches on some processors in one mode only, and the
        # trajectories part by 1e-4 in a step; a smooth activation tests the two modes and not the kink.
        monkeypatch.setattr(F, "relu", F.silu)
    x, labels = batch()
    torch.manual_seed(0)
    host = create_model("resnet8_8", 10)
    ends = []
    for mode in ("folded", "two_layer"):
        model = convx.linear_combinations(host, expansion=4, mode=mode, seed=1).to(dtype)
        optimiser = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, nesterov=True, weight_decay=1e-2)
        for _ in range(5):
            optimiser.zero_grad()
            F.cross_entropy(model(x.to(dtype)), labels, label_smoothing=0.1).backward()
            optimiser.step()
        ends.append(torch.nn.utils.parameters_to_vector(model.parameters()))
    assert (ends[0] - ends[1]).abs().max() <= tolerance


def test_orthonormal_bank_reproduces_training_of_the_plain_network():
    x, labels = (t.double() if t.is_floating_point() else t for t in batch())
    torch.manual_seed(0)
    plain = create_model("resnet8_8", 10).double()
    model = convx.linear_combinations(plain, expansion=9, bank="orthonormal", start="fit")
    for layer in lc_layers(model).values():  # the bank is stored in float32; here it must be orthonormal in float64
        q, _ = torch.linalg.qr(layer.bank.filters.flatten(1))
        layer.bank.filters = q.view_as(layer.bank.filters)
    for (_, layer), conv in zip(
        lc_layers(model).items(),
        (m for m in plain.modules() if isinstance(m, nn.Conv2d) and m.kernel_size == (3, 3)),
    ):
        with torch.no_grad():
            layer.combination.copy_(conv.weight.flatten(1) @ layer.bank.filters.flatten(1).T)
    for net in (plain, model):
        optimiser = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9, nesterov=True, weight_decay=1e-2)
        for _ in range(6):
            optimiser.zero_grad()
            F.cross_entropy(net(x), labels).backward()
            optimiser.step()
    folded = convx.fold(model)
    for (name, ours), theirs in zip(folded.named_parameters(), plain.parameters()):
        assert (ours - theirs).abs().max() <= 1e-10, name


def test_middle_operations_equal_the_three_layers_by_hand():
    x = images()
    for middle in ("none", "relu", "bn", "bn_relu"):
        layer = block("bias", expansion=2, mode="two_layer", middle=middle)
        y = F.conv2d(x, layer.bank.filters, padding=1)
        if "bn" in middle:
            y = (y - y.mean((0, 2, 3), keepdim=True)) / (y.var((0, 2, 3), correction=0, keepdim=True) + 1e-5).sqrt()
        if "relu" in middle:
            y = y.clamp_min(0)
        expected = torch.einsum("om,bmhw->bohw", layer.combination, y) + layer.bias[:, None, None]
        torch.testing.assert_close(layer(x), expected, rtol=0, atol=1e-12)
        assert layer.foldable == (middle == "none")
        assert sum(p.numel() for p in layer.between.parameters()) == (2 * 16 if "bn" in middle else 0)
    with pytest.raises(ValueError, match="no effective kernel"):
        layer.fold()


def test_a_model_with_middle_operations_is_left_as_it_is_by_fold():
    model = convx.linear_combinations(create_model("resnet8_8", 10), mode="two_layer", middle="relu").eval()
    folded = convx.fold(model)
    assert len(lc_layers(folded)) == 7
    x, _ = batch()
    assert torch.equal(folded(x), model(x))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"middle": "relu"}, "set mode='two_layer'"),
        ({"bank": "edges_and_lines"}, "set form='depthwise'"),
        ({"mode": "fast"}, "one of folded, two_layer"),
        ({"expansion": 0}, "whole number >= 1"),
        ({"expansion": 1.5}, "whole number >= 1"),
        ({"bank": "sobel"}, "the banks are iid_uniform"),
        ({"bank": "shared"}, "shared_shape=None"),
        ({"bank": "shared", "shared_shape": (4, 6)}, "must hold 8 x 6"),
        ({"bank": "covariance"}, "needs root"),
        ({"form": "depthwise", "bank": "edges_and_lines", "kernel_size": (1, 3)}, "square kernel"),
    ],
)
def test_errors_of_the_block(settings, message):
    with pytest.raises(ValueError, match=message):
        LinearCombinationConv2d(**({"in_channels": 6, "out_channels": 8, "kernel_size": 3} | settings))


def test_fit_is_the_nearest_kernel_of_the_span():
    torch.manual_seed(0)
    for case in ("plain", "groups", "depthwise", "depthwise_multiplier"):
        shape = {"in_channels": 6, "out_channels": 8, "kernel_size": 3} | CASES[case]
        conv = nn.Conv2d(**shape, dtype=torch.float64)
        exact = LinearCombinationConv2d.from_conv(conv, fit=True, expansion=9)
        torch.testing.assert_close(exact.effective_kernel(), conv.weight, rtol=0, atol=1e-11)
        torch.testing.assert_close(exact(images()), conv(images()), rtol=0, atol=1e-10)
        poor = LinearCombinationConv2d.from_conv(conv, fit=True, expansion=1)
        residual = (conv.weight - poor.effective_kernel()).detach()
        through = torch.einsum("boP,bmP->bom", poor._split(residual), poor._filters())
        assert through.abs().max() < 1e-12 < residual.abs().max()  # normal equations


# ----------------------------------------------------------------------------------------- frozen, and stored


@pytest.mark.parametrize("autocast", [False, True])
def test_frozen_filters_keep_their_bits_in_training(autocast):
    torch.manual_seed(0)
    model = convx.linear_combinations(create_model("resnet8_8", 10), expansion=3, seed=2)
    before, start = banks_of(model), copy.deepcopy(model.state_dict())
    ema = timm.utils.ModelEmaV3(model, decay=0.5)
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    for step in range(4):
        x, labels = batch(seed=step)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = F.cross_entropy(model(x).float(), labels)
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        ema.update(model)
    assert banks_of(model) == before == banks_of(ema.module)
    for layer in lc_layers(model).values():
        assert not layer.bank.filters.requires_grad and layer.bank.filters.grad is None
    held = {id(p) for p in optimiser.state}
    assert held == {id(p) for p in model.parameters()}
    for name, parameter in model.named_parameters():
        assert not torch.equal(parameter, start[name]), name
    assert not [name for name in model.state_dict() if name.endswith("filters")]


def test_the_learned_control_learns_its_filters():
    model = convx.linear_combinations(create_model("resnet8_8", 10), expansion=2, frozen=False)
    x, labels = batch()
    F.cross_entropy(model(x), labels).backward()
    for layer in lc_layers(model).values():
        assert layer.bank.filters.grad.abs().sum() > 0
    frozen = convx.linear_combinations(create_model("resnet8_8", 10), expansion=2)
    assert banks_of_parameters(model) == banks_of(frozen)


def banks_of_parameters(model):
    found = lc_layers(model).items()
    return {n: hashlib.sha256(m.bank.filters.detach().numpy().tobytes()).hexdigest() for n, m in found}


@pytest.mark.parametrize("bank", BANKS)
def test_a_checkpoint_holds_the_seed_and_reloads_to_the_same_bits(bank, tmp_path):
    form = "depthwise" if bank == "edges_and_lines" else "dense"
    torch.manual_seed(0)
    host = create_model("resnet8_8", 10)
    model = convx.linear_combinations(host, expansion=4, bank=bank, form=form, seed=7).eval()
    save_model(model, str(tmp_path / "model.safetensors"))
    torch.manual_seed(1)
    other = create_model("resnet8_8", 10)  # another start, another covariance
    twin = convx.linear_combinations(other, expansion=4, bank=bank, form=form, seed=8).eval()
    x, _ = batch()
    assert bank == "edges_and_lines" or banks_of(twin) != banks_of(model)
    load_model(twin, str(tmp_path / "model.safetensors"), strict=True)
    assert banks_of(twin) == banks_of(model)
    assert torch.equal(twin(x), model(x))
    size = (tmp_path / "model.safetensors").stat().st_size
    weights = stored_bytes(model)
    assert weights < size < weights + 20_000  # the header names the tensors
    filters = sum(m.bank.filters.numel() for m in lc_layers(model).values())
    # two integers a layer, the running statistics, and what the covariance bank keeps of its donor
    buffers = sum(b.numel() * b.element_size() for b in model.buffers()) - 4 * filters
    assert weights == 4 * parameter_counts(model)["trainable"] + buffers
    assert sum(m.bank.key.numel() * 8 for m in lc_layers(model).values()) == 7 * 16


def test_a_bank_that_cannot_be_redrawn_is_an_error():
    model = convx.linear_combinations(create_model("resnet8_8", 10), expansion=2, seed=3)
    state = model.state_dict()
    state["stem.bank.key"] = state["stem.bank.key"] + torch.tensor([0, 1])
    with pytest.raises(RuntimeError, match="another iid_uniform bank than the one that was saved"):
        model.load_state_dict(state)


def test_precision_of_the_model_leaves_the_bank_in_float32():
    model = convx.linear_combinations(create_model("resnet8_8", 10), expansion=2, seed=3).eval()
    before, x = banks_of(model), batch()[0]
    expected = model(x)
    half = copy.deepcopy(model).to(torch.bfloat16)
    assert half(x.bfloat16()).dtype == torch.bfloat16 and banks_of(half) == before
    assert (half(x.bfloat16()).float() - expected).abs().max() < 0.1
    assert banks_of(copy.deepcopy(model).half().float()) == before
    double = copy.deepcopy(model).double()
    assert double(x.double()).dtype == torch.float64 and banks_of(double.float()) == before
    with torch.autocast("cpu", torch.bfloat16):
        assert lc_layers(model)["stem"].effective_kernel().dtype == torch.float32
        assert two_layer(lc_layers(model)["stem"])(x).dtype == torch.bfloat16
    empty = copy.deepcopy(model).to("meta").to_empty(device="cpu")
    empty.load_state_dict(model.state_dict())
    assert banks_of(empty) == before and torch.equal(empty(x), expected)


def test_channels_last_and_any_size_and_batch():
    model = convx.linear_combinations(create_model("resnet8_8", 10), expansion=2).eval().double()
    x = images(channels=3, n=1, size=(19, 33))
    expected = model(x)
    last = copy.deepcopy(model).to(memory_format=torch.channels_last)
    assert all(layer.bank.filters.is_contiguous() for layer in lc_layers(last).values())
    torch.testing.assert_close(last(x.to(memory_format=torch.channels_last)), expected, rtol=0, atol=1e-12)


@pytest.mark.slow
def test_torch_compile_trains_the_same():
    layer = block("stride", torch.float32, expansion=2)
    twin, x = copy.deepcopy(layer), images(torch.float32)
    for module in (torch.compile(layer), twin):
        module(x).square().mean().backward()
    torch.testing.assert_close(layer.combination.grad, twin.combination.grad, rtol=1e-4, atol=1e-6)


# ------------------------------------------------------------------------------------------- verbs and models

TABLE = {  # expansion: (all, learnable when frozen, million MACs of two layers, million MACs of the fold)
    1: (304_986, 37_290, 45.8, 14.8),
    2: (605_194, 69_802, 91.3, 29.7),
    4: (1_205_610, 134_826, 182.4, 59.3),
    8: (2_406_442, 264_874, 364.5, 118.6),
    16: (4_808_106, 524_970, 728.8, 237.2),
    32: (9_611_434, 1_045_162, 1457, 474.4),
    64: (19_218_090, 2_085_546, 2914, 948.9),
    128: (38_431_402, 4_166_314, 5828, 1898),
}


def macs(model):
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.eval()(torch.zeros(1, 3, 32, 32))
    return counter.get_total_flops() / 2e6


@pytest.mark.parametrize("expansion", TABLE)
def test_golden_parameters_and_macs(expansion):
    total, learnable, layered, fold_cost = TABLE[expansion]
    host = create_model("resnet20_16", 10)
    model = convx.linear_combinations(host, expansion=expansion)
    assert parameter_counts(model) == {"parameters": total, "trainable": learnable}
    assert macs(model) - macs(host) == pytest.approx(fold_cost, abs=0.06 if fold_cost < 1000 else 0.6)
    for layer in lc_layers(model).values():
        layer.mode = "two_layer"
    assert macs(model) == pytest.approx(layered, abs=0.06 if layered < 1000 else 0.6)
    if expansion <= 8:
        control = convx.linear_combinations(host, expansion=expansion, frozen=False)
        assert parameter_counts(control) == {"parameters": total, "trainable": total}


def test_learnable_count_does_not_depend_on_the_kernel_and_grows_with_width():
    for name, learnable in (
        ("resnet20_16_k5", 37_290), ("resnet20_16_k7", 37_290), ("resnet20_16_k9", 37_290),
        ("resnet20_32", 144_714), ("resnet20_64", 569_994),
        ("resnet20_128", 2_262_282), ("resnet20_256", 9_013_770),
    ):  # fmt: skip
        with torch.device("meta"):
            host = create_model(name, 10)
        model = convx.linear_combinations(host, expansion=1)
        assert parameter_counts(model)["trainable"] == learnable
    for expansion, learnable in ((1, 4_058), (4, 12_314), (9, 26_074), (16, 45_338)):
        model = convx.linear_combinations(create_model("resnet8_8", 10), expansion=expansion)
        assert parameter_counts(model)["trainable"] == learnable


def test_freeze_spatial():
    torch.manual_seed(0)
    host = create_model("resnet20_16", 10)
    model = convx.freeze_spatial(host)
    assert all(p.requires_grad for p in host.parameters())
    assert parameter_counts(model)["trainable"] == 4_778
    fixed = {n for n, p in model.named_parameters() if not p.requires_grad}
    assert "stem.weight" in fixed and len(fixed) == 19
    assert not any("shortcut" in n or "bn" in n or n.startswith("fc") for n in fixed)
    start = copy.deepcopy(model.state_dict())
    optimiser = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1, weight_decay=0.1)
    F.cross_entropy(model(batch()[0]), batch()[1]).backward()
    optimiser.step()
    for name, value in model.state_dict().items():
        assert torch.equal(value, start[name]) == (name in fixed), name  # running statistics move as well
    assert all(p.grad is None for n, p in model.named_parameters() if n in fixed)


def test_freeze_spatial_catches_biases_and_patch_stems():
    model = convx.freeze_spatial(timm.create_model("convnext_atto", num_classes=10))
    names = [n for n, p in model.named_parameters() if not p.requires_grad]
    assert {"stem.0.weight", "stem.0.bias", "stages.1.downsample.1.weight"} <= set(names)
    assert any(n.endswith("conv_dw.bias") for n in names) and not any("fc" in n or "norm" in n for n in names)


@pytest.mark.parametrize("name", ["convnext_atto", "mobilenetv3_small_050", "resnet18"])
def test_timm_models_keep_their_shapes_and_fold(name):
    torch.manual_seed(0)
    host = timm.create_model(name, num_classes=7).eval()
    x = torch.randn(2, 3, 64, 64)
    for form in ("dense", "depthwise"):
        model = convx.linear_combinations(host, expansion=2, form=form)
        assert len(model.surgery_log) == len(lc_layers(model)) > 5
        with torch.no_grad():
            out = model(x)
            assert out.shape == (2, 7)
            torch.testing.assert_close(convx.fold(model)(x), out, rtol=1e-4, atol=1e-4)
    assert not lc_layers(convx.fold(model))


def test_fit_keeps_the_function_of_a_depthwise_host():
    torch.manual_seed(0)
    host = create_model("convmixer16_2_k3", 10).double().eval()
    model = convx.linear_combinations(host, "blocks", expansion=9, start="fit")
    x = images(channels=3)
    torch.testing.assert_close(model(x), host(x), rtol=0, atol=1e-8)
    assert next(iter(lc_layers(model).values())).combination.shape == (16, 9)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"expansion": 0}, "expansion=0 is out of range"),
        ({"bank": "sobel"}, "bank='sobel' is not valid"),
        ({"donor": "self"}, "donor='self' is not valid"),
        ({"start": "warm"}, "start='warm' is not valid"),
        ({"layers": "layer9.*"}, "matches no convolution .*these could match: stem"),
        ({"start": "fit", "mode": "two_layer", "middle": "relu"}, "only a linear block can be fitted"),
    ],
)
def test_errors_of_the_verb(settings, message):
    with pytest.raises(ValueError, match=message):
        convx.linear_combinations(create_model("resnet8_8", 10), **settings)


def test_every_declared_variant_builds():
    declared = {k: v for k, v in config.declared_variants().items() if v["paper"] == "randconv"}
    assert {"cnn_frozen", "lc_frozen_x1", "lc_frozen_x128", "lc_learned_x8", "lc_frozen_relu_x64"} <= set(declared)
    x, _ = batch()
    for name, entry in declared.items():
        assert entry["origin"], name
        host = entry.get("model", {}).get("name", "resnet8_8")
        host = {"resnet20": "resnet8"}.get(host[:8], host[:8]) + host[8:]
        host = "_".join(["resnet8_4", *host.split("_")[2:]]) if host.startswith("resnet8") else host
        steps = [
            s | ({"expansion": min(s["expansion"], 8)} if "expansion" in s else {}) for s in entry.get("surgery", [])
        ]
        model = apply(create_model(host, 10), steps, seed=0).eval()
        assert model(x).shape == (8, 10), name
        for path in entry["origin"]:  # each origin speaks of a value that is there
            node = entry
            for part in path.split("."):
                node = node[int(part)] if isinstance(node, list) else node[part]
        named = {p.split(".")[2] for p in entry["origin"] if p.startswith("surgery.0.")}
        for step in entry.get("surgery", [])[:1]:
            assert named == set(step) - {"verb"}, name


# --------------------------------------------------------------------------------------------------- training


def gratings(count, seed):
    """Return (uint8 [N, 16, 16, 3], labels): noisy gratings at eight angles, which need oriented filters."""
    rng, axis = np.random.default_rng(seed), np.arange(16) - 7.5
    labels = np.arange(count) % 8
    across = (
        np.cos(labels * np.pi / 8)[:, None, None] * axis + np.sin(labels * np.pi / 8)[:, None, None] * axis[:, None]
    )
    waves = np.sin(1.2 * across + rng.uniform(0, 2 * np.pi, (count, 1, 1))) + 1.5 * rng.standard_normal((count, 16, 16))
    grey = np.clip(128 + 28 * waves, 0, 255).astype(np.uint8)
    return np.repeat(grey[..., None], 3, axis=3), labels


@pytest.mark.slow
def test_combinations_make_up_for_frozen_filters():
    """A basic-block network with frozen filters fails where their combinations do not (figures 1 and 4)."""
    normal = {"mean": [0.5] * 3, "std": [0.2] * 3}
    images_NHWC, labels_N = gratings(1024, seed=0)
    train = EvaluationData.from_arrays(images_NHWC, labels_N, batch_size=64, **normal)
    test = EvaluationData.from_arrays(*gratings(512, seed=1), **normal)
    torch.manual_seed(0)
    host = create_model("resnet8_8", 8)
    accuracy = {}
    for name, model in {
        "frozen": convx.freeze_spatial(host),
        "x9": convx.linear_combinations(host, expansion=9),
    }.items():
        learned = [p for p in model.parameters() if p.requires_grad]
        optimiser = torch.optim.SGD(learned, lr=0.05, momentum=0.9, nesterov=True, weight_decay=5e-4)
        rng = torch.Generator().manual_seed(0)
        for _ in range(4):
            for chosen in torch.randperm(1024, generator=rng).split(64):
                x_BCHW = train.normalise(torch.from_numpy(images_NHWC[chosen.numpy()]).permute(0, 3, 1, 2))
                loss = F.cross_entropy(model(x_BCHW), train.labels[chosen])
                optimiser.zero_grad(set_to_none=True)
                loss.backward()
                optimiser.step()
        assert loss.isfinite()
        optimiser.zero_grad(set_to_none=True)
        rows = attacks.run(model, test, {"epsilons": [1, 8]}).rows
        assert all(p.grad is None for p in model.parameters())
        with torch.no_grad():
            right = torch.cat([model.eval()(test.normalise(x)).argmax(1) == y for x, y in test.raw_batches()])
        accuracy[name] = [100 * float(right.float().mean()), *(r["value"] for r in rows)]
    for clean, one, eight in accuracy.values():
        assert clean >= one >= eight
    assert accuracy["frozen"][0] < 60 < 90 < accuracy["x9"][0]
    assert accuracy["x9"][2] < accuracy["x9"][0]
