"""Accuracy, calibration, corruption, attacks and cost against hand computations and independent oracles."""

import math

import numpy as np
import pytest
import torch
from sklearn.metrics import log_loss, top_k_accuracy_score
from torch import nn

from convx import surgery
from convx.data.corruptions import MAIN
from convx.data.corruptions.metrics import ALEXNET_CLEAN_ERROR, ALEXNET_ERROR
from convx.evaluate import (
    EvaluationData,
    Result,
    accuracy,
    attacks,
    corruption,
    cost,
    evaluation_mode,
    folded_form,
    row,
)
from convx.evaluate.payload import decode, encode
from convx.manifest import Failure
from convx.models import create_model

KEYS = {"metric", "value", "unit", "n", "split", "conditions", "method"}


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def pick(result, metric, **conditions):
    found = [r["value"] for r in result.rows if r["metric"] == metric and conditions.items() <= r["conditions"].items()]
    assert len(found) == 1, (metric, conditions, found)
    return found[0]


def random_data(n=103, size=6, channels=3, classes=10, seed=0, **settings):
    rng = np.random.default_rng(seed)
    images = rng.integers(0, 256, (n, size, size, channels), dtype=np.uint8)
    labels = rng.integers(0, classes, n)
    return EvaluationData.from_arrays(images, labels, [0.4] * channels, [0.2] * channels, **settings)


class FromPixels(nn.Module):
    """Logits straight from the first row of pixels: mean 0 and std 1/255 make them the grey levels."""

    def forward(self, x):
        return x[:, 0, 0, :]


def logits_data(logits_NK, labels, batch_size=4):
    """Data whose model input is the given whole-numbered logits."""
    images = np.asarray(logits_NK, dtype=np.uint8)[:, None, :, None]
    return EvaluationData.from_arrays(images, labels, [0.0], [1 / 255], batch_size=batch_size)


class Smooth(nn.Module):
    """A small network with everything that tells evaluation from training mode."""

    def __init__(self, classes=10, channels=3, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.body = nn.Sequential(nn.Conv2d(channels, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(0.5))
        self.head = nn.Linear(8, classes)

    def forward(self, x):
        return self.head(self.body(x).mean((2, 3)))


# ---------------------------------------------------------------------------------------------- data and rows


def test_rows_have_the_agreed_keys_and_refuse_other_condition_types():
    made = row("top1", np.float32(12.5), "%", method="m", n=3, split="test", severity=2, protocol="cifar_c")
    assert (
        made.keys() == KEYS
        and type(made["value"]) is float
        and made["conditions"] == {"severity": 2, "protocol": "cifar_c"}
    )
    assert row("top1", None, "%", method="not measured: why")["value"] is None
    with pytest.raises(AssertionError):
        row("top1", 1, "%", method="m", severities=[1, 2])


def test_data_is_normalised_in_order_whatever_the_batch_and_its_container(tmp_path):
    data = random_data(n=11, size=5, batch_size=4)
    np.save(tmp_path / "x.npy", data.images)
    mapped = np.load(tmp_path / "x.npy", mmap_mode="r")
    oracle = (data.images.astype(np.float64) / 255 - 0.4) / 0.2
    on_device = torch.from_numpy(data.images).permute(0, 3, 1, 2)
    for images in (data.images, mapped, on_device):
        for batch_size in (1, 4, 100):
            other = EvaluationData(images, data.labels, data.normalise, data.device, batch_size)
            assert other.shape_CHW == (3, 5, 5) and len(other) == 11
            x, labels = (torch.cat(parts) for parts in zip(*other.batches()))
            np.testing.assert_allclose(x.permute(0, 2, 3, 1).numpy(), oracle, atol=2e-6)
            assert torch.equal(labels, data.labels)
    assert len(data.first(3)) == 3 and data.first(None) is data
    x, _ = next(random_data(channels_last=True, dtype=torch.bfloat16).batches())
    assert x.dtype == torch.bfloat16 and x.is_contiguous(memory_format=torch.channels_last)


def test_data_errors_say_what_is_wrong():
    images = np.zeros((3, 4, 4, 1), np.uint8)
    for bad, words in (
        ((images, [0, 1]), "3 and 2"),
        ((images.astype(np.float32), [0, 1, 2]), "float32"),
        ((images[0], [0] * 4), r"\(4, 4, 1\)"),
        ((images[:0], []), "none"),
    ):
        with pytest.raises(ValueError, match=words):
            EvaluationData.from_arrays(*bad, [0.0], [1.0])
    with pytest.raises(ValueError, match="batch_size"):
        EvaluationData.from_arrays(images, [0, 1, 2], [0.0], [1.0], batch_size=0)


def test_evaluation_mode_restores_every_module():
    model = Smooth().train()
    model.body[1].eval()
    with evaluation_mode(model):
        assert not any(m.training for m in model.modules())
    assert [m.training for m in model.modules()] == [True, True, True, False, True, True, True]


def test_payloads_come_back():
    result = accuracy.run(Smooth(), random_data())
    assert np.array_equal(decode(encode(result.per_image["correct"])), result.per_image["correct"])


# --------------------------------------------------------------------------------------------------- accuracy


def test_accuracy_agrees_with_scikit_learn_and_numpy():
    model, data = Smooth(), random_data(n=207, batch_size=50)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    model.train()
    result = accuracy.run(model, data, {"split": "validation", "class_names": list("abcdefghij")})
    assert all(m.training for m in model.modules())
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    with torch.no_grad():
        logits = torch.cat([model.eval()(x) for x, _ in data.batches()]).double()
    p, labels = logits.softmax(1).numpy(), data.labels.numpy()
    assert pick(result, "top1") == pytest.approx(100 * np.mean(p.argmax(1) == labels), abs=1e-12)
    assert pick(result, "top5") == pytest.approx(100 * top_k_accuracy_score(labels, p, k=5), abs=1e-12)
    assert pick(result, "nll") == pytest.approx(log_loss(labels, p, labels=range(10)), rel=1e-6)
    for k in range(10):
        mine = 100 * np.mean(p.argmax(1)[labels == k] == k)
        assert pick(result, "per_class_top1", **{"class": k, "class_name": "abcdefghij"[k]}) == pytest.approx(mine)
    confidence, correct = p.max(1), p.argmax(1) == labels
    gap = 0.0
    for m in range(15):
        inside = (confidence > m / 15) & (confidence <= (m + 1) / 15)
        gap += abs(correct[inside].sum() - confidence[inside].sum()) / len(labels)
    assert pick(result, "ece") == pytest.approx(100 * gap, abs=1e-4)
    assert np.array_equal(result.per_image["correct"], correct) and result.per_image["correct"].dtype == bool
    assert np.array_equal(result.details["predictions"], p.argmax(1))
    assert all(r.keys() == KEYS and r["split"] == "validation" and r["method"] for r in result.rows)
    assert {r["n"] for r in result.rows if r["metric"] in ("top1", "top5", "nll", "ece")} == {207}


def test_accuracy_does_not_depend_on_the_batch():
    model = Smooth()
    values = [[r["value"] for r in accuracy.run(model, random_data(batch_size=b)).rows] for b in (1, 7, 1000)]
    np.testing.assert_allclose(values[0], values[1], rtol=1e-6)
    np.testing.assert_allclose(values[0], values[2], rtol=1e-6)


def test_accuracy_by_hand_without_top5_and_with_an_empty_class():
    # Classes 0..3, class 3 has no image; predictions 0, 1, 2, 0 for labels 0, 1, 2, 1: three of four.
    result = accuracy.run(
        FromPixels(), logits_data([[9, 0, 0, 0], [0, 9, 0, 0], [0, 0, 9, 0], [9, 1, 0, 0]], [0, 1, 2, 1])
    )
    assert pick(result, "top1") == 75 and "top5" not in {r["metric"] for r in result.rows}
    assert [pick(result, "per_class_top1", **{"class": k}) for k in range(3)] == [100, 50, 100]
    assert sum(r["metric"] == "per_class_top1" for r in result.rows) == 3
    right, wrong = math.log(1 + 3 * math.exp(-9)), math.log(math.exp(9) + math.e + 2) - 1
    assert pick(result, "nll") == pytest.approx((3 * right + wrong) / 4, rel=1e-6)


def test_top5_counts_the_five_largest():
    logits = np.tile(np.arange(8), (8, 1))
    result = accuracy.run(FromPixels(), logits_data(logits, np.arange(8)))
    assert pick(result, "top5") == 62.5 and pick(result, "top1") == 12.5


def test_ece_by_hand():
    ece = accuracy.expected_calibration_error
    true, false = torch.tensor([True, True]), torch.tensor([False, False])
    assert ece(torch.ones(2), true) == 0 and ece(torch.ones(2), false) == 1
    # Ten images in one bin at confidence 0.7, seven right: calibrated.
    assert ece(torch.full((10,), 0.7), torch.arange(10) < 7) == pytest.approx(0, abs=1e-7)
    # 0.5 (right) and 0.9 (wrong) in two bins: (0.5 + 0.9) / 2.
    assert ece(torch.tensor([0.5, 0.9]), torch.tensor([True, False])) == pytest.approx(0.7, abs=1e-7)
    # An edge belongs to the bin below it: with two bins 0.5 and 0.4 cancel, 0.5 and 0.6 do not.
    mixed = torch.tensor([True, False])
    assert ece(torch.tensor([0.5, 0.4]), mixed, bins=2) == pytest.approx(0.05, abs=1e-7)
    assert ece(torch.tensor([0.5, 0.6]), mixed, bins=2) == pytest.approx(0.55, abs=1e-7)


def test_logits_that_are_not_finite_are_a_recorded_failure_and_labels_are_checked():
    class Diverged(FromPixels):
        def forward(self, x):
            return x[:, 0, 0, :] * torch.nan

    data = logits_data([[9, 0], [0, 9]], [0, 1])
    with pytest.raises(Failure, match="not finite on 2 of 2"):
        accuracy.run(Diverged(), data)
    with pytest.raises(ValueError, match="largest is 7, the model has 2"):
        accuracy.run(FromPixels(), logits_data([[9, 0], [0, 9]], [0, 7]))


# ------------------------------------------------------------------------------------------------- corruption


class Corrupted(dict):
    """A corrupted set in memory with the attributes of an opened one."""

    def __init__(self, arrays, protocol="cifar_c", severities=(1, 2, 3, 4, 5), labels_N=None):
        super().__init__(arrays)
        self.protocol, self.severities, self.labels_N, self.label = (
            protocol,
            severities,
            labels_N,
            f"{protocol} made up",
        )


def corrupted_set(names, n=20, classes=10, severities=(1, 2, 3, 4, 5), seed=0, **settings):
    rng = np.random.default_rng(seed)
    return Corrupted(
        {name: rng.integers(0, 256, (len(severities), n, 1, classes, 1), dtype=np.uint8) for name in names},
        severities=severities,
        **settings,
    )


def test_corruption_cells_means_and_counts_by_numpy():
    names = [*MAIN, "saturate"]
    images = corrupted_set(names)
    labels = np.random.default_rng(1).integers(0, 10, 20)
    data = logits_data(np.zeros((20, 10)), labels, batch_size=7)
    result = corruption.run(FromPixels(), data, {}, images)
    correct = np.array([images[name][:, :, 0, :, 0].argmax(2) == labels for name in names])  # [16, 5, 20]
    for i, name in enumerate(names):
        for severity in range(1, 6):
            where = {"protocol": "cifar_c", "corruption": name, "severity": severity}
            assert pick(result, "corruption_accuracy", **where) == pytest.approx(100 * correct[i, severity - 1].mean())
    assert pick(result, "mean_corruption_accuracy", protocol="cifar_c") == pytest.approx(100 * correct[:15].mean())
    assert pick(result, "mean_corruption_accuracy_severity5") == pytest.approx(100 * correct[:15, 4].mean())
    assert pick(result, "corruption_cells") == 75
    counts = result.per_image["corruption_correct_cells"]
    assert counts.dtype == np.uint8 and np.array_equal(counts, correct[:15].sum((0, 1)))
    assert counts.mean() / 75 * 100 == pytest.approx(pick(result, "mean_corruption_accuracy"))
    assert not {"mCE", "relative_mCE"} & {r["metric"] for r in result.rows}
    assert all(r.keys() == KEYS and r["n"] == 20 for r in result.rows)
    assert all("cifar_c made up" in r["method"] for r in result.rows if r["unit"] == "%")


def test_a_part_of_the_corruptions_or_severities_says_so():
    images = corrupted_set(["fog", "snow", "saturate"], severities=(2, 4))
    data = logits_data(np.zeros((20, 10)), np.zeros(20))
    result = corruption.run(FromPixels(), data, {"corruptions": ["fog", "saturate"]}, images)
    (mean,) = [r for r in result.rows if r["metric"] == "mean_corruption_accuracy"]
    assert mean["conditions"] == {"protocol": "cifar_c", "corruptions": "fog", "severities": "2, 4"}
    assert "mean_corruption_accuracy_severity5" not in {r["metric"] for r in result.rows}
    assert {r["conditions"]["corruption"] for r in result.rows if r["metric"] == "corruption_accuracy"} == {
        "fog",
        "saturate",
    }
    with pytest.raises(ValueError, match="blizzard not in the corrupted set"):
        corruption.run(FromPixels(), data, {"corruptions": ["blizzard"]}, images)


def test_labels_are_the_sets_own_or_the_first_of_the_data():
    images = corrupted_set(["fog"], n=6)
    own = images["fog"][4, :, 0, :, 0].argmax(1)
    data = logits_data(np.zeros((20, 10)), np.r_[own, np.zeros(14, int)])
    assert pick(corruption.run(FromPixels(), data, {}, images), "corruption_accuracy", severity=5) == 100
    images.labels_N = (own + 1) % 10
    assert pick(corruption.run(FromPixels(), data, {}, images), "corruption_accuracy", severity=5) == 0
    images.labels_N = None
    with pytest.raises(ValueError, match="holds 6 images, there are 3 labels"):
        corruption.run(FromPixels(), data.first(3), {}, images)


def test_mce_only_where_it_is_defined():
    data = logits_data(np.zeros((20, 10)), np.random.default_rng(1).integers(0, 10, 20))
    images = corrupted_set(MAIN, protocol="imagenet_c")
    assert "mCE" not in {r["metric"] for r in corruption.run(FromPixels(), data, {}, images).rows}
    result = corruption.run(FromPixels(), data, {"imagenet": True, "clean_top1": 70.0}, images)
    error = {
        c: np.mean([100 - pick(result, "corruption_accuracy", corruption=c, severity=s) for s in range(1, 6)])
        for c in MAIN
    }
    assert pick(result, "mCE") == pytest.approx(100 * np.mean([error[c] / ALEXNET_ERROR[c] for c in MAIN]))
    gaps = [(error[c] - 30) / (ALEXNET_ERROR[c] - ALEXNET_CLEAN_ERROR) for c in MAIN]
    assert pick(result, "relative_mCE") == pytest.approx(100 * np.mean(gaps))
    images.protocol = "official_imagenet_c"
    assert {r["metric"] for r in corruption.run(FromPixels(), data, {}, images).rows} >= {"mCE"}
    del images["fog"]
    assert "mCE" not in {r["metric"] for r in corruption.run(FromPixels(), data, {"imagenet": True}, images).rows}


def test_corrupted_images_are_read_in_slices():
    read = []

    class Lazy:
        shape, dtype = (5, 9, 1, 10, 1), np.dtype(np.uint8)

        def __getitem__(self, key):
            read.append(key)
            return np.zeros((len(range(9)[key[1]]), 1, 10, 1), np.uint8)

    data = logits_data(np.zeros((9, 10)), np.zeros(9), batch_size=4)
    corruption.run(FromPixels(), data, {}, Corrupted({"fog": Lazy()}))
    assert read == [(s, slice(a, a + 4)) for s in range(5) for a in (0, 4, 8)]


# ---------------------------------------------------------------------------------------------------- attacks


def test_fgsm_on_a_linear_model_is_the_analytic_step():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 16, 2, dtype=torch.float64))
    data = random_data(n=32, size=4, classes=2)
    x, labels = next(data.raw_batches())
    x = x.double()

    def normalise(grey):
        return (grey / 255 - 0.4) / 0.2

    # d CE / d x = p_other (w_other - w_label) / (255 std): its sign is that of the weights' difference.
    w = model[1].weight.detach()
    direction = (w[1 - labels] - w[labels]).view(-1, 3, 4, 4)
    p_other = model(normalise(x)).softmax(1).gather(1, (1 - labels)[:, None]).detach()
    gradient = attacks.gradient(model, normalise, x, labels)
    torch.testing.assert_close(gradient, p_other[:, :, None, None] * direction / (255 * 0.2), rtol=1e-9, atol=1e-15)
    for epsilon in (1, 8):
        expected = (x + epsilon * direction.sign()).clamp(0, 255)
        assert torch.equal(attacks.fgsm(model, normalise, x, labels, epsilon), expected)
        # On a linear model iterated steps end in the same corner of the ball.
        assert torch.equal(attacks.pgd(model, normalise, x, labels, epsilon, 10, epsilon / 4), expected)


def trained():
    """A small network that has learnt to tell four bright quadrants apart."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 4, 256)
    images = rng.integers(60, 150, (256, 8, 8, 3), dtype=np.uint8)
    for image, label in zip(images, labels):
        y, x = 4 * (label // 2), 4 * (label % 2)
        image[y : y + 4, x : x + 4] += 30
    data = EvaluationData.from_arrays(images, labels, [0.4] * 3, [0.2] * 3, batch_size=64)
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.AvgPool2d(4),
        nn.Flatten(),
        nn.Dropout(0.1),
        nn.Linear(32, 4),
    )
    optimizer = torch.optim.Adam(model.parameters(), 0.02)
    for _ in range(12):
        for x, y in data.batches():
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return model, data


def test_attacks_on_a_trained_network():
    model, data = trained()
    clean = pick(accuracy.run(model, data), "top1")
    assert clean >= 95
    model.train()
    state = {k: v.clone() for k, v in model.state_dict().items()}
    settings = {"epsilons": [1, 8, 16], "pgd_steps": 5, "seed": 3}
    result = attacks.run(model, data, settings)
    assert all(p.grad is None for p in model.parameters()) and all(m.training for m in model.modules())
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    fgsm = [pick(result, "fgsm_accuracy", epsilon=f"{e}/255") for e in (1, 8, 16)]
    pgd = [pick(result, "pgd_accuracy", epsilon=f"{e}/255", steps=5) for e in (1, 8, 16)]
    assert clean >= fgsm[0] > fgsm[1] > fgsm[2] and fgsm[2] < 60
    assert clean >= pgd[0] > pgd[1] > pgd[2] and pgd[2] <= fgsm[2]
    assert all(r.keys() == KEYS and r["n"] == 256 and r["unit"] == "%" for r in result.rows)
    other = EvaluationData(data.images, data.labels, data.normalise, data.device, 17)
    assert [r["value"] for r in attacks.run(model, other, settings).rows] == [r["value"] for r in result.rows]
    assert {r["n"] for r in attacks.run(model, data, {"epsilons": [1], "images": 10}).rows} == {10}
    assert {r["metric"] for r in attacks.run(model, data, {"epsilons": [1]}).rows} == {"fgsm_accuracy"}


def test_perturbations_stay_in_the_ball_and_in_the_range_of_pixels():
    model, data = trained()
    model.eval()
    x, labels = next(data.raw_batches())
    x = x.float()
    x[:, :, :2], x[:, :, 2:4] = 0, 255  # rows where the clip must act
    weights_before = [p.clone() for p in model.parameters()]
    for epsilon in (1.0, 4.0):
        start = x + epsilon * (2 * torch.rand(x.shape, generator=torch.Generator().manual_seed(0)) - 1)
        for attacked in (
            attacks.fgsm(model, data.normalise, x, labels, epsilon),
            attacks.pgd(model, data.normalise, x, labels, epsilon, 7, epsilon / 2, start),
        ):
            assert ((attacked - x).abs() / 255).max() <= epsilon / 255 + 1e-7
            assert attacked.min() >= 0 and attacked.max() <= 255 and not torch.equal(attacked, x)
            assert not attacked.requires_grad
    assert all(torch.equal(a, b) and b.grad is None for a, b in zip(weights_before, model.parameters()))
    # The mean over a batch would scale gradients by its size; the sum leaves each image's own.
    whole = attacks.gradient(model, data.normalise, x, labels)
    single = attacks.gradient(model, data.normalise, x[:1], labels[:1])
    torch.testing.assert_close(whole[:1], single, rtol=1e-4, atol=1e-9)


def test_attack_settings_out_of_range():
    for settings in ({"epsilons": [0]}, {"epsilons": [300]}, {"epsilons": [1], "pgd_steps": -1}):
        with pytest.raises(ValueError, match="epsilons"):
            attacks.run(Smooth(), random_data(), settings)


# ------------------------------------------------------------------------------------------------------- cost


@pytest.mark.parametrize(
    ("layer", "size", "expected"),
    [
        (nn.Conv2d(3, 16, 3, padding=1), 8, 8 * 8 * 16 * 3 * 9),
        (nn.Conv2d(3, 16, 3, stride=2, padding=1), 8, 4 * 4 * 16 * 3 * 9),
        (nn.Conv2d(3, 12, 5, groups=3), 8, 4 * 4 * 12 * 25),
        (nn.Conv2d(3, 3, 3, padding=2, dilation=2, groups=3), 7, 7 * 7 * 3 * 9),
        (nn.Sequential(nn.Flatten(), nn.Linear(3 * 64, 10)), 8, 3 * 64 * 10),
    ],
)
def test_macs_of_small_layers(layer, size, expected):
    for batch in (1, 3):
        total, uncounted = cost.macs(layer, torch.zeros(batch, 3, size, size))
        assert total == expected and uncounted == []


def test_macs_of_attention_and_the_list_of_uncounted_operations():
    class Attention(nn.Module):
        def forward(self, x):
            tokens = x.flatten(2).transpose(1, 2)[:, None]  # [B, 1, 64, 3]
            return nn.functional.scaled_dot_product_attention(tokens, tokens, tokens)

    assert cost.macs(Attention(), torch.rand(1, 3, 8, 8))[0] == 2 * 64 * 64 * 3
    total, uncounted = cost.macs(
        nn.Sequential(nn.Conv2d(3, 4, 1), nn.GELU(), nn.BatchNorm2d(4)), torch.rand(1, 3, 8, 8)
    )
    assert (
        total == 64 * 12
        and any("gelu" in name for name in uncounted)
        and any("batch_norm" in name for name in uncounted)
    )


@pytest.mark.parametrize(
    ("expansion", "parameters", "trainable", "mega_macs"),
    [(1, 304_986, 37_290, 45.8), (8, 2_406_442, 264_874, 364.5)],
)
def test_cost_of_resnet20_and_its_linear_combinations(expansion, parameters, trainable, mega_macs):
    """ResNet-20-16 with 1x1 shortcuts on 32x32 RGB: counts worked out by hand from the architecture of arXiv
    2301.11360."""
    model = create_model("resnet20_16", num_classes=10, in_channels=3, image_size=32)
    data = random_data(n=4, size=32)
    plain = cost.run(model, data, {"batch_size": 2})
    assert pick(plain, "parameters") == pick(plain, "trainable_parameters") == 272_474
    convs = [m for m in model.modules() if isinstance(m, nn.Conv2d)]
    area = {16: 32 * 32, 32: 16 * 16, 64: 8 * 8}  # the sides halve where the width doubles
    macs = sum(area[c.out_channels] * c.weight.numel() for c in convs) + 64 * 10
    assert pick(plain, "macs", folded="no") == macs == pytest.approx(40.8e6, rel=2e-3)
    assert pick(plain, "stored_bytes") == 4 * 272_474 + sum(b.numel() * b.element_size() for b in model.buffers())
    assert [r for r in plain.rows if r["conditions"].get("folded") == "yes"] == []

    mixed = cost.run(surgery.linear_combinations(model, expansion=expansion, mode="two_layer"), data, {"batch_size": 2})
    assert (pick(mixed, "parameters"), pick(mixed, "trainable_parameters")) == (parameters, trainable)
    assert pick(mixed, "macs", folded="no") == pytest.approx(1e6 * mega_macs, rel=2e-3)
    assert pick(mixed, "macs", folded="yes") == macs
    assert 4 * trainable < pick(mixed, "stored_bytes") < 4 * trainable + 10_000  # a frozen bank is stored as its seed
    assert all(r.keys() == KEYS for r in plain.rows + mixed.rows)


def test_parameters_count_shared_tensors_once_and_frozen_ones_too():
    model = nn.Sequential(nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4))
    model[1].weight = model[0].weight
    model[0].weight.requires_grad_(False)
    assert cost.parameter_counts(model) == {"parameters": 144 + 4 + 4 + 8, "trainable": 4 + 4 + 8}
    assert cost.stored_bytes(model) == 4 * (144 + 8 + 8) + 4 * 8 + 8  # running mean and variance, and a count
    model[0].register_buffer("bank", torch.zeros(5, 4, 3, 3), persistent=False)
    model[0].register_buffer("table", torch.zeros(7, 7), persistent=False)
    assert cost.parameter_counts(model)["parameters"] == 160 + 180
    assert cost.stored_bytes(model) == 4 * 160 + 40


def test_a_module_may_say_what_it_stores():
    class Compressed(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(100, 100)

        def stored_bytes(self):
            return 7

    assert cost.stored_bytes(nn.Sequential(Compressed(), nn.Linear(2, 3))) == 7 + 4 * 9
    assert cost.stored_bytes(Compressed()) == 7


def test_peak_memory_by_hand():
    """x -> a -> b in sequence: while b is made, a and b are alive, x beside them; weights 2 x 64 numbers."""

    class Chain(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Parameter(torch.ones(64)), nn.Parameter(torch.ones(64))

        def forward(self, x):
            a = x * self.first
            b = a * self.second
            del a
            return b + 1 if self.training else b

    x = torch.ones(2, 3, 32, 64)
    size = x.numel() * 4
    peak, method = cost.peak_memory(Chain(), x)
    assert peak == 2 * 64 * 4 + size + 2 * size and "running sum" in method
    model = Smooth()
    small, large = (cost.peak_memory(model, torch.rand(b, 3, 16, 16))[0] for b in (8, 16))
    weights = sum(t.numel() * t.element_size() for t in [*model.parameters(), *model.buffers()])
    assert (large - weights) / (small - weights) == pytest.approx(2, rel=0.02)
    assert cost.peak_rss() > 50e6


def test_folded_form_exists_only_where_something_folds():
    model = create_model("resnet8_8", num_classes=10, in_channels=3, image_size=32).eval()
    assert folded_form(model) is None
    mixed = surgery.linear_combinations(model, layers="*conv1", expansion=2).eval()
    x = torch.rand(2, 3, 32, 32)
    torch.testing.assert_close(folded_form(mixed)(x), mixed(x), rtol=1e-4, atol=1e-5)
    (layer, *_) = [m for m in mixed.modules() if hasattr(m, "fold")]
    assert type(folded_form(layer)) is nn.Conv2d  # a model that is one operator itself


def test_results_add_up():
    one, two = Result([{"a": 1}], {"x": np.zeros(1)}), Result([{"a": 2}], {"y": np.ones(1)}, {"z": 3})
    both = one + two
    assert both.rows == [{"a": 1}, {"a": 2}] and both.per_image.keys() == {"x", "y"} and both.details == {"z": 3}
