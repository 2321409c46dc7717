"""How fast gated positional self-attention is: against its convolution, its textbook form, and in training.

    python benchmarks/tcnn.py            about two minutes
    python benchmarks/tcnn.py --quick    about half a minute

Calls are timed in turn in one process, in a new random order each round; ratios are medians over the rounds
with the quartiles. With ``--clock processor`` (one thread) the time that other processes take does not count.
Targets on two threads, float32, forward: at C=512, 7x7, batch 32 at most 2.2x the convolution; at C=256,
14x14, batch 16 at least 2.5x faster than the textbook form (padded keys, both attentions materialised for
every sample) with less than half of its memory, counted from the allocator's events. Gates are open.
"""

import argparse
import platform
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

import convx
from convx.evaluate.latency import paired
from convx.layers.gpsa import GatedPositionalAttention
from convx.models import create_model


class Textbook(nn.Module):
    """The same layer by its definition: stride 1, zero halo, dense maps over all keys for every sample."""

    def __init__(self, layer: GatedPositionalAttention):
        super().__init__()
        self.layer, self.p = layer, layer.padding[0]

    def forward(self, x_BCHW):
        layer, p = self.layer, self.p
        (B, _, H, W), heads, dim = x_BCHW.shape, layer.heads, layer.key_dim
        tokens_BNC = F.pad(x_BCHW, (p, p, p, p)).flatten(2).transpose(1, 2)
        q_BHQD = F.linear(x_BCHW.flatten(2).transpose(1, 2), layer.query).view(B, H * W, heads, dim).transpose(1, 2)
        k_BHND = F.linear(tokens_BNC, layer.key).view(B, -1, heads, dim).transpose(1, 2)
        y, x = torch.meshgrid(torch.arange(-p, H + p), torch.arange(-p, W + p), indexing="ij")
        halo_N = ((y < 0) | (y >= H) | (x < 0) | (x >= W)).flatten()
        scores = (q_BHQD @ k_BHND.transpose(2, 3)) * dim**-0.5
        content = scores.masked_fill(halo_N, float("-inf")).softmax(-1)
        key_N2 = torch.stack([y.flatten(), x.flatten()], 1)
        delta = (key_N2 - key_N2[~halo_N][:, None]).float()
        relative = torch.stack([delta[..., 1], delta[..., 0], delta.square().sum(-1)], -1)
        positional = (relative @ layer.positions.T).permute(2, 0, 1).expand(B, -1, -1, -1).softmax(-1)
        share = layer.content_share()[:, None, None]
        maps = (1 - share) * positional + share * content
        v_BNC = F.linear(tokens_BNC, layer.value)
        z_BQM = (maps @ v_BNC[:, None]).transpose(1, 2).flatten(2)
        return F.linear(z_BQM, layer.out_weight.flatten(1)).transpose(1, 2).unflatten(2, (H, W))


def open_layer(channels: int, size: int, batch: int):
    """Return (convolution, layer with open gates, input)."""
    conv = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
    layer = GatedPositionalAttention.from_conv(conv)
    with torch.no_grad():
        layer.gate.fill_(0.3)
        layer.value.add_(0.01 * torch.randn_like(layer.value))
    return conv, layer.eval(), torch.randn(batch, channels, size, size).relu()


def peak_mib(call) -> float:
    """Return the most that is allocated during a call beyond what was there, in MiB."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        call()
    now = most = 0
    for event in sorted(profiler.profiler.kineto_results.events(), key=lambda e: e.start_ns()):
        if event.name() == "[memory]":
            now += event.nbytes()
            most = max(most, now)
    return most / 2**20


def ratio(samples: dict, name: str, reference: str) -> str:
    low, middle, high = np.percentile(samples[name] / samples[reference], [25, 50, 75])
    return f"{middle:6.2f} [{low:.2f}, {high:.2f}]"


def train_step(model: nn.Module, x, y):
    def call():
        model.zero_grad(set_to_none=True)
        F.cross_entropy(model(x), y).backward()

    return call


def processor_ms(call) -> float:
    begin = time.process_time()
    call()
    return 1e3 * (time.process_time() - begin)


def cpu_name() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []:
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer rounds")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--clock", choices=("wall", "processor"), default="wall")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    limits = {"rounds": 12, "seconds": 8.0} if options.quick else {"rounds": 60, "seconds": 40.0}
    if options.clock == "processor":
        limits["clock"] = processor_ms
    capability = torch.backends.cpu.get_cpu_capability()
    print(f"{cpu_name()}, {capability}, torch {torch.__version__}")
    print(f"{options.threads} threads, {options.clock} time")
    print("ratio: median [quartiles] over the rounds\n")
    for channels, size, batch in ((512, 7, 32), (256, 14, 16)):
        conv, layer, x = open_layer(channels, size, batch)
        textbook, closed = Textbook(layer), GatedPositionalAttention.from_conv(conv, locality=20.0).eval()
        calls = {
            "convolution": conv,
            "attention": layer,
            "textbook": textbook,
            "folded": closed.fold(),
            "closed": closed,
        }
        with torch.inference_mode():
            assert torch.allclose(layer(x), textbook(x), rtol=1e-3, atol=1e-4)
            bound = {name: (lambda module=module, x=x: module(x)) for name, module in calls.items()}
            samples = paired(bound, **limits)
            ours, theirs = peak_mib(bound["attention"]), peak_mib(bound["textbook"])
        print(f"C={channels}, {size}x{size}, batch {batch}, {len(samples['attention'])} rounds")
        print(f"  convolution             {np.median(samples['convolution']):8.1f} ms")
        pairs = {
            "attention": "convolution",
            "textbook": "attention",
            "folded": "convolution",
            "closed": "convolution",
        }
        for name, reference in pairs.items():
            print(f"  {name:>11} / {reference:<11}  {ratio(samples, name, reference)}")
        print(f"  memory, attention {ours:.1f} MiB, textbook {theirs:.1f} MiB, ratio {ours / theirs:.2f}\n")

    net = create_model("resnet8_8", num_classes=10, in_channels=1).train()
    x, y = torch.randn(64, 1, 32, 32), torch.randint(0, 10, (64,))
    models = {
        "plain": net,
        "recast": convx.recast_attention(net, "{stage-1}").train(),
        "frozen gates": convx.recast_attention(net, "{stage-1}", frozen="gates").train(),
    }
    samples = paired({name: train_step(model, x, y) for name, model in models.items()}, **limits)
    print("training step, resnet8_8 at 32x32, batch 64, the last stage recast")
    print(f"  plain                   {np.median(samples['plain']):8.1f} ms")
    for name in ("recast", "frozen gates"):
        print(f"  {name:>12} / plain       {ratio(samples, name, 'plain')}")


if __name__ == "__main__":
    main()
