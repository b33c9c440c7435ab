"""Which weights of a model are NaN or infinite."""

import torch
from torch import Tensor, nn

from ctpd.core.errors import NotFinite


def non_finite_weight(model: nn.Module, *, trainable_only: bool = False) -> str | None:
    """The name of the first parameter that holds NaN or infinity; None if all are finite.

    Of a sharded model only this rank's shards are looked at. Weights of 4 bits are left out, they have no such values.
    """
    named = [
        (name, parameter.detach())
        for name, parameter in model.named_parameters()
        if parameter.is_floating_point() and parameter.numel() and (parameter.requires_grad or not trainable_only)
    ]
    own = [(name, own_shard(value)) for name, value in named]
    largest = [(name, torch.linalg.vector_norm(value, torch.inf)) for name, value in own if value.numel()]
    found = torch.stack([norm.float().cpu() for _, norm in largest]).isfinite().tolist() if largest else []
    return next((name for (name, _), finite in zip(largest, found, strict=True) if not finite), None)


def refuse_non_finite_weights(model: nn.Module, *, where: str) -> None:
    """Refuse a model that was loaded from ``where``.

    Raises:
        NotFinite: a weight is NaN or infinite.
    """
    if name := non_finite_weight(model):
        raise NotFinite(
            f"the weight {name} of the model holds NaN or infinity",
            where=where,
            fix="Give a model whose weights are finite; a training that diverged may have made this one",
        )


def own_shard(value: Tensor) -> Tensor:
    """This rank's shard of a tensor that FSDP has sharded; any other tensor as it is."""
    to_local = getattr(value, "to_local", None)
    shard: Tensor = value if to_local is None else to_local()
    return shard
