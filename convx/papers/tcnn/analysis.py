"""What the heads of a recast network look at: non-locality, centres and spans, gates, the initial error, CKA.

Everything is computed on the true input of each recast layer, caught by a hook: feeding a later layer the
features of an earlier one gives curves that look right and are not. Positions count the zero halo, at pixel
-p to H-1+p.
"""

import copy

import torch
from torch import Tensor, nn

from convx.layers.gpsa import GatedPositionalAttention
from convx.layers.gpsa_positions import centres_and_spans, key_positions, profile, query_positions
from convx.papers.tcnn.locality import epsilon

METHOD = "attention maps on the layer's own inputs, evaluation mode"


def recast_layers(model: nn.Module) -> dict[str, GatedPositionalAttention]:
    """Return {name: layer} of the recast layers of a model; ``ValueError`` when it has none."""
    found = {name: m for name, m in model.named_modules() if isinstance(m, GatedPositionalAttention)}
    if not found:
        raise ValueError("the model has no recast layer; recast_attention makes them")
    return found


@torch.no_grad()
def activations(model: nn.Module, images_BCHW: Tensor, names: list[str], inputs: bool = False) -> dict[str, Tensor]:
    """Return the outputs (or the inputs) of the named modules in one evaluation pass."""
    caught: dict[str, Tensor] = {}

    def catch(name: str):
        def hook(module, args, output):
            caught[name] = args[0].detach() if inputs else output.detach()

        return hook

    handles = [model.get_submodule(name).register_forward_hook(catch(name)) for name in names]
    was_training = model.training
    try:
        model.eval()(images_BCHW)
    finally:
        model.train(was_training)
        for handle in handles:
            handle.remove()
    return caught


@torch.no_grad()
def attention_maps(layer: GatedPositionalAttention, x_BCHW: Tensor) -> dict[str, Tensor]:
    """Return the maps of a layer on its input, halo keys included.

    "positional" [heads, Q, N], "content" and "mixed" [B, heads, Q, N], "distance" [Q, N] in pixels between
    query and key, "keys" [N, 2] their (y, x). Rows sum to one; content attention gives the halo exactly
    nothing. Every sample costs heads * Q * N values: meant for the small maps of late stages, or for few
    samples.
    """
    (_, _, H, W), halo = x_BCHW.shape, layer.border == "zero_halo"
    queries = [query_positions(size, *axis) for size, axis in zip((H, W), layer.axes, strict=True)]
    keys = [key_positions(size, *axis, halo=halo) for size, axis in zip((H, W), layer.axes, strict=True)]
    ay, ax = (profile(layer.positions, i, queries[i], keys[i]) for i in (0, 1))
    positional = (ay[:, :, None, :, None] * ax[:, None, :, None, :]).flatten(3).flatten(1, 2)
    q_BHDYX, k_BHDN = layer.queries_and_keys(x_BCHW)
    weights = (q_BHDYX.flatten(3).transpose(2, 3) @ k_BHDN).softmax(-1, positional.dtype)
    content = weights.new_zeros(*weights.shape[:3], len(keys[0]), len(keys[1]))
    y0, x0 = -int(keys[0][0]), -int(keys[1][0])
    content[..., y0 : y0 + H, x0 : x0 + W] = weights.unflatten(3, (H, W))
    content = content.flatten(3)
    share = layer.content_share().to(positional.dtype)[:, None, None]
    query_Q2, key_N2 = (torch.cartesian_prod(*p).to(positional) for p in (queries, keys))
    return {
        "positional": positional,
        "content": content,
        "mixed": (1 - share) * positional + share * content,
        "distance": torch.cdist(query_Q2, key_N2),
        "keys": key_N2,
    }


def non_locality(layer: GatedPositionalAttention, x_BCHW: Tensor, kind: str = "mixed") -> Tensor:
    """Return the mean distance in pixels between a query and what it attends to, for every head: [heads].

    ``D_h = 1/N_q sum_ij A_h,ij |delta_ij|`` (ConViT), averaged over the samples; |Delta_h| for a layer that
    is a convolution.
    """
    total = 0
    for sample in x_BCHW.split(1):
        maps = attention_maps(layer, sample)
        attention = maps[kind].reshape(-1, layer.heads, *maps["distance"].shape)
        total = total + (attention * maps["distance"]).sum(3).mean(2)[0]
    return total / len(x_BCHW)


def attention_at(layer: GatedPositionalAttention, x_BCHW: Tensor, row: int, column: int, kind: str = "mixed") -> Tensor:
    """Return what an output pixel attends to: [B or 1, heads, key rows, key columns], with the halo."""
    maps = attention_maps(layer, x_BCHW)
    columns_out = len(query_positions(x_BCHW.shape[3], *layer.axes[1]))
    rows, columns = (len(maps["keys"][:, axis].unique()) for axis in (0, 1))
    attention = maps[kind].reshape(-1, layer.heads, *maps["distance"].shape)
    return attention[:, :, row * columns_out + column].unflatten(2, (rows, columns))


def rows(model: nn.Module, images_BCHW: Tensor, split: str = "test") -> list[dict]:
    """Return metric rows of every recast layer and head: non-locality, content share, centre and span.

    ``images_BCHW`` are normalised as for the model. A head whose locality is not positive has no centre:
    value None.
    """
    layers, found = recast_layers(model), []
    inputs = activations(model, images_BCHW, list(layers), inputs=True)
    for name, layer in layers.items():
        centres_H2, span_H = centres_and_spans(layer.positions.detach().double())
        local_H = span_H.gt(0) & span_H.isfinite()
        values = {
            "non_locality": ("px", non_locality(layer, inputs[name]), None),
            "content_share": ("fraction", layer.content_share().detach(), None),
            "centre_y": ("px", centres_H2[:, 0], local_H),
            "centre_x": ("px", centres_H2[:, 1], local_H),
            "span": ("px^2", span_H, local_H),
        }
        for metric, (unit, value_H, valid_H) in values.items():
            for head, value in enumerate(value_H.tolist()):
                valid = valid_H is None or bool(valid_H[head])
                found.append(
                    {
                        "metric": metric, "value": value if valid else None, "unit": unit,
                        "n": len(images_BCHW) if metric == "non_locality" else None, "split": split,
                        "conditions": {"layer": name, "head": head},
                        "method": METHOD if metric == "non_locality" else "from the parameters",
                    }
                )  # fmt: skip
    return found


@torch.no_grad()
def initial_error(conv: nn.Conv2d, x_BCHW: Tensor, alphas: list[float], **settings) -> list[tuple[float, float, float]]:
    """Return (alpha, relative L2 error of the recast convolution, epsilon(alpha)) of each locality (float64).

    ``settings`` go to the layer, e.g. ``gate="sigmoid", gate_init=3.0`` for the error of an open gate.
    """
    conv, x_BCHW = copy.deepcopy(conv).double(), x_BCHW.double()
    expected = conv(x_BCHW)
    found = []
    for alpha in alphas:
        generator = torch.Generator().manual_seed(0)
        layer = GatedPositionalAttention.from_conv(conv, locality=alpha, generator=generator, **settings)
        layer.tolerance = 0.0  # no shortcut: the attention itself is measured
        error = float((layer(x_BCHW) - expected).norm() / expected.norm())
        found.append((alpha, error, epsilon(alpha)))
    return found


def linear_cka(x_BD: Tensor, y_BE: Tensor) -> float:
    """Return the linear centred kernel alignment of two sets of features (Kornblith et al. 2019, Eq. 4).

    1 for features that agree up to rotation and scale. ``ValueError`` when the numbers of images differ or a
    set is constant.
    """
    if len(x_BD) != len(y_BE):
        raise ValueError(f"linear_cka: {len(x_BD)} images against {len(y_BE)}")
    return float((unit_gram(x_BD) * unit_gram(y_BE)).sum())


def unit_gram(features_BD: Tensor) -> Tensor:
    """Return the Gram matrix [B, B] of centred features over its norm; the linear CKA is the product of two of them.

    ``ValueError`` when the features of all images are the same.
    """
    features = features_BD.flatten(1).double()
    centred = features - features.mean(0)
    gram = centred @ centred.T
    if gram.norm() == 0:
        raise ValueError("linear_cka: the features of one set are the same for all images")
    return gram / gram.norm()


def cka_rows(model: nn.Module, reference: nn.Module, images_BCHW: Tensor, layers: list[str], split: str = "test"):
    """Return a metric row ``linear_cka`` for each named module that both models have, e.g. the stages."""
    ours, theirs = (activations(net, images_BCHW, layers) for net in (model, reference))
    return [
        {
            "metric": "linear_cka", "value": linear_cka(ours[name], theirs[name]), "unit": "fraction",
            "n": len(images_BCHW), "split": split, "conditions": {"layer": name},
            "method": "linear CKA of flattened outputs, double precision",
        }
        for name in layers
    ]  # fmt: skip
