"""`python -m ctpd`."""

from ctpd.cli.main import main

main()
