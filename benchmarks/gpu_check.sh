#!/usr/bin/env bash
# Builds PrunePath against this machine's torch, runs the GPU tests and compute-sanitizer, and leaves every log in
# OUTDIR. A stage that fails does not stop the later ones; the last lines say which passed, and the exit code is 1 if
# any failed.
#
#     benchmarks/gpu_check.sh OUTDIR          PYTHON=python3 by default; needs nvcc, cmake, ninja, pybind11
set -u
[ $# -eq 1 ] || { echo "usage: $0 OUTDIR" >&2; exit 2; }
mkdir -p "$1" || exit 2
out=$(cd "$1" && pwd)
root=$(cd "$(dirname "$0")/.." && pwd)
python=${PYTHON:-python3}
site=$(mktemp -d)
trap 'rm -rf "$site"' EXIT
: >"$out/summary.txt"
failed=0

stage() {  # NAME SECONDS COMMAND...: runs the command with its output in OUTDIR/NAME.log
    local name=$1 limit=$2 start=$SECONDS status=0
    shift 2
    timeout "$limit" "$@" >"$out/$name.log" 2>&1 || status=$?
    [ $status -eq 0 ] || failed=1
    printf '%-10s exit %-3s %4ss  %s\n' "$name" $status $((SECONDS - start)) "$(grep -v '^ *$' "$out/$name.log" | tail -n 1)" |
        tee -a "$out/summary.txt"
}

# From here on the installed package is what is imported, never the source folder.
cd "$site" || exit 2
export PYTHONPATH=$site PRUNEPATH_CUDA=1 PYTHONUNBUFFERED=1 CMAKE_ARGS="${CMAKE_ARGS:-} -DPRUNEPATH_PTXAS_VERBOSE=ON"
tests=(-c "$root/pyproject.toml" --rootdir "$root" -p no:cacheprovider -m gpu --continue-on-collection-errors)

stage machine 60 "$python" -c 'import torch, triton
print(torch.__version__, torch.version.cuda, triton.__version__, torch.cuda.get_device_name(), torch.cuda.get_device_capability())'
stage build 300 bash -c 'cd "$1" && exec "$2" setup.py build --build-lib "$3"' build "$root" "$python" "$site"
stage tests 240 "$python" -m pytest "${tests[@]}" "$root/python_tests" -n 4 --durations=10
stage memcheck 150 compute-sanitizer --tool memcheck --error-exitcode 9 "$python" -m pytest "${tests[@]}" "$root/python_tests/gpu" -n 0 \
    -k "(test_any_strides or test_out_overloads or any_number_of_experts and 4097 or move_the_bits and (7-33-65 or 3-5-7)) and not triton"
echo
cat "$out/summary.txt"
exit $failed
