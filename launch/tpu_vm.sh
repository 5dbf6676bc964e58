#!/usr/bin/env bash
# shellcheck disable=SC2329 # `each` and a trap call functions by their names
# Runs esjax on Cloud TPU VM slices that a queued resource provides, and asks for new ones when they are preempted.
#
#   launch/tpu_vm.sh [options] -- evolve --config configs/llama3-8b.yaml --run-dir /mnt/runs/a
#
# It asks for the slices and waits until they are ACTIVE, copies the committed state of this repository to every worker,
# installs it there and starts the command on all workers with --distributed. When that ends with an error it is started
# again; slices that FAILED or were SUSPENDED are deleted and asked for again. In the end every worker's log is fetched.
# Called again with the same --name, it goes on with the slices that are there.
#
# Prerequisites: gcloud, logged in; the Cloud TPU API and quota; `ssh-add ~/.ssh/google_compute_engine` (gcloud needs an
# agent to reach several workers); a run directory on storage that all workers share, such as a Filestore share that
# --setup mounts.
#
#   --name NAME              of the queued resource; slices are called NAME, or NAME-0, NAME-1, ... (required)
#   --zone ZONE              (required)
#   --accelerator-type TYPE  such as v5litepod-16 (required)
#   --runtime-version V      TPU software that the accelerator type needs, such as v2-alpha-tpuv5-lite (required)
#   --project PROJECT        [gcloud's current project]
#   --node-count N           slices, joined by the data centre's network (multislice) [1]
#   --spot                   cheaper capacity that can be taken away; also --guaranteed, --reserved [on demand]
#   --create-flag=FLAG       one more flag of `queued-resources create`, as in --create-flag=--network=mine; repeatable
#   --setup COMMAND          run on every worker before the installation, such as a mount
#   --install COMMAND        replaces the installation, which uses uv to get Python 3.11
#   --retries N              how many times to start again after an error; after what passes (exit code 75) and after a
#                            preemption (143) it is as often as it takes [10]
#   --poll SECONDS           between two looks at the queue [30]
#   --log-dir DIR            where the logs go [esjax-logs/NAME]
#   --delete                 delete the slices in the end, however it ended; without it they stay, and cost
#   --dry-run                print the commands of a run in which nothing goes wrong, one a line, and run nothing
#
# Exit code: 0 done; 2 bad input, not tried again; otherwise the last attempt's.
set -euo pipefail

die() { echo "${0##*/}: $*" >&2; exit 2; }
need() { { (($# > 1)) && [[ -n $2 && $2 != --* ]]; } || die "$1 needs a value"; }
number() { need "$@"; [[ $2 =~ ^[0-9]+$ ]] || die "$1 needs a number, not $2"; }

name='' zone='' accelerator_type='' runtime_version='' project='' node_count=1 create_flags=() setup=true
# The images' own Python may be older than 3.11.
install='python3 -m pip install --quiet --user uv && .local/bin/uv venv --allow-existing --python 3.11 esjax-venv && '
install+='.local/bin/uv pip install --quiet --python esjax-venv/bin/python "./esjax[tpu]"'
retries=10 poll=30 log_dir='' delete='' dry_run=''
while (($#)); do
  [[ $1 == --?*=* ]] && set -- "${1%%=*}" "${1#*=}" "${@:2}"
  case $1 in
    --name) need "$@"; name=$2; shift 2 ;;
    --zone) need "$@"; zone=$2; shift 2 ;;
    --accelerator-type) need "$@"; accelerator_type=$2; shift 2 ;;
    --runtime-version) need "$@"; runtime_version=$2; shift 2 ;;
    --project) need "$@"; project=$2; shift 2 ;;
    --node-count) number "$@"; node_count=$2; shift 2 ;;
    --spot | --guaranteed | --reserved) create_flags+=("$1"); shift ;;
    --create-flag) (($# > 1)) || die "$1 needs a value"; create_flags+=("$2"); shift 2 ;;
    --setup) need "$@"; setup=$2; shift 2 ;;
    --install) need "$@"; install=$2; shift 2 ;;
    --retries) number "$@"; retries=$2; shift 2 ;;
    --poll) number "$@"; poll=$2; shift 2 ;;
    --log-dir) need "$@"; log_dir=$2; shift 2 ;;
    --delete) delete=1; shift ;;
    --dry-run) dry_run=1; shift ;;
    -h | --help) sed -n '/^# Runs/,/^set -/s/^# \{0,1\}//p' "$0"; exit 0 ;;
    --) shift; break ;;
    *) die "unknown option $1" ;;
  esac
done
for option in name zone accelerator_type runtime_version; do
  [[ -n ${!option} ]] || die "--${option//_/-} is missing"
done
((node_count > 0)) || die "--node-count needs at least 1"
(($#)) || die "the esjax command is missing: ... -- evolve --run-dir DIR"

log_dir=${log_dir:-esjax-logs/$name}
[[ $log_dir == /* ]] || log_dir=$PWD/$log_dir
where=(--zone="$zone" ${project:+--project="$project"} --quiet)
root=$(cd "$(dirname "$0")/.." && pwd)
if ((node_count == 1)); then
  nodes=("$name") node_flags=(--node-id="$name")
else
  nodes=() node_flags=(--node-count="$node_count" --node-prefix="$name")
  for ((i = 0; i < node_count; i++)); do nodes+=("$name-$i"); done
fi
# flock: gcloud repeats a command whose connection broke, although the first one may still be running there.
# The log is a file of the worker, so nothing depends on the connection; hostnames differ, so fetched logs do, too.
printf -v arguments '%q ' "$@" --distributed
# shellcheck disable=SC2016 # $(hostname) is the worker's
work='cd esjax && flock ../esjax.lock ../esjax-venv/bin/esjax '"$arguments"'>> "../esjax-logs/$(hostname).log" 2>&1'
prepare="($setup) && mkdir -p esjax-logs && tar -xzf esjax.tar.gz && $install"

exec 3>&1 # what a dry run prints, also from within $(...)
run() {
  local line
  [[ -n $dry_run ]] || { "$@"; return; }
  printf -v line '%q ' "$@"
  echo "${line% }" >&3
}
tell() { [[ -n $dry_run ]] || echo "${0##*/}: $*" >&2; }

# A list is empty when there is no such resource; describe would fail, as it does when the network is down.
list() {
  run gcloud compute tpus queued-resources list "${where[@]}" --filter="name~/$name\$" --format='value(state.state)'
}
create() {
  run gcloud compute tpus queued-resources create "$name" "${where[@]}" --accelerator-type="$accelerator_type" \
    --runtime-version="$runtime_version" "${node_flags[@]}" ${create_flags[@]+"${create_flags[@]}"}
}
remove() { run gcloud compute tpus queued-resources delete "$name" "${where[@]}" --force; }
ssh_all() { run gcloud compute tpus tpu-vm ssh "$2" "${where[@]}" --worker=all --command="$1"; }
send() { run gcloud compute tpus tpu-vm scp "$log_dir/esjax.tar.gz" "$1:" "${where[@]}" --worker=all; }
fetch() { run gcloud compute tpus tpu-vm scp "$1:esjax-logs" "$log_dir/$1" "${where[@]}" --worker=all --recurse; }

# Does the same for every slice, side by side; the exit code is 2 (bad input) if any is, else the last that is not 0.
each() {
  local node pid code=0 status pids=()
  for node in "${nodes[@]}"; do
    if [[ -n $dry_run ]]; then "$@" "$node"; else "$@" "$node" & pids+=("$!"); fi
  done
  for pid in ${pids[@]+"${pids[@]}"}; do
    status=0
    wait "$pid" || status=$?
    ((status == 0 || code == 2)) || code=$status
  done
  return "$code"
}

again() { ((attempt++ < retries)); }

# Waits until all slices are there, asking for them as often as it takes; fails when the retries are used up.
ready='' attempt=0
acquire() {
  local state
  while :; do
    state=$(list) || { state=UNKNOWN; again || return 1; }
    if [[ -n $dry_run ]]; then create; list; return; fi
    case $state in
      ACTIVE) return ;;
      # What is wrong with the first request will be wrong with the next.
      '') ready=''; create || { ((attempt > 0)) && again; } || return 1 ;;
      SUSPENDED) remove || true ;; # preempted: the attempt that ended with it was counted
      FAILED) again || return 1; remove || true ;;
    esac
    tell "$name is ${state:-asked for}; looking again in $poll s"
    sleep "$poll"
  done
}
install_all() { [[ -n $ready ]] || { each send && each ssh_all "$prepare" && ready=1; }; }

goodbye() {
  local left
  left=$(jobs -p)
  # shellcheck disable=SC2086 # several numbers
  [[ -z $left ]] || kill $left 2>/dev/null || true
  tell "slices that were not deleted go on, and cost, until:" \
    "gcloud compute tpus queued-resources delete $name --force --zone=$zone${project:+ --project=$project}"
}
trap goodbye EXIT
trap 'exit 143' INT TERM

for node in "${nodes[@]}"; do run mkdir -p "$log_dir/$node/esjax-logs"; done
pause=$poll
run git -C "$root" archive --format=tar.gz --prefix=esjax/ --output="$log_dir/esjax.tar.gz" HEAD
while :; do
  code=1
  acquire || break
  if install_all; then
    tell "running; to watch: gcloud compute tpus tpu-vm ssh ${nodes[0]} --zone=$zone --command='tail -f esjax-logs/*'"
    code=0
    each ssh_all "$work" || code=$?
  fi
  if ((code == 0 || code == 2)); then break; fi
  # What passes (75) and a preemption (143) are no failures; between tries of what passes the pauses double.
  ((code == 75 || code == 143)) || again || break
  wait_for=$poll
  if ((code == 75)); then
    wait_for=$pause pause=$((2 * pause < 600 ? 2 * pause : 600))
  fi
  tell "ended with exit code $code; again in $wait_for s (failures: $attempt of $retries)"
  sleep "$wait_for"
done
[[ -z $ready ]] || each fetch || tell "not every log could be fetched"
[[ -z $delete ]] || { remove && trap - EXIT; } || tell "could not delete $name"
exit "$code"
