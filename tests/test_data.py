"""Preparing and opening data sets: splits, choices, atomic writing, image folders. No network, no mirror."""

import hashlib
import json
import subprocess
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from PIL import Image

from convx.data import SETS, describe_sets, open_set, prepare
from convx.data import prepare as prepare_function
from convx.data.folder import ImageFiles, fit, resize_settings
from convx.data.pixels import pixel_statistics, resize_block
from convx.data.splits import stratified_choice, stratified_order

module = sys.modules["convx.data.prepare"]


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    """The default digits with a tenth of the training images set aside."""
    out = tmp_path_factory.mktemp("data") / "digits"
    prepare({"name": "digits", "validation": 0.1}, out, progress=False)
    return open_set(out)


def test_digits_have_the_promised_shapes_and_statistics(digits):
    assert digits.meta["counts"] == {"train": 1437, "test": 360, "validation": 144}
    for name, n in (("train", 1293), ("validation", 144), ("test", 360)):
        images, labels = digits.split(name)
        assert images.shape == (n, 32, 32, 1) and images.dtype == np.uint8
        assert labels.shape == (n,) and labels.dtype == np.int64
    assert digits.test_images.min() == 0 and digits.test_images.max() == 255
    assert isinstance(digits.split("test")[0], np.memmap), "a whole array is not copied"
    mean, std = digits.train_images.mean() / 255, digits.train_images.std() / 255
    assert digits.meta["mean"] == [pytest.approx(mean, abs=1e-12)]
    assert digits.meta["std"] == [pytest.approx(std, abs=1e-12)]


def test_digits_splits_hold_every_image_once_and_are_stratified(tmp_path):
    from sklearn.datasets import load_digits

    prepare({"name": "digits", "image_size": 8}, tmp_path / "d", progress=False)
    data = open_set(tmp_path / "d")
    ours = np.concatenate([data.train_images, data.test_images]).reshape(-1, 64)
    labels = np.concatenate([data.train_labels, data.test_labels])
    official = load_digits()
    levels = np.rint(official.images * 255 / 16).astype(np.uint8).reshape(-1, 64)
    assert Counter((i.tobytes(), int(y)) for i, y in zip(ours, labels)) == Counter(
        (i.tobytes(), int(y)) for i, y in zip(levels, official.target)
    )
    assert set(np.bincount(data.test_labels)) <= {35, 36, 37}


def test_digits_splits_never_move(digits):
    """The split is a constant of the project: these digests may only change with a deliberate new split."""
    sums = {name: digits.meta["sha256"][name] for name in ("test_labels.npy", "validation_indices.npy")}
    assert sums == {
        "test_labels.npy": "eb69abce62935de6042df4980af61ec95b3769e1018d8e7544439f5c4d178b46",
        "validation_indices.npy": "c58784abf4cd4b08be61b1dcc3c32a9ee6dfef9c307451234fd738018ef33672",
    }


def test_upsampling_is_bilinear_pillow(tmp_path, digits):
    prepare({"name": "digits", "image_size": 8}, tmp_path / "d", progress=False)
    small = open_set(tmp_path / "d").test_images[:20]
    for image_HWC, large_HWC in zip(small, digits.test_images):
        expected = Image.fromarray(image_HWC[..., 0]).resize((32, 32), Image.Resampling.BILINEAR)
        assert np.array_equal(np.asarray(expected), large_HWC[..., 0])


def test_validation_is_disjoint_stratified_and_from_train_alone(digits):
    held, kept = digits.indices("validation"), digits.indices("train")
    assert not set(held) & set(kept) and len(held) + len(kept) == 1437
    share = np.bincount(digits.split("validation")[1]) / np.bincount(digits.train_labels)
    assert np.abs(share - 0.1).max() < 1 / 130
    assert np.array_equal(digits.split("validation")[0], digits.train_images[held])


def test_smaller_choices_are_nested_stratified_and_in_official_order(tmp_path):
    chosen = {}
    for k in (100, 300, None):
        prepare({"name": "digits", "train_images": k, "test_images": 50}, tmp_path / str(k), progress=False)
        data = open_set(tmp_path / str(k))
        assert data.meta["mean"] == open_set(tmp_path / "100").meta["mean"], "statistics of the whole split"
        chosen[k] = [image.tobytes() for image in data.train_images]
        if k:
            assert set(np.bincount(data.train_labels)) <= {k // 10 - 1, k // 10, k // 10 + 1}
    assert set(chosen[100]) < set(chosen[300]) < set(chosen[None])
    places = [chosen[None].index(image) for image in chosen[300]]
    assert places == sorted(places)


@hypothesis_settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 6), min_size=1, max_size=200), st.data())
def test_every_prefix_of_the_order_is_stratified(labels, data):
    labels = np.array(labels)
    order = stratified_order(labels, "test")
    assert sorted(order) == list(range(len(labels)))
    k = data.draw(st.integers(1, len(labels)))
    total, part = np.bincount(labels, minlength=7), np.bincount(labels[order[:k]], minlength=7)
    share = total / len(labels)
    # A prefix that ends at position t holds n t +- 1/2 images of a class; the errors of all classes move t.
    bound = 0.5 + share * max(0, np.count_nonzero(total) - 2) / 2
    assert (np.abs(part - share * k) <= bound + 1e-9).all()


def test_order_depends_on_the_purpose_and_on_nothing_else():
    labels = np.arange(100) % 10
    state = np.random.get_state()[1].copy()
    first = stratified_order(labels, "a")
    np.random.seed(5)
    assert np.array_equal(first, stratified_order(labels, "a"))
    assert not np.array_equal(first, stratified_order(labels, "b"))
    np.random.seed(0)
    stratified_choice(labels, 10, "a")
    assert np.random.random_sample() == np.random.RandomState(0).random_sample(), "the global stream is untouched"
    assert state.shape


def test_checksums_and_digest_describe_the_arrays(tmp_path, digits):
    for name, expected in digits.meta["sha256"].items():
        assert hashlib.sha256((digits.folder / name).read_bytes()).hexdigest() == expected
    again = prepare({"name": "digits", "validation": 0.1}, tmp_path / "again", progress=False)
    assert again["digest"] == digits.digest
    other = prepare({"name": "digits", "validation": 0.2}, tmp_path / "other", progress=False)
    assert other["digest"] != digits.digest


def test_preparing_again_replaces_our_files_and_no_others(tmp_path):
    out = tmp_path / "digits"
    prepare({"name": "digits", "validation": 0.1}, out, progress=False)
    (out / "corrupted").mkdir()
    (out / "corrupted" / "fog.npy").write_bytes(b"kept")
    prepare({"name": "digits", "train_images": 200}, out, progress=False)
    data = open_set(out)
    assert data.meta["counts"] == {"train": 200, "test": 360, "validation": 0}
    assert not (out / "validation_indices.npy").exists(), "a file of the earlier set would be stale"
    assert (out / "corrupted" / "fog.npy").read_bytes() == b"kept"


def test_a_broken_run_leaves_the_earlier_set_and_no_debris(tmp_path, monkeypatch):
    out = tmp_path / "digits"
    before = prepare({"name": "digits"}, out, progress=False)
    with monkeypatch.context() as patch:
        patch.setattr(module, "resize_block", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            prepare({"name": "digits", "train_images": 10}, out, progress=False)
    assert open_set(out).digest == before["digest"]
    assert [p.name for p in tmp_path.iterdir() if "partial" in p.name] == []
    (tmp_path / ".digits.partial").mkdir()  # what a kill -9 leaves behind
    (tmp_path / ".digits.partial" / "train_images.npy").write_bytes(b"half")
    assert prepare({"name": "digits"}, out, progress=False)["digest"] == before["digest"]


def test_writers_of_one_folder_wait_for_each_other(tmp_path):
    with ThreadPoolExecutor(4) as pool:
        jobs = [
            pool.submit(prepare, {"name": "digits", "train_images": k}, tmp_path / "d", progress=False)
            for k in (50, 100, 150, 200)
        ]
        digests = {job.result()["digest"] for job in jobs}
    assert len(digests) == 4 and open_set(tmp_path / "d").digest in digests


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"name": "cifr10"}, "'cifr10' is not a data set; did you mean cifar10?"),
        ({"name": None}, "is not a data set; valid: digits, fashion_mnist"),
        ({"name": "digits", "imagesize": 32}, "data.imagesize: unknown key; did you mean image_size"),
        ({"name": "digits", "image_size": 2}, "data.image_size: 2 is not a whole number of at least 4"),
        ({"name": "digits", "image_size": "32"}, "data.image_size: '32' is not a whole number"),
        ({"name": "digits", "train_images": True}, "data.train_images: True"),
        ({"name": "digits", "train_images": 5000}, "data.train_images: 5,000 wanted, digits has 1,437"),
        ({"name": "digits", "test_images": 0}, "data.test_images: 0"),
        ({"name": "digits", "validation": -0.1}, "data.validation: -0.1 is neither"),
        ({"name": "digits", "validation": 1.5}, "data.validation: 1.5 is neither"),
        ({"name": "digits", "validation": 1437}, "data.validation: 1437 takes 1,437 of 1,437"),
        ({"name": "digits", "validation": 0.0001}, "takes 0 of 1,437"),
        ({"name": "digits", "validation": 0.1, "train_images": 0}, "nothing to set aside"),
        ({"name": "digits", "path": "/data"}, "data.path: only the set `folder` takes it, not digits"),
        ({"name": "folder"}, "data.path: missing"),
        ({"name": "folder", "path": "/nowhere/at/all"}, "/nowhere/at/all is not a folder"),
        (
            {"name": "folder", "path": ".", "resize": {"short": 3}},
            "data.resize.short: unknown key; did you mean short_side",
        ),
        ({"name": "folder", "path": ".", "resize": {"crop": "centre"}}, "did you mean center?"),
        ({"name": "folder", "path": ".", "resize": {"short_side": 100}}, "at least image_size (224)"),
    ],
)
def test_wrong_settings_give_one_clear_line(tmp_path, settings, words):
    with pytest.raises(ValueError) as caught:
        prepare(settings, tmp_path / "out", progress=False)
    assert words in str(caught.value) and "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_opening_what_is_not_a_prepared_set_says_so(tmp_path):
    with pytest.raises(ValueError, match=r"not a prepared data set \(meta.json is missing\)"):
        open_set(tmp_path)
    out = tmp_path / "d"
    prepare({"name": "digits"}, out, progress=False)
    np.save(out / "test_labels.npy", np.zeros(3, np.int64))
    with pytest.raises(ValueError, match=r"test arrays have shapes .* prepare the set again"):
        open_set(out)
    (out / "test_labels.npy").unlink()
    with pytest.raises(ValueError, match=r"test_labels.npy: missing; prepare the set again"):
        open_set(out)
    (out / "meta.json").write_text("{")
    with pytest.raises(ValueError, match=r"meta.json: not valid JSON"):
        open_set(out)
    (out / "meta.json").write_text(json.dumps({"schema_version": 0}))
    with pytest.raises(ValueError, match=r"schema version 1"):
        open_set(out)


def test_splits_that_are_not_there_say_what_to_set(tmp_path):
    prepare({"name": "digits", "train_images": 0}, tmp_path / "d", progress=False)
    data = open_set(tmp_path / "d")
    assert len(data.split("test")[1]) == 360 and data.train_images.shape == (0, 32, 32, 1)
    with pytest.raises(ValueError, match="without training images, for evaluation only"):
        data.split("train")
    with pytest.raises(ValueError, match=r"set data.validation above 0"):
        data.split("validation")
    with pytest.raises(ValueError, match="did you mean test"):
        data.split("tests")


def test_statistics_are_exact_and_blockwise():
    images = np.random.RandomState(0).randint(0, 256, (50, 7, 5, 3)).astype(np.uint8)
    mean, std = pixel_statistics([images[:13], images[13:]])
    assert np.allclose(mean, images.mean((0, 1, 2)) / 255, rtol=0, atol=1e-14)
    assert np.allclose(std, images.std((0, 1, 2)) / 255, rtol=0, atol=1e-12)


def test_resizing_keeps_channels_and_leaves_the_right_size_alone():
    images = np.random.RandomState(0).randint(0, 256, (3, 16, 16, 3)).astype(np.uint8)
    assert resize_block(images, 16) is images
    large = resize_block(images, 24)
    for channel in range(3):
        assert np.array_equal(large[..., channel : channel + 1], resize_block(images[..., channel : channel + 1], 24))


def test_data_needs_no_torch(tmp_path):
    code = (
        "import sys; from convx.data import prepare, open_set, describe_sets; describe_sets();"
        f"prepare({{'name': 'digits'}}, {str(tmp_path / 'd')!r}, progress=False);"
        f"open_set({str(tmp_path / 'd')!r}).split('train'); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_list_of_sets_is_complete():
    rows = {row["name"]: row for row in describe_sets()}
    assert list(rows) == list(SETS)
    assert set(rows) == {"digits", "fashion_mnist", "cifar10", "cifar100", "svhn", "tiny_imagenet", "canvas", "folder"}
    assert all(row["licence"] and row["origin"] for row in rows.values())
    assert rows["svhn"]["train"] == 73_257 and rows["tiny_imagenet"]["classes"] == 200
    assert prepare_function is prepare
    for facts in SETS.values():
        for file in (*facts.files, *([facts.archive] if facts.archive else [])):
            assert len(file.md5) == 32 and int(file.md5, 16) >= 0


# ---------------------------------------------------------------------------------------------- image folders


def picture(seed: int, width: int, height: int) -> Image.Image:
    pixels = np.random.RandomState(seed).randint(0, 256, (height // 8 + 1, width // 8 + 1, 3)).astype(np.uint8)
    return Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC)


@pytest.fixture
def photos(tmp_path):
    """Two classes, six training and two validation images each, in odd sizes, modes and formats."""
    root = tmp_path / "photos"
    for split, n in (("train", 6), ("val", 2)):
        for c, name in enumerate(("n02", "n01")):
            for k in range(n):
                place = root / split / name / ("deeper" if k == 1 else "")
                place.mkdir(parents=True, exist_ok=True)
                image = picture(100 * c + k, 70 + 9 * k, 90 - 5 * k)
                image.convert({2: "L", 3: "P", 4: "RGBA"}.get(k, "RGB")).save(place / f"{k}.png")
    (root / "val" / "n01" / "notes.txt").write_text("not an image")
    return root


def test_folder_is_indexed_and_decoded_on_access(tmp_path, photos):
    settings = {
        "name": "folder",
        "path": str(photos),
        "image_size": 48,
        "validation": 4,
        "resize": {"short_side": 56},
    }
    meta = prepare(settings, tmp_path / "d", progress=False)
    data = open_set(tmp_path / "d")
    assert meta["class_names"] == ["n01", "n02"] and meta["counts"] == {
        "train": 12,
        "test": 4,
        "validation": 4,
    }
    assert not list((tmp_path / "d").glob("*images.npy"))
    images, labels = data.split("train")
    assert isinstance(images, ImageFiles) and images.shape == (8, 48, 48, 3) and images.dtype == np.uint8
    assert sorted(np.bincount(data.split("validation")[1])) == [2, 2] and labels.sum() == 4
    whole = images[:]
    assert np.array_equal(whole[3], images[3]) and np.array_equal(whole[[5, 0]], images[np.array([5, 0])])
    assert np.array_equal(whole[labels == 1], images[labels == 1]) and np.array_equal(whole[-1], images[-1])
    first = Image.open(photos / "val" / "n01" / "0.png").convert("RGB")
    assert np.array_equal(data.test_images[0], np.asarray(fit(first, meta["resize"])))
    assert data.test_images.picture(0).size == first.size


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("size", [(70, 93), (131, 64), (56, 56), (57, 200)])
def test_resize_and_crop_agree_with_torchvision(size, interpolation):
    transforms = pytest.importorskip("torchvision.transforms")
    image = picture(1, *size)
    resize = resize_settings({"short_side": 56, "interpolation": interpolation}, 49)
    mode = transforms.InterpolationMode(interpolation)
    expected = transforms.Compose([transforms.Resize(56, mode), transforms.CenterCrop(49)])(image)
    assert np.array_equal(np.asarray(fit(image, resize)), np.asarray(expected))
    squashed = fit(image, resize_settings({"crop": "none"}, 49))
    assert squashed.size == (49, 49)


def test_a_root_of_classes_is_for_evaluation(tmp_path, photos):
    prepare({"name": "folder", "path": str(photos / "val"), "image_size": 32}, tmp_path / "d", progress=False)
    data = open_set(tmp_path / "d")
    assert data.meta["counts"] == {"train": 0, "test": 4, "validation": 0}
    assert data.test_images[:].shape == (4, 32, 32, 3)


def test_labels_follow_a_list_of_classes(tmp_path, photos):
    (tmp_path / "classes.txt").write_text("n00\nn02\nn03\nn01\n")
    settings = {"name": "folder", "path": str(photos), "classes": str(tmp_path / "classes.txt")}
    meta = prepare(settings, tmp_path / "d", progress=False)
    assert meta["num_classes"] == 4 and meta["image_size"] == 224 and meta["resize"]["short_side"] == 256
    assert set(open_set(tmp_path / "d").test_labels) == {1, 3}
    (tmp_path / "classes.txt").write_text("n02\n")
    with pytest.raises(ValueError, match=r"class .*n01 is not in .*classes.txt; did you mean n02"):
        prepare(settings, tmp_path / "d", progress=False)


def test_changed_resizing_changes_the_digest(tmp_path, photos):
    base = {"name": "folder", "path": str(photos), "image_size": 32}
    digests = [
        prepare(base | {"resize": resize}, tmp_path / "d", progress=False)["digest"]
        for resize in (None, {"interpolation": "bicubic"}, {"short_side": 40}, {"crop": "none"})
    ]
    assert len(set(digests)) == 4


def test_broken_folders_are_named(tmp_path, photos):
    settings = {"name": "folder", "path": str(photos), "image_size": 32}
    prepare(settings, tmp_path / "d", progress=False)
    data = open_set(tmp_path / "d")
    (photos / "val" / "n01" / "0.png").write_bytes(b"\x89PNG broken")
    with pytest.raises(ValueError, match=r"val/n01/0.png: cannot be read as an image"):
        data.test_images[0:1]
    (photos / "val" / "n03").mkdir()
    (photos / "val" / "n03" / "0.png").write_bytes(b"")
    with pytest.raises(ValueError, match=r"class .*n03 is not in .*train"):
        prepare(settings, tmp_path / "d", progress=False)
    (photos / "val").rename(photos / "elsewhere")
    with pytest.raises(ValueError, match=r"holds train/ but no class folders in val, validation, test"):
        prepare(settings, tmp_path / "d", progress=False)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"holds no class folders"):
        prepare(settings | {"path": str(tmp_path / "empty")}, tmp_path / "d", progress=False)
    (tmp_path / "empty" / "class").mkdir()
    with pytest.raises(ValueError, match=r"class holds no image"):
        prepare(settings | {"path": str(tmp_path / "empty")}, tmp_path / "d", progress=False)
