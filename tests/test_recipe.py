"""The README's own question type: its block, pasted where the README says, is all that a new type needs."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

import common
import stage0_data
from support import scannet

ROOT = Path(common.__file__).parent
BEHIND_THE_TABLE = "\n# " + "-" * 96 + "\n# 5. Rows and files\n"


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """A copy of the project with the README's block pasted in, in which stage 0 has made a small toy."""
    folder = tmp_path_factory.mktemp("project")
    for path in ROOT.glob("*.py"):
        shutil.copy(path, folder)
    shutil.copytree(ROOT / "support", folder / "support", ignore=shutil.ignore_patterns("__pycache__"))
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    (block,) = [block for block in blocks if "def taller" in block]
    script = folder / "stage0_data.py"
    code = script.read_text(encoding="utf-8")
    assert code.count(BEHIND_THE_TABLE) == 1
    script.write_text(code.replace(BEHIND_THE_TABLE, f"\n\n{block}\n{BEHIND_THE_TABLE}"), encoding="utf-8")
    flags = "--rooms 6 --heldout_rooms 2 --base_steps 1 --traces 5 --processes 1".split()
    done = subprocess.run(
        [sys.executable, str(script), *flags], cwd=folder, env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, timeout=280,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


def rows_of(data, kind):
    """The rows of a question type."""
    return [row for row in common.read_jsonl(data / common.FILES["spatial"]) if row["question_type"] == kind]


def test_a_pasted_type_yields_rows_that_every_stage_reads(project):
    data = project / "data" / "toy"
    taller = [example for example in common.read_examples(data, "spatial") if example.question_type == "taller"]
    counts = Counter(example.images for example in taller)  # toy=1: at most one about a picture, six about several
    assert taller and all(count <= (1 if len(images) == 1 else 6) for images, count in counts.items())
    for example in taller:
        assert example.question.startswith("Which is taller, the ") and len(example.options) == 2
        right, wrong = f"<answer>{example.answer}</answer>", f"<answer>{'AB'.replace(example.answer, '')}</answer>"
        assert common.score_answers([right, wrong], [example, example])[0].tolist() == [1, 0]
    assert any("Which is taller" in example.question for example in common.read_examples(data, "worked"))


def test_a_pasted_type_is_counted_in_the_manifest(project):
    counts = json.loads((project / "data" / "toy" / "manifest.json").read_text())["counts"]["train"]
    assert counts["by_type"]["taller"] == len(rows_of(project / "data" / "toy", "taller")) > 0
    assert any(reason.endswith(": taller: nearly the same height") for reason in counts["rejected"])


def test_the_answer_is_the_taller_object_of_the_mesh(project):
    data = project / "data" / "toy"
    for row in rows_of(data, "taller"):
        folder = data / "scans" / row["image"][0].split("/")[0]
        objects = stage0_data.read_scannet(folder, scannet.read_labels(data / "labels.tsv")).objects
        heights = {thing.label: np.ptp(thing.points[:, 2]) for thing in objects}
        first, second = (heights[option[3:]] for option in row["options"])
        assert (first > second) == (row["answer"] == "A") and abs(first - second) >= 0.199
