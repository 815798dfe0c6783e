"""Snapshots of running statistics, in memory or in a file, and their restoration."""

from __future__ import annotations

import hashlib
import os
import secrets
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from batchnorm.errors import InputError, InputTypeError, MissingDependencyError
from batchnorm.nn.running import running_sets
from batchnorm.statistics.layers import running_layers, unwrapped
from batchnorm.torch_internals import without_compile_wrappers

__all__ = ["Snapshot", "restore", "snapshot"]

FORMAT = "batchnorm.snapshot"
VERSION = "1"


@dataclass(frozen=True, eq=False, repr=False)
class Snapshot:
    """A copy of the running statistics of a model's layers.

    Attributes
    ----------
    tensors : mapping of str to Tensor
        Running means and variances (C,) and counts of batches, also those of domains, by their names in a state dict.
    """

    tensors: Mapping[str, Tensor]

    def __repr__(self) -> str:
        return f"Snapshot({sum(name.endswith('running_mean') for name in self.tensors)} layers)"


def snapshot(model: nn.Module, path: str | os.PathLike[str] | None = None) -> Snapshot:
    """Copy the running statistics of all batch normalization layers, ours and torch's, including frozen ones.

    The copy includes the counts of batches and the statistics of every domain, but not ``skipped_batches``. With
    ``path`` it is also written to that file, as safetensors. Writing is atomic: if it fails, the file that was there is
    left unchanged.

    Parameters
    ----------
    model : Module
    path : path or None
        A file; needs safetensors: ``pip install 'batchnorm[snapshot]'``.

    Returns
    -------
    Snapshot

    Raises
    ------
    InputError
        The model has no layer with running statistics.
    MissingDependencyError
        ``path`` is given and safetensors is not installed.
    OSError
        The file cannot be written: no such folder, no permission, a full disk.

    Examples
    --------
    >>> import batchnorm as bn, torch
    >>> layer = bn.BatchNorm1d(2)
    >>> before = bn.snapshot(layer)
    >>> y = layer(torch.randn(8, 2) + 3)
    >>> bn.restore(layer, before).running_mean
    tensor([0., 0.])
    """
    taken = Snapshot({name: values.detach().clone() for name, values in _statistics(model).items()})
    if path is not None:
        _write(Path(path), taken)
    return taken


def restore(model: nn.Module, snapshot: Snapshot | str | os.PathLike[str]) -> nn.Module:
    """Write the running statistics of a snapshot into a model, in place.

    Parameters
    ----------
    model : Module
        A model whose layers have the module paths and sizes of the snapshot. Layers of ours and of torch's can replace
        each other, and wrappers of torch.compile and DistributedDataParallel make no difference.
    snapshot : Snapshot or path
        A snapshot, or a file that `snapshot` wrote.

    Returns
    -------
    Module
        The model given.

    Raises
    ------
    InputError
        Names or shapes differ from the model's, or the file is damaged or was not written by `snapshot`. Nothing is
        changed then.
    InputTypeError
        The snapshot is neither a Snapshot nor a path.
    MissingDependencyError
        The snapshot is a file and safetensors is not installed.
    OSError
        The file cannot be read.
    """
    if not isinstance(snapshot, Snapshot | str | os.PathLike):
        raise InputTypeError(f"snapshot must be a batchnorm.Snapshot or the path of a file; got {snapshot!r}")
    stored = _statistics(model)
    taken = (snapshot if isinstance(snapshot, Snapshot) else _read(Path(snapshot))).tensors
    missing = {"the snapshot": stored.keys() - taken.keys(), "the model": taken.keys() - stored.keys()}
    for where, names in missing.items():
        if names:
            raise InputError(f"snapshot and model must have the same statistics; {where} lacks {_abridged(names)}")
    for name, values in stored.items():
        if values.shape != taken[name].shape:
            raise InputError(
                f"{name} must have the model's shape {tuple(values.shape)}; got {tuple(taken[name].shape)} in the "
                "snapshot"
            )
        if not taken[name].to(values.dtype).isfinite().equal(taken[name].isfinite()):
            raise InputError(
                f"{name} must fit into the model's {values.dtype}; got values in {taken[name].dtype} that are too large"
            )
    with torch.no_grad():
        for name, values in stored.items():
            values.copy_(taken[name])
    return model


def _statistics(model: nn.Module) -> dict[str, Tensor]:
    """Return the buffers themselves, by their names in the state dict of the model without torch.compile's wrappers."""
    return {
        without_compile_wrappers(f"{path}{path and '.'}{name}"): values
        for path, layer in running_layers(unwrapped(model)).items()
        for running in running_sets(layer)
        for name, values in running.tensors()
    }


def _abridged(names: set[str]) -> str:
    first, *others = sorted(names)
    return first + (f" and {len(others)} more" if others else "")


def _digest(tensors: Mapping[str, Tensor]) -> str:
    """Return a digest of names and values; safetensors itself checks only where each tensor begins and ends."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        values = tensors[name]
        digest.update(f"{name} {values.dtype} {tuple(values.shape)}\n".encode())
        digest.update(values.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _write(path: Path, taken: Snapshot) -> None:
    try:
        from safetensors.torch import save
    except ImportError as error:
        raise _no_safetensors() from error
    tensors = {name: values.cpu().contiguous() for name, values in taken.tensors.items()}
    content = save(tensors, {"format": FORMAT, "version": VERSION, "sha256": _digest(tensors)})
    path = path.resolve()  # replace the file that a link leads to, not the link
    part = path.with_name(f".{secrets.token_hex(8)}.part")
    try:
        with part.open("xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        if path.exists():
            shutil.copymode(path, part)
        part.replace(path)
    except BaseException:  # Ctrl-C too must leave no part of a file behind
        part.unlink(missing_ok=True)
        raise


def _read(path: Path) -> Snapshot:
    try:
        from safetensors import SafetensorError, safe_open
    except ImportError as error:
        raise _no_safetensors() from error
    with path.open("rb"):  # the operating system's own error tells best what is wrong with a path
        pass
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (the file is no mapping)
    except SafetensorError as error:
        raise InputError(f"{str(path)!r} must be a file that batchnorm.snapshot wrote; {error}") from error
    kind, version = metadata.get("format"), metadata.get("version")
    if (kind, version) != (FORMAT, VERSION):
        raise InputError(
            f"{str(path)!r} must be a snapshot of format {FORMAT!r} and version {VERSION!r}; got {kind!r} and "
            f"{version!r}"
        )
    if metadata.get("sha256") != _digest(tensors):
        raise InputError(f"{str(path)!r} must be as batchnorm.snapshot wrote it; its checksum shows that it is damaged")
    return Snapshot(tensors)


def _no_safetensors() -> MissingDependencyError:
    return MissingDependencyError("a snapshot in a file needs safetensors: pip install 'batchnorm[snapshot]'")
