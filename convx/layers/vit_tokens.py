"""The tokens of a vision transformer of timm's form, at any image size that its patches divide."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

PARTS = ("patch_embed", "cls_token", "pos_embed", "pos_drop", "norm_pre", "blocks", "norm")


def check_vit(model: nn.Module) -> nn.Module:
    """Return the model, or raise ``ValueError``: a timm ``VisionTransformer`` with a class token and no classifier is needed."""
    missing = [part for part in PARTS if not hasattr(model, part)]
    if missing or model.cls_token is None or model.pos_embed is None:
        what = f"lacks {missing[0]}" if missing else "has no class token or no learned position embedding"
        raise ValueError(
            f"model: {type(model).__name__} {what}; one of timm's ViTs is needed, e.g. timm/vit_tiny_patch16_224"
        )
    if not isinstance(getattr(model, "head", None), nn.Identity) or getattr(model, "global_pool", "") != "token":
        raise ValueError(
            "model: the encoder should end in its class token; set model.settings.num_classes: 0 and leave global_pool at token"
        )
    return model


def resized_positions(vit: nn.Module, side: tuple[int, int]) -> Tensor:
    """Return the position embedding [1, prefix + h w, C] for a grid (h, w), bicubic from the model's own; unchanged at its size."""
    prefix = 0 if vit.no_embed_class else vit.num_prefix_tokens
    own = tuple(vit.patch_embed.grid_size)
    if side == own:
        return vit.pos_embed
    grid_1NC = vit.pos_embed[:, prefix:].float()
    grid_1CHW = grid_1NC.transpose(1, 2).unflatten(2, own)
    grid_1CHW = F.interpolate(grid_1CHW, size=side, mode="bicubic", antialias=True)
    grid_1NC = grid_1CHW.flatten(2).transpose(1, 2).to(vit.pos_embed.dtype)
    return torch.cat([vit.pos_embed[:, :prefix], grid_1NC], 1)


def embedded(vit: nn.Module, x_BCHW: Tensor) -> tuple[Tensor, tuple[int, int]]:
    """Return what the first block gets, [B, prefix + N, C], and the grid (h, w). Raises ``ValueError`` for a part of a patch."""
    patch = vit.patch_embed.patch_size
    if any(size % side for size, side in zip(x_BCHW.shape[2:], patch)):
        raise ValueError(
            f"an image of {tuple(x_BCHW.shape[2:])} pixels is no whole number of patches of {tuple(patch)}"
        )
    maps_BCHW = vit.patch_embed.proj(x_BCHW)
    side = tuple(maps_BCHW.shape[2:])
    x_BNC = vit.patch_embed.norm(maps_BCHW.flatten(2).transpose(1, 2))
    first = [token.expand(len(x_BNC), -1, -1) for token in (vit.cls_token, vit.reg_token) if token is not None]
    positions = resized_positions(vit, side)
    if vit.no_embed_class:
        x_BNC = torch.cat([*first, x_BNC + positions], 1)
    else:
        x_BNC = torch.cat([*first, x_BNC], 1) + positions
    return vit.norm_pre(vit.patch_drop(vit.pos_drop(x_BNC))), side


def tokens(vit: nn.Module, x_BCHW: Tensor, last: int = 1) -> tuple[list[Tensor], Tensor]:
    """Return (class tokens [B, C] behind each of the last blocks, normalised; patch tokens [B, C, h, w] of the last, not so).

    ``tokens(vit, x)[0][-1]`` is what ``vit(x)`` returns at the model's own size. Of patch tokens that a model in training
    drops no map can be made: ``patch_drop_rate`` has to be zero.
    """
    x_BNC, side = embedded(vit, x_BCHW)
    classes, depth = [], len(vit.blocks)
    for place, block in enumerate(vit.blocks):
        x_BNC = block(x_BNC)
        if place >= depth - last:
            classes.append(vit.norm(x_BNC[:, 0]))
    return classes, x_BNC[:, vit.num_prefix_tokens :].transpose(1, 2).unflatten(2, side)


def class_attention(vit: nn.Module, x_BCHW: Tensor) -> Tensor:
    """Return what the class token of the last block attends to, [B, heads, h, w]; sums to one less the prefix's own share."""
    x_BNC, side = embedded(vit, x_BCHW)
    for block in vit.blocks[:-1]:
        x_BNC = block(x_BNC)
    attention = vit.blocks[-1].attn
    qkv = attention.qkv(vit.blocks[-1].norm1(x_BNC)).unflatten(2, (3, attention.num_heads, -1)).permute(2, 0, 3, 1, 4)
    queries, keys = attention.q_norm(qkv[0]), attention.k_norm(qkv[1])
    weights_BHN = torch.softmax(queries[:, :, :1] @ keys.transpose(-1, -2) * attention.scale, -1)[:, :, 0]
    return weights_BHN[..., vit.num_prefix_tokens :].unflatten(-1, side)
