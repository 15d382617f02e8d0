"""From records to rows: checked, templated, linted and split."""
