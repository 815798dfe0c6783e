"""Separate running statistics for each domain that a model sees; gamma and beta are shared.

Chang et al. (2019), "Domain-Specific Batch Normalization", shares less: there each domain has its own gamma and beta.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from torch import nn
from torch.nn.parameter import is_lazy

from batchnorm.errors import InputError
from batchnorm.nn.contexts import Setting
from batchnorm.nn.layer import Layer, layers_for
from batchnorm.nn.opening import settings

__all__ = ["add_domains", "use_domain"]


def add_domains(model: nn.Module, names: Iterable[str]) -> nn.Module:
    """Give every layer separate running statistics for each domain, in place; a domain that exists stays as it is.

    They begin as a copy of the layer's own, which are still used where no domain is active. A state dict then has their
    keys too, such as ``norm.running_mean_real``: a model needs the same domains before it can load it strictly.

    Parameters
    ----------
    model : Module
        A model with layers of ours that keep running statistics.
    names : iterable of str
        Python identifiers.

    Returns
    -------
    Module
        The model given.

    Raises
    ------
    InputError
        A name is not an identifier, one string is given instead of several names, the model has no such layers or has
        some of torch's, or a lazy one has not seen a batch yet.

    Examples
    --------
    >>> import batchnorm as bn, torch
    >>> layer = bn.add_domains(bn.BatchNorm1d(1), ["real", "drawn"])
    >>> with bn.use_domain(layer, "drawn"):
    ...     y = layer(torch.full((4, 1), 10.0))
    >>> layer.running_mean_real, layer.running_mean_drawn, layer.running_mean
    (tensor([0.]), tensor([1.]), tensor([0.]))
    """
    wanted = list(names) if not isinstance(names, str) else [names]
    if isinstance(names, str) or not wanted:
        raise InputError(f"names must be a list of domain names; got {names!r}")
    for name in wanted:
        if not isinstance(name, str) or not name.isidentifier():
            raise InputError(
                f"a domain's name must be an identifier, as it becomes part of a buffer's name; got {name!r}"
            )
    layers = _layers(model, "add_domains")
    for path, layer in layers.items():
        assert layer.running_mean is not None
        if is_lazy(layer.running_mean):
            raise InputError(
                f"domains begin as a copy of running statistics, and {path or 'the layer'} has none before its first "
                "batch; run the model on one batch first"
            )
    for layer in layers.values():
        for name in wanted:
            if name not in layer.domain_names:
                layer.register_domain(name)
    return model


@contextmanager
def use_domain(model: nn.Module, name: str) -> Iterator[None]:
    """Use the running statistics of one domain, which training within the context also updates.

    The domain is active in this thread and asyncio task only.

    Raises
    ------
    InputError
        A layer has no such domain, or is one of torch's, which keep one set of statistics.
    """
    layers = _layers(model, "use_domain")
    for path, layer in layers.items():
        if name not in layer.domain_names:
            known = ", ".join(layer.domain_names) or "none"
            raise InputError(
                f"{path or 'the layer'} must have the domain {name!r}, which batchnorm.add_domains adds; got {known}"
            )
    with settings(dict.fromkeys(layers.values(), Setting(domain=name))):
        yield


def _layers(model: nn.Module, function: str) -> dict[str, Layer]:
    return layers_for(model, function, "keep one set of running statistics", statistics=True)
