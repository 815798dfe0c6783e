"""Processes of torch.distributed for tests: ``from ranks import on_ranks``.

A test file that uses them ends with::

    if __name__ == "rank":
        run_rank(globals())
"""

import multiprocessing
import os
import runpy
import warnings
from datetime import timedelta

import torch
import torch.distributed as dist

import batchnorm as bn

# The server has imported torch, so that a rank starts at once; it has run no backward, after which it could not fork.
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["pytest", "torch._dynamo", "torch.distributed.fsdp", "batchnorm"])


def on_ranks(case, world, folder, *arguments, seconds=60, errors=0):
    """Call ``case(rank, *arguments)``, a function of a test file, on each rank.

    Returns its result per rank, the error that it raised, or None if the process ended without either. ``errors`` is
    the number of ranks that must raise one.
    """
    processes = []
    for rank in range(world):
        task = {"TASK": (case.__name__, rank, world, str(folder), arguments)}
        file = case.__code__.co_filename
        processes.append(PROCESSES.Process(target=runpy.run_path, args=(file, task, "rank"), daemon=True))
    for process in processes:
        process.start()
    for process in processes:
        process.join(seconds)
    stuck = [process for process in processes if process.is_alive()]
    for process in stuck:
        process.kill()
    assert not stuck
    files = [folder / f"{rank}.pt" for rank in range(world)]
    results = [torch.load(file, weights_only=False) if file.exists() else None for file in files]
    raised = [result for result in results if isinstance(result, Exception)]
    assert len(raised) == errors, raised
    return results


def run_rank(module, task=None):
    """Run a task of `on_ranks`, or of torchrun, in a process, and save what the function of the module returns.

    torchrun gives rank and world size, and a store of its own.
    """
    name, rank, world, folder, arguments = module["TASK"] if task is None else task
    warnings.simplefilter("error")
    torch.set_num_threads(1)
    store = None if "TORCHELASTIC_RUN_ID" in os.environ else dist.FileStore(f"{folder}/store", world)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=timedelta(seconds=30))
    try:
        result = module[name](rank, *arguments)
    except Exception as error:  # noqa: BLE001 (handed to the test)
        result = type(error)(str(error)) if isinstance(error, bn.BatchNormError) else RuntimeError(repr(error))
    torch.save(result, f"{folder}/{rank}.pt")
