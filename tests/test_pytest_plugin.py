"""The fixtures for pytest, in a project of their own, with anyio and with pytest-asyncio."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path

import pytest

PLUGIN = "nqnb.testing.pytest_plugin"
LOOP_SCOPE = ["-o", "asyncio_default_fixture_loop_scope=function"]
TESTS = """
import nqnb
{head}

{mark}
async def test_a_task_is_run(nq, nqnb_worker):
    @nqnb_worker.handler("double")
    def double(job: nqnb.Job, payload: int) -> int:
        return 2 * payload

    task = await nq.submit("double", 21)
    await nqnb_worker.run_until_idle()
    assert await task == 42
    assert repr(nqnb_worker).split()[2] == "stopped,"


class TestRetries:
    {mark}
    async def test_a_retry_is_run_and_another_queue_is_not(self, nq, nqnb_worker):
        attempts = []

        @nqnb_worker.handler("flaky", backoff=nqnb.Backoff(0.1))
        async def flaky(job: nqnb.Job) -> int:
            attempts.append(job.attempt)
            if job.attempt == 1:
                raise ValueError("once")
            return job.attempt

        elsewhere = await nq.submit("elsewhere", None)
        task = await nq.submit("flaky", None, retry=2)
        await nqnb_worker.run_until_idle()
        assert await task == 2
        assert attempts == [1, 2]
        assert (await elsewhere.status()).label == "pending"


def test_of_no_loop(nq):
    pass
"""

OTHER_LOOP = """
import pytest

@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem):
    pyfuncitem.obj(nq=pyfuncitem.funcargs["nq"]).send(None)  # the first step, outside of asyncio
    return True
"""


@pytest.mark.parametrize("plugin", ["anyio", "asyncio", pytest.param("asyncio in auto mode", marks=pytest.mark.full)])
def test_the_fixtures_work_with(plugin: str, tmp_path: Path) -> None:
    head = "import pytest\n"
    if plugin == "anyio":
        head += '\n@pytest.fixture\ndef anyio_backend():\n    return "asyncio"\n'
    mark = {"anyio": "@pytest.mark.anyio", "asyncio": "@pytest.mark.asyncio"}.get(plugin, "")
    (tmp_path / "test_mine.py").write_text(TESTS.format(head=head, mark=mark))
    mode = "auto" if "auto" in plugin else "strict"
    options = ["-p", "no:asyncio"] if plugin == "anyio" else ["--asyncio-mode", mode, *LOOP_SCOPE, "-W", "error"]
    output = run_tests(tmp_path, *options)
    assert "2 passed, 1 error" in output
    assert "the fixture nq cannot be used by test_of_no_loop: the test must be an `async def` function" in output


def test_a_test_on_another_event_loop_fails_with_a_remedy(tmp_path: Path) -> None:
    (tmp_path / "conftest.py").write_text(OTHER_LOOP)
    (tmp_path / "test_mine.py").write_text("async def test_on_trio(nq):\n    pass\n")
    output = run_tests(tmp_path, "-p", "no:asyncio")
    assert "1 failed" in output
    assert "the fixture nq cannot be used by test_on_trio: the test does not run on asyncio" in output
    assert "Define a fixture `anyio_backend` that returns 'asyncio'" in output


def run_tests(folder: Path, *options: str) -> str:
    """Run the tests of a project with nqnb's fixtures, and return the output."""
    own = ["-p", "no:xdist", "-p", "no:cacheprovider"]
    if not any(each.value == PLUGIN for each in entry_points(group="pytest11")):
        own += ["-p", PLUGIN]  # the package is not installed, only its folder is on the path
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", *own, *options, "test_mine.py"],
        cwd=folder,
        # The fixtures ignore the settings of another server.
        env={**kept, "NATS_CA": __file__, "NATS_CREDS": "/no/such"},
        capture_output=True,
        text=True,
    )
    print(run.stdout, run.stderr)  # pytest shows this if the test fails
    return run.stdout


def test_loading_the_plugin_imports_no_large_module() -> None:
    code = f"import sys, {PLUGIN}; print({{'nats', 'pandas', 'nqnb.client'}} & set(sys.modules))"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "set()"
