"""Self-relation, the tokens of ViTs, DINO's head and multi-crop views: against definitions, loops and other libraries."""

import math

import pytest
import timm
import torch
import torch.nn.functional as F
from torchvision.transforms.v2 import functional as tv

from convx.data import colour
from convx.data.multicrop import MultiCrop, crop, random_rectangles
from convx.layers import channel_loss as chunks
from convx.layers.channel_loss import channel_loss
from convx.layers.dino_head import DinoHead, instance_loss, teacher_distribution
from convx.layers.self_relation import (
    RelationHead,
    channel_relation,
    overlap_grids,
    row_cross_entropy,
    row_entropy,
    sample_map,
    sample_relation,
    spatial_relation,
)
from convx.layers.vit_tokens import check_vit, class_attention, resized_positions, tokens
from convx.seeds import generator


@pytest.fixture(autouse=True)
def fixed_draws():
    torch.manual_seed(0)


def vit(**changes):
    """Return a small timm ViT for 32 px images, in evaluation mode."""
    settings = {
        "img_size": 32,
        "patch_size": 4,
        "embed_dim": 48,
        "depth": 2,
        "num_heads": 3,
        "num_classes": 0,
        "in_chans": 3,
    }
    model = timm.create_model("vit_tiny_patch16_224", **settings | changes).eval()
    torch.nn.init.normal_(model.pos_embed, std=0.5)
    return model


# ----------------------------------------------------------------------------------------------------------- relations


def test_spatial_relation_is_its_definition():
    z = torch.rand(2, 12, 3, 4, dtype=torch.float64)
    found = spatial_relation(z, heads=3)
    groups = z.flatten(2).view(2, 3, 4, 12)
    torch.testing.assert_close(found, torch.einsum("bgcn,bgcm->bgnm", groups, groups) / math.sqrt(4))
    assert found.shape == (2, 3, 12, 12)
    torch.testing.assert_close(found, found.transpose(-1, -2))
    assert (found >= 0).all()  # of features behind a relu
    order = torch.randperm(12)
    moved = spatial_relation(z.flatten(2)[..., order].view_as(z), 3)
    torch.testing.assert_close(moved, found[..., order, :][..., order])
    with pytest.raises(ValueError, match="heads=5 does not divide the 12 channels"):
        spatial_relation(z, 5)


def test_channel_relation_is_its_definition_and_knows_no_order_and_no_count():
    z = torch.rand(2, 12, 3, 4, dtype=torch.float64)
    found = channel_relation(z)
    torch.testing.assert_close(found, torch.einsum("bcn,bdn->bcd", z.flatten(2), z.flatten(2)) / 12)
    assert found.shape == (2, 12, 12)
    moved = z.flatten(2)[..., torch.randperm(12)].view_as(z)
    torch.testing.assert_close(channel_relation(moved), found)
    torch.testing.assert_close(channel_relation(torch.cat([z, z], 3)), found)  # every position twice


def test_rows_of_cross_entropy_are_torchs():
    relation, target = torch.randn(5, 7, dtype=torch.float64), torch.softmax(torch.randn(5, 7, dtype=torch.float64), -1)
    expected = F.cross_entropy(relation / 0.3, target, reduction="none")
    torch.testing.assert_close(row_cross_entropy(target, relation, 0.3), expected)
    twice = row_cross_entropy(target + target.flip(0), relation)
    torch.testing.assert_close(twice, row_cross_entropy(target, relation) + row_cross_entropy(target.flip(0), relation))
    uniform = torch.full((1, 8), 1 / 8)
    assert row_entropy(uniform).item() == pytest.approx(math.log(8))
    assert row_entropy(torch.eye(3)).abs().max() == 0


def test_equal_views_have_no_divergence_unless_the_teacher_is_sharper():
    z = torch.rand(2, 12, 4, 4, dtype=torch.float64)
    for relation in (spatial_relation(z, 3), channel_relation(z)):
        for temperature, zero in ((1.0, True), (0.1, False)):
            target = torch.softmax(relation / temperature, -1)
            kl = (row_cross_entropy(target, relation) - row_entropy(target)).mean().item()
            assert (abs(kl) < 1e-12) == zero and kl > -1e-12


def test_projection_and_prediction_are_what_they_say():
    head = RelationHead(6).train()
    x = torch.randn(5, 6, 3, 3)
    z = head.project(x)
    expected = F.relu(
        (x - x.mean((0, 2, 3), keepdim=True)) / x.var((0, 2, 3), keepdim=True, correction=0).add(1e-5).sqrt()
    )
    torch.testing.assert_close(z, expected)
    mixed = torch.einsum("oc,bchw->bohw", head.predictor.weight[:, :, 0, 0], z)
    expected = F.relu(F.batch_norm(mixed, None, None, training=True))
    torch.testing.assert_close(head(x), expected)
    assert head.predictor.bias is None


@pytest.mark.parametrize("locals_", [0, 1, 3])
def test_channel_loss_in_chunks_equals_autograd(monkeypatch, locals_):
    monkeypatch.setitem(chunks.ENTRIES, "cpu", 2 * 8 * 8)  # two of five images at a time: the last chunk is smaller
    z = torch.rand(2, 5, 8, 16, dtype=torch.float64)
    students = [
        torch.rand(2, 5, 8, 16, dtype=torch.float64),
        *([torch.rand(locals_, 5, 8, 4).double()] if locals_ else []),
    ]
    students = [s.requires_grad_() for s in students]
    loss, entropy = channel_loss(z, students, 0.1)
    targets = torch.softmax(channel_relation(z[..., None]) / 0.1, -1)
    terms = [(targets[1], students[0][0]), (targets[0], students[0][1])]
    terms += [(t, s) for t in targets for s in (students[1] if locals_ else [])]
    assert len(terms) == 2 + 2 * locals_
    expected = torch.stack([row_cross_entropy(t, channel_relation(s[..., None])).mean() for t, s in terms]).mean()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(entropy, row_entropy(targets).mean())
    assert not entropy.requires_grad
    for found, wanted in zip(torch.autograd.grad(3 * loss, students), torch.autograd.grad(3 * expected, students)):
        torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-14)


# ----------------------------------------------------------------------------------------------------------- alignment


def rects(*rows):
    return torch.tensor(rows, dtype=torch.float64)


def flags(*values):
    return torch.tensor(values)


@pytest.mark.parametrize("padding", ["zeros", "border"])
@pytest.mark.parametrize("points", ["endpoints", "centres"])
def test_relating_samples_equals_sampling_relations(padding, points):
    z = torch.rand(6, 12, 8, 8)
    a, b = random_rectangles(2, 6, (32, 32), (0.3, 0.8), generator(0, "x"))
    grid, _, overlap = overlap_grids(a, b, torch.rand(6) < 0.5, torch.rand(6) < 0.5, 5, points)
    assert overlap.all()
    ours = spatial_relation(sample_map(z, grid[:, None], padding)[:, 0], 3)
    official = sample_relation(spatial_relation(z, 3), grid, (8, 8), padding)
    torch.testing.assert_close(ours, official, rtol=0, atol=1e-5)


def test_several_grids_of_a_map_equal_one_at_a_time():
    z, grids = torch.rand(3, 4, 6, 6), torch.rand(3, 5, 2, 2, 2) * 2 - 1
    found = sample_map(z, grids)
    assert found.shape == (3, 5, 4, 2, 2)
    for place in range(5):
        torch.testing.assert_close(found[:, place], F.grid_sample(z, grids[:, place], align_corners=False))


@pytest.mark.parametrize("flip_a", [False, True])
@pytest.mark.parametrize("flip_b", [False, True])
@pytest.mark.parametrize("points", ["endpoints", "centres"])
def test_grids_of_both_crops_are_at_the_same_points_of_the_image(flip_a, flip_b, points):
    """Crops of an image whose pixels hold their own coordinates: both grids read the same ones, where theory says."""
    y, x = torch.meshgrid(*(torch.arange(64, dtype=torch.float64) + 0.5,) * 2, indexing="ij")
    image = torch.stack([x, y])[None] / 64
    a, b = rects([4, 6, 40, 32]), rects([20, 14, 36, 44])
    grids = overlap_grids(a, b, flags(flip_a), flags(flip_b), 5, points)
    share = (torch.arange(5) + 0.5) / 5 if points == "centres" else torch.arange(5) / 4
    expected_x, expected_y = 20 + 24 * share.double(), 14 + 24 * share.double()
    assert grids[2].all()
    for rect, flip, grid in ((a, flip_a, grids[0]), (b, flip_b, grids[1])):
        view = crop(image, rect[None], flags([flip]), 128, "bilinear")[0]
        read = 64 * F.grid_sample(view, grid, padding_mode="border", align_corners=False)[0]
        # Endpoints on the edge of a crop lie half a pixel of the view beyond its last centre.
        tolerance = 1e-5 if points == "centres" else 0.5 * 44 / 128 + 1e-6
        torch.testing.assert_close(read[0], expected_x.expand(5, 5), rtol=0, atol=tolerance)
        torch.testing.assert_close(read[1], expected_y[:, None].expand(5, 5), rtol=0, atol=tolerance)


def test_nested_touching_and_disjoint_crops():
    outer = rects([0, 0, 32, 32], [0, 0, 10, 10], [0, 0, 10, 10])
    other = rects([8, 8, 8, 8], [10, 0, 10, 10], [20, 20, 5, 5])
    grid_a, grid_b, overlap = overlap_grids(outer, other, torch.zeros(3) > 0, torch.zeros(3) > 0, 3)
    assert overlap.tolist() == [True, False, False]
    torch.testing.assert_close(grid_b[0, :, :, 0], torch.tensor([-1.0, 0.0, 1.0]).double().expand(3, 3))
    torch.testing.assert_close(grid_a[0, :, :, 1], torch.tensor([-0.5, -0.25, 0.0]).double()[:, None].expand(3, 3))
    assert (grid_a[1:] == -2).all() and (grid_b[1:] == -2).all()
    z = torch.rand(3, 4, 8, 8, dtype=torch.float64, requires_grad=True)
    sampled = sample_map(z, grid_a[:, None])
    assert (sampled[1:] == 0).all()
    sampled.sum().backward()
    assert (z.grad[1:] == 0).all() and z.grad[0].abs().sum() > 0
    with pytest.raises(ValueError, match="points='edges'"):
        overlap_grids(outer, other, torch.zeros(3) > 0, torch.zeros(3) > 0, 3, "edges")


def test_equal_crops_at_cell_centres_are_the_map_itself():
    rect, z = rects([3, 5, 20, 17]), torch.rand(1, 4, 7, 7, dtype=torch.float64)
    grid, again, _ = overlap_grids(rect, rect, flags(False), flags(False), 7, "centres")
    torch.testing.assert_close(sample_map(z, grid[:, None])[:, 0], z)
    torch.testing.assert_close(grid, again)
    mirrored = overlap_grids(rect, rect, flags(True), flags(False), 7, "centres")[0]
    torch.testing.assert_close(sample_map(z, mirrored[:, None])[:, 0], z.flip(3))


def test_endpoints_with_zero_padding_halve_the_border():
    """The official choice, which the option border mends: on the edge of a crop half of the weight is padding."""
    rect, ones = rects([0, 0, 16, 16]), torch.ones(1, 1, 8, 8, dtype=torch.float64)
    grid = overlap_grids(rect, rect, flags(False), flags(False), 5)[0][:, None]
    edge = sample_map(ones, grid)[0, 0, 0]
    assert edge[0, 0] == 0.25 and edge[0, 2] == 0.5 and edge[2, 2] == 1
    assert (sample_map(ones, grid, "border") == 1).all()


# ----------------------------------------------------------------------------------------------------------------- DINO


def test_head_has_its_widths_and_unit_prototypes():
    head = DinoHead(12, 64, hidden=32, bottleneck=8)
    logits = head(torch.randn(5, 12))
    assert logits.shape == (5, 64) and logits.abs().max() <= 1 + 1e-6  # cosines
    assert [tuple(p.shape) for p in head.parameters()] == [(32, 12), (32,), (32, 32), (32,), (8, 32), (8,), (64, 8)]
    learned = DinoHead(12, 64, 32, 8, learn_length=True)
    reference = torch.nn.utils.parametrizations.weight_norm(torch.nn.Linear(8, 64, bias=False))
    with torch.no_grad():
        learned.prototypes.length.uniform_(0.5, 2)
        reference.parametrizations.weight.original0.copy_(learned.prototypes.length)
        reference.parametrizations.weight.original1.copy_(learned.prototypes.direction)
    x = torch.randn(3, 8)
    torch.testing.assert_close(learned.prototypes(x), reference(x))
    assert sum(isinstance(m, torch.nn.BatchNorm1d) for m in DinoHead(12, 4, 8, 4, batch_norm=True).modules()) == 2


@pytest.mark.parametrize("locals_", [0, 1, 4])
def test_instance_loss_counts_each_pair_of_different_views(locals_):
    student, centre = torch.randn(2 + locals_, 6, 9, dtype=torch.float64), torch.randn(9, dtype=torch.float64)
    teacher = teacher_distribution(torch.randn(2, 6, 9, dtype=torch.float64), centre, 0.05)
    torch.testing.assert_close(teacher.sum(-1), torch.ones(2, 6, dtype=torch.float64))
    terms = [F.cross_entropy(student[v] / 0.1, teacher[g]) for g in range(2) for v in range(2 + locals_) if v != g]
    assert len(terms) == 2 * (2 + locals_) - 2
    torch.testing.assert_close(instance_loss(student, teacher), torch.stack(terms).mean())


# ------------------------------------------------------------------------------------------------------------- encoders


@pytest.mark.parametrize("changes", [{}, {"reg_tokens": 2}, {"no_embed_class": True}, {"pre_norm": True}])
def test_tokens_are_timms_at_every_size(changes):
    plain, dynamic = vit(**changes), vit(**changes, dynamic_img_size=True)
    dynamic.load_state_dict(plain.state_dict())
    for size in (32, 16, 64):
        x = torch.randn(2, 3, size, size)
        (first, last), maps = tokens(plain, x, last=2)
        torch.testing.assert_close(last, dynamic(x))
        expected = dynamic.forward_intermediates(x, return_prefix_tokens=True, norm=False, intermediates_only=True)
        torch.testing.assert_close(maps, expected[-1][0])
        torch.testing.assert_close(first, plain.norm(expected[0][1][:, 0]))
    torch.testing.assert_close(tokens(plain, torch.ones(1, 3, 32, 32))[0][0], plain(torch.ones(1, 3, 32, 32)))
    assert tokens(plain, torch.randn(1, 3, 16, 16))[1].shape == (1, 48, 4, 4)  # 16 tokens
    assert resized_positions(plain, (8, 8)) is plain.pos_embed
    with pytest.raises(ValueError, match="no whole number of patches"):
        tokens(plain, torch.randn(1, 3, 18, 18))


def test_attention_is_what_the_last_block_computes():
    model, x = vit(), torch.randn(2, 3, 32, 32)
    model.blocks[-1].attn.fused_attn = False
    kept = []
    model.blocks[-1].attn.attn_drop.register_forward_hook(lambda module, arguments, out: kept.append(out))
    model(x)
    found = class_attention(model, x)
    torch.testing.assert_close(found, kept[0][:, :, 0, 1:].unflatten(-1, (8, 8)))
    assert found.shape == (2, 3, 8, 8) and (found.sum((2, 3)) < 1).all()


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (lambda: timm.create_model("resnet10t"), "ResNet lacks patch_embed"),
        (lambda: vit(num_classes=10), "num_classes: 0"),
        (lambda: vit(global_pool="avg", fc_norm=False), "num_classes: 0 and leave global_pool"),
        (
            lambda: timm.create_model("vit_tiny_patch16_224", num_classes=0, class_token=False, global_pool="avg"),
            "no class token",
        ),
    ],
)
def test_other_models_are_refused_by_name(model, message):
    with pytest.raises(ValueError, match=message):
        check_vit(model())


# ---------------------------------------------------------------------------------------------------------------- views


def test_rectangles_have_the_areas_and_aspects_asked_for_and_lie_inside():
    for size, scale in (((32, 32), (0.4, 1.0)), ((32, 32), (0.05, 0.4)), ((20, 60), (0.2, 0.5))):
        x, y, w, h = random_rectangles(4, 2000, size, scale, generator(0, "x", str(scale))).unbind(-1)
        assert (x >= 0).all() and (y >= 0).all() and (x + w <= size[1] + 1e-4).all() and (y + h <= size[0] + 1e-4).all()
        share = w * h / (size[0] * size[1])
        assert share.min() >= scale[0] - 1e-6 and share.max() <= scale[1] + 1e-6
        assert ((w / h >= 0.75 - 1e-6) & (w / h <= 4 / 3 + 1e-6)).all()
        if scale == (0.05, 0.4):
            assert share.mean().item() == pytest.approx(0.225, abs=0.01)
    whole = random_rectangles(1, 50, (20, 60), (0.9, 1.0), generator(0, "y"))  # no aspect allowed fits
    torch.testing.assert_close(whole[0, :, 2:], torch.tensor([80 / 3, 20.0]).expand(50, 2))


def test_crops_overlap_as_often_as_they_should():
    a, b = random_rectangles(2, 20_000, (32, 32), (0.4, 1.0), generator(0, "x"))
    none = torch.zeros(len(a)) > 0
    assert overlap_grids(a, b, none, none, 3)[2].all()
    low, high = torch.maximum(a[:, :2], b[:, :2]), torch.minimum(a[:, :2] + a[:, 2:], b[:, :2] + b[:, 2:])
    share = ((high - low).prod(1) / a[:, 2:].prod(1)).mean().item()
    assert share == pytest.approx(0.78, abs=0.02)
    small = random_rectangles(1, 20_000, (32, 32), (0.05, 0.4), generator(0, "y"))[0]
    assert 1 - overlap_grids(a, small, none, none, 3)[2].float().mean().item() == pytest.approx(0.005, abs=0.004)


def test_a_crop_is_torchvisions_on_whole_pixels():
    images = torch.rand(3, 3, 32, 32)
    rect = torch.tensor([[4.0, 6.0, 16.0, 16.0]]).expand(3, 4)
    flips = torch.tensor([[False, True, False]])
    found = crop(images, rect[None], flips, 16)[0]
    torch.testing.assert_close(found[0], images[0, :, 6:22, 4:20], rtol=0, atol=1e-5)  # pixel for pixel
    torch.testing.assert_close(found[1], images[1, :, 6:22, 4:20].flip(2), rtol=0, atol=1e-5)
    double = crop(images, rect[None], flips, 32)[
        0, 0
    ]  # twice as large: away from the border, as torchvision resizes it
    expected = tv.resize(images[0, :, 6:22, 4:20], [32, 32], antialias=False)
    bilinear = crop(images, rect[None], flips, 32, "bilinear")[0, 0]
    torch.testing.assert_close(bilinear[:, 2:-2, 2:-2], expected[:, 2:-2, 2:-2], rtol=0, atol=1e-5)
    assert double.min() >= 0 and double.max() <= 1


def test_colours_are_torchvisions():
    x = torch.rand(6, 3, 8, 8)
    x[0] = 0.5  # grey
    factor = torch.tensor([0.3, 0.7, 1.0, 1.2, 1.4, 0.0])
    turn = torch.tensor([0.1, -0.1, 0.0, 0.05, 0.5, -0.3])
    pairs = [
        (colour.brightness, tv.adjust_brightness, factor),
        (colour.contrast, tv.adjust_contrast, factor),
        (colour.saturation, tv.adjust_saturation, factor),
        (colour.hue, tv.adjust_hue, turn),
    ]
    for ours, theirs, values in pairs:
        expected = torch.stack([theirs(image, float(value)) for image, value in zip(x, values)])
        torch.testing.assert_close(ours(x, values), expected, rtol=0, atol=2e-5)
    torch.testing.assert_close(colour.luminance(x), tv.rgb_to_grayscale(x), rtol=0, atol=1e-5)
    one = torch.rand(6, 1, 8, 8)
    assert torch.equal(colour.saturation(one, factor), one) and torch.equal(colour.hue(one, turn), one)


def test_blur_is_torchvisions_and_leaves_sigma_zero_alone():
    x, sigma = torch.rand(4, 3, 16, 16), torch.tensor([0.0, 0.5, 1.3, 2.0])
    found = colour.blur(x, sigma, 2.0)
    assert torch.equal(found[0], x[0])
    for place in (1, 2, 3):
        expected = tv.gaussian_blur(x[place], [13, 13], [float(sigma[place])] * 2)
        torch.testing.assert_close(found[place], expected, rtol=0, atol=1e-5)


def test_views_repeat_and_say_where_they_were_cut():
    images = torch.randint(0, 256, (5, 3, 32, 32), dtype=torch.uint8)
    make = MultiCrop(32, 16, 3)
    first, again = make(images, generator(0, "augment", "0.0")), make(images, generator(0, "augment", "0.0"))
    assert first.global_crops.shape == (2, 5, 3, 32, 32) and first.local_crops.shape == (3, 5, 3, 16, 16)
    assert first.rectangles.shape == (5, 5, 4) and first.flips.shape == (5, 5)
    for name in ("global_crops", "local_crops", "rectangles", "flips"):
        assert torch.equal(getattr(first, name), getattr(again, name))
    other = make(images, generator(0, "augment", "0.1"))
    assert not torch.equal(first.rectangles, other.rectangles)
    plain = MultiCrop(32, 16, 3, jitter=0.0, grey=0.0, blur=(0.0, 0.0, 0.0), solarise=0.0)
    made = plain(images, generator(0, "augment", "0.0"))
    assert torch.equal(made.rectangles, first.rectangles)  # colour takes no part in where crops are
    cut = crop(images.float() / 255, made.rectangles[2:], made.flips[2:], 16)
    assert torch.equal(made.local_crops, cut)
    assert MultiCrop(32, 16, 0)(images, generator(0, "x")).local_crops.shape == (0, 5, 3, 16, 16)
    grey = MultiCrop(32, 16, 1)(images[:, :1], generator(0, "x"))
    assert grey.global_crops.shape[2] == 1 and grey.global_crops.isfinite().all()


def test_each_operation_happens_as_often_as_asked():
    images = torch.randint(1, 255, (600, 3, 8, 8), dtype=torch.uint8)
    off = {
        "jitter": 0.0,
        "grey": 0.0,
        "blur": (0.0, 0.0, 0.0),
        "solarise": 0.0,
        "flip": 0.0,
        "interpolation": "bilinear",
    }
    plain = MultiCrop(8, 4, 1, **off)(images, generator(0, "x"))
    for change, wanted in (
        ({"jitter": 0.8}, (0.8, 0.8, 0.8)),
        ({"grey": 0.2}, (0.2, 0.2, 0.2)),
        ({"blur": (1.0, 0.1, 0.5)}, (1.0, 0.1, 0.5)),
        ({"solarise": 0.2}, (0.0, 0.2, 0.0)),
    ):
        made = MultiCrop(8, 4, 1, **off | change)(images, generator(0, "x"))
        for view, share in enumerate(wanted):
            a, b = ((v.global_crops[view] if view < 2 else v.local_crops[0]) for v in (made, plain))
            changed = ((a - b).abs() > 1e-4).flatten(1).any(1).float().mean().item()
            assert changed == pytest.approx(share, abs=0.06), (change, view)
    flipped = MultiCrop(8, 4, 1, **off | {"flip": 0.5})(images, generator(0, "x")).flips.float().mean(1)
    assert ((flipped > 0.42) & (flipped < 0.58)).all()
