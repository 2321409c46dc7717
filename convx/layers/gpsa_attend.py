"""Attention with mixed positional and content maps, a few samples at a time, forwards and backwards.

A map of one sample and nine heads over 14 x 14 pixels is 1.4 MB, and autograd would keep several for every
sample. Here the maps of a chunk are made, used and dropped while they are in the cache; the backward pass
makes them again from q and k. Imports torch only; ``gpsa.py`` beside it uses it.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

CACHE_BYTES = 2**24  # maps and values of one chunk on a CPU; a quarter of it in training
MEMORY_BYTES = 2**28  # largest attention map at once: above it the queries are taken row by row
DENSE_MAP = 2**17  # entries of a positional map up to which one product beats two per head


def combine(z_BQHC: Tensor, w_OHI: Tensor, groups: int) -> Tensor:
    """Apply W_out to what the heads saw: [B, Q, heads, C] -> [B, Q, C_out], the convolution's own product."""
    if groups == 1:
        return F.linear(z_BQHC.flatten(2), w_OHI.flatten(1))
    z, w = z_BQHC.unflatten(3, (groups, -1)), w_OHI.unflatten(0, (groups, -1))
    return torch.einsum("bqhgi,gohi->bqgo", z, w).flatten(2)


def _combine_backward(gy_BQO: Tensor, z_BQHC: Tensor, w_OHI: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    """Return the gradients of ``combine`` with respect to z and w."""
    if groups == 1:
        gz = (gy_BQO @ w_OHI.flatten(1)).view_as(z_BQHC)
        return gz, (gy_BQO.flatten(0, 1).T @ z_BQHC.flatten(2).flatten(0, 1)).view_as(w_OHI)
    gy, w = gy_BQO.unflatten(2, (groups, -1)), w_OHI.unflatten(0, (groups, -1))
    gz = torch.einsum("bqgo,gohi->bqhgi", gy, w).flatten(3)
    return gz, torch.einsum("bqgo,bqhgi->gohi", gy, z_BQHC.unflatten(3, (groups, -1))).flatten(0, 1)


def _maps(q_BHDQ: Tensor | None, k_BHDN: Tensor | None, a_QHN: Tensor, share_H1: Tensor, dtype: torch.dtype):
    """Return a chunk's mixed maps [B or 1, Q, heads, N] in ``dtype`` and content maps [B, heads, Q, N]."""
    if q_BHDQ is None:
        return a_QHN[None].to(dtype), None
    content_BHQN = (q_BHDQ.transpose(2, 3) @ k_BHDN).softmax(-1, a_QHN.dtype)
    return torch.addcmul(a_QHN, content_BHQN.transpose(1, 2), share_H1).to(dtype), content_BHQN


class Attend(torch.autograd.Function):
    """``y = W_out (A_pos + share * softmax(q k)) v``: [B, Q, C_out].

    q [B, heads, D, Q], k [B, heads, D, N], v [B, C, N], w [C_out, heads, C / groups].
    ``a_QHN`` is A_pos already times ``1 - share``; without q and k it is all there is. q, k and v share a
    dtype, A_pos and the share are float32 at least. First derivatives only.
    """

    @staticmethod
    def forward(ctx, q_BHDQ, k_BHDN, v_BCN, a_QHN, share_H1, w_OHI, groups: int, samples: int) -> Tensor:
        ctx.save_for_backward(q_BHDQ, k_BHDN, v_BCN, a_QHN, share_H1, w_OHI)
        ctx.groups, ctx.samples = groups, samples
        heads = a_QHN.shape[1]
        y_BQO = v_BCN.new_empty(len(v_BCN), a_QHN.shape[0], w_OHI.shape[0])
        for b in range(0, len(v_BCN), samples):
            part = slice(b, b + samples)
            qk = (None, None) if q_BHDQ is None else (q_BHDQ[part], k_BHDN[part])
            a_BQHN, _ = _maps(*qk, a_QHN, share_H1, v_BCN.dtype)
            z_BMC = a_BQHN.flatten(1, 2) @ v_BCN[part].transpose(1, 2)
            y_BQO[part] = combine(z_BMC.unflatten(1, (-1, heads)), w_OHI, groups)
        return y_BQO

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gy_BQO: Tensor):
        q_BHDQ, k_BHDN, v_BCN, a_QHN, share_H1, w_OHI = ctx.saved_tensors
        heads, dtype, samples = a_QHN.shape[1], v_BCN.dtype, max(1, ctx.samples // 2)
        gq, gk = (None, None) if q_BHDQ is None else (torch.empty_like(q_BHDQ), torch.empty_like(k_BHDN))
        gv, gw = torch.empty_like(v_BCN), torch.zeros_like(w_OHI)
        ga, gshare = torch.zeros_like(a_QHN), torch.zeros_like(share_H1)
        for b in range(0, len(v_BCN), samples):
            part = slice(b, b + samples)
            qk = (None, None) if q_BHDQ is None else (q_BHDQ[part], k_BHDN[part])
            v, gy = v_BCN[part], gy_BQO[part]
            a_BQHN, content_BHQN = _maps(*qk, a_QHN, share_H1, dtype)
            a_BMN = a_BQHN.flatten(1, 2)
            z_BQHC = (a_BMN @ v.transpose(1, 2)).unflatten(1, (-1, heads))
            gz_BQHC, gw_part = _combine_backward(gy, z_BQHC, w_OHI, ctx.groups)
            gw += gw_part
            gz_BMC = gz_BQHC.flatten(1, 2)
            gv[part] = gz_BMC.transpose(1, 2) @ a_BMN
            ga_BQHN = (gz_BMC @ v).unflatten(1, (-1, heads)).to(a_QHN.dtype)
            ga += ga_BQHN.sum(0)
            if content_BHQN is None:
                continue
            # The softmax's backward pass; the share stands outside of it, on the small tensors.
            gs_BHQN = content_BHQN * ga_BQHN.transpose(1, 2)
            row_BHQ1 = gs_BHQN.sum(-1, keepdim=True)
            gshare += row_BHQ1.sum((0, 2))
            gs_BHQN = gs_BHQN.addcmul_(content_BHQN, row_BHQ1, value=-1).to(dtype)
            gq[part] = (qk[1] @ gs_BHQN.transpose(2, 3)) * share_H1[..., None]
            gk[part] = (qk[0] @ gs_BHQN) * share_H1[..., None]
        return gq, gk, gv, ga, gshare, gw, None, None


def attend(
    q_BHDYX: Tensor | None, k_BHDN: Tensor | None, v_BCHW: Tensor, ay_HQK: Tensor, ax_HQK: Tensor,
    share_H: Tensor, w_OHI: Tensor, groups: int,
) -> Tensor:  # fmt: skip
    """Return ``W_out ((1 - share) A_pos + share A_content) v`` for all queries: [B, C_out, H_out, W_out].

    A_pos is the product of its profiles [heads, H_out, H] and [heads, W_out, W]. Without q and k it is all
    there is, and large maps are seen head by head along x, then along y. With content, huge maps are made
    some rows at a time.
    """
    (B, C, H, W), dtype = v_BCHW.shape, v_BCHW.dtype
    heads, rows_out, columns_out = ay_HQK.shape[0], ay_HQK.shape[1], ax_HQK.shape[1]
    share_H1, q_BHDQ = share_H.to(ay_HQK.dtype)[:, None], None
    if q_BHDYX is not None:
        ay_HQK = ay_HQK * (1 - share_H1)[:, :, None]
    elif heads * rows_out * columns_out * H * W > DENSE_MAP:
        return _look(v_BCHW, ay_HQK.to(dtype), ax_HQK.to(dtype), w_OHI, groups)
    row_bytes = 4 * heads * columns_out * (2 * H * W + C)
    rows = max(1, min(rows_out, MEMORY_BYTES // row_bytes))
    budget = CACHE_BYTES if v_BCHW.device.type == "cpu" else MEMORY_BYTES
    budget = budget // 4 if torch.is_grad_enabled() else budget
    samples = max(1, min(B, budget // (row_bytes * rows)))
    ay_QHK, ax_QHK = ay_HQK.transpose(0, 1), ax_HQK.transpose(0, 1)
    tiles = []
    for y0 in range(0, rows_out, rows):
        tile_QHK = ay_QHK[y0 : y0 + rows]
        a_QHN = (tile_QHK[:, None, :, :, None] * ax_QHK[None, :, :, None, :]).flatten(3).flatten(0, 1)
        if q_BHDYX is not None:
            q_BHDQ = q_BHDYX[..., y0 : y0 + rows, :].flatten(3)
        tiles.append(Attend.apply(q_BHDQ, k_BHDN, v_BCHW.flatten(2), a_QHN, share_H1, w_OHI, groups, samples))
    y_BQO = tiles[0] if len(tiles) == 1 else torch.cat(tiles, dim=1)
    y_BCHW = y_BQO.transpose(1, 2).unflatten(2, (rows_out, columns_out))
    plain = v_BCHW.is_contiguous()
    return y_BCHW.contiguous(memory_format=torch.contiguous_format if plain else torch.channels_last)


def _look(v_BCHW: Tensor, ay_HQK: Tensor, ax_HQK: Tensor, w_OHI: Tensor, groups: int) -> Tensor:
    y_BCHW = None
    for ay_QK, ax_QK, w_OI in zip(ay_HQK, ax_HQK, w_OHI.unbind(1), strict=True):
        part_BCHW = F.conv2d(ay_QK @ (v_BCHW @ ax_QK.T), w_OI[:, :, None, None], groups=groups)
        y_BCHW = part_BCHW if y_BCHW is None else y_BCHW + part_BCHW
    return y_BCHW
