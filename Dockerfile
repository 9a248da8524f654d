# Trains on one GPU: docker build -t rlr-peft . && docker run --init --gpus all -v $PWD/outputs:/outputs \
#   -v ~/.cache/huggingface:/huggingface rlr-peft \
#   train --config sd14 --pretrained_model_name_or_path OWNER/NAME --output_dir /outputs/run
# Never built or run by the project's own checks; torch's wheel brings CUDA's libraries, the host only its driver.
FROM python:3.11-slim
ENV HF_HOME=/huggingface
WORKDIR /rlr-peft
# --torch_compile builds its kernels with a compiler.
RUN apt-get update && apt-get install --yes --no-install-recommends gcc libc6-dev && rm -rf /var/lib/apt/lists/*
COPY . .
RUN pip install --no-cache-dir --constraint constraints.txt ".[datasets,quantization,tensorboard]"
ENTRYPOINT ["rlr-peft"]
