import json
import random
from pathlib import Path

import pytest

from redraft.data.tokenizer import train_tokenizer

SYLLABLES = ["ba", "lo", "mi", "ne", "ru", "sta", "ki", "ve", "on", "tra"]


def made_up_documents(num_documents: int = 80, seed: int = 0) -> list[str]:
    chance = random.Random(seed)
    words = ["".join(chance.choices(SYLLABLES, k=chance.randint(1, 4))) for _ in range(400)]
    return [f"{index}: " + " ".join(chance.choices(words, k=chance.randint(1, 60))) for index in range(num_documents)]


@pytest.fixture(scope="session")
def documents() -> list[str]:
    return made_up_documents()


@pytest.fixture(scope="session")
def tokenizer(documents):
    return train_tokenizer(documents, vocab_size=320)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch) -> Path:
    """The folder of the cache, of each test's own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / ".cache"))
    return tmp_path / ".cache" / "redraft" / "data"


@pytest.fixture
def corpus(tmp_path: Path, documents: list[str]) -> Path:
    path = tmp_path / "corpus.jsonl"
    path.write_text("".join(json.dumps({"text": document}) + "\n" for document in documents))
    return path


CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture(scope="session")
def chat_tokenizer(documents):
    tokenizer = train_tokenizer(documents, vocab_size=300)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = CHATML
    return tokenizer
