"""One focused convolution: what it equals, in every way to compute it; regions, boxes, tiles and what they cost."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import convx
from convx.layers.focused_conv import BACKENDS, FocusedConv2d
from convx.layers.focused_regions import Region, bounding_boxes, down_mask, moved, partition, scaled, tile_mask

CONVS = {  # kernel, stride, padding, dilation, groups, bias
    "3x3": (3, 1, 1, 1, 1, True),
    "no bias": (3, 1, 1, 1, 1, False),
    "stride": (3, 2, 1, 1, 1, True),
    "valid": (3, 1, 0, 1, 1, True),
    "same": (4, 1, "same", 1, 1, True),
    "dilated": (3, 1, 2, 2, 1, True),
    "dilated same": (3, 1, "same", 3, 1, True),
    "grouped": (3, 1, 1, 1, 2, True),
    "depthwise": (5, 2, 2, 1, 8, True),
    "pointwise": (1, 1, 0, 1, 1, True),
    "patches": (4, 4, 0, 1, 1, True),
    "stride above kernel": (1, 2, 0, 1, 1, True),
    "oblong": ((3, 5), (2, 1), (1, 2), 1, 1, True),
}


def make(name: str, **settings) -> FocusedConv2d:
    kernel, stride, padding, dilation, groups, bias = CONVS[name]
    torch.manual_seed(0)
    conv = nn.Conv2d(8, 8, kernel, stride, padding, dilation, groups, bias)
    return FocusedConv2d.from_conv(conv.requires_grad_(False), **settings)


def random_mask(layer: FocusedConv2d, x: torch.Tensor, share: float = 0.3) -> torch.Tensor:
    size = layer.out_size(*x.shape[2:])
    return torch.rand(len(x), 1, *size, generator=torch.Generator().manual_seed(1)) < share


def images(batch: int = 3, height: int = 17, width: int = 22) -> torch.Tensor:
    return torch.randn(batch, 8, height, width, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", CONVS)
def test_a_full_mask_is_the_convolution(name, backend):
    layer, x = make(name, backend=backend), images()
    y = layer(x, torch.ones(len(x), 1, *layer.out_size(17, 22), dtype=torch.bool))
    torch.testing.assert_close(y, layer.conv(x), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("fill", ["zero", "bias"])
@pytest.mark.parametrize("name", CONVS)
def test_a_mask_keeps_the_convolution_and_fills_the_rest(name, fill):
    """All back-ends agree, at kept outputs with the dense layer, beside them with the fill to the bit."""
    x = images()
    for backend in BACKENDS:
        layer = make(name, backend=backend, fill=fill)
        mask = random_mask(layer, x)
        y, wanted = layer(x, mask), layer.conv(x)
        kept = mask.expand_as(y)
        torch.testing.assert_close(y[kept], wanted[kept], atol=1e-5, rtol=1e-5)
        beside = (
            torch.zeros_like(y)
            if fill == "zero" or layer.conv.bias is None
            else layer.conv.bias.view(1, -1, 1, 1).expand_as(y)
        )
        assert y[~kept].equal(beside[~kept])


@pytest.mark.parametrize("backend", BACKENDS)
def test_empty_single_pixel_border_and_odd_masks(backend):
    layer = make("3x3", backend=backend, tile=8)
    x = images(6, 19, 13)
    mask = torch.zeros(6, 1, 19, 13, dtype=torch.bool)  # the first image stays empty
    mask[1, 0, 9, 5] = mask[2, 0, 0, 0] = mask[3, 0, 18, 12] = True
    mask[4, 0, :, 0] = True
    mask[5, 0, 18, :] = True
    y, wanted = layer(x, mask), layer.conv(x) * mask
    torch.testing.assert_close(y, wanted, atol=1e-5, rtol=1e-5)
    assert not y[0].any()
    assert not layer(x[:1], mask[:1]).any()
    with pytest.raises(ValueError, match=r"mask: .* needed"):
        layer(x, mask[:, :, 1:])


def test_gradients_are_those_of_the_masked_convolution():
    for backend in BACKENDS:
        layer = make("stride", backend=backend)
        mask = random_mask(layer, images())
        found, wanted = [], []
        for out, focused in ((found, True), (wanted, False)):
            x = images().requires_grad_()
            y = layer(x, mask) if focused else layer.conv(x) * mask
            y.square().sum().backward()
            out.append(x.grad)
        torch.testing.assert_close(found[0], wanted[0], atol=1e-4, rtol=1e-4)


def test_stride_two_at_every_offset():
    """Where the public code is wrong or dense for three intervals of four, here every interval is exact."""
    layer = make("stride")
    x = images(1, 14, 14)
    wanted = layer.conv(x)
    for low, high in itertools.combinations(range(15), 2):
        mask = torch.zeros(1, 1, 14, 14, dtype=torch.bool)
        mask[..., low:high, low:high] = True
        kept = layer.out_mask(mask)
        inside = torch.arange(7)
        assert (
            kept[0, 0].any(1).equal((2 * inside < high) & (2 * inside + 1 >= low))
        )  # any kept pixel of the stride cell
        torch.testing.assert_close(layer(x, kept), wanted * kept, atol=1e-5, rtol=1e-5)


def test_a_kept_output_reads_its_kernel_and_no_further():
    """Perturbing pixels beyond the halo of one layer changes no kept output; n layers need n (k - 1) / 2."""
    layer, x = make("3x3"), images(1, 32, 32)
    mask = torch.zeros(1, 1, 32, 32, dtype=torch.bool)
    mask[..., 10:20, 8:18] = True
    for depth in (1, 2, 3):

        def stack(x, depth=depth):
            for _ in range(depth):
                x = layer.conv(x)
            return x

        for reach, same in ((depth, True), (depth - 1, False)):
            seen = torch.zeros_like(mask)
            seen[..., 10 - reach : 20 + reach, 8 - reach : 18 + reach] = True
            other = torch.where(seen, x, x + 1.0)
            changed = (stack(other) - stack(x))[mask.expand_as(x)].abs().max()
            assert (changed < 1e-5) == same
    grown = layer.out_mask(mask, grow=True)  # the rule of the 2022 paper: a patch that touches the region is kept
    assert grown.equal(F.max_pool2d(mask.float(), 3, 1, 1) > 0)


def test_boxes_cover_what_they_should():
    mask = torch.zeros(3, 20, 30, dtype=torch.bool)
    mask[0, 4:9, 10:25] = True
    mask[1, 0, 0] = mask[1, 19, 29] = True
    assert bounding_boxes(mask) == [(4, 9, 10, 25), (0, 20, 0, 30), None]
    mask[2, 5:15, 5:25] = True
    mask[2, 19, 29] = True  # one bright pixel in the corner
    assert bounding_boxes(mask)[2] == (5, 20, 5, 30)
    assert bounding_boxes(mask, coverage=0.98)[2] == (5, 15, 5, 25)
    assert scaled((0.0, 16.0, 8.0, 64.0), (64, 64), (16, 16)) == (0, 4, 2, 16)
    assert scaled((3.0, 5.0, 63.5, 64.0), (64, 64), (8, 8)) == (0, 1, 7, 8)


def test_moved_boxes_keep_their_size_and_stay_inside():
    places = set()
    for seed in range(200):
        y1, y2, x1, x2 = moved((4, 9, 10, 25), (12, 30), "random", seed)
        assert (y2 - y1, x2 - x1) == (5, 15) and y1 >= 0 and y2 <= 12 and x1 >= 0 and x2 <= 30
        places.add((y1, x1))
    assert {y for y, _ in places} == set(range(8)) and {x for _, x in places} == set(range(16))
    assert moved((4, 9, 10, 25), (12, 30), "centre", 0) == (3, 8, 7, 22)


def test_down_loses_no_kept_pixel():
    mask = torch.rand(4, 1, 19, 23, generator=torch.Generator().manual_seed(0)) < 0.1
    mask[0] = False
    found = down_mask(mask, (2, 2), (10, 12))
    wanted = F.max_pool2d(mask.float(), 2, ceil_mode=True) > 0
    assert found.equal(wanted)
    assert down_mask(torch.ones(1, 1, 19, 23, dtype=torch.bool), (2, 3), (9, 9)).all()
    boxes = tuple(bounding_boxes(mask[1:, 0]))
    region = Region(boxes, (19, 23)).down((2, 2), (10, 12))
    assert region.boxes == tuple(bounding_boxes(found[1:, 0]))


def test_grouping_is_the_cheapest_of_its_kind():
    sizes = [(10, 10), (10, 12), (40, 8), (41, 9)]
    parts, cost = partition(sizes, overhead=50)
    assert sorted(itertools.chain(*(images for images, _ in parts))) == [0, 1, 2, 3]
    assert cost == 2 * 50 + 2 * 120 + 2 * 41 * 9 and len(parts) == 2
    assert len(partition(sizes, overhead=1e9)[0]) == 1 and len(partition(sizes, overhead=0)[0]) == 4
    assert partition([(5, 7)], 3)[1] == 38


def test_multiply_accumulates_are_what_a_counter_sees():
    """Gather: kept x dense. Tiles: whole tiles. Both rise with the mask, and so does what a threshold keeps."""
    from torch.utils.flop_counter import FlopCounterMode

    x = images(2, 24, 24)
    for name, backend in itertools.product(("3x3", "grouped", "pointwise"), BACKENDS):
        layer, before = make(name, backend=backend, tile=8), 0
        for share in (0.0, 0.02, 0.3, 1.0):
            mask = random_mask(layer, x, share)
            mask[1] &= share > 0.02
            with FlopCounterMode(display=False) as counter:
                layer(x, mask)
            counted = counter.get_total_flops() // 2
            assert counted == layer.macs(mask) >= before
            before = counted
        dense = layer.conv.weight[0].numel() * 8 * 24 * 24 * 2
        assert counted == dense
    layer = make("3x3", backend="gather")
    mask = random_mask(layer, x, 0.3)
    assert layer.macs(mask) == int(mask.sum()) * 8 * 72
    tiles = make("3x3", backend="tiles", tile=8)
    one = torch.zeros(1, 1, 24, 24, dtype=torch.bool)
    one[..., 7:9, 3] = True  # two tiles
    assert tiles.macs(one) == 2 * 64 * 72 * 8
    assert float(tile_mask(one[:, 0], 8).sum()) == 128


def test_a_higher_threshold_keeps_less():
    torch.manual_seed(0)
    early, late = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
    net = nn.Sequential(early, nn.ReLU(), late, nn.AdaptiveAvgPool2d(1), nn.Flatten())
    x = torch.randn(5, 3, 24, 24)
    before = [24 * 24] * 5
    for threshold in (-1.0, 0.5, 1.5, 3.0, 5.0):
        for region in ("mask", "bbox"):
            kept = convx.focus(net, "1", threshold=threshold, region=region, dense_above=1.0).region(x).kept
            if region == "mask" and all(kept):
                assert all(a <= b or a == 24 * 24 for a, b in zip(kept, before))
                before = kept
    assert convx.focus(net, "1", threshold=-1.0).region(x).kept == [24 * 24] * 5  # nothing is cut off below zero
    empty = convx.focus(net, "1", threshold=1e9)
    assert empty.region(x).kept == [24 * 24] * 5  # an image without a bright pixel is computed densely
    torch.testing.assert_close(empty(x), net(x))
