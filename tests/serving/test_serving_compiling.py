"""Constraints of strangers: whatever they ask for, a worker with limits does it, and the cache stays small."""

import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from redraft.constraints.kinds import Choice, JsonSchema, Regex
from redraft.constraints.token_bytes import leading_space, token_bytes
from redraft.serving import compiling
from redraft.serving.compiling import Compiler, LimitedConstraint


@pytest.fixture(scope="module")
def shared():
    one = Compiler()
    yield one
    one.close()


def compiled(compiler, constraint, lm):
    limited = LimitedConstraint(constraint=constraint, compiler=compiler)
    space = leading_space(lm.tokenizer)
    return limited.compile(token_bytes(lm.tokenizer), eos_token_id=1, leading_space=space)


@pytest.mark.parametrize("constraint", [Regex("a+b"), Choice(["yes", "no"]), JsonSchema({"type": "integer"})], ids=str)
def test_a_worker_compiles_what_the_constraint_itself_compiles(shared, text_lm, constraint):
    found = compiled(shared, constraint, text_lm).automaton
    space = leading_space(text_lm.tokenizer)
    wanted = constraint.compile(token_bytes(text_lm.tokenizer), eos_token_id=1, leading_space=space).automaton
    assert (found.class_of == wanted.class_of).all()
    assert (found.state == wanted.state).all()
    assert (found.to == wanted.to).all()


@pytest.mark.parametrize(
    "pattern", ["(a{0,99}){0,99}", "(.{0,500}x){0,9}", "((a{0,50}){0,50}){0,50}", "a{1000000}", "(" * 2000 + ")" * 2000]
)
def test_bombs_are_refused(shared, text_lm, pattern):
    with pytest.raises(ValueError, match=r"too large|regular expression|nested"):
        compiled(shared, Regex(pattern), text_lm)
    assert compiled(shared, Regex("a+"), text_lm).automaton.num_states < 10


def test_a_worker_that_dies_is_replaced(shared, text_lm):
    compiled(shared, Regex("x"), text_lm)
    shared._process.kill()
    shared._process.wait()
    assert compiled(shared, Regex("xy"), text_lm).automaton.num_states > 2


def test_time_and_memory_are_limited(text_lm, monkeypatch):
    monkeypatch.setattr(compiling, "WALL_SECONDS", 0.2)
    monkeypatch.setattr(compiling, "_COMMAND", "import time; time.sleep(60)")
    compiler, started = Compiler(), time.monotonic()
    with pytest.raises(ValueError, match=r"more than 2 s or 512 MB"):
        compiled(compiler, Regex("a"), text_lm)
    assert time.monotonic() - started < 30
    monkeypatch.undo()
    hungry = "import redraft.serving.compiling as c; c.MEMORY_BYTES = 1 << 20; c.work()"
    monkeypatch.setattr(compiling, "_COMMAND", hungry)
    with pytest.raises(ValueError, match=r"more than 2 s or 512 MB"):
        compiled(compiler, Choice([f"{i} of many texts" for i in range(3000)]), text_lm)
    compiler.close()


def test_the_cache_stays_small(shared, text_lm):
    compiler = Compiler(cache_bytes=400_000)
    for i in range(12):
        compiled(compiler, Regex(f"a{{{i + 1},60}}"), text_lm)
        assert compiler.num_bytes <= 400_000 or len(compiler._results) == 1
    assert 0 < len(compiler._results) < 12
    compiler.close()


def test_equal_constraints_are_compiled_once_by_many_threads(shared, text_lm):
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: compiled(shared, Regex("abc"), text_lm), range(8)))
    assert all(one is found[0] for one in found)
