"""Put one slip at a time into the code and see a test fail: ``python -m tests.mutations``."""

import argparse
import random
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]


class Mutation(NamedTuple):
    """A slip: ``after`` in the place of ``before``, which stands once in ``file``.

    The tests in ``tests`` that have ``word`` in their names notice it.
    """

    file: str
    tests: str
    what: str
    before: str
    after: str
    word: str


TABLE = {
    ("vae/layers.py", "vae/test_layers.py"): [
        ("variance taken for standard deviation", "0.5 * log_var", "log_var", "posteriors_mean"),
    ],
    ("vae/losses.py", "vae/test_losses.py"): [
        ("the sign in the KL", "(log_var) - log_var", "(log_var) + log_var", "kl_of_each"),
    ],
    ("vae/vae.py", "vae/test_vae.py"): [
        (
            "height and width swapped",
            "Decoder(image_resolution",
            "Decoder(image_resolution[::-1]",
            "honoured",
        ),
    ],
    ("vae/evaluation.py", "vae/test_evaluation.py"): [
        ("the active units' threshold tenfold", "> 0.01)", "> 0.1)", "active_above"),
        ("evaluation in training mode", "model.eval()", "model.train()", "running_statistics"),
    ],
    ("vae/latent.py", "vae/test_latent.py"): [
        (
            "spherical steps without a guard for equal vectors",
            "angle.sin() < 1e-4",
            "False",
            "to_itself",
        ),
        ("the posteriors' own variances left out", " + variances.diag()", "", "moments_of_the"),
        (
            "shares around the prior",
            "latents.mean + latents.stddev * noise",
            "noise",
            "dimensions_vary",
        ),
        ("near without its centre", "(1 - kept - spread) * latents.mean + ", "", "in_between"),
    ],
    ("vae/training/options.py", "vae/training/test_options.py"): [
        ("beta never annealed", "epoch / self.warmup_epochs if", "1.0 if", "linear_beta"),
    ],
    ("vae/training/run.py", "vae/training/test_run.py"): [
        ("no test split in the pictures' checksum", "splits[:3]", "splits[:2]", "other_pictures"),
        (
            "one seed for weights and first epoch",
            "mixed[0]",
            "self.options.seed + epoch",
            "first_epoch",
        ),
        ("later TensorBoard events left in place", "min(events", "max(events", "to_the_byte"),
        (
            "an optimiser's state unchecked",
            "not same_kind(state[index][name], own)",
            "False",
            "moment",
        ),
    ],
    ("vae/training/checkpoint.py", "vae/training/test_checkpoint.py"): [
        ("the digest not checked", "mark and digest !=", "False and digest !=", "outside_of_the"),
        ("a checkpoint may run code", ", weights_only=True", ", weights_only=False", "run_code"),
    ],
    ("vae/training/report.py", "vae/training/test_report.py"): [
        (
            "validation on the test split",
            "s = evaluate(model, splits.val",
            "s = evaluate(model, splits.test",
            "curves_are",
        ),
        ("HParams with training scores", '["test"][name]', '["train"][name]', "hparams"),
        (
            "metrics at the annealed beta",
            "ELBOLoss(options.beta,",
            "ELBOLoss(options.beta_at(options.epochs - 1),",
            "final_beta",
        ),
        ("Projector's species off by one", "names[label]", "names[label - 1]", "own_species"),
        (
            "samples.png from the prior",
            "model.decoder(latents.sample((64,)))",
            "model.sample(64)",
            "64_samples",
        ),
    ],
    ("vae/training/command_line.py", "test_vae_inference.py"): [
        ("another default spread of similar", "0, 1), 0.3", "0, 1), 0.6", "eight_flowers"),
    ],
    ("datasets/pictures.py", "datasets/test_pictures.py"): [
        ("the rotations' range doubled", "ROTATION = 25.0", "ROTATION = 50.0", "documented_ranges"),
    ],
    ("datasets/preprocessing.py", "datasets/test_preprocessing.py"): [
        ("a cache's key without Pillow", "PIL.__version__.encode() + ", "", "version_of_pillow"),
        ("outdated caches left lying", "outdated.unlink()", "pass", "outdated_files"),
    ],
    ("datasets/flowers102.py", "datasets/test_flowers102.py"): [
        ("an unpacked archive fetched again", 'part != "image" or', "True or", "unpacked_already"),
    ],
    ("datasets/synthetic.py", "datasets/test_synthetic.py"): [
        ("one seed for all splits", "1 + SPLITS.index(split)", "1", "no_two_backgrounds"),
    ],
    ("vae_training.py", "vae/training/test_report.py"): [
        ("a renamed tag", "schedule/beta", "beta", "scalars_tags"),
    ],
    ("vae_training.py", "test_vae_training.py"): [
        ("augment never called", "if options.augment:", "if False:", "posts_loop"),
    ],
    ("vae_inference.py", "test_vae_inference.py"): [
        (
            "traverse's captions reversed",
            "steps.tolist()",
            "steps.flip(0).tolist()",
            "traverse_captions",
        ),
    ],
    ("vae/explore.html", "test_explore.py"): [
        ("the explorer's draws not normal", "-2 * Math.log", "-Math.log", "normal_draws"),
        (
            "the explorer's address line left as it was",
            "onchange: keep",
            "onchange: draw",
            "and_the_address",
        ),
    ],
}
MUTATIONS = [Mutation(*key, *slip) for key, slips in TABLE.items() for slip in slips]


def run_tests(mutations: Sequence[Mutation], slip: Mutation | None = None) -> int:
    """Return pytest's exit status for the mutations' tests in a copy of the repository with a slip.

    It is negative where a test crashes or hangs.
    """
    files = sorted({f"tests/{mutation.tests}" for mutation in mutations})
    words = " or ".join(mutation.word for mutation in mutations)
    command = [sys.executable, "-m", "pytest", "-qx", "-m", "not slow", *files, "-k", words]
    ignored = shutil.ignore_patterns(".*", "runs", "cache", "flowers-102")
    with tempfile.TemporaryDirectory() as scratch:
        copy = shutil.copytree(ROOT, Path(scratch) / "copy", ignore=ignored)
        if slip:
            text = (copy / slip.file).read_text(encoding="utf-8")
            text = text.replace(slip.before, slip.after)
            (copy / slip.file).write_text(text, encoding="utf-8")
        try:
            return subprocess.run(command, cwd=copy, capture_output=True, timeout=300).returncode
        except subprocess.TimeoutExpired:
            return -1


def misplaced() -> list[str]:
    """Name the mutations whose text does not stand exactly once in its file."""
    return [
        f"{each.what} ({each.file})"
        for each in MUTATIONS
        if (ROOT / each.file).read_text(encoding="utf-8").count(each.before) != 1
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    everything, today = len(MUTATIONS), date.today().toordinal()
    parser.add_argument("--sample", type=int, default=everything, help="how many (default: all)")
    parser.add_argument("--seed", type=int, default=today, help="of the sample (default: today's)")
    options = parser.parse_args()
    if lost := misplaced():
        sys.exit(f"not exactly once in its file: {', '.join(lost)}")
    print(f"{options.sample} of {everything} mutations, seed {options.seed}")
    sample = random.Random(options.seed).sample(MUTATIONS, options.sample)
    if run_tests(sample):
        sys.exit("a test fails without any mutation: mend that first")
    missed = 0
    for mutation in sample:
        status = run_tests([mutation], mutation)
        noticed = status == 1 or status < 0  # others: nothing ran
        missed += not noticed
        print("noticed" if noticed else "MISSED ", f"{mutation.what} ({mutation.file})", flush=True)
    if missed:
        sys.exit(f"{missed} mutations were not noticed")


if __name__ == "__main__":
    main()
