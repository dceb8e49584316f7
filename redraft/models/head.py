"""The vocabulary head of any transformers model, computed only where it is read.

The head and its cross-entropy are a fifth to a half of the work of a small model and most of its memory, and diffusion
reads them at the noised positions alone. A hook on the output embedding selects those rows, so every model of
transformers is served, whatever it does to its logits afterwards (scaling, soft-capping).
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from threading import Lock, RLock
from typing import Any
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

RowLoss = Callable[[Tensor, slice], Tensor]
"""(logits (n, V), which of the rows they are) -> loss of each row (n,)."""

LOGITS_PER_CHUNK = 2**24
_LOCKS: WeakKeyDictionary[nn.Module, Any] = WeakKeyDictionary()
_MAKING_A_LOCK = Lock()


@contextmanager
def _alone_at(model: nn.Module) -> Iterator[nn.Module]:
    """Give the head to one thread at a time: its hooks are shared, so another thread's forward would run them too."""
    head = output_embeddings(model)
    with _MAKING_A_LOCK:
        lock = _LOCKS.setdefault(head, RLock())
    with lock:
        yield head


@contextmanager
def head_at(model: nn.Module, rows: Int[Tensor, "n"]) -> Iterator[None]:
    """Make the model return logits (n, V) at these rows of the flattened (batch * seq) positions."""

    def select(_: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
        return (args[0].flatten(0, 1)[rows],)

    with _alone_at(model) as head:
        handle = head.register_forward_pre_hook(select)
        try:
            yield
        finally:
            handle.remove()


@dataclass
class Captured:
    """The hidden states that would have entered the head."""

    hidden: Tensor | None = None


@contextmanager
def head_skipped(model: nn.Module, rows: Int[Tensor, "n"]) -> Iterator[Captured]:
    """Keep the hidden states (n, D) at these rows for `chunked_loss`; the model's own logits are left empty."""
    captured = Captured()

    def capture(_: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
        flat = args[0].flatten(0, 1)
        captured.hidden = flat[rows]
        return (flat[:0],)

    with _alone_at(model) as head:
        handle = head.register_forward_pre_hook(capture)
        try:
            yield captured
        finally:
            handle.remove()


@contextmanager
def loss_as_logits(model: nn.Module, rows: Int[Tensor, "n"], row_loss: RowLoss) -> Iterator[list[Tensor]]:
    """Make the model return `chunked_loss` at these rows in the place of its logits: the sum, (1,).

    So head and loss are taken inside of the forward, where sharded weights are whole, and the backward pass begins at
    the model's output, as sharding expects. The list gets the detached loss of each row.
    """
    losses: list[Tensor] = []
    with _alone_at(model) as head:
        plain = head.forward

        def forward(hidden: Tensor) -> Tensor:
            total, found = chunked_loss(head, hidden.flatten(0, 1)[rows], row_loss, forward=plain)
            losses.append(found)
            return total[None]

        head.forward = forward  # FSDP hooks __call__, so forward is replaced instead
        try:
            yield losses
        finally:
            del head.forward


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
    ids = (rows + 1)[None] * (model.config.vocab_size - 1) // 8  # unlike each other: some rows may be all zero
    is_training = model.training
    model.eval()
    with head_skipped(model, rows) as captured:
        model(input_ids=ids)
    logits = model(input_ids=ids).logits.flatten(0, 1)
    model.train(is_training)
    return bool(torch.equal(output_embeddings(model)(captured.hidden), logits))


def chunked_loss(
    head: nn.Module,
    hidden: Float[Tensor, "n dim"],
    row_loss: RowLoss,
    *,
    forward: Callable[[Tensor], Tensor] | None = None,
) -> tuple[Float[Tensor, ""], Float[Tensor, "n"]]:
    """Sum `row_loss` over rows without ever holding the logits of all rows.

    Returns the sum, which carries the gradient, and the detached loss of each row. Each chunk's gradient is taken right
    after its forward, so one chunk's logits are the peak and nothing is computed twice. (The idea is Liger-Kernel's
    fused linear cross-entropy, arXiv 2410.10989; this one takes any head and any loss that is a sum over rows.)
    `forward` computes the head, by default by its call.
    """
    parameters = [p for p in head.parameters() if p.requires_grad]
    return _ChunkedLoss.apply(hidden, forward or head, _chunks(head, len(hidden)), row_loss, *parameters)


def chunked_rows(head: nn.Module, hidden: Float[Tensor, "n dim"], row_loss: RowLoss) -> Float[Tensor, "n"]:
    """Return `row_loss` of each row, with its gradient, without ever holding the logits of all rows.

    For losses that are no sum over rows. The backward pass computes each chunk's logits again: one product with the
    head more than `chunked_loss`.
    """

    def loss_of(rows: slice) -> Tensor:
        return row_loss(head(hidden[rows]), rows)

    return torch.cat([checkpoint(loss_of, rows, use_reentrant=False) for rows in _chunks(head, len(hidden))])


def _chunks(head: nn.Module, num_rows: int) -> list[slice]:
    """Cut rows so that the logits of a chunk are few enough; no rows are one chunk, whose gradient is zero."""
    size = max(1, LOGITS_PER_CHUNK // _num_outputs(head))
    return [slice(start, min(start + size, num_rows)) for start in range(0, max(num_rows, 1), size)]


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


def _num_outputs(head: nn.Module) -> int:
    """Count the rows of the vocabulary a head maps to."""
    weight: Any = head.weight
    return int(weight.shape[0])
