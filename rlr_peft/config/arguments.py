"""Every knob: its name, default, unit and one plain sentence.

A field's name is its flag (`--rank 4`) and its YAML name (`rank: 4`); names are unique over all groups, so both stay
flat. A group's docstring is its title in `--help`. Ranges are declared here, combinations in `checks.py` and
`estimator_checks.py`.
"""

from dataclasses import MISSING, dataclass
from typing import Literal

from rlr_peft.config.knob import knob

EstimatorName = Literal["rlr", "rlr-paper", "full-bp", "truncated-bp", "reinforce", "ddpo", "grpo", "d3po", "refl"]
StepKind = Literal["ancestral", "flow-sde", "cps", "ode"]
TimestepSpacing = Literal["leading", "trailing", "linspace"]
# `piecewise_constant` is left out: diffusers' get_scheduler wants a rule string for it, which has no flag here.
LrScheduler = Literal["linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup"]


@dataclass(frozen=True)
class ModelArguments:
    """Model: the pretrained pipeline and how it is held in memory"""

    pretrained_model_name_or_path: str = knob(
        MISSING, "Hub id or local folder of a diffusers pipeline, or `tiny-shapes` for the embedded one."
    )
    revision: str | None = knob(None, "Branch, tag or commit of the Hub repository to load.")
    variant: str | None = knob(None, "Variant of the weight files to load, for example `fp16`.")
    cache_dir: str | None = knob(None, "Folder in which files downloaded from the Hub are kept.")
    pretrained_vae_model_name_or_path: str | None = knob(
        None, "Hub id or local folder of a VAE that replaces the pipeline's own, for example an fp16-safe SDXL VAE."
    )
    pretrained_motion_adapter_name_or_path: str | None = knob(
        None,
        "Hub id or local folder of a motion adapter; it makes an AnimateDiff pipeline of a Stable Diffusion base.",
    )
    mixed_precision: Literal["no", "fp16", "bf16"] = knob(
        "no", "Number format of the frozen base weights; LoRA weights and latents always stay fp32."
    )
    gradient_checkpointing: bool = knob(
        False, "Recompute the denoiser's activations in the backward pass: less memory, more time."
    )
    offload_text_encoders: bool = knob(
        False, "Keep the text encoders on the CPU but while new prompts are encoded: less memory, a pause per prompt."
    )
    vae_gradient_checkpointing: bool = knob(
        False, "Recompute the VAE decoder's activations in the backward pass: less memory, more time."
    )
    pretrained_tiny_vae_name_or_path: str | None = knob(
        None,
        "Hub id or local folder of an AutoencoderTiny that decodes for the training reward only, with far less memory; "
        "a biased objective, since validation and evaluation still use the real VAE.",
    )
    offload: bool = knob(
        False,
        "Keep text encoders, denoiser and VAE in host memory and only the one at work on the GPU: less memory, time "
        "for moving weights.",
    )
    bnb_quantization_config_path: str | None = knob(
        None,
        "JSON file of the arguments of BitsAndBytesConfig: the frozen denoiser is held in 4 or 8 bits. Needs a GPU.",
    )
    attention_backend: str | None = knob(
        None, "Attention kernel of the denoiser by diffusers' names, for example `flash`; null leaves it to torch."
    )
    torch_compile: bool = knob(
        False, "Compile the denoiser's repeated blocks with torch.compile: slow to start, then faster."
    )
    allow_tf32: bool = knob(False, "Allow TF32 matrix products on Ampere and newer GPUs: faster, a little less exact.")


@dataclass(frozen=True)
class LoraArguments:
    """LoRA: the adapter that is trained"""

    rank: int = knob(4, "Rank of the LoRA matrices.", unit="dimensions", at_least=1)
    lora_alpha: float | None = knob(
        None, "LoRA scale: the update is multiplied by lora_alpha / rank; null means equal to rank.", above=0
    )
    lora_dropout: float = knob(
        0.0, "Share of the adapter's inputs dropped in training.", unit="fraction", at_least=0, below=1
    )
    lora_layers: str | None = knob(
        None, "Comma-separated names of the modules that get an adapter; null means the family's default."
    )
    denoiser: str | None = knob(
        None,
        "Comma-separated attributes of the pipeline that get an adapter; null means the family's (of Wan 2.2 both: "
        "`transformer` for high noise, `transformer_2` for low).",
    )
    use_dora: bool = knob(False, "Train DoRA: magnitude and direction of the weights apart.")
    use_rslora: bool = knob(False, "Scale the update by lora_alpha / sqrt(rank) instead of lora_alpha / rank.")
    output_kohya_format: bool = knob(
        False, "Save the adapter in kohya's format too, as kohya/lora_kohya.safetensors (Stable Diffusion and SDXL)."
    )
    init_lora_weights: Literal["gaussian", "kaiming", "orthogonal"] = knob(
        "gaussian", "How the LoRA matrices start; every choice starts at the base model's function."
    )


@dataclass(frozen=True)
class ChainArguments:
    """Chain: how images are sampled while training"""

    num_inference_steps: int = knob(50, "Number T of denoising steps of a chain.", unit="steps", at_least=1)
    step_kind: StepKind = knob("ancestral", "Kind of denoising step; `ode` adds no noise at all.")
    eta: float = knob(
        1.0,
        "Noise added at each step relative to the kind's own: 0 is deterministic, 1 the full noise.",
        unit="factor",
        at_least=0,
    )
    timestep_spacing: TimestepSpacing | None = knob(
        None, "Where the steps lie; null means the family's choice. `trailing` keeps the last step from being dead."
    )
    scheduler_type: Literal["diffusion", "flow"] | None = knob(
        None, "Kind of noising path the model was trained on; null reads it off the pipeline's scheduler."
    )
    guidance_scale: float | None = knob(
        None, "Classifier-free guidance scale; null means the pipeline's own default.", unit="factor", at_least=0
    )
    true_cfg_scale: float | None = knob(
        None,
        "Classifier-free guidance of pipelines whose guidance_scale is built into the model, such as FLUX.",
        unit="factor",
        at_least=0,
    )
    resolution: int | None = knob(
        None, "Height and width of the images; null means the pipeline's default.", unit="pixels", at_least=1
    )
    height: int | None = knob(
        None, "Height of images or videos, over resolution; null means resolution.", unit="pixels", at_least=1
    )
    width: int | None = knob(
        None, "Width of images or videos, over resolution; null means resolution.", unit="pixels", at_least=1
    )
    num_frames: int | None = knob(
        None, "Frames of a video; null means the pipeline's default.", unit="frames", at_least=1
    )
    fps: int | None = knob(
        None,
        "Speed of the videos, told to models that ask for it; null means the pipeline's default, or 8.",
        unit="frames per second",
        at_least=1,
    )
    max_sequence_length: int | None = knob(
        None, "Longest prompt that the text encoder sees; null means the pipeline's default.", unit="tokens", at_least=1
    )
    negative_prompt: str | None = knob(None, "Text that guidance leads away from, used for every prompt.")


@dataclass(frozen=True)
class PromptArguments:
    """Prompts: what is drawn while training"""

    prompt_path: str | None = knob(
        None,
        "Training prompts: a `.txt` file with one a line, a `.jsonl`, `.csv` or `.parquet` file, or a built-in set: "
        "`simple-animals` (also `/train` and `/test`), `tiny-shapes/train` or `tiny-shapes/test`.",
    )
    dataset_name: str | None = knob(
        None, "Training prompts from a dataset in place of prompt_path: Hub id or local folder."
    )
    dataset_config_name: str | None = knob(None, "Configuration of the dataset, where it has several.")
    dataset_split: str = knob("train", "Split of the dataset that holds the training prompts.")
    streaming: bool = knob(False, "Read the dataset as it comes instead of preparing all of it first.")
    shuffle_buffer_size: int = knob(
        1000,
        "Prompts of a streamed dataset that are shuffled among each other, window by window.",
        unit="prompts",
        at_least=1,
    )
    caption_column: str = knob("text", "Column of the prompts in a dataset or a .jsonl, .csv or .parquet file.")
    negative_prompt_column: str | None = knob(
        None, "Column of the prompts' own negative prompts, in place of negative_prompt."
    )
    metadata_columns: tuple[str, ...] | None = knob(
        None, "Columns that rewards get as the `metadata` of a prompt; null means none."
    )
    max_train_samples: int | None = knob(
        None, "Use only the first so many training prompts; null means all.", unit="prompts", at_least=1
    )
    validation_split_percentage: float | None = knob(
        None,
        "Share of the prompts that is never trained on, but used to compare base and adapter; null means none.",
        unit="percent",
        above=0,
        below=100,
    )


@dataclass(frozen=True)
class ChainOfThoughtArguments:
    """Diffusive Chain-of-Thought: a prompt for every stage of the chain (off unless a source of them is given)"""

    dcot_columns: tuple[str, ...] | None = knob(
        None, "Columns of the stage prompts in the prompt data, noise first, for example `coarse mid fine`."
    )
    dcot_rules: bool = knob(False, "Split prompts into coarse, mid and fine by built-in rules.")
    dcot_model: str | None = knob(
        None, "Split prompts with a text-generation model of transformers: Hub id or local folder."
    )
    dcot_endpoint: str | None = knob(
        None,
        "Split prompts with a model behind an OpenAI-compatible URL, `http://localhost:8000/v1`; the key is read from "
        "the environment variable OPENAI_API_KEY.",
    )
    dcot_endpoint_model: str | None = knob(None, "Name of the model behind dcot_endpoint.")
    dcot_cache: str | None = knob(
        None,
        "JSONL file of stage prompts, to read and edit; null means `stage_prompts.jsonl` in output_dir.",
    )
    dcot_stages: tuple[str, ...] | None = knob(
        None, "Names of the stages, noise first; null means those of dcot_columns, else coarse, mid and fine."
    )
    dcot_fractions: tuple[float, ...] | None = knob(
        None, "Share of the steps of every stage, noise first, with sum 1; null means equal parts.", unit="fraction"
    )


@dataclass(frozen=True)
class RewardArguments:
    """Reward: what the adapter is trained to raise"""

    reward_fn: dict[str, float] | str = knob(
        MISSING,
        "Reward: a registered name, `package.module:callable`, `file.py:callable` or http(s) URL; or several and their "
        "weights, `{NAME: WEIGHT, ...}`.",
    )
    heldout_reward_fn: tuple[str, ...] | None = knob(
        None,
        "One or more rewards that are only ever measured, never trained on: they expose reward hacking. Early stopping "
        "watches the first.",
    )
    reward_scaling: Literal["running", "first", "none"] = knob(
        "running",
        "What each of several rewards is divided by: its standard deviation over past updates, that of images of the "
        "base, or nothing.",
    )
    reward_minimum: dict[str, float] | None = knob(
        None, "Hard minimums of rewards of reward_fn, `{NAME: MINIMUM, ...}`, in the rewards' own units."
    )
    reward_minimum_penalty: float = knob(
        10.0,
        "What a reward below its minimum costs for every standard deviation that it lacks.",
        unit="standard deviations of reward",
        above=0,
    )
    reward_dtype: Literal["fp32", "fp16", "bf16"] = knob(
        "fp32", "Number format of the weights of built-in reward models."
    )
    offload_rewards: bool = knob(
        False, "Keep built-in reward models in CPU memory between uses: less GPU memory, more time."
    )
    reward_model_path: dict[str, str] | None = knob(
        None,
        "Local copies of reward models, `{REPOSITORY: PATH, ...}`: a folder or file that stands for a Hub repository.",
    )
    reward_server_timeout: float = knob(
        120.0, "How long to wait for the answer of a reward server before asking again.", unit="seconds", above=0
    )
    reward_server_retries: int = knob(
        5, "Further tries when a reward server does not answer, or answers 429 or 5xx.", unit="tries", at_least=0
    )
    reward_server_batch_size: int = knob(16, "Images sent to a reward server at once.", unit="images", at_least=1)
    decode_batch_size: int | None = knob(
        None,
        "Images decoded and scored on the tape at once; null means train_batch_size.",
        unit="images",
        at_least=1,
    )
    decoded_frames: int | None = knob(
        None,
        "Train on the first so many frames of a video alone, for the decoder's memory; null decodes all.",
        unit="frames",
        at_least=1,
    )


@dataclass(frozen=True)
class EstimatorArguments:
    """Estimator: how the gradient of the reward is estimated (null leaves a knob to the preset)"""

    estimator: EstimatorName = knob("rlr", "Method; the knobs below override its parts.")
    fo_steps: int | Literal["auto", "random"] | None = knob(
        None,
        "Number K of last steps covered by the first-order term; `auto` measures the best K, `random` (truncated-bp) "
        "draws it for every micro-batch. With refl the step is drawn from the last K.",
        unit="steps",
        at_least=0,
    )
    step_choice: Literal["crossing", "inverse-variance"] = knob(
        "crossing",
        "What `fo_steps: auto` measures: one K, or a weight for every step that mixes first and half order.",
    )
    ho_length: int | Literal["auto"] | None = knob(
        None,
        "Length h of a half-order block; `auto` derives it from nfe_budget and memory_budget.",
        unit="steps",
        at_least=1,
    )
    ho_blocks: int | Literal["all"] | None = knob(
        None,
        "Half-order blocks (with ddpo, grpo and d3po: trained steps) drawn for each micro-batch, weighted to stay "
        "unbiased; `all` takes every remaining step, 0 leaves the half order out.",
        unit="blocks",
        at_least=0,
    )
    ho_start: Literal["uniform", "gradient-norm", "window"] | None = knob(
        None, "How the start of a half-order block is drawn: evenly, by running gradient norms, or from ho_window."
    )
    ho_window: tuple[int | str, ...] | None = knob(
        None,
        "From where `ho_start: window` draws: first and last step `a b`, counted from 1 (clean) to T (noise); a stage "
        "of the Chain-of-Thought by name; or `auto` for the stage with the largest measured gradient energy.",
        unit="steps",
    )
    zo: Literal["none", "one-point", "two-point"] | None = knob(
        None, "Zeroth-order term on the steps that no other term covers."
    )
    zo_scale: float = knob(
        0.01, "Standard deviation s of the zeroth-order parameter perturbation.", unit="LoRA weight units", above=0
    )
    zo_samples: int = knob(1, "Parameter perturbations drawn for each update.", unit="perturbations", at_least=1)
    black_box_steps: int | None = knob(
        None,
        "Number of last steps covered by reward differences where the reward has no gradient; 0 is off, null (with "
        "rlr) as many as about double the cost.",
        unit="steps",
        at_least=0,
    )
    state_baseline: bool = knob(
        False, "Take the reward of the predicted image off the score terms' advantages: one reward call per step used."
    )
    antithetic: bool = knob(
        False, "Sample in neighbouring pairs with mirrored noises (groups of 4 or more, an even number)."
    )
    fo_coefficient: float = knob(
        1.0, "Factor of the first-order term; not 1 is biased by choice.", unit="factor", at_least=0
    )
    ho_coefficient: float = knob(
        1.0, "Factor of the score terms; not 1 is biased by choice.", unit="factor", at_least=0
    )
    zo_coefficient: float = knob(
        1.0, "Factor of the zeroth-order term; not 1 is biased by choice.", unit="factor", at_least=0
    )
    normalize_rewards: bool = knob(
        False, "Divide the whole gradient by the running standard deviation of the rewards: all terms alike."
    )
    inner_epochs: int | None = knob(
        None, "Optimiser steps of ddpo, grpo and d3po on the same samples.", unit="optimiser steps", at_least=1
    )
    clip_range: float = knob(
        0.2, "Density ratios of ddpo and grpo are clipped to 1 minus to 1 plus this.", unit="ratio of a step", above=0
    )
    advantage_clip: float = knob(
        5.0, "Advantages of ddpo and grpo are clipped to plus or minus this.", unit="standard deviations", above=0
    )
    per_prompt_stat_tracking_buffer_size: int = knob(
        32, "Latest rewards of a prompt from which ddpo takes mean and deviation.", unit="rewards", at_least=2
    )
    per_prompt_stat_tracking_min_count: int = knob(
        16,
        "Rewards that a prompt needs for statistics of its own; before, the batch's are used.",
        unit="rewards",
        at_least=2,
    )
    dpo_beta: float = knob(0.1, "Strength of d3po's pull towards the base model.", unit="1 / nat", above=0)
    calibration_interval: int = knob(
        25,
        "How often the per-step variances behind `fo_steps: auto` are measured again.",
        unit="optimiser steps",
        at_least=1,
    )
    calibration_samples: int = knob(
        16, "Images sampled for one measurement of the per-step variances.", unit="images", at_least=2
    )
    calibration_decay: float = knob(
        0.5,
        "Weight of the past in the running means of the per-step variances.",
        unit="fraction",
        at_least=0,
        below=1,
    )
    nfe_budget: float | None = knob(
        None,
        "Compute that `ho_length: auto` may spend.",
        unit="denoiser evaluations per sample and optimiser step",
        above=0,
    )
    memory_budget: float | None = knob(
        None,
        "Peak memory that `ho_length: auto` may use, by the paper's rule for a tape of h steps.",
        unit="GB",
        above=0,
    )
    ho_step_memory: float | None = knob(
        None, "Memory of one half-order step on the tape, for memory_budget.", unit="GB", above=0
    )
    zo_step_memory: float | None = knob(
        None, "Memory of one zeroth-order step, for memory_budget.", unit="GB", at_least=0
    )


@dataclass(frozen=True)
class RegularizationArguments:
    """Regularisation: staying near the base, and stopping in time"""

    kl_beta: float = knob(
        0.0, "Weight of the divergence from the base in the objective; 0 is off.", unit="reward per nat", at_least=0
    )
    kl_steps: int | Literal["all"] = knob(
        4, "Steps drawn for one estimate of the divergence, weighted to stay unbiased.", unit="steps", at_least=1
    )
    kl_interval: int | None = knob(
        None,
        "How often the divergence is measured where it is neither penalised nor limited; null means never.",
        unit="optimiser steps",
        at_least=1,
    )
    kl_limit: float | None = knob(
        None,
        "Training stops where the divergence from the base, averaged over ten updates, passes this.",
        unit="nats",
        above=0,
    )
    early_stopping_steps: int | None = knob(
        None,
        "Training stops, and goes back to its best weights, where the held-out reward of so many updates is "
        "significantly below the best so far; null means never.",
        unit="optimiser steps",
        at_least=5,
    )


@dataclass(frozen=True)
class TrainingArguments:
    """Training: batches, length and seed"""

    output_dir: str = knob("outputs/rlr-lora", "Folder that receives the adapter, checkpoints, logs and the card.")
    seed: int = knob(0, "Seed of every random number; the same seed gives the same run.", at_least=0)
    train_batch_size: int = knob(
        4, "Samples drawn and held on the tape at once on each process.", unit="samples", at_least=1
    )
    gradient_accumulation_steps: int = knob(
        1, "Micro-batches whose gradients are summed into one update.", unit="micro-batches", at_least=1
    )
    num_images_per_prompt: int = knob(
        4, "Size of a prompt's group, within which rewards are compared.", unit="images", at_least=1
    )
    num_train_epochs: int = knob(1, "Passes over the prompts; max_train_steps overrides it.", unit="epochs", at_least=1)
    max_train_steps: int | None = knob(
        None, "Number of updates; null means num_train_epochs decides.", unit="optimiser steps", at_least=1
    )
    max_grad_norm: float = knob(1.0, "Gradients with a larger norm are scaled down to it.", unit="norm", above=0)


@dataclass(frozen=True)
class OptimizerArguments:
    """Optimiser: how gradients become updates"""

    optimizer: Literal["AdamW"] = knob("AdamW", "Optimiser of the LoRA weights.")
    learning_rate: float = knob(1e-4, "Peak learning rate of the optimiser.", unit="weight units per step", above=0)
    scale_lr: bool = knob(
        False, "Multiply the learning rate by the number of samples of an update (batch, accumulation, processes)."
    )
    lr_scheduler: LrScheduler = knob("constant", "Course of the learning rate, by diffusers' names.")
    lr_warmup_steps: int = knob(
        0, "Updates over which the learning rate rises from 0.", unit="optimiser steps", at_least=0
    )
    lr_num_cycles: int = knob(1, "Hard restarts of the cosine_with_restarts schedule.", unit="cycles", at_least=1)
    lr_power: float = knob(1.0, "Power of the polynomial schedule.", unit="exponent", above=0)
    use_8bit_adam: bool = knob(False, "Keep the optimiser's state in 8 bits (bitsandbytes): less memory.")
    adam_beta1: float = knob(0.9, "Decay of Adam's mean of gradients.", unit="fraction", at_least=0, below=1)
    adam_beta2: float = knob(0.999, "Decay of Adam's mean of squared gradients.", unit="fraction", at_least=0, below=1)
    adam_weight_decay: float = knob(
        1e-4, "Decoupled weight decay of the LoRA weights.", unit="fraction per unit of learning rate", at_least=0
    )
    adam_epsilon: float = knob(1e-8, "Term that keeps Adam's division finite.", unit="gradient units", above=0)


@dataclass(frozen=True)
class ValidationArguments:
    """Validation: images while training, and the comparison of base and adapter"""

    validation_prompt: tuple[str, ...] | None = knob(
        None, "One or more prompts drawn at fixed seeds while training; null means none."
    )
    num_validation_images: int = knob(4, "Images for each validation prompt.", unit="images", at_least=1)
    validation_steps: int | None = knob(
        None, "How often validation images are drawn; null means only at the end.", unit="optimiser steps", at_least=1
    )
    evaluation_prompt_path: str | None = knob(
        None, "Unseen prompts on which base and adapter are compared; null means no comparison."
    )
    num_evaluation_images: int = knob(
        256, "Images drawn from the base and from the adapter for the comparison.", unit="images", at_least=2
    )
    evaluation_batch_size: int = knob(16, "Images drawn at once in the comparison.", unit="images", at_least=1)
    evaluation_eta: float = knob(
        0.0, "The chain's eta while evaluating; 0 is what a deterministic sampler draws.", unit="factor", at_least=0
    )
    skip_final_inference: bool = knob(False, "Draw no validation images after training.")


@dataclass(frozen=True)
class CheckpointingArguments:
    """Checkpointing: saving the state and resuming from it"""

    checkpointing_steps: int = knob(500, "How often a checkpoint is saved.", unit="optimiser steps", at_least=1)
    checkpoints_total_limit: int | None = knob(
        None, "Checkpoints kept, the oldest go first; null means all.", unit="checkpoints", at_least=1
    )
    resume_from_checkpoint: str | None = knob(
        None, "Checkpoint to go on from: `latest`, a name such as `checkpoint-500`, or a path."
    )


@dataclass(frozen=True)
class HubArguments:
    """Hub: publishing the adapter"""

    push_to_hub: bool = knob(
        False, "Publish the adapter, its card and figures on the Hub at the end; access is checked before training."
    )
    hub_model_id: str | None = knob(
        None, "Repository, `owner/name` or `name`; null means the name of output_dir, of the token's user."
    )
    hub_token: str | None = knob(
        None,
        "Access token with the right to write, never shown or saved; null takes that of HF_TOKEN or `hf auth login`.",
        secret=True,
    )
    hub_private_repo: bool = knob(False, "Make the repository a private one; one that exists must be private.")
    hub_revision: str | None = knob(None, "Branch to publish on, made when missing; null means main.")
    push_every: int | None = knob(
        None,
        "How often the adapter of a checkpoint is published while training, on a branch `checkpoint-STEP`; null means "
        "never.",
        unit="optimiser steps",
        at_least=1,
    )


@dataclass(frozen=True)
class LoggingArguments:
    """Logging: where the curves go"""

    logging_dir: str = knob("logs", "Folder of the tracker's files, inside output_dir.")
    report_to: Literal["tensorboard", "none"] = knob("tensorboard", "Tracker that receives the curves and images.")
    tracker_name: str = knob("rlr-lora", "Name of the run in the tracker.")


@dataclass(frozen=True)
class Config:
    """One run, fully resolved: hashable, immutable, checked by `load_config`."""

    model: ModelArguments
    lora: LoraArguments
    chain: ChainArguments
    prompts: PromptArguments
    chain_of_thought: ChainOfThoughtArguments
    reward: RewardArguments
    estimator: EstimatorArguments
    regularization: RegularizationArguments
    training: TrainingArguments
    optimizer: OptimizerArguments
    validation: ValidationArguments
    checkpointing: CheckpointingArguments
    hub: HubArguments
    logging: LoggingArguments
