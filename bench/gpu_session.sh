#!/usr/bin/env bash
# Every check and every row that wants a GPU, in one command, most important first: made for 12 minutes on one H200.
#
#   bench/gpu_session.sh                        write logs and rows into bench/results
#   OUT=folder bench/gpu_session.sh             write them into a folder
#   bench/gpu_session.sh --seconds 540          take less time: what does not fit at the end is left out, and named
#   bench/gpu_session.sh --resume               run what the last call left out or cut short, into the same folder
#   bench/gpu_session.sh --archive rows.tgz     also pack everything into one file, renewed after every step
#   bench/gpu_session.sh --dry-run              print the commands, on any machine
#
# Each step has a time limit, and one that fails or takes too long stops no other. While the tests run, none of which
# measures time, what is measured later runs once, so that its kernels are already in Triton's cache when time counts.
# PYTHON picks the interpreter. At the end come each step's exit status and seconds, and the tests that failed. The exit
# status is 1 where a step failed, took too long or was left out, 2 where there is no GPU or an option is wrong. The
# script ends at most 20 seconds after its time.
set -uo pipefail

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
PYTHON=${PYTHON:-python3}
SECONDS_IN_ALL=720
DRY=
RESUME=
ARCHIVE=
refuse() { echo "gpu_session.sh: $1" >&2; exit 2; }
absolute() { case $1 in /*) echo "$1" ;; *) echo "$PWD/$1" ;; esac; }
while [ $# -gt 0 ]; do
    case $1 in
        --dry-run) DRY=1 ;;
        --resume) RESUME=1 ;;
        --seconds)
            SECONDS_IN_ALL=${2:-}
            [[ $SECONDS_IN_ALL =~ ^[1-9][0-9]*$ ]] || refuse "--seconds: give a whole number, got '$SECONDS_IN_ALL'"
            shift ;;
        --archive)
            [ -n "${2:-}" ] || refuse "--archive: give a file"
            ARCHIVE=$(absolute "$2")
            shift ;;
        -h | --help) sed -nE '2,/^$/{/^set /d; s/^# ?//; p}' "${BASH_SOURCE[0]}"; exit 0 ;;
        *) refuse "$1 is none of --dry-run, --resume, --seconds N, --archive FILE, --help" ;;
    esac
    shift
done

RESULTS=$(absolute "${OUT:-$ROOT/bench/results}")
cd "$ROOT" || exit 2
LOGS=$RESULTS/gpu_session
SUMMARY=$LOGS/summary.txt
export PYTHONPATH=$ROOT:$ROOT/kernels${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1 TOKENIZERS_PARALLELISM=false

# step NAME LIMIT COMMAND...: run it for at most LIMIT seconds or the time left; its output goes to NAME.log
step() {
    local name=$1 limit=$2 began=$SECONDS status late="too slow" left=$((SECONDS_IN_ALL - SECONDS))
    shift 2
    if [ -n "$DRY" ]; then
        echo "$name ($limit s): $*"
        return 0
    fi
    [[ -z $RESUME || $MISSING == *" $name "* || $name == build ]] || return 0
    if [ "$left" -lt 15 ]; then
        echo "left out  $name: no time" >> "$SUMMARY"
        return 1
    fi
    [ "$limit" -le "$left" ] || { limit=$left; late="cut short"; }
    # SIGINT lets pytest still report what failed; its workers have 10 s to end before it does.
    timeout -s INT -k 20 "$limit" "$@" > "$LOGS/$name.log" 2>&1
    status=$?
    case $status in
        0) set -- "ok" ;;
        124 | 137) set -- "$late" ;;
        *) set -- "failed" ;;
    esac
    printf '%-9s %s: exit status %d after %d s\n' "$1" "$name" "$status" $((SECONDS - began)) | tee -a "$SUMMARY"
    archive
    return "$status"
}

# Several steps may end at once: each writes a file of its own, and the last one moved into place stays.
archive() {
    [ -n "$ARCHIVE" ] || return 0
    tar -czf "$ARCHIVE.$BASHPID" --exclude="./${ARCHIVE##*/}*" --warning=no-file-changed -C "$RESULTS" .
    [ $? -gt 1 ] || mv "$ARCHIVE.$BASHPID" "$ARCHIVE"  # 1: a log grew meanwhile
}

has() { "$PYTHON" -c "import importlib.util, sys; sys.exit(importlib.util.find_spec('$1') is None)" 2> /dev/null; }

if [ -z "$DRY" ]; then
    # One interpreter for both: importing torch is slow the first time on a fresh machine.
    if ! MACHINE=$("$PYTHON" -c "import sys, torch, triton
torch.cuda.is_available() or sys.exit(1)
print(torch.cuda.get_device_name(), 'Python', sys.version.split()[0], 'torch', torch.__version__, 'triton', triton.__version__)"); then
        refuse "$PYTHON has no torch and Triton, or torch finds no CUDA device here; --dry-run lists the commands"
    fi
    if [ -n "$RESUME" ] && [ ! -f "$SUMMARY" ]; then
        refuse "--resume goes on with $SUMMARY, which is not there"
    fi
    mkdir -p "$LOGS"
    if [ -n "$RESUME" ]; then
        MISSING=" $(sed -nE 's/^(cut short|left out) +([^:]+):.*/\2/p' "$SUMMARY" | tr '\n' ' ')"
        grep -vE "^(cut short|left out) " "$SUMMARY" > "$SUMMARY.kept"
        mv "$SUMMARY.kept" "$SUMMARY"
    else
        : > "$SUMMARY"
    fi
    echo "$MACHINE" | tee -a "$SUMMARY"
    git -C "$ROOT" rev-parse --short=12 HEAD 2> /dev/null | tee -a "$SUMMARY"
    has searchr1_fast._C || step build 120 "$PYTHON" setup.py -q build_ext --inplace
fi

TESTS=(env OMP_NUM_THREADS=1 "$PYTHON" -m pytest -q -rfE --tb=short -p no:cacheprovider --continue-on-collection-errors)
# The project's own options name a plugin that a GPU machine may not have.
has pytest_timeout || TESTS+=(-o "addopts=--import-mode=importlib --strict-markers")

# Checks. The kernels' own cases are passed as files: test_compiled would run them one after the other.
if has xdist; then
    step test_cases 220 "${TESTS[@]}" -n $(($(nproc) / 2)) tests/kernels/*_interpreted.py &
    step test_gpu 220 "${TESTS[@]}" -n $(($(nproc) / 2)) -m gpu -k "not test_compiled" tests &
else
    for file in tests/kernels/*_interpreted.py; do
        step "test_cases_$(basename "$file" _interpreted.py)" 220 "${TESTS[@]}" "$file" &
    done
    for file in $(grep -rl --include="test_*.py" "mark.gpu" tests | sort); do
        step "test_gpu_$(tr / _ <<< "${file#tests/}")" 220 "${TESTS[@]}" -m gpu -k "not test_compiled" "$file" &
    done
fi
# Only to compile kernels, not to measure. 174,763 rows are the fewest that are worth finding the fastest way for.
step warm_search 150 "$PYTHON" bench/search_parts.py --rows 180000 --batches 1,512 --repetitions 1 &
step warm_decode 100 "$PYTHON" bench/decode.py --rows 256,1 --steps 10 --engines graphs,modules &
wait

row() { # NAME LIMIT FILE SCRIPT ARGUMENTS...: a step that leaves rows
    local name=$1 limit=$2 file=$3 script=$4
    shift 4
    step "$name" "$limit" "$PYTHON" "bench/$script.py" "$@" --output "$RESULTS/$file.jsonl"
}

# Find accesses out of bounds, and races in shared memory. Without torch's caching allocator the memory past a tensor's
# end belongs to nobody.
sanitized() { # TOOL LIMIT CASES...
    local tool=$1 limit=$2
    shift 2
    set -- "${@/#/tests/kernels/}"
    step "$tool" "$limit" env OMP_NUM_THREADS=1 PYTORCH_NO_CUDA_MEMORY_CACHING=1 \
        compute-sanitizer --tool "$tool" --error-exitcode 9 "${TESTS[@]:2}" "${@/%/_interpreted.py}"
}

row search_parts 90 search_parts search_parts --batches 1,32,128,256 --repetitions 10
row ways 80 kernels kernels head_ways gae_ways --repetitions 5
row topk 80 kernels kernels topk --repetitions 3
row decode 60 decode decode --rows 256,64,1 --steps 20 --engines graphs,waiting,modules --parts
row replayed_step 120 replayed_step replayed_step --model qwen2.5-3b --workload A --scale 0.125
row retrieval 100 retrieval_gpu retrieval_gpu --batches 1,32,128,256 --repetitions 5
row generation 60 kernels kernels cached generation sample --repetitions 3
row adapter 45 decode decode --rows 256,1 --steps 20 --engines graphs,base --lora-rank 32
row offload 60 workload workload --model qwen2.5-3b --checkpointing selective --phases update --offload optimizer replica --repetitions 1
if [ -n "$DRY" ] || command -v compute-sanitizer > /dev/null; then
    sanitized memcheck 120 gae generation cached_attention
    sanitized racecheck 120 gae generation cached_attention
fi
row saving 60 saving saving --model qwen2.5-0.5b --repetitions 2

[ -n "$DRY" ] && exit 0
echo "== after $SECONDS s, logs in $LOGS"
grep -ahE "^(FAILED|ERROR) " "$LOGS"/test_*.log | cut -c1-200 > "$LOGS/failed_tests.txt"
head -n 40 "$LOGS/failed_tests.txt"
echo "$(wc -l < "$LOGS/failed_tests.txt") tests failed"
cat "$SUMMARY"
archive
! grep -qE "^(failed|too slow|cut short|left out)" "$SUMMARY"
