#!/usr/bin/env bash
# Weak scaling by compilation: the preference step of Llama-3-8B, LoRA, on TPU v5p slices of 8 to 512 chips with one
# row a chip. Prints FLOPs, network bytes and memory of one chip and step as a Markdown table.
# Prerequisites: pip install -e '.[tpu]'; two cores take about a minute a slice. Nothing is paid for.
# Usage: launch/weak_scaling.sh [--dry-run] [TOPOLOGY ...]
set -euo pipefail
cd "$(dirname "$0")/.."

dry=false
if [ "${1-}" = --dry-run ]; then
    dry=true
    shift
fi
case "${1-}" in
-h | --help)
    sed -n '2,/^set -/s/^# \{0,1\}//p' launch/weak_scaling.sh
    exit 0
    ;;
-*)
    echo "weak_scaling.sh: unknown option $1; usage: weak_scaling.sh [--dry-run] [TOPOLOGY ...]" >&2
    exit 2
    ;;
esac
[ $# -gt 0 ] || set -- v5p:2x2x2 v5p:2x2x4 v5p:2x4x4 v5p:4x4x4 v5p:4x4x8 v5p:4x8x8 v5p:8x8x8

$dry || echo "| slice | chips | mesh (data x fsdp) | TFLOP | sent over the network, GiB | memory, GiB | estimate, ms |"
$dry || echo "| --- | --- | --- | --- | --- | --- | --- |"
for topology in "$@"; do
    chips=1
    for side in $(tr x ' ' <<<"${topology#*:}"); do chips=$((chips * side)); done
    fsdp=$((chips < 64 ? chips : 64)) # more would cut the weights finer and gather them as often
    command=(esjax plan --config configs/llama3-8b.yaml --shape llama3-8b --topology "$topology" --programs dpo --json
        --mesh.data $((chips / fsdp)) --mesh.fsdp "$fsdp" --dpo.batch_rows "$chips" --dpo.micro_rows "$chips"
        --sft.batch_rows "$chips" --sft.micro_rows "$chips" --evolve.batch "$chips" --model.remat full)
    if $dry; then
        printf '%q ' "${command[@]}"
        echo
        continue
    fi
    JAX_PLATFORMS=cpu "${command[@]}" | python3 -c '
import json, sys
made = json.loads(sys.stdin.readlines()[-1])
(p,) = made["programs"]
sent = sum(c["bytes"] for c in p["collectives"].values())
mesh = "{data} x {fsdp}".format(**made["mesh"])
row = "| {} | {} | {} | {:.1f} | {:.2f} | {:.2f} | {:.0f}, {} |"
numbers = p["flops"] / 1e12, sent / 2**30, p["total"], 1e3 * p["seconds"], p["bound"]
print(row.format(sys.argv[1], made["devices"], mesh, *numbers))
' "$topology"
done
