"""transformers' modelling code, without the heavy packages that it imports for every model and no text model calls."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from types import ModuleType
from typing import Any

CALLED_LATER = {
    "torchao.prototype.safetensors.safetensors_support": "flatten_tensor_state_dict",  # saves packed weights
    "scipy.optimize": "linear_sum_assignment",  # losses of object detection
}
"""Modules, and the function of each that transformers binds when it is imported."""


def import_modelling() -> None:
    """Import transformers' base of all models; torchao and scipy are imported when transformers first calls them.

    Where both are installed that is 0.6 s of CPU, and torchao prints to standard error. Nothing happens where
    transformers' modules were imported already.
    """
    with _called_later():
        import_module("transformers.quantizers.quantizer_torchao")
        import_module("transformers.loss.loss_utils")
    import_module("transformers.modeling_utils")


@contextmanager
def _called_later() -> Iterator[None]:
    """Let stand-ins take the modules' places, until the end of the block or until something else in them is wanted."""
    stand_ins = {name: _StandIn(name) for name in CALLED_LATER if name not in sys.modules}
    sys.modules.update(stand_ins)
    try:
        yield
    finally:
        for stand_in in stand_ins.values():
            stand_in.leave()


class _StandIn(ModuleType):
    """A module of one function, which imports the real module when it is called. Other names are the real module's."""

    def __init__(self, name: str) -> None:
        super().__init__(name)

        def call(*args: Any, **kwargs: Any) -> Any:
            return getattr(self.real(), CALLED_LATER[name])(*args, **kwargs)

        setattr(self, CALLED_LATER[name], call)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # the import system asks for these
            raise AttributeError(name)
        return getattr(self.real(), name)

    def real(self) -> ModuleType:
        """Import the module itself."""
        self.leave()
        return import_module(self.__name__)

    def leave(self) -> None:
        """Give the place in sys.modules back."""
        if sys.modules.get(self.__name__) is self:
            del sys.modules[self.__name__]
