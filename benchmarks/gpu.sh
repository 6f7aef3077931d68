#!/usr/bin/env bash
# Measure this project on a GPU, in at most about 8 minutes.
#
#     bash benchmarks/gpu.sh                    all steps, the most important ones first
#     bash benchmarks/gpu.sh decode peers       these steps
#     bash benchmarks/gpu.sh --cpu              tiny models on a CPU, to test the script
#
# It needs nothing from outside: the weights are random. Each step has a time limit. Results are
# written as soon as they are known, and a failed step does not stop the others. Afterwards,
# `python benchmarks/gpu.py --table` and the same for compare.py write the tables in README.md.
# Set RESULTS to a folder for the files that are written (default: benchmarks).
set -uo pipefail
cd "$(dirname "$0")/.."
results=${RESULTS:-benchmarks}
toy=""
[ "${1:-}" = --cpu ] && { toy=--toy; export CUDA_VISIBLE_DEVICES=; shift; }
steps=("$@")
[ $# = 0 ] && steps=(tests kernels training-8b decode training-2b example peers precision energy)

compare() { timeout "$1" python benchmarks/compare.py --json "$results/$2.json" --no-table "${@:3}"; }

run() {
    case $1 in
        # Other versions of packages can warn about other things, so here warnings are no errors.
        tests) timeout 60 pytest -q -m gpu -o filterwarnings=default ;;
        peers)
            if [ -n "$toy" ]; then
                compare 200 peers-toy --sizes toy --times 1
            else
                compare 80 peers-2b --sizes llast-2b --times 3
                compare 60 peers-8b-training --sizes llast-8b-quarter --cases training --times 3
                compare 60 peers-8b --sizes llast-8b --cases translation --times 2
            fi ;;
        training-*) timeout 90 "${python[@]}" ;;
        *) timeout 90 "${python[@]}" ;;
    esac
}

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
failed=()
for step in "${steps[@]}"; do
    echo "== ${SECONDS}s: $step"
    python=(python benchmarks/gpu.py $toy --json "$results/gpu.json" --out "$work/run" "$step")
    run "$step" || failed+=("$step")
done
echo "== ${SECONDS}s: done; failed: ${failed[*]:-none}"
[ ${#failed[@]} = 0 ]
