#!/usr/bin/env bash
# What has become of a job (namespace/name, the last word): prints running, success or failed.
job="${!#}"
found="$(kubectl get job --namespace "${job%%/*}" "${job##*/}" -o 'jsonpath={.status.succeeded}/{.status.failed}' 2>&1)" || {
  # A job that is gone has failed; a server that does not answer says nothing about it.
  [[ "$found" == *NotFound* ]] && echo failed || echo running
  exit 0
}
case "$found" in
  1/*) echo success ;;
  /) echo running ;;
  *) echo failed ;;
esac
