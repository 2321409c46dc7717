"""Small vision transformers of timm's class, ``vit_{s,b}[_p{P}]`` and ``vit{W}_{D}_h{H}[_p{P}]``, for training from scratch.

The sizes of Zhang et al. 2022 (arXiv 2112.03552, table 2): S is 6 layers of width 288 with 9 heads, LayerNorm eps 1e-5 and
dropout 0.1 (attention, feed-forward and residual); B is 12 layers of width 384 with 6 heads, eps 1e-6 and none. The other form
names width, depth and heads and is otherwise like S. Patches are 16 px unless ``_p{P}`` says otherwise: at 32 px, patches of
4 keep the paper's 4:1, 1:1 and 1:4 tokens between agent and ViT. Attention runs through torch's fused
``scaled_dot_product_attention``. The state dict is that of timm's ``VisionTransformer``.
"""

import re
from functools import partial

from torch import nn

NAME = re.compile(r"vit(_(?P<size>[sb])|(?P<width>\d+)_(?P<depth>\d+)_h(?P<heads>\d+))(_p(?P<patch>\d+))?")
SIZES = {"s": (288, 6, 9, 1e-5, 0.1), "b": (384, 12, 6, 1e-6, 0.0)}


def create(
    name: str,
    num_classes: int,
    in_channels: int = 3,
    image_size: int | None = None,
    dropout: float | None = None,
    mlp_ratio: float = 4.0,
) -> nn.Module:
    """Build a ViT by name; ``image_size`` in px (None: 224) must be a multiple of the patch.

    ``dropout``: rate of attention, feed-forward and residual dropout (None: the size's own). Raises ``ValueError`` for sizes
    that do not divide.
    """
    from timm.models.vision_transformer import VisionTransformer

    match = NAME.fullmatch(name)
    if size := match["size"]:
        width, depth, heads, eps, own = SIZES[size]
    else:
        width, depth, heads = (int(match[key]) for key in ("width", "depth", "heads"))
        eps, own = 1e-5, 0.1
    patch, image_size = int(match["patch"] or 16), image_size or 224
    if min(width, depth, heads, patch) < 1:
        raise ValueError(f"model {name!r}: width, depth, heads and patch are at least 1")
    if width % heads:
        raise ValueError(f"model {name!r}: the width must be a multiple of the {heads} heads")
    if image_size % patch:
        raise ValueError(
            f"model {name!r}: images of {image_size} px are no multiple of patches of {patch}; name another _pP"
        )
    rate = own if dropout is None else dropout
    return VisionTransformer(
        img_size=image_size,
        patch_size=patch,
        in_chans=in_channels,
        num_classes=num_classes,
        embed_dim=width,
        depth=depth,
        num_heads=heads,
        mlp_ratio=mlp_ratio,
        proj_drop_rate=rate,
        attn_drop_rate=rate,
        norm_layer=partial(nn.LayerNorm, eps=eps),
    )
