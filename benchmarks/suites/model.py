"""A whole model: MiniLM's encoder on 64 sentences, dense, in NF4 by this library and by bitsandbytes."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

import squish_nf4
from benchmarks.bench import DTYPES, Candidate, Options, checked, measure, relative_error
from benchmarks.peers import left_out_if_it_fails, peers
from benchmarks.peers.bitsandbytes import BitsAndBytes, linear4bit
from benchmarks.records import HOT, OURS, PEER, Case, Record
from squish_nf4.commands.demo.model import load_model, require_extras
from squish_nf4.commands.demo.sentences import SENTENCES

WHAT = "MiniLM, 64 sentences"
NAME, DENSE = "squish_nf4", "dense torch"
GROUP_SIZE = 64
COUNT = 64
BOUNDS = {"float32": 1e-5, "bfloat16": 5e-2, "float16": 1e-2}  # of the encoder, against its decoded weights in float32
PEER_BOUND = 5e-2


def run(options: Options) -> Iterator[Record]:
    try:
        require_extras()
    except ImportError as error:
        print(f"the suite model is left out: {error}")
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the model's dependencies, about each other
        sentence_model = load_model()
    sentences = [SENTENCES[i % len(SENTENCES)] for i in range(COUNT)]
    words = sentence_model.preprocess(sentences)
    for dtype in options.dtypes:
        for threads in options.threads:
            torch.set_num_threads(threads)
            case = Case("model", WHAT, dtype, 384, 384, words["input_ids"].numel(), GROUP_SIZE, threads, HOT)
            with torch.no_grad():
                yield from measure(case, _encoders(sentence_model[0].model, words, dtype), options)


def _encoders(model: nn.Module, words: Any, dtype: str) -> list[Candidate]:
    """The model with three kinds of encoder, compared with the decoded weights in float32."""
    nf4 = copy.deepcopy(model).eval()
    squish_nf4.quantize_model(nf4.encoder, group_size=GROUP_SIZE)  # type: ignore[arg-type]
    decoded = copy.deepcopy(nf4)
    squish_nf4.dequantize_model(decoded.encoder)  # type: ignore[arg-type]
    exact = _states(decoded, words)
    models = {NAME: nf4, DENSE: decoded}
    for peer in peers():
        if isinstance(peer, BitsAndBytes):
            with left_out_if_it_fails(peer, WHAT):
                models[peer.name] = _with_linear4bit(copy.deepcopy(decoded), DTYPES[dtype])
    candidates = []
    for name, made in models.items():
        ready = copy.deepcopy(made).to(DTYPES[dtype]).eval() if name != BitsAndBytes.name else made
        error = relative_error(_states(ready, words), exact)
        role = OURS if name == NAME else PEER
        checked(f"{WHAT} by {name}", error, PEER_BOUND if role == PEER else BOUNDS[dtype])
        candidates.append(Candidate(name, role, lambda _, ready=ready: _states(ready, words), error))  # type: ignore[misc]
    return candidates


def _states(model: nn.Module, words: Any) -> Tensor:
    """The last hidden state where there is a word."""
    states: Tensor = model(**words).last_hidden_state
    mask: Tensor = words["attention_mask"].unsqueeze(-1)
    return states * mask


def _with_linear4bit(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """The encoder's linear layers by bitsandbytes; the rest in the dtype."""
    model = model.to(dtype)
    encoder: Any = model.encoder
    for parent in list(encoder.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.Linear):
                layer = linear4bit(child.weight.detach().float(), dtype, GROUP_SIZE)
                layer.bias = child.bias
                setattr(parent, name, layer)
    return model.eval()
