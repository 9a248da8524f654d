#!/usr/bin/env bash
# All that is measured on one GPU, without network, in calls of nine minutes at the most:
#
#     bash benchmarks/on_gpu.sh              # all parts; again until it says that all parts are done
#     bash benchmarks/on_gpu.sh demo         # some of them, in this order: sizes updates parts demo runs tests sharded
#
# Results land in benchmarks/results/: real_size.json, real_run.json, gpu_parts.json, demo_gpu.json. What has run on the
# same machine is not measured again, case by case and method by method, and a part that has ended is not started again
# (outputs/on_gpu/PART.done; remove it to). So a call that was cut off is simply repeated. On an H200, `sizes` took four
# minutes for its first five cases and `demo` three; processes take most of that to start. `sharded` wants two GPUs.
#
# Then `python -m benchmarks.planned_updates`, on any machine, puts the plan beside the measured updates.
#
# Rehearsed without a GPU, at toy sizes:
#
#     SIZES_ARGS=--tiny RUN_ARGS="--case tiny" PARTS_ARGS=--tiny DEMO_ARGS="--max_train_steps 1" bash benchmarks/on_gpu.sh
#
# Needs the run-time dependencies of pyproject.toml and, for the part `tests`, pytest. PYTHON names another interpreter.
# A machine with Python 3.12, torch 2.11 for CUDA 13 and the usual scientific packages lacked these, as wheels for cp312:
# accelerate 1.15.0, bitsandbytes 0.50.2, datasets 5.2.0, diffusers 0.42.1, dill 0.4.1, hf-xet 1.8.0, httpcore2 2.16.2,
# httpx2 2.16.2, huggingface_hub 2.4.0, importlib_metadata 10.2.0, multiprocess 0.70.19, peft 0.21.2, tokenizers 0.23.3,
# transformers 5.23.0, truststore 0.10.5, xxhash 4.1.0, zipp 4.1.2. Other busy processes slow the start of each part.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false MPLBACKEND=Agg
python=${PYTHON:-python3}
scratch=${SCRATCH:-outputs/on_gpu}
seconds=${SECONDS_AT_MOST:-530}
mkdir -p "$scratch"

part() {
	local name=$1 left=$((seconds - SECONDS))
	shift
	[ -e "$scratch/$name.done" ] && echo "***** $name: done before" && return
	[ "$left" -lt 5 ] && echo "***** $name: no time left, call again" && return
	echo "***** $name"
	local started=$SECONDS
	timeout "$left" "$@" 2>&1 | tee "$scratch/$name.log" | tail -n "${LINES_SHOWN:-60}"
	local code=${PIPESTATUS[0]}
	[ "$code" -eq 0 ] && touch "$scratch/$name.done"
	echo "***** $name: exit code $code, $((SECONDS - started)) s"
}

demo() {
	"$python" -m accelerate.commands.launch --config_file configs/accelerate/one_process.yaml \
		train_rlr_lora.py --config configs/tiny_shapes.yaml --output_dir "$scratch/demo" ${DEMO_ARGS:-} &&
		"$python" -m benchmarks.demo --output_dir "$scratch/demo" --name demo_gpu
}

real_run() {
	part "$1" "$python" -m benchmarks.real_run --part "$2" --folder "$scratch/real" "${@:3}"
}

for name in ${*:-sizes updates parts demo runs tests sharded}; do
	case $name in
	sizes) part sizes "$python" -m benchmarks.real_size ${SIZES_ARGS:-} ;;
	updates) real_run updates updates ${RUN_ARGS:-} ;;
	parts) part parts "$python" -m benchmarks.gpu_parts --folder "$scratch/real" ${PARTS_ARGS:-} ;;
	demo) export -f demo && export python scratch && part demo bash -c demo ;;
	runs) real_run runs run ${RUN_ARGS:---case tiny --case stable-diffusion-1.5-512} ;;
	tests)
		part tests "$python" -m pytest -q -p no:cacheprovider -k "(gpu or cuda) and not percent" tests/training tests/plan/test_real_size.py
		;;
	sharded) real_run sharded sharded ${RUN_ARGS:---case tiny --case stable-diffusion-1.5-512} ;;
	*) echo "expected one of sizes updates parts demo runs tests sharded, got $name" >&2 && exit 2 ;;
	esac
done
missing=$(for name in sizes updates parts demo runs tests sharded; do [ -e "$scratch/$name.done" ] || echo "$name"; done)
[ -z "$missing" ] && echo "***** all parts are done" || echo "***** still to run:" $missing
