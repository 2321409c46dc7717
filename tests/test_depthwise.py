"""Large depthwise convolutions: every way computes what ``F.conv2d`` does, and the rule picks the documented
one."""

import pytest
import torch
import torch.nn.functional as F

from convx.layers.depthwise import _smooth, depthwise_conv2d, method_for

WAYS = ["toeplitz", "fft"]
# height, width, kernel height, kernel width, padding (same, none, beyond the kernel; kernels beyond the map)
SHAPES = [
    (8, 8, 17, 17, (8, 8)), (5, 7, 3, 5, (1, 2)), (6, 9, 4, 6, (0, 3)), (1, 3, 5, 5, (2, 2)),
    (12, 4, 9, 3, (7, 0)), (7, 7, 3, 3, (5, 6)), (9, 9, 9, 9, (4, 4)), (2, 2, 31, 31, (15, 15)),
    (16, 11, 1, 13, (0, 6)),
]  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def case(height, width, h, w, channels=3, batch=2, dtype=torch.float64):
    rng = torch.Generator().manual_seed(height * width + h)
    x = torch.randn(batch, channels, height, width, generator=rng, dtype=torch.float64).to(dtype)
    kernel = torch.randn(channels, 1, h, w, generator=rng, dtype=torch.float64).to(dtype)
    bias = torch.randn(channels, generator=rng, dtype=torch.float64).to(dtype)
    return [t.requires_grad_() for t in (x, kernel, bias)]


@pytest.mark.parametrize("method", WAYS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values_and_gradients_are_those_of_the_native_convolution(shape, method):
    *sizes, padding = shape
    leaves = case(*sizes)
    wanted = F.conv2d(*leaves, padding=padding, groups=3)
    found = depthwise_conv2d(*leaves, padding=padding, method=method)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-11)
    grad = torch.randn_like(wanted)
    for ours, theirs in zip(torch.autograd.grad(found, leaves, grad), torch.autograd.grad(wanted, leaves, grad)):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-11)


@pytest.mark.parametrize("method, atol", [("toeplitz", 1e-5), ("fft", 1e-4)])
@pytest.mark.parametrize("size", [8, 16, 32])
def test_float32_error(method, atol, size):
    """Of outputs of unit deviation, and of gradients relative to the largest, against float64 as the
    truth."""
    leaves = case(size, size, 17, 17, channels=2, batch=2, dtype=torch.float32)
    with torch.no_grad():
        leaves[1] /= min(size, 17)
    exact = F.conv2d(*(t.double() for t in leaves), padding=8, groups=2)
    found = depthwise_conv2d(*leaves, padding=(8, 8), method=method)
    assert (found.double() - exact).abs().max().item() < atol
    grad = torch.randn_like(found)
    truth = torch.autograd.grad(exact, leaves, grad.double())
    for ours, theirs in zip(torch.autograd.grad(found, leaves, grad), truth):
        assert (ours - theirs).abs().max() < atol * theirs.abs().max()


@pytest.mark.parametrize("method", WAYS)
def test_gradcheck(method):
    leaves = case(4, 5, 5, 3, channels=2, batch=1)
    assert torch.autograd.gradcheck(lambda *t: depthwise_conv2d(*t, padding=(2, 1), method=method), leaves)


@pytest.mark.parametrize("method", ["native", *WAYS])
@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels_last"])
def test_the_memory_format_of_the_input_is_kept(method, last):
    x, kernel, _ = case(6, 6, 9, 9, channels=4)
    layout = torch.channels_last if last else torch.contiguous_format
    found = depthwise_conv2d(
        x.detach().contiguous(memory_format=layout).requires_grad_(), kernel, padding=(4, 4), method=method
    )
    assert found.is_contiguous(memory_format=layout)


@pytest.mark.parametrize("method", WAYS)
def test_only_wanted_gradients_are_computed(method):
    x, kernel, _ = case(6, 6, 5, 5)
    for leaf, other in ((x, kernel), (kernel, x)):
        other.requires_grad_(False)
        leaf.grad = other.grad = None
        depthwise_conv2d(x, kernel, padding=(2, 2), method=method).sum().backward()
        assert leaf.grad is not None and other.grad is None
        other.requires_grad_(True)


def test_the_rule():
    def rule(side, kernel, last=False, dtype=torch.float32, channels=4, outputs=None, stride=(1, 1)):
        x = torch.empty(2, channels, side, side, dtype=dtype)
        x = x.contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)
        return method_for(x, torch.empty(outputs or channels, 1, kernel, kernel, dtype=dtype), stride)

    assert [rule(8, k) for k in (3, 7, 9, 17)] == ["native", "native", "toeplitz", "toeplitz"]
    assert [rule(8, k, last=True) for k in (7, 9, 17)] == ["native", "toeplitz", "toeplitz"]
    assert [rule(16, k, last=True) for k in (13, 15)] == ["native", "fft"]
    assert [rule(side, 17) for side in (12, 13, 32)] == ["toeplitz", "fft", "fft"]
    assert rule(8, 17, stride=(2, 2)) == rule(8, 17, outputs=8) == rule(8, 17, dtype=torch.bfloat16) == "native"
    assert method_for(torch.empty(1, 2, 8, 8, device="meta"), torch.empty(2, 1, 17, 17, device="meta")) == "native"
    with torch.autocast("cpu", torch.bfloat16):
        assert rule(8, 17) == "native"


def test_what_cannot_be_computed_is_told():
    x, kernel, _ = case(6, 6, 9, 9)
    with pytest.raises(ValueError, match="choose one of auto, native, toeplitz, fft"):
        depthwise_conv2d(x, kernel, method="gemm")
    with pytest.raises(ValueError, match="needs stride 1"):
        depthwise_conv2d(x, kernel, stride=(2, 2), method="fft")
    with pytest.raises(RuntimeError, match=r"[Kk]ernel size"):
        depthwise_conv2d(x, kernel, method="toeplitz")  # no padding: the kernel is larger than the map
    empty = depthwise_conv2d(x[:0], kernel, padding=(4, 4), method="fft")
    assert empty.shape == (0, 3, 6, 6)


def test_fast_lengths():
    def prime_factors(n):
        return {p for p in range(2, n + 1) if n % p == 0 and all(p % q for q in range(2, p))}

    for least in range(1, 200):
        n = _smooth(least)
        assert n >= least and n % 2 == 0 and prime_factors(n) <= {2, 3, 5}
    assert [_smooth(n) for n in (24, 40, 41, 64)] == [24, 40, 48, 64]
