"""`python -m rlr_peft.cli` is `rlr-peft`."""

from rlr_peft.cli.main import main

raise SystemExit(main())
