import weakref

import pytest
import torch
from tiny import tiny_lm

from redraft.models import head
from redraft.models.head import chunked_loss, chunked_rows, head_at, head_is_plain, loss_as_logits, output_embeddings

every_architecture = pytest.mark.parametrize("architecture", ["llama", "modernbert"])


@every_architecture
def test_logits_at_chosen_rows_are_those_of_the_whole_canvas(architecture):
    lm = tiny_lm(architecture=architecture)
    ids = torch.randint(0, 40, (3, 7))
    rows = torch.tensor([0, 5, 6, 13, 20])
    with torch.no_grad():
        whole = lm.model(input_ids=ids).logits.flatten(0, 1)[rows]
        with head_at(lm.model, rows):
            chosen = lm.model(input_ids=ids).logits
    assert torch.allclose(chosen, whole, atol=1e-12)
    assert lm.model(input_ids=ids).logits.shape == (3, 7, 40)  # the hook is gone


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

    with head_at(lm.model, rows):
        plain = row_loss(lm.model(input_ids=ids).logits, slice(None))
    expected = torch.autograd.grad(plain.sum(), list(lm.model.parameters()), allow_unused=True)
    sizes.clear()
    with loss_as_logits(lm.model, rows, row_loss) as losses:
        total = lm.model(input_ids=ids).logits
    assert torch.allclose(total.squeeze(), plain.sum(), atol=1e-12)
    assert torch.allclose(losses[0], plain.detach(), atol=1e-12)
    assert sizes == [4, 2]
    found = torch.autograd.grad(total.sum(), list(lm.model.parameters()), allow_unused=True)
    assert all(a is b is None or torch.allclose(a, b, atol=1e-12) for a, b in zip(found, expected, strict=True))
    assert lm.model(input_ids=ids).logits.shape == (3, 7, 40)  # the head is back


def test_the_logits_of_one_chunk_at_a_time_exist(monkeypatch):
    monkeypatch.setattr(head, "LOGITS_PER_CHUNK", 9 * 5)
    layer, sizes = torch.nn.Linear(4, 9), []
    alive = weakref.WeakSet()

    def row_loss(logits, rows):
        alive.add(logits)
        sizes.append(sum(len(one) for one in alive))
        return logits.square().sum(-1)

    chunked_rows(layer, torch.randn(23, 4, requires_grad=True), row_loss).prod().backward()
    assert len(sizes) == 2 * 5
    assert max(sizes) <= 5 + 5  # the backward pass may hold one beside that which it makes


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
