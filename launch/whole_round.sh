#!/usr/bin/env bash
# A whole round by compilation: 50,000 contexts, Llama-3-8B, LoRA, on 8 to 512 chips. Prints the seconds of each
# stage as a Markdown table, at least and if nothing overlaps, and what bounds it. A chip has 32 replies under way.
# Prerequisites: pip install -e '.[tpu]' and, for GPUs, '.[cuda]'; data/esconv/train.jsonl, whose lengths count.
# Two cores take two to four minutes a line. Nothing is paid for.
# Usage: launch/whole_round.sh [--dry-run] [SLICES*TOPOLOGY=DATAxFSDP ...]
set -euo pipefail
cd "$(dirname "$0")/.."

dry=false
if [ "${1-}" = --dry-run ]; then
    dry=true
    shift
fi
case "${1-}" in
-h | --help)
    sed -n '2,/^set -/s/^# \{0,1\}//p' launch/whole_round.sh
    exit 0
    ;;
-*)
    echo "whole_round.sh: unknown option $1; usage: whole_round.sh [--dry-run] [SLICES*TOPOLOGY=DATAxFSDP ...]" >&2
    exit 2
    ;;
esac
[ $# -gt 0 ] || set -- '1*v5p:2x2x2=1x8' '1*v5p:4x4x4=1x64' '1*v5p:4x4x4=8x8' '1*v5p:8x8x8=64x8' \
    '1*v6e:2x4=1x8' '1*v6e:8x8=8x8' '2*v6e:16x16=64x8' '1*h100:8=1x8' '8*h100:8=8x8' '64*h100:8=64x8'

stages="prompts | replies | log-probs | training"
$dry || echo "| slices, data x fsdp | chips | $stages | whole round, s | replies, host, s |"
$dry || echo "| --- | --- | --- | --- | --- | --- | --- | --- |"
for line in "$@"; do
    if ! [[ $line =~ ^([0-9]+)\*([^=]+)=([0-9]+)x([0-9]+)$ ]]; then
        echo "whole_round.sh: $line: give SLICES*TOPOLOGY=DATAxFSDP, such as 1*v5p:2x2x2=1x8" >&2
        exit 2
    fi
    slices=${BASH_REMATCH[1]} topology=${BASH_REMATCH[2]} data=${BASH_REMATCH[3]} fsdp=${BASH_REMATCH[4]}
    chips=$((data * fsdp)) rows=$((data * fsdp < 16 ? 16 : data * fsdp))
    command=(esjax plan --config configs/llama3-8b.yaml --shape llama3-8b --topology "$topology" --slices "$slices"
        --programs 'prefill,decode,score,dpo' --round 50000 --json --tries 0 --mesh.data "$data" --mesh.fsdp "$fsdp"
        --evolve.batch $((32 * chips)) --reply.batch $((32 * chips)) --model.remat full
        --dpo.batch_rows "$rows" --dpo.micro_rows "$rows" --sft.batch_rows "$rows" --sft.micro_rows "$rows")
    if $dry; then
        printf '%q ' "${command[@]}"
        echo
        continue
    fi
    JAX_PLATFORMS=cpu "${command[@]}" | python3 -c '
import json, sys
made = json.loads(sys.stdin.readlines()[-1])
stages = made["round"]["stages"]
short = lambda x: f"{x:,.0f}" if x >= 100 else f"{x:.3g}"
cells = ["{} to {}, {}".format(short(s["least"]), short(s["apart"]), s["bound"]) for s in stages]
whole = "{} to {}".format(*(short(sum(s[k] for s in stages)) for k in ("least", "apart")))
first, host = sys.argv[1].replace("=", ", "), short(made["round"]["host"])
print("|", " | ".join([first, str(made["devices"]), *cells, whole, host]), "|")
' "$line"
done
