#!/usr/bin/env bash
# All that is measured on one GPU, without network:
#
#     bash benchmarks/on_gpu.sh              # all parts
#     bash benchmarks/on_gpu.sh demo         # some of them: sizes updates demo runs tests
#
# Results land in benchmarks/results/: real_size.json, real_run.json, demo_gpu.json. Parts that have run on the same
# machine are not measured again, so a call that was cut off is simply repeated. On an H200, `sizes` took four minutes for
# its first five cases and `demo` three; processes take most of that to start.
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
scratch=${SCRATCH:-$(mktemp -d)}

part() {
	local name=$1 limit=$2
	shift 2
	echo "***** $name"
	local started=$SECONDS
	timeout "$limit" "$@" 2>&1 | tee "$scratch/$name.log" | tail -n "${LINES_SHOWN:-60}"
	echo "***** $name: exit code ${PIPESTATUS[0]}, $((SECONDS - started)) s"
}

demo() {
	"$python" -m accelerate.commands.launch --config_file configs/accelerate/one_process.yaml \
		train_rlr_lora.py --config configs/tiny_shapes.yaml --output_dir "$scratch/demo" ${DEMO_ARGS:-} &&
		"$python" -m benchmarks.demo --output_dir "$scratch/demo" --name demo_gpu
}

for name in ${*:-sizes updates demo runs tests}; do
	case $name in
	sizes) part sizes 270 "$python" -m benchmarks.real_size ${SIZES_ARGS:-} ;;
	updates) part updates 200 "$python" -m benchmarks.real_run --part updates --folder "$scratch/real" ${RUN_ARGS:-} ;;
	demo) export -f demo && export python scratch && part demo 240 bash -c demo ;;
	runs)
		part runs 300 "$python" -m benchmarks.real_run --part run --folder "$scratch/real" \
			${RUN_ARGS:---case tiny --case stable-diffusion-1.5-512}
		;;
	tests)
		part tests 200 "$python" -m pytest -q -p no:cacheprovider -k "(gpu or cuda) and not percent" tests/training tests/plan/test_real_size.py
		;;
	*) echo "expected one of sizes updates demo runs tests, got $name" >&2 && exit 2 ;;
	esac
done
