"""Bootstrapped ViT (Zhang et al. 2022, arXiv 2112.03552): a ViT and an agent CNN in its own weights, trained together.

Modes: "vit" trains the ViT alone (with a teacher of another run: distilled from it), "agent" an agent alone, "joint" both with
weights of their own, "shared" both with one set of value, output and feed-forward weights. The losses are equations 6 to 9 with
the weights of table 4 and the official configurations: cross-entropy 1, distillation 1, features 10. Exported is the plain ViT,
for "agent" the agent.
"""

from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from convx.arguments import check_settings
from convx.data.batches import Augment
from convx.layers.agent_cnn import AgentCNN, check_vit
from convx.layers.shared_conv import TapConv2d
from convx.objectives import Objective
from convx.seeds import derive

BATCH = 500  # images of a validation batch


# Every setting: (default, bounds or choices); read as text when a study is checked, see ``convx.arguments.check_settings``.
# init: "official" draws as the released code does, "trunc02" everything from a normal law of 0.02 cut at two deviations,
#   "host" leaves the model as it was built (also where it starts from another run).
# decay: the feature weight falls linearly over the epochs, or stays.
# adapt: the longer of two token sequences is pooled along the raster ("seq1d", the paper's) or in two dimensions.
# align (shared only): what becomes of the agent's gradient on the shared weights where it conflicts with the ViT's: "none"
#   (the code: one weighted sum), or projected as in Algorithm 1, over all shared weights or tensor by tensor.
# agent_*: of the agent that is made beside the ViT, see ``convx.layers.agent_cnn.AgentCNN``.
SETTINGS = {
    "mode": ("joint", ["vit", "agent", "joint", "shared"]),
    "init": ("official", ["official", "trunc02", "host"]),
    "ce_weight": (1.0, (0.0, None)),
    "kd_weight": (1.0, (0.0, None)),
    "kd_temperature": (4.0, (0.01, None)),
    "feature_weight": (10.0, (0.0, None)),
    "decay": ("linear", ["linear", "none"]),
    "adapt": ("seq1d", ["seq1d", "avg2d"]),
    "align": ("none", ["none", "pcgrad_global", "pcgrad_tensor"]),
    "agent_style": ("residual", ["residual", "base"]),
    "agent_offsets": ("raster", ["raster", "nearest"]),
    "agent_down_after": (None, (0, 1023)),
    "agent_norm": ("pre", ["pre", "post"]),
    "agent_stem_width": (64, (1, 4096)),
    "agent_dropout": (0.1, (0.0, 0.999)),
}


# ------------------------------------------------------------------------------------------------------------------- losses


def _wide(x: Tensor) -> Tensor:
    """Return half precision as float32: losses are computed there under autocast."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


def distillation(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """Return T^2 KL(softmax(teacher / T) || softmax(student / T)), mean over the batch; the teacher is a constant (eq. 8)."""
    target = F.log_softmax(_wide(teacher.detach()) / temperature, 1)
    found = F.log_softmax(_wide(student) / temperature, 1)
    return temperature**2 * F.kl_div(found, target, reduction="batchmean", log_target=True)


def matched(vit_BND: Tensor, agent_BDhw: Tensor, adapt: str, grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Return tokens of the ViT and of the agent [B, n, D] with n of the shorter: the longer sequence is average-pooled.

    "seq1d": runs of consecutive tokens in raster order (the paper's adaptation, though it mixes pixels far apart);
    "avg2d": rectangles, ``grid`` being the ViT's. Raises ``ValueError`` where one size is no multiple of the other.
    """
    height, width = agent_BDhw.shape[2:]
    agent_BND, long, short = agent_BDhw.flatten(2).transpose(1, 2), height * width, vit_BND.shape[1]
    if long == short:
        return vit_BND, agent_BND
    agent_longer = long > short
    if not agent_longer:
        long, short = short, long
    if long % short:
        raise ValueError(f"features of {long} and {short} tokens: one number must be a multiple of the other")
    if adapt == "seq1d":
        pool = lambda x: x.unflatten(1, (short, long // short)).mean(2)  # noqa: E731
        return (vit_BND, pool(agent_BND)) if agent_longer else (pool(vit_BND), agent_BND)
    large, small = ((height, width), grid) if agent_longer else (grid, (height, width))
    if large[0] % small[0] or large[1] % small[1]:
        raise ValueError(f"features of {large[0]}x{large[1]} and {small[0]}x{small[1]} do not fit into each other")
    map_BDhw = agent_BDhw if agent_longer else vit_BND.transpose(1, 2).unflatten(2, grid)
    pooled = F.avg_pool2d(map_BDhw, (large[0] // small[0], large[1] // small[1])).flatten(2).transpose(1, 2)
    return (vit_BND, pooled) if agent_longer else (pooled, agent_BND)


def feature_distances(
    vit_maps: list[Tensor], agent_maps: list[Tensor], adapt: str, grid: tuple[int, int]
) -> list[Tensor]:
    """Return per layer the mean squared difference of layer-normalised features, the agent's as a constant (eq. 6, 7).

    For one layer that is the mean over tokens of 2 - 2 cos of the mean-centred vectors; in float32 whatever the precision.
    """
    found = []
    for vit_BND, agent_BDhw in zip(vit_maps, agent_maps, strict=True):
        ours, theirs = matched(_wide(vit_BND), _wide(agent_BDhw.detach()), adapt, grid)
        shape = ours.shape[-1:]
        found.append(F.mse_loss(F.layer_norm(ours, shape), F.layer_norm(theirs, shape)))
    return found


# ----------------------------------------------------------------------------------------------------------- initialisation


def initialise(model: nn.Module, scheme: str, seed: int) -> None:
    """Draw the weights of a ViT or of an agent that owns its weights anew; of an agent that shares, what it owns.

    "official" (read in the released code): patch embeddings N(0, 1); attention, feed-forward, stem and taps by Glorot's
    uniform rule; biases of feed-forward layers and of a residual stem N(1e-6, 1), the 1e-6 being passed as the mean; class
    token and positions N(0, 0.02^2); heads as torch builds them. "trunc02": weights, class token and positions from a normal
    law of 0.02 cut at two deviations, biases zero. Norms start at 1 and 0. timm's own start ("host") is the second with
    patch embeddings as torch builds them and a class token of 1e-6.
    """
    tokens = [
        t for t in (getattr(model, name, None) for name in ("cls_token", "pos_embed", "reg_token")) if t is not None
    ]
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        for token in tokens:
            nn.init.normal_(token, std=0.02) if scheme == "official" else nn.init.trunc_normal_(
                token, std=0.02, a=-0.04, b=0.04
            )
        for name, module in model.named_modules():
            if not any(True for _ in module.parameters(recurse=False)) or module is model:
                continue
            if not isinstance(module, nn.Linear | nn.Conv2d | TapConv2d):
                if hasattr(module, "reset_parameters"):
                    module.reset_parameters()
            elif scheme == "official":
                _official(name, module)
            else:
                nn.init.trunc_normal_(module.weight, std=0.02, a=-0.04, b=0.04)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)


def _official(name: str, module: nn.Module) -> None:
    patches = isinstance(module, nn.Conv2d) and module.kernel_size == module.stride and module.stride[0] > 1
    if name == "head" or isinstance(module, TapConv2d):
        module.reset_parameters()
        return
    nn.init.normal_(module.weight) if patches else nn.init.xavier_uniform_(module.weight)
    if module.bias is not None:
        inside = ".mlp." in name or ".ffn." in name or name.startswith("stem.")
        nn.init.normal_(module.bias, 1e-6) if inside and not patches else nn.init.zeros_(module.bias)


# ---------------------------------------------------------------------------------------------------------------- objective


class Bootstrap(Objective):
    """The objective in all its modes; ``vit`` and ``agent`` are the branches that it trains, None where there is none."""

    def __init__(
        self, model: nn.Module, settings: SimpleNamespace, training: dict, data, teacher: nn.Module | None = None
    ):
        super().__init__()
        _check(model, settings, teacher)
        self.settings = settings
        self.augment = Augment(training, data.num_classes)
        self.normalise = data.normalise
        self.label_smoothing, self.epochs = training["label_smoothing"], training["epochs"]
        self.enlarge = getattr(model, "enlarge", None)
        seed = torch.initial_seed()
        self.vit = None if settings.mode == "agent" else model
        self.agent = model if settings.mode == "agent" else None
        if settings.mode in ("joint", "shared"):
            chosen = {k.removeprefix("agent_"): v for k, v in vars(settings).items() if k.startswith("agent_")}
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(derive(seed, "agent"))
                self.agent = AgentCNN(model, "own" if settings.mode == "joint" else "shared", **chosen)
        for name in ("vit", "agent"):
            if settings.init != "host" and getattr(self, name) is not None:
                initialise(getattr(self, name), settings.init, derive(seed, "initialise", name))
        self.teacher = teacher.requires_grad_(False).eval() if teacher is not None else None
        self.grid = tuple(model.patch_embed.grid_size) if self.vit is not None else None
        self._pair: tuple | None = None

    def exported(self) -> nn.Module:
        return self.agent if self.vit is None else self.vit

    def companions(self) -> dict[str, nn.Module]:
        """Return the agent that was trained beside the ViT, with weights of its own."""
        return {} if self.vit is None or self.agent is None else {"agent": self.agent.self_contained(self.vit)}

    def train(self, mode: bool = True) -> "Bootstrap":
        super().train(mode)
        if self.teacher is not None:
            self.teacher.eval()
        return self

    def feature_weight(self, progress: float) -> float:
        """Return w(e) = w0 (1 - e / E) in epoch e = 0 .. E - 1, or w0 without decay."""
        epoch = int(progress * self.epochs + 1e-6)
        return self.settings.feature_weight * (1 - epoch / self.epochs if self.settings.decay == "linear" else 1)

    def forward(self, images, labels, rng, progress):
        x = self.normalise(self.augment(images, rng))
        x, targets = self.augment.mix(x, labels, rng)
        if self.vit is None or self.agent is None:
            return self._alone(x, labels, targets)
        x = x if self.enlarge is None else self.enlarge(x)
        s, weight = self.settings, self.feature_weight(progress)
        agent_logits, agent_maps = self.agent.forward_intermediates(x)
        if weight:
            last, vit_maps = self.vit.forward_intermediates(x, output_fmt="NLC")
            vit_logits = self.vit.forward_head(last)
        else:
            vit_logits = self.vit(x)
        vit_loss, agent_loss = self._classify(vit_logits, targets), self._classify(agent_logits, targets)
        if s.kd_weight:
            vit_loss = vit_loss + s.kd_weight * distillation(vit_logits, agent_logits, s.kd_temperature)
            agent_loss = agent_loss + s.kd_weight * distillation(agent_logits, vit_logits, s.kd_temperature)
        sums = {}
        if weight:
            feature = sum(feature_distances(vit_maps, agent_maps, s.adapt, self.grid))
            vit_loss = vit_loss + weight * feature
            sums["feature"] = feature.detach() * len(labels)
        # The code halves every term of "shared", so that the one set of weights moves as far as each of two would.
        loss = (vit_loss + agent_loss) * (0.5 if s.mode == "shared" else 1.0)
        if s.align != "none":
            self._pair = vit_loss, agent_loss, loss
        with torch.no_grad():
            sums["loss"] = loss.detach() * len(labels)
            sums["correct"] = (vit_logits.argmax(1) == labels).sum()
            sums["agent_top1"] = 100.0 * (agent_logits.argmax(1) == labels).sum()
        return loss, sums

    def _classify(self, logits: Tensor, targets: Tensor) -> Tensor:
        return self.settings.ce_weight * F.cross_entropy(_wide(logits), targets, label_smoothing=self.label_smoothing)

    def _alone(self, x: Tensor, labels: Tensor, targets: Tensor):
        logits, s = self.exported()(x), self.settings
        loss = self._classify(logits, targets)
        if self.teacher is not None:
            with torch.no_grad():
                taught = self.teacher(x)
            loss = loss + s.kd_weight * distillation(logits, taught, s.kd_temperature)
        with torch.no_grad():
            correct = (logits.argmax(1) == labels).sum()
        return loss, {"loss": loss.detach() * len(labels), "correct": correct}

    # ------------------------------------------------------------------------------------------------------- gradients

    def shared_parts(self) -> list[tuple[nn.Parameter, slice]]:
        """Return (parameter, its rows) of what both branches use: of the qkv layer the value rows alone."""
        parts, everything = [], slice(None)
        for block in self.vit.blocks:
            attention, mlp = block.attn, block.mlp
            parts.append((attention.qkv.weight, slice(2 * attention.proj.in_features, None)))
            for linear in (attention.proj, mlp.fc1, mlp.fc2):
                parts += [(tensor, everything) for tensor in (linear.weight, linear.bias) if tensor is not None]
        return [(parameter, rows) for parameter, rows in parts if parameter.requires_grad]

    def backward(self, loss: Tensor) -> None:
        """Write the gradients: one backward pass, or with ``align`` each branch's own and their aligned half-sum.

        Algorithm 1: private weights get their branch's gradient, shared ones (g_V + Align(g_A | g_V)) / 2.
        """
        if self._pair is None:
            loss.backward()
            return
        vit_loss, agent_loss, returned = self._pair
        self._pair = None
        extra = loss is not returned  # auxiliary losses of modules go with the ViT's
        if extra:
            vit_loss = vit_loss + (loss - returned)
        parts = self.shared_parts()
        private = [p for p in self.agent.parameters() if p.requires_grad]
        mine = [p for p in self.vit.parameters() if p.requires_grad]
        used = [p for p, _ in parts]
        theirs = torch.autograd.grad(agent_loss, [*used, *private], allow_unused=True, retain_graph=extra)
        ours = torch.autograd.grad(vit_loss, mine, allow_unused=True)
        for parameter, gradient in [*zip(mine, ours), *zip(private, theirs[len(used) :])]:
            parameter.grad = gradient
        agents = [gradient[rows] for gradient, (_, rows) in zip(theirs, parts)]
        vits = [parameter.grad[rows] for parameter, rows in parts]
        for gradient, aligned in zip(vits, align(agents, vits, self.settings.align)):
            gradient.add_(aligned).mul_(0.5)

    def clip_gradients(self, max_norm: float) -> None:
        """Clip by the global norm; two sets of weights ("joint") are clipped each by its own, as two optimisers would."""
        if self.settings.mode == "joint":
            for branch in (self.vit, self.agent):
                nn.utils.clip_grad_norm_(branch.parameters(), max_norm)
        else:
            super().clip_gradients(max_norm)

    @torch.inference_mode()
    def validation(self, model: nn.Module, data, images: Tensor, labels: Tensor) -> dict | None:
        """Return accuracy and loss of the ViT, accuracy of the agent and the distance of their features, layer by layer."""
        if self.vit is None or self.agent is None:
            return None
        modes = [(module, module.training) for module in (model, self.agent)]
        for module, _ in modes:
            module.eval()
        sums: dict[str, Tensor] = {}
        for start in range(0, len(images), BATCH):
            x, target = data.normalise(images[start : start + BATCH]), labels[start : start + BATCH]
            x = x if self.enlarge is None else self.enlarge(x)
            last, vit_maps = model.forward_intermediates(x, output_fmt="NLC")
            logits = model.forward_head(last).float()
            agent_logits, agent_maps = self.agent.forward_intermediates(x)
            found = {
                "validation_top1": 100.0 * (logits.argmax(1) == target).sum(),
                "validation_loss": F.cross_entropy(logits, target, reduction="sum"),
                "validation_agent_top1": 100.0 * (agent_logits.argmax(1) == target).sum(),
            }
            distances = feature_distances(vit_maps, agent_maps, self.settings.adapt, self.grid)
            found |= {f"feature_distance_{layer}": value * len(target) for layer, value in enumerate(distances)}
            for name, value in found.items():
                sums[name] = sums.get(name, 0) + value.double()
        for module, training in modes:
            module.train(training)
        return {name: value.item() / len(images) for name, value in sums.items()}


def align(agents: list[Tensor], vits: list[Tensor], how: str) -> list[Tensor]:
    """Return the agent's gradients without their component against the ViT's, where there is one (Yu et al. 2020, PCGrad).

    g_A - <g_A, g_V> / |g_V|^2 g_V where the product is negative, else g_A; over all tensors at once ("pcgrad_global") or
    each by itself ("pcgrad_tensor"). Nothing waits for the device.
    """
    products = torch.stack([(a * v).sum() for a, v in zip(agents, vits)])
    norms = torch.stack([v.square().sum() for v in vits])
    if how == "pcgrad_global":
        products, norms = products.sum().expand_as(products), norms.sum().expand_as(norms)
    shares = products.clamp(max=0) / norms.clamp_min(torch.finfo(norms.dtype).tiny)
    return [a - share * v for a, v, share in zip(agents, vits, shares)]


def _check(model: nn.Module, settings: SimpleNamespace, teacher: nn.Module | None) -> None:
    mode = settings.mode
    if mode == "agent" and not isinstance(model, AgentCNN):
        raise ValueError("objective.mode: agent trains an agent CNN; add {verb: agent_of, weights: own} to the surgery")
    if mode != "agent":
        check_vit(model)
    if settings.align != "none" and mode != "shared":
        raise ValueError(f"objective.align: {settings.align} is for mode: shared, this is {mode}")
    if teacher is not None and mode != "vit":
        raise ValueError(f"teacher: it is for mode: vit, in mode {mode} the branches teach each other")


def create(model: nn.Module, settings: dict, training: dict, data, teacher: nn.Module | None = None) -> Bootstrap:
    """Build the objective; ``settings`` are those in ``SETTINGS``, ``teacher`` a trained classifier for mode "vit"."""
    return Bootstrap(model, SimpleNamespace(**check_settings("objective", settings, SETTINGS)), training, data, teacher)
