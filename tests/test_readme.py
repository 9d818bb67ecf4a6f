"""What the README and the docstrings show must exist: scripts, flags, files."""

import re
from dataclasses import fields
from pathlib import Path

import pytest

import common
import eval as evaluation
import stage0_data
import stage1_localize
import stage2_understand
import stage3_grpo

ROOT = Path(common.__file__).parent
SETTINGS = {
    "stage0_data.py": stage0_data.DataSettings,
    "stage1_localize.py": stage1_localize.LocalizeSettings,
    "stage2_understand.py": stage2_understand.UnderstandSettings,
    "stage3_grpo.py": stage3_grpo.GRPOSettings,
    "eval.py": evaluation.EvalSettings,
}
TEXTS = ["README.md", *SETTINGS]
COMMAND = re.compile(r"(?:python|torchrun [^\n]*?) (\w+\.py)([^\n&`#]*)")


def commands(name):
    return COMMAND.findall((ROOT / name).read_text(encoding="utf-8"))


def test_the_readme_shows_every_script():
    assert {script for script, _ in commands("README.md")} == set(SETTINGS)


@pytest.mark.parametrize("name", TEXTS)
def test_every_flag_that_is_shown_exists(name):
    found = commands(name)
    assert found
    for script, flags in found:
        known = {field.name for field in fields(SETTINGS[script])}
        for flag in re.findall(r"--([\w-]+)", flags):
            assert flag.replace("-", "_") in known, f"{name}: {script} has no --{flag}"


def test_flags_named_in_the_prose_exist():
    known = {field.name for settings in SETTINGS.values() for field in fields(settings)}
    for flag in re.findall(r"`--([\w-]+)", (ROOT / "README.md").read_text(encoding="utf-8")):
        assert flag.replace("-", "_") in known | {"nproc-per-node"}, flag


def test_every_file_of_the_map_exists():
    block = (ROOT / "README.md").read_text(encoding="utf-8").split("## Files")[1].split("```")[1]
    names = [line.split()[0] for line in block.strip().splitlines()]
    assert "common.py" in names
    for name in names:
        assert (ROOT / name).exists(), name


def test_requirements_are_pinned_exactly():
    lines = [x for x in (ROOT / "requirements.txt").read_text().splitlines() if x and not x.startswith("#")]
    assert "torch==2.13.0" in lines
    assert all(re.fullmatch(r"[\w-]+==[\w.]+", line) for line in lines)
