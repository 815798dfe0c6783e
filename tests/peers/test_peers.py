"""The libraries of the extra ``peers`` are installed beside the pinned torch."""

import torch

from support import ROOT, peer


def test_the_peers_do_not_replace_the_pinned_torch():
    peer("torchvision")
    pinned = next(line for line in (ROOT / "constraints.txt").read_text().splitlines() if line.startswith("torch=="))
    assert torch.__version__.split("+")[0] == pinned.removeprefix("torch==")
