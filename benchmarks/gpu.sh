#!/usr/bin/env bash
# Everything that needs a GPU, in one command: build for the GPU at hand, test on it, look for stray accesses and races,
# measure. Takes at most nine minutes and no network; ends with a table of what was done, and fails if a part failed.
#
#   benchmarks/gpu.sh                 on a machine with a GPU, nvcc, Python, torch, Triton and pybind11
#   benchmarks/gpu.sh --rehearse      the same script on any machine: CPU tensors, tiny sizes, the package as installed
#
#   OUT=FOLDER        where logs, results and summary.txt go (default: benchmarks/results/gpu)
#   WHEELS=FOLDER     wheels of other packages to compare with (POT, geomloss, ...); without them their rows are left out
#   PYTHON=COMMAND    the Python to use (default: python3)
#   SECONDS_IN_ALL=N  after which parts are cut off or left out (default: 530)
set -uo pipefail

usage() { sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p}' "$0"; }
rehearse=0
case "${1:-}" in
    "") ;;
    --rehearse) rehearse=1 ;;
    -h | --help) usage && exit 0 ;;
    *) usage >&2 && echo "expected --rehearse or nothing, got: $1" >&2 && exit 2 ;;
esac
cd "$(dirname "$0")/.." || exit 1

python=${PYTHON:-python3}
deadline=$((SECONDS + ${SECONDS_IN_ALL:-530}))
mkdir -p "${OUT:=benchmarks/results/gpu}" && out=$(cd "$OUT" && pwd) || exit 1
summary=$out/summary.txt
: >"$summary"
failures=0

note() { # NAME STATUS SECONDS REMARK
    printf '%-26s %-9s %5s  %s\n' "$1" "$2" "$3" "$4" >>"$summary"
    printf '== %s: %s (%s s) %s\n' "$1" "$2" "$3" "$4"
}

left_out() { # NAME REASON
    note "$1" "left out" 0 "$2"
}

part() { # NAME LIMIT COMMAND...: runs it within LIMIT seconds, or what is left; its output goes to NAME.log
    local name=$1 limit=$2 left=$((deadline - SECONDS)) begin=$SECONDS status=0 remark
    shift 2
    if ((left < 15)); then
        left_out "$name" "no time left"
        return 1
    fi
    ((limit = limit < left ? limit : left))
    echo "-- $name, at most $limit s"
    timeout --kill-after=5 "$limit" "$@" >"$out/$name.log" 2>&1 || status=$?
    remark=$(grep -v '^[[:space:]]*$' "$out/$name.log" | tail -n 1 | cut -c 1-110)
    case $status in
        0) note "$name" ok $((SECONDS - begin)) "$remark" ;;
        124 | 137) note "$name" "cut off" $((SECONDS - begin)) "after $limit s: $remark" ;;
        *)
            note "$name" FAILED $((SECONDS - begin)) "exit code $status: $remark"
            tail -n 25 "$out/$name.log"
            ;;
    esac
    ((failures += status != 0))
    return "$status"
}

if ((rehearse)); then
    device=cpu
    export SEER_GPU_TESTS_ON=cpu
else
    device=cuda
    export SEER_KERNELS_CUDA=1
fi
export PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 COLUMNS=140 TOKENIZERS_PARALLELISM=false

if [[ -n ${WHEELS:-} ]]; then
    part wheels 60 "$python" -m pip install --quiet --no-index --no-deps --no-compile --target "$out/site" "$WHEELS"/*.whl
    export PYTHONPATH=$out/site${PYTHONPATH:+:$PYTHONPATH}
fi

part machine 60 "$python" benchmarks/machine.py --device "$device"

if ((rehearse)); then
    left_out build "a rehearsal takes the package as it is installed"
else
    SEER_KERNELS_ARCHS=$("$python" -c 'import torch; print("%d%d" % torch.cuda.get_device_capability())')
    export SEER_KERNELS_ARCHS PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
    part build 200 "$python" setup.py --quiet build_ext --inplace || exit 1
fi

# Tests: many small kernels are compiled for them, on all cores if there is pytest-xdist.
# From the folder of the tests, so that Python does not find the package's sources where it is installed.
pytest=(env -C tests/kernels "$python" -m pytest --quiet -p no:cacheprovider --color=no --tb=short)
spread=()
"$python" -c 'import xdist' 2>/dev/null && ((!rehearse)) && spread=(-n 8)
if ((rehearse)); then
    part tests 40 "${pytest[@]}" -k "native and sup_con and small or two_processes" test_gpu.py
else
    part tests 150 "${pytest[@]}" "${spread[@]}" test_cuda.py test_gpu.py
fi

# Every launch is watched: few and small cases. Without the caching allocator a tensor ends where its memory ends.
watched='native and error_is_bounded and small and float32 or triton and nt_xent and small and float32'
for tool in memcheck racecheck; do
    if ((rehearse)); then
        left_out "$tool" "no CUDA kernels in a rehearsal"
    elif ! command -v compute-sanitizer >/dev/null; then
        left_out "$tool" "compute-sanitizer is not installed"
    else
        PYTORCH_NO_CUDA_MEMORY_CACHING=1 part "$tool" 60 compute-sanitizer --tool "$tool" --error-exitcode 9 \
            --target-processes all "${pytest[@]}" -k "$watched" test_gpu.py
    fi
done

bench() { # NAME LIMIT SCRIPT ARGUMENTS...
    local name=$1 limit=$2 script=$3
    shift 3
    part "$name" "$limit" "$python" "benchmarks/$script" --quick --device "$device" --out "$out" "$@"
}

# Few sizes of each regime, as they are on GPUs; in a rehearsal tiny ones, and only what is ours.
if ((rehearse)); then
    bench bench_loss 60 bench_loss.py --sizes 64x1024 --providers native floor
    bench bench_sinkhorn 60 bench_sinkhorn.py --sizes equal:16x64x64 --providers native floor
    bench bench_memory 60 bench_memory.py --sizes info_nce:16 --providers native
    bench bench_training 60 bench_training.py --sizes 1x2 --model demo --data seer/demo/concepts.csv --providers seer
    left_out bench_loss-bfloat16 "as bench_loss in a rehearsal"
    left_out bench_self "as bench_loss in a rehearsal"
    left_out bench_explaining "compiles nothing and has no kernels"
    left_out bench_scaling "as bench_loss in a rehearsal"
else
    bench bench_loss 70 bench_loss.py --sizes 3x32x4096 256x4096 4096x1024 8192x256 clip:4096x1024
    bench bench_loss-bfloat16 70 bench_loss.py --dtype bfloat16 \
        --sizes 3x32x4096 4096x4096 16384x1024 16384x256 siglip:8192x1024
    bench bench_self-bfloat16 50 bench_self.py --dtype bfloat16 --sizes sup_con:512x4096 sup_con:8192x1024 nt_xent:8192x256
    bench bench_sinkhorn 60 bench_sinkhorn.py \
        --sizes equal:64x100x256 equal:1024x16x64 equal:8x512x64 mixed:64x100x32 squared:1x2048x64
    bench bench_training 60 bench_training.py --sizes 1x8 3x8:full
    bench bench_explaining 40 bench_explaining.py --sizes 1x100
    bench bench_memory 40 bench_memory.py --sizes info_nce:{8192,16384} clip:{8192,16384} sup_con:{8192,16384}
    bench bench_self 50 bench_self.py --sizes sup_con:512x4096 sup_con:8192x1024 nt_xent:8192x256
    bench bench_scaling 30 bench_scaling.py --sizes rows:{2048,8192,32768} features:{256,1024,4096} problems:{1,16,256}
fi

total=$(printf '%-26s %-9s %5s\n' "in all" "" "$SECONDS")
{
    printf '%s\n' "$total"
    ((!failures)) || printf '%s failed: see NAME.log beside this file\n' "$failures"
} >>"$summary"
printf '\n'
cat "$summary"
((failures == 0))
