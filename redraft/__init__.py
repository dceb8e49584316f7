"""redraft: train, convert, sample and evaluate diffusion language models."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from redraft.constraints.kinds import Choice, Contains, JsonSchema, Length, Regex, Spans
    from redraft.language_model import Generation, LanguageModel, load
    from redraft.latent.checkpoint import load_thinker
    from redraft.models.convert import convert
    from redraft.transformers_generate import custom_generate

__version__ = "0.1.0"
__all__ = [
    "Choice",
    "Contains",
    "Generation",
    "JsonSchema",
    "LanguageModel",
    "Length",
    "Regex",
    "Spans",
    "__version__",
    "convert",
    "custom_generate",
    "load",
    "load_thinker",
]

_HOME = {
    "load": "redraft.language_model",
    "load_thinker": "redraft.latent.checkpoint",
    "convert": "redraft.models.convert",
    "custom_generate": "redraft.transformers_generate",
    "LanguageModel": "redraft.language_model",
    "Generation": "redraft.language_model",
    **dict.fromkeys(
        ("Choice", "Contains", "JsonSchema", "Length", "Regex", "Spans"), "redraft.constraints.kinds"
    ),
}


def __getattr__(name: str) -> Any:
    """Import the public names on first use, so that `import redraft` stays as cheap as `import torch`."""
    if name in _HOME:
        return getattr(import_module(_HOME[name]), name)
    raise AttributeError(f"module 'redraft' has no attribute {name!r}; it offers {', '.join(__all__)}")
