"""The methods that CTPD is compared with: one module each, its parameters and its objective."""
