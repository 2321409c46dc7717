"""One random stream per purpose: seeds derived from (run seed, purpose, name), drawn on the CPU. No torch at import."""

import hashlib


def derive(seed: int, purpose: str, name: str = "") -> int:
    """Return a 63-bit seed that depends on all three arguments and on nothing else.

    Two purposes ("init", "order", "augment", ...) of one run never share a stream, and adding a purpose moves no other.
    """
    digest = hashlib.sha256(f"convx/{int(seed)}/{purpose}/{name}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def generator(seed: int, purpose: str, name: str = ""):
    """Return a CPU ``torch.Generator`` seeded by :func:`derive`."""
    import torch

    return torch.Generator(device="cpu").manual_seed(derive(seed, purpose, name))
