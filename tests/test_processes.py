"""A single process; several are tested where layers and statistics use them."""

import pytest
import torch
import torch.distributed as dist

from batchnorm import processes


@pytest.fixture
def one_process(tmp_path):
    dist.init_process_group("gloo", f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_without_torch_distributed_there_is_one_process():
    assert not processes.has_processes()
    assert processes.group_size(None) == 1
    assert processes.group_of(None) is None
    assert processes.process_group_of(None) is None


def test_a_group_of_one_process_has_nobody_to_exchange_with(one_process):
    assert processes.has_processes()
    assert processes.group_size(None) == processes.group_size(dist.group.WORLD) == 1
    assert processes.group_of(None) is None
    assert processes.process_group_of(dist.group.WORLD) is None


def test_a_process_outside_of_the_group_is_alone(one_process):
    assert processes.group_size(dist.GroupMember.NON_GROUP_MEMBER) == 1


def test_what_is_gathered_has_a_row_per_process(one_process):
    values = torch.tensor([1.0, 2.0])
    assert torch.equal(processes.all_gather(values, None), values.unsqueeze(0))
    assert processes.all_gather_objects({"a": 1}, None) == [{"a": 1}]
    assert processes.all_gather_through_store("text", "key", None) == ["text"]
