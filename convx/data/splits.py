"""Fixed, class-stratified choices of images: the same for every run seed, platform and library version."""

import numpy as np

from convx.seeds import derive


def stratified_order(labels: np.ndarray, purpose: str) -> np.ndarray:
    """Return a permutation of 0..N-1 whose every prefix holds the classes in their overall proportions.

    For classes of equal size no count is off by a whole image. Within a class the images are shuffled, the
    j-th of its n images gets the position (j + 1/2) / n, and all images are merged by position: choices of
    different sizes are nested. ``purpose`` names the stream of random numbers.
    """
    seed = derive(0, "split", purpose)
    # The legacy generator's stream is frozen by NumPy's compatibility policy; that of default_rng may change.
    random = np.random.RandomState([seed >> 32, seed & 0xFFFFFFFF])
    shuffle, ties = random.random_sample(len(labels)), random.random_sample(len(labels))
    by_class = np.lexsort((shuffle, labels))
    _, starts, counts = np.unique(labels[by_class], return_index=True, return_counts=True)
    within = np.arange(len(labels)) - np.repeat(starts, counts)
    position = (within + 0.5) / np.repeat(counts, counts)
    return by_class[np.lexsort((ties, position))]


def stratified_choice(labels: np.ndarray, count: int, purpose: str) -> np.ndarray:
    """Return ``count`` row numbers, ascending: the start of :func:`stratified_order`."""
    return np.sort(stratified_order(labels, purpose)[:count]).astype(np.int64)


def training_rows(labels: np.ndarray, share: float) -> np.ndarray | None:
    """Return the rows of a training split that a run with this ``train_share`` sees, or None for all of them.

    The choice holds the classes in their proportions, is the same for every seed, and a smaller share is part of a larger.
    """
    if share >= 1:
        return None
    return stratified_choice(labels, max(1, round(share * len(labels))), "train share")
