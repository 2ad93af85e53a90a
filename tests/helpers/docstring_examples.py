"""Run the examples of docstrings, which may await as in a notebook.

python docstring_examples.py NAME …

The program starts a server, and a worker for the queues of the examples. It prints each example whose output differs
from its docstring, and exits with status 1 if there is one.
"""

from __future__ import annotations

import ast
import asyncio
import contextlib
import doctest
import inspect
import io
import os
import sys
import tempfile
import threading
import traceback
from collections.abc import Iterator
from datetime import timedelta
from importlib import import_module
from pathlib import Path
from typing import Any

import nqnb

FLAGS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
OF_NEW_SERVERS = ("nqnb.doctor.diagnosis.Diagnosis", "nqnb.doctor.diagnosis.Finding")
"""The names whose examples show that the doctor finds nothing. It reports each old server."""
OLD = ("2.9.", "2.10.", "2.11.")


def examples(path: str) -> list[doctest.Example]:
    """Return the examples in the docstring of a name, such as ``nqnb.records.TaskInfo``."""
    module, _, name = path.rpartition(".")
    source = Path(inspect.getfile(import_module(module))).read_text(encoding="utf-8")
    body = ast.parse(source).body
    for node, after in zip(body, [*body[1:], None], strict=True):
        if getattr(node, "name", None) == name:
            assert isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
            return doctest.DocTestParser().get_examples(ast.get_docstring(node) or "")
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == name and isinstance(after, ast.Expr):
            return doctest.DocTestParser().get_examples(str(ast.literal_eval(after.value)))
    raise LookupError(path)


async def run(example: doctest.Example, names: dict[str, Any], said: io.StringIO) -> str:
    """Run an example, and return what a notebook would print: its output, its value, or its error.

    ``said`` is the standard output, which stays the same for all examples: a worker wraps it to capture what its
    handlers print. If it was replaced while a handler is running, the handler's output would not be captured.
    """
    said.seek(0)
    said.truncate()
    try:
        code = compile(example.source, "<example>", "single", ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
        value = eval(code, names)  # noqa: S307  that is what is tested
        if inspect.iscoroutine(value):
            await value
    except BaseException as error:  # noqa: BLE001  some examples show an error that is not an Exception
        said.write("Traceback (most recent call last):\n    ...\n")
        said.write("".join(traceback.format_exception_only(type(error), error)))
    return said.getvalue()


@contextlib.contextmanager
def serving(server: nqnb.DevServer) -> Iterator[None]:
    """Run a worker in a thread, because some examples block the event loop."""
    worker = nqnb.Worker(server.url, task_logs=True)

    @worker.handler("resize")
    def resize(job: nqnb.Job, payload: dict[str, Any]) -> dict[str, Any]:
        job.progress(1, 2, "thumbnails")
        print("opened", payload["path"])
        if payload["path"].endswith(".txt"):
            raise ValueError(f"cannot open {payload['path']!r}")
        return {"path": payload["path"], "width": payload.get("width", 800)}

    @worker.handler("train")
    def train(job: nqnb.Job) -> None:
        job.wait(60)

    started, stop = threading.Event(), threading.Event()

    async def serve() -> None:
        async with worker:
            started.set()
            await asyncio.to_thread(stop.wait)

    thread = threading.Thread(target=lambda: asyncio.run(serve()))
    thread.start()
    try:
        assert started.wait(30)
        yield
    finally:
        stop.set()
        thread.join()


def shell() -> Any:
    """Return IPython's shell, as in a cell."""
    from IPython.core.interactiveshell import InteractiveShell
    from traitlets.config import Config

    return InteractiveShell.instance(config=Config(HistoryManager={"enabled": False}))


async def main(paths: list[str], url: str, said: io.StringIO) -> list[str]:
    """Run the examples of each name, and return a string for each example that failed."""
    failed = []
    for path in paths:
        async with nqnb.connect(url) as nq:
            names: dict[str, Any] = {
                "asyncio": asyncio,
                "get_ipython": shell,
                "nq": nq,
                "nqnb": nqnb,
                "timedelta": timedelta,
            }
            for example in examples(path):
                options = FLAGS | sum(flag for flag, wanted in example.options.items() if wanted)
                got = await run(example, names, said)
                if not doctest.OutputChecker().check_output(example.want, got, options):
                    failed.append(f"{path}\n>>> {example.source}expected:\n{example.want}got:\n{got}")
    return failed


if __name__ == "__main__":
    output = io.StringIO()
    with (
        contextlib.redirect_stdout(output),
        nqnb.DevServer() as server,
        tempfile.TemporaryDirectory() as folder,
        serving(server),
    ):
        os.environ.update(NATS_URL=server.url, IPYTHONDIR=folder)  # as for a user who has set the address
        paths = [path for path in sys.argv[1:] if not (path in OF_NEW_SERVERS and server.version.startswith(OLD))]
        failures = asyncio.run(main(paths, server.url, output))
    print(*failures, sep="\n")
    sys.exit(bool(failures))
