"""Running statistics set aside and put back, in memory and in a file."""

import os
import resource
import sys

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

import batchnorm as bn
from support import assert_same_state, compiles, copied_state


def network(kind=bn.BatchNorm1d):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), kind(4), nn.Tanh(), nn.BatchNorm1d(4).double())


def trained(model, batches=3, seed=1):
    generator = torch.Generator().manual_seed(seed)
    for layer in (model[1], model[3]):
        for _ in range(batches):
            layer(torch.randn(8, 4, generator=generator).to(layer.running_mean.dtype) * 2 + 5)
    return model


@pytest.fixture(params=["memory", "file"])
def taken(request, tmp_path):
    """``taken(model)``: a snapshot of it, in memory or on disk."""

    def take(model):
        path = tmp_path / "stats.safetensors"
        return bn.snapshot(model) if request.param == "memory" else (bn.snapshot(model, path), path)[1]

    return take


def test_restored_statistics_are_those_of_the_snapshot_to_the_bit(taken):
    model = trained(network())
    before = copied_state(model)
    snapshot = taken(model)
    trained(model, seed=2)
    assert not torch.equal(model[1].running_mean, before["1.running_mean"])
    buffer = model[1].running_mean
    assert bn.restore(model, snapshot) is model
    assert_same_state(model.state_dict(), before)
    assert model[1].running_mean is buffer


def test_domains_and_frozen_layers_go_along(taken):
    model = network()
    bn.add_domains(model[1], ["real", "drawn"])
    with bn.use_domain(model[1], "drawn"):
        trained(model)
    before = copied_state(model)
    snapshot = taken(model)
    with bn.use_domain(model[1], "drawn"):
        trained(model, seed=2)
    bn.freeze(model[1])
    bn.restore(model, snapshot)
    assert_same_state(model.state_dict(), before)


def test_parameters_are_no_part_of_it(taken):
    model = network()
    snapshot = taken(model)
    model[1].weight.data.fill_(3.0)
    bn.restore(model, snapshot)
    assert model[1].weight.tolist() == [3.0] * 4


@compiles
def test_ours_and_torchs_layers_stand_for_each_other_within_any_wrapper(taken):
    model, stock = trained(network()), network(nn.BatchNorm1d)
    bn.restore(torch.compile(stock), taken(torch.compile(model)))
    assert torch.equal(stock[1].running_mean, model[1].running_mean)


def test_a_snapshot_in_memory_does_not_move_with_the_model():
    model = trained(network())
    snapshot = bn.snapshot(model)
    before = snapshot.tensors["1.running_mean"].clone()
    trained(model)
    assert torch.equal(snapshot.tensors["1.running_mean"], before)
    assert repr(snapshot) == "Snapshot(2 layers)"


def test_the_file_is_safetensors_with_the_names_of_the_state_dict(tmp_path):
    model, path = trained(network()), tmp_path / "stats.safetensors"
    bn.snapshot(model, str(path))
    kinds = ("running_mean", "running_var", "num_batches_tracked")
    assert set(load_file(path)) == {f"{layer}.{kind}" for layer in (1, 3) for kind in kinds}
    with safe_open(path, "pt") as file:
        about = file.metadata()
    assert (about["format"], about["version"]) == ("batchnorm.snapshot", "1")
    assert [entry.name for entry in tmp_path.iterdir()] == ["stats.safetensors"]
    assert path.stat().st_mode & 0o777 == 0o666 & ~umask()


def umask():
    mask = os.umask(0)
    os.umask(mask)
    return mask


@pytest.mark.parametrize(
    ("model", "rule"),
    [
        (nn.Sequential(nn.Linear(3, 4), bn.BatchNorm1d(4)), "the model lacks 3.num_batches_tracked and 2 more"),
        (nn.Sequential(*network(), bn.BatchNorm1d(4)), "the snapshot lacks 4.num_batches_tracked and 2 more"),
        (nn.Sequential(nn.Linear(3, 5), bn.BatchNorm1d(5), nn.Tanh(), nn.BatchNorm1d(4)), r"1.running_mean .*\(5,\)"),
        (nn.Sequential(nn.Linear(3, 4), bn.BatchNorm1d(4), nn.Tanh(), nn.BatchNorm1d(1)), r"3.running_mean .*\(1,\)"),
    ],
    ids=["a layer less", "a layer more", "other channels", "shapes that would broadcast"],
)
def test_a_snapshot_of_another_model_is_refused_and_changes_nothing(taken, model, rule):
    before = copied_state(model)
    with pytest.raises(bn.InputError, match=rule):
        bn.restore(model, taken(trained(network())))
    assert_same_state(model.state_dict(), before)


def cut(path):
    path.write_bytes(path.read_bytes()[:-5])


def cut_in_the_header(path):
    path.write_bytes(path.read_bytes()[:20])


def flip(path):
    content = bytearray(path.read_bytes())
    content[-3] ^= 1  # in a tensor's values, which safetensors does not check
    path.write_bytes(content)


def of_a_later_version(path):
    save_file(load_file(path), path, {"format": "batchnorm.snapshot", "version": "2"})


@pytest.mark.parametrize(
    ("damage", "rule"),
    [
        (cut, "snapshot wrote"),
        (cut_in_the_header, "snapshot wrote"),
        (flip, "damaged"),
        (lambda path: path.write_bytes(b""), "snapshot wrote"),
        (lambda path: path.write_text("mean,var\n0,1\n" * 9), "snapshot wrote"),
        (lambda path: torch.save({"1.running_mean": torch.zeros(4)}, path), "snapshot wrote"),
        (lambda path: save_file(load_file(path), path), "must be a snapshot of .* got None"),
        (lambda path: save_file(load_file(path), path, {"format": "pt"}), "must be a snapshot of .* got 'pt'"),
        (of_a_later_version, "version '1'; got 'batchnorm.snapshot' and '2'"),
    ],
    ids=["cut", "cut header", "flipped bit", "empty", "text", "torch's", "no metadata", "foreign", "later version"],
)
def test_a_damaged_or_foreign_file_is_refused_and_changes_nothing(tmp_path, damage, rule):
    model, path = trained(network()), tmp_path / "stats.safetensors"
    bn.snapshot(model, path)
    trained(model, seed=2)
    before = copied_state(model)
    damage(path)
    with pytest.raises(bn.InputError, match=rule):
        bn.restore(model, path)
    assert_same_state(model.state_dict(), before)


def test_a_file_that_is_not_there_is_the_systems_own_error(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none\.safetensors"):
        bn.restore(network(), tmp_path / "none.safetensors")
    with pytest.raises(IsADirectoryError):
        bn.restore(network(), tmp_path)
    with pytest.raises(FileNotFoundError):
        bn.snapshot(network(), tmp_path / "no folder" / "stats.safetensors")


def test_a_full_disk_leaves_the_file_that_was_there(tmp_path):
    model, path = trained(network()), tmp_path / "stats.safetensors"
    bn.snapshot(model, path)
    before = path.read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))  # a write beyond 100 bytes fails, as on a full disk
    try:
        with pytest.raises(OSError, match="too large"):
            bn.snapshot(trained(model), path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_a_read_only_folder_leaves_the_file_that_was_there(tmp_path):
    model, path = trained(network()), tmp_path / "stats.safetensors"
    bn.snapshot(model, path)
    before, user = path.read_bytes(), os.geteuid()
    tmp_path.chmod(0o555)
    try:
        if user == 0:
            os.seteuid(65534)  # root may write everywhere
        with pytest.raises(PermissionError):
            bn.snapshot(trained(model), path)
    finally:
        os.seteuid(user)
        tmp_path.chmod(0o755)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_without_safetensors_the_error_names_the_extra(tmp_path, monkeypatch):
    path = tmp_path / "stats.safetensors"
    bn.snapshot(network(), path)
    for name in ("safetensors", "safetensors.torch"):
        monkeypatch.setitem(sys.modules, name, None)  # what Python does for a package that is not there
    for use in (lambda: bn.snapshot(network(), path), lambda: bn.restore(network(), path)):
        with pytest.raises(bn.MissingDependencyError, match=r"batchnorm\[snapshot\]"):
            use()
    bn.restore(network(), bn.snapshot(network()))


def test_what_is_no_snapshot_is_refused():
    with pytest.raises(bn.InputTypeError, match="got 3"):
        bn.restore(network(), 3)
    with pytest.raises(bn.InputError, match="Linear has none"):
        bn.snapshot(nn.Linear(2, 2))


def test_the_file_keeps_its_mode_a_link_leads_to_it_and_its_name_may_be_long(tmp_path):
    model, path = trained(network()), tmp_path / f"{'a' * 240}.safetensors"
    bn.snapshot(model, path)
    path.chmod(0o600)
    link = tmp_path / "link.safetensors"
    link.symlink_to(path)
    before = path.read_bytes()
    bn.snapshot(trained(model), link)
    assert link.is_symlink()
    assert path.stat().st_mode & 0o777 == 0o600
    assert path.read_bytes() != before


def test_parts_that_torch_compile_wraps_have_the_names_of_the_plain_model():
    model = trained(network())
    taken = bn.snapshot(model)
    name = next(name for name, module in model.named_children() if list(module.buffers()))
    setattr(model, name, torch.compile(getattr(model, name)))
    assert bn.snapshot(model).tensors.keys() == taken.tensors.keys()
    bn.restore(model, taken)


def test_numbers_that_the_model_can_not_hold_are_refused_and_change_nothing():
    wide, layer = bn.BatchNorm1d(2).double(), bn.BatchNorm1d(2)
    wide.running_var.fill_(1e300)
    with pytest.raises(bn.InputError, match=r"running_var must fit into the model's torch\.float32"):
        bn.restore(layer, bn.snapshot(wide))
    assert layer.running_var.tolist() == [1, 1]
