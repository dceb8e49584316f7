"""What a hard constraint costs per step: compilation, and one walk of 16 open positions, for a large vocabulary.

    python benchmarks/constraints.py --vocab-size 150000

The vocabulary is a stand-in for a trained one: all bytes, and words, numbers, spaces and code pieces of 1 to 12 bytes.
The reference is one forward of a 100 M-parameter model at the same vocabulary and 16 positions behind 128 cached ones.
"""

import argparse
import random
import string
import time

import torch

from redraft.constraints.kinds import Choice, Constraint, Contains, JsonSchema, Length, Regex

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 40},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "email": {"type": "string", "pattern": "^[a-z0-9.]+@[a-z0-9]+\\.[a-z]{2,4}$"},
        "address": {
            "type": "object",
            "properties": {"street": {"type": "string"}, "city": {"type": "string"}, "zip": {"type": "string"}},
            "required": ["street", "city"],
        },
        "tags": {"type": "array", "items": {"enum": ["red", "green", "blue"]}, "maxItems": 4},
        "score": {"type": "number"},
        "born": {"type": "string", "format": "date"},
    },
    "required": ["name", "age", "address"],
}
CASES: dict[str, Constraint] = {
    "choice of 3": Choice(["yes", "no", "it depends"]),
    "regex [A-Z][a-z]+( [a-z]+)*[.]": Regex(r"[A-Z][a-z]+( [a-z]+)*[.]"),
    "at most 200 characters": Length(max_chars=200),
    "two substrings": Contains(["therefore", "because"]),
    "JSON of a person": JsonSchema(PERSON),
    "any JSON, depth 2": JsonSchema(True),
    "JSON: 20 strings of <= 50": JsonSchema(
        {
            "type": "object",
            "properties": {f"field_{i}": {"type": "string", "maxLength": 50} for i in range(20)},
            "required": [f"field_{i}" for i in range(20)],
        }
    ),
}


def make_vocabulary(size: int) -> list[bytes | None]:
    rng = random.Random(0)
    pieces: dict[bytes, None] = {bytes([byte]): None for byte in range(256)}
    ends = ['"', '",', '":', '"}', ",", ".", ")", "();", " =", "\n", ": ", "':", "_", "-", "]"]
    while len(pieces) < size - 3:
        word = "".join(rng.choices(string.ascii_lowercase, k=rng.randint(2, 9)))
        kind = rng.random()
        if kind < 0.55:
            word = rng.choice(["", " "]) + rng.choice([word, word.title()])
        elif kind < 0.7:
            word = "".join(
                chr(rng.choice([rng.randint(0xC0, 0x24F), rng.randint(0x400, 0x4FF), 0x4E00 + i]))
                for i in range(rng.randint(1, 4))
            )
        elif kind < 0.85:
            word = rng.choice([" ", "", '"', "(", "{"]) + word + rng.choice(ends)
        else:
            word = rng.choice(
                [
                    str(rng.randrange(1000)),
                    " " * rng.randint(2, 60),
                    "".join(rng.choices(string.punctuation, k=3)),
                    word.upper(),
                ]
            )
        pieces[word.encode()] = None
    return [None, None, None, *pieces]


def forward_seconds(vocab_size: int, *, open_positions: int) -> float:
    from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=512,
        intermediate_size=1408,
        num_hidden_layers=8,
        num_attention_heads=8,
        vocab_size=vocab_size,
        tie_word_embeddings=True,
    )
    model = LlamaForCausalLM(config).eval()
    print(f"model: {sum(p.numel() for p in model.parameters()) / 1e6:.0f} M parameters")
    ids = torch.randint(3, vocab_size, (1, open_positions))
    return best_of(lambda: model(ids, past_key_values=DynamicCache(), use_cache=True), 5)


def best_of(function, repeats: int) -> float:
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        function()
        seconds.append(time.perf_counter() - start)
    return min(seconds)


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vocab-size", type=int, default=150_000)
    parser.add_argument("--open-positions", type=int, default=16)
    parser.add_argument("--length", type=int, default=256)
    args = parser.parse_args()
    vocabulary = make_vocabulary(args.vocab_size)
    forward = forward_seconds(args.vocab_size, open_positions=args.open_positions)
    print(f"forward of {args.open_positions} positions: {forward * 1e3:.1f} ms, {torch.get_num_threads()} thread(s)")
    print(
        f"{'constraint':32} {'compile s':>9} {'states':>7} {'classes':>7} {'edges':>8} {'T=0 ms':>7} {'T=1 ms':>7}"
        "  of the forward"
    )
    logits = torch.randn(args.open_positions, args.vocab_size, generator=torch.Generator().manual_seed(0)) * 3
    u = torch.rand(args.open_positions, generator=torch.Generator().manual_seed(0))
    for name, constraint in CASES.items():
        start = time.perf_counter()
        compiled = constraint.compile(vocabulary, eos_token_id=1)
        tokens, is_noise = torch.full((args.length,), 2), torch.ones(args.length, dtype=torch.bool)
        compiled.check(tokens, is_noise)
        seconds = time.perf_counter() - start
        where = torch.arange(args.open_positions)
        greedy = best_of(lambda: compiled.complete(tokens, is_noise, where, logits), 4)  # noqa: B023
        drawn = best_of(lambda: compiled.complete(tokens, is_noise, where, logits, u=u), 4)  # noqa: B023
        automaton = compiled.automaton
        print(
            f"{name:32} {seconds:9.2f} {automaton.num_states:7} {automaton.num_classes:7} {len(automaton.to):8}"
            f" {greedy * 1e3:7.1f} {drawn * 1e3:7.1f}  {greedy / forward:.0%}, {drawn / forward:.0%}"
        )


if __name__ == "__main__":
    main()
