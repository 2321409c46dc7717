"""What a self-supervised run says beyond its neighbours' accuracy: probes, relations between views, tokens, attention."""

from dataclasses import replace

import numpy as np
import torch
from torch import Tensor, nn

from convx.arguments import check_settings
from convx.data.multicrop import MultiCrop
from convx.evaluate import EvaluationData, Result, evaluation_mode, row
from convx.evaluate.probes import linear_probe
from convx.layers.neighbours import Neighbours
from convx.layers.vit_tokens import class_attention, tokens
from convx.objectives.self_relation import SETTINGS
from convx.papers.sere import analysis
from convx.runs import build_model
from convx.seeds import generator

LAST = 4  # blocks whose class tokens the linear probe sees, as in DINO's evaluation of ViT-S
VIEWED = 256  # test images whose relations are compared between views
COMPOSED = (2000, 1000)  # training and test images, at most, of which composites are made
PICTURES = 4  # test images whose attention is kept
LARGEST_BANK = 2**29  # numbers of a bank of pixels; larger sets have no accuracy of pixels


def run(model: nn.Module, recipe: dict, data: EvaluationData) -> Result:
    """Return probes, relations and attention of a frozen encoder; labels of ``data.train`` are used by the probes.

    Rows: ``knn_top1`` (weighted neighbours among the training images), also of the untrained encoder
    (``knn_top1_untrained``) and of pixels (``knn_top1_pixels``); ``linear_top1``, a probe of the class tokens of the last four
    blocks; ``token_top1``, a probe of patch tokens of 2x2 composites; ``relation_divergence`` and ``relation_agreement``, see
    :func:`convx.papers.sere.analysis.agreement`; ``precondition`` named beats_untrained. ``per_image``: ``linear_correct``.
    Arrays: ``attention`` [pictures, heads, h, w] of the class token, ``pictures`` [pictures, H, W, C] in 0..1.
    """
    if recipe["objective"]["name"] != "self_relation" or data.train is None:
        return Result([])
    given = {key: value for key, value in recipe["objective"].items() if key != "name"}
    settings = check_settings("objective", given, SETTINGS)
    with evaluation_mode(model), torch.no_grad():
        bank, test = (_features(model, part, LAST) for part in (data.train, data))
        classes = int(data.train.labels.max()) + 1
        labels, wanted = data.train.labels, data.labels
        rows = []

        def add(metric: str, right_N: Tensor, method: str) -> float:
            value = 100 * int(right_N.sum()) / len(right_N)
            rows.append(row(metric, value, "%", n=len(right_N), split="test", method=method))
            return value

        def near(bank_ND: Tensor, test_ND: Tensor) -> tuple[Tensor, str]:
            k = min(settings["neighbours"], len(bank_ND))
            voters = Neighbours(nn.Identity(), bank_ND, labels, classes, k, settings["neighbour_temperature"])
            votes = torch.cat([voters.votes(part).argmax(1) for part in test_ND.split(data.batch_size)])
            return votes == wanted, f"weighted votes of the {k} nearest training images, T = {voters.temperature:g}"

        right, method = near(bank[-1], test[-1])
        trained = add("knn_top1", right, f"{method}; frozen class token of the last block")
        untrained = _untrained(model, recipe, data, classes)
        if untrained is not None:
            right, method = near(*(_features(untrained, part, 1)[0] for part in (data.train, data)))
            start = add("knn_top1_untrained", right, f"{method}; the encoder before training")
            said = f"{trained:.1f} % of neighbours are right, {start:.1f} % before training"
            rows.append(row("precondition", float(trained > start), "1", method=said, name="beats_untrained"))
        channels, height, width = data.shape_CHW
        if len(labels) * channels * height * width <= LARGEST_BANK:
            add("knn_top1_pixels", *near(_pixels(data.train), _pixels(data)))
        found, penalty = linear_probe(torch.cat(bank, 1), labels, torch.cat(test, 1), classes)
        right_N = found == wanted
        said = f"logistic regression on the class tokens of the last {len(bank)} blocks; {_fitted(penalty)}"
        add("linear_top1", right_N, said)
        rows += _tokens(model, data, classes)
        for name, encoder in (("trained", model), ("untrained", untrained)):
            if encoder is not None:
                rows += _relations(encoder, data, settings, name)
        arrays = _attention(model, data)
    return Result(rows, per_image={"linear_correct": right_N.cpu().numpy()}, arrays=arrays)


def _fitted(penalty: float) -> str:
    return f"L-BFGS, penalty {penalty:g} chosen on training images alone"


def _features(model: nn.Module, data: EvaluationData, last: int) -> list[Tensor]:
    """Return the class tokens [N, C] behind the last blocks."""
    parts = [tokens(model, x_BCHW, last)[0] for x_BCHW, _ in data.batches()]
    return [torch.cat(column).float() for column in zip(*parts)]


def _pixels(data: EvaluationData) -> Tensor:
    return torch.cat([x_BCHW.flatten(1) for x_BCHW, _ in data.batches()])


def _untrained(model: nn.Module, recipe: dict, data: EvaluationData, classes: int) -> nn.Module | None:
    """Return the encoder as it was before training, or None where it started from another run's weights."""
    if recipe.get("start"):
        return None
    channels, side, _ = data.shape_CHW
    with torch.random.fork_rng(devices=[]):
        built = build_model(recipe, {"num_classes": classes, "channels": channels, "image_size": side})
    return built.to(data.device).eval()


def _sample(data: EvaluationData, count: int) -> EvaluationData:
    """Return evenly spaced images in an order drawn once for all runs: a folder is sorted by class."""
    places = np.unique(np.linspace(0, len(data) - 1, min(count, len(data))).round().astype(int))
    places = places[torch.randperm(len(places), generator=generator(0, "sere sample")).numpy()]
    at = torch.as_tensor(places, device=data.device)
    return data.replaced(data.images[at if isinstance(data.images, Tensor) else places], data.labels[at])


def _tokens(model: nn.Module, data: EvaluationData, classes: int) -> list[dict]:
    """Return ``token_top1``: a linear probe of single patch tokens of composites of four images."""
    parts = []
    for source, count in zip((data.train, data), COMPOSED):
        sample = replace(_sample(source, count), batch_size=4 * max(1, data.batch_size // 16))
        features, labels = [], []
        for images, own in sample.raw_batches():
            pictures, quarters = analysis.composites(images, own)
            if len(pictures):
                features.append(analysis.token_features(model, data.normalise(pictures)))
                labels.append(analysis.token_labels(quarters, tuple(features[-1].shape[1:3])))
        parts.append((torch.cat(features).flatten(0, 2).float(), torch.cat(labels).flatten()))
    (train_ND, labels), (test_ND, wanted) = parts
    found, penalty = linear_probe(train_ND, labels, test_ND, classes)
    said = f"logistic regression on single patch tokens of 2x2 composites at twice the size; {_fitted(penalty)}"
    return [
        row(
            "token_top1",
            100 * int((found == wanted).sum()) / len(wanted),
            "%",
            n=len(wanted),
            split="test",
            method=said,
        )
    ]


def _relations(model: nn.Module, data: EvaluationData, settings: dict, encoder: str) -> list[dict]:
    """Return the rows of the relations of two global views, the same ones for every run."""
    sample = _sample(data, VIEWED)
    views = {key: settings[key] for key in MultiCrop.__dataclass_fields__ if key in settings}
    side = data.shape_CHW[1]
    make = MultiCrop(**views | {"global_size": side, "local_size": side, "local_crops": 0})
    rng, parts = generator(0, "sere relation views"), []
    for images, _ in sample.raw_batches():
        made = make(images, rng)
        maps = [tokens(model, data.normalise(crops * 255))[1].float() for crops in made.global_crops]
        parts.append((*maps, made.rectangles, made.flips))
    first, second = (torch.cat([part[place] for part in parts]) for place in (0, 1))
    rectangles, flips = (torch.cat([part[place] for part in parts], 1) for place in (2, 3))
    heads = settings["relation_heads"] or model.blocks[0].attn.num_heads
    size = settings["global_grid"] or max(1, first.shape[-1] - 1)
    temperatures = settings["spatial_temperature"], settings["channel_temperature"]
    found = analysis.agreement(first, second, rectangles, flips, heads, size, temperatures)
    entropy = analysis.mean_row_entropy(first, heads, temperatures[0])
    facts = f"{len(sample)} test images, two global views, standardised patch tokens through relu, no head"
    rows = [
        row(
            "relation_entropy",
            entropy,
            "nats",
            n=len(sample),
            split="test",
            method=facts,
            encoder=encoder,
            relation="spatial",
        )
    ]
    for (quantity, pair), value in found.items():
        where = {"encoder": encoder, "pair": pair}
        if quantity == "agreement":
            rows.append(row("relation_agreement", value, "%", n=len(sample), split="test", method=facts, **where))
        else:
            where |= {"relation": quantity}
            rows.append(row("relation_divergence", value, "nats", n=len(sample), split="test", method=facts, **where))
    return rows


def _attention(model: nn.Module, data: EvaluationData) -> dict[str, np.ndarray]:
    """Return what the class token of the last block attends to in a few test images, and the images."""
    images = torch.cat([images for images, _ in _sample(data, PICTURES).raw_batches()])
    maps = class_attention(model, data.normalise(images))
    pictures = images.permute(0, 2, 3, 1).float() / 255
    return {"attention": maps.float().cpu().numpy(), "pictures": pictures.cpu().numpy()}
