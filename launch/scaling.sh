#!/usr/bin/env bash
# How Llama-3-8B with LoRA scales, by compilation: what a preference step or a whole round takes on 8 to 512 chips.
#   step   FLOPs, network bytes and memory of one chip and step, one row of 2,304 tokens a chip
#   round  seconds of each stage of 50,000 contexts, at least and if nothing overlaps, 32 replies a chip
# Each prints a Markdown table, for the slices given or for its own list of them.
# Prerequisites: pip install -e '.[tpu]' and, for GPUs, '.[cuda]'; for round data/esconv/train.jsonl, whose lengths
# count. Two cores take one to four minutes a line. Nothing is paid for.
# Usage: launch/scaling.sh [--dry-run] step|round [SLICES*TOPOLOGY=DATAxFSDP ...]
set -euo pipefail
cd "$(dirname "$0")/.."
usage='usage: scaling.sh [--dry-run] step|round [SLICES*TOPOLOGY=DATAxFSDP ...]'

dry=false
if [ "${1-}" = --dry-run ]; then
    dry=true
    shift
fi
what=${1-}
[ $# -eq 0 ] || shift
case $what in
-h | --help)
    sed -n '2,/^set -/s/^# \{0,1\}//p' launch/scaling.sh
    exit 0
    ;;
step)
    # More than 64 on one axis would cut the weights finer and gather them as often.
    [ $# -gt 0 ] || set -- '1*v5p:2x2x2=1x8' '1*v5p:2x2x4=1x16' '1*v5p:2x4x4=1x32' '1*v5p:4x4x4=1x64' \
        '1*v5p:4x4x8=2x64' '1*v5p:4x8x8=4x64' '1*v5p:8x8x8=8x64'
    head='TFLOP | sent over the network, GiB | memory, GiB | estimate, ms' rule='--- | --- | --- | ---'
    lanes=1 least=1
    options=(--programs dpo)
    ;;
round)
    [ $# -gt 0 ] || set -- '1*v5p:2x2x2=1x8' '1*v5p:4x4x4=1x64' '1*v5p:4x4x4=8x8' '1*v5p:8x8x8=64x8' \
        '1*v6e:2x4=1x8' '2*v6e:16x16=64x8' '1*h100:8=1x8' '64*h100:8=64x8'
    head='prompts | replies | log-probs | training | whole round, s | replies, host, s'
    rule='--- | --- | --- | --- | --- | ---' lanes=32 least=16
    options=(--programs 'prefill,decode,score,dpo' --round 50000)
    ;;
*)
    echo "scaling.sh: ${what:-nothing} asked for; $usage" >&2
    exit 2
    ;;
esac
for line in "$@"; do
    [[ $line =~ ^[1-9][0-9]*\*[^=]+=[1-9][0-9]*x[1-9][0-9]*$ ]] && continue
    echo "scaling.sh: $line: give SLICES*TOPOLOGY=DATAxFSDP, such as 1*v5p:2x2x2=1x8; $usage" >&2
    exit 2
done

$dry || echo "| slices, data x fsdp | chips | $head |"
$dry || echo "| --- | --- | $rule |"
for line in "$@"; do
    mesh=${line##*=} slices=${line%%\**} topology=${line#*\*}
    topology=${topology%=*} data=${mesh%x*} fsdp=${mesh#*x}
    chips=$((data * fsdp)) rows=$((data * fsdp < least ? least : data * fsdp))
    command=(esjax plan --config configs/llama3-8b.yaml --shape llama3-8b --topology "$topology" --slices "$slices"
        "${options[@]}" --json --tries 0 --mesh.data "$data" --mesh.fsdp "$fsdp" --model.remat full
        --evolve.batch $((lanes * chips)) --reply.batch $((lanes * chips))
        --dpo.batch_rows "$rows" --dpo.micro_rows "$rows" --sft.batch_rows "$rows" --sft.micro_rows "$rows")
    if $dry; then
        printf '%q ' "${command[@]}"
        echo
        continue
    fi
    JAX_PLATFORMS=cpu "${command[@]}" | python3 -c '
import json, sys

def short(x):
    return f"{x:,.0f}" if x >= 100 else f"{x:.3g}"

made = json.loads(sys.stdin.readlines()[-1])
if "round" in made:
    stages = made["round"]["stages"]
    cells = ["{} to {}, {}".format(short(s["least"]), short(s["serial"]), s["bound"]) for s in stages]
    cells.append(" to ".join(short(sum(s[k] for s in stages)) for k in ("least", "serial")))
    cells.append(short(made["round"]["host"]))
else:
    (p,) = made["programs"]
    sent = sum(c["bytes"] for c in p["collectives"].values())
    cells = ["{:.1f}".format(p["flops"] / 1e12), f"{sent / 2**30:.2f}", "{:.2f}".format(p["total"])]
    cells.append("{:.0f}, {}".format(1e3 * p["seconds"], p["bound"]))
print("|", " | ".join([sys.argv[1].replace("=", ", "), str(made["devices"]), *cells]), "|")
' "$line"
done
