"""`python -m rlr_peft` is `rlr-peft`."""

from rlr_peft.cli.main import main

raise SystemExit(main())
