"""What our classes rely on in vLLM: derived from our own source, recorded from vLLM's, and the two compared.

A record holds for one release what stands behind every name that our source imports, overrides or reads, how vLLM
calls what we override, and what came of importing our classes with it. It is checked against our source as it is now,
so CI needs no wheel of any release.
"""

from __future__ import annotations

import ast
import inspect
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeGuard

from flashmla_backend.integration.vllm import plugin

from .source import Source, arguments, base_names, parameters

REPOSITORY = Path(__file__).parents[3]
OURS = ("integration/vllm", "flashmla_backend/bench/steps", "flashmla_backend/bench/offline")
CPU_ONLY = "integration.vllm.platform"

MLA = "vllm.model_executor.layers.attention.mla_attention"
REGISTRY = "vllm.v1.attention.backends.registry"

IMPORTED = {"claimed": plugin.BACKEND_PATH, "abstract": [], "refusals": []}

# What our source reads of objects whose class it does not spell.
READ = {
    f"{REGISTRY}.AttentionBackendEnum": ("is_overridden", "get_path", "get_class"),
    f"{MLA}.MLACommonMetadata": ("num_decodes", "decode"),
    "vllm.platforms.interface.DeviceCapability": ("major", "minor"),
    "vllm.plugins": ("DEFAULT_PLUGINS_GROUP", "PLATFORM_PLUGINS_GROUP"),
}
READ_ON_CPU = {
    "vllm.config.VllmConfig": (
        *("attention_config", "model_config", "cache_config", "scheduler_config", "compilation_config"),
        "speculative_config",
    ),
    "vllm.config.AttentionConfig": ("backend", "backend_per_kind"),
    "vllm.config.ModelConfig": ("use_mla", "model", "architectures"),
    "vllm.config.CacheConfig": ("block_size", "user_specified_block_size", "enable_prefix_caching"),
    "vllm.config.SchedulerConfig": ("enable_chunked_prefill", "max_num_batched_tokens"),
    "vllm.config.SpeculativeConfig": ("use_eagle", "method", "attention_backend"),
    "vllm.config.CompilationConfig": ("custom_ops",),
}


@dataclass
class Needs:
    """What our source asks of vLLM, by dotted path."""

    bases: set[str] = field(default_factory=set)  # classes that ours derive from
    names: dict[str, bool] = field(default_factory=dict)  # -> whether on the CPU only
    calls: list[tuple[str, str]] = field(default_factory=list)  # a function or class of vLLM's, our arguments
    overrides: dict[str, str] = field(default_factory=dict)  # a method of a class of vLLM's -> our parameters
    extensions: dict[str, list[str]] = field(default_factory=dict)  # a dataclass of vLLM's -> fields ours must be given

    def add(self, path: str, cpu_only: bool) -> None:
        self.names[path] = cpu_only and self.names.get(path, True)


def our_needs() -> Needs:
    """Read from our source as it is now."""
    ours, needs = Source(REPOSITORY, "integration"), Needs()
    for folder in OURS:
        for path in sorted((REPOSITORY / folder).glob("*.py")):
            _of_module(ours, f"{folder}/{path.stem}".replace("/", ".").removesuffix(".__init__"), needs)
    for cpu_only, read in ((False, READ), (True, READ_ON_CPU)):
        for owner, names in read.items():
            for name in names:
                needs.add(f"{owner}.{name}", cpu_only)
    return needs


def _of_module(ours: Source, module: str, needs: Needs) -> None:
    tree = ours.tree(module)
    assert tree is not None
    cpu_only = module == CPU_ONLY
    imported = dict(_imports(tree))
    for path in imported.values():
        needs.add(path, cpu_only)
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in imported:
            needs.add(f"{imported[node.value.id]}.{node.attr}", cpu_only)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in imported:
            needs.calls.append((imported[node.func.id], arguments(node)))
        if isinstance(node, ast.ClassDef):
            for base in (imported[name] for name in base_names(node) if name in imported):
                _of_class(tree, node, base, needs, cpu_only)


def _of_class(tree: ast.Module, node: ast.ClassDef, base: str, needs: Needs, cpu_only: bool) -> None:
    needs.bases.add(base)
    own = {found.name for found in node.body if isinstance(found, ast.FunctionDef)}
    declared = {ast.unparse(found.target) for found in node.body if isinstance(found, ast.AnnAssign)}
    if node.decorator_list:  # a dataclass: its fields follow vLLM's
        given = [found for found in node.body if isinstance(found, ast.AnnAssign) and found.value is None]
        needs.extensions[base] = sorted(ast.unparse(found.target) for found in given)
        needs.calls += [(base, arguments(found)) for found in _calls_of(tree, node.name)]
    else:
        for name in declared:
            needs.add(f"{base}.{name}", cpu_only)
    for found in node.body:
        if isinstance(found, ast.FunctionDef) and not node.decorator_list:
            needs.overrides[f"{base}.{found.name}"] = parameters(found)
            needs.add(f"{base}.{found.name}", cpu_only)
    for found in ast.walk(node):
        if isinstance(found, ast.Call) and (method := ast.unparse(found.func)).startswith("super()."):
            needs.calls.append((f"{base}.{method.removeprefix('super().')}", arguments(found)))
        if _of_self(found) and isinstance(found.ctx, ast.Store):
            own.add(found.attr)
    for found in ast.walk(node):
        if _of_self(found) and found.attr not in own | declared:
            needs.add(f"{base}.{found.attr}", cpu_only)


def _of_self(node: ast.AST) -> TypeGuard[ast.Attribute]:
    return isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "self"


def _calls_of(tree: ast.Module, name: str) -> Iterator[ast.Call]:
    return (node for node in ast.walk(tree) if isinstance(node, ast.Call) and ast.unparse(node.func) == name)


def _imports(tree: ast.Module) -> Iterator[tuple[str, str]]:
    """Local name -> dotted path of what is imported from vLLM, other than for annotations."""
    for_annotations = {
        nested
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        for nested in node.body
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level == 0 and node not in for_annotations:
            for alias in node.names if str(node.module).split(".")[0] == "vllm" else ():
                yield alias.asname or alias.name, f"{node.module}.{alias.name}"


def record(root: Path) -> dict[str, Any]:
    """What the vLLM below a folder has of our needs. Takes some seconds."""
    vllm, needs = Source(root, "vllm"), our_needs()
    version = re.search(
        r"""^__version__ = (?:version = )?['"]([^'"]+)""", (root / "vllm/_version.py").read_text(), re.M
    )
    assert version is not None
    methods = sorted({path.rpartition(".")[2] for path in needs.overrides} - {"__init__"})
    return {
        "vllm": version[1],
        "imported": _imported(root),
        "names": {path: vllm.lookup(path) for path in sorted(needs.names)},
        "abstract": {base: _abstract(vllm, base) for base in sorted(needs.bases)},
        "calls": {name: sorted(vllm.calls(name)) for name in methods},
    }


def _imported(root: Path) -> dict[str, Any] | str:
    """What claim.py says with the vLLM below a folder, or how it ended."""
    places = os.pathsep.join([str(root), str(REPOSITORY), os.environ.get("PYTHONPATH", "")])
    ran = subprocess.run(
        [sys.executable, "-m", "tests.vllm.releases.claim"],
        env={**os.environ, "PYTHONPATH": places, "VLLM_TARGET_DEVICE": "cpu"},  # its compiled parts are not there
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
    )
    found = [line for line in ran.stdout.splitlines() if line.startswith('{"claimed"')]
    return json.loads(found[0]) if found else ran.stderr.strip().splitlines()[-1]


def _abstract(vllm: Source, base: str) -> list[str]:
    definition, _ = vllm.resolve(base)
    return sorted(vllm.abstract(definition)) if definition else []


def problems(record: dict[str, Any], needs: Needs, *, on_cpu: bool) -> list[str]:
    """Why our source as it is now does not fit a release, in words; nothing if it fits."""
    names, found = record["names"], []
    if record["imported"] != IMPORTED:
        found.append(f"imported, our classes gave {record['imported']} instead of {IMPORTED}")
    asked = [path for path, cpu_only in needs.names.items() if on_cpu or not cpu_only]
    found += [f"{path} was never recorded: record the releases anew" for path in asked if path not in names]
    there = {path for path in asked if names.get(path)}
    found += [f"{path} does not exist" for path in asked if path in names and path not in there]
    for path, given in needs.calls:
        if path in there and not accepts(with_fields(names[path], needs.extensions.get(path, [])), given):
            found.append(f"{path}{names[path]} takes no {given}")
    for path, ours in needs.overrides.items():
        name = path.rpartition(".")[2]
        theirs = inspect.signature(eval(f"lambda {names[path][1:-1]}: 0")).parameters if path in there else {}
        optional = name == "__init__"  # of a constructor we pass on what we like
        by_name = [f"{p.name}=_" for p in theirs.values() if p.kind < p.VAR_POSITIONAL and not (optional and p.default)]
        if not accepts(ours, f"({', '.join(by_name)})", partial=True):
            found.append(f"our {name}{ours} takes not all of {names[path]} by name")
        calls = record["calls"].get(name, [])
        found += [f"our {name}{ours} takes no {given}" for given in calls if not accepts(ours, given)]
    for base, methods in record["abstract"].items():
        missing = [name for name in methods if f"{base}.{name}" not in needs.overrides]
        found += [f"{base}.{name} is abstract and not ours" for name in missing if base in there]
    return found


def with_fields(base: str, fields: list[str]) -> str:
    """The parameters of a dataclass that adds fields without defaults to another's."""
    return f"({', '.join([*filter(None, [base[1:-1]]), *fields])})"


def accepts(parameters: str, given: str, *, partial: bool = False) -> bool:
    """Whether a function of these parameters can be called with these arguments."""
    try:
        signature = inspect.signature(eval(f"lambda {parameters[1:-1]}: 0"))
        call = ast.parse(f"f{given}", mode="eval").body
        assert isinstance(call, ast.Call)
        unpacked = any(isinstance(a, ast.Starred) for a in call.args) or any(k.arg is None for k in call.keywords)
        bind = signature.bind_partial if unpacked or partial else signature.bind
        bind(
            *(0 for a in call.args if not isinstance(a, ast.Starred)),
            **{k.arg: 0 for k in call.keywords if k.arg},
        )
    except (TypeError, SyntaxError):
        return False
    return True
