"""`python -m ctpd`, also under `accelerate launch`."""

from ctpd.cli.main import main

main()
