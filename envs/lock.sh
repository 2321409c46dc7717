#!/usr/bin/env bash
# Writes envs/*.lock from pyproject.toml: every package of a run, of the tests and of clusters, its version, and the hash of
# every file that was published of that version. Versions stay as they are; `envs/lock.sh --upgrade` takes the newest,
# `--upgrade-package NAME` that of one. A new package: add it to pyproject.toml, run this, then envs/licences.py in an
# environment made of the locks. Needs the package index.
set -euo pipefail
cd "$(dirname "$0")/.."

scratch="$(mktemp -d)"
trap 'rm -rf "$scratch"' EXIT
python3 -m venv "$scratch/venv"
"$scratch/venv/bin/pip" install --quiet --disable-pip-version-check uv==0.13.9

# lock FILE HEAD ARGUMENTS...: FILE keeps the comment that it begins with and its versions, and gets the rest anew.
lock() {
  local file="$1" head="$2"
  shift 2
  sed -n '/^#/!q;p' "$file" > "$scratch/comment"
  "$scratch/venv/bin/uv" pip compile --quiet --no-config --generate-hashes --no-annotate --no-header \
    --python-version 3.11 --python-platform x86_64-manylinux_2_28 \
    --no-emit-package convx pyproject.toml --extra build "$@" -o "$file"
  { cat "$scratch/comment"; printf '%s' "$head"; cat "$file"; } > "$scratch/new"
  cat "$scratch/new" > "$file"
}

# What others need besides: the same versions, without what the first file holds.
besides() {
  sed -n 's/^\([A-Za-z0-9._-]*\)==.*/--no-emit-package \1/p' envs/requirements.lock
}

lock envs/requirements.lock "" "$@"
# shellcheck disable=SC2046 # one word each
lock envs/requirements-test.lock $'-r requirements.lock\n' --extra test --constraint envs/requirements.lock $(besides) "$@"
# shellcheck disable=SC2046
lock envs/requirements-cluster.lock "" --extra slurm --extra cluster-generic --constraint envs/requirements.lock $(besides) "$@"
