#!/usr/bin/env bash
# Run by Snakemake after it made the conda environment, in the folder of the workflow: pip takes no editable package together
# with hashes. After `conda env create -f envs/environment.yaml` run it by hand.
set -euo pipefail
pip install --no-build-isolation --no-deps -e .
