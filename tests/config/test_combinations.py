"""What can be read but not run: expected, got and what to do, in one sentence."""

import re
from pathlib import Path

import pytest

from rlr_peft.config import Config, ConfigError
from rlr_peft.config import load_config as load
from tests.config.loading import REQUIRED, refusal


def with_rlr(argv: str) -> list[str]:
    """The flags, of `rlr` where they name no method."""
    return argv.split() if "--estimator" in argv else ["--estimator", "rlr", *argv.split()]


REFUSED = [
    (
        "--train_batch_size 3 --num_images_per_prompt 2",
        "num_images_per_prompt: expected a number that divides the images of an update, 3 (",
    ),
    ("--train_batch_size 0", "train_batch_size: expected at least 1 and at most 4096, got 0"),
    ("--gradient_accumulation_steps=-1", "gradient_accumulation_steps: expected at least 1 and at most 100000, got -1"),
    ("--zo_scale 0", "zo_scale: expected above 0 and at most 1000, got 0.0"),
    ("--vlm_answers yes YES", "vlm_answers: expected two different answers, the good one first, got yes YES"),
    ("--vlm_answers yes", "vlm_answers: expected two different answers, the good one first, got yes"),
    ("--shard_denoiser --offload", "shard_denoiser: expected none with offload, got both"),
    (
        "--shard_denoiser --bnb_quantization_config_path nf4",
        "shard_denoiser: expected none with bnb_quantization_config",
    ),
    ("--shard_denoiser --torch_compile", "shard_denoiser: expected none with torch_compile, got both"),
    ("--shard_denoiser --use_dora", "shard_denoiser: expected none with use_dora, got both"),
    ("--learning_rate .nan", "learning_rate: expected a finite number"),
    ("--max_grad_norm .inf", "max_grad_norm: expected a finite number"),
    ("--lora_dropout 1", "lora_dropout: expected at least 0 and below 1, got 1.0"),
    ("--num_images_per_prompt 1", "num_images_per_prompt: expected 2 or more with rlr"),
    (
        "--estimator auto --train_batch_size 1",
        "train_batch_size: expected a number of images in an update that 2, 3 or 4 divides with auto, which compares "
        "the images of a prompt with each other, got 1 (train_batch_size 1 x gradient_accumulation_steps 1); give "
        "--gradient_accumulation_steps 4. For a reward with a gradient there is --estimator full-bp too",
    ),
    (
        "--estimator grpo --train_batch_size 1 --gradient_accumulation_steps 5",
        "got 5 (train_batch_size 1 x gradient_accumulation_steps 5); give --gradient_accumulation_steps 8.",
    ),
    ("--estimator nft --train_batch_size 1", "train_batch_size: expected a number of images in an update"),
    (
        "--estimator grpo --train_batch_size 6 --num_images_per_prompt 4",
        "num_images_per_prompt: expected a number that divides the images of an update, 6 (train_batch_size 6 x "
        "gradient_accumulation_steps 1), got 4; leave it out, or give --gradient_accumulation_steps 2.",
    ),
    (
        "--estimator auto --train_batch_size 5 --gradient_accumulation_steps auto --max_train_steps 9",
        "gradient_accumulation_steps auto); give --train_batch_size 8.",
    ),
    ("--num_images_per_prompt 1 --estimator reinforce", "num_images_per_prompt: expected 2 or more with reinforce"),
    ("--eta 0", "estimator: expected noise in the chain for the score terms of rlr, got eta 0.0"),
    ("--step_kind ode --estimator reinforce", "score terms of reinforce, got step_kind ode"),
    ("--step_kind ode --black_box_steps 50", "expected noise in the chain"),
    ("--eta 1.5", "eta: expected 0 to 1 with step_kind ancestral, got 1.5"),
    ("--optimizer Lion --learning_rate auto", "learning_rate: expected a number with Lion, got auto"),
    ("--optimizer Prodigy --learning_rate 1e-4", "learning_rate: expected about 1 with Prodigy"),
    (
        "--optimizer Muon --learning_rate 1e-3 --use_8bit_adam",
        "use_8bit_adam: expected optimizer AdamW with it, got Muon",
    ),
    ("--optimizer Muon --learning_rate 1e-3 --use_dora", "use_dora: expected none with Muon"),
    (
        "--optimizer Adafactor --learning_rate 1e-3 --adam_beta1 0.8",
        "adam_beta1: expected none with Adafactor, got 0.8; use --optimizer",
    ),
    ("--fo_steps 51", "fo_steps: expected at most num_inference_steps (50), got 51"),
    ("--black_box_steps 51", "black_box_steps: expected at most num_inference_steps (50), got 51"),
    (
        "--estimator full-bp --fo_steps 3",
        "fo_steps: expected none with full-bp, got 3; use --estimator rlr, rlr-paper, ",
    ),
    ("--estimator truncated-bp --fo_steps auto", "fo_steps: expected a whole number or random with truncated-bp"),
    ("--estimator truncated-bp --fo_steps 0", "fo_steps: expected at least 1 and at most 1000, got 0"),
    ("--estimator reinforce --fo_steps 1", "fo_steps: expected none with reinforce, got 1; use --estimator rlr"),
    ("--estimator full-bp --black_box_steps 2", "black_box_steps: expected none with full-bp"),
    (
        "--ho_length auto --memory_budget 8",
        "ho_step_memory: expected a larger number than zo_step_memory",
    ),
    (
        "--ho_length auto --memory_budget 8 --ho_step_memory 1 --zo_step_memory 1",
        "ho_step_memory: expected a larger number than zo_step_memory beside memory_budget, got 1.0 and 1.0",
    ),
    ("--estimator full-bp --ho_blocks 1", "ho_blocks: expected none with full-bp"),
    ("--estimator truncated-bp --ho_length 2", "ho_length: expected none with truncated-bp"),
    (
        "--estimator reinforce --ho_length 2",
        "ho_length: expected none with reinforce, got 2; use --estimator rlr or rlr-paper.",
    ),
    ("--ho_start window --ho_blocks 1", "ho_window: expected together with ho_start window, got ho_start window and"),
    ("--ho_window 1 2", "ho_window: expected together with ho_start window"),
    ("--ho_start window --ho_blocks 1 --ho_window 0 5", "ho_window: expected two steps a b with 1 <= a <= b"),
    ("--ho_start window --ho_blocks 1 --ho_window 9 51", "num_inference_steps (50), got 9 51"),
    ("--ho_start window --ho_blocks 1 --ho_window 9 5", "ho_window: expected two steps a b"),
    ("--ho_start window --ho_blocks 1 --ho_window 9", "ho_window: expected two steps a b"),
    ("--ho_start window --ho_blocks 1 --ho_window 2 9 --fo_steps 3", "expected steps above the 3 last ones"),
    ("--ho_start gradient-norm", "ho_start: expected a number of ho_blocks to draw, got ho_blocks all"),
    ("--fo_steps 45 --ho_length 6", "ho_length: expected at most 5 (num_inference_steps 50 minus 45"),
    ("--estimator rlr-paper --ho_length 50", "ho_length: expected at most 49"),
    ("--ho_length auto", "ho_length: expected a budget beside auto, got none"),
    ("--ho_length 2 --nfe_budget 100", "nfe_budget: expected only with ho_length auto, got ho_length 2"),
    ("--zo one-point", "ho_blocks: expected 0 or 1 with a zeroth-order term (one-point zo)"),
    ("--zo two-point --ho_blocks 1", "fo_steps: expected a number beside a zeroth-order term (two-point zo)"),
    ("--zo two-point --ho_blocks 2", "ho_blocks: expected 0 or 1 with a zeroth-order term (two-point zo)"),
    ("--estimator rlr-paper --ho_blocks all", "ho_blocks: expected 0 or 1 with a zeroth-order term (two-point zo)"),
    ("--estimator full-bp --zo one-point", "zo: expected none with full-bp"),
    ("--ho_blocks 0", "fo_steps: expected a number with ho_blocks 0, got auto, which needs score terms"),
    ("--ho_blocks 0 --fo_steps 3 --ho_length 2", "ho_length: expected none with ho_blocks 0"),
    ("--estimator ddpo --ho_blocks 0", "ho_blocks: expected at least 1 and at most 1000, got 0"),
    ("--estimator grpo --fo_steps 2", "fo_steps: expected none with grpo, got 2"),
    (
        "--estimator refl --fo_steps auto",
        "fo_steps: expected a whole number or null with refl, got auto; use --estimator rlr or rlr-paper.",
    ),
    ("--estimator refl --fo_steps 0", "fo_steps: expected at least 1 and at most 1000, got 0"),
    (
        "--estimator refl --fo_steps random",
        "fo_steps: expected a whole number or null with refl, got random; use --estimator truncated-bp.",
    ),
    (
        "--estimator full-bp --fo_steps random",
        "fo_steps: expected none with full-bp, got random; use --estimator truncated-bp.",
    ),
    (
        "--fo_steps random",
        "fo_steps: expected a whole number or auto with rlr, got random; use --estimator truncated-bp.",
    ),
    ("--estimator ddpo --black_box_steps 2", "black_box_steps: expected none with ddpo, got 2"),
    ("--estimator refl --black_box_steps 2", "black_box_steps: expected none with refl, got 2"),
    ("--step_choice inverse-variance --fo_steps 3", "step_choice: expected crossing where K is given"),
    ("--step_choice inverse-variance --ho_length 2", "step_choice: expected crossing"),
    ("--step_choice inverse-variance --ho_blocks 2", "step_choice: expected crossing"),
    ("--step_choice inverse-variance --state_baseline", "step_choice: expected crossing"),
    ("--step_choice inverse-variance --fo_steps 2 --zo two-point --ho_blocks 1", "step_choice: expected crossing"),
    ("--step_choice inverse-variance --estimator reinforce", "step_choice: expected none with reinforce"),
    (
        "--estimator refl --ho_blocks 1",
        "ho_blocks: expected none with refl, got 1; use --estimator rlr, rlr-paper, reinforce, ddpo, grpo or d3po.",
    ),
    ("--estimator auto --state_baseline", "state_baseline: expected none with auto, got true; use --estimator rlr"),
    ("--estimator auto --eta 0", "estimator: expected noise in the chain for the score terms of rlr, got eta 0.0"),
    ("--gradient_accumulation_steps auto --max_train_steps 9", "expected a number with rlr, got auto, which needs a"),
    ("--estimator auto --gradient_accumulation_steps auto", "expected a number or a length in updates, got auto"),
    (
        "--estimator auto --gradient_accumulation_steps auto --max_train_steps 9 --scale_lr --learning_rate 1e-4",
        "gradient_accumulation_steps: expected a number with scale_lr, got auto",
    ),
    ("--estimator ddpo --ho_length 2", "ho_length: expected none with ddpo, got 2"),
    (
        "--estimator grpo --ho_blocks 2 --ho_start gradient-norm",
        "ho_start: expected uniform or window with grpo, got gradient-norm",
    ),
    ("--estimator d3po --zo one-point", "zo: expected none with d3po, got one-point"),
    ("--estimator ddpo --eta 0", "estimator: expected noise in the chain for the score terms of ddpo"),
    ("--estimator d3po --step_kind ode", "estimator: expected noise in the chain for the score terms of d3po"),
    ("--inner_epochs 2", "inner_epochs: expected none with rlr, got 2; use --estimator ddpo, grpo, d3po, ram"),
    ("--estimator full-bp --state_baseline", "state_baseline: expected none with full-bp, got true"),
    ("--estimator grpo --state_baseline", "state_baseline: expected none with grpo, got true"),
    (
        "--normalize_rewards",
        "normalize_rewards: expected no such knob any more, got a flag; write `reward_fn: {NAME: 1}`",
    ),
    ("--estimator refl --fo_coefficient 2", "fo_coefficient: expected none with refl, got 2.0"),
    ("--estimator grpo --ho_coefficient 0.5", "ho_coefficient: expected none with grpo, got 0.5"),
    ("--zo_coefficient=-1", "zo_coefficient: expected at least 0 and at most 1000000, got -1.0"),
    (
        "--estimator ddpo --per_prompt_stat_tracking_min_count 33",
        "per_prompt_stat_tracking_min_count: expected at most per_prompt_stat_tracking_buffer_size (32), got 33",
    ),
    ("--estimator ddpo --antithetic", "antithetic: expected none with ddpo, got true"),
    ("--antithetic --num_images_per_prompt 2", "an even num_images_per_prompt of 4 or more, got 4 and 2"),
    (
        "--antithetic --train_batch_size 3 --gradient_accumulation_steps 4",
        "antithetic: expected pairs, that is an even train_batch_size",
    ),
    ("--estimator d3po --num_images_per_prompt 1", "num_images_per_prompt: expected an even number with d3po"),
    (
        "--estimator d3po --train_batch_size 3 --gradient_accumulation_steps 2 --num_images_per_prompt 2",
        "train_batch_size: expected an even number with d3po, which compares the images of a prompt in pairs, got 3; "
        "give --train_batch_size 4.",
    ),
    ("--reference init_adapter", "reference: expected base without an init_adapter, got init_adapter; give --init_ad"),
    (
        "--estimator adjoint-matching --reference init_adapter --init_adapter a/b",
        "reference: expected base with adjoint-matching, which differentiates it, got init_adapter",
    ),
    (
        "--noise_window 9 51",
        "noise_window: expected two steps a b with 1 <= a <= b <= num_inference_steps (50), got 9 51",
    ),
    ("--noise_window 9", "noise_window: expected two steps a b"),
    (
        "--evaluation_scheduler EulerAncestralDiscreteScheduler --evaluation_eta 1",
        "evaluation_eta: expected 0 with evaluation_scheduler, which has noise of its own or none, got 1; drop one",
    ),
    (
        "--evaluation_scheduler DPMSolverMultistepScheduler --dcot_rules",
        "evaluation_scheduler: expected none with dcot_rules, whose prompts change within the chain, got DPMSolver",
    ),
    ("--noise_steps 2 --noise_window 2 5", "noise_steps: expected a method that trains single steps and measures none"),
    (
        "--estimator grpo --noise_steps 2",
        "noise_window: expected 2 steps or more beside noise_steps 2, got none; widen",
    ),
    ("--estimator grpo --noise_steps 3 --noise_window 4 5", "noise_window: expected 3 steps or more beside noise_ste"),
    ("--estimator grpo --noise_steps 2 --noise_window 1 5", "noise_window: expected to begin at 2 or later beside noi"),
    ("--estimator grpo --noise_slide 2", "noise_slide: expected noise_steps with it, got 2 alone; give --noise_steps"),
    (
        "--estimator grpo --noise_steps 2 --noise_window 2 5 --ho_start window --ho_blocks 1 --ho_window 2 3",
        "ho_window: expected none beside noise_steps, which move, got both; use --noise_window alone.",
    ),
    (
        "--estimator grpo --ratio_norm --divergence_limit 1 --inner_epochs 2",
        "divergence_limit: expected none with ratio_norm, which clips, got 1; drop one of the two.",
    ),
    ("--estimator grpo --reward_scaling group", "reward_scaling: expected running, first or none with a single reward"),
    (
        '--estimator ddpo --reward_scaling group --reward_fn {"a.py:f":1,"b.py:f":2}',
        "reward_scaling: expected running, first or none with ddpo, got group; use --estimator grpo, ram, nft or awm.",
    ),
    (
        '--estimator grpo --reward_scaling group --reward_fn {"a.py:f":1,"b.py:f":2} --reward_limit 3',
        "reward_scaling: expected running, first or none with reward_limit, which is of the sum, got group",
    ),
    ("--estimator nft --step_kind ode --noise_window 3 4", "noise_window: expected noise in the chain, got step_kind"),
    ("--estimator grpo --divergence_limit 0.1", "divergence_limit: expected inner_epochs of 2 or more, without which"),
    ("--estimator nft --num_images_per_prompt 1", "num_images_per_prompt: expected 2 or more with nft, which compares"),
    ("--estimator ram --detach_negative", "detach_negative: expected none with ram, which trains without guidance"),
    ("--estimator ram --base_pull 1", "base_pull: expected none with ram, got 1.0; use --estimator nft or awm."),
    ("--estimator awm --norm_margin 0.1", "norm_margin: expected only with norm_penalty, got 0.1"),
    ("--estimator grpo --num_images_per_prompt 1", "num_images_per_prompt: expected 2 or more with grpo"),
    ("--estimator full-bp --eta 0 --kl_beta 0.1", "kl_beta: expected noise in the chain, without which"),
    ("--estimator full-bp --eta 0 --kl_interval 5", "kl_interval: expected noise in the chain"),
    ("--estimator full-bp --step_kind ode --kl_limit 5", "kl_limit: expected noise in the chain"),
    ("--ho_start window --ho_blocks 1 --ho_window 1 b", "ho_window: expected two steps a b with 1 <= a <= b"),
    ("--ho_start window --ho_blocks 1 --ho_window fine", "ho_window: expected two steps a b, since stages have names"),
    ("--dcot_rules --ho_start window --ho_blocks 1 --ho_window hands", "stages of coarse, mid, fine instead of hands"),
    ("--dcot_rules --ho_start window --ho_blocks 1 --fo_steps 20 --ho_window fine", "expected steps above the 20 last"),
    ("--dcot_rules --estimator grpo --ho_start window --ho_blocks 1 --ho_window auto", "got auto; use --estimator rlr"),
    ("--dcot_form contrast", "dcot_form: expected only with a source of stage prompts, got none; give --dcot_columns"),
    ("--dcot_rules --dcot_form contrast --guidance_scale 1", "dcot_form: expected guidance above 1 with contrast"),
    ("--dcot_rules --dcot_columns a b c", "dcot_columns: expected one source of stage prompts, got dcot_columns and"),
    ("--dcot_fractions 0.5 0.5", "dcot_fractions: expected only with a source of stage prompts, got none"),
    ("--dcot_columns a b --dcot_fractions 0.5 0.4", "dcot_fractions: expected fractions above 0 that sum to 1"),
    ("--dcot_columns a b --num_inference_steps 1", "dcot_fractions: expected at least one of the 1 steps"),
    ("--dcot_columns a b --dcot_stages x y z", "dcot_columns: expected one column for each of 3 stages, got a b"),
    ("--dcot_model m --dcot_stages layout prompt", "dcot_stages: expected other names than prompt, which the file of"),
    ("--dcot_rules --dcot_stages a b", "dcot_stages: expected coarse mid fine with dcot_rules, got a b"),
    ("--dcot_endpoint http://localhost:1/v1", "dcot_endpoint_model: expected together with dcot_endpoint, got None"),
    ("--dataset_name d", "prompt_path: expected one source of prompts, got tiny-shapes/train and dataset_name d"),
    ("--streaming", "streaming: expected only with a dataset_name, got True"),
    ("--negative_prompt_column n --negative_prompt ugly", "negative_prompt_column: expected only without negative_"),
    ("--validation_split_percentage 100", "validation_split_percentage: expected above 0 and below 100, got 100"),
    (
        "--validation_split_percentage 5 --evaluation_prompt_path tiny-shapes/test",
        "validation_split_percentage: expected only without evaluation_prompt_path",
    ),
    ("--early_stopping_steps 20", "early_stopping_steps: expected a heldout_reward_fn to watch, got none"),
    ("--early_stopping_steps 4", "early_stopping_steps: expected at least 5 and at most 1000000000, got 4"),
    ("--learning_rate auto --scale_lr", "scale_lr: expected none with learning_rate auto, got true"),
    ("--learning_rate 1e-3 --lr_warmup_steps 5", "lr_warmup_steps: expected 0 with lr_scheduler constant, got 5"),
    ("--lr_scheduler cosine --lr_warmup_steps 5 --max_train_steps 4", "expected at most max_train_steps (4), got 5"),
    ("--heldout_reward_fn tiny-shapes", "heldout_reward_fn: expected another reward than reward_fn"),
    ("--heldout_reward_fn a b a", "heldout_reward_fn: expected different rewards, got a b a"),
    (
        "--reward_fn {a:,b:1} --heldout_reward_fn b",
        "mapping of names to numbers or a text, got {'a': None, 'b:1': None}",
    ),
    ("--reward_fn={}", "reward_fn: expected finite weights, not all 0, got {}"),
    ('--reward_minimum {"pickscore":20}', "reward_minimum: expected a name of reward_fn (tiny-shapes), got pick"),
    ("--reward_server_timeout 0", "reward_server_timeout: expected above 0 and at most 86400, got 0.0"),
    ("--reward_limit .inf", "reward_limit: expected a finite number, got inf"),
    ("--reward_limit .nan", "reward_limit: expected a finite number, got nan"),
    ("--reward_minimum_penalty 0", "reward_minimum_penalty: expected above 0 and at most 1000000, got 0.0"),
    ("--logging_dir ../logs", "logging_dir: expected a relative folder inside output_dir"),
    ("--logging_dir /logs", "logging_dir: expected a relative folder inside output_dir"),
    ("--tracker_name ../../x", "tracker_name: expected a relative folder inside output_dir, got ../../x; drop the"),
    ("--tracker_name /x", "tracker_name: expected a relative folder inside output_dir"),
    ("--tracker_name ..\\..\\x", "tracker_name: expected a relative folder inside output_dir"),
    ("--revision ../../x", "revision: expected a branch, tag or commit of the repository, got '../../x'"),
    ("--hub_revision ../../x", "hub_revision: expected a branch, tag or commit of the repository, got '../../x'"),
    ("--variant ../x", "variant: expected a word of a file name such as fp16, got '../x'"),
    ("--output_dir pyproject.toml/x", "output_dir: expected a folder or a place for one"),
    ("--prompt_path nowhere.txt", "prompt_path: expected an existing text file"),
    ('--prompt_path {"simple-animals":1,"nowhere.txt":2}', "prompt_path: expected an existing text file"),
    ('--prompt_path {"simple-animals":1,"data/nowhere.csv":2}', "prompt_path: expected an existing text file"),
    ("--prompt_path owner/name", "prompt_path: expected an existing text file"),
    ('--prompt_path {"simple-animals":1,"tiny-shapes/test":0}', "prompt_path: expected weights above 0, none of them"),
    ('--prompt_path {"simple-animals":1,"tiny-shapes/test":.0005}', "prompt_path: expected weights above 0"),
    ("--prompt_path {}", "prompt_path: expected weights above 0, none of them below 0.001 of their sum, got {}"),
    ('--prompt_path {"simple-animals":1} --dataset_name d', "prompt_path: expected one source of prompts, got"),
    ("--evaluation_prompt_path tiny-shapes/all", "evaluation_prompt_path: expected an existing text file"),
    ("--resume_from_checkpoint some/checkpoint-3", "resume_from_checkpoint: expected latest, a name or an existing"),
    ("--output_dir=", "output_dir: expected a text, got an empty one"),
    ("--tracker_name=", "tracker_name: expected a text, got an empty one"),
    ("--heldout_reward_fn=", "heldout_reward_fn: expected a text, got an empty one"),
    ("--config=", "config: expected a text, got an empty one"),
    (
        "--bnb_quantization_config_path nowhere.json",
        "bnb_quantization_config_path: expected a JSON file or nf4, got nowhere",
    ),
    (
        "--bnb_quantization_config_path README.md",
        "bnb_quantization_config_path: expected a JSON file or nf4, got README",
    ),
    (
        "--vae_tile_size 512 --pretrained_tiny_vae_name_or_path madebyollin/taesd",
        "vae_tile_size: expected the pipeline's own VAE, got pretrained_tiny_vae_name_or_path madebyollin/taesd",
    ),
    ("--offload --torch_compile", "torch_compile: expected weights that stay where they are, got offload"),
]


@pytest.mark.parametrize(("argv", "message"), REFUSED, ids=[argv for argv, _ in REFUSED])
def test_impossible_combination_says_expected_got_and_what_to_do(
    monkeypatch: pytest.MonkeyPatch, argv: str, message: str
) -> None:
    monkeypatch.chdir(Path(__file__).parents[2])
    got = refusal(*with_rlr(argv))
    assert message in got
    assert "\n" not in got, "one problem must be one line"
    assert re.fullmatch(r"\w+: expected .*, got .*; .+\.", got)


ALLOWED = [
    "--estimator auto --gradient_accumulation_steps auto --max_train_steps 9",
    "--estimator full-bp --eta 0 --num_images_per_prompt 1",
    "--estimator truncated-bp --step_kind ode --fo_steps 4",
    "--fo_steps 50 --step_kind ode --num_images_per_prompt 1",
    "--estimator rlr-paper",
    "--estimator rlr-paper --zo none --ho_blocks 3 --ho_start gradient-norm",
    "--estimator rlr-paper --ho_length auto --nfe_budget 100",
    "--ho_length auto --memory_budget 8 --ho_step_memory 1 --zo_step_memory 0.5",
    "--fo_steps 2 --black_box_steps 3 --reward_fn jpeg-compressibility",
    "--estimator reinforce --step_kind flow-sde --eta 1.3",
    "--step_kind cps --eta 0.7",
    "--fo_steps 2 --ho_length 48",
    "--ho_start window --ho_blocks 1 --ho_window 50 50",
    "--dcot_rules --ho_start window --ho_blocks 1 --ho_window fine",
    "--dcot_rules --ho_start window --ho_blocks 1 --fo_steps 5 --ho_window coarse mid",
    "--dcot_columns a b --dcot_fractions 0.25 0.75 --ho_start window --ho_blocks 1 --ho_window auto",
    "--dcot_endpoint http://localhost:1/v1 --dcot_endpoint_model m --dcot_cache stages.jsonl",
    "--prompt_path null --dataset_name d --streaming --max_train_steps 5 --caption_column caption",
    "--prompt_path simple-animals/train --evaluation_prompt_path simple-animals/test",
    '--prompt_path {"simple-animals":3,"tiny-shapes/test":.5} --validation_split_percentage 5',
    '--prompt_path {"simple-animals":3,"owner/name-v1.5":1,"tests":1} --dataset_config_name x',
    "--metadata_columns a b --validation_split_percentage 5",
    "--train_batch_size 2 --gradient_accumulation_steps 2",
    "--lr_scheduler constant_with_warmup --lr_warmup_steps 5",
    "--resume_from_checkpoint checkpoint-20",
    "--estimator ddpo --num_images_per_prompt 1 --ho_blocks 5",
    "--estimator grpo --inner_epochs 2 --kl_beta 0.1 --step_kind flow-sde",
    "--estimator d3po --num_images_per_prompt 2 --ho_blocks 2 --ho_start window --ho_window 2 9",
    "--estimator refl --fo_steps 10 --eta 0 --num_images_per_prompt 1",
    "--estimator truncated-bp --fo_steps random --step_kind ode --num_images_per_prompt 1",
    "--step_choice inverse-variance --antithetic --black_box_steps 3",
    "--fo_steps 2 --state_baseline --antithetic --ho_coefficient 0.5",
    "--heldout_reward_fn jpeg-compressibility --early_stopping_steps 5 --kl_limit 10",
    "--heldout_reward_fn jpeg-compressibility aesthetic --reward_dtype bf16 --offload_rewards",
    "--estimator rlr-paper --ho_blocks 0 --num_images_per_prompt 1",
    "--estimator full-bp --kl_beta 0.1 --kl_steps all",
]


def test_a_quantised_base_takes_one_width_and_no_dora(tmp_path: Path) -> None:
    path = tmp_path / "bits.json"
    path.write_text('{"bnb_4bit_quant_type": "nf4"}')
    argv = ["--bnb_quantization_config_path", str(path)]
    assert "expected an object with load_in_4bit or load_in_8bit true, got neither" in refusal(*argv)
    path.write_text('{"load_in_4bit": true, "load_in_8bit": true}')
    assert "got load_in_4bit and load_in_8bit" in refusal(*argv)
    path.write_text('{"load_in_4bit": true}')
    assert load([*REQUIRED, *argv]).model.bnb_quantization_config_path == str(path)
    assert "use_dora: expected a base in full width" in refusal(*argv, "--use_dora")
    assert "torch_compile: expected a base without bitsandbytes layers" in refusal(*argv, "--torch_compile")


@pytest.mark.parametrize("argv", ALLOWED)
def test_possible_combination_is_accepted(argv: str) -> None:
    assert isinstance(load([*REQUIRED, *with_rlr(argv)]), Config)


def test_several_problems_are_told_in_one_error() -> None:
    got = refusal(*with_rlr("--train_batch_size 3 --num_images_per_prompt 2 --eta 0 --ho_length 99"))
    assert got.splitlines()[0] == "3 problems in the configuration:"
    assert len(got.splitlines()) == 4


@pytest.mark.parametrize("name", ["prompt_path", "evaluation_prompt_path", "output_dir", "resume_from_checkpoint"])
@pytest.mark.parametrize("path", ["a red ball on a table " * 20, "~nobody-of-that-name/x"], ids=["long", "home"])
def test_a_path_that_the_system_refuses_is_no_traceback(name: str, path: str) -> None:
    """A prompt in place of its file, for example, is longer than a file's name may be."""
    value = f"{path}/x" if name == "resume_from_checkpoint" else path
    if name == "output_dir" and path.startswith("~"):
        load([*REQUIRED, f"--{name}", value])  # it may be made yet
    else:
        assert refusal(*REQUIRED, f"--{name}", value).startswith(f"{name}: expected ")


@pytest.mark.parametrize(
    ("place", "reason"),
    [
        ("/proc/x/y", "/proc cannot be written to"),
        ("link", "link is a link to nothing"),
        ("link/x", "link is a link to nothing"),
        ("file/x", "file is a file"),
        ("x" * 256, "a name is longer than 255 bytes"),
        ("new/" + "\N{SNOWMAN}" * 86, "a name is longer than 255 bytes"),
    ],
)
def test_an_output_folder_that_cannot_be_made_is_refused_at_once(tmp_path: Path, place: str, reason: str) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "nothing")
    (tmp_path / "file").touch()
    before = sorted(tmp_path.iterdir())
    message = refusal(*REQUIRED, "--output_dir", str(tmp_path / place))
    assert message.startswith("output_dir: expected a folder or a place for one, got ") and reason in message
    load([*REQUIRED, "--output_dir", str(tmp_path / "new" / ("x" * 255))])
    assert sorted(tmp_path.iterdir()) == before


def test_prompt_file_may_be_any_existing_file(tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_text("a cat\n", encoding="utf-8")
    assert load([*REQUIRED, "--prompt_path", str(path)]).prompts.prompt_path == str(path)


def test_publishing_of_checkpoints_needs_the_hub() -> None:
    with pytest.raises(ConfigError, match="push_every: expected push_to_hub"):
        load([*REQUIRED, "--push_every", "500"])
