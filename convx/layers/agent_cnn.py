"""The agent CNN of a vision transformer (Zhang et al. 2022, arXiv 2112.03552, section 3.2.2, tables 6 and 7).

Each attention layer becomes a convolution with one tap a head, each feed-forward layer two 1x1 convolutions, layer norm becomes
batch norm, position embedding and class token disappear, and average pooling brings the map to a vector. Its convolutions use
the ViT's own weights or weights of their own. Only torch is needed here; the ViT is one of timm's layout.
"""

import copy

import torch
from torch import Tensor, nn

from .shared_conv import SharedConv2d, SharedPointwise, TapConv2d

STRIDES = {2: (3, 1, False, 1), 4: (3, 1, False, 2), 8: (7, 2, False, 2), 16: (7, 2, True, 2)}


class Stem(nn.Sequential):
    """Image -> map of width d: "base" patches of side p as the ViT has them, "residual" a ResNet's stem with twice the grid.

    At p = 16: 7x7 stride 2, batch norm, GELU, 3x3 max-pool stride 2, 3x3 stride 2 (the paper's table 7 prints a 2x2
    pool); smaller patches leave out pool and strides, at p = 4 a 3x3 of stride 1 stands first.
    """

    def __init__(self, in_channels: int, width: int, patch: int, style: str, stem_width: int):
        if style == "base":
            super().__init__(nn.Conv2d(in_channels, width, patch, stride=patch))
            return
        if patch not in STRIDES:
            raise ValueError(
                f'style="residual" is for patches of {", ".join(map(str, STRIDES))} px, the ViT has {patch}'
            )
        size, stride, pool, last = STRIDES[patch]
        super().__init__(
            nn.Conv2d(in_channels, stem_width, size, stride, size // 2, bias=False),
            nn.BatchNorm2d(stem_width),
            nn.GELU(),
            nn.MaxPool2d(3, 2, 1) if pool else nn.Identity(),
            nn.Conv2d(stem_width, width, 3, last, 1),
        )


class AgentBlock(nn.Module):
    """x += CONV(BN(x)); x += FFN(BN(x)), or with the norm behind each of the two; [B, d, h, w] -> the same shape."""

    def __init__(self, width: int, conv: nn.Module, ffn: nn.Sequential, pre_norm: bool, dropout: float):
        super().__init__()
        self.norm1, self.conv = nn.BatchNorm2d(width), conv
        self.norm2, self.ffn = nn.BatchNorm2d(width), ffn
        self.drop = nn.Dropout(dropout)
        self.pre_norm = pre_norm

    def forward(self, x: Tensor) -> Tensor:
        if self.pre_norm:
            x = x + self.drop(self.conv(self.norm1(x)))
            return x + self.drop(self.ffn(self.norm2(x)))
        x = x + self.drop(self.norm1(self.conv(x)))
        return x + self.drop(self.norm2(self.ffn(x)))


class AgentCNN(nn.Module):
    """The agent of a ViT; [B, C, H, W] -> logits [B, classes]. ``forward_intermediates`` returns the maps of the blocks too.

    ``weights`` "shared": convolutions and feed-forward layers refer to the ViT's (see :class:`SharedConv2d`), the agent owns
    stem, norms and head; "own": it owns everything and the ViT gives sizes alone. ``down_after``: blocks after which the
    map is halved; None is none for "base" and the official places for "residual" (blocks 0 and 1, from 12 blocks on the
    last of the first and of the third quarter). ``norm``: "pre" or "post". ``dropout``: of the feed-forward layers with
    own weights; shared ones take the ViT's rates, of the residual branches too.
    Raises ``ValueError`` for a ViT of another layout or places that do not exist.
    """

    def __init__(
        self,
        vit: nn.Module,
        weights: str = "shared",
        style: str = "residual",
        offsets: str = "raster",
        down_after: int | list[int] | None = None,
        norm: str = "pre",
        stem_width: int = 64,
        dropout: float = 0.1,
    ):
        super().__init__()
        check_vit(vit)
        depth, width = len(vit.blocks), vit.embed_dim
        if down_after is None:
            early = (depth // 4 - 1, 3 * depth // 4 - 1) if depth >= 12 else range(min(2, depth - 1))
            down_after = early if style == "residual" else ()
        self.down_after = sorted({down_after} if isinstance(down_after, int) else set(down_after))
        if any(place not in range(depth) for place in self.down_after):
            raise ValueError(f"down_after={self.down_after}: the ViT has the blocks 0 to {depth - 1}")
        settings = {"style": style, "offsets": offsets, "down_after": self.down_after, "norm": norm}
        self.settings = settings | {"stem_width": stem_width, "dropout": dropout}
        projection = vit.patch_embed.proj
        self.stem = Stem(projection.in_channels, width, projection.kernel_size[0], style, stem_width)
        blocks = []
        for block in vit.blocks:
            attention, mlp = block.attn, block.mlp
            if weights == "shared":
                conv = SharedConv2d(attention, offsets)
                first, second = SharedPointwise(mlp.fc1), SharedPointwise(mlp.fc2)
                inner, outer = mlp.drop1.p, attention.proj_drop.p
            else:
                conv = TapConv2d(width, attention.num_heads, offsets, attention.proj.bias is not None)
                hidden, bias = mlp.fc1.out_features, mlp.fc1.bias is not None
                first, second = nn.Conv2d(width, hidden, 1, bias=bias), nn.Conv2d(hidden, width, 1, bias=bias)
                inner, outer = dropout, 0.0
            ffn = nn.Sequential(first, copy.deepcopy(mlp.act), nn.Dropout(inner), second)
            blocks.append(AgentBlock(width, conv, ffn, norm == "pre", outer))
        self.blocks = nn.ModuleList(blocks)
        self.pool = nn.AvgPool2d(2)
        self.norm, self.act = nn.BatchNorm2d(width), nn.GELU()
        self.head = nn.Linear(width, vit.head.out_features)

    def forward_intermediates(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Return (logits, maps [B, d, h, w] behind each block, before it is pooled)."""
        x, maps = self.stem(x), []
        for place, block in enumerate(self.blocks):
            x = block(x)
            maps.append(x)
            if place in self.down_after:
                x = self.pool(x)
        return self.head(self.act(self.norm(x)).mean((2, 3))), maps

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_intermediates(x)[0]

    @torch.no_grad()
    def self_contained(self, vit: nn.Module) -> "AgentCNN":
        """Return a copy that owns all its weights, the present ones; ``vit`` gives the sizes."""
        own = AgentCNN(vit, "own", **self.settings).to(self.head.weight.device)
        for mine, theirs in zip(own.blocks, self.blocks, strict=True):
            if isinstance(theirs.conv, SharedConv2d):
                pairs = [(mine.conv.weight, theirs.conv.taps()), (mine.conv.bias, theirs.conv.bias)]
                for ours, shared in ((mine.ffn[0], theirs.ffn[0]), (mine.ffn[3], theirs.ffn[3])):
                    linear = shared._shared[0]
                    pairs += [(ours.weight, linear.weight[..., None, None]), (ours.bias, linear.bias)]
                for to, value in pairs:
                    if to is not None:
                        to.copy_(value)
        _, unexpected = own.load_state_dict(self.state_dict(), strict=False)
        assert not unexpected, unexpected
        return own.train(self.training)


def check_vit(vit: nn.Module) -> None:
    """Raise ``ValueError`` where a module has not the layout of timm's ``VisionTransformer`` with plain attention and MLPs."""
    wanted = "an agent is made from one of timm's VisionTransformer"
    if not all(hasattr(vit, name) for name in ("blocks", "patch_embed", "embed_dim", "head")):
        raise ValueError(f"{wanted}, this is {type(vit).__name__}")
    if not isinstance(getattr(vit.patch_embed, "proj", None), nn.Conv2d) or not isinstance(vit.head, nn.Linear):
        raise ValueError(f"{wanted} with a patch embedding that is one convolution and a linear head")
    for place, block in enumerate(vit.blocks):
        attention, mlp = getattr(block, "attn", None), getattr(block, "mlp", None)
        plain = (
            isinstance(getattr(attention, "qkv", None), nn.Linear)
            and isinstance(getattr(attention, "proj", None), nn.Linear)
            and attention.qkv.out_features == 3 * attention.proj.in_features
            and isinstance(getattr(attention, "norm", nn.Identity()), nn.Identity)
            and getattr(attention, "gate", None) is None
            and all(isinstance(getattr(mlp, name, None), nn.Linear) for name in ("fc1", "fc2"))
            and mlp.fc1.out_features == mlp.fc2.in_features
        )
        if not plain:
            raise ValueError(f"{wanted} with plain attention and MLP; blocks.{place} is another kind")
