"""torchext.nn.MoE: the experts of a mixture, behind any router, in FP8."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import Parameter

from ..ops.experts_function import forward_only
from ..ops.experts_rows import NOTHING, quantize_weights
from ..ops.mlp_function import Save
from ..recipe import Recipe
from .composition import is_composed_in_graph
from .experts import ExpertsInFP8, ExpertsRoles
from .linear import output_dtype
from .mlp import SwiGLU, can_fuse_recipe, check_save

if TYPE_CHECKING:
    from ..moe import Dispatcher

_WIDE_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_NAME = "torchext.nn.MoE"


class MoE(ExpertsInFP8):
    """The sum over a token's choices of weight * expert(x), and a shared expert's output.

    An expert is a SwiGLU: down @ (silu(gate @ x) * (up @ x)). The caller routes: any router fits
    that gives each token its experts and their weights.

        ids, weights = router(x)                  # [..., k] each
        y = MoE(7168, 2048, 256, shared_intermediate_size=2048)(x, ids, weights)

    Parameters have the names and shapes of transformers' 3-D experts: `gate_up_proj` [E, 2 I, H],
    the rows of the gate and then those of up, and `down_proj` [E, H, I]; the shared expert is the
    module `shared_experts`.

    Each choice gets a row, sorted by expert, and the rows run through grouped FP8 GEMMs. Nothing is
    padded, nothing waits for the device, results are deterministic, and a row's result does not
    depend on the other rows. Forward and backward quantize each token once, however many experts it
    has. The weight of a choice is applied before the down-projection, so the sum over choices is a
    plain one, in FP32, to which the shared expert's output is added before it is rounded.

    The gradients of parameters (wgrad) sum over rows and so need operands that are quantized along
    them. These are made from the rows in the input's dtype, not from rows that are FP8 already:
    every operand is rounded once. Scale groups of 128 rows are counted from the first row and may
    hold rows of several experts; a NaN in one reaches the gradients of all of these. For them
    backward keeps x's rows in FP8, one byte for each element of each choice; or, with more than two
    choices (in BF16), x itself, which is smaller, and makes the rows again, with the same bits.

    With a torchext.moe.Dispatcher, this rank holds num_experts / R of the experts, those of its
    rank, and tokens go to the ranks of their experts:

        dispatcher = torchext.moe.Dispatcher(256, group=group)
        layer = MoE(7168, 2048, 256, dispatcher=dispatcher)

    Output and gradients of x and topk_weights have the bits of one process with the tokens of all
    ranks. The gradients of parameters are already sums over the tokens of all ranks. Their operands
    are rounded twice, since rows arrive in FP8. Every rank of the group must call forward and
    backward, with no tokens if it has none. Under torch.compile the experts are a graph break.
    """

    fused_roles: ExpertsRoles

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        num_experts: int,
        *,
        shared_intermediate_size: int | None = None,
        shared: torch.nn.Module | None = None,
        recipe: Recipe | None = None,
        save: Save = "fp8",
        dispatcher: Dispatcher | None = None,
        exact: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Allocates the parameters and initializes each expert as torchext.nn.SwiGLU does.

        Args:
            hidden_size: size H of the last dimension of input and output.
            intermediate_size: number of activated features of each expert, I.
            num_experts: E, from 1 to 1024; those of all ranks.
            shared_intermediate_size: makes a torchext.nn.SwiGLU of this width that every token
                passes; None for no shared expert.
            shared: a module for every token instead, called as shared(x [tokens, H]).
            recipe: a blockwise recipe whose GEMMs are all FP8. If None, the dispatcher's, or
                Recipe.deepseek_v3().
            save: what backward gets of the activation's operands, as for torchext.nn.SwiGLU.
            dispatcher: sends tokens to experts on other ranks; None if all experts are here.
            exact: with a dispatcher, whether every choice's row returns by itself; see
                Dispatcher.combine.
            device, dtype: of the parameters, as for torchext.nn.Linear.

        Raises:
            ValueError: num_experts, save or recipe is none of these or not the dispatcher's, or two
                shared experts are given.
            TypeError: recipe is not a torchext.Recipe.
        """
        super().__init__()
        check_save(_NAME, save)
        if dispatcher is not None:
            _check_dispatcher(dispatcher, num_experts, recipe)
            recipe = dispatcher.recipe
        _check_arguments(num_experts, recipe, shared_intermediate_size, shared)
        self.hidden_size, self.intermediate_size = hidden_size, intermediate_size
        self.num_experts = num_experts
        self.dispatcher, self.exact = dispatcher, exact
        local_experts = num_experts if dispatcher is None else dispatcher.num_local_experts
        options: dict[str, Any] = {"device": device, "dtype": dtype}
        names = "gate_up_proj", "down_proj"
        shapes = (2 * intermediate_size, hidden_size), (hidden_size, intermediate_size)
        for name, shape in zip(names, shapes, strict=True):
            setattr(self, name, Parameter(torch.empty(local_experts, *shape, **options)))
        if shared_intermediate_size is not None:
            shared = SwiGLU(
                hidden_size, shared_intermediate_size, **options, recipe=recipe, save=save
            )
        self.shared_experts = shared
        arguments = "x", "topk_idx", "topk_weights"
        self._setup(ExpertsRoles(names, "silu_mul", None, arguments), recipe or Recipe(), save)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws the experts' parameters from U(-b, b), b = 1 / sqrt(the size of its input)."""
        for parameter in self._held():
            bound = parameter.shape[-1] ** -0.5 if parameter.shape[-1] > 0 else 0.0
            torch.nn.init.uniform_(parameter, -bound, bound)

    def forward(self, x: Tensor, topk_idx: Tensor, topk_weights: Tensor) -> Tensor:
        """The layer's output [..., H], in x's dtype or autocast's.

        There are gradients for x, topk_weights and all parameters. A NaN or infinity in a token
        makes its output NaN.

        Args:
            x: [..., H], FP32, BF16 or FP16, of any strides, on the device of the parameters.
            topk_idx: [..., k], int64 or int32: the experts of each token. -1, like any other number
                outside 0 to E - 1, is no expert and adds nothing. A token may choose an expert
                twice.
            topk_weights: [..., k], floating-point: the factor of each choice.

        Raises:
            ValueError: a shape or device does not fit.
            TypeError: a tensor has another dtype.
            RuntimeError: under a transform of torch.func, or with forward-mode gradients.
        """
        self._check(x, topk_idx, topk_weights)
        tokens = x.reshape(-1, self.hidden_size)
        ids, weights = (t.reshape(tokens.shape[0], t.shape[-1]) for t in (topk_idx, topk_weights))
        residual = None
        if self.shared_experts is not None:
            residual = self.shared_experts(tokens).to(output_dtype(x))
        y = self._experts(tokens, ids, weights, residual)
        return y.to(output_dtype(x)).reshape(x.shape)

    def _experts(self, x: Tensor, ids: Tensor, weights: Tensor, residual: Tensor | None) -> Tensor:
        """y [T, H] of x [T, H], with the residual added."""
        if self.dispatcher is not None:
            return self._dispatched(x, ids, weights, residual)
        if torch.compiler.is_compiling() and is_composed_in_graph():  # an exported graph
            given = self._operands(False, False)
            operands = quantize_weights(given, self._matrices(), self.recipe, NOTHING)
            return forward_only(self._config(x), operands, x, ids, weights, residual=residual)
        return self._run(x, ids, weights, residual)

    @torch._disable_dynamo
    def _dispatched(
        self, x: Tensor, ids: Tensor, weights: Tensor, residual: Tensor | None
    ) -> Tensor:
        from ..moe import experts  # loads torch.distributed, as the dispatcher has

        assert self.dispatcher is not None
        up, down = self._held()
        of_up, of_down = self._operands(x.requires_grad, True)
        return experts(
            x,
            weights,
            up,
            down,
            dispatcher=self.dispatcher,
            routing=self.dispatcher.create_routing(ids, weights),
            config=self._config(x),
            residual=residual,
            operands=(of_up, of_down),
            exact=self.exact,
        )

    def extra_repr(self) -> str:
        sizes = f"{self.hidden_size}, {self.intermediate_size}, num_experts={self.num_experts}"
        if self.dispatcher is not None:
            sizes += f" on {self.dispatcher.num_ranks} ranks"
        return f"{sizes}, save={self.fused_save!r}, {super().extra_repr()}"

    def _wide_parameters(self) -> list[tuple[str, Tensor]]:
        """Those that must be in FP32, BF16 or FP16, with their names."""
        return list(zip(self.fused_roles.parameters, self._held(), strict=True))

    def _check(self, x: Tensor, topk_idx: Tensor, topk_weights: Tensor) -> None:
        parameters = self._held()
        device = parameters[0].device
        if x.dim() == 0 or x.shape[-1] != self.hidden_size:
            raise ValueError(
                f"{_NAME}: x must have shape [..., {self.hidden_size}] (got {list(x.shape)}); make "
                "its last dimension hidden_size"
            )
        for name, tensor in (("topk_idx", topk_idx), ("topk_weights", topk_weights)):
            if tensor.dim() == 0 or tensor.shape[:-1] != x.shape[:-1]:
                raise ValueError(
                    f"{_NAME}: {name} must have shape {[*x.shape[:-1], 'k']} for x of shape "
                    f"{list(x.shape)} (got {list(tensor.shape)}); give each token its choices"
                )
        if topk_idx.shape != topk_weights.shape:
            raise ValueError(
                f"{_NAME}: topk_weights must have the shape of topk_idx, {list(topk_idx.shape)} "
                f"(got {list(topk_weights.shape)}); pass a weight for each choice"
            )
        for name, tensor in (("x", x), ("topk_idx", topk_idx), ("topk_weights", topk_weights)):
            if tensor.device != device:
                raise ValueError(
                    f"{_NAME}: {name} must be on device {device}, where the parameters are (got "
                    f"{tensor.device}); move it with .to()"
                )
        for name, tensor in (("x", x), *self._wide_parameters()):
            if tensor.dtype not in _WIDE_DTYPES:
                raise TypeError(
                    f"{_NAME}: {name} must be torch.float32, torch.bfloat16 or torch.float16 (got "
                    f"{tensor.dtype}); convert it with .to()"
                )
        if topk_idx.dtype not in (torch.int64, torch.int32):
            raise TypeError(
                f"{_NAME}: topk_idx must be torch.int64 or torch.int32 (got {topk_idx.dtype}); "
                "pass the indices of torch.topk"
            )
        if not topk_weights.is_floating_point():
            raise TypeError(
                f"{_NAME}: topk_weights must be floating-point (got {topk_weights.dtype}); convert "
                "them with .float()"
            )
        if not torch.compiler.is_compiling() and (
            torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0
        ):
            raise RuntimeError(
                f"{_NAME}: must not run under torch.func's transforms or forward-mode gradients "
                "(got one of them); call it outside, or use backward()"
            )


def _check_dispatcher(dispatcher: Dispatcher, num_experts: int, recipe: Recipe | None) -> None:
    if num_experts != dispatcher.num_experts:
        raise ValueError(
            f"{_NAME}: num_experts must be the dispatcher's, {dispatcher.num_experts} (got "
            f"{num_experts}); give both the number of experts of all ranks"
        )
    if recipe is not None and recipe != dispatcher.recipe:
        raise ValueError(
            f"{_NAME}: recipe must be the dispatcher's, {dispatcher.recipe} (got {recipe}); pass "
            "it to the dispatcher"
        )


def _check_arguments(
    num_experts: int, recipe: Recipe | None, shared_size: int | None, shared: Any
) -> None:
    if not 1 <= num_experts <= 1024:
        raise ValueError(
            f"{_NAME}: num_experts must be from 1 to 1024 (got {num_experts}); split larger "
            "mixtures between ranks"
        )
    if recipe is not None and not isinstance(recipe, Recipe):
        raise TypeError(
            f"{_NAME}: recipe must be a torchext.Recipe or None (got {recipe!r}); pass, for "
            "example, Recipe.deepseek_v3()"
        )
    if recipe is not None and not can_fuse_recipe(recipe):
        raise ValueError(
            f"{_NAME}: recipe must be blockwise, with all GEMMs in FP8 (got {recipe}); grouped "
            "wgrad takes 1x128 scales: pass, for example, Recipe.deepseek_v3()"
        )
    if shared_size is not None and shared is not None:
        raise ValueError(
            f"{_NAME}: shared_intermediate_size and shared must not both be given (got "
            f"{shared_size} and a {type(shared).__name__}); omit one of them"
        )
