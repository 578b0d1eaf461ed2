"""NF4Embedding: nn.Embedding on packed bytes. How the bytes are moved, cast and loaded is in packed.py."""

# No "from __future__ import annotations" here: TorchScript reads the annotation of `scales` as a type, not as a string.
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch._C import DisableTorchFunctionSubclass

from squish_nf4.nn.packed import PackedModule, dtype_to_make, require_dense


def _decode_rows(
    ids: Tensor, weight: Tensor, scales: Tensor, columns: int, group_size: int, dtype: torch.dtype
) -> Tensor:
    flat = ids.reshape(-1)
    packed, scale = weight.index_select(0, flat), scales.index_select(0, flat)
    rows: Tensor = torch.ops.squish.dequantize_nf4(packed, scale, group_size, dtype=dtype)
    rows = rows[:, :columns]
    return rows.reshape(ids.size() + rows.size()[1:])


@torch.fx.wrap  # one call in a torch.fx graph
def _look_up(ids: Tensor, weight: Tensor, scales: Tensor, columns: int, group_size: int, dtype: torch.dtype) -> Tensor:
    """The rows of these ids without their padding: (..., columns)."""
    if torch.jit.is_scripting():  # type: ignore[attr-defined]
        rows = _decode_rows(ids, weight, scales, columns, group_size, dtype)
    else:
        with DisableTorchFunctionSubclass():  # past PackedWeight.__torch_function__
            rows = _decode_rows(ids, weight, scales, columns, group_size, dtype)
    return rows


class NF4Embedding(PackedModule, nn.Embedding):
    """A table of rows stored at 4 bits per weight and a float32 scale per group; decodes the rows that it is asked for.

    A drop-in for nn.Embedding in a forward pass, with any embedding_dim (odd ones and those that are no multiple of
    group_size are padded inside). The packed table is not trained, and no gradient flows into it.

    Args:
        num_embeddings: rows n of the table.
        embedding_dim: columns d of the table.
        padding_idx: the row that stands for padding, as in nn.Embedding; negative ones count from the end.
        group_size: neighbouring columns that share a scale. If embedding_dim is smaller, the size of at most
            group_size that pads least is used instead; the attribute and repr() say which.
        device: where to create it; "meta" makes an empty table to load into.
        dtype: float32, bfloat16 or float16: of the rows that forward() returns.

    Attributes:
        weight: Parameter (n, c/2) uint8, the packed bytes, as in NF4Linear. c: embedding_dim, padded.
        scales: buffer (n, c/group_size) float32, whatever the module is cast to.
        dense_dtype: what ``dtype`` was, following .to(dtype) and .half().

    Raises:
        ValueError: group_size is not positive, a size is negative, padding_idx is no row.
        TypeError: dtype is not one of the three.
    """

    __constants__ = ["dense_dtype", "embedding_dim", "group_size", "num_embeddings"]  # noqa: RUF012  (torch's is a list)
    __jit_ignored_attributes__ = ("_missing",)  # dense_dtype is a constant: what comes out has it
    __jit_unused_properties__ = ("bits_per_weight",)

    scales: Tensor  # TorchScript reads the annotations of this class alone

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        padding_idx: int | None = None,
        *,
        group_size: int = 64,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        nn.Module.__init__(self)  # not nn.Embedding's: it would allocate the dense table
        sizes = {"num_embeddings": num_embeddings, "embedding_dim": embedding_dim}
        dtype = dtype_to_make("NF4Embedding", sizes, group_size, dtype)
        if padding_idx is not None and not -num_embeddings <= padding_idx < num_embeddings:
            raise ValueError(f"NF4Embedding: padding_idx is {padding_idx}, and there are {num_embeddings} rows")
        self.num_embeddings = num_embeddings
        self.embedding_dim = embedding_dim
        self.padding_idx = padding_idx if padding_idx is None or padding_idx >= 0 else num_embeddings + padding_idx
        # What nn.Embedding has, too, and code that copies one reads.
        self.max_norm, self.norm_type, self.scale_grad_by_freq, self.sparse = None, 2.0, False, False
        self._allocate(group_size, device, dtype)
        self.reset_parameters()

    @classmethod
    def from_embedding(cls, embedding: nn.Embedding, group_size: int = 64) -> "NF4Embedding":
        """Quantize a table; the original is left as it is. Device, dtype, padding_idx and training mode are taken over.

        Raises:
            ValueError: the table holds NaN or infinity (the text says where), or has max_norm or sparse set.
            TypeError: ``embedding`` is not a dense nn.Embedding of float32, bfloat16 or float16.
        """
        require_dense("NF4Embedding.from_embedding", embedding, nn.Embedding)
        for name, unset in (("max_norm", None), ("sparse", False)):
            if (found := getattr(embedding, name)) != unset:
                raise ValueError(
                    f"NF4Embedding.from_embedding: {name} is {found}, which is for rows that change; packed ones do "
                    f"not, and {unset} is wanted"
                )
        rows, columns, padding_idx = embedding.num_embeddings, embedding.embedding_dim, embedding.padding_idx
        table = cls(rows, columns, padding_idx, group_size=group_size, device="meta", dtype=embedding.weight.dtype)
        table._become("NF4Embedding.from_embedding: weight", embedding.weight)
        return table.train(embedding.training)

    @classmethod
    def from_pretrained(cls, *given: Any, **named: Any) -> NoReturn:
        """Not offered: a table of nn.Embedding.from_pretrained may be trained (freeze=False) or changed (max_norm)."""
        raise TypeError("NF4Embedding.from_pretrained: use from_embedding(nn.Embedding.from_pretrained(...))")

    def to_embedding(self) -> nn.Embedding:
        """The dense table that this one decodes to, in ``dense_dtype``."""
        with torch.inference_mode(False), torch.no_grad():
            sizes = self.num_embeddings, self.embedding_dim, self.padding_idx
            embedding = nn.Embedding(*sizes, device="meta", dtype=self.dense_dtype)
            embedding.weight = nn.Parameter(self.dequantize(self.dense_dtype))
        return embedding.train(self.training)

    def forward(self, input: Tensor) -> Tensor:
        """Ids of rows, any shape, int64 or int32 -> (..., embedding_dim) in ``dense_dtype``.

        Raises:
            IndexError: an id is negative or not below num_embeddings.
        """
        if not torch.jit.is_scripting():  # type: ignore[attr-defined]
            self.require_whole()
        return _look_up(input, self.weight, self.scales, self.embedding_dim, self.group_size, self.dense_dtype)

    def reset_parameters(self) -> None:
        """Initialize as nn.Embedding does (same random numbers) and quantize the table."""
        if self.weight.is_meta:
            return
        with torch.no_grad():
            shape = (self.num_embeddings, self.embedding_dim)
            dense = nn.init.normal_(torch.empty(shape, dtype=self.dense_dtype, device=self.weight.device))
            if self.padding_idx is not None:
                dense[self.padding_idx].zero_()
            self._take("NF4Embedding.reset_parameters: weight", dense)

    def extra_repr(self) -> str:
        padding = "" if self.padding_idx is None else f", padding_idx={self.padding_idx}"
        return f"{self.num_embeddings}, {self.embedding_dim}{padding}, {self._packed_repr()}"

    def _dense_shape(self) -> tuple[int, ...]:
        return self.num_embeddings, self.embedding_dim
