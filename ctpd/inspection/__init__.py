"""What `ctpd inspect` measures: tokenizers on texts, stored importance weights."""
