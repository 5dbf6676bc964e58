#!/usr/bin/env bash
# Submits an esjax command as an xpk workload (a JobSet) to a GKE cluster with TPUs.
#
#   launch/gke_xpk.sh [options] -- evolve --config configs/llama3-8b.yaml --run-dir /mnt/runs/a
#
# The JobSet starts all pods again after a preemption (exit code 143), after what passes (75) and after an error, but
# not after bad input (2).
# Submit the same command under a new workload name to continue a run whose restarts were used up.
#
# Prerequisites: xpk, gcloud and kubectl, logged in; a cluster made by `xpk cluster create`; an image from
# launch/Dockerfile.tpu in a registry that the cluster can read (launch/build.sh, docker push); a run directory on
# storage that all pods share, attached to the cluster by `xpk storage attach` and named by --storage.
#
#   --workload NAME         (required)
#   --cluster NAME          (required)
#   --tpu-type TYPE         such as v5litepod-16 (required)
#   --docker-image IMAGE    (required)
#   --num-slices N          [1]
#   --storage NAME          of a storage attached to the cluster; repeatable
#   --project PROJECT       [gcloud's current project]
#   --zone ZONE             [gcloud's current zone]
#   --priority PRIORITY     very-low, low, medium, high or very-high [medium]
#   --env NAME=VALUE        for the container; repeatable
#   --max-restarts N        [10]
#   --grace SECONDS         between SIGTERM and SIGKILL, for the last checkpoint [120]; Spot VMs give some 30
#   --delete                delete the workload --workload of --cluster instead
#   --dry-run               print the command and run nothing
set -euo pipefail

die() { echo "${0##*/}: $*" >&2; exit 2; }
need() { { (($# > 1)) && [[ -n $2 && $2 != --* ]]; } || die "$1 needs a value"; }
number() { need "$@"; [[ $2 =~ ^[0-9]+$ ]] || die "$1 needs a number, not $2"; }

workload='' cluster='' tpu_type='' docker_image='' num_slices=1 more=() location=()
max_restarts=10 grace=120 delete='' dry_run=''
while (($#)); do
  [[ $1 == --?*=* ]] && set -- "${1%%=*}" "${1#*=}" "${@:2}"
  case $1 in
    --workload) need "$@"; workload=$2; shift 2 ;;
    --cluster) need "$@"; cluster=$2; shift 2 ;;
    --tpu-type) need "$@"; tpu_type=$2; shift 2 ;;
    --docker-image) need "$@"; docker_image=$2; shift 2 ;;
    --num-slices) number "$@"; num_slices=$2; shift 2 ;;
    --storage | --priority | --env) need "$@"; more+=("$1=$2"); shift 2 ;;
    --project | --zone) need "$@"; location+=("$1=$2"); shift 2 ;;
    --max-restarts) number "$@"; max_restarts=$2; shift 2 ;;
    --grace) number "$@"; grace=$2; shift 2 ;;
    --delete) delete=1; shift ;;
    --dry-run) dry_run=1; shift ;;
    -h | --help) sed -n '2,/^set -/s/^# \{0,1\}//p' "$0"; exit 0 ;;
    --) shift; break ;;
    *) die "unknown option $1" ;;
  esac
done
for option in workload cluster; do
  [[ -n ${!option} ]] || die "--$option is missing"
done

target=(--cluster="$cluster" --workload="$workload" ${location[@]+"${location[@]}"})
if [[ -n $delete ]]; then
  command=(xpk workload delete "${target[@]}" --force)
else
  for option in tpu_type docker_image; do
    [[ -n ${!option} ]] || die "--${option//_/-} is missing"
  done
  (($#)) || die "the esjax command is missing: ... -- evolve --run-dir DIR"
  # exec: xpk sends SIGTERM to the shell that it runs the command in, which must therefore become esjax.
  printf -v arguments '%q ' "$@" --distributed
  # Of itself xpk restarts only after exit codes 42 and 127 to 255; esjax ends with 1 when a run cannot go
  # on, and with 75 after what passes.
  command=(xpk workload create "${target[@]}" --tpu-type="$tpu_type" --num-slices="$num_slices"
    --docker-image="$docker_image" --max-restarts="$max_restarts" "--restart-on-exit-codes=1,75"
    --termination-grace-period-seconds="$grace" ${more[@]+"${more[@]}"} --command="exec esjax ${arguments% }")
fi

if [[ -n $dry_run ]]; then
  printf -v line '%q ' "${command[@]}"
  echo "${line% }"
else
  exec "${command[@]}"
fi
