"""The study in its quick mode: every setting trained, the table and both figures written."""

import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_a_quick_study_leaves_its_table_and_figures_and_trains_nothing_twice(tmp_path):
    command = [sys.executable, ROOT / "benchmarks" / "practical_aspects.py", "--quick"]
    command += ["--log-dir", tmp_path]
    first = subprocess.run(command, check=True, capture_output=True, text=True)
    folder = tmp_path / "quick"
    table = (folder / "practical_aspects.md").read_text()
    assert first.stdout.count("seed 0: done") == 15
    assert table.count("\n| ") == 17
    for setting in ("the post", "sigma likelihood, beta 1", "64x64 pictures", "--preset best"):
        assert f"\n| {setting} | 10 | " in table
    for name in ("practical_aspects.png", "kl_story.png"):
        with Image.open(folder / name) as figure:
            assert min(figure.size) > 300

    again = subprocess.run(command, check=True, capture_output=True, text=True)
    assert "done" not in again.stdout
    assert (folder / "practical_aspects.md").read_text() == table
