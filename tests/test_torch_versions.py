"""scripts/torch_versions.py: what is taken for the newest versions and for a CPU build, and the table."""

import importlib.util
import json
from pathlib import Path

import pytest

SPEC = importlib.util.spec_from_file_location(
    "torch_versions", Path(__file__).parent.parent / "scripts" / "torch_versions.py"
)
script = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(script)


def test_the_newest_release_of_each_minor_version():
    listing = "torch (2.14.1)\nAvailable versions: 2.14.1, 2.14.0, 2.13.0+cpu, 2.13.0, 2.10.0, 2.9.1, 1.13.1\n"
    assert script.newest(listing, "2.10") == ["2.10.0", "2.13.0", "2.14.1"]
    assert script.newest("ERROR: no such package", "2.10") == []


@pytest.mark.parametrize(
    ("needs", "found"),
    [
        (["filelock", "sympy>=1.13"], ""),
        (["filelock", "nvidia-cublas==13; python_version > '3'"], "nvidia-cublas"),
        (["cuda-toolkit[cudart]==13"], "cuda-toolkit"),
        (["nvidia-cublas==13; platform_machine == 'none'", "nvidia-nccl; extra == 'all'"], ""),
    ],
)
def test_a_cpu_build_needs_no_cuda_package_here(tmp_path, needs, found):
    report = tmp_path / "report.json"
    report.write_text(json.dumps({"install": [{"metadata": {"requires_dist": needs}}]}))
    assert script.cuda_needed(report) == found


def test_results_count_errors_as_failures(tmp_path):
    junit = tmp_path / "results.xml"
    assert "did not end" in script.results(junit)
    junit.write_text('<testsuites><testsuite tests="10" failures="1" errors="2" skipped="3"/></testsuites>')
    assert script.results(junit) == "4 · 3 · 3"


def test_the_table_takes_the_old_ones_place(tmp_path):
    rows = {
        "a": "abc\t2.13.0\t3.11\t2026-01-02\t5 · 0 · 1\t2.13.0+cpu",
        "b": "abc\t2.9.0\t3.11\t2026-01-02\t4 · 0 · 2\t2.9.0+cpu",
        "c": "abc\t2.10.0\t3.12\t2026-01-02\tnot run\tno build",
        "d": "abc\t2.11.0\t3.12\t2026-01-02\tnot run\tno build",
    }
    for name, row in rows.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "row").write_text(row)
    page = tmp_path / "page.md"
    page.write_text(f"before\n{script.BEGIN}\nold\n{script.END}\nafter\n")
    for _ in range(2):
        script.write_table(tmp_path, page)
        text = page.read_text()
        assert text.startswith("before\n")
        assert text.endswith("\nafter\n")
        assert "old" not in text
        assert text.index("2.9.0+cpu") < text.index("2.13.0+cpu")
        assert "Python 3.12, torch 2.10.0, 2.11.0: no build (2026-01-02)." in text
        assert text.count("not run") == 0
