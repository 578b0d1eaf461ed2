"""quantize_model on models of transformers: what is read or a head stays dense, and what is quantized works."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from squish_nf4 import NF4Linear, convert, dequantize_model, load_into, quantize_model
from tests.support.helpers import names, reasons, require_transformers, required_module
from tests.support.transformers_models import (
    BOTH,
    GROUPED,
    IDS,
    OTHERS,
    READERS,
    SIZES,
    T5_SIZES,
    TOKENS,
    VISION,
    falcon,
    gpt2,
    made,
    switch,
    t5,
)


def results(model: nn.Module, inputs: dict[str, Any], dtype: torch.dtype) -> Tensor:
    cast = {
        name: value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value
        for name, value in inputs.items()
    }
    with torch.no_grad():
        out = model(**cast)
    kinds = ("logits", "logits_per_image", "embeddings", "last_hidden_state")
    return next(out[kind] for kind in kinds if out.get(kind) is not None).float()


def require_as_its_twin(model: nn.Module, dense: nn.Module, inputs: dict[str, Any], dtype: torch.dtype) -> None:
    """The dense model whose weights are what the NF4 layers decode to gives the same, within rounding.

    dense: a copy from before; nothing else that quantize_model may have changed, such as a setting, is taken over.
    """
    twin: Any = copy.deepcopy(dense)
    for name, layer in model.named_modules():
        if isinstance(layer, NF4Linear):
            weight = layer.to_linear().weight.detach()
            place = twin.get_submodule(name)
            place.weight = nn.Parameter(weight if isinstance(place, nn.Linear) else weight.t().contiguous())
    twin.train(model.training)
    found, exact = results(model, inputs, dtype), results(twin, inputs, dtype)
    error = float((found - exact).norm() / exact.norm())
    assert error < (1e-5 if dtype == torch.float32 else 2e-2)


def read_layers(report: Any) -> set[str]:
    return {name for name, reason in reasons(report).items() if "reads its weight itself (modeling_" in reason}


@pytest.mark.sweeps
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", READERS)
def test_layers_that_a_model_reads_stay_dense_and_it_works(name: str, dtype: torch.dtype) -> None:
    require_transformers()
    make, read = READERS[name]
    model, inputs = make()
    model = model.to(dtype)
    if name == "Gemma3n":  # what it reads, it reads in training
        model.train()
    dense, by_default, all_of_it = copy.deepcopy(model), copy.deepcopy(model), model
    found = read_layers(quantize_model(by_default, group_size=32))
    require_as_its_twin(by_default, dense, inputs, dtype)
    report = quantize_model(all_of_it, group_size=32, only="*")
    assert {layer.split(".")[-1] for layer in read_layers(report)} == read
    assert found <= read_layers(report)
    assert len(report.layers) > 1
    require_as_its_twin(all_of_it, dense, inputs, dtype)


@pytest.mark.sweeps
@pytest.mark.parametrize("name", OTHERS)
def test_models_that_read_no_weights_are_quantized_whole(name: str) -> None:
    require_transformers()
    make, layers = OTHERS[name]
    model, inputs = make()
    dense = copy.deepcopy(model)
    report = quantize_model(model, group_size=32)
    assert read_layers(report) == set()
    assert report.notes == ()
    assert len(report.layers) == layers
    require_as_its_twin(model, dense, inputs, torch.float32)


def test_only_does_not_quantize_what_t5_reads() -> None:
    require_transformers()
    model, inputs = t5()
    dense = copy.deepcopy(model)
    report = quantize_model(model, only=["wo"])
    assert report.layers == ()
    assert all("only" not in reason for name, reason in reasons(report).items() if name.endswith("wo"))
    require_as_its_twin(model, dense, inputs, torch.float32)


# --- layers of other classes ------------------------------------------------------------------------------------------


def test_conv1d_is_quantized_and_comes_back_as_it_was() -> None:
    require_transformers()
    dense, _ = gpt2()
    model = copy.deepcopy(dense)
    report = quantize_model(model)
    assert "transformer.h.0.attn.c_attn" in names(report)
    assert report.layers[0].shape == (192, 64)
    assert report.layers[0].relative_rms_error < 0.12
    model = pickle.loads(pickle.dumps(copy.deepcopy(model)))
    expected = model(IDS).logits
    dequantize_model(model)
    before, after = dense.transformer.h[0].attn.c_attn, model.transformer.h[0].attn.c_attn
    assert type(after) is type(before)
    assert vars(after).keys() == vars(before).keys() - {"_is_hf_initialized"}
    assert (after.nf, after.nx, after.weight.shape) == (before.nf, before.nx, before.weight.shape)
    assert after.weight.is_contiguous()
    assert 0 < ((after.weight - before.weight).norm() / before.weight.norm()).item() < 0.12
    assert torch.equal(after.bias, before.bias)
    assert model.state_dict().keys() == dense.state_dict().keys()
    torch.testing.assert_close(model(IDS).logits, expected, rtol=1e-4, atol=1e-4)


def test_a_conv1d_comes_back_in_the_mode_that_its_layer_has() -> None:
    require_transformers()
    model: Any = gpt2()[0].train()
    quantize_model(model)
    model.eval()
    dequantize_model(model)
    assert not any(module.training for module in model.modules())


def test_a_bare_conv1d_is_refused() -> None:
    require_transformers()
    from transformers.pytorch_utils import Conv1D

    with pytest.raises(TypeError, match="a bare Conv1D cannot be replaced in place; put it into a module"):
        quantize_model(Conv1D(64, 64))


def test_tied_conv1ds_stay_tied_there_and_back() -> None:
    require_transformers()
    from transformers.pytorch_utils import Conv1D

    model = nn.Sequential(Conv1D(64, 64), Conv1D(64, 64), nn.Linear(64, 64))
    model[1].weight = model[2].weight = model[0].weight  # the last one reads it the other way round
    x = torch.randn(3, 64)
    quantize_model(model, group_size=32)
    assert model[0].weight is model[1].weight
    assert model[0].weight is not model[2].weight
    expected = model(x)
    dequantize_model(model)
    assert model[0].weight is model[1].weight
    torch.testing.assert_close(model(x), expected)


def test_falcon_linear_is_quantized_and_comes_back_as_it_was() -> None:
    require_transformers()
    model, _ = falcon()
    kind = type(model.transformer.h[0].mlp.dense_h_to_4h)
    assert kind is not nn.Linear
    quantize_model(model)
    expected = model(IDS).logits
    assert isinstance(model.transformer.h[0].mlp.dense_h_to_4h, NF4Linear)
    dequantize_model(model)
    assert type(model.transformer.h[0].mlp.dense_h_to_4h) is kind
    torch.testing.assert_close(model(IDS).logits, expected, rtol=1e-4, atol=1e-4)


class Conv1D(nn.Module):
    """Of that name, and not of transformers."""

    def __init__(self) -> None:
        super().__init__()
        self.nf = self.nx = 64
        self.weight, self.bias = nn.Parameter(torch.randn(64, 64)), nn.Parameter(torch.zeros(64))


def test_another_conv1d_is_left_alone() -> None:
    assert reasons(quantize_model(nn.Sequential(Conv1D()))) == {"0": "Conv1D is not nn.Linear"}


# --- heads ------------------------------------------------------------------------------------------------------------


HEAD = "an output head; name it in only to quantize it"


@pytest.mark.parametrize(
    ("kind", "heads"),
    [
        ("LlamaForSequenceClassification", {"score"}),
        ("BertForSequenceClassification", {"classifier"}),
        ("BertForQuestionAnswering", {"qa_outputs"}),
        ("BertForMaskedLM", {"cls.predictions.transform.dense", "cls.predictions.decoder"}),
        ("LlamaForCausalLM", {"lm_head"}),
        ("BertModel", set()),
    ],
)
def test_heads_are_left_alone_unless_only_names_them(kind: str, heads: set[str]) -> None:
    require_transformers()
    sizes = GROUPED if kind.startswith("Llama") else SIZES
    model, _ = made(kind, {}, **sizes)
    report = quantize_model(model)
    assert {name for name, reason in reasons(report).items() if reason == HEAD} == heads
    assert not heads & {*names(report)}
    if heads:
        assert {*names(quantize_model(model, only=[*heads]))} == heads


TOWERS = {"text_config": {**SIZES, "eos_token_id": 9}, "vision_config": VISION}
TASKS: dict[str, tuple[dict[str, Any], set[str]]] = {
    "T5ForQuestionAnswering": (T5_SIZES, {"qa_outputs"}),
    "CLIPForImageClassification": (TOWERS, {"classifier"}),
    "SiglipForImageClassification": (TOWERS, {"classifier"}),
    "WhisperForAudioClassification": (
        {"d_model": 64, "encoder_layers": 1, "encoder_attention_heads": 4, "encoder_ffn_dim": 64, "num_mel_bins": 16},
        {"projector", "classifier"},
    ),
}


@pytest.mark.parametrize("kind", TASKS)
def test_a_class_for_a_task_whose_base_has_another_name_has_heads(kind: str) -> None:
    require_transformers()
    settings, heads = TASKS[kind]
    model, _ = made(kind, {}, **settings)
    report = quantize_model(model, group_size=32)
    assert {name for name, reason in reasons(report).items() if reason == HEAD} == heads
    assert len(report.layers) > 1


def test_what_get_output_embeddings_returns_is_a_head() -> None:
    class Decoder(nn.Module):
        base_model_prefix = "missing"

        def __init__(self) -> None:
            super().__init__()
            self.body, self.to_words = nn.Linear(64, 64), nn.Linear(64, 64)

        def get_output_embeddings(self) -> nn.Module:
            return self.to_words

    assert reasons(quantize_model(Decoder())) == {"to_words": HEAD}


def test_a_tower_beside_the_base_model_is_no_head() -> None:
    class Pretrained(nn.Module):
        base_model_prefix = "language_model"

        def __init__(self, **parts: nn.Module) -> None:
            super().__init__()
            for name, part in parts.items():
                self.add_module(name, part)

    def tower() -> nn.Module:
        return Pretrained(layer=nn.Linear(64, 64))

    model = Pretrained(language_model=tower(), vision=tower(), score=nn.Linear(64, 4))
    model.the_same = model.language_model.layer  # it is the base model's, whatever else holds it
    report = quantize_model(model)
    assert names(report) == ["the_same", "vision.layer"]
    assert reasons(report) == {"score": HEAD}


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")  # peft asks for it
@pytest.mark.parametrize("order", ["quantize, then adapters", "adapters, then quantize"])
@pytest.mark.parametrize("kind", ["LlamaForSequenceClassification", "BertForSequenceClassification"])
def test_a_classifier_with_adapters_trains_its_head(kind: str, order: str) -> None:
    require_transformers()
    peft = required_module("peft")
    sizes = {**GROUPED, "pad_token_id": 0} if kind.startswith("Llama") else SIZES
    model: Any = made(kind, {}, **sizes)[0]
    adapters = peft.LoraConfig(task_type="SEQ_CLS", r=4)
    if order == "quantize, then adapters":
        quantize_model(model, group_size=32)
        model = peft.get_peft_model(model, adapters)
    else:
        model = peft.get_peft_model(model, adapters)
        quantize_model(model, group_size=32)
    assert any(isinstance(module, NF4Linear) for module in model.modules())
    trained = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    assert {part for name in trained for part in ("lora_A", "lora_B", "modules_to_save") if part in name} == {
        *("lora_A", "lora_B", "modules_to_save")
    }
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(3):
        model(input_ids=IDS, labels=torch.tensor([0, 1])).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    after = dict(model.named_parameters())
    assert all(not torch.equal(value, after[name]) for name, value in trained.items())


# --- a head that is tied no more --------------------------------------------------------------------------------------


def test_an_untied_head_stays_untied() -> None:
    require_transformers()
    model: Any = made("LlamaForCausalLM", {}, **GROUPED, tie_word_embeddings=True)[0]
    report = quantize_model(model, only=["lm_head"])
    assert report.notes == (
        "lm_head.weight was tied to model.embed_tokens.weight, which stays dense: they are separate now, "
        "and config.tie_word_embeddings is False",
    )
    packed = model.lm_head.weight
    expected = model(IDS).logits
    for recompute in (True, False):
        model.tie_weights(recompute_mapping=recompute)
    assert model.lm_head.weight is packed
    assert model.config.tie_word_embeddings is False
    assert torch.equal(model(IDS).logits, expected)


def umt5() -> Any:
    ids = {"pad_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 0}
    return made("UMT5ForConditionalGeneration", BOTH, **T5_SIZES, **ids, tie_word_embeddings=True)


@pytest.mark.parametrize("make", [switch, umt5])
def test_a_tied_head_whose_input_is_scaled_for_that_stays_tied(make: Any) -> None:
    """config.tie_word_embeddings would have to become False, and forward scales by it."""
    require_transformers()
    model, inputs = make()
    model.config.tie_word_embeddings = True
    model.tie_weights()
    dense = copy.deepcopy(model)
    report = quantize_model(model, only=["lm_head", "q"], group_size=32)
    reason = reasons(report)["lm_head"]
    assert "its weight is tied to " in reason
    assert reason.endswith(
        f", and {type(model).__name__} computes something else if config.tie_word_embeddings is False"
    )
    assert model.config.tie_word_embeddings is True
    assert len(report.layers) > 1
    require_as_its_twin(model, dense, inputs, torch.float32)


def llama_tied() -> Any:
    return made("LlamaForCausalLM", TOKENS, **GROUPED, tie_word_embeddings=True)


def openai_gpt() -> Any:
    """Its attention reads shapes, and its base model the weight of the embedding, which stays dense."""
    return made("OpenAIGPTLMHeadModel", TOKENS, vocab_size=100, n_embd=64, n_layer=2, n_head=4)


@pytest.mark.parametrize("make", [llama_tied, t5, openai_gpt])
def test_a_head_is_parted_and_nothing_else_is_changed(make: Any) -> None:
    require_transformers()
    model, inputs = make()
    dense = copy.deepcopy(model)
    assert names(quantize_model(model, only=["lm_head"], group_size=32)) == ["lm_head"]
    require_as_its_twin(model, dense, inputs, torch.float32)


def test_the_configuration_of_the_decoder_counts_too() -> None:
    """A model whose own configuration ties nothing, as older releases write it."""

    class Config:
        def __init__(self, tied: bool, text: Config | None = None) -> None:
            self.tie_word_embeddings, self.text = tied, text

        def get_text_config(self, decoder: bool) -> Config:
            return self.text or self

    class Decoder(nn.Module):
        base_model_prefix = "missing"

        def __init__(self) -> None:
            super().__init__()
            self.config = Config(False, Config(True))
            self.embed, self.lm_head = nn.Embedding(100, 64), nn.Linear(64, 100, bias=False)
            self.lm_head.weight = self.embed.weight

        def get_output_embeddings(self) -> nn.Module:
            return self.lm_head

    model = Decoder()
    report = quantize_model(model, only=["lm_head"])
    assert report.notes[0].endswith("and config.tie_word_embeddings is False")
    assert model.config.text is not None
    assert model.config.text.tie_word_embeddings is False


def test_a_head_that_stays_tied_keeps_its_configuration() -> None:
    require_transformers()
    model: Any = made("LlamaForCausalLM", {}, **GROUPED, tie_word_embeddings=True)[0]
    quantize_model(model)
    assert model.config.tie_word_embeddings is True


def test_a_refused_weight_leaves_the_configuration_as_it_was() -> None:
    require_transformers()
    model: Any = made("LlamaForCausalLM", {}, **GROUPED, tie_word_embeddings=True)[0]
    with torch.no_grad():
        model.lm_head.weight[0, 0] = float("nan")
    with pytest.raises(ValueError, match="the model was not changed"):
        quantize_model(model, only=["lm_head"])
    assert model.config.tie_word_embeddings is True
    assert model.all_tied_weights_keys == {"lm_head.weight": "model.embed_tokens.weight"}


# --- resizing a vocabulary --------------------------------------------------------------------------------------------


def with_nf4_head() -> Any:
    model, _ = made("LlamaForCausalLM", {}, **GROUPED)
    quantize_model(model, only=["lm_head"])
    return model


@pytest.mark.parametrize(
    ("arguments", "rows"),
    [({"new_num_tokens": 120}, 120), ({"new_num_tokens": 80}, 80), ({"pad_to_multiple_of": 64}, 128)],
)
@pytest.mark.parametrize("make", [lambda model: model, copy.deepcopy], ids=["itself", "a copy"])
def test_resizing_a_head_in_nf4_is_refused_before_anything_is_changed(make: Any, arguments: Any, rows: int) -> None:
    require_transformers()
    model = make(with_nf4_head())
    message = f"head is in NF4, and its 100 rows cannot become {rows}; squish_nf4.dequantize_model"
    with pytest.raises(RuntimeError, match=message):
        model.resize_token_embeddings(**arguments)
    assert model.get_input_embeddings().num_embeddings == 100
    assert model(IDS).logits.shape == (2, 5, 100)
    dequantize_model(model)
    model.resize_token_embeddings(**arguments)
    assert model.get_input_embeddings().num_embeddings == model.lm_head.out_features == rows


def test_resizing_to_the_size_that_is_there_and_a_dense_head_are_left_to_transformers() -> None:
    require_transformers()
    model = with_nf4_head()
    assert model.resize_token_embeddings() is model.get_input_embeddings()
    model.resize_token_embeddings(100)
    assert isinstance(model.lm_head, NF4Linear)
    model.lm_head = nn.Linear(64, 100, bias=False)
    model.resize_token_embeddings(120)
    assert model.lm_head.out_features == 120


def test_a_model_that_was_guarded_is_pickled(tmp_path: Path) -> None:
    require_transformers()
    model = with_nf4_head()
    torch.save(model, tmp_path / "model.pt")
    copied = torch.load(tmp_path / "model.pt", weights_only=False)
    assert torch.equal(copied(IDS).logits, model(IDS).logits)
    quantize_model(model)  # again: one guard, and none of the copy's
    with pytest.raises(RuntimeError, match="cannot become 120"):
        model.resize_token_embeddings(120)


def test_load_into_guards_a_head_that_it_makes_nf4(tmp_path: Path) -> None:
    require_transformers()
    model, _ = made("LlamaForCausalLM", {}, **GROUPED)
    save_file(
        {name: tensor.contiguous() for name, tensor in model.state_dict().items()}, tmp_path / "model.safetensors"
    )
    convert(tmp_path / "model.safetensors", tmp_path / "out", include=["lm_head.weight"])
    load_into(model, tmp_path / "out")
    assert isinstance(model.lm_head, NF4Linear)
    with pytest.raises(RuntimeError, match="cannot become 120"):
        model.resize_token_embeddings(120)
