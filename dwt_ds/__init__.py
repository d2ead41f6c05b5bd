"""Distillation from a Weak Teacher on DeepSpeed: pre-train a larger masked language model with a smaller one's help.

For notebooks and schedulers, `from dwt_ds import prepare, pretrain, report` gives the functions of `dwt_ds.api`, which
mean what the command lines mean.
"""

from __future__ import annotations

from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dwt_ds.api import prepare, pretrain, report

__all__ = ["prepare", "pretrain", "report"]
__version__ = "0.6.9"


class CallableModule(ModuleType):
    """A module with the name of a function in dwt_ds.api, and called as that function.

    `dwt_ds.pretrain` has to be a module, since `deepspeed --module` runs it, and `dwt_ds.prepare` a package. Python
    binds a module's name in its package whenever it is first imported, so a function of that name would last only until
    then.
    """

    def __call__(self, *args: Any, **keywords: Any) -> Any:
        return self._function()(*args, **keywords)

    @property
    def __signature__(self) -> Any:
        """For help in notebooks."""
        import inspect

        return inspect.signature(self._function())

    def _function(self) -> Any:
        return getattr(import_module("dwt_ds.api"), self.__name__.rpartition(".")[2])


def __getattr__(name: str) -> Any:
    # Imported at first use: the command dwt-ds imports this package, too, and must not wait.
    if name in ("prepare", "pretrain"):
        return import_module(f"dwt_ds.{name}")
    if name == "report":
        return import_module("dwt_ds.api").report
    raise AttributeError(f"module 'dwt_ds' has no attribute {name!r}")
