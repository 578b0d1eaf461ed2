"""NF4Embedding: the rows of a table, decoded when they are asked for: to the bit those of the dense table."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from squish_nf4 import NF4Embedding, NF4Linear
from squish_nf4.nn.packed_weight import PackedWeight

IDS = torch.tensor([[0, 3, 49], [3, 3, 7]])
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def table(rows: int = 50, columns: int = 65, dtype: torch.dtype = torch.float32, **options: Any) -> NF4Embedding:
    torch.manual_seed(0)
    return NF4Embedding(rows, columns, dtype=dtype, **({"group_size": 32} | options))


# --- lookups ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("columns", "group_size"), [(64, 64), (64, 32), (65, 32), (5, 64), (1, 1), (96, 50), (128, 128)]
)
def test_rows_are_those_of_the_dense_table_to_the_bit(columns: int, group_size: int, dtype: torch.dtype) -> None:
    embedding = nn.Embedding(50, columns, dtype=dtype)
    packed = NF4Embedding.from_embedding(embedding, group_size)
    dense = packed.to_embedding()
    for ids in (IDS, IDS[0], IDS.int(), IDS[:, :0], torch.tensor(3), IDS.t(), IDS.expand(2, 2, 3)):
        found = packed(ids)
        assert found.dtype == dtype
        assert found.shape == (*ids.shape, columns)
        assert torch.equal(found, dense(ids))
    # Every level lies within half a step of the weight; the widest step is 0.3 of the group's largest.
    assert (dense.weight - embedding.weight).abs().max() <= 0.16 * embedding.weight.abs().max()


@pytest.mark.parametrize("bad", [50, -1, 2**40])
def test_an_id_that_is_no_row_is_refused_as_by_nn_embedding(bad: int) -> None:
    ids = torch.tensor([0, bad])
    with pytest.raises(IndexError, match="index out of range in self"):
        table()(ids)
    with pytest.raises(IndexError, match="index out of range in self"):
        table().to_embedding()(ids)


def test_ids_that_are_no_integers_are_refused() -> None:
    with pytest.raises(RuntimeError, match="int32 or int64"):
        table()(torch.tensor([0.5]))


def test_only_the_rows_asked_for_are_decoded() -> None:
    seen: list[tuple[int, ...]] = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if "dequantize" in str(func):
                seen.append(tuple(args[0].shape))
            return func(*args, **(kwargs or {}))

    with Watch():
        table(columns=64)(IDS)
    assert seen == [(6, 32)]


def test_a_padding_row_is_zero_in_a_new_table_and_stays_the_weights_in_one_that_is_quantized() -> None:
    assert not table(padding_idx=3)(torch.tensor([3])).any()
    assert table(padding_idx=-1).padding_idx == 49
    dense = nn.Embedding(50, 64, padding_idx=3)
    nn.init.ones_(dense.weight)
    packed = NF4Embedding.from_embedding(dense)
    assert packed.padding_idx == packed.to_embedding().padding_idx == 3
    assert torch.equal(packed(IDS), torch.ones(2, 3, 64))


def test_a_new_table_is_that_of_nn_embedding_quantized() -> None:
    torch.manual_seed(1)
    packed = NF4Embedding(20, 64)
    torch.manual_seed(1)
    expected = NF4Embedding.from_embedding(nn.Embedding(20, 64))
    assert torch.equal(packed.weight, expected.weight)
    assert torch.equal(packed.scales, expected.scales)


def test_no_gradient_flows_into_the_table_and_one_may_flow_from_it() -> None:
    packed = table()
    rows = packed(IDS)
    assert not rows.requires_grad
    assert [parameter.requires_grad for parameter in packed.parameters()] == [False]
    rows.requires_grad_(True).sum().backward()  # as gradient checkpointing does with a frozen embedding
    assert rows.grad is not None


# --- how it is made ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: NF4Embedding(4, 8, group_size=0), ValueError, "group_size must be at least 1, got 4, 8, 0"),
        (lambda: NF4Embedding(-1, 8), ValueError, "must not be negative.*got -1, 8, 64"),
        (lambda: NF4Embedding(4, 8, 4), ValueError, "padding_idx is 4, and there are 4 rows"),
        (lambda: NF4Embedding(4, 8, -5), ValueError, "padding_idx is -5, and there are 4 rows"),
        (lambda: NF4Embedding(4, 8, dtype=torch.float64), TypeError, "float32, bfloat16 or float16, got torch.float64"),
        (lambda: NF4Embedding(4, 8, max_norm=1.0), TypeError, "max_norm"),  # type: ignore[call-arg]
        (lambda: NF4Embedding(4, 8, sparse=True), TypeError, "sparse"),  # type: ignore[call-arg]
        (lambda: NF4Embedding.from_embedding(nn.Embedding(4, 8, max_norm=1.0)), ValueError, "max_norm is 1.0.*None is"),
        (lambda: NF4Embedding.from_embedding(nn.Embedding(4, 8, sparse=True)), ValueError, "sparse is True.*False is"),
        (
            lambda: NF4Embedding.from_embedding(nn.Embedding(4, 8).double()),
            TypeError,
            "got torch.float64; cast it first",
        ),
        (lambda: NF4Embedding.from_embedding(nn.Linear(4, 8)), TypeError, "nn.Embedding is wanted, got Linear"),  # type: ignore[arg-type]
        (lambda: NF4Embedding.from_embedding(table()), TypeError, "nn.Embedding is wanted, got NF4Embedding"),
        (lambda: NF4Embedding.from_pretrained(torch.ones(2, 2), freeze=False), TypeError, "use from_embedding"),
    ],
)
def test_what_cannot_be_is_refused_by_name(make: Callable[[], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make()


def test_a_weight_that_is_not_finite_is_refused_with_its_place() -> None:
    dense = nn.Embedding(4, 64)
    with torch.no_grad():
        dense.weight[2, 5] = float("nan")
    with pytest.raises(ValueError, match=r"NF4Embedding\.from_embedding: weight holds nan at row 2, column 5"):
        NF4Embedding.from_embedding(dense)


def test_repr_says_what_is_stored() -> None:
    assert repr(table(columns=64, padding_idx=3)) == (
        "NF4Embedding(50, 64, padding_idx=3, group_size=32, bits_per_weight=5.00, bytes=2000)"
    )


# --- as any module ----------------------------------------------------------------------------------------------------


def require_same(found: nn.Module, expected: NF4Embedding) -> None:
    assert isinstance(found, NF4Embedding)
    assert type(found.weight) is PackedWeight
    assert found.scales.dtype == torch.float32
    assert torch.equal(found(IDS), expected(IDS))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_cast_changes_what_comes_out_and_no_byte(dtype: torch.dtype) -> None:
    packed = table()
    before = copy.deepcopy(packed)
    packed.to(dtype)
    assert torch.equal(packed.weight, before.weight)
    assert torch.equal(packed.scales, before.scales)
    assert torch.equal(packed(IDS), before.dequantize(dtype)[IDS])


def test_it_is_copied_saved_and_loaded(tmp_path: Path) -> None:
    packed = table()
    require_same(copy.deepcopy(packed), packed)
    require_same(pickle.loads(pickle.dumps(packed)), packed)
    save_file(packed.state_dict(), tmp_path / "table.safetensors")
    for device, assign in (("meta", True), ("cpu", False), ("cpu", True)):
        other = NF4Embedding(50, 65, group_size=32, device=device)
        other.load_state_dict(load_file(tmp_path / "table.safetensors"), assign=assign)
        require_same(other, packed)


def test_a_dense_state_is_quantized_and_a_misfit_is_refused() -> None:
    dense = nn.Embedding(50, 65)
    packed = table()
    packed.load_state_dict(dense.state_dict())
    require_same(packed, NF4Embedding.from_embedding(dense, 32))
    with pytest.raises(RuntimeError, match=r"NF4Embedding: dense weight has shape \(4, 65\), \(50, 65\) is wanted"):
        packed.load_state_dict({"weight": torch.ones(4, 65)})


def test_half_a_state_is_waited_for() -> None:
    packed, whole = table(), NF4Embedding(50, 65, group_size=32)
    packed.load_state_dict({"weight": whole.weight}, strict=False)
    with pytest.raises(RuntimeError, match="NF4Embedding: a state has brought its weight and not its scales"):
        packed(IDS)
    packed.load_state_dict({"scales": whole.scales}, strict=False)
    require_same(packed, whole)


def test_arithmetic_on_its_weight_is_refused() -> None:
    for compute in (lambda w: w * 2, nn.init.zeros_, lambda w: F.embedding(IDS, w)):
        with pytest.raises(RuntimeError, match="packed NF4 bytes was given to"):
            compute(table().weight)


def test_a_head_may_share_its_bytes() -> None:
    packed = table(columns=64)
    head = NF4Linear(64, 50, bias=False, group_size=32)
    head.weight, head.scales = packed.weight, packed.scales
    model = nn.ModuleList([packed, head])
    for each in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model)), copy.deepcopy(model).bfloat16()):
        assert each[0].weight is each[1].weight
        assert each[0].scales.data_ptr() == each[1].scales.data_ptr()
        hidden = each[0](IDS)
        torch.testing.assert_close(each[1](hidden), hidden @ each[0].dequantize(hidden.dtype).T)


# --- what compiles ----------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:.torch.jit.*. is deprecated")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "build",
    [
        torch.jit.script,
        lambda packed: torch.jit.trace(packed, IDS),
        torch.fx.symbolic_trace,
        torch.vmap,
        lambda packed: torch.export.export(packed, (IDS,)).module(),
        lambda packed: torch.compile(packed, fullgraph=True, backend="eager"),
    ],
    ids=["script", "trace", "fx", "vmap", "export", "compile"],
)
def test_every_form_of_it_gives_the_same_rows(build: Callable[[nn.Module], Any], dtype: torch.dtype) -> None:
    packed = table(dtype=dtype)
    found: Tensor = build(packed)(IDS)
    assert found.dtype == dtype
    assert torch.equal(found, packed(IDS))


@pytest.mark.compiles
def test_inductor_compiles_it_whole() -> None:
    packed = table()
    assert torch.equal(torch.compile(packed, fullgraph=True, dynamic=True)(IDS), packed(IDS))


@pytest.mark.filterwarnings("ignore:.torch.jit.*. is deprecated")
def test_a_scripted_table_is_saved_and_loaded(tmp_path: Path) -> None:
    torch.jit.script(table()).save(str(tmp_path / "table.pt"))
    loaded = torch.jit.load(str(tmp_path / "table.pt"))
    assert torch.equal(loaded(IDS), table()(IDS))
    with pytest.raises(RuntimeError, match="index out of range"):
        loaded(torch.tensor([50]))
