#!/usr/bin/env bash
# Runs esjax as several processes on this machine's CPUs, as a rehearsal of several hosts, and again after an error.
#
#   launch/local_multiprocess.sh [options] -- evolve --run-dir runs/a
#
# Process 0's output is shown; every process has a log, DIR/process-I.log. When a process ends with an error the others
# get SIGTERM and, 30 s later, SIGKILL; then all start again, unless it was bad input (exit code 2): as often as it
# takes after what passes (75; the pauses double up to 10 minutes) and after a preemption (143), --retries times after
# anything else. SIGTERM and SIGINT are passed on as SIGTERM; the processes save and end, and so does this (exit code
# 143). The same command continues.
#
# Prerequisites: bash 5.1, esjax on PATH.
#
#   --processes N     [2]
#   --devices N       CPU devices that each process pretends to have [4]
#   --retries N       how many times to start again after an error [3]
#   --log-dir DIR     [esjax-logs in the temporary folder]
#   --port PORT       of process 0, on 127.0.0.1 [a free one, chosen at every start]
#   --grace SECONDS   between SIGTERM and SIGKILL [30]
#   --dry-run         print the processes' commands, one a line, and run nothing
#
# Environment: ESJAX, the command to run, such as "python -m esjax" [esjax]; XLA_FLAGS is kept and added to;
# RETRY_SECONDS, the first pause [10].
set -euo pipefail

die() { echo "${0##*/}: $*" >&2; exit 2; }
number() { { (($# > 1)) && [[ $2 =~ ^[0-9]+$ ]]; } || die "$1 needs a number"; }

processes=2 devices=4 retries=3 log_dir=${TMPDIR:-/tmp}/esjax-logs port='' grace=30 dry_run=''
while (($#)); do
  [[ $1 == --?*=* ]] && set -- "${1%%=*}" "${1#*=}" "${@:2}"
  case $1 in
    --processes) number "$@"; processes=$2; shift 2 ;;
    --devices) number "$@"; devices=$2; shift 2 ;;
    --retries) number "$@"; retries=$2; shift 2 ;;
    --log-dir) { (($# > 1)) && [[ -n $2 && $2 != --* ]]; } || die "$1 needs a value"; log_dir=$2; shift 2 ;;
    --port) number "$@"; port=$2; shift 2 ;;
    --grace) number "$@"; grace=$2; shift 2 ;;
    --dry-run) dry_run=1; shift ;;
    -h | --help) sed -n '2,/^set -/s/^# \{0,1\}//p' "$0"; exit 0 ;;
    --) shift; break ;;
    *) die "unknown option $1" ;;
  esac
done
(($#)) || die "the esjax command is missing: ... -- evolve --run-dir DIR"
((processes > 0 && devices > 0)) || die "--processes and --devices need at least 1"
((BASH_VERSINFO[0] * 100 + BASH_VERSINFO[1] >= 501)) || die "needs bash 5.1 or later, not $BASH_VERSION"
read -r -a esjax <<<"${ESJAX:-esjax}"

free_port() { python3 -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])'; }
# Sets `command` for process $1, with its coordinator at port $2.
set_command() {
  command=(env JAX_PLATFORMS=cpu XLA_FLAGS="${XLA_FLAGS:+$XLA_FLAGS }--xla_force_host_platform_device_count=$devices"
    "${esjax[@]}" "${esjax_arguments[@]}" --coordinator "127.0.0.1:$2" --num-processes "$processes" --process-id "$1")
}
esjax_arguments=("$@")

if [[ -n $dry_run ]]; then
  port=${port:-$(free_port)}
  for ((i = 0; i < processes; i++)); do
    set_command "$i" "$port"
    printf -v line '%q ' "${command[@]}"
    echo "${line% }"
  done
  exit 0
fi

mkdir -p "$log_dir"
for ((i = 0; i < processes; i++)); do : >"$log_dir/process-$i.log"; done
# tee must outlive the signals that the processes get, or process 0 could not write any more while it saves.
exec 4> >(trap '' INT TERM; exec tee -a "$log_dir/process-0.log")
tee_stdout=$!
exec 5> >(trap '' INT TERM; exec tee -a "$log_dir/process-0.log" >&2)
tee_stderr=$!

declare -A pids=() # those that are running: their pid, and which process it is
stopping=''
terminate() { kill -TERM "${!pids[@]}" 2>/dev/null || true; }
# SIGINT is passed on as SIGTERM because a shell's background processes ignore SIGINT.
trap 'stopping=1; terminate' INT TERM
trap terminate EXIT

start() {
  local i at=${port:-$(free_port)}
  for ((i = 0; i < processes; i++)); do
    [[ -z $stopping ]] || return 0
    set_command "$i" "$at"
    if ((i == 0)); then
      "${command[@]}" >&4 2>&5 4>&- 5>&- &
    else
      "${command[@]}" >>"$log_dir/process-$i.log" 2>&1 4>&- 5>&- &
    fi
    pids[$!]=$i
  done
}

# Waits until all have ended, or one has with an error (its exit code is then `code`), or a signal came.
watch() {
  local ended status
  code=0
  while ((${#pids[@]} > 0 && code == 0)) && [[ -z $stopping ]]; do
    status=0
    wait -n -p ended "${!pids[@]}" || status=$?
    [[ -n ${ended-} ]] || continue # a signal interrupted the wait
    ((status == 0)) || { code=$status; echo "${0##*/}: process ${pids[$ended]} ended with exit code $status" >&2; }
    unset "pids[$ended]"
  done
}

stop() {
  local pid status until=$((SECONDS + grace))
  terminate
  while kill -0 "${!pids[@]}" 2>/dev/null && ((SECONDS < until)); do sleep 0.1; done
  kill -KILL "${!pids[@]}" 2>/dev/null || true
  for pid in "${!pids[@]}"; do
    status=0
    wait "$pid" || status=$?
    # The cause, even if another process noticed first that this one was gone: bad input, then a failure of its own.
    if ((status == 2 || ((code == 75 || code == 143) && status > 0 && status < 128))); then code=$status; fi
  done
  pids=()
}

failures=0 pause=${RETRY_SECONDS:-10}
while :; do
  start
  watch
  ((${#pids[@]} == 0)) || stop
  if [[ -n $stopping ]]; then code=143; fi
  if [[ -n $stopping ]] || ((code == 0 || code == 2)); then break; fi
  case $code in
    75)
      echo "${0##*/}: this may pass; starting all $processes processes again in $pause s" >&2
      until=$((SECONDS + pause))
      while [[ -z $stopping ]] && ((SECONDS < until)); do sleep 0.2; done
      pause=$((2 * pause < 600 ? 2 * pause : 600))
      ;;
    143) echo "${0##*/}: stopped, but not from here; starting all $processes processes again" >&2 ;;
    *)
      ((failures++ < retries)) || break
      echo "${0##*/}: starting all $processes processes again ($failures of $retries)" >&2
      ;;
  esac
  if [[ -n $stopping ]]; then code=143; break; fi
done

exec 4>&- 5>&-
wait "$tee_stdout" "$tee_stderr" || true # they write what is left
exit "$code"
