"""What the README and the docstrings show must exist: scripts, flags, files."""

import random
import re
from collections import Counter
from dataclasses import fields
from pathlib import Path

import numpy as np
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
    found = COMMAND.findall((ROOT / name).read_text(encoding="utf-8"))
    return [(script, flags) for script, flags in found if script != "reader.py"]  # ScanNet's own


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
    assert all(re.fullmatch(r"[\w-]+==[\w.]+(; .*)?", line) for line in lines)


def test_the_question_type_of_the_readme_works_as_it_is_shown():
    """A cupboard is taller than a table, which is as tall as a desk: the code block is run behind stage 0's own names."""
    code = re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)[1]
    names = vars(stage0_data) | {"GENERATORS": {}}
    exec(code, names)
    assert list(names["GENERATORS"]) == ["taller"] and len(code.splitlines()) < 40
    heights = {"cupboard": 2.0, "table": 0.8, "desk": 0.75}
    objects = [
        stage0_data.Object(i, label, None, np.zeros(3), np.eye(3), np.array([1, 1, height]))
        for i, (label, height) in enumerate(heights.items(), 1)
    ]
    room = stage0_data.Room("scene0001_00", objects, [], None, None, 20.0, (4.0, 5.0), Counter(heights.keys()), Counter())
    rows = list(names["GENERATORS"]["taller"].generate(stage0_data.View(room, "video", [], [], [], random.Random(0))))
    assert rows.count("nearly the same height") == 1 and len(rows) == 3
    for row in rows:
        if isinstance(row, dict):
            assert dict(option.split(". ") for option in row["options"])[row["answer"]] == "cupboard"
            assert row["question"].startswith("Which is taller, the ") and row["thought"].endswith(": cupboard")
