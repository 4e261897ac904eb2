"""Record what SGLang's releases have of what our plugin uses: `python buildtools/sglang_releases.py WHEEL... > FILE`.

The wheels' Python is parsed, nothing of it is run:

    pip download --no-deps --dest wheels sglang==0.5.23      # once for each release
    python buildtools/sglang_releases.py wheels/*.whl > tests/sglang/releases.json

tests/unit/test_sglang_releases.py holds the record against integration/sglang/compat.py.
"""

from __future__ import annotations

import ast
import json
import re
import sys
import zipfile
from pathlib import Path
from typing import Any

from flashmla_backend.integration.sglang import compat

# Where SGLang imports the two classes of draft workers from compat.DRAFT_MODULE.
DRAFT_IMPORTERS = ("sglang.srt.speculative.draft_utils", "sglang.srt.speculative.eagle_worker_v2")


def main(wheels: list[str]) -> int:
    record = {}
    for wheel in wheels:
        version = re.search(r"sglang-([^-]+)-", Path(wheel).name)
        if version is None:
            print(f"{wheel} is no wheel of SGLang", file=sys.stderr)
            return 2
        with zipfile.ZipFile(wheel) as archive:
            record[version[1]] = facts(archive)
    print(json.dumps(dict(sorted(record.items())), indent=1))
    return 0


def facts(archive: zipfile.ZipFile) -> dict[str, Any]:
    """`signatures`: for each name of compat.USED and USED_BY_DCP its parameters, null where there is no such name;
    `draft_imports`: what SGLang imports from compat.DRAFT_MODULE."""
    signatures = {
        f"{module}.{name}": parameters_of(module_tree(archive, module), name.split("."))
        for module, names in {**compat.USED, **compat.USED_BY_DCP}.items()
        for name in names
    }
    imported = {
        alias.name
        for module in DRAFT_IMPORTERS
        for node in ast.walk(module_tree(archive, module) or ast.Module([], []))
        if isinstance(node, ast.ImportFrom) and node.module == compat.DRAFT_MODULE
        for alias in node.names
    }
    return {"signatures": signatures, "draft_imports": sorted(imported)}


def module_tree(archive: zipfile.ZipFile, module: str) -> ast.Module | None:
    try:
        return ast.parse(archive.read(module.replace(".", "/") + ".py"))
    except KeyError:
        return None


def parameters_of(tree: ast.AST | None, path: list[str]) -> list[str] | None:
    """Parameters of a function, of a class's constructor (its fields, for a dataclass); [] for any other name."""
    node = tree
    for name in path:
        body = getattr(node, "body", [])
        node = next((child for child in reversed(body) if name in names_of(child)), None)
    if isinstance(node, ast.ClassDef):
        constructor = next((child for child in node.body if "__init__" in names_of(child)), None)
        if constructor is None:
            return [child.target.id for child in node.body if is_field(child)]  # type: ignore[attr-defined]
        node = constructor
    if isinstance(node, ast.FunctionDef):
        arguments = node.args
        return [a.arg for a in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs) if a.arg != "self"]
    return None if node is None else []


def names_of(node: ast.AST) -> set[str]:
    """The names that a statement of a module or class defines."""
    if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
        return {node.name}
    targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
    return {target.id for target in targets if isinstance(target, ast.Name)}


def is_field(node: ast.AST) -> bool:
    return isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
