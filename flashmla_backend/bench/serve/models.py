"""The model that is served: a folder that exists, the embedded one, or a size of `bench steps` without weights."""

from __future__ import annotations

from pathlib import Path

from flashmla_backend import tokenizer
from flashmla_backend.bench.steps.models import MODELS, write_config
from flashmla_backend.checkpoint import default_checkpoint
from flashmla_backend.errors import InvalidArgument

EMBEDDED = "embedded"
SIZES = tuple(name for name in MODELS if name != "tiny")  # tiny is the embedded one


def resolve(model: str, dtype: str, max_length: int, scratch: Path) -> tuple[Path, list[str]]:
    """Folder of a model, and the arguments of the server that go with it. Raises InvalidArgument for an unknown one.

    model: "embedded", a name in SIZES (the engine then fills the weights), or a folder.
    """
    if model == EMBEDDED:
        return default_checkpoint(), []
    if model in SIZES:
        folder = write_config(model, dtype, max_length, scratch / model)
        tokenizer.write_tokenizer(folder)
        return folder, ["--load-format", "dummy"]
    if (Path(model) / "config.json").is_file():
        return Path(model), []
    raise InvalidArgument(f"model is {model!r}; accepted: {EMBEDDED}, {', '.join(SIZES)}, or a folder with config.json")
