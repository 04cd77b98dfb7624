"""Every command and snippet of the README, run in a fresh copy of the repository, in order."""

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
# What installs, serves until it is stopped, or is this suite.
ELSEWHERE = ("python3 -m venv", "source ", "pip install", "tensorboard ")
# One process runs everything, so that PyTorch starts once; the drawn flowers are fewer.
BEGIN = """
import runpy, sys
from datasets.synthetic import SPLITS
SPLITS.update(train=70, val=70, test=70)
"""


def statements() -> list[str]:
    """The README's commands and snippets as Python, of one epoch where they train."""
    found = []
    for language, block in re.findall(r"^```(bash|python)\n(.*?)^```", README, re.M | re.S):
        if language == "python":
            found.append(re.sub(r"epochs=\d+", "epochs=1", block))
            continue
        for command in block.replace("\n", " && ").split(" && "):
            if command and not command.startswith(ELSEWHERE):
                python, *words = shlex.split(re.sub(r" --epochs \d+", "", command))
                assert python == "python", command
                if words[0] == "vae_training.py":  # one that goes on has one epoch more
                    words += ["--epochs=2" if "--resume" in words else "--epochs=1"]
                found.append(f"sys.argv = {words}\nrunpy.run_path({words[0]!r}, None, '__main__')")
    return found


@pytest.fixture
def copy(tmp_path) -> Path:
    """What a clone of the repository holds."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    for name in listed.stdout.splitlines():
        if (ROOT / name).is_file():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, tmp_path / name)
    return tmp_path


def test_every_command_and_snippet_works_as_pasted_without_a_network(copy):
    assert len(statements()) >= 10
    nowhere = {"http_proxy": "http://127.0.0.1:9", "https_proxy": "http://127.0.0.1:9"}
    search = {"PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", BEGIN + "\n".join(statements())]
    done = subprocess.run(
        command, cwd=copy, env=nowhere | search, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    written = set(re.findall(r"^\S+\.(?:png|html)$", done.stdout, re.M))
    assert len(written) > 4
    assert all((copy / name).stat().st_size > 1000 for name in written)
    command = ["git", "check-ignore", *written]
    ignored = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert set(ignored.stdout.splitlines()) == written


def anchors(path: Path) -> set[str]:
    """What links to the headings of a page in Markdown end in, as on GitHub."""
    headings = re.findall(r"^#+ (.*)$", path.read_text(encoding="utf-8"), re.M)
    return {re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", sorted([ROOT / "README.md", *ROOT.glob("results/*.md")]))
def test_every_file_and_heading_that_a_page_links_to_is_there(page):
    links = re.findall(r"\]\(([^):#]*)(?:#([^)]+))?\)", page.read_text(encoding="utf-8"))
    for name, heading in links:
        target = page.parent / name if name else page
        assert target.exists(), name
        assert not heading or heading in anchors(target), heading


def test_the_readme_is_at_most_170_lines_long():
    assert len(README.splitlines()) <= 170
