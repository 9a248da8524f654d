"""`python -m rlr_peft` is `rlr-peft`."""

from rlr_peft.cli import main

raise SystemExit(main())
