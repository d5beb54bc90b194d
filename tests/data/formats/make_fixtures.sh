#!/usr/bin/env bash
# Writes fixtures/ again: each real package in a folder of its own, without what it needs for clouds and images.
# The code runs in the interpreter of PYTHON (default: .venv/bin/python), whose torch, NumPy and tokenizers it uses.
#   tests/data/formats/make_fixtures.sh [FOLDER [TEXTS.jsonl TOKENIZER.json]]
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
python=${PYTHON:-$here/../../../.venv/bin/python}
out=${1:-$here/fixtures}
texts=${2:-$here/fixtures/texts.jsonl}
tokenizer=${3:-$here/fixtures/tokenizer.json}
work=$(mktemp -d); trap 'rm -rf "$work"' EXIT
mkdir -p "$out"
out=$(cd "$out" && pwd)
cp "$tokenizer" "$work/tokenizer.json"  # datatrove writes down its path
cp "$texts" "$work/texts.jsonl"
while read -r name packages; do
    # shellcheck disable=SC2086
    "$python" -m pip install -q --no-deps --disable-pip-version-check --target "$work/$name" $packages
    rm -rf "${out:?}/$name"
    (cd "$work" && PYTHONPATH="$work/$name" "$python" -W ignore "$here/foreign_packages.py" "$name" texts.jsonl tokenizer.json "$out")
    rm -rf "${work:?}/$name"
done < "$here/foreign_packages.txt"
