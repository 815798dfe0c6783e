"""The results file keeps its keys and values when it is read and written."""

import json

import pytest

from batchnorm.errors import RunError
from batchnorm.lab.bench.results_file import json_text, read, write
from support import ROOT


@pytest.mark.parametrize("name", ["kernels", "kernels-avx2", "allocators", "models"])
def test_a_committed_file_is_the_same_after_reading_and_writing(name, tmp_path):
    path = ROOT / f"benchmarks/results/{name}.json"
    write(read(path), tmp_path / "written.json")
    assert json.loads((tmp_path / "written.json").read_text()) == json.loads(path.read_text())


def test_a_fault_is_kept_and_has_no_timing(tmp_path):
    content = json.loads((ROOT / "benchmarks/results/models.json").read_text())
    first = {key: content["results"][0][key] for key in ("name", "model", "layout", "batch")} | {"fault": "y is wrong"}
    path = tmp_path / "faults.json"
    path.write_text(json.dumps(content | {"results": [first, content["results"][1]]}))
    run = read(path)
    assert [result.fault for result in run.faults] == ["y is wrong"]
    assert run.results[0].timing is None
    assert json.loads(json_text(run))["results"][0] == first


@pytest.mark.parametrize("text", ["", "[]", '{"format": "batchnorm-bench", "version": 99}'])
def test_another_file_is_refused(text, tmp_path):
    (tmp_path / "other.json").write_text(text)
    with pytest.raises(RunError, match="table must be a results file of batchnorm bench"):
        read(tmp_path / "other.json")
