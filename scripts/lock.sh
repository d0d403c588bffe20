#!/usr/bin/env bash
# Compile the pins in requirements/ from pyproject.toml and bench/pyproject.toml. Versions already pinned are kept where
# they still fit; scripts/lock.sh --upgrade takes the newest. No uv.lock: it would record hosts and paths of the machine
# that made it.
set -euo pipefail
cd "$(dirname "$0")/.."
uv=.venv/bin/uv
options=(--quiet --python-version 3.11 --no-emit-find-links --no-emit-index-url --no-header --no-annotate "$@")

# Both distributions, and neither of them in a list: they are installed from the checkout.
projects=(pyproject.toml bench/pyproject.toml --no-emit-package cacheslide)

# "+cpu" is the name of PyTorch's CPU build on its own index; the pin is the same version on every index.
strip_local() { sed -i 's/+cpu$//' "$1"; }

cpu=(--torch-backend cpu)
if [ -n "${PIP_FIND_LINKS:-}${UV_FIND_LINKS:-}" ]; then
  export UV_FIND_LINKS="${UV_FIND_LINKS:-${PIP_FIND_LINKS// /,}}"
  cpu=()
fi

"$uv" pip compile "${options[@]}" ${cpu[@]+"${cpu[@]}"} "${projects[@]}" --extra cpu --extra retrieval --extra remote --extra mooncake --extra dev -o requirements/cpu.txt
strip_local requirements/cpu.txt

# Without the wheel folder: the GPU list wants PyPI's torch and the CUDA libraries that it names.
env -u UV_FIND_LINKS "$uv" pip compile "${options[@]}" "${projects[@]}" --extra gpu --extra retrieval --extra remote --extra dev -o requirements/gpu.txt

# --no-config: the overrides in [tool.uv] are for the main environment only. The old pins steer the new ones, so torch
# gets its "+cpu" back first; otherwise PyPI's CUDA build and its libraries would be taken.
sed -i '/^torch==/s/$/+cpu/' requirements/rag.txt
"$uv" pip compile "${options[@]}" ${cpu[@]+"${cpu[@]}"} --no-config --group rag -o requirements/rag.txt
strip_local requirements/rag.txt

# Slurm's executor goes on top of .venv, so only what .venv lacks is listed.
"$uv" pip compile "${options[@]}" --no-config --group slurm -o requirements/slurm.txt
sed -i '/^snakemake-executor-plugin-/!d' requirements/slurm.txt
wc -l requirements/*.txt
