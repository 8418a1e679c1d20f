#!/usr/bin/env bash
# Builds PrunePath against this machine's torch, runs the GPU tests, compute-sanitizer and the benchmarks, and leaves
# every log and result in OUTDIR. A stage that fails does not stop the later ones; the last lines say which passed, and
# the exit code is 1 if any failed.
#
#     benchmarks/gpu_check.sh OUTDIR [STAGE...]     all stages unless some are named; the build always runs
#
# PYTHON=python3 by default; needs nvcc, cmake, ninja, pybind11. Under 9 minutes in all on 16 cores.
set -u
[ $# -ge 1 ] || { echo "usage: $0 OUTDIR [STAGE...]" >&2; exit 2; }
mkdir -p "$1" || exit 2
out=$(cd "$1" && pwd)
shift
wanted=" $* "
root=$(cd "$(dirname "$0")/.." && pwd)
python=${PYTHON:-python3}
site=$(mktemp -d)
trap 'rm -rf "$site"' EXIT
: >"$out/summary.txt"

stage() {  # NAME SECONDS COMMAND...: runs the command with its output in OUTDIR/NAME.log
    local name=$1 limit=$2 start=$SECONDS status=0
    shift 2
    [ "$wanted" = "  " ] || [ "$name" = build ] || [[ $wanted == *" $name "* ]] || return 0
    timeout --signal=INT --kill-after=10 "$limit" "$@" >"$out/$name.log" 2>&1 || status=$?
    printf '%-14s exit %-3s %4ss  %s\n' "$name" $status $((SECONDS - start)) "$(grep -v '^ *$' "$out/$name.log" | tail -n 1)" |
        tee -a "$out/summary.txt"
}

# From here on the installed package is what is imported, never the source folder.
cd "$site" || exit 2
export PYTHONPATH=$site PRUNEPATH_CUDA=1 PYTHONUNBUFFERED=1 CMAKE_ARGS="${CMAKE_ARGS:-} -DPRUNEPATH_PTXAS_VERBOSE=ON"
export CUDAARCHS=${CUDAARCHS:-native}
pytest=("$python" -m pytest -c "$root/pyproject.toml" --rootdir "$root" -p no:cacheprovider -m gpu)
# Every CUDA kernel once, and little else: the sanitizer makes it a hundred times slower.
subset="(test_small_call_of_every_kernel or test_tables_are_the_references and 231-65 or test_equals_reference_for_fine_experts and 4097 or test_equals_reference and (33 or 513) and float16) and not triton"

stage machine 60 "$python" -c 'import torch, triton
print(torch.__version__, torch.version.cuda, triton.__version__, torch.cuda.get_device_name(), torch.cuda.get_device_capability())'
stage build 120 bash -c 'cd "$1" && exec "$2" setup.py build --build-lib "$3"' build "$root" "$python" "$site"
# Correctness side by side; then, on a GPU that nothing else uses, the benchmarks.
stage tests 240 "${pytest[@]}" "$root/python_tests" --continue-on-collection-errors -n "$(($(nproc) * 3 / 4 + 1))" --durations=10 -v &
for tool in memcheck racecheck; do
    stage $tool 240 compute-sanitizer --tool $tool --error-exitcode 9 "${pytest[@]}" "$root/python_tests/gpu" -n 0 -k "$subset" &
done
wait
stage route 45 "$python" "$root/benchmarks/route.py" --device cuda --experts 128,1536,14336 --tokens 1,64 --json "$out/route.json"
for shape in llama-3-8b opt-6.7b qwen2.5-1.5b t5-large; do
    for width in 1 4 32; do
        stage "ffn-$shape-$width" 40 "$python" "$root/benchmarks/ffn.py" --device cuda --shapes "$shape" --expert-width $width --router-rank 128 --repeats 3 --json "$out/ffn-$shape-$width.json"
    done
done
stage decode 120 "$python" "$root/benchmarks/decode.py" --device cuda --model llama-3-8b --expert-width 1 --router-rank 128 --settings compiled-graph --active 0.25,1 --tokens 32 --repeats 3 --json "$out/decode.json"
echo
cat "$out/summary.txt"
! grep -qv 'exit 0 ' "$out/summary.txt"
