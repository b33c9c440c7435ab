"""The one Trainer, its data and its callbacks."""
