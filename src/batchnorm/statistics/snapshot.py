"""Running statistics set aside, in memory or in a file, and put back."""

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

from batchnorm.errors import InputError
from batchnorm.nn.running import STATISTICS
from batchnorm.statistics.forwards import running_layers, suffixes_of, unwrapped

__all__ = ["Snapshot", "restore", "snapshot"]

FORMAT = "batchnorm.snapshot"
VERSION = "1"


@dataclass(frozen=True, eq=False, repr=False)
class Snapshot:
    """The running statistics of a model's layers at one moment.

    Attributes
    ----------
    tensors : mapping of str to Tensor
        Running means and variances (C,) and counts of batches, those of domains too, by their names in a state dict.
    """

    tensors: Mapping[str, Tensor]

    def __repr__(self) -> str:
        return f"Snapshot({sum(name.endswith('running_mean') for name in self.tensors)} layers)"


def snapshot(model: nn.Module, path: str | os.PathLike[str] | None = None) -> Snapshot:
    """Copy the running statistics of all batch normalization layers, ours and torch's, frozen ones too.

    With them go the counts of batches and the statistics of every domain, so that `restore` leads back to this moment;
    ``skipped_batches`` stays what it is. With ``path`` the copy is also written to that file, as safetensors: a whole
    file, or where writing fails the one that was there.

    Parameters
    ----------
    model : Module
    path : path or None
        Needs safetensors: ``pip install 'batchnorm[snapshot]'``.

    Returns
    -------
    Snapshot

    Raises
    ------
    InputError
        The model has no layer with running statistics, or safetensors is missing.
    OSError
        The file can't be written: no such folder, no permission, a full disk.

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
    """Put the running statistics of a snapshot back, in place.

    Parameters
    ----------
    model : Module
        With the layers, of the names and sizes, that the snapshot was taken of; ours and torch's may stand for each
        other. torch.compile's and DistributedDataParallel's wrappers make no difference.
    snapshot : Snapshot or path
        As `snapshot` returned or wrote it.

    Returns
    -------
    Module
        The model given.

    Raises
    ------
    InputError
        Names or shapes differ from the model's, the file is damaged or none of ours; nothing is changed then.
    OSError
        The file can't be read.
    """
    if not isinstance(snapshot, Snapshot | str | os.PathLike):
        raise InputError(f"snapshot must be a batchnorm.Snapshot or the path of a file; got {snapshot!r}")
    own = _statistics(model)
    taken = (snapshot if isinstance(snapshot, Snapshot) else _read(Path(snapshot))).tensors
    for whose, names in (("the snapshot", own.keys() - taken.keys()), ("the model", taken.keys() - own.keys())):
        if names:
            raise InputError(f"snapshot and model must have the same statistics; {whose} lacks {_some(names)}")
    for name, values in own.items():
        if values.shape != taken[name].shape:
            raise InputError(
                f"{name} must have the model's shape {tuple(values.shape)}; the snapshot's has "
                f"{tuple(taken[name].shape)}"
            )
        if not taken[name].to(values.dtype).isfinite().equal(taken[name].isfinite()):
            raise InputError(
                f"{name} must fit into the model's {values.dtype}; the snapshot's {taken[name].dtype} does not"
            )
    with torch.no_grad():
        for name, values in own.items():
            values.copy_(taken[name])
    return model


def _statistics(model: nn.Module) -> dict[str, Tensor]:
    """The running statistics themselves, by their names in a state dict."""
    return {
        f"{path}{path and '.'}{kind}{suffix}".replace("_orig_mod.", ""): values  # within torch.compile's wrappers
        for path, layer in running_layers(unwrapped(model)).items()
        for suffix in suffixes_of(layer)
        for kind in STATISTICS
        if (values := layer._buffers[f"{kind}{suffix}"]) is not None
    }


def _some(names: set[str]) -> str:
    first, *others = sorted(names)
    return first + (f" and {len(others)} more" if others else "")


def _digest(tensors: Mapping[str, Tensor]) -> str:
    """What tells a damaged file, as safetensors checks no more than where each tensor begins and ends."""
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
    path = path.resolve()  # what a link leads to
    part = path.with_name(f".{secrets.token_hex(8)}.part")
    try:
        with part.open("xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        if path.exists():
            shutil.copymode(path, part)
        part.replace(path)
    except BaseException:  # Ctrl-C too must leave no litter
        part.unlink(missing_ok=True)
        raise


def _read(path: Path) -> Snapshot:
    try:
        from safetensors import SafetensorError, safe_open
    except ImportError as error:
        raise _no_safetensors() from error
    with path.open("rb"):  # the operating system says best what is wrong with a path
        pass
    try:
        with safe_open(path, framework="pt") as file:
            about = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it is no mapping)
    except SafetensorError as error:
        raise InputError(f"{str(path)!r} must be a file that batchnorm.snapshot wrote; {error}") from error
    kind, version = about.get("format"), about.get("version")
    if (kind, version) != (FORMAT, VERSION):
        raise InputError(
            f"{str(path)!r} must be a snapshot, of format {FORMAT!r} and version {VERSION!r}; got {kind!r} and "
            f"{version!r}"
        )
    if about.get("sha256") != _digest(tensors):
        raise InputError(f"{str(path)!r} must be as batchnorm.snapshot wrote it; its checksum says it is damaged")
    return Snapshot(tensors)


def _no_safetensors() -> InputError:
    return InputError("a snapshot in a file needs safetensors, which pip install 'batchnorm[snapshot]' brings")
