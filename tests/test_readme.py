"""Every command and snippet of the README, run in a fresh copy of the repository, in order."""

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
# Commands of the README by their language.
BLOCKS = re.findall(r"^```(bash|python)\n(.*?)^```", README, re.M | re.S)
COMMANDS = [
    command
    for language, block in BLOCKS
    if language == "bash"
    for line in block.splitlines()
    for command in line.split(" && ")
]
# What installs, serves until it is stopped, or is this suite.
ELSEWHERE = ("pip install", "tensorboard ", "jupyter ", "python -m pytest")


@pytest.fixture(scope="module")
def copy(tmp_path_factory) -> Path:
    """What a clone of the repository holds."""
    folder = tmp_path_factory.mktemp("clone") / "copy"
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    for name in listed.stdout.splitlines():
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, folder / name)
    # Flowers that were drawn before, by the same code, need not be drawn again.
    if (ROOT / "datasets" / "cache").exists():
        shutil.copytree(ROOT / "datasets" / "cache", folder / "datasets" / "cache")
    return folder


def run(command: list[str], folder: Path) -> str:
    """Run a command without a network, and return what it printed."""
    nowhere = {"http_proxy": "http://127.0.0.1:9", "https_proxy": "http://127.0.0.1:9"}
    search = {"PATH": f"{Path(sys.executable).parent}:/usr/bin:/bin", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, cwd=folder, env=nowhere | search, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_every_command_works_as_pasted(copy):
    commands = [each for each in COMMANDS if not each.startswith(ELSEWHERE)]
    assert len(commands) >= 8
    written = set()
    for command in commands:
        words = shlex.split(command)
        assert words[0] == "python", command
        long = "vae_training.py" in words and "--help" not in words
        printed = run([*words, *(["--epochs", "2"] if long else [])], copy)
        for name in re.findall(r"^\S+\.(?:png|html)$", printed, re.M):
            assert (copy / name).stat().st_size > 1000
            written.add(name)
    ignored = subprocess.run(
        ["git", "check-ignore", *written], cwd=ROOT, capture_output=True, text=True
    )
    assert set(ignored.stdout.splitlines()) == written
    assert len(written) > 4


@pytest.mark.slow
def test_every_snippet_works(copy):
    snippets = [block for language, block in BLOCKS if language == "python"]
    assert snippets
    for snippet in snippets:
        run([sys.executable, "-c", re.sub(r"epochs=\d+", "epochs=1", snippet)], copy)


def test_every_file_that_the_readme_links_to_is_there():
    links = re.findall(r"\]\(([^)#:]+)\)", README)
    assert len(links) >= 10
    for link in links:
        assert (ROOT / link).exists(), link


def test_the_readme_is_at_most_150_lines_long():
    assert len(README.splitlines()) <= 150
