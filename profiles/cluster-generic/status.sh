#!/usr/bin/env bash
# What has become of job $1: prints running, success or failed. For PBS Professional, whose `qstat -x` remembers finished jobs.
told="$(qstat -x -f "$1" 2>/dev/null)" || { echo failed; exit 0; }
state="$(sed -n 's/^ *job_state = //p' <<< "$told")"
code="$(sed -n 's/^ *Exit_status = //p' <<< "$told")"
case "$state" in
  F | C) [ "$code" = 0 ] && echo success || echo failed ;;
  *) echo running ;;
esac
