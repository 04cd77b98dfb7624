"""Break the code in one place at a time and see a test fail: ``python -m tests.mutations``."""

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]


class Mutation(NamedTuple):
    what: str
    file: str
    before: str
    after: str
    tests: str


MUTATIONS = (
    Mutation(
        "the sign of the log-variance in the KL",
        "vae/losses.py",
        "torch.expm1(log_var) - log_var",
        "torch.expm1(log_var) + log_var",
        "tests/vae/test_losses.py",
    ),
    Mutation(
        "variance taken for standard deviation",
        "vae/layers.py",
        "torch.exp(0.5 * log_var)",
        "torch.exp(log_var)",
        "tests/vae/test_layers.py",
    ),
    Mutation(
        "height and width swapped",
        "vae/layers.py",
        "(64, height // 8, width // 8)",
        "(64, width // 8, height // 8)",
        "tests/vae/test_layers.py",
    ),
    Mutation(
        "the reconstruction loss averaged over pixels",
        "vae/losses.py",
        "torch.square(original - reconstruction).sum(dim=(1, 2, 3))",
        "torch.square(original - reconstruction).mean(dim=(1, 2, 3))",
        "tests/vae/test_losses.py",
    ),
    Mutation(
        "red and blue swapped on the way to the model",
        "datasets/pictures.py",
        "pixels.movedim(-1, -3).float()",
        "pixels.flip(-1).movedim(-1, -3).float()",
        "tests/datasets",
    ),
    Mutation(
        "a kept file served for another source",
        "datasets/preprocessing.py",
        'kept["key"] == key and',
        "",
        "tests/datasets/test_preprocessing.py",
    ),
    Mutation(
        "a random state not restored",
        "vae_training.py",
        'self.noise.set_state(checkpoint["random"]["noise"])',
        "pass",
        "tests/test_vae_training.py",
    ),
    Mutation(
        "the position in the epoch not restored",
        "vae_training.py",
        "islice(self.loader, self.batch, None)",
        "islice(self.loader, 0, None)",
        "tests/test_vae_training.py",
    ),
    Mutation(
        "the rename before the flush",
        "vae/checkpoint.py",
        "yield file\n",
        "os.replace(temporary, path)\n            yield file\n",
        "tests/vae/test_checkpoint.py",
    ),
    Mutation(
        "checkpoints that may run code",
        "vae/checkpoint.py",
        'map_location="cpu", weights_only=True',
        'map_location="cpu", weights_only=False',
        "tests/vae/test_checkpoint.py",
    ),
    Mutation(
        "TensorBoard's later points left in place",
        "vae_training.py",
        "drop_later_events(folder, events)\n        for",
        "for",
        "tests/test_vae_training.py",
    ),
    Mutation(
        "evaluation in training mode",
        "vae/evaluation.py",
        "    model.eval()\n",
        "",
        "tests/vae/test_evaluation.py",
    ),
    Mutation(
        "beta never annealed",
        "vae_training.py",
        "self.loss.beta = options.beta * share",
        "self.loss.beta = options.beta",
        "tests/test_vae_training.py",
    ),
)


def tests_fail(folder: Path, tests: str) -> bool:
    """Return whether a test fails, or hangs, with the repository in ``folder``."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-m", "not slow", *tests.split()]
    try:
        return subprocess.run(command, cwd=folder, capture_output=True, timeout=90).returncode == 1
    except subprocess.TimeoutExpired:
        return True


def is_noticed(mutation: Mutation) -> bool:
    """Return whether a test fails in a copy of the repository with the mutation in it."""
    with tempfile.TemporaryDirectory() as scratch:
        copy = Path(scratch) / "copy"
        ignored = shutil.ignore_patterns(".git", ".venv", "runs", "cache", "flowers-102")
        shutil.copytree(ROOT, copy, ignore=ignored)
        path = copy / mutation.file
        text = path.read_text()
        if mutation.before not in text:
            sys.exit(f"{mutation.what}: {mutation.before!r} is no longer in {mutation.file}")
        path.write_text(text.replace(mutation.before, mutation.after, 1))
        return tests_fail(copy, mutation.tests)


def main() -> None:
    if tests_fail(ROOT, " ".join(sorted({mutation.tests for mutation in MUTATIONS}))):
        sys.exit("a test fails without any mutation: mend that first")
    missed = 0
    for mutation in MUTATIONS:
        noticed = is_noticed(mutation)
        missed += not noticed
        print(
            f"{'noticed' if noticed else 'MISSED '}  {mutation.what} ({mutation.file})", flush=True
        )
    sys.exit(f"{missed} of {len(MUTATIONS)} mutations were not noticed" if missed else 0)


if __name__ == "__main__":
    main()
