import subprocess
import sys

import pytest

FAULTS = """
import resource, sys, torch, batchnorm as bn
if sys.argv[1] == "tuned":
    assert bn.tune_allocator()
x = torch.zeros(12_000_000)
x.clone()
counts = []
for _ in range(10):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    x.clone()
    counts.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
print(min(counts))  # now and then a kernel short of memory takes pages back
"""


def page_faults(how):
    return int(subprocess.run([sys.executable, "-c", FAULTS, how], capture_output=True, text=True, check=True).stdout)


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's mallopt")
def test_after_tuning_a_freed_block_is_used_again_without_new_page_faults():
    assert page_faults("stock") > 1000
    assert page_faults("tuned") < 100
