"""The vocabulary head of any transformers model, computed only at the positions whose logits are needed.

The head and its cross-entropy are a fifth to a half of the work of a small model and most of its memory, and diffusion
needs them at the noised positions alone. Hooks on the output embedding, one pair for each model, select those rows. So
this works for every model of transformers, whatever it does to its logits afterwards (scaling, soft-capping). A context
variable, which is separate in every thread, tells the hooks what to do in a forward: two threads may call one model.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import partial
from threading import Lock
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

RowLoss = Callable[[Tensor, slice], Tensor]
"""(logits (n, V), which of the rows they are) -> loss of each row (n,)."""

LOGITS_PER_CHUNK = 2**24
ROWS_PER_SHAPE = 128
"""On a CPU the head is given a multiple of so many rows, as every new shape of a product keeps 30 MB there."""


@dataclass
class AtHead:
    """What the head does in the forward that runs now, and what it computed."""

    head: nn.Module
    rows: Int[Tensor, "n"]
    """Rows of the flattened (batch * seq) positions."""
    is_skipped: bool = False
    """Whether the head is skipped: the hidden states are kept, and no logits are computed."""
    row_loss: RowLoss | None = None
    """If set, the sum of this loss, (1,), takes the place of the logits."""
    hidden: Tensor | None = None
    """The states (n, D) that would have entered the head."""
    losses: Tensor | None = None
    """Detached loss of each row."""


_NOW: ContextVar[AtHead | None] = ContextVar("redraft_at_head", default=None)
_INSTALLING = Lock()


@torch.compiler.disable
def _before(head: nn.Module, args: tuple[Tensor]) -> tuple[Tensor] | None:
    now = _NOW.get()
    if now is None or now.head is not head:
        return None
    flat = args[0].flatten(0, 1)
    if not now.is_skipped and now.row_loss is None:
        return (flat[now.rows],)
    now.hidden = flat[now.rows]
    return (flat[:0],)


@torch.compiler.disable
def _after(head: nn.Module, _: tuple[Tensor], __: Tensor) -> Tensor | None:
    now = _NOW.get()
    if now is None or now.head is not head or now.row_loss is None:
        return None
    assert now.hidden is not None
    total, now.losses = chunked_loss(head, now.hidden, now.row_loss)
    return total[None]


@contextmanager
def select_head_rows(
    model: nn.Module, rows: Int[Tensor, "n"], *, is_skipped: bool = False, row_loss: RowLoss | None = None
) -> Iterator[AtHead]:
    """Make the model return logits (n, V) at these rows alone, in this thread.

    If `is_skipped`, it returns no logits, and the hidden states are recorded for `chunked_loss`. With a `row_loss` it
    returns `chunked_loss` instead: head and loss are then computed inside of the forward, where sharded weights are
    whole, and the backward pass begins at the model's output, as FSDP expects.
    """
    head = output_embeddings(model)
    with _INSTALLING:
        if _before not in head._forward_pre_hooks.values():
            head.register_forward_pre_hook(_before)
            head.register_forward_hook(_after, prepend=True)  # before FSDP's hook shards the weights again
    now = AtHead(head, rows, is_skipped, row_loss)
    token = _NOW.set(now)
    try:
        yield now
    finally:
        _NOW.reset(token)


def output_embeddings(model: Any) -> nn.Module:
    """Return the module that maps hidden states to logits. Raises ValueError for a model without one."""
    head = model.get_output_embeddings()
    if head is None:
        raise ValueError(f"{type(model).__name__} has no vocabulary head; a denoiser needs a language-modelling class.")
    return head


@torch.no_grad()
def head_is_plain(model: Any) -> bool:
    """Tell whether the logits are the output embedding's own, so that `chunked_loss` may call it by itself."""
    rows = torch.arange(8, device=next(model.parameters()).device)
    last = model.config.get_text_config().vocab_size - 1
    ids = (rows + 1)[None] * last // 8  # all different, as some embeddings may be all zero
    is_training = model.training
    model.eval()
    with select_head_rows(model, rows, is_skipped=True) as at_head:
        model(input_ids=ids)
    logits = model(input_ids=ids).logits.flatten(0, 1)
    model.train(is_training)
    return bool(torch.equal(output_embeddings(model)(at_head.hidden), logits))


def chunked_loss(
    head: nn.Module, hidden: Float[Tensor, "n dim"], row_loss: RowLoss
) -> tuple[Float[Tensor, ""], Float[Tensor, "n"]]:
    """Sum `row_loss` over rows without ever holding the logits of all rows.

    Returns the sum, which carries the gradient, and the detached loss of each row. Each chunk's gradient is taken right
    after its forward, so one chunk's logits are the peak and nothing is computed twice. (The idea is Liger-Kernel's
    fused linear cross-entropy, arXiv 2410.10989; this one takes any head and any loss that is a sum over rows.)
    """
    parameters = [p for p in head.parameters() if p.requires_grad]
    # `head.forward` calls no hooks: inside of the model's forward (`_after`) they have already run.
    logits_of = partial(_in_few_shapes, head.forward)
    return _ChunkedLoss.apply(hidden, logits_of, _chunks(head, len(hidden)), row_loss, *parameters)


def chunked_rows(head: nn.Module, hidden: Float[Tensor, "n dim"], row_loss: RowLoss) -> Float[Tensor, "n"]:
    """Return `row_loss` of each row, with its gradient, without ever holding the logits of all rows.

    For losses that are no sum over rows. The backward pass computes each chunk's logits again: one product with the
    head more than `chunked_loss`.
    """

    def loss_of(rows: slice) -> Tensor:
        return row_loss(_in_few_shapes(head, hidden[rows]), rows)

    return torch.cat([checkpoint(loss_of, rows, use_reentrant=False) for rows in _chunks(head, len(hidden))])


def _chunks(head: Any, num_rows: int) -> list[slice]:
    """Cut rows into chunks of at most LOGITS_PER_CHUNK logits; no rows give one empty chunk, with zero gradient.

    Pairs of rows stay together: a loss may compare two predictions.
    """
    size = max(2, LOGITS_PER_CHUNK // head.weight.shape[0] // 2 * 2)
    return [slice(start, min(start + size, num_rows)) for start in range(0, max(num_rows, 1), size)]


def _in_few_shapes(head: Callable[[Tensor], Tensor], hidden: Float[Tensor, "n dim"]) -> Float[Tensor, "n vocab"]:
    """Call the head on a few more rows, which are zero, so that steps with other numbers of targets have its shape."""
    if hidden.device.type != "cpu":
        return head(hidden)
    return head(F.pad(hidden, (0, 0, 0, -len(hidden) % ROWS_PER_SHAPE)))[: len(hidden)]


class _ChunkedLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        head: Callable[[Tensor], Tensor],
        chunks: list[slice],
        row_loss: RowLoss,
        *parameters: Tensor,
    ) -> tuple[Tensor, Tensor]:
        wants_grad = any(ctx.needs_input_grad)
        losses: list[Tensor] = []
        hidden_grad = torch.empty_like(hidden) if wants_grad else None
        parameter_grads: list[Tensor] = []
        for rows in chunks:
            with torch.set_grad_enabled(wants_grad):
                chunk = hidden[rows].detach().requires_grad_(wants_grad)
                loss = row_loss(head(chunk), rows)
                losses.append(loss.detach())
                if not wants_grad:
                    continue
                grads = torch.autograd.grad(loss.sum(), (chunk, *parameters))
            assert hidden_grad is not None
            hidden_grad[rows] = grads[0]
            if parameter_grads:
                torch._foreach_add_(parameter_grads, list(grads[1:]))
            else:
                parameter_grads = list(grads[1:])
        if wants_grad:
            ctx.save_for_backward(hidden_grad, *parameter_grads)
        row_losses = torch.cat(losses)
        ctx.mark_non_differentiable(row_losses)
        return row_losses.sum(), row_losses

    @staticmethod
    def backward(ctx: Any, total_grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        hidden_grad, *parameter_grads = ctx.saved_tensors
        scaled = [grad * total_grad.to(grad.dtype) for grad in parameter_grads]
        return (hidden_grad * total_grad.to(hidden_grad.dtype), None, None, None, *scaled)
