"""Bad input and what happens to it: the table of results/promises.md, each row of it run.

``python -m tests.test_bad_inputs`` prints the table.
"""

import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TRAINING = (
    ("--epochs 0", "--epochs is 0: 1 to 1000000 is needed"),
    ("--epochs many", "argument --epochs: invalid int value: 'many'"),
    ("--image-size 30", "--image-size is 30: a multiple of 8 is needed"),
    ("--latent-size 0", "--latent-size is 0: 1 to 1000000 is needed"),
    ("--batch-size -1", "--batch-size is -1: 1 to 1000000 is needed"),
    ("--beta -1", "--beta is -1.0: a number of at least 0 is needed"),
    ("--learning-rate nan", "--learning-rate is nan: a number above 0 is needed"),
    ("--seed -1", "--seed is -1: 0 to 2**32 - 1 is needed"),
    (
        "--beta-schedule linear --warmup-epochs 9 --epochs 5",
        "--warmup-epochs is 9: 0 to 5 (--epochs) is needed",
    ),
    ("--beta-schedule cyclical --cycles 0", "--cycles is 0: 1 to 1000000 is needed"),
    (
        "--beta-schedule steep",
        "--beta-schedule is 'steep': one of constant, linear, cyclical is needed",
    ),
    (
        "--likelihood laplace",
        "--likelihood is 'laplace': one of gaussian, bernoulli, sigma is needed",
    ),
    ("--preset worst", "argument --preset: invalid choice: 'worst' (choose from "),
    ("--device abacus", "--device is 'abacus': auto, cpu, cuda, cuda:1, mps or xpu is needed"),
    ("--device cuda:99", "device cuda:99 is not available here: "),
    (
        "--run-name ../elsewhere",
        "--run-name is '../elsewhere': letters, digits and _ . + = - with no dot first or last is "
        "needed",
    ),
    ("--image-size 80000", "pictures of 80000x80000 need "),
    (
        "--resume nowhere",
        "nowhere/checkpoint.pt does not exist: a checkpoint.pt of a run is needed",
    ),
    ("--overwrite --resume run", "argument --resume: not allowed with argument --overwrite"),
)


def table() -> str:
    rows = ["| `python vae_training.py` | one line, exit status 2 |", "| --- | --- |"]
    for arguments, message in TRAINING:
        more = " …" if message.endswith(" ") else ""
        rows.append(f"| `{arguments}` | {message.strip().replace('|', '')}{more} |")
    return "\n".join(rows)


@pytest.mark.parametrize(("arguments", "message"), TRAINING)
def test_bad_input_is_answered_by_one_line_and_status_2(arguments, message, tmp_path, capsys):
    from vae_training import main  # not above: the table needs no PyTorch

    with pytest.raises(SystemExit) as stopped:
        main([*shlex.split(arguments), "--dataset", "synthetic", "--log-dir", str(tmp_path)])
    (line,) = capsys.readouterr().err.splitlines()
    assert stopped.value.code == 2
    assert line.startswith(f"{Path(sys.argv[0]).name}: error: {message}")
    assert message.endswith(" ") or line.endswith(message)
    assert list(tmp_path.iterdir()) == []


def test_the_page_of_promises_shows_these_answers():
    assert table() in (ROOT / "results" / "promises.md").read_text()


def test_the_table_is_made_by_running_this_file():
    printed = subprocess.run(
        [sys.executable, "-m", "tests.test_bad_inputs"], cwd=ROOT, capture_output=True, text=True
    )
    assert printed.stdout.strip() == table()


if __name__ == "__main__":
    print(table())
