"""Messages name a function's parameters; on the command line they name its flags."""

import inspect
import re

import pytest

from batchnorm.cli.analyze_command import analyze
from batchnorm.cli.bench_command import bench
from batchnorm.cli.doctor_command import doctor
from batchnorm.cli.flags import with_flags
from batchnorm.cli.study_command import study


@pytest.mark.parametrize(
    ("sentence", "shown"),
    [
        ("1 seeds, study(seeds=…), give 2", "1 seeds, --seeds, give 2"),
        (
            "is there, study(out=a (1)), continue with study(resume=True)",
            "is there, --out a (1), continue with --resume",
        ),
        ("batch of 1, study(batch_size=1), more", "batch of 1, --batch-size 1, more"),
        ("no such thing, subject(target=…) x:y, name it", "no such thing, doctor x:y, name it"),
        ("no number, analyze(target=x), give one", "no number, --target x, give one"),
        ("no column, analyze(table=r.csv), name it", "no column, analyze r.csv, name it"),
        ("none, diagnose(batches=…), pass some", "none, --data, pass some"),
        ("no flag, diagnose(process_group=…), init", "no flag, diagnose(process_group=…), init"),
        ("raises (net(seeds=3) failed), correct it", "raises (net(seeds=3) failed), correct it"),
    ],
)
def test_parameters_become_flags(sentence, shown):
    assert with_flags(sentence) == shown


@pytest.mark.parametrize("command", [study, analyze, bench, doctor])
def test_every_option_has_its_flag(command):
    names = set(inspect.signature(command).parameters) - {"as_json", "as_sarif", "explain", "fix"}
    for name in names - ({"target"} if command is doctor else {"table"}):
        assert with_flags(f"study({name}=…)") == f"--{name.replace('_', '-')}"
    assert not re.search(r"\(\w+=", with_flags("page(code=BN999), give another"))
