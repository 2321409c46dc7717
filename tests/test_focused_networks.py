"""Focused networks: equal to the dense network with masks after each layer, whatever computes them; and the defects of
the public code, each with the behaviour that convx has instead."""

import copy
import threading

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import convx
from convx.layers.batchnorm_folding import fold_batchnorm, follows
from convx.layers.focused_map import FocusedMap
from convx.layers.focused_official import OfficialMap

NETWORKS = {  # name: where to insert
    "vgg11": "features.3",
    "vgg11_bn": "features.3",
    "resnet18": "layer1",
    "resnet50d": "layer1.0",
    "tf_efficientnet_lite0": "blocks.0",
    "mobilenetv3_small_050": "blocks.0",
    "convnext_atto": "stages.0",
    "densenet121": "features.pool0",
}


def network(name: str, size: int = 64) -> nn.Module:
    import timm

    torch.manual_seed(0)
    net = timm.create_model(name, num_classes=10).eval()
    if name.startswith("vgg"):  # without its hundred million weights
        net.pre_logits, net.head.fc = nn.Identity(), nn.Linear(512, 10)
    net.pretrained_cfg = {"input_size": (3, size, size)}  # of the pass that sees which layer follows which
    for module in net.modules():  # statistics of a trained network: the background of a normalisation is not zero
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.3)
            module.running_var.uniform_(0.5, 2)
            module.weight.data.uniform_(0.5, 1.5)
            module.bias.data.normal_(0, 0.3)
        if isinstance(getattr(module, "gamma", None), nn.Parameter):
            module.gamma.data.uniform_(0.5, 1)
    return net.requires_grad_(False)


def pictures(batch: int = 4, size: int = 64) -> torch.Tensor:
    """Noise that is loud in one quarter of each picture, another one each time."""
    x = torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(3)) * 0.1
    for k, image in enumerate(x):
        y, z = (size // 2) * (k // 2 % 2), (size // 2) * (k % 2)
        image[:, y + 3 : y + size // 2, z : z + size // 2 - 5] *= 10
    return x


def close(found, wanted, tolerance: float = 1e-5) -> bool:
    return float((found - wanted).abs().max()) < tolerance * float(wanted.abs().max())


def masked_reference(net, after: str, x, mask_B1HW, block: type | None = None) -> torch.Tensor:
    """Return the outputs of a network whose convolutions, and sums with the first shortcut, are masked by hooks."""
    started = []

    def cut(module, args, out):
        if started and out.dim() == 4:
            factor = round(mask_B1HW.shape[2] / out.shape[2])
            return out * F.max_pool2d(mask_B1HW.float(), factor)
        return None

    hooks = [
        m.register_forward_hook(cut)
        for m in net.modules()
        if isinstance(m, nn.Conv2d) or (block and isinstance(m, block))
    ]
    hooks.append(net.get_submodule(after).register_forward_hook(lambda *_: started.append(1)))
    out = net(x)
    for hook in hooks:
        hook.remove()
    return out


@pytest.mark.parametrize("region", ["bbox", "tiles", "mask"])
@pytest.mark.parametrize(
    ("name", "after"), [("vgg11", "features.3"), ("resnet18", "layer1"), ("tf_efficientnet_lite0", "blocks.1")]
)
def test_a_focused_network_is_the_masked_dense_one(name, after, region):
    """An oracle of its own: the folded network, dense, with masks put on by hooks."""
    from timm.models.resnet import BasicBlock

    net, x = network(name), pictures()
    focused = convx.focus(net, after, keep=0.2, coverage=0.9, region=region, pooling="plain", tile=4, dense_above=1.0)
    mask = focused.region(x).full_mask()
    assert 0.1 < mask.float().mean() < 0.8
    folded = fold_batchnorm(net, x[:1])
    wanted = masked_reference(folded, after, x, mask, BasicBlock)
    assert close(focused(x), wanted)
    assert not close(focused(x), folded(x), 1e-2)


@pytest.mark.parametrize("name", NETWORKS)
def test_backends_agree_and_batches_do_not_mix(name):
    net, x = network(name), pictures()
    x[3] = 0.01 * x[3]  # an image whose region is another one, or none
    for settings in ({"region": "bbox"}, {"region": "mask", "fill": "bias"}, {"region": "tiles", "pooling": "plain"}):
        settings |= {"keep": 0.25, "coverage": 0.9, "tile": 8, "dense_above": 0.95}
        focused, outs = convx.focus(net, NETWORKS[name], **settings), {}
        for backend in ("crop", "tiles", "dense", "auto"):
            focused.change({"backend": backend})
            outs[backend] = focused(x)
        for backend in ("crop", "tiles", "auto"):
            assert close(outs[backend], outs["dense"]), (settings, backend)
        focused.change({"backend": "crop"})
        assert close(torch.cat([focused(image[None]) for image in x]), outs["dense"])
    dense = convx.focus(net, NETWORKS[name], keep=0.25)
    assert close(dense.dense(x), net(x), 1e-4)


def test_the_whole_image_is_the_network_itself():
    net, x = network("resnet18"), pictures()
    everything = convx.focus(net, "layer1", keep=1.0, dense_above=1.0)
    assert close(everything(x), net(x), 1e-4)
    for region in ("bbox", "mask", "tiles"):  # focused all the same: no shortcut to the dense network
        focused = convx.focus(net, "layer1", keep=1.0, region=region, dense_above=1.0, pooling="masked")
        z = focused.activations(x)
        layout = focused.focus[0].region(z)
        assert layout.kept == [z.shape[2] * z.shape[3]] * 4
        assert close(focused(x), everything(x), 1e-6)


class Branches(nn.Module):
    """Two layers of unlike reach, and the pooled map itself, see what is pooled behind the insertion point."""

    def __init__(self, pool: nn.Module):
        super().__init__()
        self.stem, self.pool = nn.Conv2d(3, 6, 3, padding=1), pool
        self.near, self.far = nn.Conv2d(6, 6, 1), nn.Conv2d(6, 6, 7, padding=3)
        self.head = nn.Linear(6, 4)

    def forward(self, x):
        x = self.pool(self.stem(x).relu())
        return self.head((self.near(x) + self.far(x) + x).mean((2, 3)))


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("pool", [nn.MaxPool2d(2), nn.MaxPool2d(2, 3), nn.AvgPool2d(3, 2, ceil_mode=True)], ids=str)
def test_windows_of_a_pooled_map_are_those_of_the_whole(pool, channels_last, monkeypatch):
    from convx.layers import focused_windows
    from convx.layers.focused_carrier import Pooled

    torch.manual_seed(0)
    net, x = Branches(pool).eval().requires_grad_(False), pictures(5, 45)
    x = x.contiguous(memory_format=torch.channels_last) if channels_last else x
    focused = convx.focus(net, "stem", keep=0.2, coverage=0.8, backend="crop")
    for batch in (x, x[:1], x[[1, 3]]):
        found = focused(batch)
        with monkeypatch.context() as m:
            m.setattr(focused_windows, "Pooled", lambda source, size, kernel, stride, pool: pool(source))
            assert found.equal(focused(batch))
    z = torch.randn(3, 6, 45, 45)
    z = z.contiguous(memory_format=torch.channels_last) if channels_last else z
    whole, calls = pool(z), []

    def counted(part):
        calls.append(part.shape)
        return pool(part)

    later = Pooled(
        z, tuple(whole.shape[2:]), *(focused_windows.pair(v) for v in (pool.kernel_size, pool.stride)), counted
    )
    assert later.shape == whole.shape and later.dim() == 4 and (later.stride(1) == 1) == (whole.stride(1) == 1)
    for window in (slice(3, 9), slice(4, 8)):  # the second lies in the first
        assert later[1, :, window, window].equal(whole[1, :, window, window])
        assert later[:, :, window, 2:9].equal(whole[:, :, window, 2:9])
    assert len(calls) == 2 and max(shape[-1] for shape in calls) < 45
    assert later[1, :, 0:5, 3:9].equal(whole[1, :, 0:5, 3:9]) and (later * 2).equal(whole * 2)
    assert later[1, :, 0:3, 0:3].equal(whole[1, :, 0:3, 0:3]) and later[0, 0].equal(whole[0, 0])
    assert len(calls) == 3 and calls[-1] == z.shape


def test_nothing_skipped_is_the_folded_network_itself():
    net, x = network("resnet18"), pictures()
    focused = convx.focus(net, ["maxpool", "layer1"], keep=0.2)
    whole = convx.focus(focused, region="whole")
    assert whole.whole and not focused.whole and not close(focused(x), whole(x), 1e-2)
    assert whole(x).equal(fold_batchnorm(net, x[:1])(x)) and whole(x).equal(focused.dense(x))
    assert whole.region(x).kept == [16 * 16] * 4
    report = []
    assert whole(x, report=report).equal(whole(x)) and report[0].kept == [16 * 16] * 4


def test_values_stay_cropped_until_the_end():
    """No map of the whole grid is made after the insertion point: only crops are convolved."""
    net, x = network("vgg11"), pictures(1)
    focused = convx.focus(net, "features.3", keep=0.2, coverage=0.9)
    area, sizes = focused.region(x).kept[0] / 32**2, []

    class Spy(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if function is torch.ops.aten.convolution.default:
                sizes.append(args[0].shape[2] * args[0].shape[3])
            return function(*args, **(kwargs or {}))

    with torch.no_grad(), Spy():
        focused(x)
    assert area < 0.45 and sizes[:2] == [64 * 64, 32 * 32]  # the early part
    grids = [16 * 16, 16 * 16, 8 * 8, 8 * 8]
    assert all(found < 0.7 * grid for found, grid in zip(sizes[2:6], grids)), sizes


def test_folding_keeps_the_function_and_leaves_what_it_cannot_fold():
    for name in ("resnet18", "mobilenetv3_small_050", "densenet121"):
        net, x = network(name), pictures()
        folded = fold_batchnorm(net, x[:1])
        assert close(folded(x), net(x), 1e-4)
        left = sum(isinstance(m, nn.BatchNorm2d) for m in folded.modules())
        assert left == (0 if name != "densenet121" else left) and left < sum(
            isinstance(m, nn.BatchNorm2d) for m in net.modules()
        )
    conv = nn.Conv2d(3, 3, 3, padding=1)

    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm = conv, nn.BatchNorm2d(3)

        def forward(self, x):
            return self.norm(self.conv(x)) + self.conv(x)

    assert follows(Twice().eval(), torch.randn(1, 3, 8, 8)) == {}


def test_masked_pooling_averages_over_the_region():
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv2d(4, 5, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    x = pictures(2, 16)
    boxes = torch.tensor([[2, 3, 10, 9], [0, 0, 16, 4]])
    y = net[2](net[1](net[0](x)))
    inside = torch.stack([y[0, :, 3:9, 2:10].mean((1, 2)), y[1, :, 0:4].mean((1, 2))])
    share = torch.tensor([[48 / 256], [64 / 256]])
    masked = convx.focus(net, "1", place="given")(x, boxes=boxes)
    torch.testing.assert_close(masked, inside)
    plain = convx.focus(net, "1", place="given", pooling="plain")(x, boxes=boxes)
    torch.testing.assert_close(plain, inside * share)
    largest = nn.Sequential(*net[:3], nn.AdaptiveMaxPool2d(1), nn.Flatten())
    found = convx.focus(largest, "1", place="given")(x, boxes=boxes)
    torch.testing.assert_close(found[0], y[0, :, 3:9, 2:10].amax((1, 2)))


def test_controls_have_the_area_of_the_region():
    net, x = network("resnet18"), pictures()
    bright = convx.focus(net, "layer1", keep=0.2, coverage=0.9)
    for place in ("random", "centre"):
        other = convx.focus(bright, place=place)
        assert other.region(x).kept == bright.region(x).kept and other.region(x).boxes != bright.region(x).boxes
        assert other.region(x).boxes == other.region(x).boxes and not close(other(x), bright(x), 1e-3)
    cropped = convx.focus(bright, region="input")
    y1, y2, x1, x2 = (4 * v for v in bright.region(x).boxes[0])
    assert close(cropped(x)[:1], net(x[:1, :, y1:y2, x1:x2]), 1e-4)


def test_errors_name_what_is_wrong():
    net, x = network("resnet18"), pictures(1)
    with pytest.raises(ValueError, match="after: missing"):
        convx.focus(net)
    with pytest.raises(ValueError, match="these could match"):
        convx.focus(net, "layer9", threshold=1.0)
    with pytest.raises(ValueError, match="threshold: this focused network has none yet"):
        convx.focus(net, "layer1")(x)
    with pytest.raises(ValueError, match="boxes: this network computes given regions"):
        convx.focus(net, "layer1", place="given")(x)
    with pytest.raises(ValueError, match="focused already"):
        convx.focus(convx.focus(net, "layer1", threshold=1.0), "layer2")
    with pytest.raises(ValueError, match="region='box' is not valid"):
        convx.focus(net, "layer1", region="box")
    with pytest.raises(ValueError, match="is out of range"):
        convx.focus(net, "layer1", keep=1.5)
    maps = convx.focus(nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv2d(4, 2, 1)), "1", keep=0.3)
    assert type(maps(x)) is torch.Tensor and maps(x).shape == (1, 2, 64, 64)  # a network that ends in a map
    with pytest.raises(ValueError, match="a map"):
        convx.focus(net, "fc", threshold=1.0)(x)


def test_threads_and_models_do_not_see_each_other():
    """Two networks of one host and four threads at once: nothing about a batch is kept in a module."""
    net = network("resnet18")
    pair = [convx.focus(net, "layer1", keep=keep, coverage=0.9) for keep in (0.1, 0.3)]
    before = {id(m): set(vars(m)) for f in pair for m in f.modules()}
    batches = [pictures(k + 1) * (1 + k) for k in range(4)]
    wanted = {(f, k): pair[f](x) for f in range(2) for k, x in enumerate(batches)}
    wrong = []

    def work(f, k):
        wrong.extend((f, k) for _ in range(5) if not close(pair[f](batches[k]), wanted[f, k]))

    threads = [threading.Thread(target=work, args=(f, k)) for f in range(2) for k in range(4)]
    [t.start() for t in threads]
    [t.join() for t in threads]
    assert not wrong
    assert before == {id(m): set(vars(m)) for f in pair for m in f.modules()}
    assert close(copy.deepcopy(pair[0])(batches[0]), wanted[0, 0])


# ------------------------------------------------------- the public code: where it is right, and its twelve defects


def official_package():
    package = pytest.importorskip("focusedconv", reason="the public code, as an oracle")
    from focusedconv.convolution import FOCUSED_CONV_OP_MODES, FocusedConv2d

    return package, FocusedConv2d, FOCUSED_CONV_OP_MODES


def theirs(conv: nn.Conv2d, mask_HW, x, mode=None, fresh: bool = True):
    package, focused_class, modes = official_package()
    layer = focused_class(
        conv.in_channels, conv.out_channels, conv.kernel_size, conv.stride, conv.padding, conv.dilation, conv.groups,
        conv.bias is not None, aoi=package.AoI(mask_HW), **({} if mode is None else {"focused_conv_op_mode": modes[mode]}),
    )  # fmt: skip
    layer.weight, layer.bias = copy.deepcopy(conv.weight), copy.deepcopy(conv.bias)
    if fresh:  # its matrix is that of the weights that it was made with, until somebody mends it
        layer.weight_mat = layer.weight.view(layer.out_channels, -1)
    return layer(x)


def box_mask(y1, y2, x1, x2, size: int = 16) -> torch.Tensor:
    mask = torch.zeros(size, size, dtype=torch.bool)
    mask[y1:y2, x1:x2] = True
    return mask


def ours(conv: nn.Conv2d, x, box, halo: str = "exact", **settings):
    """Return conv(x) focused on a box of x by convx, as a whole map."""
    focus = convx.layers.focused.Focus(0.0, halo=halo, place="given", dense_above=1.0, **settings)
    y1, y2, x1, x2 = box
    size = tuple(x.shape[2:])
    z = convx.layers.focused_carrier.Passing(x, [(x1, y1, x2, y2)] * len(x), source=size)
    return conv(focus(z)).tensor()


@pytest.fixture(autouse=True)
def layers():
    import convx.layers.focused
    import convx.layers.focused_carrier  # noqa: F401


def a_conv(**settings) -> nn.Conv2d:
    torch.manual_seed(1)
    return nn.Conv2d(6, 8, **({"kernel_size": 3, "padding": 1} | settings)).requires_grad_(False)


def noise(batch: int = 1, size: int = 16) -> torch.Tensor:
    return torch.randn(batch, 6, size, size, generator=torch.Generator().manual_seed(5))


BOX = (3, 11, 5, 14)


def test_official_semantics_equal_the_package_where_that_is_right():
    """A full mask, the inside of a box, and whole stacks: `halo="official"` does what the package does, stride and all."""
    conv, x = a_conv(), noise()
    torch.testing.assert_close(theirs(conv, box_mask(0, 16, 0, 16), x), conv(x))
    for box in (BOX, (0, 5, 0, 16), (15, 16, 0, 1)):
        found = theirs(conv, box_mask(*box), x)
        torch.testing.assert_close(ours(conv, x, box, halo="official"), found)
        torch.testing.assert_close(ours(conv, x, box, halo="zero"), found)
    y1, y2, x1, x2 = BOX
    inner = (..., slice(y1 + 1, y2 - 1), slice(x1 + 1, x2 - 1))
    torch.testing.assert_close(theirs(conv, box_mask(*BOX), x)[inner], ours(conv, x, BOX)[inner])
    for stride in (2, 3):
        strided = a_conv(stride=stride)
        for box in (BOX, (2, 3, 1, 15), (7, 8, 7, 8), (0, 16, 0, 16), (4, 12, 4, 12)):
            torch.testing.assert_close(ours(strided, x, box, halo="official"), theirs(strided, box_mask(*box), x))


def test_a_stack_of_official_layers_is_the_masked_dense_one_after_the_first():
    """Stride 1, no normalisation: from the second layer on a crop padded with zeros has its true neighbours (zeros)."""
    convs = [a_conv(), *(nn.Conv2d(8, 8, 3, padding=1).requires_grad_(False) for _ in range(3))]
    x = noise()
    mask = box_mask(*BOX)
    first = ours(convs[0], x, BOX, halo="zero").relu()
    dense = first
    for conv in convs[1:]:
        dense = (conv(dense) * mask).relu()
    value = OfficialMap(x, [BOX], (16, 16))
    for conv in convs:
        value = F.relu(conv(value))
    torch.testing.assert_close(value.tensor(), dense)


def test_defect_1_the_border_of_the_first_layer_has_its_true_neighbours():
    conv, x = a_conv(), noise()
    y1, y2, x1, x2 = BOX
    inside = (..., slice(y1, y2), slice(x1, x2))
    assert float((theirs(conv, box_mask(*BOX), x)[inside] - conv(x)[inside]).abs().max()) > 0.3
    torch.testing.assert_close(ours(conv, x, BOX)[inside], conv(x)[inside])


def test_defect_2_a_stride_keeps_its_grid():
    conv, x = a_conv(stride=2), noise(size=56)
    shifted = dense = 0
    for y1 in range(0, 40, 3):
        box = (y1, y1 + 15, 0, 56)
        found, wanted = theirs(conv, box_mask(*box, size=56), x), conv(x)
        rows = slice(-(-(y1 + 1) // 2), (y1 + 14) // 2)  # at least one row inside
        dense += bool(torch.allclose(found, wanted, atol=1e-5))
        shifted += not torch.allclose(found[:, :, rows][..., 1:-1], wanted[:, :, rows][..., 1:-1], atol=1e-4)
        kept = ours(conv, x, box)[:, :, y1 // 2 : -(-(y1 + 15) // 2)]
        torch.testing.assert_close(kept, wanted[:, :, y1 // 2 : -(-(y1 + 15) // 2)])
    assert shifted and dense  # what the package does: shifts some without a word and computes others densely


@pytest.mark.parametrize(
    "settings", [{}, {"region": "tiles"}, {"region": "input"}, {"halo": "official", "pooling": "plain"}]
)
def test_outputs_and_regions_come_from_one_pass(settings):
    focused, x = convx.focus(network("resnet18"), "layer1", keep=0.2, dense_above=1.0, **settings), pictures()
    out, region, notes = focused.with_region(x)
    assert out.equal(focused(x)) and region.boxes == focused.region(x).boxes and region.kept == focused.region(x).kept
    official = "halo" in settings
    assert bool(notes) == official and {what for _, what in notes} <= {"crop", "shape", "empty"}


def test_defect_3_a_thin_region_on_a_small_map_stays_a_region():
    conv, x = a_conv(), noise(size=7)
    value = OfficialMap(x, [(8, 9, 0, 16)], (16, 16), report := [])
    conv(value)
    assert [what for _, what in report] == ["shape"]
    torch.testing.assert_close(theirs(conv, box_mask(8, 9, 0, 16), x), conv(x))  # the dense layer, silently
    region = convx.layers.focused_regions.Region(((8, 9, 0, 16),), (16, 16)).down((2, 2), (7, 7))
    assert region.boxes == ((4, 5, 0, 7),)


def test_defect_4_and_8_a_mask_keeps_the_bias_and_may_be_bool():
    from convx.layers.focused_conv import FocusedConv2d

    conv, x = a_conv(), noise()
    full = torch.ones(16, 16, dtype=torch.bool)
    with pytest.raises((RuntimeError, TypeError, IndexError)):  # what its own threshold layer makes
        theirs(conv, full, x, "AOI_GENERAL_MODE")
    found = theirs(conv, full.float()[None, None], x, "AOI_GENERAL_MODE")
    torch.testing.assert_close(found + conv.bias.view(1, -1, 1, 1), conv(x))
    layer = FocusedConv2d.from_conv(conv, backend="gather")
    torch.testing.assert_close(layer(x, full[None, None]), conv(x))


def test_defect_5_and_6_stride_dilation_and_groups_of_a_mask():
    from convx.layers.focused_conv import FocusedConv2d

    x = noise()
    for settings in ({"stride": 2}, {"dilation": 2, "padding": 2}, {"groups": 2}):
        conv = a_conv(**settings)
        try:
            found = theirs(conv, torch.ones(1, 1, 16, 16), x, "AOI_GENERAL_MODE")
            assert found.shape != conv(x).shape or not torch.allclose(found, conv(x), atol=0.05)
        except RuntimeError:
            pass
        layer = FocusedConv2d.from_conv(conv, backend="gather")
        mask = layer.out_mask(torch.rand(1, 1, 16, 16, generator=torch.Generator().manual_seed(0)) < 0.2)
        torch.testing.assert_close(layer(x, mask), conv(x) * mask, atol=1e-5, rtol=1e-5)


def test_defect_7_weights_that_change_are_used():
    conv, ones = a_conv(bias=False), torch.ones(1, 1, 16, 16)
    stale, mended = (theirs(conv, ones, noise(), "AOI_GENERAL_MODE", fresh=f) for f in (False, True))
    torch.testing.assert_close(mended, conv(noise()))
    assert not torch.allclose(stale, mended, atol=0.1)
    focused = convx.focus(nn.Sequential(a_conv(), nn.ReLU(), nn.Conv2d(8, 4, 3, padding=1)), "1", keep=0.3)
    x = noise()
    before = focused(x)
    with torch.no_grad():
        focused.model[2].weight.mul_(2)
        focused.model[2].bias.mul_(2)
    torch.testing.assert_close(plain(focused(x)), 2 * plain(before))
    other = convx.focus(nn.Sequential(a_conv(), nn.ReLU(), nn.Conv2d(8, 4, 3, padding=1)), "1", keep=0.9)
    other.load_state_dict(focused.state_dict())
    assert other.model[2].weight.equal(focused.model[2].weight)


def plain(value) -> torch.Tensor:
    return value.tensor() if isinstance(value, FocusedMap) else value


def test_defect_9_each_image_of_a_batch_has_its_own_region():
    net, x = network("vgg11"), pictures()
    focused = convx.focus(net, "features.3", keep=0.2, coverage=0.9)
    assert len(set(focused.region(x).boxes)) == 4
    official = convx.focus(net, "features.3", keep=0.2, halo="official")
    assert close(official(x), torch.cat([official(image[None]) for image in x]))


def test_defect_10_padding_by_name_and_half_precision():
    conv, x = a_conv(padding="same"), noise()
    with pytest.raises(TypeError):
        theirs(conv, box_mask(*BOX), x)
    mask = box_mask(*BOX)
    torch.testing.assert_close(ours(conv, x, BOX)[..., 3:11, 5:14], conv(x)[..., 3:11, 5:14])
    half = a_conv().bfloat16()
    assert ours(half, x.bfloat16(), BOX).dtype == torch.bfloat16
    assert not ours(half, x.bfloat16(), BOX)[..., ~mask].any()
    circular = a_conv(padding_mode="circular")
    torch.testing.assert_close(ours_or_dense(circular, x), circular(x))


def ours_or_dense(conv, x):
    """A padding that reads the far side of the map: the layer gets the whole map, so nothing is wrong."""
    focus = convx.layers.focused.Focus(0.0, keep=0.3)
    return plain(conv(focus(x)))


def test_defect_11_modes_are_words_that_are_checked():
    official = official_package()
    conv, x = a_conv(), noise()
    layer = official[1](6, 8, 3, padding=1, aoi=official[0].AoI(box_mask(*BOX)), focused_conv_op_mode=1)
    layer.weight, layer.bias = conv.weight, conv.bias
    torch.testing.assert_close(layer(x), conv(x))  # an int is no mode, so it is dense for ever
    with pytest.raises(ValueError, match="backend='rect' is not valid"):
        convx.focus(nn.Sequential(conv), "0", threshold=1.0, backend="rect")


def test_defect_12_no_picture_library_and_any_network():
    """Importing needs torch alone, and the builder takes networks without `.features`."""
    import subprocess
    import sys

    code = "import sys, convx.layers.focused_network; print([m for m in ('matplotlib', 'skimage', 'timm') if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout.strip() == "[]", result.stderr
    assert not hasattr(network("resnet18"), "features")
    assert convx.focus(network("resnet18"), "layer1", keep=0.3)(pictures(1)).shape == (1, 10)
