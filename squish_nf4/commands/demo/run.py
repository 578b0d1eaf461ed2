"""The demo: a real sentence model in NF4 against the dense one, then its checkpoint converted, verified, looked at.

Nothing is fetched: model.py finds the model in an installed package. print.py prints the report, and picture.py draws
the comparison.
"""

from __future__ import annotations

import copy
import os
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from squish_nf4.checkpoint.audit.inspection import Inspection, inspect
from squish_nf4.checkpoint.audit.verify import VerifyReport, verify
from squish_nf4.checkpoint.conversion.convert import convert
from squish_nf4.checkpoint.conversion.report import ConvertReport
from squish_nf4.commands.demo.agreement import Agreement, agreement_of
from squish_nf4.commands.demo.model import encode, load_model, model_folder, require_extras
from squish_nf4.commands.demo.sentences import SENTENCES
from squish_nf4.commands.inspect.page import write_page
from squish_nf4.model.quantize import quantize_model
from squish_nf4.model.report import QuantizeReport, weigh

Step = Callable[[str], AbstractContextManager[None]]

CHECKPOINT = "minilm-nf4"
PICTURE = "minilm-nf4.png"
PAGE = "minilm-nf4.html"
PATIENCE = 8.0  # seconds of timing, after which no further round begins


@dataclass(frozen=True)
class Seconds:
    """Median times of encoding all the sentences."""

    dense: float
    nf4: float


@dataclass(frozen=True)
class Conversion:
    """The model's checkpoint: converted, verified against the original, and inspected; page is what inspect wrote."""

    report: ConvertReport
    verification: VerifyReport
    inspection: Inspection
    page: Path


@dataclass(frozen=True)
class DemoReport:
    """What the demo found and made.

    Attributes:
        sentences: how many were encoded.
        model_bytes: the whole model before and after.
        quantized: its encoder, layer by layer.
        agreement: how close the embeddings of both models are.
        in_one_batch, one_by_one: how long both take for all the sentences.
        conversion: the model's checkpoint, converted.
        picture: the file that shows the comparison.
        seconds: what all of it took.
    """

    sentences: int
    model_bytes: tuple[int, int]
    quantized: QuantizeReport
    agreement: Agreement
    in_one_batch: Seconds
    one_by_one: Seconds
    conversion: Conversion
    picture: Path
    seconds: float

    @property
    def bits_per_weight(self) -> float:
        """Stored bits of a quantized layer's weight on average, scales included."""
        sizes = [layer.shape[0] * layer.shape[1] for layer in self.quantized.layers]
        bits = [layer.bits_per_weight for layer in self.quantized.layers]
        return sum(n * b for n, b in zip(sizes, bits, strict=True)) / sum(sizes)


def run(
    output: str | os.PathLike[str],
    *,
    sentences: Sequence[str] = SENTENCES,
    rounds: int = 7,
    step: Step = lambda text: nullcontext(),
) -> DemoReport:
    """Quantize, compare, draw, convert, verify, inspect. Leaves a picture, a checkpoint and its page.

    Args:
        output: a directory, made if need be. An earlier demo's results in it are replaced, and nothing else.
        sentences: an even number, paraphrases side by side.
        rounds: how often each model is timed; the two take turns.
        step: step("what") is entered for as long as that takes, for a progress display.

    Raises:
        ImportError: a package of the extra "demo" is missing; the text says what to type.
    """
    started = time.perf_counter()
    require_extras()
    output = Path(output)
    with step("Loading the sentence model all-MiniLM-L6-v2"):
        dense = load_model()
    with step("Quantizing its encoder to NF4"):
        nf4 = copy.deepcopy(dense)
        quantized = quantize_model(nf4[0].model.encoder)
    with step(f"Encoding {len(sentences)} sentences with both"):
        agreement = agreement_of(encode(dense, sentences), encode(nf4, sentences))
    with step("Timing both, in turn"):
        in_one_batch = time_both(dense, nf4, sentences, len(sentences), rounds)
        one_by_one = time_both(dense, nf4, sentences, 1, rounds)
    with step("Drawing the picture"):
        from squish_nf4.commands.demo.picture import draw

        output.mkdir(parents=True, exist_ok=True)
        picture = draw(output / PICTURE, quantized, agreement)
    with step("Converting its checkpoint"):
        converted = convert(model_folder(), output / CHECKPOINT, overwrite=True)
    with step("Verifying every byte of it against the original"):
        verification = verify(output / CHECKPOINT, model_folder())
    with step("Inspecting it"):
        inspection = inspect(output / CHECKPOINT, model_folder())
        page = write_page(inspection, output / PAGE)
    return DemoReport(
        sentences=len(sentences),
        model_bytes=(weigh(dense)[0], weigh(nf4)[0]),
        quantized=quantized,
        agreement=agreement,
        in_one_batch=in_one_batch,
        one_by_one=one_by_one,
        conversion=Conversion(converted, verification, inspection, page),
        picture=picture,
        seconds=time.perf_counter() - started,
    )


def time_both(dense: Any, nf4: Any, sentences: Sequence[str], batch_size: int, rounds: int) -> Seconds:
    """Time both models in turn, so that a change in the machine's speed meets both; fewer rounds on a slow machine."""
    times: tuple[list[float], list[float]] = ([], [])
    while len(times[0]) < rounds and (len(times[0]) < 3 or sum(map(sum, times)) < PATIENCE):
        for model, taken in zip((dense, nf4), times, strict=True):
            started = time.perf_counter()
            encode(model, sentences, batch_size)
            taken.append(time.perf_counter() - started)
    return Seconds(median(times[0]), median(times[1]))
