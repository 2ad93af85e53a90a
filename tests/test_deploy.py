"""The files in ``deploy``: valid by their schemas, in agreement with the code, and tried on a real server."""

from __future__ import annotations

import asyncio
import importlib.util
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import click
import pytest
from helpers.command_line import environment
from helpers.scrape import free_port
from test_docs import parse

import nqnb
from nqnb.commands.exporter_command import DEFAULT_PORT
from nqnb.commands.worker_processes import EXTRA_STOP_SECONDS
from nqnb.http_endpoint import HttpEndpoint
from nqnb.jetstream.schedules import can_schedule
from nqnb.listen_address import ListenAddress
from nqnb.worker.health import HealthEndpoint

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="the files are for Unix")

ROOT = Path(__file__).parents[1]
DEPLOY = ROOT / "deploy"
DOCKERFILE = (DEPLOY / "Dockerfile").read_text()
SLURM = DEPLOY / "slurm-worker.sh"
KUBERNETES_VERSIONS = ("1.27", "1.34")
yaml: Any = pytest.importorskip("yaml", reason="the tests of deploy need the extra nqnb[dev] on Linux")


def compose() -> Any:
    return yaml.safe_load((DEPLOY / "compose.yaml").read_text())


def manifests(*files: str) -> dict[tuple[str, str], Any]:
    """Return the manifests in the files, by kind and name."""
    found = [
        each
        for file in files or ("worker.yaml", "exporter.yaml", "queue.yaml", "keda.yaml")
        for each in yaml.safe_load_all((DEPLOY / "kubernetes" / file).read_text())
    ]
    return {(each["kind"], each["metadata"]["name"]): each for each in found}


def pod(name: str = "nqnb-worker") -> Any:
    return manifests()["Deployment", name]["spec"]["template"]["spec"]


def instruction(name: str) -> list[str]:
    """Return the arguments of an instruction of the Dockerfile that has the exec form."""
    arguments: list[str] = json.loads(re.findall(rf"^\s*{name} (\[.*\])$", DOCKERFILE, re.MULTILINE)[-1])
    return arguments


def tool(name: str) -> str:
    """Return the path of a program that the extra ``test`` installs."""
    found = shutil.which(name, path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}")
    if found is None:
        pytest.skip(f"{name} is not installed: pip install 'nqnb[dev]' installs it on Linux")
    return found


def checked(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


# -- what holds the files and the code together ------------------------------------------------------------------------


def command_lines() -> Iterator[tuple[str, list[str]]]:
    """Return (file, arguments) of each nqnb command in the files."""
    yield "Dockerfile", instruction("CMD")
    for name, service in compose()["services"].items():
        if service.get("image") == "nqnb-worker" and "command" in service:
            yield f"compose.yaml: {name}", service["command"]
    for name in ("nqnb-worker", "nqnb-exporter"):
        yield name, pod(name)["containers"][0]["args"]
    for file in (SLURM, DEPLOY / "nqnb-worker@.service"):
        for line in re.findall(r"^(?:exec |ExecStart=\S*/)nqnb (.*)$", file.read_text(), re.MULTILINE):
            yield file.name, shlex.split(line.replace("${SLURM_CPUS_PER_TASK:-1}", "1").replace("%i", "jobs"))


def test_the_commands_in_the_files_parse() -> None:
    found = dict(command_lines())
    for file, arguments in found.items():
        try:
            parse(arguments, whole=True)
        except click.UsageError as error:
            pytest.fail(f"{file}: nqnb {shlex.join(arguments)}: {error.format_message()}")
    assert len(found) == 6


def test_the_grace_periods_are_longer_than_a_worker_needs_to_stop() -> None:
    least = nqnb.Worker().shutdown_timeout + EXTRA_STOP_SECONDS
    unit = (DEPLOY / "nqnb-worker@.service").read_text()
    graces = {
        "Kubernetes": pod()["terminationGracePeriodSeconds"],
        "Compose": int(compose()["services"]["worker"]["stop_grace_period"].removesuffix("s")),
        "systemd": int(re.findall(r"^TimeoutStopSec=(\d+)$", unit, re.MULTILINE)[0]),
        "Slurm": int(re.findall(r"^#SBATCH --signal=B:TERM@(\d+)$", SLURM.read_text(), re.MULTILINE)[0]),
    }
    assert all(least < seconds <= 4 * least for seconds in graces.values()), (graces, least)
    stated = f"({nqnb.Worker().shutdown_timeout:.0f} s) and the time to stop ({EXTRA_STOP_SECONDS:.0f} s)"
    for file in ("compose.yaml", "kubernetes/worker.yaml"):
        assert stated in (DEPLOY / file).read_text()


def test_the_ports_of_the_files_agree() -> None:
    args = pod()["containers"][0]["args"]
    ports = {each["name"]: each["containerPort"] for each in pod()["containers"][0]["ports"]}
    assert args[args.index("--health") + 1] == f"0.0.0.0:{ports['health']}"
    assert args[args.index("--metrics") + 1] == f"{ports['metrics']}"
    annotations = manifests()["Deployment", "nqnb-worker"]["spec"]["template"]["metadata"]["annotations"]
    assert annotations["prometheus.io/port"] == f"{ports['metrics']}"
    command = instruction("CMD")
    assert f"127.0.0.1:{command[command.index('--health') + 1]}/healthz" in DOCKERFILE
    scrapes = prometheus()["scrape_configs"]
    assert scrapes[0]["static_configs"][0]["targets"] == [f"exporter:{DEFAULT_PORT}"]
    assert scrapes[1]["dns_sd_configs"][0]["port"] == int(command[command.index("--metrics") + 1])


# -- Docker ------------------------------------------------------------------------------------------------------------


def prometheus() -> Any:
    return yaml.safe_load(compose()["configs"]["prometheus"]["content"])


def test_hadolint_accepts_the_dockerfile() -> None:
    checked(tool("hadolint"), "--failure-threshold", "style", str(DEPLOY / "Dockerfile"))


def test_the_image_is_not_root_and_its_worker_receives_the_signal() -> None:
    assert re.findall(r"^USER (.*)$", DOCKERFILE, re.MULTILINE) == ["10001:10001"]
    assert instruction("ENTRYPOINT") == ["nqnb"], "the exec form: a shell would not forward the signal"
    assert re.findall(r"^STOPSIGNAL (.*)$", DOCKERFILE, re.MULTILINE) == ["SIGTERM"]
    assert len(re.findall(r"^FROM ", DOCKERFILE, re.MULTILINE)) == 2


@pytest.mark.anyio
@pytest.mark.parametrize("why", ["", "the event loop has been blocked for 61 s"])
async def test_the_health_check_of_the_image_asks_the_worker(why: str) -> None:
    endpoint: HttpEndpoint = HealthEndpoint(ListenAddress("127.0.0.1", 0), lambda: why, lambda: "not asked")
    _, *arguments = json.loads(DOCKERFILE.split("HEALTHCHECK")[1].split("CMD ", 1)[1].split("\n", 1)[0])
    code = [each.replace("8080", f"{endpoint.address.port}") for each in arguments]
    process = await asyncio.create_subprocess_exec(sys.executable, *code, stderr=subprocess.DEVNULL)
    assert (await process.wait() == 0) is (why == "")
    await endpoint.close()


def test_the_compose_file_is_valid() -> None:
    jsonschema: Any = pytest.importorskip("jsonschema", reason="nqnb[dev] installs it on Linux")
    spec = importlib.util.find_spec("check_jsonschema")
    if spec is None or spec.origin is None:
        pytest.skip("check-jsonschema is not installed: nqnb[dev] installs it on Linux")
    schema = json.loads((Path(spec.origin).parent / "builtin_schemas" / "vendor" / "compose-spec.json").read_text())
    file = compose()
    jsonschema.Draft202012Validator(schema).validate(file)
    for service in file["services"].values():
        assert all(port.startswith("127.0.0.1:") for port in service.get("ports", ())), "the server has no login"
        assert {each["source"] for each in service.get("configs", ())} <= set(file["configs"])
        assert {each.split(":")[0] for each in service.get("volumes", ())} <= set(file["volumes"])
    for config in file["configs"].values():
        assert "content" in config or (DEPLOY / config["file"]).is_file()
    build = file["services"]["worker"]["build"]
    assert (DEPLOY / build["context"] / build["dockerfile"]).resolve() == DEPLOY / "Dockerfile"


def test_the_prometheus_of_the_compose_file_has_the_alerts_and_their_jobs(tmp_path: Path) -> None:
    services = compose()["services"]
    assert {each["target"] for each in services["prometheus"]["configs"]} == {
        "/etc/prometheus/prometheus.yml",
        "/etc/prometheus/alerts.yml",
    }
    jobs = re.findall(r"^  - job_name: (.*)$", (ROOT / "monitoring" / "prometheus.yml").read_text(), re.MULTILINE)
    assert [each["job_name"] for each in prometheus()["scrape_configs"]] == jobs
    folder = yaml.safe_load(compose()["configs"]["dashboards"]["content"])["providers"][0]["options"]["path"]
    dashboards = [each["target"] for each in services["grafana"]["configs"] if each["source"] == "dashboard"]
    assert dashboards == [services["grafana"]["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"]]
    assert dashboards[0].startswith(f"{folder}/")
    if shutil.which("promtool") is None:
        pytest.skip("promtool is not installed (apt-get install prometheus)")
    (tmp_path / "prometheus.yml").write_text(compose()["configs"]["prometheus"]["content"])
    shutil.copy(ROOT / "monitoring" / "alerts.yml", tmp_path)
    checked("promtool", "check", "config", str(tmp_path / "prometheus.yml"))


# -- Kubernetes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("version", KUBERNETES_VERSIONS)
def test_the_manifests_are_valid(version: str) -> None:
    kubernetes_validate: Any = pytest.importorskip("kubernetes_validate", reason="nqnb[dev] installs it on Linux")
    found = manifests("worker.yaml", "exporter.yaml")
    for manifest in found.values():
        kubernetes_validate.validate(manifest, version, strict=True)
    assert [kind for kind, _ in found] == ["ServiceAccount", "Deployment", "PodDisruptionBudget", "Deployment"]
    broken = {**manifest, "spec": {**manifest["spec"], "replica": 1}}
    with pytest.raises(kubernetes_validate.ValidationError, match="replica"):
        kubernetes_validate.validate(broken, version, strict=True)


@pytest.mark.parametrize("name", ["nqnb-worker", "nqnb-exporter"])
def test_a_pod_has_no_rights_that_it_does_not_need(name: str) -> None:
    (container,) = pod(name)["containers"]
    assert pod(name)["securityContext"]["runAsNonRoot"] is True
    assert pod(name)["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert f"USER {pod(name)['securityContext']['runAsUser']}:" in DOCKERFILE
    assert container["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    assert pod(name)["automountServiceAccountToken"] is False


def test_the_manifests_name_each_other() -> None:
    (container,) = pod()["containers"]
    labels = manifests()["Deployment", "nqnb-worker"]["spec"]["template"]["metadata"]["labels"]
    assert manifests()["PodDisruptionBudget", "nqnb-worker"]["spec"]["selector"]["matchLabels"] == labels
    assert manifests()["ScaledObject", "nqnb-worker"]["spec"]["scaleTargetRef"]["name"] == "nqnb-worker"
    paths = {name: probe["httpGet"]["path"] for name, probe in container.items() if name.endswith("Probe")}
    assert paths == {"startupProbe": "/healthz", "livenessProbe": "/healthz", "readinessProbe": "/readyz"}


def as_server_config(spec: dict[str, Any]) -> dict[str, Any]:
    """Convert the spec of a NACK resource to the configuration that NACK sends to the server."""
    seconds = {"s": 1, "h": 3600}
    config = {}
    for name, value in spec.items():
        key = {"replicas": "num_replicas"}.get(name) or re.sub(r"[A-Z]", lambda found: f"_{found[0].lower()}", name)
        if name in ("maxAge", "ackWait"):
            value = int(value[:-1]) * seconds[value[-1]] * 1_000_000_000
        if name not in ("preventDelete", "preventUpdate", "streamName"):
            config[key] = value
    return config


@pytest.mark.anyio
async def test_nack_would_not_undo_what_nqnb_configures() -> None:
    """Create a queue with nqnb, and compare it with the manifests; then use a queue that the manifests created."""
    specs = {name: each["spec"] for (_, name), each in manifests("queue.yaml").items()}
    streams = [as_server_config(specs[name]) for name in ("resize", "resize-cancel")]
    consumer = as_server_config(specs["resize-monitor"])
    assert specs["resize-monitor"]["preventUpdate"] is True, "NACK would resume a paused queue"

    async def use(nq: nqnb.Client) -> dict[str, Any]:
        """Use a queue as users do. Return its configurations on the server."""
        worker = nqnb.Worker(nq.backend.settings)
        worker.handler("resize")(lambda payload: payload)
        async with worker:
            assert await (await nq.submit("resize", 1)).result(timeout=30) == 1
            await (await nq.submit("resize", 2, process_at=timedelta(hours=1))).cancel()
        api = nq.backend.connection.api
        found = {each["name"]: (await api(f"STREAM.INFO.{each['name']}"))["config"] for each in streams}
        return {**found, "MONITOR": (await api("CONSUMER.INFO.resize.MONITOR"))["config"]}

    with nqnb.DevServer() as server:
        async with nqnb.connect(server.url, replicas=1) as nq:
            if not can_schedule(nq.backend.connection):
                pytest.skip("the manifests are for servers that keep schedules")
            own = await use(nq)
    for manifest in (*streams, consumer):
        name = manifest.get("name") or manifest["durable_name"]
        differences = {
            key: (value, own[name].get(key)) for key, value in manifest.items() if own[name].get(key) != value
        }
        assert differences == ({} if name == "MONITOR" else {"num_replicas": (3, 1)}), name

    with nqnb.DevServer() as server:
        async with nqnb.connect(server.url) as nq:
            api = nq.backend.connection.api
            for stream in streams:
                await api(f"STREAM.CREATE.{stream['name']}", {**stream, "num_replicas": 1})
            await api("CONSUMER.DURABLE.CREATE.resize.MONITOR", {"stream_name": "resize", "config": consumer})
            before = {each["name"]: (await api(f"STREAM.INFO.{each['name']}"))["config"] for each in streams}
            after = await use(nq)
    assert {name: after[name] for name in before} == before


class Scaler:
    """KEDA's scaler for JetStream, as its source has it.

    Args:
        port: the port of the server's monitoring endpoint.
        trigger: the metadata of the trigger.
    """

    def __init__(self, port: int, trigger: dict[str, str]) -> None:
        self.port = port
        self._trigger = trigger

    def get(self, path: str) -> Any:
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/{path}", timeout=5) as answer:
            return json.loads(answer.read())

    async def value(self, **changes: str) -> int | None:
        """Return the length of the queue, or None if KEDA does not find the consumer."""
        trigger = {**self._trigger, **changes}
        found = await asyncio.to_thread(self.get, f"jsz?acc={trigger['account']}&consumers=true&config=true")
        for account in found.get("account_details") or ():
            if trigger["account"] not in (account["id"], account["name"]):
                continue
            for stream in account["stream_detail"]:
                for consumer in stream.get("consumer_detail") or ():
                    if (stream["name"], consumer["name"]) == (trigger["stream"], trigger["consumer"]):
                        return int(consumer["num_pending"] + consumer["num_ack_pending"])
        return None


@pytest.mark.anyio
async def test_keda_counts_the_tasks_that_wait_or_run() -> None:
    trigger = manifests()["ScaledObject", "nqnb-worker"]["spec"]["triggers"][0]["metadata"]
    assert int(trigger["lagThreshold"]) == nqnb.Worker().concurrency
    scaler = Scaler(free_port(), trigger)
    with nqnb.DevServer(config=f'http: "127.0.0.1:{scaler.port}"') as server:
        async with nqnb.connect(server.url) as nq:
            worker = nqnb.Worker(server.url, concurrency=1)
            worker.handler("resize")(lambda job: job.wait(60))
            await nq.submit_many("resize", range(3))
            await nq.submit("resize", 4, process_at=timedelta(hours=1))
            assert await scaler.value() is None, "there is no consumer yet"
            async with worker:
                # Servers before 2.12 keep no schedules, so the task that is not due waits in the queue.
                assert await scaler.value() == (3 if can_schedule(nq.backend.connection) else 4)
                assert await scaler.value(account="wrong") is None
                await worker.stop(0)
        probe = compose()["services"]["nats"]["healthcheck"]["test"][-1]
        assert scaler.get(probe.removeprefix("http://127.0.0.1:8222/"))["status"] == "ok"


# -- Slurm -------------------------------------------------------------------------------------------------------------


def test_shellcheck_accepts_the_slurm_script() -> None:
    checked("bash", "-n", str(SLURM))
    checked(tool("shellcheck"), str(SLURM))


@pytest.mark.full
def test_the_slurm_script_runs_the_example_and_stops_on_the_signal(server: nqnb.DevServer, tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "nqnb").write_text(f'#!/bin/sh\nexec "{sys.executable}" -m nqnb "$@"\n')
    (tmp_path / "bin" / "nqnb").chmod(0o755)
    started = ["bash", str(SLURM)]
    settings = environment(NATS_URL=server.url, NQNB_VENV=str(tmp_path))
    with subprocess.Popen(started, cwd=DEPLOY / "app", env=settings, stderr=subprocess.PIPE, text=True) as worker:
        assert worker.stderr is not None
        try:
            assert any("is serving resize" in line for line in worker.stderr)
            worker.send_signal(signal.SIGTERM)
            assert worker.wait(20) == 0
        finally:
            worker.kill()
    unset = subprocess.run(started, env=environment(), capture_output=True, text=True, timeout=20, check=False)
    assert "NATS_URL is not set" in unset.stderr
