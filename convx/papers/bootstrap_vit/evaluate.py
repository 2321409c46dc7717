"""What a run of the bootstrapped-ViT paper says beyond the accuracy of its model: its agent, its attention, its training cost.

Called with every variant of this paper.
"""

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from convx.evaluate import EvaluationData, Result, accuracy, evaluation_mode, row
from convx.evaluate.cost import macs
from convx.layers.agent_cnn import AgentCNN
from convx.runs import build_teacher, load_weights

IMAGES = 64  # the first ones, for attention distances


def run(model: nn.Module, recipe: dict, data: EvaluationData, checkpoints: str | None = None) -> Result:
    """Return rows about the agent, the attention and the cost of training.

    ``top1`` with the condition ``branch: agent``, of the agent that was trained beside the ViT (its weights stand in
    ``checkpoints``); ``attention_distance`` per ``layer`` in pixels of the data's images, and the array of the same name
    [layers, heads]; ``training_macs``, the multiply-accumulates of training on one image: three forward passes of what is
    trained, one of a teacher.
    """
    objective = recipe["objective"]
    grey = data.normalise(torch.full((1, *data.shape_CHW), 128, dtype=torch.uint8, device=data.device))
    forward, found = macs(model, grey)[0], Result([])
    said = ["3 x forward of the model"]
    if objective["name"] == "bootstrap" and objective.get("mode", "joint") in ("joint", "shared"):
        agent = agent_like(model, objective).to(data.device).eval()
        forward += macs(agent, grey)[0]
        said = ["3 x forward of ViT and agent"]
        found += _agent(agent, data, checkpoints)
    total = 3 * forward
    if (teacher := build_teacher(recipe, _meta(model, data))) is not None:
        total += macs(teacher.to(data.device).eval(), grey)[0]
        said.append("1 x forward of the teacher")
    method = f"{' + '.join(said)}, torch FlopCounterMode / 2; losses, optimiser and building of kernels left out"
    found += Result([row("training_macs", total, "MAC per image", method=method)])
    if hasattr(model, "blocks") and hasattr(model, "patch_embed"):
        found += _attention(model, data)
    return found


def agent_like(vit: nn.Module, objective: dict) -> AgentCNN:
    """Return an agent of the shape that the objective trains beside the ViT, with weights of its own."""
    chosen = {key.removeprefix("agent_"): value for key, value in objective.items() if key.startswith("agent_")}
    with torch.random.fork_rng(devices=[]):
        agent = AgentCNN(vit, "own", **chosen)
    if enlarge := getattr(vit, "enlarge", None):
        enlarge.attach(agent)
    return agent


def _meta(model: nn.Module, data: EvaluationData) -> dict:
    channels, side, _ = data.shape_CHW
    classes = model.head.out_features if hasattr(model, "head") else model.num_classes
    return {"num_classes": classes, "channels": channels, "image_size": side}


def _agent(agent: AgentCNN, data: EvaluationData, checkpoints: str | None) -> Result:
    file = Path(checkpoints or "") / "agent.safetensors"
    if not file.is_file():
        method = "the agent's weights were not kept (checkpoints/agent.safetensors)"
        return Result([row("top1", None, "%", method=method, split="test", branch="agent")])
    found = accuracy.run(load_weights(agent, file), data, {"split": "test"}).rows
    top1 = next(entry for entry in found if entry["metric"] == "top1")
    return Result([top1 | {"conditions": {"branch": "agent"}}])


def _attention(vit: nn.Module, data: EvaluationData) -> Result:
    """Return the mean distance between a patch and what it attends to, in pixels of the images, per layer and head."""
    inputs: list[Tensor] = []
    hooks = [block.attn.register_forward_pre_hook(lambda _, given: inputs.append(given[0])) for block in vit.blocks]
    sample = data.first(IMAGES)
    try:
        with evaluation_mode(vit), torch.inference_mode():
            for x_BCHW, _ in sample.batches():
                vit(x_BCHW)
    finally:
        for hook in hooks:
            hook.remove()
    depth, grid = len(vit.blocks), vit.patch_embed.grid_size
    pixels = data.shape_CHW[2] / grid[1]
    distances = []
    with torch.inference_mode():
        for layer, block in enumerate(vit.blocks):
            x = torch.cat(inputs[layer::depth])  # every batch gives one input a layer, in order
            distances.append(attention_distance(block.attn, x, vit.num_prefix_tokens, grid) * pixels)
    table_LH = torch.stack(distances).cpu()
    method = (
        "mean over images and patches of sum_k p(k | q) |k - q|, patches alone, p normalised over them; mean over heads"
    )
    rows = [
        row("attention_distance", float(value), "px", n=len(sample), split="test", method=method, layer=layer)
        for layer, value in enumerate(table_LH.mean(1))
    ]
    return Result(rows, arrays={"attention_distance": table_LH.float().numpy()})


def attention_distance(attention: nn.Module, x_BNC: Tensor, prefix: int, grid: tuple[int, int]) -> Tensor:
    """Return the mean distance per head [H] in patches, for the inputs of an attention layer with ``prefix`` tokens first."""
    heads = attention.num_heads
    q, k, _ = attention.qkv(x_BNC).unflatten(2, (3, heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
    q, k = attention.q_norm(q)[:, :, prefix:], attention.k_norm(k)[:, :, prefix:]
    weights_BHQK = F.softmax((q * attention.scale) @ k.transpose(-2, -1), dim=-1)
    places = torch.cartesian_prod(*(torch.arange(n, dtype=weights_BHQK.dtype, device=x_BNC.device) for n in grid))
    return (weights_BHQK * torch.cdist(places, places)).sum(-1).mean((0, 2))
