import copy
import weakref
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import pytest
import torch
from tiny import tiny_lm

from redraft.models import head
from redraft.models.head import chunked_loss, chunked_rows, head_is_plain, output_embeddings, select_head_rows

every_architecture = pytest.mark.parametrize("architecture", ["llama", "modernbert"])


@every_architecture
def test_logits_at_chosen_rows_are_those_of_the_whole_canvas(architecture):
    lm = tiny_lm(architecture=architecture)
    ids = torch.randint(0, 40, (3, 7))
    rows = torch.tensor([0, 5, 6, 13, 20])
    with torch.no_grad():
        whole = lm.model(input_ids=ids).logits.flatten(0, 1)[rows]
        with select_head_rows(lm.model, rows):
            chosen = lm.model(input_ids=ids).logits
    assert torch.allclose(chosen, whole, atol=1e-12)
    assert lm.model(input_ids=ids).logits.shape == (3, 7, 40)  # and nowhere else


@every_architecture
@pytest.mark.parametrize("logits_per_chunk", [1, 40 * 4, 2**20])
def test_the_chunked_loss_and_its_gradients_are_the_plain_ones(architecture, logits_per_chunk, monkeypatch):
    monkeypatch.setattr(head, "LOGITS_PER_CHUNK", logits_per_chunk)
    lm = tiny_lm(architecture=architecture, scale=1.0)
    hidden = torch.randn(11, 32, dtype=torch.float64, requires_grad=True)
    target = torch.randint(0, 40, (11,))
    layer = output_embeddings(lm.model)

    def row_loss(logits, rows):
        return torch.nn.functional.cross_entropy(logits, target[rows], reduction="none")

    inputs = [hidden, *layer.parameters()]
    plain = row_loss(layer(hidden), slice(None))
    total, rows = chunked_loss(layer, hidden, row_loss)
    assert torch.allclose(rows, plain.detach(), atol=1e-12)
    for chunked, whole in zip(
        torch.autograd.grad(3 * total, inputs), torch.autograd.grad(3 * plain.sum(), inputs), strict=True
    ):
        assert torch.allclose(chunked, whole, atol=1e-12)

    plain = row_loss(layer(hidden), slice(None))
    each = chunked_rows(layer, hidden, row_loss)  # of a loss that is no sum over rows
    assert torch.allclose(each, plain, atol=1e-12)
    for chunked, whole in zip(
        torch.autograd.grad(each.prod(), inputs), torch.autograd.grad(plain.prod(), inputs), strict=True
    ):
        assert torch.allclose(chunked, whole, rtol=1e-9)


@every_architecture
def test_inside_of_the_forward_the_chunked_loss_stands_in_the_place_of_the_logits(architecture, monkeypatch):
    monkeypatch.setattr(head, "LOGITS_PER_CHUNK", 40 * 4)
    lm = tiny_lm(architecture=architecture, scale=1.0)
    ids, rows, sizes = torch.randint(0, 40, (3, 7)), torch.tensor([0, 5, 6, 13, 20, 2]), []

    def row_loss(logits, part):
        sizes.append(len(logits))
        return logits.logsumexp(-1) * (1 + rows[part])

    with select_head_rows(lm.model, rows):
        plain = row_loss(lm.model(input_ids=ids).logits, slice(None))
    expected = torch.autograd.grad(plain.sum(), list(lm.model.parameters()), allow_unused=True)
    sizes.clear()
    with select_head_rows(lm.model, rows, row_loss=row_loss) as found:
        total = lm.model(input_ids=ids).logits
    assert torch.allclose(total.squeeze(), plain.sum(), atol=1e-12)
    assert torch.allclose(found.losses, plain.detach(), atol=1e-12)
    assert sizes == [4, 2]
    gradients = torch.autograd.grad(total.sum(), list(lm.model.parameters()), allow_unused=True)
    assert all(a is b is None or torch.allclose(a, b, atol=1e-12) for a, b in zip(gradients, expected, strict=True))
    assert lm.model(input_ids=ids).logits.shape == (3, 7, 40)  # the head is back
    with select_head_rows(lm.model, rows, is_skipped=True) as skipped:
        lm.model(input_ids=ids)
    outside, each = chunked_loss(output_embeddings(lm.model), skipped.hidden, row_loss)
    assert torch.equal(total.squeeze(), outside)
    assert torch.equal(found.losses, each)
    apart = torch.autograd.grad(outside, list(lm.model.parameters()), allow_unused=True)
    assert all(a is b is None or torch.equal(a, b) for a, b in zip(gradients, apart, strict=True))


def logits_at(model, ids, rows):
    with torch.no_grad(), select_head_rows(model, rows):
        return model(input_ids=ids).logits


def whole_logits(model, ids):
    with torch.no_grad():
        return model(input_ids=ids).logits.flatten(0, 1)


def num_hooks(model):
    layer = output_embeddings(model)
    return len(layer._forward_pre_hooks), len(layer._forward_hooks)


def meet_inside(model, num_threads):
    """Let each forward wait in a layer until as many are there: with a lock around forwards the wait would fail."""
    together = Barrier(num_threads)

    def wait(*_):
        together.wait(timeout=30)

    model.base_model.layers[0].register_forward_hook(wait)


def test_the_hooks_are_installed_once_from_however_many_threads():
    model, ids, start = tiny_lm().model, torch.randint(0, 40, (1, 5)), Barrier(8)

    def ask(row):
        start.wait(timeout=30)
        return logits_at(model, ids, torch.tensor([row % 5]))

    with ThreadPoolExecutor(8) as threads:
        list(threads.map(ask, range(8)))
    logits_at(model, ids, torch.tensor([0]))
    assert num_hooks(model) == (1, 1)


def test_threads_inside_of_the_same_forward_get_the_rows_they_asked_for():
    model, ids = tiny_lm().model, torch.randint(0, 40, (4, 7))
    asked = [torch.tensor(rows) for rows in ([0, 3], [27], [5, 5, 9], [6])]
    expected = whole_logits(model, ids)
    meet_inside(model, 4)
    with ThreadPoolExecutor(4) as threads:
        found = list(threads.map(lambda rows: logits_at(model, ids, rows), asked))
    for logits, rows in zip(found, asked, strict=True):
        assert torch.allclose(logits, expected[rows], atol=1e-12)


def test_the_losses_of_two_threads_are_not_mixed():
    model, ids = tiny_lm().model, torch.randint(0, 40, (2, 7))
    expected = whole_logits(model, ids)
    meet_inside(model, 2)

    def loss(rows, factor):
        with (
            torch.no_grad(),
            select_head_rows(model, rows, row_loss=lambda logits, _: factor * logits.sum(-1)) as found,
        ):
            return model(input_ids=ids).logits, found.losses

    asked = (torch.tensor([0, 9]), 1.0), (torch.tensor([4, 5, 6]), 3.0)
    with ThreadPoolExecutor(2) as threads:
        results = list(threads.map(lambda one: loss(*one), asked))
    for (total, losses), (rows, factor) in zip(results, asked, strict=True):
        assert torch.allclose(losses, factor * expected[rows].sum(-1), atol=1e-10)
        assert torch.allclose(total, losses.sum(), atol=1e-10)


@pytest.mark.parametrize(
    "how", [{}, {"is_skipped": True}, {"row_loss": lambda logits, _: logits.sum(-1)}], ids=["logits", "hidden", "loss"]
)
def test_an_error_inside_of_the_forward_leaves_no_trace(how):
    model, ids = tiny_lm().model, torch.randint(0, 40, (2, 5))
    expected = whole_logits(model, ids)
    with pytest.raises((IndexError, ValueError)), select_head_rows(model, torch.tensor([99]), **how):
        model(input_ids=ids)
    with (
        pytest.raises(RuntimeError, match="stop"),
        select_head_rows(model, torch.tensor([1])),
        select_head_rows(model, torch.tensor([2])),
    ):
        raise RuntimeError("stop")
    assert torch.equal(whole_logits(model, ids), expected)
    assert num_hooks(model) == (1, 1)


def test_a_copy_of_a_model_whose_head_has_hooks_is_independent():
    model, ids, rows = tiny_lm().model, torch.randint(0, 40, (2, 5)), torch.tensor([3, 8])
    chosen = logits_at(model, ids, rows)
    other = copy.deepcopy(model)
    with torch.no_grad():
        output_embeddings(other).weight.neg_()
    assert torch.allclose(logits_at(other, ids, rows), whole_logits(other, ids)[rows], atol=1e-12)
    assert not torch.allclose(logits_at(other, ids, rows), chosen, atol=1e-2)
    assert torch.equal(logits_at(model, ids, rows), chosen)
    assert num_hooks(other) == num_hooks(model) == (1, 1)


def test_another_models_head_is_left_alone_and_a_forward_inside_of_another_has_its_own_rows():
    model, other, ids = tiny_lm().model, tiny_lm(seed=1).model, torch.randint(0, 40, (2, 5))
    expected = [whole_logits(one, ids) for one in (model, other)]
    logits_at(other, ids, torch.tensor([0]))  # its head has hooks too
    with torch.no_grad(), select_head_rows(model, torch.tensor([7])):
        assert torch.equal(other(input_ids=ids).logits.flatten(0, 1), expected[1])
        assert torch.allclose(logits_at(other, ids, torch.tensor([2, 4])), expected[1][[2, 4]], atol=1e-12)
        assert torch.allclose(logits_at(model, ids, torch.tensor([1])), expected[0][[1]], atol=1e-12)
        assert torch.allclose(model(input_ids=ids).logits, expected[0][[7]], atol=1e-12)


@pytest.mark.slow
def test_a_compiled_model_returns_the_rows_asked_for():
    model, ids = tiny_lm().model, torch.randint(0, 40, (2, 5))
    expected, compiled = whole_logits(model, ids), torch.compile(model, backend="eager")
    for rows in ([7], [0, 2, 9], [4]):
        with torch.no_grad(), select_head_rows(model, torch.tensor(rows)):
            found = compiled(input_ids=ids).logits
        assert torch.allclose(found, expected[rows], atol=1e-12)
    assert torch.allclose(whole_logits(compiled, ids), expected, atol=1e-12)


def test_the_logits_of_one_chunk_at_a_time_exist(monkeypatch):
    monkeypatch.setattr(head, "LOGITS_PER_CHUNK", 9 * 7)  # six rows: pairs stay together
    layer, sizes = torch.nn.Linear(4, 9), []
    alive = weakref.WeakSet()

    def row_loss(logits, rows):
        alive.add(logits)
        sizes.append(sum(len(one) for one in alive))
        return logits.square().sum(-1)

    chunked_rows(layer, torch.randn(23, 4, requires_grad=True), row_loss).prod().backward()
    assert len(sizes) == 2 * 4
    assert max(sizes) <= 6 + 6  # the backward pass may hold one beside that which it makes


def test_a_batch_without_targets_has_no_loss_and_zero_gradients():
    layer = torch.nn.Linear(4, 9)
    hidden = torch.zeros(0, 4, requires_grad=True)
    total, rows = chunked_loss(layer, hidden, lambda logits, _: logits.sum(-1))
    total.backward()
    assert total.item() == 0
    assert rows.shape == (0,)
    assert not layer.weight.grad.any()
    layer.zero_grad()
    chunked_rows(layer, hidden, lambda logits, _: logits.sum(-1)).sum().backward()
    assert not layer.weight.grad.any()


def test_a_head_that_does_more_than_multiply_is_recognised():
    from transformers import Gemma2Config, Gemma2ForCausalLM

    config = Gemma2Config(
        vocab_size=40, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2, head_dim=16,
        intermediate_size=32, final_logit_softcapping=1.0, attn_implementation="eager",
    )  # fmt: skip
    assert not head_is_plain(Gemma2ForCausalLM(config))
    assert head_is_plain(tiny_lm().model)
    assert head_is_plain(tiny_lm(architecture="modernbert").model)


def test_a_model_without_a_head_is_told(lm):
    with pytest.raises(ValueError, match="LlamaModel has no vocabulary head"):
        output_embeddings(lm.model.base_model)
