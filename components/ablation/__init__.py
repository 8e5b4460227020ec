"""Ablation studies: variants of one configuration, trained alike, compared on the validation split."""
