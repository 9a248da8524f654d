# /// script
# requires-python = ">=3.11"
# dependencies = ["rlr-peft"]
# ///
"""Fine-tunes LoRA weights of a diffusers pipeline on a reward; `rlr-peft train` without a checkout.

python train_rlr_lora.py --config configs/tiny_shapes.yaml
"""

import sys

from rlr_peft.train import main

if __name__ == "__main__":
    sys.exit(main())
