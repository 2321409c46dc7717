"""The channel self-relation loss of SERE (arXiv 2206.05184, section 3.2) without its matrices kept.

A relation of channels has C^2 entries an image and view, more than the map that it comes from. The loss is a sum over views and
images, so each one's part of the gradient is known as soon as its relation is: dL/dA = (number of targets) softmax(A) - (sum of
targets), dL/dz = (dL/dA + its transpose) z / N. A few images at a time go through, and only gradients of maps are kept.
"""

import torch
from torch import Tensor

ENTRIES = {"cpu": 2**19, "cuda": 2**27}  # of the relations held at one time: a part of the cache, or of the memory


def channel_loss(teacher_GBCN: Tensor, students: list[Tensor], temperature: float = 0.1) -> tuple[Tensor, Tensor]:
    """Return (L_channel, mean entropy of its targets), both scalars; the second has no gradient.

    ``teacher`` [G, B, C, N]: projections of the global crops. ``students``: predictions [G, B, C, N] of the same crops and, as a
    second entry, [L, B, C, N'] of local ones. L is the mean cross-entropy of the rows of softmax(A_c / temperature) of the
    teacher's and softmax(A_c) of the student's relation, over images and the G (G - 1) + G L pairs of a global crop with another
    crop. Not twice differentiable.
    """
    return _ChannelLoss.apply(teacher_GBCN, temperature, *students)


def _relation(z_BCN: Tensor, scale: float) -> Tensor:
    return torch.bmm(z_BCN, z_BCN.transpose(1, 2) * scale)


class _ChannelLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, teacher_GBCN, temperature, *students):
        globals_, images, channels, positions = teacher_GBCN.shape
        chunk = max(1, ENTRIES.get(teacher_GBCN.device.type, 2**19) // channels**2)
        pairs = globals_ * (globals_ - 1) + globals_ * sum(len(s) for s in students[1:])
        share = 1 / (pairs * images * channels)
        wanted = any(ctx.needs_input_grad[2:])
        gradients = [torch.empty_like(s) if wanted else None for s in students]
        loss, entropy = teacher_GBCN.new_zeros(2)
        for start in range(0, images, chunk):
            part = slice(start, start + chunk)
            targets = []
            for z_BCN in teacher_GBCN[:, part]:
                logarithm = torch.log_softmax(_relation(z_BCN, 1 / (positions * temperature)), -1)
                targets.append(logarithm.exp())
                entropy -= torch.dot(targets[-1].flatten(), logarithm.flatten())
            everyone = sum(targets)
            for group, (student, gradient) in enumerate(zip(students, gradients)):
                for view, z_BCN in enumerate(student[:, part]):
                    target = everyone if group else everyone - targets[view]
                    count = globals_ - (group == 0)
                    logarithm = torch.log_softmax(_relation(z_BCN, 1 / student.shape[-1]), -1)
                    loss -= torch.dot(target.flatten(), logarithm.flatten())
                    if gradient is not None:
                        by_relation = logarithm.exp_().mul_(count).sub_(target)
                        by_map = torch.bmm(by_relation, z_BCN)
                        by_map.baddbmm_(by_relation.transpose(1, 2), z_BCN)
                        torch.mul(by_map, share / student.shape[-1], out=gradient[view, part])
        if wanted:
            ctx.save_for_backward(*gradients)
        entropy = entropy / (globals_ * images * channels)
        ctx.mark_non_differentiable(entropy)
        return loss * share, entropy

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, by_loss, _):
        return None, None, *(gradient * by_loss for gradient in ctx.saved_tensors)
