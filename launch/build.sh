#!/usr/bin/env bash
# Builds the container image for GPUs or TPUs from this repository.
#
#   launch/build.sh [options] gpu|tpu IMAGE
#
# Prerequisites: docker, and a network from which pip reaches its index. Afterwards: docker push IMAGE.
#
#   --base IMAGE          a base image with Python 3.11 and pip [python:3.11-slim]
#   --user USER           whom the container runs as [esjax]; root where device files or mounted storage allow only root
#   --platform PLATFORM   of the machines that will run it [linux/amd64]
#   --dry-run             print the command and run nothing
set -euo pipefail

die() { echo "${0##*/}: $*" >&2; exit 2; }
need() { { (($# > 1)) && [[ -n $2 && $2 != --* ]]; } || die "$1 needs a value"; }

build_args=() platform=linux/amd64 dry_run='' names=()
while (($#)); do
  [[ $1 == --?*=* ]] && set -- "${1%%=*}" "${1#*=}" "${@:2}"
  case $1 in
    --base) need "$@"; build_args+=(--build-arg "BASE=$2"); shift 2 ;;
    --user) need "$@"; build_args+=(--build-arg "RUN_AS=$2"); shift 2 ;;
    --platform) need "$@"; platform=$2; shift 2 ;;
    --dry-run) dry_run=1; shift ;;
    -h | --help) sed -n '2,/^set -/s/^# \{0,1\}//p' "$0"; exit 0 ;;
    -*) die "unknown option $1" ;;
    *) names+=("$1"); shift ;;
  esac
done
((${#names[@]} == 2)) || die "needs gpu or tpu, and the image's name"
[[ ${names[0]} == gpu || ${names[0]} == tpu ]] || die "builds gpu or tpu, not ${names[0]}"

root=$(cd "$(dirname "$0")/.." && pwd)
command=(docker build --file "$root/launch/Dockerfile.${names[0]}" --tag "${names[1]}" --platform "$platform"
  ${build_args[@]+"${build_args[@]}"} "$root")
if [[ -n $dry_run ]]; then
  printf -v line '%q ' "${command[@]}"
  echo "${line% }"
else
  exec "${command[@]}"
fi
