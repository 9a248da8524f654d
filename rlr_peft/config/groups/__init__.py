"""The knobs, group by group; see `rlr_peft.config.arguments`."""
