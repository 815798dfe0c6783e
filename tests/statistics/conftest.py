"""Several processes under torch.distributed, each with a share of its own."""

import json
import os
import subprocess
import sys
import textwrap

import pytest

BEGIN = """
import datetime, json, os, sys
import torch, torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
import batchnorm as bn

torch.set_num_threads(1)
rank, world = int(sys.argv[1]), int(sys.argv[2])
patience = datetime.timedelta(seconds=30)
dist.init_process_group("gloo", init_method="file://" + sys.argv[3], rank=rank, world_size=world, timeout=patience)
"""
END = """
print(json.dumps(result), flush=True)
dist.barrier()
os._exit(0)  # with DistributedDataParallel still there, gloo now and then aborts an interpreter that winds down
"""


@pytest.fixture
def on_ranks(tmp_path):
    """``on_ranks(code, world)``: run code in so many gloo processes; what it leaves as ``result``, rank by rank."""

    def run(code, world):
        script, store = tmp_path / "rank.py", tmp_path / f"store{world}"
        script.write_text(BEGIN + textwrap.dedent(code) + END)
        processes = [
            subprocess.Popen(
                [sys.executable, str(script), str(rank), str(world), str(store)],
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                env=os.environ | {"OMP_NUM_THREADS": "1"},
            )
            for rank in range(world)
        ]
        try:
            said = [process.communicate(timeout=60) for process in processes]
        finally:
            for process in processes:
                process.kill()
        for process, (_, errors) in zip(processes, said, strict=True):
            assert process.returncode == 0, errors
        return [json.loads(output.splitlines()[-1]) for output, _ in said]

    return run
