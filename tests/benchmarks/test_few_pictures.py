"""The study of few pictures, with a small Flowers102 and runs of an epoch."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

from scipy.io import loadmat
from torchvision.datasets import Flowers102

from benchmarks.few_pictures import COUNTS, WAYS, copy_photographs, table, train_all
from benchmarks.practical_aspects import run_folder
from datasets.memory import InMemory
from datasets.preprocessing import image_pipeline
from vae.checkpoint import load_model
from vae.command_line import INCLUDED
from vae.evaluation import evaluate
from vae.losses import ELBOLoss
from vae.run import own_random
from vae_training import BEST

SHORT = {"short": replace(BEST, epochs=1), "shorter": replace(BEST, epochs=1, batch_size=8)}


def test_the_photographs_are_of_the_test_split_and_more_are_those_and_others(data_root, tmp_path):
    for count in (12, 30):
        copy_photographs(count, data_root, tmp_path / str(count))
    few, many = ({path.name for path in (tmp_path / count).iterdir()} for count in ("12", "30"))
    numbers = loadmat(data_root / "flowers-102" / "setid.mat")["tstid"].flatten()
    assert (len(few), len(many)) == (12, 30)
    assert few < many <= {f"image_{number:05d}.jpg" for number in numbers}


def test_each_error_is_its_models_on_the_validation_photographs(data_root, tmp_path):
    with ThreadPoolExecutor(1) as pool:
        errors = train_all(SHORT, (34,), data_root, tmp_path, pool)
        assert train_all(SHORT, (34,), data_root, tmp_path, pool) == errors
    assert len(set(errors.values())) == len(SHORT)
    val = InMemory(Flowers102(data_root, "val", image_pipeline((32, 32))), progress=False)
    for (name, count), error in errors.items():
        model = load_model(run_folder(tmp_path, f"{count} {name}", 0) / "checkpoint.pt").model
        with own_random():
            expected = evaluate(model, val.batches(), ELBOLoss(BEST.beta))["squared_error_mean"]
        assert error == expected


def test_the_table_has_a_row_for_each_way_and_a_column_for_each_number():
    errors = {("a", 100): 74.84, ("a", 200): 72.5, ("b", 100): 70.06, ("b", 200): 69.0}
    assert table(errors).splitlines() == [
        "| | 100 | 200 |",
        "| --- | ---: | ---: |",
        "| a | 74.8 | 72.5 |",
        "| b | 70.1 | 69.0 |",
    ]


def test_the_ways_are_the_best_setting_more_steps_and_the_included_model():
    best, more_steps, from_ten = WAYS.values()
    assert best == BEST
    assert replace(more_steps, batch_size=BEST.batch_size) == BEST
    assert 4 * more_steps.batch_size == BEST.batch_size
    assert from_ten.start_from == INCLUDED["ten"]
    assert tuple(sorted(COUNTS)) == COUNTS
