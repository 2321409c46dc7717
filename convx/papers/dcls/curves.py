"""What DCLS layers leave in the history of a training. No torch."""


def curves(history: list[dict], quantity: str = "tap_radius_mean") -> dict[str, list[float]]:
    """Return {layer: value per epoch} of one quantity that the DCLS layers add to a training history.

    ``quantity`` is tap_radius_mean, tap_radius_p90 (px) or tap_overlap; epoch 0 is before any update. The
    repulsive loss of an epoch is the square of the mean of tap_overlap over the layers. Raises ``ValueError``
    when the history has none.
    """
    suffix = f".{quantity}"
    names = [key for key in history[0] if key.endswith(suffix)] if history else []
    if not names:
        raise ValueError(f"the history has no column *{suffix}; was the network trained with DCLS layers?")
    return {name.removesuffix(suffix): [float(row[name]) for row in history] for name in names}
