"""What a transformers model says of itself: its output heads, what it keeps in float32, and what it ties.

transformers is not imported: a class with ``base_model_prefix`` is one of its models.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from types import MethodType
from typing import Any

from torch import nn

from squish_nf4.model.source_scan.readers import class_that_names
from squish_nf4.nn.linear import NF4Linear

TYING = "tie_word_embeddings"


def _pretrained(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """(name, module) of each transformers model that the model is or holds."""
    for name, module in model.named_modules():
        if _is_pretrained(module):
            yield name, module


def _is_pretrained(module: nn.Module) -> bool:
    return isinstance(getattr(type(module), "base_model_prefix", None), str)


def kept_in_float32(model: nn.Module) -> dict[str, str]:
    """Patterns of the modules that a transformers model casts activations for, and the class that says so."""
    patterns: dict[str, str] = {}
    for module in model.modules():
        for attribute in ("_keep_in_fp32_modules", "_keep_in_fp32_modules_strict"):
            for pattern in getattr(module, attribute, None) or ():
                patterns.setdefault(pattern, type(module).__name__)
    return patterns


def output_heads(model: nn.Module) -> set[int]:
    """Ids of the modules that turn what the base model computes into results: lm_head, score, classifier.

    They are what stands beside the base model and in no other transformers model, as the vision tower beside a language
    model is one. A class for a task (``CLIPForImageClassification``) may hold such models and none that it calls its
    base; if it has no output embeddings, what stands beside them is its head.
    """
    heads: set[int] = set()
    for _, module in _pretrained(model):
        head = _output_embeddings(module)
        base = module._modules.get(str(getattr(type(module), "base_model_prefix", "")))
        bases = [base] if base is not None else []
        if base is None and head is None and re.search(r"\wFor[A-Z]", type(module).__name__):
            bases = [child for child in module.children() if _is_pretrained(child)]
        if bases:
            inside = {id(each) for base in bases for each in base.modules()}
            heads |= set(_ids_outside(module, bases)) - inside
        if head is not None:
            heads.add(id(head))
    return heads


def _ids_outside(module: nn.Module, bases: list[nn.Module]) -> Iterator[int]:
    for child in module.children():
        if not any(child is base for base in bases) and not _is_pretrained(child):
            yield id(child)
            yield from _ids_outside(child, bases)


def _output_embeddings(module: nn.Module) -> Any:
    try:
        return module.get_output_embeddings()  # type: ignore[operator]
    except (AttributeError, NotImplementedError, TypeError):  # a model without them
        return None


def computes_with_tying(model: nn.Module, head: nn.Module) -> str | None:
    """The class of a model with this head that computes with config.tie_word_embeddings, which untie would change.

    SwitchTransformers and UMT5 scale what they hand to a tied head.
    """
    owners = [
        class_that_names(module, TYING)
        for _, module in _pretrained(model)
        if _output_embeddings(module) is head and any(getattr(config, TYING, False) for config in _configs(module))
    ]
    return next((owner for owner in owners if owner is not None), None)


def untie(model: nn.Module, head: nn.Module, names: Iterable[str]) -> bool:
    """Have transformers models tie the head of these names to their embedding no more; whether one of them did."""
    changed = False
    for prefix, module in _pretrained(model):
        tied: Any = getattr(module, "all_tied_weights_keys", None)
        for name in names if isinstance(tied, dict) else ():
            tied.pop(f"{name.removeprefix(prefix + '.' if prefix else '')}.weight", None)
        if _output_embeddings(module) is head:
            for config in _configs(module):
                changed |= bool(getattr(config, TYING, False))
                setattr(config, TYING, False)
    return changed


def _configs(module: nn.Module) -> list[Any]:
    """The configuration of a model, and that of its decoder, where older releases look for it."""
    config: Any = getattr(module, "config", None)
    of_text = getattr(config, "get_text_config", None)
    return [each for each in (config, of_text(decoder=True) if callable(of_text) else None) if each is not None]


def guard_resizing(model: nn.Module) -> None:
    """Have resize_token_embeddings say that it cannot add rows to an NF4 head, before it has resized the embedding.

    Without that it makes a dense head of the packed bytes' dtype, and the error of torch names only dtypes.
    """
    for _, module in _pretrained(model):
        vars(module).pop("resize_token_embeddings", None)
        if isinstance(_output_embeddings(module), NF4Linear):
            vars(module)["resize_token_embeddings"] = MethodType(resize_token_embeddings, module)


def resize_token_embeddings(
    model: Any, new_num_tokens: int | None = None, pad_to_multiple_of: int | None = None, *args: Any, **kwargs: Any
) -> Any:
    """What stands before the method of transformers in a model whose head was quantized.

    A bound method is pickled by its name: a model that comes out of a file has transformers' own.
    """
    head, multiple = _output_embeddings(model), pad_to_multiple_of or 1
    if isinstance(head, NF4Linear):
        rows = -(-(head.out_features if new_num_tokens is None else new_num_tokens) // multiple) * multiple
        if rows != head.out_features:
            raise RuntimeError(
                f"resize_token_embeddings: the output head is in NF4, and its {head.out_features} rows cannot become "
                f"{rows}; squish_nf4.dequantize_model(model), resize, and quantize_model again"
            )
    return type(model).resize_token_embeddings(model, new_num_tokens, pad_to_multiple_of, *args, **kwargs)
