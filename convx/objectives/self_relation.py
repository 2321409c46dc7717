"""Self-supervised training of a vision transformer: DINO's instance loss and, on top of it, SERE's self-relation.

DINO: arXiv 2104.14294. SERE: arXiv 2206.05184, from the mathematics. A student sees two global and some local crops of an
image, a teacher, the moving average of the student, the global ones. L = w L_instance + alpha L_spatial + beta L_channel, with
w = (4 - alpha - beta) / 2 unless it is given. Labels are used for nothing but the history's nearest-neighbour accuracy.
"""

import copy
import math

import torch
from torch import Tensor, nn

from convx.arguments import check_settings
from convx.data.multicrop import MultiCrop, Views
from convx.layers.channel_loss import channel_loss
from convx.layers.dino_head import DinoHead, instance_loss, teacher_distribution
from convx.layers.neighbours import Neighbours, encoded
from convx.layers.self_relation import (
    RelationHead,
    overlap_grids,
    row_cross_entropy,
    row_entropy,
    sample_map,
    sample_relation,
    spatial_relation,
)
from convx.layers.vit_tokens import check_vit, tokens
from convx.manifest import Failure
from convx.objectives import Objective

# Every setting: (default, what it may be). A tuple (low, high) bounds a number or each number of a list, None is open; a list
# holds choices; None as a default stands for a value that follows from the others.
SETTINGS = {
    "spatial_weight": (0.2, (0.0, None)),
    "channel_weight": (0.5, (0.0, None)),
    "instance_weight": (None, (0.0, None)),
    "spatial_temperature": (0.5, (0.001, None)),
    "channel_temperature": (0.1, (0.001, None)),
    "relation_heads": (None, (1, None)),
    "global_grid": (None, (1, 256)),
    "local_grid": (None, (1, 256)),
    "grid": ("endpoints", ["endpoints", "centres"]),
    "padding": ("zeros", ["zeros", "border"]),
    "sampling": ("features", ["features", "relation"]),
    "local_crops": (4, (0, 64)),
    "local_size": (None, (1, None)),
    "global_scale": ([0.4, 1.0], (0.001, 1.0)),
    "local_scale": ([0.05, 0.4], (0.001, 1.0)),
    "flip": (0.5, (0.0, 1.0)),
    "jitter": (0.8, (0.0, 1.0)),
    "jitter_strength": ([0.4, 0.4, 0.2, 0.1], (0.0, 1.0)),
    "grey": (0.2, (0.0, 1.0)),
    "blur": ([1.0, 0.1, 0.5], (0.0, 1.0)),
    "blur_sigma": ([0.1, 2.0], (0.001, 64.0)),
    "solarise": (0.2, (0.0, 1.0)),
    "interpolation": ("bicubic", ["bicubic", "bilinear"]),
    "prototypes": (4096, (2, None)),
    "head_hidden": (1024, (1, None)),
    "head_bottleneck": (256, (1, None)),
    "head_batch_norm": (False, [False, True]),
    "norm_last_layer": (True, [False, True]),
    "freeze_last_epochs": (1, (0, None)),
    "student_temperature": (0.1, (0.001, None)),
    "teacher_temperature": ([0.04, 0.07], (0.001, None)),
    "temperature_warmup": (0.3, (0.0, 1.0)),
    "centre_momentum": (0.9, (0.0, 1.0)),
    "teacher_momentum": ([0.996, 1.0], (0.0, 1.0)),
    "weight_decay_end": (None, (0.0, None)),
    "collapse_from": (0.5, (0.0, 1.0)),
    "collapse_information": (0.05, (0.0, 1.0)),
    "neighbours": (20, (1, None)),
    "neighbour_temperature": (0.07, (0.001, None)),
}
BATCH = 500  # images of one batch of an evaluation
BANK = 10_000  # training images, evenly spaced, that the history's neighbours are looked for among


class Branch(nn.Module):
    """What student and teacher both are: encoder, DINO head, and the heads of the relations.

    Local crops have relation heads of their own ("spatial_local", ...), whatever their number.
    """

    def __init__(self, encoder: nn.Module, head: DinoHead, relations: nn.ModuleDict):
        super().__init__()
        self.encoder, self.head, self.relations = encoder, head, relations


def cosine(start: float, end: float, progress: float) -> float:
    """Return a half cosine from ``start`` at progress 0 to ``end`` at 1."""
    return end + (start - end) * (1 + math.cos(math.pi * min(1.0, max(0.0, progress)))) / 2


def full(x: Tensor) -> Tensor:
    """Return a tensor in at least single precision: relations and softmax are not for half precision."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


class SelfRelation(Objective):
    """Student, teacher and centre. ``settings`` as in ``SETTINGS``; ``data`` is the run's ``convx.runs.RunData``."""

    def __init__(self, model: nn.Module, settings: dict, training: dict, data):
        super().__init__()
        self.settings = settings = check_settings("objective", settings, SETTINGS)
        self.epochs, self.normalise = training["epochs"], data.normalise
        encoder = check_vit(model)
        width, patch = encoder.embed_dim, encoder.patch_embed.patch_size[0]
        size = data.meta["image_size"]
        local = settings["local_size"] or max(patch, size // 2 // patch * patch)
        for key, side in (("data.image_size", size), ("objective.local_size", local)):
            if side % patch:
                raise ValueError(f"{key}: {side} is no multiple of the patch size, {patch}")
        for key in ("global_scale", "local_scale", "blur_sigma"):
            if settings[key][0] > settings[key][1]:
                raise ValueError(f"objective.{key}: {settings[key]} should be the smallest value, then the largest")
        views = {key: settings[key] for key in MultiCrop.__dataclass_fields__ if key in settings}
        self.views = MultiCrop(**views | {"global_size": size, "local_size": local})
        alpha, beta = self.weights = settings["spatial_weight"], settings["channel_weight"]
        own = settings["instance_weight"]
        self.instance_weight = (4 - alpha - beta) / 2 if own is None else own
        if self.instance_weight < 0:
            raise ValueError(
                f"objective.spatial_weight, channel_weight: {alpha} and {beta} leave nothing for the instance loss"
            )
        self.heads = settings["relation_heads"] or encoder.blocks[0].attn.num_heads
        if width % self.heads:
            raise ValueError(f"objective.relation_heads: {self.heads} does not divide the encoder's {width} channels")
        # Nearly the token grid of a global crop, and that of a local one: 13 of 14 and 6 of 6 in the official code.
        self.grids = settings["global_grid"] or max(1, size // patch - 1), settings["local_grid"] or local // patch
        # Relation heads are drawn last, so that arms with other weights share encoder and DINO head.
        head = DinoHead(
            width,
            settings["prototypes"],
            settings["head_hidden"],
            settings["head_bottleneck"],
            settings["head_batch_norm"],
            learn_length=not settings["norm_last_layer"],
        )
        self.kinds = [kind for kind, weight in (("spatial", alpha), ("channel", beta)) if weight]
        ends = ("", "_local") if settings["local_crops"] else ("",)
        relations = nn.ModuleDict({f"{kind}{end}": RelationHead(width) for kind in self.kinds for end in ends})
        self.student = Branch(encoder, head, relations)
        self.teacher = copy.deepcopy(self.student).requires_grad_(False)
        for module in self.teacher.modules():  # the teacher drops nothing
            for name in ("drop_prob", "p"):
                if isinstance(getattr(module, name, None), float):
                    setattr(module, name, 0.0)
        self.register_buffer("centre", torch.zeros(settings["prototypes"]))
        self._batch_mean: Tensor | None = None

    def exported(self) -> nn.Module:
        """Return the teacher's encoder, a plain timm ViT: what DINO evaluates."""
        return self.teacher.encoder

    # ------------------------------------------------------------------------------------------------------------ losses

    def forward(self, images, labels, rng, progress):
        return self.losses(self.views(images, rng), progress)

    def losses(self, views: Views, progress: float) -> tuple[Tensor, dict[str, Tensor]]:
        """Return (loss, {name: detached value times the number of images}) of the views of a batch."""
        settings, count = self.settings, views.global_crops.shape[1]
        globals_ = self.normalise(views.global_crops.flatten(0, 1) * 255)
        local = self.normalise(views.local_crops.flatten(0, 1) * 255) if len(views.local_crops) else None
        with torch.no_grad():
            (teacher_class,), teacher_map = tokens(self.teacher.encoder, globals_)
            logits = full(self.teacher.head(teacher_class))
            self._batch_mean = logits.mean(0)
            low, high = settings["teacher_temperature"]
            warm = settings["temperature_warmup"]
            temperature = low + (high - low) * (min(1.0, progress / warm) if warm else 1.0)
            target_GBK = teacher_distribution(logits, self.centre, temperature).unflatten(0, (2, count))
            projected = {kind: full(self.teacher.relations[kind].project(teacher_map)) for kind in self.kinds}
        (classes,), maps = tokens(self.student.encoder, globals_)
        predicted = {kind: full(self.student.relations[kind](maps)) for kind in self.kinds}
        if local is not None:
            (local_classes,), local_maps = tokens(self.student.encoder, local)
            classes = torch.cat([classes, local_classes])
            predicted |= {
                f"{kind}_local": full(self.student.relations[f"{kind}_local"](local_maps)) for kind in self.kinds
            }
        student_VBK = full(self.student.head(classes)).unflatten(0, (-1, count))
        with torch.autocast(globals_.device.type, enabled=False):
            instance = instance_loss(student_VBK, target_GBK, settings["student_temperature"])
            loss = self.instance_weight * instance
            found = {"instance": instance.detach()} | self._watch(target_GBK)
            for kind, weight in zip(("spatial", "channel"), self.weights):
                if weight:
                    value, entropy = getattr(self, f"_{kind}")(projected[kind], predicted, views)
                    loss = loss + weight * value
                    found |= {kind: value.detach(), f"{kind}_kl": value.detach() - entropy}
        found["loss"] = loss.detach()
        return loss, {name: value * count for name, value in found.items()}

    def _spatial(self, z: Tensor, predicted: dict[str, Tensor], views: Views) -> tuple[Tensor, Tensor]:
        """Return (L_spatial, entropy of its targets): 2 + 2 local pairs an image, those without overlap left out."""
        settings, count = self.settings, views.flips.shape[1]
        first, second = views.rectangles[0], views.rectangles[1]
        grid_0, grid_1, overlap = overlap_grids(
            first, second, views.flips[0], views.flips[1], self.grids[0], settings["grid"]
        )
        grids = torch.cat([grid_0, grid_1])[:, None]  # [2B, 1, s, s, 2]
        target = self._related(z, grids).unflatten(0, (2, count))
        student = (
            self._related(predicted["spatial"], grids).unflatten(0, (2, count)).flip(0)
        )  # the other crop's student
        parts = [(target, student, overlap.expand(2, -1))]
        if "spatial_local" in predicted:
            number = len(views.flips) - 2
            grid_g, grid_l, overlap = overlap_grids(
                views.rectangles[:2, None], views.rectangles[None, 2:], views.flips[:2, None], views.flips[None, 2:],
                self.grids[1], settings["grid"],
            )  # fmt: skip
            target = self._related(z, grid_g.transpose(1, 2).flatten(0, 1))  # [2B, L, ...]
            student = self._related(predicted["spatial_local"], grid_l.permute(1, 2, 0, 3, 4, 5).flatten(0, 1))
            target = target.unflatten(0, (2, count)).transpose(1, 2)
            student = student.unflatten(0, (number, count)).permute(2, 0, 1, 3, 4, 5)
            parts.append((target, student, overlap))
        loss = entropy = pairs = 0.0
        for target, student, overlap in parts:
            distribution = torch.softmax(target / settings["spatial_temperature"], -1)
            used = overlap.to(student.dtype)
            # [pairs, images, 1 where one grid a map, heads, rows] -> [pairs, images]
            rows = row_cross_entropy(distribution, student).flatten(used.ndim).mean(-1)
            loss = loss + (rows * used).sum()
            entropy = entropy + (row_entropy(distribution).flatten(used.ndim).mean(-1) * used).sum()
            pairs = pairs + used.sum()
        pairs = pairs.clamp(min=1)
        return loss / pairs, entropy / pairs

    def _related(self, map_BCHW: Tensor, grids_BMSS2: Tensor) -> Tensor:
        """Return the relations [B, M, heads, s^2, s^2] of maps at M grids each."""
        padding = self.settings["padding"]
        if self.settings["sampling"] == "features":
            return spatial_relation(sample_map(map_BCHW, grids_BMSS2, padding), self.heads)
        relation, side = spatial_relation(map_BCHW, self.heads), tuple(map_BCHW.shape[2:])
        found = [sample_relation(relation, grids, side, padding) for grids in grids_BMSS2.unbind(1)]
        return torch.stack(found, 1)

    def _channel(self, z: Tensor, predicted: dict[str, Tensor], views: Views) -> tuple[Tensor, Tensor]:
        """Return (L_channel, entropy of its targets) over 2 + 2 local pairs an image; channels need no alignment."""
        count = views.flips.shape[1]
        students = [predicted[key] for key in ("channel", "channel_local") if key in predicted]
        maps = [each.flatten(2).unflatten(0, (-1, count)) for each in (z, *students)]
        return channel_loss(maps[0], maps[1:], self.settings["channel_temperature"])

    @torch.no_grad()
    def _watch(self, target_GBK: Tensor) -> dict[str, Tensor]:
        """Return what shows a collapse: the teacher's entropy, what its output says about the image, the centre's length.

        ``information`` is the entropy of the mean distribution less the mean entropy, in nats: 0 where all images get the same
        one, be it uniform or a single prototype.
        """
        entropy = row_entropy(target_GBK).mean()
        information = row_entropy(target_GBK.mean(1)).mean() - entropy
        return {"teacher_entropy": entropy, "teacher_information": information, "centre_norm": self.centre.norm()}

    # ------------------------------------------------------------------------------------------------------------ hooks

    def before_step(self, optimizer, progress: float) -> None:
        """Set the weight decay of this update; keep the prototypes where they are in the first epochs."""
        end = self.settings["weight_decay_end"]
        if end is not None:
            for group in optimizer.param_groups:
                start = group.setdefault("weight_decay_start", group["weight_decay"])
                if start:
                    group["weight_decay"] = cosine(start, end, progress)
        if progress * self.epochs < self.settings["freeze_last_epochs"]:
            for parameter in self.student.head.prototypes.parameters():
                parameter.grad = None

    def clip_gradients(self, max_norm: float) -> None:
        """Clip each tensor's gradient by its own norm, as DINO and SERE do."""
        gradients = [p.grad for p in self.student.parameters() if p.grad is not None]
        factors = (max_norm / (torch.stack(torch._foreach_norm(gradients)) + 1e-6)).clamp(max=1.0)
        torch._foreach_mul_(gradients, list(factors.unbind()))

    @torch.no_grad()
    def after_step(self, progress: float) -> None:
        """Move the teacher's parameters and the centre; its batch statistics are its own."""
        momentum = cosine(*self.settings["teacher_momentum"], progress)
        teacher, student = list(self.teacher.parameters()), list(self.student.parameters())
        torch._foreach_lerp_(teacher, student, 1 - momentum)
        if self._batch_mean is not None:
            self.centre.lerp_(self._batch_mean, 1 - self.settings["centre_momentum"])
            self._batch_mean = None

    def validation(self, model: nn.Module, data, images, labels) -> dict:
        """Return the accuracy of the neighbours among training images that are not augmented."""
        bank, bank_labels = data.split("train")
        stride = max(1, -(-len(bank) // BANK))
        classifier = neighbours(
            model, self.settings, _batches(bank, data.normalise, stride), bank_labels[::stride], data.num_classes
        )
        was_training = model.training
        model.eval()
        with torch.inference_mode():
            found = torch.cat([classifier(x).argmax(1) for x in _batches(images, data.normalise)])
        model.train(was_training)
        return {"knn_top1": 100 * int((found == labels).sum()) / len(labels)}

    def check(self, row: dict) -> None:
        """Raise ``Failure`` from the share ``collapse_from`` of training on, where all images get the same output."""
        information = row.get("train_teacher_information")
        if information is None or row["epoch"] < self.settings["collapse_from"] * self.epochs:
            return
        most = math.log(self.settings["prototypes"])
        if not information >= self.settings["collapse_information"]:
            raise Failure(
                f"collapsed by epoch {row['epoch']}: the teacher's output says {information:.4f} nats about the image "
                f"(its entropy is {row['train_teacher_entropy']:.3f} of {most:.3f})"
            )


def _batches(images, normalise, stride: int = 1):
    """Yield model inputs of every ``stride``-th image; a folder's come in slices."""
    for start in range(0, len(images), BATCH * stride):
        yield normalise(images[start : start + BATCH * stride : stride])


def neighbours(model: nn.Module, settings: dict, batches, labels: Tensor, classes: int) -> Neighbours:
    """Return the classifier by weighted neighbours among ``batches`` of model inputs, with their labels."""
    bank = encoded(model, batches)
    return Neighbours(
        model, bank, labels, classes, min(settings["neighbours"], len(bank)), settings["neighbour_temperature"]
    )


def classifier(model: nn.Module, settings: dict, train) -> Neighbours:
    """Return what evaluators take for logits: the neighbours of an image among the training images.

    ``train`` is a :class:`convx.evaluate.EvaluationData` of training images without augmentation.
    """
    settings = check_settings("objective", settings, SETTINGS)
    classes = int(train.labels.max()) + 1
    return neighbours(model, settings, (x for x, _ in train.batches()), train.labels, classes).to(train.device)


def create(model: nn.Module, settings: dict, training: dict, data) -> SelfRelation:
    """Build the objective around one of timm's vision transformers without a classifier."""
    return SelfRelation(model, settings, training, data)
