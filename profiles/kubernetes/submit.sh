#!/usr/bin/env bash
# Sends one job to Kubernetes and prints its name. Options as in profile.yaml; the last word is the job's script.
set -euo pipefail
while [ $# -gt 1 ]; do
  case "$1" in
    --image) image="$2" ;;        # holds the Python that runs snakemake, at the same path
    --claim) claim="$2" ;;        # a volume claim that many pods may write (ReadWriteMany)
    --mount) mount="$2" ;;        # where it is mounted
    --namespace) namespace="$2" ;;
    --cpus) cpus="$2" ;;
    --memory) memory="$2" ;;      # MB
    --minutes) minutes="$2" ;;
    --gpus) gpus="$2" ;;
    --alone) alone="$2" ;;        # 1: on a node without another pod of convx
    *) echo "submit.sh: unknown option $1" >&2; exit 2 ;;
  esac
  shift 2
done
name="convx-$(od -An -N6 -tx1 /dev/urandom | tr -d ' \n')"
affinity='{}'
if [ "$alone" = 1 ]; then
  affinity='{"podAntiAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": [
    {"labelSelector": {"matchLabels": {"app": "convx"}}, "topologyKey": "kubernetes.io/hostname"}]}}'
fi
# Requests equal limits, as GPUs want it. Kubernetes tries nothing again (backoffLimit): Snakemake does, with more memory.
kubectl apply --namespace "$namespace" -f - >&2 <<JSON
{"apiVersion": "batch/v1", "kind": "Job",
 "metadata": {"name": "$name", "labels": {"app": "convx"}},
 "spec": {"backoffLimit": 0, "activeDeadlineSeconds": $((minutes * 60)), "ttlSecondsAfterFinished": 86400,
  "template": {"metadata": {"labels": {"app": "convx"}},
   "spec": {"restartPolicy": "Never", "affinity": $affinity,
    "tolerations": [{"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}],
    "containers": [{"name": "convx", "image": "$image", "workingDir": "$PWD", "command": ["sh", "$1"],
     "resources": {"limits": {"cpu": "$cpus", "memory": "${memory}M", "nvidia.com/gpu": "$gpus"}},
     "volumeMounts": [{"name": "shared", "mountPath": "$mount"}, {"name": "shm", "mountPath": "/dev/shm"}]}],
    "volumes": [{"name": "shared", "persistentVolumeClaim": {"claimName": "$claim"}},
     {"name": "shm", "emptyDir": {"medium": "Memory"}}]}}}}
JSON
echo "$namespace/$name"
