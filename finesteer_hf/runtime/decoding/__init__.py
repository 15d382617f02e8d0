"""Ways of decoding beside the plain one: compiled, with logits changed, with tokens taken back."""
