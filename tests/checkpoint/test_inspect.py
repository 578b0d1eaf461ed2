"""inspect: every number against a slow definition, with the source and without, and the three ways it is shown."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import warnings
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from typer.testing import CliRunner, Result

from squish_nf4 import NF4Linear
from squish_nf4.checkpoint.audit.inspection import Inspection, inspect
from squish_nf4.checkpoint.audit.measure import CELL_ERRORS, ERROR_EDGES, LEVELS
from squish_nf4.checkpoint.conversion.convert import convert
from squish_nf4.commands.cli import app
from squish_nf4.commands.inspect import page as inspect_page
from squish_nf4.commands.inspect import print as inspect_report
from tests.support import reference
from tests.support.directories import PACKED, SCALES, gaussian, save_shard, write_foreign_dir, write_small_dir

TENSORS = {
    "stack": gaussian(2, 3, 64, dtype=torch.bfloat16),
    "up.weight": gaussian(8, 64),
    "bias": gaussian(3),
    "ids": torch.arange(4),
    "zero": torch.zeros(4, 64),
}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("inspect")
    save_shard(folder / "model.safetensors", TENSORS)
    convert(folder / "model.safetensors", folder / "dir", group_size=16)
    return folder / "dir", folder / "model.safetensors"


def nibbles(packed: np.ndarray) -> list[int]:
    return [int(byte) >> shift & 15 for byte in packed.reshape(-1) for shift in (0, 4)]


def test_errors_are_those_of_the_definition(made: tuple[Path, Path]) -> None:
    report = inspect(*made)
    assert [tensor.name for tensor in report.tensors] == sorted(TENSORS)
    assert report.bases == ["measured"]
    for tensor, numbers in report.in_nf4:
        w = TENSORS[tensor.name].double().numpy().reshape(-1, 64)
        packed, scales = reference.quantize(w.astype(np.float32), 16)
        error = w - reference.dequantize(packed, scales, 16).astype(np.float64)
        norm = math.sqrt((w**2).sum())
        assert numbers.group_size == 16
        assert numbers.relative_rms == pytest.approx(math.sqrt((error**2).sum()) / norm if norm else 0, rel=1e-12)
        assert numbers.largest_error == np.abs(error).max()
        decoded = w - error
        norms = norm * math.sqrt((decoded**2).sum())
        assert numbers.cosine == pytest.approx((w * decoded).sum() / norms if norms else 1, rel=1e-12)
        assert list(numbers.indices) == np.bincount(nibbles(packed), minlength=16).tolist()
        assert numbers.scales == (scales.min(), np.median(scales), scales.max())
        assert tensor.bits_per_weight == 6
        by_group = (error**2).reshape(-1, 16).sum(1)
        norms_of_groups = (w**2).reshape(-1, 16).sum(1)
        relative = np.sqrt(by_group / np.where(norms_of_groups > 0, norms_of_groups, 1))
        assert list(numbers.group_errors) == np.histogram(relative, ERROR_EDGES)[0].tolist()
        order = np.argsort(-by_group)[: min(5, np.count_nonzero(by_group))]
        assert [(group.row, group.columns[0] // 16) for group in numbers.worst] == [divmod(int(n), 4) for n in order]
        for group, n in zip(numbers.worst, order, strict=True):
            assert group.columns[1] == group.columns[0] + 15
            assert group.scale == scales.reshape(-1)[n]
            assert group.relative_rms == pytest.approx(relative[n])
            assert group.share == pytest.approx(by_group[n] / by_group.sum())


def test_signal_to_noise_and_entropy(made: tuple[Path, Path]) -> None:
    numbers = {tensor.name: numbers for tensor, numbers in inspect(*made).in_nf4}
    up = numbers["up.weight"]
    assert up.snr == pytest.approx(-20 * math.log10(up.relative_rms))
    assert 3.5 < up.entropy < 4
    assert (numbers["zero"].snr, numbers["zero"].entropy) == (math.inf, 0)


def test_sums_are_of_all_tensors(made: tuple[Path, Path]) -> None:
    report = inspect(*made)
    assert report.weights == sum(tensor.numel() for tensor in TENSORS.values())
    assert report.nbytes == sum(file.stat().st_size for file in (made[0] / "tensors").glob("*.npy"))
    assert report.nf4_bits_per_weight == 6
    bits = 6 * (384 + 512 + 256) + 32 * 3 + 64 * 4
    assert report.bits_per_weight == pytest.approx(bits / report.weights)
    error, norm = 0.0, 0.0
    for name in ("stack", "up.weight"):
        w = TENSORS[name].double().numpy().reshape(-1, 64)
        error += ((w - reference.dequantize(*reference.quantize(w.astype(np.float32), 16), 16)) ** 2).sum()
        norm += (w**2).sum()
    assert report.relative_rms == pytest.approx(math.sqrt(error / norm))
    assert sum(report.indices) == 384 + 512 + 256


def test_without_the_source_it_takes_what_was_recorded(made: tuple[Path, Path]) -> None:
    measured, recorded = inspect(*made), inspect(made[0])
    assert recorded.bases == ["recorded"]
    for (_, a), (_, b) in zip(measured.in_nf4, recorded.in_nf4, strict=True):
        assert b.relative_rms == pytest.approx(a.relative_rms)
        assert (b.cosine, b.largest_error) == (None, None)
        assert b.indices == a.indices
    kept = {tensor.name: tensor for tensor in recorded.tensors if not tensor.nf4}
    assert (kept["ids"].stored_as, kept["ids"].reason) == ("int64", "int64 is not a floating-point type")
    assert kept["bias"].source_dtype == "float32"


@pytest.mark.parametrize("group_size", [8, 32, 64])
@pytest.mark.parametrize("kind", ["gaussian", "laplace", "uniform"])
def test_without_a_record_the_estimate_is_close(tmp_path: Path, kind: str, group_size: int) -> None:
    rng = np.random.default_rng(3)
    draw = {"gaussian": rng.standard_normal, "laplace": lambda n: rng.laplace(size=n), "uniform": rng.random}[kind]
    w = draw((64, 512)).astype(np.float32) - (0.5 if kind == "uniform" else 0)
    packed, scales = reference.quantize(w, group_size)
    path = write_foreign_dir(tmp_path / "dir", {"w__nf4": packed, "w__s_nf4": scales}, {"w": "w"})
    [(_, numbers)] = inspect(path).in_nf4
    error = np.linalg.norm(w - reference.dequantize(packed, scales, group_size)) / np.linalg.norm(w)
    assert numbers.basis == "estimated"
    assert numbers.relative_rms == pytest.approx(error, rel=0.05)


def test_the_error_of_a_cell_is_its_mean_square() -> None:
    x = np.linspace(-1, 1, 2_000_001)
    index = np.abs(x[:, None] - LEVELS[None, :]).argmin(1)
    for level in range(16):
        assert CELL_ERRORS[level] == pytest.approx(((x[index == level] - LEVELS[level]) ** 2).mean(), rel=1e-3)


@pytest.mark.parametrize("name", ["a__weight__nf4.npy", "a__weight__s_nf4.npy", "a__weight__shape.npy"])
def test_one_file_is_its_tensor(tmp_path: Path, name: str) -> None:
    path = write_small_dir(tmp_path / "dir")
    [tensor] = inspect(path / "tensors" / name).tensors
    assert (tensor.name, tensor.shape) == ("a.weight", (2, 3, 32))
    assert tensor.nf4 is not None
    assert list(tensor.nf4.indices) == np.bincount(nibbles(PACKED), minlength=16).tolist()


def test_the_state_of_a_quantized_model_is_seen_as_nf4(tmp_path: Path) -> None:
    layer = NF4Linear.from_linear(torch.nn.Linear(64, 8), group_size=32)
    save_file({f"up.{name}": tensor for name, tensor in layer.state_dict().items()}, tmp_path / "state.safetensors")
    save_file({"up.weight": layer.dequantize()}, tmp_path / "dense.safetensors")
    bias, weight = inspect(tmp_path / "state.safetensors", tmp_path / "dense.safetensors").tensors
    assert (bias.name, bias.stored_as, bias.nf4) == ("up.bias", "float32", None)
    assert (weight.name, weight.shape, weight.stored_as, weight.bits_per_weight) == ("up.weight", (8, 64), "nf4", 5)
    assert weight.nf4 is not None
    assert (weight.nf4.basis, weight.nf4.relative_rms, weight.nf4.snr) == ("measured", 0, math.inf)


def test_tied_names_are_shown_and_counted_once(tmp_path: Path) -> None:
    arrays = {"x__nf4": PACKED, "x__s_nf4": SCALES}
    report = inspect(write_foreign_dir(tmp_path / "dir", arrays, {"x": "x", "head": "x"}))
    assert [(tensor.name, tensor.tied_to) for tensor in report.tensors] == [("x", None), ("head", "x")]
    assert report.tensors[0].nf4 == report.tensors[1].nf4
    assert report.weights == PACKED.size * 2


def test_odd_groups_and_negative_scales_are_measured(tmp_path: Path) -> None:
    w = np.random.default_rng(1).standard_normal((4, 18)).astype(np.float32)
    packed, scales = reference.quantize(w, 3)
    arrays = {"w__nf4": 0xFF - packed, "w__s_nf4": -scales}
    save_file({"w": torch.from_numpy(w)}, tmp_path / "w.safetensors")
    path = write_foreign_dir(tmp_path / "dir", arrays, {"w": "w"})
    [(_, numbers)] = inspect(path, tmp_path / "w.safetensors").in_nf4
    decoded = reference.dequantize(0xFF - packed, -scales, 3)
    assert numbers.relative_rms == pytest.approx(np.linalg.norm(w - decoded) / np.linalg.norm(w))
    assert numbers.scales[2] == scales.max()


REFUSED = {
    "nothing": ("absent", FileNotFoundError, "absent is not a directory"),
    "no file": ("absent.npy", FileNotFoundError, "absent.npy does not exist"),
    "a text": ("notes.txt", ValueError, "is neither a squish directory nor a .npy, .npy.zst or .safetensors file"),
    "another array": ("alone.npy", ValueError, "alone.npy is in no squish directory"),
    "a file of no tensor": ("dir/tensors/x.npy", ValueError, "x.npy is of no tensor of"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_cannot_be_looked_at_is_refused(tmp_path: Path, kind: str) -> None:
    name, error, text = REFUSED[kind]
    path = write_small_dir(tmp_path / "dir")
    for place in (tmp_path / "alone.npy", path / "tensors" / "x.npy"):
        np.save(place, np.ones(3))
    (tmp_path / "notes.txt").touch()
    with pytest.raises(error, match=text):
        inspect(tmp_path / name)


def test_a_source_of_another_shape_is_refused(made: tuple[Path, Path], tmp_path: Path) -> None:
    save_file({"up.weight": torch.zeros(64, 8)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match=r"'up.weight' has shape \(8, 64\); in the source it is float32 \(64, 8\)"):
        inspect(made[0], tmp_path / "other.safetensors")


def invoke(*args: str | Path, columns: int = 120) -> Result:
    return CliRunner(env={"COLUMNS": str(columns)}).invoke(app, ["inspect", *map(str, args)])


def test_the_table_says_what_a_person_wants_to_know(made: tuple[Path, Path]) -> None:
    done = invoke(made[0], "--source", made[1])
    assert (done.exit_code, done.stderr) == (0, "")
    text = " ".join(done.stdout.replace("─", "").split())
    assert re.search(r"up.weight 16 6.00 0.0\d{3} 2\d\.\d 0.99\d{3} [▁▂▃▄▅▆▇█]{16} ", text)
    assert re.search(r"zero 16 6.00 0.0000 exact 1.00000 ▁▁▁▁▁▁▁█▁▁▁▁▁▁▁▁ ", text)
    assert re.search(
        r"worst group, measured row columns scale rel. RMS share of error (stack|up.weight) \d \d+-\d+ ", text
    )
    assert "kept as tensors bytes which float32 1 276 B bias int64 1 296 B ids" in text
    assert "5 tensors, 1,159 weights," in text
    assert "3 in NF4: 6.00 bits a weight, relative RMS error 0.0" in text
    assert "errors measured against the source" in text


def test_estimates_are_marked(tmp_path: Path) -> None:
    done = invoke(write_small_dir(tmp_path / "dir"))
    assert re.search(r"a\.weight +8 +8\.00 +~0\.0\d{3} ", done.stdout)
    assert "estimated from the cells of the levels; --source measures them" in done.stdout
    assert "worst group, estimated" in done.stdout


def test_errors_of_groups_are_never_said_to_be_recorded(made: tuple[Path, Path], measured: Inspection) -> None:
    for report, groups in ((measured, "measured"), (inspect(made[0]), "estimated")):
        page = inspect_page.render(report)
        assert f"Relative error of the groups, {groups}" in page
        assert f"the most of the error, {groups}, in the worst tensors" in page


def test_json_holds_every_number(made: tuple[Path, Path]) -> None:
    done = invoke(made[0], "--source", made[1], "--json")
    assert done.exit_code == 0
    table = json.loads(done.stdout)
    report = inspect(*made)
    assert table["weights"] == 1159
    assert table["errors"] == ["measured"]
    by_name = {tensor["name"]: tensor for tensor in table["tensors"]}
    for tensor, numbers in report.in_nf4:
        found = by_name[tensor.name]["nf4"]
        assert found["relative_rms"] == numbers.relative_rms
        assert found["cosine"] == numbers.cosine
        assert found["indices"] == list(numbers.indices)
        assert [group["row"] for group in found["worst"]] == [group.row for group in numbers.worst]
    assert by_name["zero"]["nf4"]["snr_db"] is None
    assert by_name["ids"]["nf4"] is None


@pytest.mark.parametrize(
    "recorded", [float("nan"), float("inf"), -1, -0.5, True, "0.1", pytest.param(10**400, id="large")]
)
def test_a_recorded_error_that_is_none_is_refused(made: tuple[Path, Path], tmp_path: Path, recorded: object) -> None:
    path = Path(shutil.copytree(made[0], tmp_path / "dir"))
    record(path, "stack", recorded)
    with pytest.raises(ValueError, match=r"dir/squish_nf4.json records the relative_error .* of tensor 'stack'; a fin"):
        inspect(path)


def record(path: Path, name: str, error: object) -> None:
    table = json.loads((path / "squish_nf4.json").read_text())
    table["tensors"][name]["relative_error"] = error
    (path / "squish_nf4.json").write_text(json.dumps(table))


@pytest.mark.parametrize("scale", [math.nan, math.inf, None], ids=["nan", "inf", "a vast error is recorded"])
@pytest.mark.parametrize("all_of_it", [False, True])
def test_what_is_no_finite_number_is_shown(
    made: tuple[Path, Path], tmp_path: Path, scale: float | None, all_of_it: bool
) -> None:
    path = Path(shutil.copytree(made[0], tmp_path / "dir"))
    for name in ("stack", "up.weight", "zero") if all_of_it else ("stack",):
        if scale is None:
            record(path, name, 1e308)
        else:
            file = path / "tensors" / f"{name.replace('.', '__')}__s_nf4.npy"
            scales = np.load(file)
            scales[: None if all_of_it else 1] = scale
            np.save(file, scales)
    if scale is not None:
        (path / "squish_nf4.json").unlink()
    done = invoke(path, "--json")
    assert done.exit_code == 0, done.stderr
    assert json.loads(done.stdout)["relative_rms"] is None
    assert invoke(path).exit_code == 0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Page(inspect_page.render(inspect(path)))


class Page(HTMLParser):
    """What a browser would fetch, the ids, and whether every tag is closed."""

    VOID = frozenset({"meta", "wbr", "path", "use", "rect"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.fetched: list[str] = []
        self.text: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.fetched += [
            str(value) for name, value in attrs if name in ("src", "href") and not str(value).startswith("#")
        ]
        if tag not in ("meta", "wbr"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.fetched += [str(value) for name, value in attrs if name in ("src", "href")]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)


@pytest.fixture(scope="module")
def measured(made: tuple[Path, Path]) -> Inspection:
    return inspect(*made)


def test_the_page_is_sound_and_needs_nothing_else(measured: Inspection) -> None:
    text = inspect_page.render(measured)
    page = Page(text)
    assert [link for link in page.fetched if not link.startswith("#")] == []
    assert "url(http" not in text
    assert text.count("<figure>") == 4
    words = " ".join("".join(page.text).split())
    for part in ("Tensors in NF4", "Kept tensors", "up.weight", "relative RMS error", "1,159", "measured against"):
        assert part in words


def test_the_pages_plots_take_their_colours_from_the_page(measured: Inspection) -> None:
    text = inspect_page.render(measured)
    for name in ("--ink", "--muted", "--faint", "--accent", "--warm"):
        assert f"var({name})" in text
        assert text.count(f"{name}: #") == 2  # light and dark
    assert not re.search("#0[1-5]0[1-5]0[1-5]", text)


def test_the_page_is_the_same_for_the_same_numbers(measured: Inspection) -> None:
    assert inspect_page.render(measured) == inspect_page.render(measured)


def test_names_are_text_in_the_page_and_in_the_table(tmp_path: Path) -> None:
    name = "<script>alert(1)</script>[bold]&"
    arrays = {"x__nf4": PACKED, "x__s_nf4": SCALES, "y__pt": np.ones(3)}
    path = write_foreign_dir(tmp_path / "<b>dir", arrays, {name: "x", "<i>kept": "y"})
    text = inspect_page.render(inspect(path))
    assert "<script>alert" not in text
    assert "<i>kept" not in text
    assert "&lt;script&gt;alert(1)" in text
    Page(text)
    assert "[bold]&" in invoke(path, columns=200).stdout


def test_a_page_is_drawn_of_one_tensor_and_of_none_in_nf4(tmp_path: Path) -> None:
    path = write_small_dir(tmp_path / "dir")
    assert inspect_page.render(inspect(path / "tensors" / "a__weight__nf4.npy")).count("<figure>") == 2
    assert "Nothing is in NF4." in inspect_page.render(inspect(path / "tensors" / "ids__pt.npy"))
    assert "<h1>empty in NF4</h1>" in inspect_page.render(inspect(write_foreign_dir(tmp_path / "empty", {}, {})))


def test_the_command_writes_the_page_over_an_earlier_one(made: tuple[Path, Path], tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    page.write_text("old")
    done = invoke(made[0], "--html", page)
    assert done.exit_code == 0
    assert f"Page written: {page}" in done.stderr
    assert page.read_text(encoding="utf-8").startswith("<!DOCTYPE html>")


def test_the_command_refuses_in_one_sentence(tmp_path: Path) -> None:
    done = invoke(tmp_path / "absent")
    assert (done.exit_code, done.stdout) == (1, "")
    assert done.stderr.splitlines() == [f"squish-nf4: {tmp_path / 'absent'} is not a directory"]


def test_a_narrow_terminal_gets_fewer_columns(made: tuple[Path, Path], tmp_path: Path) -> None:
    report = inspect(*made)
    for width, columns in ((70, 5), (100, 6), (120, 7), (160, 8)):
        assert len(inspect_report.nf4_table(report, width, bars=True).columns) == columns
    assert len(inspect_report.nf4_table(report, 120, bars=False).columns) == 6


def test_progress_is_told(made: tuple[Path, Path]) -> None:
    steps: list[tuple[str, int]] = []
    inspect(*made, progress=lambda progress: steps.append((progress.tensor, progress.bytes_done)))
    assert [name for name, _ in steps] == ["stack", "up.weight", "zero"]
    assert steps[0][1] == 0


def test_a_damaged_directory_is_refused(made: tuple[Path, Path], tmp_path: Path) -> None:
    path = Path(shutil.copytree(made[0], tmp_path / "dir"))
    (path / "tensors" / "stack__nf4.npy").write_bytes(b"")
    with pytest.raises(ValueError, match=r"stack__nf4.npy is no .npy file"):
        inspect(path)


def test_a_page_replaces_a_regular_file_alone(made: tuple[Path, Path], tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    for path, kind in ((pipe, "a pipe"), (Path("/dev/full"), "a device"), (tmp_path, "a directory")):
        before = path.stat()
        done = invoke(made[0], "--html", path)
        assert done.exit_code == 1
        assert done.stderr == f"squish-nf4: {path} is {kind}; only a regular file is replaced\n"
        assert (path.stat().st_ino, path.stat().st_mode) == (before.st_ino, before.st_mode)
    assert list(tmp_path.iterdir()) == [pipe]
