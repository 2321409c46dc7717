"""The small backbones: golden sizes, stages, any image size, names and their errors."""

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from convx.models import FAMILIES, check_name, create_model, family

GOLDEN = {  # name: (parameters, those outside spatial convolutions, million multiply-accumulates at 32 px)
    "resnet20_16": (272_474, 4_778, 40.8),
    "resnet20_16_k5": (748_378, 4_778, 112.9),
    "resnet20_16_k7": (1_462_234, 4_778, 221.0),
    "resnet20_16_k9": (2_414_042, 4_778, 365.2),
    "resnet20_32": (1_084_586, 14_666, 162.4),
    "resnet20_64": (4_327_754, 49_802, 647.7),
    "resnet20_128": (17_289_866, 181_514, 2587.0),
    "resnet20_256": (69_117_194, 690_698, 10341.9),
    "resnet8_8": (19_954, 1_306, 3.24),
    "resnet20_16_dw": (40_165, 34_522, 6.3),
    "bottleneck29_16": (313_114, 167_530, 47.1),
    "mobilenet20_16": (414_730, 381_322, 61.9),
    "convmixer128_8": (166_026, 137_738, 40.5),
    "convmixer256_8_k5_p2": (594_186, 537_610, 148.1),
}
SMALL = ["resnet8_4", "resnet8_4_k5_dw", "bottleneck11_4", "mobilenet8_4", "convmixer8_2_k3_p2"]


def spatial_weights(model):
    convs = [m for m in model.modules() if isinstance(m, nn.Conv2d) and m.kernel_size != (1, 1)]
    return sum(p.numel() for m in convs for p in m.parameters())


@pytest.mark.parametrize("name", GOLDEN)
def test_golden_sizes(name):
    total, rest, macs = GOLDEN[name]
    with torch.device("meta"):
        model = create_model(name, 10).eval()
        images = torch.zeros(1, 3, 32, 32)
    assert sum(p.numel() for p in model.parameters()) == total
    assert total - spatial_weights(model) == rest
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        assert model(images).shape == (1, 10)
    assert counter.get_total_flops() / 2e6 == pytest.approx(macs, rel=2e-3)


def test_sizes_by_formula():
    """The counts follow from the papers' block diagrams, written out here independently of the code."""

    def resnet(depth, width, k):
        n, total = (depth - 2) // 6, 3 * width * k * k + 2 * width
        for stage in range(3):
            c = width * 2**stage
            c_in = c if stage == 0 else c // 2
            total += c_in * c * k * k + (2 * n - 1) * c * c * k * k + 2 * n * 2 * c
            total += 0 if stage == 0 else c_in * c + 2 * c
        return total + 4 * width * 10 + 10

    def bottleneck(depth, width):
        n, total, c_in = (depth - 2) // 9, 3 * 9 * width + 2 * width, width
        for stage in range(3):
            w = width * 2**stage
            for place in range(n):
                total += c_in * w + 9 * w * w + w * 4 * w + 2 * (w + w + 4 * w)
                total += c_in * 4 * w + 2 * 4 * w if place == 0 else 0
                c_in = 4 * w
        return total + c_in * 10 + 10

    def mobilenet(depth, width):
        n, total, c_in = (depth - 2) // 3, 3 * 9 * width + 2 * width, width
        for stage in range(3):
            c = width * 2**stage
            for place in range(n):
                inner = c_in if stage == place == 0 else 6 * c_in
                total += 0 if stage == place == 0 else c_in * inner + 2 * inner
                total += 9 * inner + 2 * inner + inner * c + 2 * c
                c_in = c
        return total + c_in * 4 * c_in + 2 * 4 * c_in + 4 * c_in * 10 + 10

    def convmixer(width, depth, k, patch):
        stem = 3 * patch**2 * width + width + 2 * width
        block = (k * k * width + width) + 2 * width + (width**2 + width) + 2 * width
        return stem + depth * block + width * 10 + 10

    assert resnet(20, 16, 3) == GOLDEN["resnet20_16"][0] and resnet(8, 8, 3) == GOLDEN["resnet8_8"][0]
    assert resnet(20, 16, 9) == GOLDEN["resnet20_16_k9"][0]
    assert bottleneck(29, 16) == GOLDEN["bottleneck29_16"][0]
    assert mobilenet(20, 16) == GOLDEN["mobilenet20_16"][0]
    assert convmixer(128, 8, 5, 2) == GOLDEN["convmixer128_8"][0]
    assert convmixer(256, 8, 5, 2) == GOLDEN["convmixer256_8_k5_p2"][0]


@pytest.mark.parametrize("name", SMALL)
def test_any_size_channels_and_batch(name):
    model = create_model(name, 7, in_channels=1).eval()
    assert model.num_classes == 7
    for batch, height, width in ((1, 8, 8), (3, 28, 28), (2, 19, 33)):
        assert model(torch.randn(batch, 1, height, width)).shape == (batch, 7)
    names = dict(model.named_modules())
    features = model.forward_features(torch.randn(2, 1, 32, 32))
    last = model.feature_info[-1]
    assert features.shape[2:] == (32 // last["reduction"],) * 2
    seen = {}
    for entry in model.feature_info:
        names[entry["module"]].register_forward_hook(lambda m, i, o, key=entry["module"]: seen.update({key: o.shape}))
    model(torch.randn(2, 1, 32, 32))
    for entry in model.feature_info:
        side = 32 // entry["reduction"]
        assert seen[entry["module"]] == (2, entry["num_chs"], side, side)


@pytest.mark.parametrize("name", SMALL)
def test_every_parameter_learns_and_layouts_agree(name):
    torch.manual_seed(0)
    model = create_model(name, 5).double()
    x = torch.randn(4, 3, 16, 16, dtype=torch.float64)
    model(x).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    model.eval()
    expected = model(x)
    assert not torch.equal(expected[0], expected[1])
    last = model.to(memory_format=torch.channels_last)(x.to(memory_format=torch.channels_last))
    torch.testing.assert_close(last, expected, rtol=0, atol=1e-12)


def test_resnet_start_and_structure():
    torch.manual_seed(0)
    model = create_model("resnet20_16", 10)
    assert [e["module"] for e in model.feature_info] == ["layer1", "layer2", "layer3"]
    convs = [m for m in model.modules() if isinstance(m, nn.Conv2d)]
    assert all(m.bias is None for m in convs) and len([m for m in convs if m.kernel_size == (3, 3)]) == 19
    for conv in convs:  # PyTorch's default, not He et al.'s
        bound = (conv.in_channels * conv.kernel_size[0] ** 2) ** -0.5
        assert 0.98 * bound < conv.weight.abs().max() <= bound
    assert isinstance(model.layer1[0].shortcut, nn.Identity)
    shortcut = model.layer2[0].shortcut
    assert shortcut[0].kernel_size == (1, 1) and shortcut[0].stride == (2, 2)
    assert isinstance(shortcut[1], nn.BatchNorm2d)
    five = create_model("resnet8_8_k5", 10)
    assert five.layer2[0].conv1.kernel_size == (5, 5) and five.layer2[0].conv1.padding == (2, 2)


def test_depthwise_resnet_is_linear_between_its_two_convolutions():
    pair = create_model("resnet8_4_dw", 10).layer2[0].conv1
    assert [type(m) for m in pair] == [nn.Conv2d, nn.Conv2d]
    assert pair[0].groups == pair[0].in_channels == 4 and pair[0].stride == (2, 2) and pair[1].kernel_size == (1, 1)


def test_settings_override_the_name():
    assert create_model("resnet20_16", 10, depth=8).layer1[0] is not None
    assert len(create_model("resnet20_16", 10, depth=8).layer1) == 1
    assert create_model("convmixer8_2", 10, kernel=9).blocks[0].depthwise.kernel_size == (9, 9)
    assert len(create_model("bottleneck29_16", 10, depth=11).layer3) == 1


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("resnet17_16", {}, r"6n \+ 2 layers"),
        ("resnet20_16_k4", {}, "must be odd"),
        ("resnet20_0", {}, "at least one channel"),
        ("resnet20_16", {"widht": 3}, "unknown setting 'widht'"),
        ("bottleneck20_16", {"depth": 21}, r"9n \+ 2 layers"),
        ("bottleneck29_16", {"kernel": 3}, "unknown setting 'kernel'"),
        ("mobilenet7_8", {}, r"3n \+ 2 layers"),
        ("mobilenet8_8", {"kernel": 3}, "unknown setting 'kernel'"),
        ("convmixer8_2_k4", {}, "must be odd"),
        ("convmixer8_2", {"paths": 3}, "unknown setting 'paths'"),
        ("convmixer8_0", {}, "at least 1"),
        ("convmixer8_2_p16", {"image_size": 8}, "below the patch of 16 px"),
        ("resnt20_16", {}, "did you mean 'resnet20_16'"),
        ("timm/resnet1", {}, "did you mean 'timm/resnet18'|did you mean"),
    ],
)
def test_errors(name, settings, message):
    with pytest.raises(ValueError, match=message):
        create_model(name, 10, **settings)


def test_each_family_has_an_example_of_its_own():
    for key, (_, example, line) in FAMILIES.items():
        assert family(example) == key and line
        check_name(example)
    assert family("resnet18") is None  # timm's names stay timm's
