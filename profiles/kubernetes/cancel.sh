#!/usr/bin/env bash
# Ends jobs (each namespace/name).
for job in "$@"; do kubectl delete job --namespace "${job%%/*}" --wait=false "${job##*/}"; done
