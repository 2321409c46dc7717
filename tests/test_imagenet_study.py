"""The study of ImageNet: its arms, its dry run, and the same study end to end on a folder of a few small pictures."""

import json

import numpy as np
import pytest
import torch
import yaml
from house import REPOSITORY, House
from PIL import Image

from convx import config, steps
from convx.data import open_set, prepare
from convx.data.loader import FolderBatches, FolderImages
from convx.evaluate.run import open_corrupted_set
from convx.manifest import write_json
from convx.models import create_model
from convx.runs import RunData, build_model, save_weights

FILE = REPOSITORY / "config" / "imagenet.yaml"
CPU = torch.device("cpu")
IMAGENET = {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225], "statistics_from": "ImageNet"}


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Return a folder of 3 classes with 8 training and 4 test pictures each, of several sizes."""
    root, draws = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    for split, count in (("train", 8), ("val", 4)):
        for place, name in enumerate(("ant", "bee", "cat")):
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                height, width = 70 + 3 * i, 96 - 2 * i
                ramp = np.linspace(0, 180, width)[None, :, None] + np.zeros((height, 1, 3))
                ramp[..., place] += draws.integers(0, 70, (height, width))
                Image.fromarray(ramp.astype(np.uint8)).save(root / split / name / f"{i}.png")
    return root


@pytest.fixture(scope="module")
def prepared(pictures, tmp_path_factory):
    folder = tmp_path_factory.mktemp("prepared") / "set"
    prepare({"name": "folder", "path": str(pictures), "image_size": 64, "validation": 3}, folder, progress=False)
    return folder


def load(**changes) -> dict:
    study = yaml.safe_load(FILE.read_text()) | changes
    return config.load_study(study, "imagenet.yaml")


def batches(prepared, workers=0, seed=0, **training) -> FolderBatches:
    images, labels = open_set(prepared).split("train")
    numbers = config.recipe_defaults() | {"batch_size": 8, "crop_scale": [0.3, 1]} | training
    return FolderBatches(images, torch.as_tensor(labels), numbers, seed, CPU, workers)


def epoch(found: FolderBatches, number: int, first: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    parts = list(found.epoch(number, first))
    assert [part[0] for part in parts] == list(range(first, found.steps))
    return torch.cat([part[1] for part in parts]), torch.cat([part[2] for part in parts])


# ---------------------------------------------------------------------------------------------------------- the loader


def test_batches_of_a_folder_are_uint8_batches(prepared):
    found = batches(prepared)
    images, labels = epoch(found, 0)
    assert images.dtype == torch.uint8 and images.shape == (21, 3, 64, 64) and images.is_contiguous()
    assert found.steps == 3 and len(found.images) == 21
    assert labels.bincount().tolist() == torch.as_tensor(open_set(prepared).split("train")[1]).bincount().tolist()
    assert batches(prepared, drop_last=True).steps == 2
    with pytest.raises(ValueError, match="leaves no batch of 21"):
        batches(prepared, drop_last=True, batch_size=32)


def test_crops_depend_on_seed_epoch_and_image_alone(prepared):
    images, labels = epoch(batches(prepared), 1)
    for other in (batches(prepared, workers=2), batches(prepared, workers=1)):
        again, same = epoch(other, 1)
        assert images.equal(again) and labels.equal(same)
    rest, _ = epoch(batches(prepared, workers=1), 1, first=2)
    assert rest.equal(images[16:])
    assert not epoch(batches(prepared), 2)[0].equal(images) and not epoch(batches(prepared, seed=1), 1)[0].equal(images)
    # The same pictures in batches of another size: the crop of a picture does not depend on its neighbours.
    assert epoch(batches(prepared, batch_size=5), 1)[0].equal(images)


def test_the_loader_leaves_the_global_stream_alone(prepared):
    torch.manual_seed(3)
    wanted = torch.rand(4)
    for workers in (0, 1):
        torch.manual_seed(3)
        epoch(batches(prepared, workers=workers), 0)
        assert torch.rand(4).equal(wanted)


def test_without_a_scale_the_crop_is_that_of_the_evaluation(prepared):
    data = open_set(prepared)
    images, labels = epoch(batches(prepared, crop_scale=None), 0)
    files, known = data.split("train")
    wanted = {row.tobytes(): int(label) for row, label in zip(files[:].transpose(0, 3, 1, 2), known)}
    assert len(wanted) == 21
    assert all(wanted[image.numpy().tobytes()] == int(label) for image, label in zip(images, labels))
    crops, _ = epoch(batches(prepared), 0)
    assert not any(crop.numpy().tobytes() in wanted for crop in crops)


def test_run_data_of_a_folder(prepared):
    recipe = {"training": config.recipe_defaults() | {"batch_size": 8}, "data": {"workers": 1}}
    data = RunData.open(prepared, recipe, CPU)
    images, labels = data.split("validation")
    assert isinstance(images, FolderImages) and images.shape == (3, 3, 64, 64) and len(labels) == 3
    assert images[1:3].equal(images[:][1:3]) and images[:].dtype == torch.uint8
    assert np.array_equal(images[:].permute(0, 2, 3, 1).numpy(), open_set(prepared).split("validation")[0][:])
    found = data.train_batches(0)
    assert isinstance(found, FolderBatches) and found.workers == 1 and found.training["crop_scale"] is None


AUGMENTATIONS = (
    {"color_jitter": 0.4},
    {"auto_augment": "rand-m9-mstd0.5-inc1"},
    {"auto_augment": "augmix-m3"},
    {"crop_scale": None, "color_jitter": 0.4},
    {"crop_interpolation": "random"},
)


@pytest.mark.parametrize("changes", AUGMENTATIONS, ids=str)
def test_what_a_picture_goes_through_depends_on_seed_epoch_and_picture_alone(prepared, changes):
    import random

    plain, _ = epoch(batches(prepared, **{k: v for k, v in changes.items() if k == "crop_scale"}), 1)
    states = []
    torch.manual_seed(3)
    random.seed(3)
    np.random.seed(3)
    for other in ({}, {"workers": 1}, {"batch_size": 5}):
        again, _ = epoch(batches(prepared, **changes, **other), 1)
        states.append(again)
    assert states[0].equal(states[1]) and states[0].equal(states[2])
    assert states[0].dtype == torch.uint8 and states[0].shape == plain.shape
    changed = (states[0] != plain).flatten(1).any(1).float().mean()
    assert 0.3 < changed < 1 if "crop_interpolation" in changes else changed > 0.6
    drawn = torch.rand(2), random.random(), np.random.rand()
    torch.manual_seed(3)
    assert torch.rand(2).equal(drawn[0])
    assert (random.Random(3).random(), np.random.RandomState(3).rand()) == drawn[1:]


def test_augmentation_of_folders_is_checked():
    base = {"study": "x", "host": {"name": "resnet8_8"}, "baseline": "cnn", "variants": {"cnn": None}}
    folder, digits = {"name": "folder", "path": "."}, {"name": "digits"}
    for data, recipe, message in (
        (digits, {"color_jitter": 0.4}, "color_jitter: it is for data.name: folder; digits has crop_padding, flip"),
        (digits, {"auto_augment": "rand-m9"}, "auto_augment: it is for data.name: folder"),
        (folder, {"auto_augment": "rnd-m9"}, "auto_augment: 'rnd-m9' is not valid; it must match"),
        (folder, {"crop_interpolation": "random"}, "crop_interpolation: it is for random crops; set crop_scale"),
        (folder, {"crop_interpolation": "nearest"}, "crop_interpolation: 'nearest' is not valid"),
        (folder, {"erase": 1.5}, "erase: 1.5 is out of range"),
    ):
        with pytest.raises(config.ConfigError, match=message):
            config.load_study(base | {"data": data, "recipes": {"train": recipe}})


def test_random_erasing():
    """A share of the images has one rectangle of noise in it, the rest is what it was."""
    from convx.data.batches import erase

    images = torch.full((1000, 3, 48, 64), 9.0)
    done = erase(images, 0.3, torch.Generator().manual_seed(1))
    changed = (done != 9).all(1)
    touched = changed.flatten(1).any(1)
    assert 0.26 < touched.float().mean() < 0.34 and (done[~touched] == 9).all()
    for inside in changed[touched][:200]:
        rows, columns = inside.any(1).nonzero()[:, 0], inside.any(0).nonzero()[:, 0]
        assert inside.sum() == len(rows) * len(columns)  # one full rectangle
        assert len(rows) == rows[-1] - rows[0] + 1 and len(columns) == columns[-1] - columns[0] + 1
    areas = changed[touched].flatten(1).float().mean(1)
    assert 0.015 < areas.min() < 0.03 and 0.3 < areas.max() < 0.345
    noise = done.permute(0, 2, 3, 1)[changed]
    assert abs(float(noise.mean())) < 0.01 and abs(float(noise.std()) - 1) < 0.01
    assert erase(images, 0.3, torch.Generator().manual_seed(1)).equal(done)


def test_crop_scale_is_checked():
    base = {"study": "x", "host": {"name": "resnet8_8"}, "baseline": "cnn", "variants": {"cnn": None}}
    for data, scale, message in (
        ({"name": "digits"}, [0.1, 1], "crop_scale: it is for data.name: folder"),
        ({"name": "folder", "path": "."}, [1, 0.1], r"crop_scale: \[1, 0.1\] should be the smallest share"),
        ({"name": "folder", "path": "."}, [0, 1], "crop_scale.0: 0 is out of range"),
        ({"name": "folder", "path": "."}, [0.1], "crop_scale: it holds 1; it needs at least 2"),
        ({"name": "folder", "path": "."}, [0.1, 0.2, 1], "crop_scale: it holds 3; it takes at most 2"),
    ):
        with pytest.raises(config.ConfigError, match=message):
            config.load_study(base | {"data": data, "recipes": {"train": {"crop_scale": scale}}})


# ----------------------------------------------------------------------------------------------------------- the study


def test_the_control_differs_by_the_surgery_alone():
    study = load()
    ours, control = (config.resolve(study, name, 0) for name in ("tcnn", "cnn_finetuned"))
    assert ours["training"] == control["training"] and ours["training"]["epochs"] == 50
    assert ours["start"] == control["start"] and ours["start"]["variant"] == "cnn" and ours["data"]["image_size"] == 224
    assert ours["model"] == {"name": "timm/resnetrs50", "settings": {"pretrained": True}} == control["model"]
    assert control["surgery"] == [] and ours["surgery"][0]["verb"] == "recast_attention"
    assert ours["start"]["recipe"]["training"]["epochs"] == 0
    dense, dcls = (config.resolve(study, name, 0) for name in ("convnext_t", "dcls_convnext_t"))
    assert (
        dense["training"] == dcls["training"] and dense["training"]["epochs"] == 300 and dense["model"] == dcls["model"]
    )
    assert (dcls["surgery"][0]["kernel_count"], dcls["surgery"][0]["dilated_kernel_size"]) == (34, 17)


def test_layer4_is_what_is_recast():
    from convx.layers.gpsa import GatedPositionalAttention
    from convx.surgery import apply

    with torch.device("meta"):
        host = create_model("timm/resnetrs50", 1000)
    names = [n for n, m in host.named_modules() if n.startswith("layer4.") and getattr(m, "kernel_size", 0) == (3, 3)]
    model = apply(create_model("timm/resnetrs50", 10), config.resolve(load(), "tcnn", 0)["surgery"], 0)
    recast = [n for n, m in model.named_modules() if isinstance(m, GatedPositionalAttention)]
    assert recast == names and len(recast) == 3


def test_labels_of_the_official_folders_are_the_studys(pictures, tmp_path):
    """ImageNet-C's class folders are counted in the order of the study's classes, whatever that is."""
    (tmp_path / "classes").write_text("cat\nbee\nant\n")
    meta = prepare(
        {"name": "folder", "path": str(pictures), "image_size": 64, "classes": str(tmp_path / "classes")},
        tmp_path / "set",
        progress=False,
    )
    for severity in range(1, 6):
        for name in ("ant", "cat"):
            folder = tmp_path / "c" / "fog" / str(severity) / name
            folder.mkdir(parents=True)
            Image.new("RGB", (64, 64), (40 * severity, 9, 9)).save(folder / "x.JPEG")
    write_json(tmp_path / "corrupted" / "meta.json", {"official": str(tmp_path / "c")})
    assert open_corrupted_set(tmp_path / "corrupted", meta["class_ids"]).labels_N.tolist() == [2, 0]
    assert open_corrupted_set(tmp_path / "corrupted").labels_N.tolist() == [0, 1]


@pytest.mark.slow
def test_dry_run(tmp_path):
    house = House.build(tmp_path / "house", load())
    planned = house.planned()
    for rule in ("train", "evaluate"):
        assert {variant for name, variant in planned if name == rule} == set(house.study["variants"])
    assert len([1 for name, _ in planned if name == "train"]) == 18
    assert {name for name, _ in planned} >= {"data", "corrupt", "measure", "tables"}


SMALL = {  # what a laptop can do: the study's own keys, other numbers
    "host": {"name": "timm/resnet10t", "settings": {"pretrained": False}},
    "seeds": [0],
    "variants": {
        "cnn": {"training": {"epochs": 1}, "recipe": "finetune"},
        "cnn_finetuned": None,
        "tcnn": None,
        "dcls_convnext_t": {"model": {"name": "timm/convnext_atto", "settings": {"drop_path_rate": 0.1}}},
    },
    "evaluate": {"batch_size": 5, "corruption": {"protocol": "imagenet_c", "corruptions": ["fog"], "severities": [5]}},
    "device": "cpu",
}


@pytest.mark.slow
def test_end_to_end_on_a_few_pictures(pictures, tmp_path):
    """The recipes of the study with fewer epochs and smaller batches: prepared, trained with its augmentation, evaluated.

    The host starts from a file of weights, of five classes, so its classifier is a new one.
    """
    torch.manual_seed(5)
    others = create_model("timm/resnet10t", 5)
    save_weights(others, tmp_path / "others.safetensors")
    host = {"name": "timm/resnet10t", "weights": str(tmp_path / "others.safetensors")}
    recipes = {
        name: recipe | {"epochs": 2, "batch_size": 8, "warmup_epochs": 1, "precision": "fp32", "threads": 1}
        for name, recipe in yaml.safe_load(FILE.read_text())["recipes"].items()
    }
    data = {"name": "folder", "path": str(pictures), "image_size": 64, "workers": 1, "validation": 3}
    study = load(data=data, recipes=recipes, **SMALL | {"host": host})
    untrained = build_model(
        config.resolve(study, "cnn", 0), {"num_classes": 3, "channels": 3, "image_size": 64} | IMAGENET
    )
    assert untrained.layer4[0].conv1.weight.equal(others.layer4[0].conv1.weight) and untrained.fc.out_features == 3
    meta = tmp_path / "data" / "set" / "meta.json"
    steps.data(study["data"], [], str(meta))
    corrupted = tmp_path / "corrupted" / "meta.json"
    steps.corrupt(study["evaluate"]["corruption"], str(meta), str(corrupted), 1)
    results = tmp_path / "results" / "imagenet"
    for name in study["variants"]:
        recipe, file = config.resolve(study, name, 0), tmp_path / "recipes" / f"{name}.json"
        write_json(file, recipe)
        weights = results / "runs" / name / "seed0" / "model.safetensors"
        start = results / "runs" / "cnn" / "seed0" / "model.safetensors" if recipe["start"] else None
        steps.train(
            str(file), str(meta), start and str(start), "s", study["carbon"], str(weights), str(tmp_path / "progress")
        )
        metrics = results / "metrics" / name / "seed0" / "evaluation.json"
        steps.evaluate(str(file), str(weights), str(meta), str(corrupted), study["evaluate"], "s", str(metrics))
        for what in ("training", "evaluation"):
            record = json.loads((metrics.parent / f"{what}.json").read_text())
            assert record["status"] == "ok", record["reason"]
            assert metrics.stat().st_size < 100_000
        values = {row["metric"]: row["value"] for row in record["rows"] if row["split"] == "test"}
        assert 0 <= values["top1"] <= 100 and 0 <= values["corruption_accuracy"] <= 100
    histories = {v: (results / "histories" / v / "seed0.csv").read_text().splitlines() for v in study["variants"]}
    assert [len(lines) - 1 for lines in histories.values()] == [2, 3, 3, 3]
    first, last = (
        dict(zip(histories[v][0].split(","), histories[v][n].split(","))) for v, n in (("tcnn", 1), ("cnn", -1))
    )
    assert float(first["validation_loss"]) == pytest.approx(float(last["validation_loss"]), rel=1e-3)
    assert any("content_share_mean" in column for column in first)
