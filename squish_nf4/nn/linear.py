"""NF4Linear: nn.Linear on packed bytes. How the bytes are moved, cast and loaded is in packed.py."""

# No "from __future__ import annotations" here: TorchScript reads the annotation of `scales` as a type, not as a string.
from collections.abc import Callable
from math import sqrt

import torch
from torch import Tensor, nn
from torch._C import DisableTorchFunctionSubclass

from squish_nf4.nn.packed import PackedModule, dtype_to_make, require_dense

is_tracing: Callable[[], bool] = torch.jit.is_tracing  # type: ignore[attr-defined]  # TorchScript chokes on it below


@torch.fx.wrap  # one call in a torch.fx graph: symbolic tracing cannot look at the width
def _linear_of_width(
    x: Tensor, weight: Tensor, scales: Tensor, bias: Tensor | None, in_features: int, group_size: int
) -> Tensor:
    """The product for an x of the layer's width: to the operator a narrower one is one whose padding was left out."""
    if not is_tracing() and x.size(-1) != in_features:
        raise ValueError(f"NF4Linear: x has {x.size(-1)} columns, but in_features is {in_features}")
    if not torch.jit.is_scripting():  # type: ignore[attr-defined]
        return _linear_in_python(x, weight, scales, bias, group_size)
    result: Tensor = torch.ops.squish.linear_nf4(x, weight, scales, bias, group_size)
    return result


def _linear_in_python(x: Tensor, weight: Tensor, scales: Tensor, bias: Tensor | None, group_size: int) -> Tensor:
    result: Tensor
    if type(x) is Tensor:  # past PackedWeight.__torch_function__, which takes as long as a small product
        with DisableTorchFunctionSubclass():
            result = torch.ops.squish.linear_nf4.default(x, weight, scales, bias, group_size)
    elif x.is_nested:
        result = _linear_of_nested(x, weight, scales, bias, group_size)
    else:
        result = torch.ops.squish.linear_nf4(x, weight, scales, bias, group_size)
    return result


def _linear_of_nested(x: Tensor, weight: Tensor, scales: Tensor, bias: Tensor | None, group_size: int) -> Tensor:
    """A ragged batch is one batch of all its rows."""
    if x.layout == torch.jagged and x._ragged_idx != 1:  # type: ignore[attr-defined]
        raise ValueError(
            f"NF4Linear: dimension {x._ragged_idx} of the jagged x is the ragged one; dimension 1 is wanted"  # type: ignore[attr-defined]
        )
    rows = _linear_in_python(x.values(), weight, scales, bias, group_size)
    lengths = (x._maybe_min_seqlen, x._maybe_max_seqlen)  # type: ignore[attr-defined]
    return torch.nested.nested_tensor_from_jagged(rows, x.offsets(), x.lengths(), 1, *lengths)  # type: ignore[attr-defined]


class NF4Linear(PackedModule, nn.Linear):
    """``y = x W^T + b`` with W stored at 4 bits per weight and a float32 scale per group; computes on the packed bytes.

    A drop-in for nn.Linear in a forward pass: any leading dimensions, float32, bfloat16 or float16 activations, any
    in_features (odd ones and those that are no multiple of group_size are padded inside, with weights that are zero).
    Gradients flow to x and bias; the packed weight is not trained.

    Args:
        in_features: columns d of the weight.
        out_features: rows n of the weight.
        bias: whether there is a bias.
        group_size: neighbouring columns that share a scale. If in_features is smaller, the size of at most group_size
            that pads least is used instead; the attribute and repr() say which.
        device: where to create it; "meta" makes an empty layer to load into.
        dtype: float32, bfloat16 or float16: of the bias, and of what to_linear() returns.

    Attributes:
        weight: Parameter (n, c/2) uint8, the packed bytes; requires_grad is False. It is moved, sliced, compared and
            saved as bytes; what would take them for numbers (arithmetic, casts, averages, initializers) is a
            RuntimeError that says so: docs/packed-weight.md. c: in_features, padded.
        scales: buffer (n, c/group_size) float32, whatever the layer is cast to.
        bias: Parameter (n,) or None.
        dense_dtype: what ``dtype`` was, following .to(dtype) and .half().

    Raises:
        ValueError: group_size is not positive, a size is negative.
        TypeError: dtype is not one of the three.
    """

    __constants__ = ["group_size", "in_features", "out_features"]  # noqa: RUF012  (nn.Linear's is a list)
    __jit_unused_properties__ = ("bits_per_weight",)

    scales: Tensor  # TorchScript reads the annotations of this class alone

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        group_size: int = 64,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        nn.Module.__init__(self)  # not nn.Linear's: it would allocate the dense weight
        sizes = {"in_features": in_features, "out_features": out_features}
        dtype = dtype_to_make("NF4Linear", sizes, group_size, dtype)
        self.in_features = in_features
        self.out_features = out_features
        if bias:  # first: code that asks the first parameter of a model for a dtype finds one to compute in
            self.bias = nn.Parameter(torch.empty(out_features, dtype=dtype, device=device))
        else:
            self.register_parameter("bias", None)
        self._allocate(group_size, device, dtype)
        self.reset_parameters()

    @classmethod
    def from_linear(cls, linear: nn.Linear, group_size: int = 64) -> "NF4Linear":
        """Quantize a linear layer; the original is left as it is.

        Device, bias (a copy, with its requires_grad), dtype and training mode are taken over.

        Raises:
            ValueError: the weight holds NaN or infinity; the text says where.
            TypeError: ``linear`` is not a dense nn.Linear of float32, bfloat16 or float16.
        """
        require_dense("NF4Linear.from_linear", linear, nn.Linear)
        weight, bias = linear.weight, linear.bias
        layer = cls(
            linear.in_features,
            linear.out_features,
            bias is not None,
            group_size=group_size,
            device="meta",
            dtype=weight.dtype,
        )
        layer._become("NF4Linear.from_linear: weight", weight)
        if bias is not None:
            with torch.inference_mode(False), torch.no_grad():
                layer.bias = nn.Parameter(bias.detach().clone(), requires_grad=bias.requires_grad)
        return layer.train(linear.training)

    def to_linear(self) -> nn.Linear:
        """The dense layer that this one computes, in ``dense_dtype``."""
        with torch.inference_mode(False), torch.no_grad():
            has_bias = self.bias is not None
            linear = nn.Linear(self.in_features, self.out_features, has_bias, device="meta", dtype=self.dense_dtype)
            linear.weight = nn.Parameter(self.dequantize(self.dense_dtype))
            if has_bias:
                linear.bias = nn.Parameter(self.bias.detach().clone(), requires_grad=self.bias.requires_grad)
        return linear.train(self.training)

    def forward(self, x: Tensor) -> Tensor:
        """(..., in_features) -> (..., out_features) in the dtype of x."""
        if not torch.jit.is_scripting():  # type: ignore[attr-defined]
            self.require_whole()
        return _linear_of_width(x, self.weight, self.scales, self.bias, self.in_features, self.group_size)

    def reset_parameters(self) -> None:
        """Initialize as nn.Linear does (same random numbers) and quantize the weight."""
        if self.weight.is_meta:
            return
        with torch.no_grad():
            shape = (self.out_features, self.in_features)
            dense = torch.empty(shape, dtype=self.dense_dtype, device=self.weight.device)
            nn.init.kaiming_uniform_(dense, a=sqrt(5))
            self._take("NF4Linear.reset_parameters: weight", dense)
            if self.bias is not None:
                bound = 1 / sqrt(self.in_features) if self.in_features > 0 else 0
                nn.init.uniform_(self.bias, -bound, bound)

    def extra_repr(self) -> str:
        sizes = f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"
        return f"{sizes}, {self._packed_repr()}"

    def _dense_shape(self) -> tuple[int, ...]:
        return self.out_features, self.in_features
