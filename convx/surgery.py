"""Layer surgery on any ``nn.Module``: the public verbs.

Every verb has the form ``verb(model, layers="*", ...) -> new model``. It never edits its input, it records what it replaced in
``new_model.surgery_log`` and in the log, and a pattern that matches nothing is an error that lists what could match.
Patterns are globs over module names (``"layer4.*"``, or a list of them); ``"*"`` is everything that can be replaced;
``"{stage-1}"`` stands for the module name of the last stage, ``"{stage-2}"`` for the one before it.
A verb imports its layer inside its own body: the source digest of a run covers the layers that its verbs name, no others.
"""

import copy
import inspect
from typing import Literal

from torch import nn

from convx import VERBS
from convx.arguments import check_choices, check_limits
from convx.replacing import Replacement, example_of, find, is_spatial_conv, replace, stage_names, start_anew
from convx.seeds import derive, generator


def fold(model: nn.Module) -> nn.Module:
    """Return a copy in which every foldable operator is the ``nn.Conv2d`` it stands for; outputs do not change.

    An operator is foldable when it has a ``fold`` method and its ``foldable`` attribute, where it has one, is true (an
    attention layer with open gates is not a convolution and stays as it is). A model without operators comes back as a copy.
    """

    def accepts(module: nn.Module) -> bool:
        return callable(getattr(module, "fold", None)) and bool(getattr(module, "foldable", True))

    if not any(accepts(module) for module in model.modules()):
        return copy.deepcopy(model)
    if accepts(model):
        return copy.deepcopy(model).fold()
    return replace(model, "*", accepts, lambda name, module: module.fold(), "fold", "foldable operator")


def custom(model: nn.Module, function: str, settings: dict | None = None) -> nn.Module:
    """Return ``function(copy of model, **settings)`` of a user's own file, named as ``path/to/file.py:function``.

    The file's text is part of the run's source digest: an edit reruns the variants that use it.
    """
    from convx.models import check_user_function, load_user_function

    check_user_function(function, "surgery")
    return load_user_function(function)(copy.deepcopy(model), **(settings or {}))


def apply(model: nn.Module, steps: list[dict], seed: int) -> nn.Module:
    """Return ``model`` after the surgery steps of a variant: ``[{"verb": "recast_attention", "layers": "{stage-1}", ...}]``.

    A verb with a ``seed`` parameter gets one derived from the run's seed and the step's place, unless the step fixes it.
    """
    for place, step in enumerate(steps):
        settings = dict(step)
        name = settings.pop("verb")
        if name not in VERBS:
            raise ValueError(f"surgery verb {name!r} is unknown; the verbs are {', '.join(VERBS)}")
        verb = globals()[name]
        if "seed" in inspect.signature(verb).parameters:
            settings.setdefault("seed", derive(seed, "surgery", f"{place}.{name}"))
        model = verb(model, **settings)
    return model


# The verbs of the methods, in the order of the papers; each stands in ``convx.VERBS`` too.


def recast_attention(
    model: nn.Module,
    layers: str | list[str] = "*",
    locality: float = 15.0,
    gate: Literal["linear", "sigmoid"] = "linear",
    gate_init: float | None = None,
    border: Literal["zero_halo", "replicate"] = "zero_halo",
    key_dim: int | None = None,
    filters: Literal["conv", "random"] = "conv",
    positions: Literal["local", "random"] = "local",
    frozen: Literal["none", "gates", "projections"] = "none",
    gate_lr_factor: float = 1.0,
    position_lr_factor: float = 1.0,
    seed: int = 0,
) -> nn.Module:
    """Return a copy whose matching convolutions are gated positional self-attention, the same function.

    T-CNN (d'Ascoli et al. 2021, arXiv 2106.05795). Takes any ``nn.Conv2d`` whose kernel covers more than one
    pixel, and timm's ``Conv2dSame``. ``locality`` is alpha in 1/pixel^2: the relative error of a layer is
    about 4 exp(-alpha), and the gradient that could move its heads falls with it; at 15 the error is that of
    float32 and the heads hardly move, at 5 they move and the error is 2 %. ``gate`` "linear" starts as the
    convolution exactly (``gate_init`` None: 0), "sigmoid" with a share sigmoid(-gate_init) of content (None: 5).
    ``border`` "zero_halo" keeps the
    convolution's padding, "replicate" gives it up. ``key_dim`` is the width of q and k per head (None: max(8,
    C_in // taps)). Controls: ``filters="random"`` redraws the filters, ``positions="random"`` starts without
    locality, ``frozen`` keeps "gates" (and what only an open gate would train) or "projections" (q, k, v)
    fixed. ``gate_lr_factor`` and ``position_lr_factor`` multiply the learning rate of gates and positions.
    ``seed`` draws q, k and whatever else is random. Raises ``ValueError`` for a value out of range, an
    unknown choice or a pattern without a match.
    """
    from convx.layers.gpsa import GatedPositionalAttention, is_same_conv

    check_limits(
        locality=locality, key_dim=key_dim, gate_init=gate_init,
        gate_lr_factor=gate_lr_factor, position_lr_factor=position_lr_factor,
    )  # fmt: skip
    if key_dim is not None and int(key_dim) != key_dim:
        raise ValueError(f"key_dim={key_dim!r} should be a whole number")
    check_choices(
        gate=(gate, ("linear", "sigmoid")),
        border=(border, ("zero_halo", "replicate")),
        filters=(filters, ("conv", "random")),
        positions=(positions, ("local", "random")),
        frozen=(frozen, ("none", "gates", "projections")),
    )
    if gate == "linear" and not 0 <= (gate_init or 0) <= 1:
        raise ValueError(f"gate_init={gate_init!r} is out of range: for a linear gate, 0 <= gate_init <= 1")

    def make(name: str, conv: nn.Conv2d) -> nn.Module:
        layer = GatedPositionalAttention.from_conv(
            conv, locality=locality, gate=gate, gate_init=gate_init, border=border, key_dim=key_dim,
            random_filters=filters == "random", random_positions=positions == "random",
            gate_lr_factor=gate_lr_factor, position_lr_factor=position_lr_factor,
            generator=generator(seed, "recast", name),
        )  # fmt: skip
        if frozen == "gates":
            layer.gate.requires_grad_(False)
        if frozen == "projections":
            layer.value.requires_grad_(False)
        if frozen == "projections" or (frozen == "gates" and layer.gates_closed):
            layer.query.requires_grad_(False)
            layer.key.requires_grad_(False)
        return layer

    def accepts(module: nn.Module) -> bool:
        return is_spatial_conv(module) or is_same_conv(module)

    return replace(model, layers, accepts, make, "recast_attention", "convolution with a kernel above 1x1")


def freeze_spatial(model: nn.Module, layers: str | list[str] = "*") -> nn.Module:
    """Return a copy in which every matching convolution above 1x1 keeps its weights (and bias) for good.

    "Frozen random" networks of arXiv 2301.11360, section 3: 1x1 convolutions, normalisation and the head stay learnable, the
    stem does not. Subclasses of ``nn.Conv2d`` count too. Raises ``ValueError`` for a pattern without a match.
    """

    def accepts(module: nn.Module) -> bool:
        return isinstance(module, nn.Conv2d) and module.kernel_size[0] * module.kernel_size[1] > 1

    def make(name: str, conv: nn.Conv2d) -> nn.Module:
        for parameter in conv.parameters():
            parameter.requires_grad_(False)
            parameter.grad = None
        return conv

    return replace(model, layers, accepts, make, "freeze_spatial", "convolution with a kernel above 1x1")


def linear_combinations(
    model: nn.Module,
    layers: str | list[str] = "*",
    expansion: int = 1,
    bank: Literal[
        "iid_uniform", "iid_normal", "shared", "orthonormal", "covariance", "edges_and_lines"
    ] = "iid_uniform",
    frozen: bool = True,
    mode: Literal["folded", "two_layer"] = "folded",
    middle: Literal["none", "relu", "bn", "bn_relu"] = "none",
    form: Literal["dense", "depthwise"] = "dense",
    start: Literal["random", "fit"] = "random",
    donor: nn.Module | Literal["host"] = "host",
    fresh: bool = False,
    seed: int = 0,
) -> nn.Module:
    """Return a copy in which every matching convolution is a learned linear combination of fixed random filters.

    Gavrikov and Keuper, arXiv 2301.11360, section 4. ``expansion`` E: filters per output channel ("depthwise" ``form``: per
    input channel). ``frozen=False`` is the control with a learned bank. ``mode`` "folded" trains at the cost of the plain
    layer, "two_layer" as the paper did; the operation ``middle`` (table 3) needs "two_layer". ``start`` "fit" sets the
    combinations to the least-squares fit of the replaced kernel. ``bank``: see ``convx.layers.filter_banks``. "covariance"
    measures the filters of ``donor``: of the same layer of the host, or of another trained model's spatial convolutions at
    the same relative depth (interpolated, resized). ``fresh`` starts every other layer anew, so that of a trained host only
    the covariances are used. ``seed`` and the layer's name decide every draw.
    Raises ``ValueError`` for a value out of range, an unknown choice, a pair that excludes itself or a pattern without a match.
    """
    from convx.layers.filter_banks import BANKS, transferred_roots
    from convx.layers.linear_combination import FORMS, MIDDLES, MODES, LinearCombinationConv2d

    check_limits(expansion=expansion)
    check_choices(
        bank=(bank, BANKS),
        mode=(mode, MODES),
        middle=(middle, MIDDLES),
        form=(form, FORMS),
        start=(start, ("random", "fit")),
    )
    if not isinstance(donor, nn.Module):
        check_choices(donor=(donor, ("host",)))
    found = find(model, layers, is_spatial_conv, "convolution with a kernel above 1x1")
    roots, shared = {}, {}
    if bank == "covariance":
        given = found.values() if donor == "host" else filter(is_spatial_conv, donor.modules())
        sizes = [conv.kernel_size for conv in found.values()]
        roots = dict(zip(found, transferred_roots([conv.weight for conv in given], sizes)))
    if bank == "shared":  # one draw for each kernel size, as large as the largest layer needs
        for conv in found.values():
            size = LinearCombinationConv2d.bank_size(conv, expansion, form)
            shared[conv.kernel_size] = tuple(map(max, size, shared.get(conv.kernel_size, size)))

    def make(name: str, conv: nn.Conv2d) -> nn.Module:
        stream = "shared {}x{}".format(*conv.kernel_size) if bank == "shared" else name
        return LinearCombinationConv2d.from_conv(
            conv, fit=start == "fit", expansion=expansion, bank=bank, frozen=frozen, mode=mode, middle=middle, form=form,
            seed=derive(seed, "filter bank", stream), combination_seed=derive(seed, "linear combination", name),
            shared_shape=shared.get(conv.kernel_size), root=roots.get(name),
        )  # fmt: skip

    new = replace(model, layers, is_spatial_conv, make, "linear_combinations", "convolution with a kernel above 1x1")
    for name, module in new.named_modules() if fresh else ():
        if not isinstance(module, LinearCombinationConv2d) and hasattr(module, "reset_parameters"):
            start_anew(module, derive(seed, "start anew", name), type(module).reset_parameters)
    return new


def learnable_spacings(
    model: nn.Module,
    layers: str | list[str] = "*",
    kernel_count: int | None = None,
    dilated_kernel_size: int | list[int] = 17,
    interpolation: Literal["bilinear", "triangle", "gauss"] = "bilinear",
    share: Literal["stage", "none"] = "stage",
    positions: Literal["normal", "uniform", "conv"] = "normal",
    position_std: float = 0.5,
    learn_positions: bool = True,
    position_lr_factor: float = 5.0,
    repulsion_start: float | None = 0.07,
    seed: int = 0,
) -> nn.Module:
    """Return a copy in which every matching convolution has learned tap positions (DCLS, arXiv 2112.03740, 2306.00817).

    Takes any ``nn.Conv2d`` with an odd kernel larger than its stride, so no stem or downsampling of patches. Weights are drawn
    with the standard deviation of the replaced ones. ``kernel_count`` K: taps a kernel; None takes as many as keep the number
    of parameters of the replaced layers. ``dilated_kernel_size`` s: side or [h, w] of the kernel that holds them.
    ``share``: layers of equal shape in a "stage" use one set of positions (and widths), or "none" does. ``positions``
    start "normal" (``position_std`` in pixels), "uniform" over the kernel, or on the grid of the "conv", with its weights:
    the same function. ``learn_positions=False`` keeps positions and widths as they start. ``position_lr_factor``
    multiplies their learning rate. ``repulsion_start``: share of training after which the repulsive loss joins, None for
    never; one loss over all DCLS layers of the model. Paper: ConvNeXt, s = 17, K = 34 or 40; ResNet: the 3x3 layers, s = 7, K = 5.
    Raises ``ValueError`` for a value out of range, an unknown choice, an even size or a pattern without a match.
    """
    from convx.layers.dcls import DCLSConv2d
    from convx.layers.dcls_spacings import Repulsion, iso_parameter_kernel_count, share_positions

    check_limits(
        kernel_count=kernel_count, dilated_kernel_size=dilated_kernel_size, position_std=position_std,
        position_lr_factor=position_lr_factor, repulsion_start=repulsion_start,
    )  # fmt: skip
    check_choices(
        interpolation=(interpolation, ("bilinear", "triangle", "gauss")),
        share=(share, ("stage", "none")),
        positions=(positions, ("normal", "uniform", "conv")),
    )
    if positions == "conv" and kernel_count is not None:
        raise ValueError('kernel_count: positions="conv" has the taps of the convolution; leave kernel_count out')

    def accepts(module: nn.Module) -> bool:
        return is_spatial_conv(module) and all(
            d * (k - 1) % 2 == 0 and (k > s or k == 1)
            for k, s, d in zip(module.kernel_size, module.stride, module.dilation)
        )

    what = "convolution with an odd kernel above its stride"
    stages, sets = stage_names(model), {}
    for name, conv in find(model, layers, accepts, what).items():
        inside = [stage for stage in stages if name.startswith(f"{stage}.")]
        key = (
            name if share == "none" else (max(inside, key=len, default=""), conv.kernel_size, tuple(conv.weight.shape))
        )
        sets.setdefault(key, {})[name] = conv
    if positions != "conv" and kernel_count is None:
        first = [next(iter(members.values())) for members in sets.values()]
        kernels = [conv.weight[:, :, 0, 0].numel() for conv in first]
        per_tap = 2 if interpolation == "bilinear" else 4
        depths, areas = [len(members) for members in sets.values()], [conv.kernel_size for conv in first]
        kernel_count = max(1, iso_parameter_kernel_count(kernels, depths, areas, per_tap))

    def make(name: str, conv: nn.Conv2d) -> nn.Module:
        draws = generator(seed, "learnable spacings", name)
        layer = DCLSConv2d.from_conv(conv, kernel_count, dilated_kernel_size, interpolation, draws)
        if positions != "conv":
            layer.place(positions, draws, position_std)
        layer.position_lr_factor = position_lr_factor
        for parameter in (layer.positions, layer.sigma):
            if parameter is not None:
                parameter.requires_grad_(learn_positions)
        return layer

    new = replace(model, layers, accepts, make, "learnable_spacings", what)
    share_positions([[new.get_submodule(name) for name in members] for members in sets.values()])
    Repulsion([module for module in new.modules() if isinstance(module, DCLSConv2d)], repulsion_start)
    return new


def freeze_spacings(model: nn.Module, layers: str | list[str] = "*", seed: int = 0) -> nn.Module:
    """Return a copy that keeps the tap positions and widths of its DCLS layers for good and draws all else anew.

    A control for arXiv 2112.03740 that tells good positions from positions learned together with the weights. Every other
    module starts from its own ``reset_parameters``; ``ValueError`` names a module that has parameters and none.
    """
    from convx.layers.dcls import DCLSConv2d

    def accepts(module: nn.Module) -> bool:
        return isinstance(module, DCLSConv2d)

    def make(name: str, layer: nn.Module) -> nn.Module:
        for parameter in (layer.positions, layer.sigma):
            if parameter is not None:
                parameter.requires_grad_(False)
        return layer

    new = replace(model, layers, accepts, make, "freeze_spacings", "DCLS layer")
    for name, module in new.named_modules():
        if not any(True for _ in module.parameters(recurse=False)):
            continue
        if accepts(module):
            reset = lambda layer: layer.reset_weights(layer.weight_std)  # noqa: E731
        elif hasattr(module, "reset_parameters"):
            reset = type(module).reset_parameters
        else:
            raise ValueError(f"{name} ({type(module).__name__}) cannot start anew: it has no reset_parameters")
        start_anew(module, derive(seed, "start anew", name), reset)
    return new


def agent_of(
    vit: nn.Module,
    weights: Literal["shared", "own"] = "shared",
    style: Literal["residual", "base"] = "residual",
    offsets: Literal["raster", "nearest"] = "raster",
    down_after: int | list[int] | None = None,
    norm: Literal["pre", "post"] = "pre",
    stem_width: int = 64,
    dropout: float = 0.1,
    seed: int = 0,
) -> nn.Module:
    """Return the agent CNN of one of timm's ``VisionTransformer``, which stays as it is (arXiv 2112.03552, section 3.2.2).

    ``weights`` "shared": convolutions are built from W_V and W_O in every forward pass and the feed-forward layers are the
    ViT's, live; the agent's parameters are its stem, norms and head alone, and ``.to()`` moves these alone. Copy both
    models together or not at all: a deep copy of the agent takes copies of the shared weights along. "own": everything is
    the agent's and the ViT gives sizes only; a variant's step takes this. ``style``: a stem like a ResNet's with twice the
    ViT's grid, or its patches. ``offsets``: head h takes the h-th cell of the kernel in raster order, or the cells nearest
    to the centre. ``down_after``: blocks behind which the map is halved (None: the paper's for this depth and style).
    ``norm`` before or behind each layer; ``stem_width`` in channels; ``dropout`` of feed-forward layers with own weights
    (shared ones take the ViT's rates). Paper: S is pre-norm, B post-norm. ``seed`` draws what the agent owns.
    Raises ``ValueError`` for a value out of range, an unknown choice or a ViT of another layout.
    """
    import torch

    from convx.layers.agent_cnn import AgentCNN

    check_limits(down_after=down_after, stem_width=stem_width, dropout=dropout)
    check_choices(
        weights=(weights, ("shared", "own")),
        style=(style, ("residual", "base")),
        offsets=(offsets, ("raster", "nearest")),
        norm=(norm, ("pre", "post")),
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive(seed, "agent"))
        agent = AgentCNN(vit, weights, style, offsets, down_after, norm, stem_width, dropout)
    if enlarge := getattr(vit, "enlarge", None):
        enlarge.attach(agent)
    made = f"AgentCNN({len(agent.blocks)} blocks, weights={weights}, style={style}, offsets={offsets})"
    agent.surgery_log = [*getattr(vit, "surgery_log", []), Replacement("agent_of", "", type(vit).__name__, made)]
    return agent.to(vit.head.weight.device)


def focus(
    model: nn.Module,
    after: str | list[str] | None = None,
    threshold: float | None = None,
    region: Literal["bbox", "tiles", "mask", "input", "whole"] = "bbox",
    fill: Literal["zero", "bias"] = "zero",
    halo: Literal["exact", "zero", "official"] = "exact",
    pooling: Literal["masked", "plain"] = "masked",
    place: Literal["bright", "random", "centre", "given", "given_random", "given_centre"] = "bright",
    keep: float | None = None,
    coverage: float = 1.0,
    tile: int = 16,
    dense_above: float = 0.9,
    backend: Literal["auto", "crop", "tiles", "dense"] = "auto",
    seed: int = 0,
) -> nn.Module:
    """Return a copy that computes only what matters of each image after the layer ``after``; no retraining.

    Focused convolutions, arXiv 2310.07782 and 2207.10741, for any network of convolutions in evaluation mode and batches of any
    size; each image has its own region, where the sum over channels of the positive activations of ``after`` reaches
    ``threshold`` (None: calibrate it) or is among the ``keep`` brightest share of pixels. Batch normalisation is folded (not for
    ``halo="official"``). Others: :class:`convx.layers.focused.Focus`. Of a focused network, without ``after``, they change.
    """
    given = locals().copy()
    from convx.layers.batchnorm_folding import fold_batchnorm
    from convx.layers.focused import CHOICES, DEFAULTS
    from convx.layers.focused_network import Focused

    check_limits(keep=keep, coverage=coverage, tile=tile, dense_above=dense_above)
    check_choices(**{name: (given[name], choices) for name, choices in CHOICES.items()})
    settings, log = {name: given[name] for name in DEFAULTS}, getattr(model, "surgery_log", [])
    if isinstance(model, Focused) == (after is not None):
        raise ValueError("after: missing, name a layer" if after is None else "after: the network is focused already")
    if isinstance(model, Focused):
        new, names, words = copy.deepcopy(model), model.after, dict(settings.items() - DEFAULTS.items())
        new.change(words, threshold)
    else:
        names, words = list(find(model, after, lambda module: True, "module", whole=True)), settings
        folded = copy.deepcopy(model).eval() if halo == "official" else fold_batchnorm(model, example_of(model))
        new = Focused(folded, names, threshold, **settings)
    new.surgery_log = [*log, *(Replacement("focus", name, "", f"focused after it: {words}") for name in names)]
    return new
