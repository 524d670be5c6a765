#!/usr/bin/env bash
# Writes py310.txt, py311.txt and py312.txt: an exact version of everything that the projects and their extras require.
# Existing pins are reused if still valid; options go to `uv pip compile`: --upgrade, or --upgrade-package NAME.
set -euo pipefail
cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.."
for version in 3.10 3.11 3.12; do
    file=constraints/py${version/./}.txt
    UV_PYTHON_DOWNLOADS=never .venv/bin/uv pip compile --quiet --no-build --no-header --no-annotate --strip-extras \
        --python-version "$version" --python-platform x86_64-manylinux_2_35 pyproject.toml client/pyproject.toml \
        --extra bitsandbytes --extra benchmark --extra test --extra gateway --extra loadtest --extra record \
        -o "$file" "$@" >/dev/null
    # PyTorch itself pins its CUDA packages, which differ between builds; the server is installed without dependencies.
    sed -i -E '/^(cuda|nvidia)-/d' "$file"
    grep -o 'nvidia-pytriton==[^"]*' pyproject.toml >> "$file"
done
