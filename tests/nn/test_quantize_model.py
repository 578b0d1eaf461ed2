"""quantize_model and dequantize_model: what is replaced, what is left alone and why, and what the report says."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from squish_nf4 import NF4Linear, dequantize_model, quantize_model
from tests.support.helpers import names, reasons, require_transformers


class Block(nn.Module):
    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.up = nn.Linear(width, 128)
        self.down = nn.Linear(128, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.relu(self.up(x)))


class Model(nn.Module):
    """Small, with everything a language model has by name."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, 64)
        self.layers = nn.ModuleList([Block(), Block()])
        self.norm = nn.LayerNorm(64)
        self.lm_head = nn.Linear(64, 50, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        for layer in self.layers:
            x = layer(x)
        return self.lm_head(self.norm(x))


BLOCKS = ["layers.0.up", "layers.0.down", "layers.1.up", "layers.1.down"]
TOKENS = torch.arange(10).reshape(2, 5)


def kinds(model: nn.Module) -> dict[str, type]:
    return {name: type(module) for name, module in model.named_modules()}


# --- what is replaced -------------------------------------------------------------------------------------------------


def test_linears_are_replaced_in_place_and_the_model_still_works() -> None:
    model = Model().eval()
    before, layers = model(TOKENS), model.layers
    report = quantize_model(model)
    assert names(report) == [name for name, module in model.named_modules() if type(module) is NF4Linear] == BLOCKS
    assert model.layers is layers
    error = (model(TOKENS) - before).norm() / before.norm()
    assert 0 < error.item() < 0.1
    assert not model.layers[0].up.training


def test_output_heads_and_embeddings_are_left_alone_with_a_reason() -> None:
    model = Model()
    report = quantize_model(model)
    assert reasons(report) == {
        "embed": "Embedding is not nn.Linear",
        "lm_head": "an output head; name it in only to quantize it",
    }
    assert type(model.lm_head) is nn.Linear


def test_only_may_name_the_output_head() -> None:
    model = Model()
    report = quantize_model(model, only="lm_head")
    assert names(report) == ["lm_head"]
    assert reasons(report)["layers.0.up"] == "only does not name it"
    assert model(TOKENS).shape == (2, 5, 50)


@pytest.mark.parametrize(
    ("patterns", "skipped"),
    [
        ("up", ["layers.0.up", "layers.1.up"]),
        ("layers.0", ["layers.0.up", "layers.0.down"]),
        (["layers.0", "layers.1.up"], ["layers.0.up", "layers.0.down", "layers.1.up"]),
        ("*.down", ["layers.0.down", "layers.1.down"]),
        ("layers.?.up", ["layers.0.up", "layers.1.up"]),
        ("layers", BLOCKS),
        ((), []),
    ],
    ids=["name", "prefix", "two", "glob", "question mark", "all", "none"],
)
def test_skip_and_only_are_opposites(patterns: Any, skipped: list[str]) -> None:
    report = quantize_model(Model(), skip=patterns)
    assert names(report) == [name for name in BLOCKS if name not in skipped]
    assert sorted(name for name, reason in reasons(report).items() if reason == "skip names it") == sorted(skipped)
    if patterns:
        assert sorted(names(quantize_model(Model(), only=patterns))) == sorted(skipped)


def test_skip_wins_over_only() -> None:
    assert names(quantize_model(Model(), only="layers.0", skip="up")) == ["layers.0.down"]


UNMATCHED = ["attention", "layers.2", "*.upp", "ayers", "layers.0.u"]


@pytest.mark.parametrize("pattern", UNMATCHED)
def test_a_pattern_of_only_that_matches_nothing_is_an_error_and_changes_nothing(pattern: str) -> None:
    model = Model()
    before = kinds(model)
    with pytest.raises(ValueError, match="quantize_model: ") as caught:
        quantize_model(model, only=["layers", pattern])
    assert str(caught.value) == f"quantize_model: only pattern '{pattern}' matches no module of this model"
    assert kinds(model) == before


@pytest.mark.parametrize("pattern", UNMATCHED)
def test_a_pattern_of_skip_that_matches_nothing_is_noted(pattern: str) -> None:
    report = quantize_model(Model(), skip=["layers.0", pattern])
    assert report.notes == (f"skip pattern '{pattern}' matches no module of this model",)
    assert names(report) == [name for name in BLOCKS if not name.startswith("layers.0")]


def test_lazy_modules_are_left_alone() -> None:
    model = nn.Sequential(nn.LazyConv2d(3, 3), nn.LazyLinear(8), nn.Linear(64, 64))
    report = quantize_model(model)
    assert names(report) == ["2"]
    assert reasons(report)["1"] == "it is not initialized yet: run the model once first"


# --- left alone -------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype stage:UserWarning")
def test_attention_and_encoder_layers_are_left_alone_and_work_in_train_and_eval() -> None:
    layer = nn.TransformerEncoderLayer(64, 4, 128, dropout=0.0, batch_first=True)
    model = nn.Sequential(nn.Linear(64, 64), nn.TransformerEncoder(layer, 2), nn.MultiheadAttention(64, 4))
    dense = copy.deepcopy(model)
    report = quantize_model(model)
    assert names(report) == ["0"]
    found = reasons(report)
    assert found["1.layers.0.self_attn.out_proj"] == "nn.MultiheadAttention reads its weight itself"
    assert found["2.out_proj"] == "nn.MultiheadAttention reads its weight itself"
    for name in ("linear1", "linear2"):
        assert found[f"1.layers.1.{name}"] == "the fast path of nn.TransformerEncoderLayer reads its weight itself"
    assert found["2"] == "MultiheadAttention is not nn.Linear"
    x = torch.randn(2, 5, 64)
    for training in (True, False):
        with torch.set_grad_enabled(training):  # without gradients eval takes the fast path
            assert torch.equal(model[1].train(training)(x), dense[1].train(training)(x))
            assert torch.equal(model[2].train(training)(x, x, x)[0], dense[2].train(training)(x, x, x)[0])


@pytest.mark.filterwarnings("ignore:.torch.nn.utils.weight_norm. is deprecated:FutureWarning")
def test_parametrized_layers_are_left_alone() -> None:
    model = nn.ModuleDict(
        {
            "weight_norm": parametrizations.weight_norm(nn.Linear(64, 64)),
            "orthogonal": parametrizations.orthogonal(nn.Linear(64, 64)),
            "spectral_norm": parametrizations.spectral_norm(nn.Linear(64, 64)),
            "old weight_norm": nn.utils.weight_norm(nn.Linear(64, 64)),
            "plain": nn.Linear(64, 64),
        }
    )
    report = quantize_model(model)
    assert names(report) == ["plain"]
    for name in ("weight_norm", "orthogonal", "spectral_norm", "old weight_norm"):
        assert reasons(report)[name] == "its weight is parametrized"
        assert model[name](torch.randn(3, 64)).shape == (3, 64)


def test_layers_with_hooks_are_left_alone() -> None:
    model = nn.ModuleDict(
        {name: nn.Linear(64, 64) for name in ("on forward", "pre", "backward", "backward_pre", "none")}
    )
    model["on forward"].register_forward_hook(lambda *_: None)
    model["pre"].register_forward_pre_hook(lambda *_: None)
    model["backward"].register_full_backward_hook(lambda *_: None)
    model["backward_pre"].register_full_backward_pre_hook(lambda *_: None)
    report = quantize_model(model)
    assert names(report) == ["none"]
    assert reasons(report) == dict.fromkeys(("on forward", "pre", "backward", "backward_pre"), "it has hooks")


class Scaled(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class Renamed(nn.Linear):
    pass


def test_linears_with_a_forward_of_their_own_are_left_alone_and_mere_subclasses_are_not() -> None:
    model = nn.ModuleDict({"scaled": Scaled(64, 64), "renamed": Renamed(64, 64), "patched": nn.Linear(64, 64)})
    model["patched"].forward = lambda x: x
    report = quantize_model(model)
    assert names(report) == ["renamed"]
    assert reasons(report) == {
        "scaled": "Scaled has a forward of its own",
        "patched": "Linear has a forward of its own",
    }


def test_what_else_owns_a_matrix_is_named() -> None:
    model = nn.ModuleDict({"conv": nn.Conv1d(4, 4, 3), "bilinear": nn.Bilinear(4, 4, 4), "norm": nn.LayerNorm(4)})
    model["float64"] = nn.Linear(64, 64).double()
    assert reasons(quantize_model(model)) == {
        "conv": "Conv1d is not nn.Linear",
        "bilinear": "Bilinear is not nn.Linear",
        "float64": "its weight is torch.float64; float32, bfloat16 and float16 are computed",
    }


@pytest.mark.parametrize("attribute", ["_keep_in_fp32_modules", "_keep_in_fp32_modules_strict"])
def test_modules_that_the_model_keeps_in_float32_are_left_alone(attribute: str) -> None:
    model = Model()
    setattr(model, attribute, ["down"])  # how transformers says it; T5 casts its activations to such a weight's dtype
    report = quantize_model(model)
    assert names(report) == ["layers.0.up", "layers.1.up"]
    assert reasons(report)["layers.0.down"] == "Model keeps it in float32; name it in only to quantize it"
    assert names(quantize_model(model, only="down")) == ["layers.0.down", "layers.1.down"]


# --- refused ----------------------------------------------------------------------------------------------------------


def test_a_bare_linear_is_refused_and_from_linear_named() -> None:
    with pytest.raises(
        TypeError, match=r"a bare nn.Linear cannot be replaced in place; use NF4Linear.from_linear\(linear\)"
    ):
        quantize_model(nn.Linear(64, 64))
    with pytest.raises(TypeError, match=r"a bare NF4Linear cannot be replaced in place; use its to_linear\(\)"):
        dequantize_model(NF4Linear(64, 64))


@pytest.mark.parametrize("group_size", [0, -1])
def test_a_group_size_below_one_is_refused(group_size: int) -> None:
    with pytest.raises(ValueError, match=f"quantize_model: group_size must be at least 1, got {group_size}"):
        quantize_model(Model(), group_size=group_size)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_non_finite_weight_is_refused_by_name_and_the_model_is_as_it_was(dtype: torch.dtype, value: float) -> None:
    model = Model().to(dtype)
    with torch.no_grad():
        model.layers[1].down.weight[3, 100] = value  # the last one: all others could have been replaced before
    before, kinds_before = copy.deepcopy(model.state_dict()), kinds(model)
    with pytest.raises(ValueError, match="quantize_model") as caught:
        quantize_model(model)
    assert str(caught.value) == (
        f"quantize_model: layers.1.down.weight holds {value} at row 3, column 100; "
        "NF4 encodes finite weights only (the model was not changed)"
    )
    assert kinds(model) == kinds_before
    assert all(
        torch.equal(a, b) or a.isnan().any() for a, b in zip(model.state_dict().values(), before.values(), strict=True)
    )
    assert BLOCKS[:3] == names(quantize_model(model, skip="layers.1.down"))


# --- the report -------------------------------------------------------------------------------------------------------


def test_the_report_says_what_was_done() -> None:
    model = Model()
    weight = model.layers[0].down.weight.detach().clone()
    before = sum(p.nbytes for p in model.parameters())
    report = quantize_model(model, group_size=32)
    layer = report.layers[1]
    assert (layer.name, layer.shape, layer.group_size, layer.bits_per_weight) == ("layers.0.down", (64, 128), 32, 5.0)
    exact = (model.layers[0].down.dequantize().double() - weight.double()).norm() / weight.double().norm()
    assert layer.relative_rms_error == pytest.approx(exact.item(), rel=1e-6)
    assert 0.05 < layer.relative_rms_error < 0.12
    assert report.bytes_before == before
    assert report.bytes_after == sum(t.nbytes for t in model.state_dict().values())
    assert report.notes == ()


def test_the_report_reads_well() -> None:
    text = str(quantize_model(Model(), skip="layers.1")).splitlines()
    assert text[0].split() == ["layer", "shape", "group", "bits", "rel.", "error"]
    assert text[1].split()[:6] == ["layers.0.up", "128", "x", "64", "64", "4.50"]
    assert "left alone: lm_head: 12.8 kB: an output head; name it in only to quantize it" in text
    assert text[-1] == "2 layers quantized; 0.2 MB -> 0.1 MB, of which 91% are dense"


def test_one_layer_is_not_two() -> None:
    assert str(quantize_model(nn.Sequential(nn.Linear(64, 64)))).splitlines()[-1].startswith("1 layer quantized;")


def test_nothing_to_quantize_and_a_second_call_give_a_report_that_says_so() -> None:
    model = nn.Sequential(nn.Embedding(50, 64), nn.LayerNorm(64))
    report = quantize_model(model)
    assert report.layers == ()
    assert "nothing was quantized" in str(report)
    model = Model()
    quantize_model(model)
    packed = model.layers[0].up.weight.clone()
    again = quantize_model(model, group_size=16)
    assert again.layers == ()
    assert [reasons(again)[name] for name in BLOCKS] == ["already NF4"] * 4
    assert again.bytes_before == again.bytes_after
    assert torch.equal(model.layers[0].up.weight, packed)
    bare = quantize_model(NF4Linear(64, 64))
    assert bare.layers == ()
    assert "nothing was quantized" in str(bare)


@pytest.mark.parametrize("in_features", [2, 7, 31, 64, 65, 96, 128, 384, 1000])
@pytest.mark.parametrize("asked", [16, 64])
def test_odd_layers_get_the_group_size_that_stores_them_in_the_fewest_bits(in_features: int, asked: int) -> None:
    layer = quantize_model(nn.Sequential(nn.Linear(in_features, 8)), group_size=asked).layers[0]
    bits = {g: NF4Linear(in_features, 8, group_size=g, device="meta").bits_per_weight for g in range(1, asked + 1)}
    assert layer.bits_per_weight == bits[layer.group_size] == min(bits.values())
    if in_features % asked == 0:
        assert layer.group_size == asked


def test_a_relative_error_of_a_zero_weight_is_zero() -> None:
    model = nn.Sequential(nn.Linear(64, 8))
    nn.init.zeros_(model[0].weight)
    assert quantize_model(model).layers[0].relative_rms_error == 0.0
    assert not bool(model[0].dequantize().any())


# --- meta, inference mode, and back ----------------------------------------------------------------------------------


def test_a_model_on_meta_becomes_the_empty_structure_of_the_real_one() -> None:
    with torch.device("meta"):
        empty = Model()
    report = quantize_model(empty)
    model = Model()
    real = quantize_model(model)
    assert names(report) == names(real)
    assert all(layer.relative_rms_error is None for layer in report.layers)
    assert all(layer.relative_rms_error for layer in real.layers)
    described = [{n: (t.shape, t.dtype) for n, t in m.state_dict().items()} for m in (empty, model)]
    assert described[0] == described[1]
    assert all(t.is_meta for t in empty.state_dict().values())
    assert (report.bytes_before, report.bytes_after) == (real.bytes_before, real.bytes_after)
    assert str(report).splitlines()[1].split()[-1] == "-"


def test_a_model_quantized_in_inference_mode_can_be_trained_through() -> None:
    model = Model()
    with torch.inference_mode():
        quantize_model(model)
    model(TOKENS).sum().backward()
    assert model.embed.weight.grad is not None
    assert model.layers[0].up.bias.grad is not None


def test_training_flags_and_gradient_flags_are_kept() -> None:
    model = Model()
    model.layers[0].eval()
    model.layers[1].up.bias.requires_grad_(False)
    quantize_model(model)
    assert [model.layers[i].up.training for i in (0, 1)] == [False, True]
    assert [model.layers[i].up.bias.requires_grad for i in (0, 1)] == [True, False]


def test_dequantize_model_gives_the_dense_model_that_was_computed() -> None:
    model = Model().eval()
    quantize_model(model)
    expected = model(TOKENS)
    assert dequantize_model(model) == tuple(BLOCKS)
    assert NF4Linear not in kinds(model).values()
    torch.testing.assert_close(model(TOKENS), expected, rtol=1e-5, atol=1e-5)
    assert dequantize_model(model) == ()


# --- real architectures -----------------------------------------------------------------------------------------------


def llama() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=100, hidden_size=64, intermediate_size=172, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, tie_word_embeddings=True,
        )
    ).eval()  # fmt: skip


def bert() -> Any:
    from transformers import BertConfig, BertModel

    return BertModel(
        BertConfig(
            vocab_size=100, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
            max_position_embeddings=32,
        )
    ).eval()  # fmt: skip


def t5() -> Any:
    from transformers import T5Config, T5EncoderModel

    return T5EncoderModel(T5Config(vocab_size=100, d_model=64, d_kv=16, d_ff=128, num_layers=2, num_heads=4)).eval()


@pytest.mark.parametrize(("make", "layers"), [(llama, 2 * 7), (bert, 2 * 6 + 1), (t5, 2 * 5)])
def test_a_transformers_model_is_quantized_and_still_works(make: Any, layers: int) -> None:
    require_transformers()
    torch.manual_seed(0)
    model = make()
    with torch.no_grad():
        dense = model(TOKENS)[0]
        report = quantize_model(model, group_size=32)
        found = model(TOKENS)[0]
    assert len(report.layers) == layers
    error = (found - dense).norm() / dense.norm()
    assert 0 < error.item() < 0.25
    if make is llama:
        assert reasons(report)["lm_head"] == "an output head; name it in only to quantize it"
        assert model.lm_head.weight is model.model.embed_tokens.weight
        generated = model.generate(TOKENS[:1], max_new_tokens=4, do_sample=False, pad_token_id=0)
        assert generated.shape == (1, 9)


@pytest.mark.parametrize("function", [quantize_model, dequantize_model])
@pytest.mark.parametrize("model", [None, {"weight": torch.zeros(4, 8)}], ids=["None", "a state dict"])
def test_what_is_no_module_is_refused_by_its_type(function: Any, model: Any) -> None:
    text = rf"{function.__name__}: model must be an nn.Module, got {type(model).__name__}"
    with pytest.raises(TypeError, match=text):
        function(model)
