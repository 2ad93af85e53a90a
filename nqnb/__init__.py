"""NQ task queues on NATS JetStream: submit, run, watch and cancel tasks, with guaranteed cancellation.

::

    async with nqnb.connect("nats://127.0.0.1:4222") as nq:
        task = await nq.submit("resize", {"path": "a.png"})
        result = await task

    worker = nqnb.Worker("nats://127.0.0.1:4222")

    @worker.handler("resize")
    def resize(job: nqnb.Job, payload: dict) -> str: ...
"""

from __future__ import annotations

import sys as _sys

from nqnb.version import __version__ as __version__

if "IPython" in _sys.modules:
    from nqnb.notebook import tracebacks as _tracebacks

    _tracebacks.begin()

_modules: dict[str, str] = {}


def _module_of_each_name() -> dict[str, str]:
    """Return a dict that maps each public name to its module.

    The names are read from `__init__.pyi`, the file that type checkers also use. A module is imported only when one of
    its names is first used, so that ``import nqnb`` stays fast.
    """
    if not _modules:
        import ast
        import pkgutil

        stub = ast.parse(pkgutil.get_data(__name__, "__init__.pyi") or b"")
        for node in stub.body:
            if isinstance(node, ast.ImportFrom):
                _modules.update((alias.name, str(node.module)) for alias in node.names)
    return _modules


def __getattr__(name: str) -> object:
    if name == "__all__":
        return sorted(_module_of_each_name())
    module = None if name.startswith("_") else _module_of_each_name().get(name)
    if module is None:
        raise AttributeError(f"module 'nqnb' has no attribute {name!r}")
    from importlib import import_module

    value = globals()[name] = getattr(import_module(module), name)
    return value


def __dir__() -> list[str]:
    # Completion offers only the names that users need, and omits loaded submodules and the hooks that IPython calls.
    hooks = {"load_ipython_extension", "unload_ipython_extension"}
    return sorted({*_module_of_each_name(), *(name for name in globals() if name.startswith("__"))} - hooks)
