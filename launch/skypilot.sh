#!/usr/bin/env bash
# Submits an esjax command as a SkyPilot managed job; launch/skypilot.yaml says what runs where, and what it needs.
#
#   launch/skypilot.sh [options] -- evolve --config configs/llama3-8b.yaml --run-dir /runs/a
#
# SkyPilot shows the price estimate and asks before it rents anything, unless --yes is given.
#
# Prerequisites: skypilot, with a cloud that `sky check` finds enabled; storage that all nodes share, see --nfs.
#
# Options of `sky jobs launch` that are passed on (the others are in the yaml file):
#   --name NAME  --infra INFRA  --gpus GPUS  --num-nodes N  --env NAME[=VALUE]  --secret NAME[=VALUE]
#   --use-spot  --no-use-spot  --detach-run  --yes
# and
#   --nfs HOST:/PATH   storage that all nodes share, mounted at /runs
#   --extra cuda|tpu   the accelerator's kind [cuda]
#   --dry-run          print the command and run nothing
set -euo pipefail

die() { echo "${0##*/}: $*" >&2; exit 2; }
need() { { (($# > 1)) && [[ -n $2 && $2 != --* ]]; } || die "$1 needs a value"; }

options=() dry_run=''
while (($#)); do
  [[ $1 == --?*=* ]] && set -- "${1%%=*}" "${1#*=}" "${@:2}"
  case $1 in
    --name | --infra | --gpus | --num-nodes | --env | --secret) need "$@"; options+=("$1" "$2"); shift 2 ;;
    --use-spot | --no-use-spot | --detach-run | --yes) options+=("$1"); shift ;;
    --nfs) need "$@"; options+=(--env "NFS_EXPORT=$2"); shift 2 ;;
    --extra)
      need "$@"
      [[ $2 == cuda || $2 == tpu ]] || die "$1 is cuda or tpu, not $2"
      options+=(--env "EXTRA=$2"); shift 2 ;;
    --dry-run) dry_run=1; shift ;;
    -h | --help) sed -n '2,/^set -/s/^# \{0,1\}//p' "$0"; exit 0 ;;
    --) shift; break ;;
    *) die "unknown option $1" ;;
  esac
done
(($#)) || die "the esjax command is missing: ... -- evolve --run-dir DIR"

root=$(cd "$(dirname "$0")/.." && pwd)
printf -v arguments '%q ' "$@"
command=(sky jobs launch ${options[@]+"${options[@]}"} --workdir "$root" --env "ESJAX_ARGS=${arguments% }"
  "$root/launch/skypilot.yaml")
if [[ -n $dry_run ]]; then
  printf -v line '%q ' "${command[@]}"
  echo "${line% }"
else
  exec "${command[@]}"
fi
