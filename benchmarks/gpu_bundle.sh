#!/usr/bin/env bash
# Builds .gpu: the project as a wheel, benchmarks/gpu.py, wheels of other packages to compare with, and a README of one command.
#   bash benchmarks/gpu_bundle.sh [python] [version of Python there, default 3.12]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

python=${1:-python3}
there=${2:-3.12}
target=.gpu
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

rm -rf "$target"
mkdir -p "$target"
# A copy: setuptools leaves its build folder, with files of earlier builds, where the sources are.
git ls-files -z --cached --others --exclude-standard | xargs -0 cp --parents -t "$work"
"$python" -m pip wheel --quiet --no-deps --wheel-dir "$target" "$work"
cp benchmarks/gpu*.py "$target"
for peer in fla-core==0.6.0 fast-attnres==2.1.0; do
    "$python" -m pip download --quiet --no-deps --only-binary=:all: --python-version "$there" --implementation cp \
        --platform manylinux_2_28_x86_64 --platform manylinux2014_x86_64 --dest "$target" "$peer" 2>/dev/null \
        || echo "not had, and not compared with: $peer"
done
cat >"$target/README" <<'TEXT'
Runs attnres_fx on a GPU. Needs Python with torch 2.11 or newer and its Triton, networkx, typer, rich, safetensors and transformers.
In the folder above this one:

    bash .gpu/run.sh --out results --seconds 390

Results go to results/results.jsonl, line by line. --only parallel:170,whole:130,mix chooses sections (and gives them so many seconds at most);
--device cpu tries the script itself.
TEXT
cat >"$target/run.sh" <<'TEXT'
#!/usr/bin/env bash
# Installs the wheels beside this file into a folder of their own, and runs gpu.py with them.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
site=$(mktemp -d)
trap 'rm -rf "$site"' EXIT
python3 -m pip install --quiet --no-index --no-deps --no-compile --target "$site" "$here"/*.whl
PYTHONPATH=$site PYTHONUNBUFFERED=1 python3 "$here/gpu.py" "$@"
TEXT
du -sh "$target"
