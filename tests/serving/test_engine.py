"""The engine: whatever else runs, a served request is what `generate` gives."""

import time
from dataclasses import replace
from functools import cache

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from sentence_pieces import tokenizer_of
from serving_tools import check_served, running, send
from tiny import tiny_lm

import redraft
from redraft.likelihood.options import score_options
from redraft.serving.request import Draining, Full

LONG = 40
PROMPTS = ([5, 6, 7], [8, 9], [5, 6, 7, 8, 9, 10, 11, 12, 13], [4], [5, 6, 7, 8, 9, 10, 11, 12, 14, 15])
TEXTS = ("Hello", "yes no", "Hello self able un", "")


@cache
def model(name):
    """Ids or text, full or block-causal attention."""
    block_size = 4 if name.endswith("causal") else None
    if name.startswith("ids"):
        return tiny_lm(block_size=block_size)
    tokenizer = tokenizer_of("llama2")
    return replace(tiny_lm(vocab_size=len(tokenizer), block_size=block_size), tokenizer=tokenizer)


KINDS = ("ids full", "ids causal", "text full", "text causal")


@cache
def generated(name, prompt, items):
    return model(name).generate([prompt if isinstance(prompt, str) else list(prompt)], **dict(items))


def some_request(data, name):
    """Draw a prompt with settings; stop strings are such that occur, or may."""
    chosen = {"max_new_tokens": data.draw(st.sampled_from((4, 12, 16))), "seed": data.draw(st.integers(0, 2))}
    chosen["temperature"] = data.draw(st.sampled_from((0.0, 0.8)))
    chosen["num_samples"] = data.draw(st.sampled_from((1, 1, 3)))
    if data.draw(st.booleans()):
        chosen["preset"] = data.draw(st.sampled_from(("sdar", "llada-random", "fast-dllm", "llada2.1")))
    if name.startswith("ids"):
        return data.draw(st.sampled_from(PROMPTS)), chosen
    prompt = data.draw(st.sampled_from(TEXTS))
    how = data.draw(st.sampled_from(("", "", "stop", "constraint")))
    if how == "stop":
        whole = generated(name, prompt, tuple(chosen.items())).texts[0]
        chosen["stop"] = (whole[len(whole) // 2 :][:3] or "x", "never")
    if how == "constraint":
        chosen["constraint"] = redraft.Regex("(yes|no)( [a-z]{1,3}){0,2}")
    return prompt, chosen


FAST = ("ids full", "text causal")


@pytest.mark.parametrize("name", [pytest.param(n, marks=[] if n in FAST else pytest.mark.slow) for n in KINDS])
@settings(max_examples=10, phases=[Phase.generate])  # an example takes long, so none is made smaller
@given(data=st.data())
def test_served_is_generated_whatever_joins_and_leaves(name, data):
    lm = model(name)
    asked = [some_request(data, name) for _ in range(data.draw(st.integers(1, 6)))]
    gone = data.draw(st.sets(st.integers(0, 5), max_size=2))
    size = {"max_rows": data.draw(st.integers(1, 5)), "chunk": data.draw(st.sampled_from((1, 4, 8)))}
    with running(lm, **size) as engine:
        clients = []
        for i, (prompt, chosen) in enumerate(asked):
            prepared = lm.prepare([prompt if isinstance(prompt, str) else list(prompt)], **chosen)
            clients.append(send(engine, prepared, id=str(i), key=str(i % 2)))
            if i in gone:
                engine.cancel(str(i))
        for i, ((prompt, chosen), client) in enumerate(zip(asked, clients, strict=True)):
            if i not in gone:
                key = prompt if isinstance(prompt, str) else tuple(prompt)
                check_served(client.wait(), generated(name, key, tuple(chosen.items())))


@pytest.mark.parametrize("name", ["ids causal", "text causal"])
def test_a_prefix_is_copied_under_the_same_key_alone_and_changes_nothing(name):
    lm, prompt = model(name), [5, 6, 7, 8, 9, 10, 11, 12, 13]
    prepared = lm.prepare([prompt], max_new_tokens=8)
    with running(lm, max_rows=2) as engine:
        cached = []
        for key in ("a", "a", "b", "b"):
            client = send(engine, prepared, key=key).wait()
            check_served(client, lm.generate([prompt], max_new_tokens=8))
            cached.append(client.last().usage.cached_tokens)
        assert cached == [0, 8, 0, 8]
    with running(lm, max_rows=2, share_prefixes=True) as engine:
        assert [send(engine, prepared, key=key).wait().last().usage.cached_tokens for key in "ab"] == [0, 8]


def test_holes_are_filled_as_infill_fills_them():
    lm, text = model("text full"), "Hello [MASK:3] self [MASK:2]"
    with running(lm) as engine:
        client = send(engine, lm.prepare([text], holes=True), wants_drafts=True).wait()
        expected = lm.infill([text])
    check_served(client, expected)
    assert len(client.deltas) - sum(delta.draft is not None for delta in client.deltas) == 1


def test_log_probabilities_are_those_of_the_step_that_placed_the_token():
    lm = model("ids causal")
    prepared = lm.prepare([[5, 6]], max_new_tokens=8, temperature=0.8, stop=None)
    with running(lm) as engine:
        client, plain = send(engine, prepared, top_logprobs=3).wait(), send(engine, prepared, id="b").wait()
    assert plain.tokens() == client.tokens()
    assert all(delta.logprobs is None for delta in plain.deltas)
    confidences = {}
    for step in lm.stream([[5, 6]], max_new_tokens=8, temperature=0.8, stop=None):
        placed = step.is_committed[0].nonzero()[:, 0]
        confidences |= dict(zip(placed.tolist(), step.confidence[0, placed].log().tolist(), strict=True))
    found = [one for delta in client.deltas for one in delta.logprobs]
    assert [one.token_id for one in found] == client.tokens()
    assert [one.logprob for one in found] == pytest.approx([confidences[2 + i] for i in range(8)])
    for one in found:
        assert len(one.top) == 3
        values = [logprob for _, logprob in one.top]
        assert values == sorted(values, reverse=True)
        assert max(values) >= one.logprob - 1e-6
        assert dict(one.top).get(one.token_id, one.logprob) == pytest.approx(one.logprob, abs=1e-5)


def test_drafts_show_the_open_block_and_rise(monkeypatch):
    monkeypatch.setattr("redraft.serving.engine.DRAFT_SECONDS", 0.0)
    lm = model("text causal")
    with running(lm) as engine:
        client = send(engine, lm.prepare(["Hello"], max_new_tokens=16, stop=None), wants_drafts=True).wait()
    drafts = [delta.draft for delta in client.deltas if delta.draft is not None]
    assert [draft.revision for draft in drafts] == list(range(1, len(drafts) + 1))
    assert len(drafts) > 3
    for draft in drafts:
        assert 0 <= draft.start < draft.end <= 16
        assert len(draft.tokens) == draft.end - draft.start
        assert draft.tokens[0].status == "noise"
        assert all(0 < token.confidence <= 1 for token in draft.tokens)


def test_keys_take_turns_and_a_key_is_served_in_order():
    lm = model("ids causal")
    prepared, ends, began = lm.prepare([[5, 6]], max_new_tokens=4), [], time.monotonic()
    with running(lm, max_rows=1) as engine:
        first = lm.prepare([[4]], max_new_tokens=LONG, stop=None)
        gate = send(engine, first, id="gate", key="a", on_delta=lambda: time.sleep(0.01))
        clients = [
            send(engine, prepared, id=f"{key}{i}", key=key, on_end=lambda name=f"{key}{i}": ends.append(name))
            for key, count in (("a", 6), ("b", 3))
            for i in range(count)
        ]
        for client in [gate, *clients]:
            client.wait()
    assert time.monotonic() > began
    assert [name for name in ends if name[0] == "a"] == [f"a{i}" for i in range(6)]
    assert ends[:3] == ["b0", "b1", "b2"]  # the gate was dear, and it was a's


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("max_rows", [1, 2])
def test_a_key_that_floods_holds_up_another_one_by_one_slot_at_most(max_rows):
    lm, begun, came = model("ids causal"), [], []
    prepared = lm.prepare([[5, 6]], max_new_tokens=8, stop=None)
    with running(lm, max_rows=max_rows) as engine:

        def ask(name, **more):
            started = {"on_delta": lambda: name in begun or begun.append(name)}
            return send(engine, prepared, id=name, key=name[0], **started, **more)

        clients = [ask(f"a{i}") for i in range(3)]
        clients.append(ask("a3", on_end=lambda: came.append((len(begun), ask("b")))))  # a slot is free now
        clients += [ask(f"a{i}") for i in range(4, 12)]
        for client in clients:
            client.wait()
        num_begun, other = came[0]
        other.wait()
    assert begun.index("b") - num_begun <= 1
    assert [name for name in begun if name[0] == "a"] == [f"a{i}" for i in range(12)]


def test_too_many_too_long_and_too_late_requests_are_refused():
    lm = model("ids causal")
    prepared = lm.prepare([[5, 6]], max_new_tokens=LONG, stop=None)
    with pytest.raises(ValueError, match="max_model_len must be at most the model's context of 128 tokens; got 500"):
        running(lm, max_model_len=500).__enter__()
    with running(lm, max_rows=1, max_queue=2, max_model_len=44) as engine:
        with pytest.raises(ValueError, match="must fit into 44 tokens here; got 64"):
            send(engine, lm.prepare([[5, 6]], max_new_tokens=60))
        with pytest.raises(ValueError, match="no adapter 'x'"):
            send(engine, prepared, adapter="x")
        slow = {"on_delta": lambda: time.sleep(0.05)}
        clients = [send(engine, prepared, id="0", **slow)]
        while not clients[0].deltas:
            time.sleep(0.001)
        clients += [send(engine, prepared, id=str(i)) for i in (1, 2)]
        with pytest.raises(Full) as full:
            send(engine, prepared, id="3")
        assert 1 <= full.value.retry_after <= 120
        clients.append(send(engine, prepared, id="4", key="other"))  # the limit is a key's own
        for client in clients:
            assert client.wait().last().finish_reason == "length"
    with pytest.raises(Draining):
        send(engine, prepared)


def test_a_deadline_ends_a_row_with_what_is_decided():
    lm = model("text causal")
    expected = lm.generate(["Hello"], max_new_tokens=LONG, stop=None)
    prepared = lm.prepare(["Hello"], max_new_tokens=LONG, stop=None)
    with running(lm, max_rows=1) as engine:
        slow = {"on_delta": lambda: time.sleep(0.05)}
        begun = send(engine, prepared, deadline=time.monotonic() + 0.4, id="a", **slow)
        queued = send(engine, prepared, deadline=time.monotonic() + 0.1, id="b").wait()
        begun.wait()
        tokens = begun.tokens()
        assert 0 < len(tokens) < LONG
        assert tokens == expected.tokens[0].tolist()[: len(tokens)]
        assert begun.text() == lm.decode(tokens, after=prepared.rows[0])
        assert (queued.tokens(), queued.text()) == ([], "")
        assert begun.last().finish_reason == queued.last().finish_reason == "length"
        check_served(send(engine, prepared, id="c").wait(), expected)


def test_a_drain_finishes_what_runs_and_ends_the_rest_with_an_error():
    lm = model("ids causal")
    prepared = lm.prepare([[5, 6]], max_new_tokens=LONG, stop=None)
    with running(lm, max_rows=1) as engine:
        clients = [send(engine, prepared, id=str(i)) for i in range(3)]
        engine.drain(60)
        assert engine.is_draining
        for client in clients:
            check_served(client.wait(), lm.generate([[5, 6]], max_new_tokens=LONG, stop=None))
    with running(lm, max_rows=1) as engine:
        clients = [send(engine, prepared, id=str(i), on_delta=lambda: time.sleep(0.05)) for i in range(2)]
        engine.drain(0.1)
        assert [client.wait().last().finish_reason for client in clients] == ["error", "error"]
        assert "shuts down" in clients[0].last().error
    assert not engine.is_alive


def test_adapters_are_chosen_by_name():
    base, other = model("ids causal"), tiny_lm(block_size=4, seed=1)
    with running(base, adapters={"other": other}) as engine:
        engine.warm_up()
        sent = [(lm, send(engine, lm.prepare([[5, 6]], max_new_tokens=12), id=str(i), adapter=name))
                for i, (name, lm) in enumerate([(None, base), ("other", other)] * 2)]  # fmt: skip
        for lm, client in sent:
            check_served(client.wait(), lm.generate([[5, 6]], max_new_tokens=12))


def use(engine, lm, num_requests):
    """Send many small requests of several kinds, some of them cancelled; return how many were answered."""
    kinds = [lm.prepare([[5 + i, 6] * (i + 1)], max_new_tokens=4, temperature=0.5 * (i % 2)) for i in range(4)]
    sent = []
    for i in range(num_requests):
        while True:
            try:
                sent.append(send(engine, kinds[i % 4], id=str(i), key=f"key{i % 50}"))
                break
            except Full:
                time.sleep(0.001)
        if i % 7 == 0:
            engine.cancel(str(i))
    return [client.wait() for i, client in enumerate(sent) if i % 7]


def sizes(engine):
    batch = engine._batches[None]
    state = (engine._queues, engine._spent, engine._cancelled, engine._news, engine._running[None], batch._waiting)
    kept = sum(len(forward.left) for forward in batch._forwards.values())
    slots = [(forward.slots.num_rows, len(forward.places)) for forward in batch._forwards.values()]
    return [len(one) for one in state] + [len(batch), len(engine._cancelled)], kept, slots


@pytest.mark.slow
def test_nothing_leaks_after_many_requests():
    lm = model("ids causal")
    with running(lm, max_rows=4, max_queue=8) as engine:
        use(engine, lm, 60)
        engine.warm_up()
        before = sizes(engine)
        answered = use(engine, lm, 150)
        engine.warm_up()  # the engine has taken notice of everything before it
        assert sizes(engine)[0] == before[0] == [0] * len(before[0])
        assert sizes(engine)[1] <= 4
        assert sizes(engine)[2] == before[2]
    assert all(client.last().finish_reason in ("stop", "length") for client in answered)


@pytest.mark.slow
def test_nothing_leaks_after_ten_thousand_requests():
    import resource

    lm = model("ids causal")
    with running(lm, max_rows=8, max_queue=64) as engine:
        use(engine, lm, 1000)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        for _ in range(9):
            use(engine, lm, 1000)
        engine.warm_up()
        assert sizes(engine)[0] == [0] * 8
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000  # KiB


def test_torch_is_not_needed_to_speak_of_requests():
    import subprocess
    import sys

    code = "import sys, redraft.serving.request; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
    assert torch.get_default_dtype() == torch.float32


@pytest.mark.filterwarnings("ignore::FutureWarning")  # peft uses an old name of transformers
def test_adapters_share_the_weights_of_their_base():
    from copy import deepcopy

    from peft import LoraConfig, get_peft_model

    from redraft.models.adapter import share_weights

    base, ids = tiny_lm().model, torch.tensor([[5, 6, 7]])
    adapted = get_peft_model(
        deepcopy(base), LoraConfig(target_modules=["q_proj", "v_proj"], r=2, init_lora_weights=False)
    )
    before, plain = adapted(input_ids=ids).logits, base(input_ids=ids).logits
    assert share_weights(adapted, base) == sum(p.nbytes for p in base.parameters())
    assert share_weights(adapted, base) == 0
    assert torch.equal(adapted(input_ids=ids).logits, before)
    assert torch.equal(base(input_ids=ids).logits, plain)
    assert not torch.equal(before, plain)


def test_a_question_is_answered_between_ticks():
    lm, context = model("ids causal"), torch.tensor([5, 6])
    options = [torch.tensor([8]), torch.tensor([9])]
    alone = score_options(lm.denoiser, context, options)  # now: it counts the forwards of other threads too
    with running(lm) as engine:
        client = send(engine, lm.prepare([[5, 6]], max_new_tokens=12))
        assert engine.decide(context, options).result(60) == alone
        with pytest.raises(ValueError, match="at least two options"):
            engine.decide(context, options[:1]).result(60)
        check_served(client.wait(), lm.generate([[5, 6]], max_new_tokens=12))
    with pytest.raises(Draining):
        engine.decide(context, options)


@pytest.mark.parametrize("name", ["ids full", "ids causal"])
def test_the_memory_of_full_batches_is_known_before_it_is_taken(name):
    lm = model(name)
    with running(lm, max_rows=6, max_model_len=100, adapters={"other": tiny_lm(block_size=4, seed=1)}) as engine:
        needed = engine.needed_bytes()
        engine.warm_up()
        slots = [forward.slots for batch in engine._batches.values() for forward in batch._forwards.values()]
        taken = sum(states.nbytes for one in slots for pair in one.layers for states in pair)
        open_positions = 6 * (lm.denoiser.settings.block_size or 100)
        assert needed == taken * 100 // 101 + open_positions * 40 * 4  # and a spare position


def test_rows_of_other_blocks_wait_for_the_slots():
    lm = model("ids causal")
    kinds = [{"block_size": size} for size in (4, 2, 4, 2)]
    with running(lm, max_rows=4) as engine:
        clients = [
            send(engine, lm.prepare([[5, 6]], max_new_tokens=8, **kind), id=str(i)) for i, kind in enumerate(kinds)
        ]
        for kind, client in zip(kinds, clients, strict=True):
            check_served(client.wait(), lm.generate([[5, 6]], max_new_tokens=8, **kind))
        assert len(engine._batches[None]._forwards) == 1


@pytest.mark.parametrize("name", ["text full", "text causal"])
def test_rows_of_equal_settings_are_decided_together(name):
    lm = model(name)
    kinds = [
        {},
        {"temperature": 0.5},
        {"stop": ("x", "yz")},
        {"stop": ("x",)},
        {"constraint": redraft.Regex("[a-z]{2,4}")},
        {"constraint": redraft.Regex("[a-z]{2,5}")},
        {"preset": "fast-dllm", "threshold": 0.7},
    ]
    samplers = [lm.prepare(["Hello"], max_new_tokens=8, **kind).sampler for kind in kinds]
    for i, kind in enumerate(kinds):
        again = lm.prepare(["yes no"], max_new_tokens=8, seed=3, **kind).sampler
        assert [again == sampler for sampler in samplers] == [i == j for j in range(len(kinds))]
