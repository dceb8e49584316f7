"""redraft: train, convert, sample, evaluate and serve diffusion language models."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from redraft.constraints.kinds import Choice, Contains, JsonSchema, Length, Regex, Spans
    from redraft.language_model import Generation, LanguageModel, load
    from redraft.latent.checkpoint import load_thinker
    from redraft.models.convert import convert
    from redraft.transformers_generate import custom_generate

__version__ = "0.1.0"
_NAMES = {
    "redraft.constraints.kinds": ("Choice", "Contains", "JsonSchema", "Length", "Regex", "Spans"),
    "redraft.language_model": ("Generation", "LanguageModel", "load"),
    "redraft.latent.checkpoint": ("load_thinker",),
    "redraft.models.convert": ("convert",),
    "redraft.transformers_generate": ("custom_generate",),
}
_HOME = {name: module for module, names in _NAMES.items() for name in names}
__all__ = ["__version__", *_HOME]


def __getattr__(name: str) -> Any:
    """Import the public names on first use, so that `import redraft` stays as cheap as `import torch`."""
    if name in _HOME:
        return getattr(import_module(_HOME[name]), name)
    raise AttributeError(f"module 'redraft' has no attribute {name!r}; it offers {', '.join(_HOME)}")
