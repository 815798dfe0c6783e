"""Running statistics of their own for each domain that a model sees, with gamma and beta shared.

Chang et al. (2019), "Domain-Specific Batch Normalization", shares less: there gamma and beta are the domain's too.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from batchnorm.errors import InputError
from batchnorm.nn.layer import Layer, layers_of
from batchnorm.nn.state import STATISTICS

__all__ = ["domain", "domains"]


def domains(model: nn.Module, names: Iterable[str]) -> nn.Module:
    """Give every layer running statistics of their own for each domain, in place; a domain that is there stays.

    They begin as a copy of the layer's, which go on serving where no domain is active. A state dict then has their
    keys too, as ``norm.running_mean_real``: a model must have the same domains before it can load it strictly.

    Parameters
    ----------
    model : Module
        With layers of ours that keep running statistics.
    names : iterable of str
        Words as Python's identifiers are.

    Returns
    -------
    Module
        The model given.

    Raises
    ------
    InputError
        A name that is no identifier, a text in the place of several names, a model without such layers, or with a lazy
        one that has seen no batch.

    Examples
    --------
    >>> import batchnorm as bn, torch
    >>> layer = bn.domains(bn.BatchNorm1d(1), ["real", "drawn"])
    >>> with bn.domain(layer, "drawn"):
    ...     y = layer(torch.full((4, 1), 10.0))
    >>> layer.running_mean_real, layer.running_mean_drawn, layer.running_mean
    (tensor([0.]), tensor([1.]), tensor([0.]))
    """
    wanted = list(names) if not isinstance(names, str) else [names]
    if isinstance(names, str) or not wanted:
        raise InputError(f"domains takes a list of names; got {names!r}")
    for name in wanted:
        if not isinstance(name, str) or not name.isidentifier():
            raise InputError(f"a domain's name must be an identifier, as it becomes part of a buffer's; got {name!r}")
    layers = _layers(model)
    for path, layer in layers.items():
        assert layer.running_mean is not None
        if is_lazy(layer.running_mean):
            raise InputError(
                f"domains copy the running statistics, of which {path or 'the layer'} has none before its first batch: "
                "give it one"
            )
    for layer in layers.values():
        for name in wanted:
            if name in layer.domain_names:
                continue
            for kind in STATISTICS:
                layer.register_buffer(f"{kind}_{name}", getattr(layer, kind).clone())
            none_seen = torch.zeros_like(layer.get_buffer("samples_seen"))
            layer.register_buffer(f"samples_seen_{name}", none_seen, persistent=False)
    return model


@contextmanager
def domain(model: nn.Module, name: str) -> Iterator[None]:
    """Use, and in training move, the running statistics of one domain.

    Raises
    ------
    InputError
        A layer does not know the domain.
    """
    layers = _layers(model)
    for path, layer in layers.items():
        if name not in layer.domain_names:
            known = ", ".join(layer.domain_names) or "none"
            raise InputError(f"{path or 'the layer'} has no domain {name!r}, but {known}; batchnorm.domains adds it")
    before = {layer: layer.active_domain for layer in layers.values()}
    for layer in before:
        layer.active_domain = name
    try:
        yield
    finally:
        for layer, active in before.items():
            layer.active_domain = active


def _layers(model: nn.Module) -> dict[str, Layer]:
    layers = {path: layer for path, layer in layers_of(model).items() if layer.running_mean is not None}
    if not layers:
        raise InputError(
            f"domains need batchnorm's layers that keep running statistics; {type(model).__name__} has none"
        )
    return layers
